"""Streamed answers, in process: events, headers, errors before and after the stream began, accounting.

What needs a connection, clients that leave and stops, is in `test_server.py`.
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient

from models.errors import NumericError
from models.service import ModelService
from tests.fakes import Clock, EchoRunner, EndlessRunner, FakeEncoder, FakeLoaded
from tests.test_error_shape import IMAGE, TEXT, assert_error, post_form, post_json
from tests.test_images import png

MakeApp = Callable[..., Flask]
MakeService = Callable[..., ModelService]


def events_of(body: bytes) -> list[tuple[str, dict[str, Any]]]:
    """(name, data) of each event; comments are left out, and anything else is an error."""
    found = []
    for block in body.decode().removesuffix("\n\n").split("\n\n"):
        if block.startswith(":"):
            continue
        event, data = block.split("\n")
        assert event.startswith("event: ") and data.startswith("data: ")
        found.append((event.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def stream(client: FlaskClient, prompt: str, **fields: Any) -> list[tuple[str, dict[str, Any]]]:
    response = post_json(client, TEXT, {"prompt": prompt, "stream": True, **fields})
    assert response.status_code == 200, response.get_data(as_text=True)
    return events_of(response.data)


def joined(events: list[tuple[str, dict[str, Any]]]) -> str:
    return "".join(data["text"] for name, data in events if name == "delta")


def totals(client: FlaskClient) -> dict[str, Any]:
    return dict(client.get("/api/metrics").get_json()["application"])


@pytest.mark.parametrize("stop", [[], ["STOP"]], ids=["no stop strings", "a stop string"])
def test_deltas_come_first_then_the_whole_success_body(client: FlaskClient, stop: list[str]) -> None:
    body = {"prompt": "Привет, 🎉\n\nmир", "max_tokens": 100, "temperature": 0, "stop": stop}
    whole = post_json(client, TEXT, body).get_json()
    response = post_json(client, TEXT, {**body, "stream": True})
    *deltas, (name, done) = events_of(response.data)
    assert deltas and {name for name, _ in deltas} == {"delta"} and name == "done"
    assert all(set(data) == {"text"} and data["text"] for _, data in deltas)
    assert joined(deltas) == done["data"]["text"] == whole["data"]["text"]
    assert done["data"] == whole["data"] and set(done) == set(whole) and set(done["metrics"]) == set(whole["metrics"])
    assert done["request_id"] == response.headers["X-Request-ID"]


def test_headers_let_a_stream_pass_through_and_carry_id_and_time(client: FlaskClient) -> None:
    headers = post_json(client, TEXT, {"prompt": "a", "stream": True}, **{"X-Request-ID": "mine"}).headers
    assert headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Accel-Buffering"] == "no"
    assert headers["X-Request-ID"] == "mine"
    assert headers["X-Response-Time"].endswith("s")
    assert "Content-Length" not in headers and "X-Avito-Demo" not in headers


def test_streams_of_demo_models_are_marked(make_app: MakeApp, make_service: MakeService) -> None:
    client = make_app(make_service(is_demo=True)).test_client()
    response = post_json(client, TEXT, {"prompt": "abc", "stream": True})
    assert response.headers["X-Avito-Demo"] == "1"
    assert events_of(response.data)[-1][1]["data"]["demo"] is True


def test_pictures_are_streamed_from_forms_and_json(client: FlaskClient) -> None:
    body = {"prompt": "what?", "image": base64.b64encode(png()).decode(), "stream": True}
    for response in (
        post_json(client, IMAGE, body),
        post_form(client, IMAGE, (png(), "x.png", "image/png"), prompt="what?", stream="true"),
    ):
        events = events_of(response.data)
        assert joined(events) == events[-1][1]["data"]["text"] == "what?"
        assert events[-1][1]["data"]["model"] == "avision"


@pytest.mark.parametrize("body", [{}, {"stream": False}])
def test_answer_is_whole_unless_a_stream_is_asked_for(client: FlaskClient, body: dict[str, Any]) -> None:
    response = post_json(client, TEXT, {"prompt": "a", **body})
    assert response.mimetype == "application/json" and response.get_json()["success"] is True


def test_text_that_looks_like_an_event_stays_text(client: FlaskClient) -> None:
    prompt = 'a\n\nevent: error\ndata: {"x": 1}\r\n\u2028: "\\'
    events = stream(client, prompt)
    assert joined(events) == prompt and {name for name, _ in events} == {"delta", "done"}


def test_errors_before_the_stream_are_ordinary_ones(make_app: MakeApp, make_service: MakeService) -> None:
    loaded = FakeLoaded(encoder=FakeEncoder(context_tokens=20))
    client = make_app(make_service({"avibe": loaded})).test_client()
    body = {"prompt": "x", "stream": True}
    assert_error(post_json(client, TEXT, {**body, "max_tokens": 10**6}), "invalid_request", "max_tokens")
    assert_error(post_json(client, TEXT, {**body, "prompt": "x" * 20, "max_tokens": 1}), "prompt_too_long", "prompt")
    assert_error(post_json(client, IMAGE, body), "model_not_configured")
    assert_error(client.get(TEXT), "method_not_allowed")
    assert totals(client)["rejected_requests"] == totals(client)["total_requests"] == 4


def test_full_queue_refuses_a_stream_with_a_status(make_app: MakeApp, make_service: MakeService) -> None:
    runner = EchoRunner()
    runner.gate.clear()
    service = make_service({"avibe": FakeLoaded(runner)}, max_running=1, max_waiting=1)
    client = make_app(service).test_client()
    waiting = [post_json_unread(client, {"prompt": "a", "stream": True}) for _ in range(2)]
    refusal = post_json(client, TEXT, {"prompt": "a", "stream": True})
    assert_error(refusal, "queue_full")
    assert refusal.headers["Retry-After"]
    runner.gate.set()
    for response in waiting:
        response.close()


def post_json_unread(client: FlaskClient, body: dict[str, Any]) -> Any:
    return client.post(TEXT, data=json.dumps(body), content_type="application/json", buffered=False)


def test_error_after_the_stream_began_is_an_event_and_counts_as_error(
    make_app: MakeApp, make_service: MakeService
) -> None:
    def poison(batch: Any) -> None:
        if len(batch[0].output_ids) == 3:
            raise NumericError("the model gave NaN or Inf; the request was ended")

    client = make_app(make_service({"avibe": FakeLoaded(EchoRunner(poison))})).test_client()
    *deltas, (name, error) = stream(client, "abcdef")
    assert (joined(deltas), name) == ("abc", "error")
    assert set(error) == {"success", "error", "request_id"} and error["success"] is False
    assert error["error"]["code"] == "numeric_error" and error["error"]["field"] is None
    now = totals(client)
    assert (now["error_requests"], now["total_requests"], now["open_requests"]) == (1, 1, 0)
    assert now["total_tokens_generated"] == 3


def test_deadline_in_a_stream_is_an_event_and_counts_as_expired(make_app: MakeApp, make_service: MakeService) -> None:
    clock = Clock()

    def advance(_: Any) -> None:
        clock.now += 1.0

    service = make_service({"avibe": FakeLoaded(EndlessRunner(advance))}, clock=clock, request_deadline_s=5.0)
    client = make_app(service).test_client()
    *deltas, (name, error) = stream(client, "x", max_tokens=2048)
    assert (joined(deltas), name, error["error"]["code"]) == ("xxxxx", "error", "deadline_exceeded")
    assert totals(client)["expired_requests"] == totals(client)["total_requests"] == 1


def test_text_that_cannot_be_made_is_an_error_event(make_app: MakeApp, make_service: MakeService) -> None:
    def fail(ids: Any, skip_special_tokens: bool = True) -> str:
        raise ValueError("/secret/path")

    loaded = FakeLoaded()
    service = make_service({"avibe": loaded})
    loaded.encoder.tokenizer.decode = fail  # type: ignore[method-assign]
    client = make_app(service).test_client()
    ((name, error),) = stream(client, "abc")
    assert name == "error" and error["error"]["code"] == "internal_error" and "secret" not in str(error)
    assert totals(client)["error_requests"] == 1


def test_stream_that_is_never_read_gives_its_place_back_and_counts_once(
    make_app: MakeApp, make_service: MakeService, wait_until: Any, caplog: pytest.LogCaptureFixture
) -> None:
    service = make_service({"avibe": FakeLoaded(EndlessRunner())}, max_running=1)
    client = make_app(service).test_client()
    with caplog.at_level(logging.INFO, "avito.audit"):
        post_json_unread(client, {"prompt": "x", "max_tokens": 2048, "stream": True}).close()
    wait_until(lambda: service.snapshot().models["avibe"].num_running == 0)
    now = totals(client)
    assert (now["total_requests"], now["open_requests"]) == (1, 0)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "avito.audit"]
    assert "outcome=cancelled" in line and "status=499" in line


def test_stream_has_one_audit_line_with_the_whole_duration(
    make_app: MakeApp, make_service: MakeService, caplog: pytest.LogCaptureFixture
) -> None:
    client = make_app(make_service()).test_client()
    with caplog.at_level(logging.INFO, "avito.audit"):
        done = stream(client, "abc")[-1][1]
    (line,) = [record.getMessage() for record in caplog.records if record.name == "avito.audit"]
    assert "outcome=ok" in line and "status=200" in line and "generated_tokens=3" in line
    total_s = float(line.split("total_s=")[1].split()[0])
    assert total_s >= round(done["metrics"]["total_time"], 4)


def test_first_bytes_are_a_comment_so_that_the_headers_go_out(make_app: MakeApp, make_service: MakeService) -> None:
    runner = EchoRunner()
    runner.gate.clear()
    client = make_app(make_service({"avibe": FakeLoaded(runner)})).test_client()
    response = post_json_unread(client, {"prompt": "abc", "stream": True})
    chunks = response.iter_encoded()
    assert next(chunks) == b": waiting\n\n"
    runner.gate.set()
    assert events_of(b"".join(chunks))[-1][0] == "done"
    response.close()
