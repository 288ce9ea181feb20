"""Every error of every door in its contract's shape: one helper, all sources."""

from __future__ import annotations

import io
import json
import re
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient

import responses
from models.errors import NumericError
from responses import STATUS_BY_CODE
from tests.fakes import EchoRunner, FakeLoad, FakeLoaded
from tests.test_images import png
from translations import ERROR_CODES

TEXT = "/api/v1/text/generate"
IMAGE = "/api/v1/image/analyze"


def assert_error(response: Any, code: str, field: str | None = None) -> dict[str, Any]:
    """The error body of `/api`, its status and its headers."""
    body = response.get_json()
    assert response.status_code == STATUS_BY_CODE[code], body
    assert set(body) == {"success", "error", "request_id"}
    assert body["success"] is False
    assert set(body["error"]) == {"code", "message", "field"}
    assert body["error"]["code"] == code
    assert body["error"]["field"] == field
    assert body["error"]["message"] and "\n" not in body["error"]["message"]
    assert body["request_id"] == response.headers["X-Request-ID"]
    assert re.fullmatch(r"\d+\.\d{3}s", response.headers["X-Response-Time"])
    assert not re.search(r"Traceback|File \"|/srv/|/home/|site-packages", response.get_data(as_text=True))
    return dict(body["error"])


def post_json(client: FlaskClient, path: str, body: Any, **headers: str) -> Any:
    return client.post(path, data=json.dumps(body), content_type="application/json", headers=headers)


def post_form(client: FlaskClient, path: str, *files: tuple[bytes, str, str], **fields: str) -> Any:
    data: dict[str, Any] = dict(fields)
    data["image"] = [(io.BytesIO(content), name, kind) for content, name, kind in files]
    return client.post(path, data=data, content_type="multipart/form-data")


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("get", "/api/nothing", "not_found"),
        ("get", "/api/", "not_found"),
        ("post", "/api/v1", "not_found"),
        ("get", TEXT, "method_not_allowed"),
        ("delete", IMAGE, "method_not_allowed"),
        ("post", "/api/health", "method_not_allowed"),
        ("put", "/api/metrics/reset", "method_not_allowed"),
    ],
)
def test_framework_errors_have_the_shape(client: FlaskClient, method: str, path: str, code: str) -> None:
    response = getattr(client, method)(path)
    assert_error(response, code)
    if code == "method_not_allowed":
        assert response.headers["Allow"]


@pytest.mark.parametrize("path", [TEXT, IMAGE])
@pytest.mark.parametrize(
    ("body", "content_type", "code", "field"),
    [
        (b"{}", "application/json", "invalid_request", "prompt"),
        (b"", "application/json", "invalid_request", None),
        (b"{", "application/json", "invalid_request", None),
        (b'{"prompt": 1}', "application/json", "invalid_request", "prompt"),
        (b'{"prompt": "a", "x": 1}', "application/json", "unknown_field", "x"),
        (b'{"prompt": "a", "prompt": "b"}', "application/json", "invalid_request", "prompt"),
        (b'{"prompt": "a", "max_tokens": true}', "application/json", "invalid_request", "max_tokens"),
        (b"prompt=a", "application/x-www-form-urlencoded", "unsupported_media_type", None),
        (b"a", "text/plain", "unsupported_media_type", None),
        (b"a", "", "unsupported_media_type", None),
    ],
)
def test_bad_bodies_have_the_shape(
    client: FlaskClient, path: str, body: bytes, content_type: str, code: str, field: str | None
) -> None:
    assert_error(client.post(path, data=body, content_type=content_type), code, field)


@pytest.mark.parametrize(
    ("content", "kind", "code"),
    [
        (b"", "image/png", "invalid_image"),
        (b"hello", "image/png", "unsupported_image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'></svg>", "image/svg+xml", "unsupported_image"),
        (b"%PDF-1.4", "application/pdf", "unsupported_image"),
        (png()[:30], "image/png", "invalid_image"),
        (png(), "image/jpeg", "invalid_image"),
        (png(300, 1), "image/png", "invalid_image"),
    ],
)
def test_bad_pictures_have_the_shape(client: FlaskClient, content: bytes, kind: str, code: str) -> None:
    assert_error(post_form(client, IMAGE, (content, "x.png", kind), prompt="a"), code, "image")


def test_too_many_pixels_have_the_shape(make_app: Callable[..., Flask]) -> None:
    client = make_app(AVITO_MAX_IMAGE_PX=1024).test_client()
    error = assert_error(
        post_form(client, IMAGE, (png(33, 32), "x", "image/png"), prompt="a"), "image_too_large", "image"
    )
    assert "1024" in error["message"] and "1056" in error["message"]
    assert post_form(client, IMAGE, (png(32, 32), "x", "image/png"), prompt="a").status_code == 200


