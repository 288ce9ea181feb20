"""The pages: both forms, errors in place, languages, escaping, headers."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from flask.testing import FlaskClient

from tests.fakes import FakeLoaded
from tests.test_images import png

HOSTILE = "<script>alert(1)</script>\"'&{{7*7}}"


def page_of(response: Any) -> str:
    assert response.mimetype == "text/html"
    return str(response.get_data(as_text=True))


def test_index_has_both_forms(client: FlaskClient) -> None:
    page = page_of(client.get("/"))
    assert 'action="/avibe' in page and 'action="/avision' in page
    for name in ("prompt", "max_tokens", "temperature", "image"):
        assert f'name="{name}"' in page


def test_avibe_answers_on_the_same_page_with_its_numbers(client: FlaskClient) -> None:
    response = client.post("/avibe", data={"prompt": "Столица Франции?", "max_tokens": "99", "temperature": "0"})
    page = page_of(response)
    assert response.status_code == 200
    assert page.count("Столица Франции?") >= 2, "the prompt is kept and the echo runner repeats it"
    assert response.headers["X-Request-ID"] in page
    assert 'value="99"' in page


def test_avision_answers_on_the_same_page(client: FlaskClient) -> None:
    data = {"prompt": "what is it?", "image": (io.BytesIO(png()), "x.png", "image/png")}
    page = page_of(client.post("/avision", data=data, content_type="multipart/form-data"))
    assert page.count("what is it?") >= 2


def test_error_is_shown_on_the_form_with_the_input_kept(client: FlaskClient) -> None:
    response = client.post("/avibe", data={"prompt": "keep me", "max_tokens": "999999"})
    page = page_of(response)
    assert response.status_code == 400
    assert "max_tokens: must be at most 2048, got 999999" in page
    assert "keep me" in page and 'value="999999"' in page
    assert 'action="/avibe' in page


def test_avision_error_is_shown_on_its_form(client: FlaskClient) -> None:
    data = {"prompt": "keep me", "image": (io.BytesIO(b"<svg/>"), "x.svg", "image/svg+xml")}
    response = client.post("/avision", data=data, content_type="multipart/form-data")
    page = page_of(response)
    assert response.status_code == 415
    assert "must be one of PNG, JPEG, WebP, GIF, BMP" in page and "keep me" in page


@pytest.mark.parametrize("path", ["/avibe", "/avision"])
def test_what_was_typed_is_escaped_wherever_it_appears(client: FlaskClient, path: str) -> None:
    data: dict[str, Any] = {"prompt": HOSTILE, "max_tokens": HOSTILE, "temperature": HOSTILE, HOSTILE: HOSTILE}
    page = page_of(client.post(path, data=data, content_type="multipart/form-data"))
    assert "<script>alert" not in page and "49" not in re.sub(r"\?v=\w+|[0-9a-f-]{36}", "", page).split("<main")[1][:50]
    data = {"prompt": HOSTILE, "image": (io.BytesIO(png()), HOSTILE, "image/png")}
    if path == "/avibe":
        data.pop("image")
    response = client.post(path, data=data, content_type="multipart/form-data")
    assert response.status_code == 200, "the echo runner answers with the hostile text"
    assert "<script>alert" not in page_of(response) and "&lt;script&gt;" in page_of(response)


def test_form_refused_for_its_rate_keeps_the_input(make_app: Any) -> None:
    client = make_app(AVITO_RATE_LIMIT="1/minute").test_client()
    client.post("/avibe", data={"prompt": "first"})
    response = client.post("/avibe", data={"prompt": "keep me", "max_tokens": "7"})
    assert response.status_code == 429
    assert "keep me" in page_of(response) and 'value="7"' in page_of(response)


def test_body_that_is_too_large_is_an_error_page_of_the_form(client: FlaskClient) -> None:
    response = client.post("/avibe", data={"prompt": "x" * (16 * 1024 * 1024)})
    assert response.status_code == 413
    assert "16777216" in page_of(response)


@pytest.mark.parametrize(
    ("accept", "lang"),
    [("ru", "ru"), ("ru-RU,en;q=0.5", "ru"), ("en", "en"), ("de", "en"), ("", "en"), ("en;q=0.2,ru", "ru")],
)
def test_language_follows_the_browser(client: FlaskClient, accept: str, lang: str) -> None:
    assert f'<html lang="{lang}"' in page_of(client.get("/", headers={"Accept-Language": accept}))


def test_language_switch_is_remembered(client: FlaskClient) -> None:
    assert '<html lang="ru"' in page_of(client.get("/?lang=ru"))
    assert '<html lang="ru"' in page_of(client.get("/"))
    assert '<html lang="ru"' in page_of(client.post("/avibe", data={"prompt": ""}))
    assert '<html lang="en"' in page_of(client.get("/?lang=en"))
    assert '<html lang="en"' in page_of(client.get("/?lang=xx", headers={"Accept-Language": "ru"}))


def test_unconfigured_model_says_so_on_its_card(make_app: Any, make_service: Any) -> None:
    client = make_app(make_service({"avibe": FakeLoaded()})).test_client()
    assert "AVISION_MODEL_PATH" in page_of(client.get("/"))
    data = {"prompt": "a", "image": (io.BytesIO(png()), "x.png", "image/png")}
    response = client.post("/avision", data=data, content_type="multipart/form-data")
    assert response.status_code == 503
    assert "model avision: is not configured" in page_of(response)


def test_demo_model_has_a_badge_and_a_header(make_app: Any, make_service: Any) -> None:
    plain = page_of(make_app(make_service()).test_client().get("/"))
    client = make_app(make_service(is_demo=True)).test_client()
    assert page_of(client.get("/")).lower().count("demo") > plain.lower().count("demo")
    assert client.post("/avibe", data={"prompt": "a"}).headers["X-Avito-Demo"] == "1"


def test_reloading_an_answers_address_leads_back(client: FlaskClient) -> None:
    for path in ("/avibe", "/avision"):
        response = client.get(path)
        assert (response.status_code, response.headers["Location"]) == (303, "/")


@pytest.mark.parametrize("path", ["/", "/docs", "/nothing"])
def test_pages_have_a_policy_without_inline_and_security_headers(client: FlaskClient, path: str) -> None:
    response = client.get(path)
    policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["X-Frame-Options"] == "DENY"
    assert response.headers["Referrer-Policy"]
    page = page_of(response)
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son[a-z]+=", page)
    assert not re.search(r"""(src|href)=["'](https?:)?//""", page)


def test_static_files_are_served_with_their_fingerprint(client: FlaskClient) -> None:
    urls = re.findall(r'(?:src|href)="(/static/[^"]+)"', page_of(client.get("/")) + page_of(client.get("/docs")))
    assert urls
    for url in urls:
        response = client.get(url)
        assert response.status_code == 200 and "?v=" in url
        assert "max-age" in response.headers["Cache-Control"]
