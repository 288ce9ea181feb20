"""The pages in a real Chromium: no policy violation, answers with and without JavaScript, phone width, languages."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.test_images import png
from tests.test_server import Server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
    # Playwright leaves its driver's pipes to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"),
]
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
             "--disable-sync", "--no-first-run"]  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("browser"), "create()", {}).wait_ready()
    yield running
    running.process.kill()
    running.process.wait()


@pytest.fixture(scope="module")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The application itself, with the embedded Avision."""
    settings = {"AVIBE_MODEL_PATH": "", "AVISION_MODEL_PATH": "vision/demo", "AVITO_DEVICE": "cpu"}
    running = Server(tmp_path_factory.mktemp("demo"), "", settings).wait_ready()
    yield running
    running.process.kill()
    running.process.wait()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Any, server: Server) -> Iterator[Callable[..., Any]]:
    """Opens pages whose every console error and outside request fails the test at its end."""
    contexts: list[Any] = []
    complaints: list[str] = []

    def open_(path: str = "/", of: Server | None = None, **options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        home = f"http://127.0.0.1:{(of or server).port}"
        page.on("request", lambda r: None if r.url.startswith((home, "data:", "blob:")) else complaints.append(r.url))
        page.goto(home + path)
        return page

    yield open_
    for context in contexts:
        context.close()
    expected = "the server responded with a status of"  # Chromium's own line for a 4xx that the test provoked
    assert [c for c in complaints if expected not in c] == []


@pytest.mark.parametrize("has_javascript", [True, False], ids=["javascript", "no javascript"])
def test_question_is_answered_on_the_page(open_page: Any, has_javascript: bool) -> None:
    page = open_page(java_script_enabled=has_javascript)
    page.fill("form[action^='/avibe'] [name=prompt]", "Привет <b>мир</b>")
    page.click("form[action^='/avibe'] [type=submit]")
    outcome = page.locator("#avibe-outcome")
    outcome.get_by_text("Привет <b>мир</b>").first.wait_for()
    assert page.locator("form[action^='/avibe'] [name=prompt]").input_value() == "Привет <b>мир</b>"


@pytest.mark.parametrize("has_javascript", [True, False], ids=["javascript", "no javascript"])
def test_error_is_shown_with_the_input_kept(open_page: Any, has_javascript: bool) -> None:
    page = open_page(java_script_enabled=has_javascript)
    page.fill("form[action^='/avibe'] [name=prompt]", "keep me")
    page.locator("form[action^='/avibe'] [name=max_tokens]").evaluate("e => { e.type = 'text' }")
    page.fill("form[action^='/avibe'] [name=max_tokens]", "none")
    page.click("form[action^='/avibe'] [type=submit]")
    page.locator("#avibe-outcome").get_by_text("max_tokens: must be an integer").wait_for()
    assert page.locator("form[action^='/avibe'] [name=prompt]").input_value() == "keep me"


def test_keyboard_alone_is_enough(open_page: Any) -> None:
    page = open_page()
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.name") == "prompt":
            break
    page.keyboard.type("typed")
    page.keyboard.press("Control+Enter")
    page.locator("#avibe-outcome").get_by_text("typed").first.wait_for()


@pytest.mark.parametrize("path", ["/", "/?lang=ru", "/docs", "/nothing"])
def test_phone_has_no_sideways_scroll(open_page: Any, path: str) -> None:
    page = open_page(path, viewport={"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_switch_turns_the_page_russian_for_good(open_page: Any, server: Server) -> None:
    page = open_page()
    page.click("a[href*='lang=ru']")
    assert page.evaluate("document.documentElement.lang") == "ru"
    page.goto(f"http://127.0.0.1:{server.port}/docs")
    assert page.evaluate("document.documentElement.lang") == "ru"


def test_docs_show_every_operation(open_page: Any) -> None:
    page = open_page("/docs")
    page.locator(".opblock").first.wait_for()
    shown = page.locator(".opblock-summary-path").all_inner_texts()
    assert {text.replace("\u200b", "") for text in shown} >= {"/api/v1/text/generate", "/api/v1/image/analyze"}


@pytest.mark.parametrize(
    ("lang", "question", "answer"),
    [
        ("en", "How many moons are there?", "4"),
        ("ru", "Сколько здесь месяцев?", "4"),
        ("en", "What is inside the circle?", "A small yellow cross."),
        ("ru", "Что внутри круга?", "Маленький жёлтый крест."),
    ],
)
def test_a_click_on_a_sample_chooses_it_with_its_question_and_the_demo_answers(
    open_page: Any, demo_server: Server, lang: str, question: str, answer: str
) -> None:
    page = open_page(f"/?lang={lang}", of=demo_server)
    page.click(f"[data-question='{question}']")
    page.locator("[data-thumbs] img").wait_for()
    assert page.locator("form[action^='/avision'] [name=prompt]").input_value() == question
    page.keyboard.press("Enter")  # the focus is on the button
    outcome = page.locator("#avision-outcome")
    outcome.locator("[data-answer]").wait_for()
    assert outcome.locator("[data-answer]").inner_text() == answer
    assert outcome.locator(".badge-demo").count() == 1


def test_own_question_is_kept_when_a_sample_is_chosen(open_page: Any, demo_server: Server) -> None:
    page = open_page("/?lang=en", of=demo_server)
    page.fill("form[action^='/avision'] [name=prompt]", "What is the price?")
    page.click("[data-sample='shapes.png']")
    page.locator("[data-thumbs] img").wait_for()
    page.click("[data-sample='group.png']")
    page.locator("[data-thumbs]").get_by_text("group.png").wait_for()
    assert page.locator("[data-thumbs] img").count() == 1
    assert page.locator("form[action^='/avision'] [name=prompt]").input_value() == "What is the price?"


def test_samples_are_links_to_the_pictures_without_javascript(open_page: Any, demo_server: Server) -> None:
    page = open_page("/?lang=en", of=demo_server, java_script_enabled=False)
    link = page.locator("[data-sample='shapes.png']")
    picture = page.request.get(f"http://127.0.0.1:{demo_server.port}{link.get_attribute('href')}")
    assert picture.status == 200 and picture.headers["content-type"] == "image/png"
    assert page.get_by_text("Save it, then choose it above.").is_visible()


def test_unconfigured_model_is_explained(open_page: Any, tmp_path: Path) -> None:
    page = open_page()
    assert page.get_by_text("AVISION_MODEL_PATH").count() >= 1
    (tmp_path / "x.png").write_bytes(png())
    assert page.locator("form[action^='/avision'] [type=submit]").is_disabled()
