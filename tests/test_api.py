"""The JSON API: success envelope, pictures by form and JSON, bodies at the limit, demo marks, ids."""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient

from tests.fakes import FakeLoaded
from tests.test_error_shape import IMAGE, TEXT, assert_error, post_form, post_json
from tests.test_images import png

MAX_BODY = 16 * 1024 * 1024


def test_success_has_the_whole_envelope(client: FlaskClient) -> None:
    response = post_json(client, TEXT, {"prompt": "Привет", "max_tokens": 50, "temperature": 0})
    body = response.get_json()
    assert response.status_code == 200
    assert set(body) == {"success", "data", "metrics", "request_id"}
    assert body["data"] == {
        "model": "avibe",
        "text": "Привет",
        "generated_tokens": 12,
        "input_tokens": 12,
        "finish_reason": "stop",
        "demo": False,
    }
    assert set(body["metrics"]) == {
        "queue_time", "time_to_first_token", "generation_time", "total_time", "tokens_per_second"
    }  # fmt: skip
    assert all(isinstance(value, float) and value >= 0 for value in body["metrics"].values())
    assert body["request_id"] == response.headers["X-Request-ID"]
    assert "X-Avito-Demo" not in response.headers


def test_length_is_told(client: FlaskClient) -> None:
    data = post_json(client, TEXT, {"prompt": "abcdef", "max_tokens": 3}).get_json()["data"]
    assert (data["text"], data["finish_reason"], data["generated_tokens"]) == ("abc", "length", 3)


def test_demo_answers_are_marked_and_the_text_is_the_models_alone(make_app: Any, make_service: Any) -> None:
    client = make_app(make_service(is_demo=True)).test_client()
    response = post_json(client, TEXT, {"prompt": "abc"})
    assert response.headers["X-Avito-Demo"] == "1"
    assert response.get_json()["data"]["demo"] is True
    assert response.get_json()["data"]["text"] == "abc"


def test_charset_parameter_is_fine(client: FlaskClient) -> None:
    response = client.post(TEXT, data=b'{"prompt": "a"}', content_type="application/json; charset=utf-8")
    assert response.status_code == 200


def test_pictures_come_by_form_base64_and_data_url(client: FlaskClient) -> None:
    encoded = base64.b64encode(png()).decode()
    answers = [
        post_form(client, IMAGE, (png(), "x.png", "image/png"), prompt="what?"),
        post_form(
            client, IMAGE, (png(), "x", "application/octet-stream"), (png(), "y.png", "image/png"), prompt="what?"
        ),
        post_json(client, IMAGE, {"prompt": "what?", "image": encoded}),
        post_json(client, IMAGE, {"prompt": "what?", "images": ["data:image/png;base64," + encoded, encoded]}),
    ]
    for answer in answers:
        assert answer.status_code == 200, answer.get_json()
        assert answer.get_json()["data"]["model"] == "avision"
        assert answer.get_json()["data"]["text"] == "what?"


def test_no_url_is_ever_fetched(client: FlaskClient) -> None:
    for url in ("http://127.0.0.1:1/x.png", "file:///etc/hostname"):
        error = assert_error(post_json(client, IMAGE, {"prompt": "a", "image": url}), "invalid_request", "image")
        assert "never fetched" in error["message"]


def body_of(size: int) -> bytes:
    """A valid JSON body of exactly so many bytes."""
    frame = b'{"prompt": "a"}'
    return frame + b" " * (size - len(frame))


def test_body_at_the_limit_passes_and_one_byte_more_is_too_large(client: FlaskClient) -> None:
    assert client.post(TEXT, data=body_of(MAX_BODY), content_type="application/json").status_code == 200
    response = client.post(TEXT, data=body_of(MAX_BODY + 1), content_type="application/json")
    error = assert_error(response, "payload_too_large")
    assert str(MAX_BODY) in error["message"] and str(MAX_BODY + 1) in error["message"]


def test_long_form_field_within_the_body_limit_is_not_cut_by_the_framework(make_app: Any) -> None:
    """Werkzeug refuses fields above 500,000 bytes unless told otherwise."""
    client = make_app(AVITO_MAX_PROMPT_CHARS=2_000_000).test_client()
    response = client.post("/avibe", data={"prompt": "x" * 600_000, "max_tokens": "1"})
    assert response.status_code == 200


def test_form_with_too_many_parts_is_too_large(client: FlaskClient) -> None:
    fields = {f"stop{i}": "x" for i in range(40)}
    error = assert_error(post_form(client, IMAGE, (png(), "x", "image/png"), **fields), "payload_too_large")
    assert "32 parts" in error["message"]


def test_form_of_countless_fields_is_refused_before_it_is_parsed(client: FlaskClient) -> None:
    response = client.post("/avibe", data=b"%x=&" * 1_000_000, content_type="application/x-www-form-urlencoded")
    assert response.status_code == 413
    assert "32 parts" in response.get_data(as_text=True)