def test_refusals_have_the_shape_and_retry_after(make_app: Any, make_service: Any) -> None:
    only_vision = make_service({"avision": FakeLoaded()})
    response = post_json(make_app(only_vision).test_client(), TEXT, {"prompt": "a"})
    assert_error(response, "model_not_configured")
    assert "Retry-After" not in response.headers

    models = {"avibe": FakeLoaded()}
    load = FakeLoad(models)
    load.gate.clear()
    loading = make_service(models, load=load, wait=False)
    response = post_json(make_app(loading).test_client(), TEXT, {"prompt": "a"})
    assert_error(response, "not_ready")
    assert int(response.headers["Retry-After"]) >= 1
    load.gate.set()


def test_full_queue_answers_503_with_retry_after(make_app: Any, make_service: Any) -> None:
    runner = EchoRunner()
    runner.gate.clear()
    service = make_service({"avibe": FakeLoaded(runner)}, max_running=1, max_waiting=1)
    from tests.test_service import submit

    channels = [submit(service), submit(service)]
    response = post_json(make_app(service).test_client(), TEXT, {"prompt": "a"})
    assert_error(response, "queue_full")
    assert int(response.headers["Retry-After"]) >= 1
    assert len(channels) == 2


def test_deadline_and_faults_have_the_shape(make_app: Any, make_service: Any) -> None:
    def fail(batch: Any) -> None:
        raise NumericError("the model gave NaN or Inf; the request was ended")

    def crash(batch: Any) -> None:
        raise RuntimeError("/srv/secret")

    for failure, code in ((fail, "numeric_error"), (crash, "internal_error")):
        service = make_service({"avibe": FakeLoaded(EchoRunner(failure))})
        assert_error(post_json(make_app(service).test_client(), TEXT, {"prompt": "a"}), code)

    runner = EchoRunner()
    runner.gate.clear()
    service = make_service({"avibe": FakeLoaded(runner)}, max_running=1, request_deadline_s=0.05)
    from tests.test_service import submit

    submit(service)
    import threading

    threading.Timer(0.2, runner.gate.set).start()
    assert_error(post_json(make_app(service).test_client(), TEXT, {"prompt": "a"}), "deadline_exceeded")


def test_unexpected_exception_is_a_clean_500(make_app: Any, make_service: Any) -> None:
    service = make_service()
    app = make_app(service)

    def explode(*_: Any, **__: Any) -> None:
        raise RuntimeError("/srv/secret")

    service.submit = explode
    assert_error(post_json(app.test_client(), TEXT, {"prompt": "a"}), "internal_error")


def test_rate_limited_has_the_shape_and_retry_after(make_app: Any) -> None:
    client = make_app(AVITO_RATE_LIMIT="2/minute").test_client()
    for remaining in ("1", "0"):
        response = post_json(client, TEXT, {"prompt": "a"})
        assert response.status_code == 200
        assert response.headers["X-RateLimit-Limit"] == "2"
        assert response.headers["X-RateLimit-Remaining"] == remaining
        assert "Retry-After" not in response.headers
    response = post_json(client, TEXT, {"prompt": "a"})
    error = assert_error(response, "rate_limited")
    assert "2 per 1 minute" in error["message"]
    assert 1 <= int(response.headers["Retry-After"]) <= 60


def test_errors_under_v1_are_openais(client: FlaskClient) -> None:
    response = client.get("/v1/nothing")
    assert response.status_code == 404
    assert response.get_json() == {
        "error": {
            "message": "there is nothing at this address",
            "type": "invalid_request_error",
            "param": None,
            "code": "not_found",
        }
    }


@pytest.mark.parametrize(
    ("method", "path", "status"), [("get", "/nothing", 404), ("post", "/", 405), ("get", "/%ff", 404)]
)
def test_errors_elsewhere_are_pages_with_the_message_and_id(
    client: FlaskClient, method: str, path: str, status: int
) -> None:
    response = getattr(client, method)(path)
    page = response.get_data(as_text=True)
    assert (response.status_code, response.mimetype) == (status, "text/html")
    assert response.headers["X-Request-ID"] in page
    assert uuid.UUID(response.headers["X-Request-ID"])


def test_every_code_has_a_status_and_a_heading() -> None:
    assert set(STATUS_BY_CODE) == set(ERROR_CODES)


def test_every_error_of_the_model_layer_has_a_status() -> None:
    import models.errors as errors

    classes = [
        value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.ServiceError)
    ]
    assert {c.code for c in classes} <= set(STATUS_BY_CODE)
    assert responses.as_web_error(ValueError("secret")).code == "internal_error"
