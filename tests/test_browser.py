"""The pages in a real Chromium: no policy violation, answers with and without JavaScript, phone width, languages.

How an answer grows on the page is in the second half, over a model that takes a step only when the test lets it.
"""

from __future__ import annotations

import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Sequences
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from werkzeug.serving import WSGIRequestHandler, make_server

from models.engine.sequence import Sequence
from models.errors import NumericError
from models.service import ModelService
from tests.fakes import GENEROUS_S, EchoRunner, FakeLoad, FakeLoaded
from tests.test_images import png
from tests.test_server import Server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
    # Playwright leaves its driver's pipes to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"),
]
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
             "--disable-sync", "--no-first-run", "--host-resolver-rules=MAP insecure.test 127.0.0.1"]  # fmt: skip
ASK = {name: f"form[action^='/{name}'] [type=submit]" for name in ("avibe", "avision")}
PROMPT = {name: f"form[action^='/{name}'] [name=prompt]" for name in ("avibe", "avision")}


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

    def open_(path: str = "/", of: Any = None, host: str = "127.0.0.1", **options: Any) -> Any:
        context = browser.new_context(**options)
        context.set_default_timeout(GENEROUS_S * 1000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        home = f"http://{host}:{(of or server).port}"
        page.on("request", lambda r: None if r.url.startswith((home, "data:", "blob:")) else complaints.append(r.url))
        page.goto(home + path)
        return page

    yield open_
    for context in contexts:
        context.close()
    # Chromium's own lines for what a test provoked: a 4xx, a connection cut off, a header that counts on HTTPS only.
    expected = (
        "the server responded with a status of",
        "net::ERR_INCOMPLETE_CHUNKED_ENCODING",
        "Cross-Origin-Opener-Policy header has been ignored",
    )
    assert [c for c in complaints if not any(line in c for line in expected)] == []


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
    described = page.request.get(page.url.replace("/docs", "/openapi.json")).json()["paths"]
    assert {text.replace("\u200b", "") for text in shown} == set(described)
    assert {"/api/v1/text/generate", "/v1/chat/completions", "/v1/detokenize"} <= set(described)


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
    outcome.locator(".facts").wait_for()  # the answer is complete
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


# Answers that grow on the page.


class HeldRunner(EchoRunner):
    """Takes a step, which makes one byte of the answer, only when it is let."""

    def __init__(self) -> None:
        super().__init__(self._await_permit)
        self._permits = threading.Semaphore(0)
        self.failure: Exception | None = None

    def let(self, num_steps: int) -> None:
        self._permits.release(num_steps)

    def _await_permit(self, _: Sequences[Sequence]) -> None:
        assert self._permits.acquire(timeout=GENEROUS_S * 3)
        if self.failure is not None:
            raise self.failure


class QuietHandler(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, type: str, message: str, *args: Any) -> None:
        return


class LocalServer:
    """The application in this process, so that a test can hold its model and look at its service.

    The application sees the connection, as under Gunicorn, so it learns at once that a client has left.
    """

    def __init__(self, app: Flask) -> None:
        self.service: ModelService = app.extensions["avito_service"]
        self._app = app
        self._streams: list[socket.socket] = []
        self._server = make_server("127.0.0.1", 0, self._serve, threaded=True, request_handler=QuietHandler)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def _serve(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        environ["gunicorn.socket"] = environ["werkzeug.socket"]
        if environ["PATH_INFO"].startswith("/api/v1/"):
            self._streams.append(environ["werkzeug.socket"])
        return self._app(environ, start_response)

    def num_open(self, model: Any = "avibe") -> int:
        snapshot = self.service.snapshot().models[model]
        return snapshot.num_running + snapshot.num_waiting

    def totals(self) -> dict[str, Any]:
        return dict(self._app.test_client().get("/api/metrics").get_json()["application"])

    def cut_off(self) -> None:
        """The connection of the last stream."""
        self._streams[-1].shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serve(make_app: Callable[..., Flask], make_service: Callable[..., ModelService]) -> Iterator[Callable[..., Any]]:
    """Serves models over HTTP in this process; what is held is let go at the end."""
    servers: list[LocalServer] = []
    runners: list[HeldRunner] = []

    def serve_(runner: HeldRunner | None = None, *, settings: dict[str, str] | None = None, **options: Any) -> Any:
        if runner is not None:
            runners.append(runner)
            options["models"] = {"avibe": FakeLoaded(runner), "avision": FakeLoaded(runner)}
        servers.append(LocalServer(make_app(make_service(**options), **(settings or {}))))
        return servers[-1]

    yield serve_
    for runner in runners:
        runner.let(10_000)
    for running in servers:
        running.stop()


@pytest.fixture
def runner() -> HeldRunner:
    return HeldRunner()


def ask(page: Any, prompt: str, model: str = "avibe") -> Any:
    """Fill in and send a form with the mouse; gives the place of the answer."""
    page.fill(PROMPT[model], prompt)
    page.click(ASK[model])
    return page.locator(f"#{model}-outcome")


def await_text(page: Any, text: str, model: str = "avibe") -> None:
    page.wait_for_function(
        "([id, text]) => document.querySelector(`#${id}-outcome [data-answer]`)?.textContent === text",
        arg=[model, text],
    )


def fact(outcome: Any, name: str) -> str:
    return str(outcome.locator(f"[data-fact={name}] dd").inner_text())


def test_text_grows_before_the_end_and_the_numbers_come_with_it(open_page: Any, serve: Any, runner: HeldRunner) -> None:
    page = open_page("/?lang=en", of=serve(runner))
    prompt = "One\n\n   two <b>three</b>"
    outcome = ask(page, prompt)
    outcome.get_by_text("Accepted. Waiting for the first words").wait_for()
    runner.let(10)
    await_text(page, prompt[:10])
    outcome.get_by_text("characters: 10").wait_for()
    assert not page.locator(ASK["avibe"]).is_visible() and page.locator("#avibe [data-stop]").is_visible()
    assert not outcome.locator(".facts").is_visible(), "no token is counted before the service has counted"
    assert page.locator("#avibe [data-status]").inner_text() == "The answer begins."

    runner.let(1000)
    outcome.locator(".facts").wait_for()
    assert outcome.locator("[data-answer]").text_content() == prompt
    assert outcome.locator("[data-answer]").inner_text() == prompt, "line ends and spaces are shown as they are"
    assert fact(outcome, "generated_tokens") == str(len(prompt))
    assert fact(outcome, "finish_reason") == "complete"
    assert re.fullmatch(r"\d+\.\d\d\xa0s", fact(outcome, "time_to_first_token"))
    assert page.locator(ASK["avibe"]).is_visible() and not page.locator("#avibe [data-stop]").is_visible()
    assert page.locator("#avibe [data-status]").inner_text() == "The answer is ready."
    assert not outcome.locator("[data-progress]").is_visible()


@pytest.mark.parametrize("by", ["click", "Escape", "Enter"])
def test_stop_frees_the_place_and_keeps_the_text(
    open_page: Any, serve: Any, runner: HeldRunner, wait_until: Any, by: str
) -> None:
    server = serve(runner)
    page = open_page("/?lang=en", of=server)
    page.fill(PROMPT["avibe"], "abcdefghij" * 10)
    page.focus(ASK["avibe"])
    page.keyboard.press("Enter")
    runner.let(4)
    await_text(page, "abcd")
    if by == "click":
        page.click("#avibe [data-stop]")
    else:
        page.keyboard.press(by)  # the focus has gone to Stop
    outcome = page.locator("#avibe-outcome")
    outcome.get_by_text(re.compile(r"Stopped after \d+\.\d\ss · characters: 4")).wait_for()
    wait_until(lambda: server.totals()["cancelled_requests"] == 1, "the server sees that nobody reads any more")
    runner.let(2)  # far from the answer's end: only a request that was given up can be over
    wait_until(lambda: server.num_open() == 0, "the place is given back")
    assert outcome.locator("[data-answer]").text_content() == "abcd"
    assert page.locator(ASK["avibe"]).is_visible()
    assert page.evaluate("document.activeElement.id") == "avibe-outcome"
    assert len(fact(outcome, "request_id")) == 36


def test_double_click_asks_once_and_stops_nothing(open_page: Any, serve: Any, runner: HeldRunner) -> None:
    server = serve(runner)
    page = open_page(of=server)
    page.fill(PROMPT["avibe"], "abc")
    page.locator(ASK["avibe"]).dblclick()
    runner.let(100)
    page.locator("#avibe-outcome .facts").wait_for()
    assert (server.totals()["total_requests"], server.totals()["cancelled_requests"]) == (1, 0)


def test_each_form_has_one_request_at_a_time_and_the_forms_do_not_know_each_other(
    open_page: Any, serve: Any, runner: HeldRunner, wait_until: Any, tmp_path: Path
) -> None:
    server = serve(runner)
    page = open_page(of=server)
    (tmp_path / "x.png").write_bytes(png())
    page.set_input_files("#avision-image", tmp_path / "x.png")
    ask(page, "first")
    outcome = ask(page, "second", "avision")
    wait_until(lambda: server.num_open() == server.num_open("avision") == 1, "both are admitted")
    page.focus(PROMPT["avibe"])
    page.keyboard.press("Control+Enter")
    page.keyboard.press("Escape")  # in Avibe's form: Avision goes on
    wait_until(lambda: server.totals()["cancelled_requests"] == 1, "the server sees that nobody reads any more")
    runner.let(100)
    await_text(page, "second", "avision")
    outcome.locator(".facts").wait_for()
    # The place is back a moment before the request is accounted for.
    wait_until(lambda: server.num_open() == server.totals()["open_requests"] == 0, "the place is given back")
    assert (server.totals()["total_requests"], server.totals()["cancelled_requests"]) == (2, 1)
    assert page.locator("[data-thumbs] img").count() == 1, "the picture stays chosen"


@pytest.mark.parametrize("host", ["127.0.0.1", "insecure.test"], ids=["clipboard", "plain http elsewhere"])
def test_copy_takes_the_whole_text_and_says_so(open_page: Any, serve: Any, host: str) -> None:
    page = open_page("/?lang=en", of=serve(), host=host)
    assert page.evaluate("Boolean(navigator.clipboard)") == (host == "127.0.0.1")
    prompt = "Привет\n\n  мир  🎉"
    outcome = ask(page, prompt)
    copy = outcome.locator("[data-copy]")
    copy.click()
    page.get_by_role("button", name="Copied").wait_for()
    assert page.locator("#avibe [data-status]").inner_text() == "Copied"
    page.focus(PROMPT["avision"])
    page.keyboard.press("Control+V")
    assert page.locator(PROMPT["avision"]).input_value() == prompt


def test_limit_of_tokens_is_told(open_page: Any, serve: Any) -> None:
    page = open_page("/?lang=en", of=serve())
    page.fill("#avibe-max-tokens", "3")
    outcome = ask(page, "abcdef")
    outcome.get_by_text("the limit of max tokens was reached").wait_for()
    assert outcome.locator("[data-answer]").text_content() == "abc"
    assert fact(outcome, "generated_tokens") == "3"


@pytest.mark.parametrize(
    ("lang", "title", "incomplete"),
    [
        ("en", "The model failed in its arithmetic", "The answer is incomplete."),
        ("ru", "Сбой в вычислениях модели", "Ответ пришёл не полностью."),
    ],
)
def test_error_in_the_stream_is_shown_below_what_came(
    open_page: Any, serve: Any, runner: HeldRunner, lang: str, title: str, incomplete: str
) -> None:
    page = open_page(f"/?lang={lang}", of=serve(runner))
    outcome = ask(page, "abcdef")
    runner.let(3)
    await_text(page, "abc")
    runner.failure = NumericError("the model gave NaN or Inf; the request was ended")
    runner.let(1)
    panel = outcome.locator(".panel-error")
    panel.get_by_text(title).wait_for()
    assert fact(panel, "message") == "the model gave NaN or Inf; the request was ended"
    assert fact(panel, "code") == "numeric_error"
    assert outcome.locator("[data-answer]").text_content() == "abc"
    assert page.locator("#avibe [data-status]").inner_text() == incomplete
    assert page.locator(PROMPT["avibe"]).input_value() == "abcdef"


def test_connection_that_breaks_is_told_and_what_came_is_kept(open_page: Any, serve: Any, runner: HeldRunner) -> None:
    server = serve(runner)
    page = open_page("/?lang=en", of=server)
    outcome = ask(page, "abcdef")
    runner.let(3)
    await_text(page, "abc")
    server.cut_off()
    outcome.get_by_text("The connection broke off").wait_for()
    assert outcome.locator("[data-answer]").text_content() == "abc"
    assert outcome.locator(".panel-error [data-fact=request_id]").is_visible()
    assert not outcome.locator(".panel-error [data-fact=code]").count()
    assert page.locator(ASK["avibe"]).is_visible()


def test_server_that_is_gone_is_told(open_page: Any, serve: Any, runner: HeldRunner) -> None:
    server = serve(runner)
    page = open_page("/?lang=en", of=server)
    outcome = ask(page, "abcdef")
    outcome.get_by_text("Accepted").wait_for()
    server.cut_off()
    outcome.get_by_text("No answer from the server").wait_for()
    assert not outcome.locator("[data-answer]").count()


@pytest.mark.parametrize("has_javascript", [True, False], ids=["javascript", "no javascript"])
def test_refusal_for_the_rate_is_shown_on_the_form(open_page: Any, serve: Any, has_javascript: bool) -> None:
    page = open_page(
        "/?lang=en", of=serve(settings={"AVITO_RATE_LIMIT": "1/minute"}), java_script_enabled=has_javascript
    )
    ask(page, "first").get_by_text("first", exact=True).wait_for()
    outcome = ask(page, "keep me")
    outcome.get_by_text("Too many requests").wait_for()
    assert fact(outcome, "code") == "rate_limited" and fact(outcome, "message").startswith("at most 1 per 1 minute")
    assert len(fact(outcome, "request_id")) == 36
    assert page.locator(PROMPT["avibe"]).input_value() == "keep me"


def test_full_queue_and_a_model_that_loads_are_shown_before_any_stream(
    open_page: Any, serve: Any, runner: HeldRunner
) -> None:
    server = serve(runner, max_running=1, max_waiting=1)
    pages = [open_page("/?lang=en", of=server) for _ in range(3)]
    for page in pages[:2]:
        ask(page, "wait").get_by_text("Accepted").wait_for()
    outcome = ask(pages[2], "keep me")
    outcome.get_by_text("The queue is full").wait_for()
    assert pages[2].locator(PROMPT["avibe"]).input_value() == "keep me"

    load = FakeLoad({"avibe": FakeLoaded()})
    load.gate.clear()
    page = open_page("/?lang=ru", of=serve(models={"avibe": FakeLoaded()}, load=load, wait=False))
    ask(page, "подожди").get_by_text("Модель ещё не готова").wait_for()
    load.gate.set()


@pytest.mark.parametrize("has_javascript", [True, False], ids=["javascript", "no javascript"])
def test_wrong_field_is_marked_and_told_in_the_readers_language(
    open_page: Any, serve: Any, has_javascript: bool
) -> None:
    page = open_page("/?lang=ru", of=serve(), java_script_enabled=has_javascript)
    field = page.locator("#avibe-temperature")
    field.evaluate("e => { e.removeAttribute('max') }")
    field.fill("9")
    outcome = ask(page, "keep me")
    outcome.get_by_text("Проверьте температуру: нужно число от 0 до 2.").wait_for()
    assert fact(outcome, "message") == "temperature: must be at most 2, got 9"
    assert field.get_attribute("aria-invalid") == "true"
    assert "avibe-outcome" in field.get_attribute("aria-describedby").split()
    if has_javascript:
        field.fill("1")
        ask(page, "again").get_by_text("again").wait_for()
        assert field.get_attribute("aria-invalid") is None


def test_request_has_what_is_filled_in_as_numbers_and_the_key_as_a_header(
    open_page: Any, serve: Any, tmp_path: Path
) -> None:
    page = open_page(of=serve())
    for name in ("avibe", "avision"):
        page.locator(f"form[action^='/{name}']").evaluate(
            "form => form.prepend(Object.assign(document.createElement('input'), {name: 'api_key', value: 'ключ-42'}))"
        )
        page.fill(f"#{name}-max-tokens", "")
        page.fill(f"#{name}-temperature", "0.5")
    with page.expect_request("**/api/v1/text/generate") as sent:
        ask(page, "one\ntwo")
    assert sent.value.post_data_json == {"prompt": "one\ntwo", "temperature": 0.5, "stream": True}
    assert sent.value.headers["authorization"] == "Bearer ????-42", "a header carries ASCII"

    (tmp_path / "x.png").write_bytes(png())
    page.set_input_files("#avision-image", tmp_path / "x.png")
    with page.expect_request("**/api/v1/image/analyze") as sent:
        outcome = ask(page, "what?", "avision")
    assert sent.value.headers["authorization"] == "Bearer ????-42"
    await_text(page, "what?", "avision")
    outcome.locator(".facts").wait_for()


def test_russian_page_tells_the_way_of_an_answer(open_page: Any, serve: Any, runner: HeldRunner) -> None:
    page = open_page("/?lang=ru", of=serve(runner))
    outcome = ask(page, "Привет")
    outcome.get_by_text("Запрос принят, ждём первых слов…").wait_for()
    runner.let(4)
    await_text(page, "Пр")
    outcome.get_by_text("символов: 2").wait_for()
    page.keyboard.press("Escape")
    outcome.get_by_text(re.compile("Остановлено через \\d+,\\d\\sс")).wait_for()
    runner.let(100)
    outcome = ask(page, "ещё раз")
    outcome.locator(".facts").wait_for()
    assert re.fullmatch(r"\d+,\d\d\xa0с", fact(outcome, "total_time"))
    assert fact(outcome, "finish_reason") == "ответ полный"


def test_phone_follows_the_text_for_a_reader_at_its_end_only(open_page: Any, serve: Any, runner: HeldRunner) -> None:
    page = open_page("/?lang=en", of=serve(runner), viewport={"width": 360, "height": 640}, has_touch=True)
    page.fill("#avibe-max-tokens", "2000")
    prompt = "line\n" * 30 + "w" * 400 + "\nline" * 100
    ask(page, prompt)
    below = "document.querySelector('#avibe-outcome').getBoundingClientRect().bottom - innerHeight"
    shown = 0
    for _ in range(3):
        runner.let(200)
        shown += 200
        await_text(page, prompt[:shown])
        assert page.evaluate(below) <= 48
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.locator("#avibe [data-stop-below]").is_visible(), "Stop is in reach, too"

    page.evaluate("scrollBy({top: -500, behavior: 'instant'})")
    before = page.evaluate("scrollY")
    runner.let(100)
    await_text(page, prompt[: shown + 100])
    assert page.evaluate("scrollY") == before
    page.click("#avibe [data-stop-below]")
    stopped = page.locator("#avibe-outcome").get_by_text("Stopped after")
    stopped.wait_for()
    assert 0 < stopped.bounding_box()["y"] < 640, "told where the reader is"
    assert page.locator("#avibe [data-stop-below]").count() == 0


def test_browser_that_cannot_stream_posts_the_form_and_gets_a_page(browser: Any, open_page: Any, serve: Any) -> None:
    server = serve()
    page = open_page(of=server)
    page.add_init_script("delete window.TextDecoderStream")
    page.reload()
    ask(page, "plain").get_by_text("plain").wait_for()
    assert page.url.endswith("/avibe#avibe-outcome")


READ_EVENTS = """async ([text, size]) => {
    const bytes = new TextEncoder().encode(text);
    const body = new ReadableStream({
        start(controller) {
            for (let i = 0; i < bytes.length; i += size) controller.enqueue(bytes.slice(i, i + size));
            controller.close();
        },
    });
    const found = [];
    for await (const event of AvitoStream.readEvents(body)) found.push([event.name, event.data]);
    return found;
}"""


def test_events_are_read_whole_wherever_the_stream_is_cut(open_page: Any) -> None:
    page = open_page()
    stream = ': hello\r\n\r\nevent: delta\r\ndata: {"text":"Привет 🎉"}\r\n\r\n'
    stream += "data:a\ndata: b\n\n\nevent: x\rdata\r\rdata: cut off"
    events = [page.evaluate(READ_EVENTS, [stream, size]) for size in (1, 2, 3, 7, 1000)]
    expected = [["delta", '{"text":"Привет 🎉"}'], ["", "a\nb"], ["x", ""]]
    assert events == [expected] * 5