@pytest.mark.parametrize("content_type", ["multipart/form-data", "multipart/form-data; boundary=x"])
def test_malformed_form_is_told(client: FlaskClient, content_type: str) -> None:
    error = assert_error(client.post(IMAGE, data=b"--x\r\nnonsense", content_type=content_type), "invalid_request")
    assert "well-formed form" in error["message"]


def test_unknown_fields_cost_nothing_however_many(client: FlaskClient) -> None:
    body = {"prompt": "a"} | {f"x{i}": 0 for i in range(200_000)}
    assert_error(post_json(client, TEXT, body), "unknown_field", "x0")
    assert_error(post_json(client, TEXT, {"prompt": "a", "stop": [1] * 200_000}), "invalid_request", "stop")


@pytest.mark.parametrize("given", ["abc", "A-b_c.9", "x" * 64])
def test_clients_request_id_is_kept_if_it_is_clean(client: FlaskClient, given: str) -> None:
    assert post_json(client, TEXT, {"prompt": "a"}, **{"X-Request-ID": given}).get_json()["request_id"] == given


@pytest.mark.parametrize("given", ["", "a b", "x" * 65, "a\tb", "é", "a/b", '"'])
def test_other_request_ids_are_replaced(client: FlaskClient, given: str) -> None:
    response = client.get("/api/health", headers={"X-Request-ID": given})
    assert str(uuid.UUID(response.headers["X-Request-ID"])) == response.headers["X-Request-ID"]


def test_prompt_too_long_for_the_context_names_the_numbers(make_app: Any, make_service: Any) -> None:
    from tests.fakes import FakeEncoder

    service = make_service({"avibe": FakeLoaded(encoder=FakeEncoder(context_tokens=20))})
    response = post_json(make_app(service).test_client(), TEXT, {"prompt": "x" * 20, "max_tokens": 1})
    assert_error(response, "prompt_too_long", "prompt")


def test_sampling_reaches_the_engine(make_app: Any, make_service: Any) -> None:
    seen: list[Any] = []
    loaded = FakeLoaded()
    original = loaded.encoder.sampling_options
    loaded.encoder.sampling_options = lambda params, num_prompt: seen.append(params) or original(params, num_prompt)  # type: ignore[method-assign, func-returns-value]
    client = make_app(make_service({"avibe": loaded})).test_client()
    body = {"prompt": "a", "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "repetition_penalty": 1.1,
            "seed": 3, "stop": ["x"], "min_p": 0.1, "presence_penalty": 0.25, "frequency_penalty": -0.25,
            "min_tokens": 2,
            "ignore_eos": True}  # fmt: skip
    assert post_json(client, TEXT, body).status_code == 200
    (params,) = seen
    assert {**{name: getattr(params, name) for name in body if name != "prompt"}, "stop": ["x"], "prompt": "a"} == body


def test_real_tiny_vision_model_answers_end_to_end(make_app: Callable[..., Flask], vision_folder: Any) -> None:
    """No fake anywhere: form, header checks, processor, tower, decoding."""
    from app_production import make_service as make_real_service
    from config import Settings

    settings = {"AVISION_MODEL_PATH": str(vision_folder), "AVITO_DEVICE": "cpu"}
    service = make_real_service(Settings.model_validate(settings))
    service.start()
    try:
        assert service.wait_loaded(60)
        assert service.snapshot().is_ready, service.snapshot().why_not_ready
        client = make_app(service, **settings).test_client()
        first = post_form(
            client, IMAGE, (png(60, 40), "x.png", "image/png"), prompt="что это?", max_tokens="9", temperature="0"
        ).get_json()
        assert first["success"] and first["data"]["generated_tokens"] <= 9
        encoded = base64.b64encode(png(60, 40)).decode()
        body = {"prompt": "что это?", "max_tokens": 9, "temperature": 0, "image": encoded}
        again = post_json(client, IMAGE, body).get_json()
        assert again["data"] == first["data"]
        more = post_json(client, IMAGE, {**{k: v for k, v in body.items() if k != "image"}, "images": [encoded] * 2})
        assert more.get_json()["data"]["input_tokens"] > first["data"]["input_tokens"]
        assert_error(post_json(client, TEXT, {"prompt": "a"}), "model_not_configured")
        ready = client.get("/api/health/ready").get_json()
        assert (ready["models"]["avision"]["state"], ready["models"]["avibe"]["state"]) == ("ready", "not_configured")
        broken = png(60, 40)[:100]
        assert_error(post_form(client, IMAGE, (broken, "x.png", "image/png"), prompt="a"), "invalid_image", "image")
        assert json.dumps(first)
    finally:
        service.stop(20)
