"""Keys at the doors: who is let in where, rate, budget, counters, and that no key is ever shown."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, g
from flask.testing import FlaskClient

import generation
from config import Limits
from models.parsing import RequestParser
from tests.fakes import Clock, EchoRunner, FakeLoaded
from tests.test_error_shape import IMAGE, TEXT, assert_error
from tests.test_health import TOKEN, prometheus, total
from tests.test_images import png
from tests.test_keys import NOON, make, run

PEER = {"REMOTE_ADDR": "9.9.9.9"}
UNKNOWN = f"avito_{'A' * 43}"

Ask = Callable[..., Any]


def bearer(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def ask_text(client: FlaskClient, key: str | None = None, **body: Any) -> Any:
    return client.post(TEXT, json={"prompt": "abc"} | body, headers=bearer(key), environ_base=PEER)


def ask_image(client: FlaskClient, key: str | None = None) -> Any:
    data = {"prompt": "abc", "image": (io.BytesIO(png()), "x.png", "image/png")}
    return client.post(IMAGE, data=data, headers=bearer(key), environ_base=PEER)


def ask_avibe_form(client: FlaskClient, key: str | None = None) -> Any:
    data = {"prompt": "abc"} | ({} if key is None else {"api_key": key})
    return client.post("/avibe", data=data, environ_base=PEER)


def ask_avision_form(client: FlaskClient, key: str | None = None) -> Any:
    data = {"prompt": "abc", "image": (io.BytesIO(png()), "x.png", "image/png")}
    return client.post("/avision", data=data | ({} if key is None else {"api_key": key}), environ_base=PEER)


DOORS = [ask_text, ask_image, ask_avibe_form, ask_avision_form]
each_door = pytest.mark.parametrize("ask", DOORS, ids=lambda ask: ask.__name__)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.fixture
def make_client(make_app: Callable[..., Flask], path: Path) -> Callable[..., FlaskClient]:
    """Makes clients of applications with keys on, at NOON."""

    def make_one(service: Any = None, *, now: Callable[[], float] | None = None, **settings: Any) -> FlaskClient:
        return make_app(service, now=now or Clock(NOON), AVITO_KEYS_FILE=str(path), **settings).test_client()

    return make_one


def message(response: Any) -> str:
    """The error's message, wherever it stands."""
    if response.mimetype == "text/html":
        found = re.search(r'<dd lang="en">(.*?)</dd>', response.get_data(as_text=True))
        assert found
        return found[1]
    return str(response.get_json()["error"]["message"])


# Every door.


@each_door
def test_each_door_opens_for_a_good_key_only(ask: Ask, make_client: Any, path: Path) -> None:
    good, ops = make(path, "good"), make(path, "ops", "--scope", "ops")
    expired = make(path, "expired", "--expires", "2026-11-24")
    client = make_client(now=Clock(datetime(2026, 11, 25, tzinfo=UTC).timestamp()))
    for key, status, says in [
        (None, 401, "a key is needed"),
        ("", 401, "a key is needed"),
        ("secret", 401, "there is no such key"),
        (UNKNOWN, 401, "there is no such key"),
        (good[:-1] + ("A" if good[-1] != "A" else "B"), 401, "there is no such key"),
        (expired, 401, "this key has expired"),
        (ops, 403, "this key has no scope generate"),
        (good, 200, ""),
    ]:
        response = ask(client, key)
        assert response.status_code == status
        assert ("WWW-Authenticate" in response.headers) == (status == 401)
        if status != 200:
            assert message(response).endswith(says)
    assert ask(client, None).headers["WWW-Authenticate"] == 'Bearer realm="api"'


@each_door
def test_each_door_keeps_a_key_to_its_models(ask: Ask, make_client: Any, path: Path) -> None:
    keys = {"avibe": make(path, "a", "--model", "avibe"), "avision": make(path, "b", "--model", "avision")}
    client = make_client()
    model = "avision" if ask in (ask_image, ask_avision_form) else "avibe"
    (other,) = set(keys) - {model}
    assert ask(client, keys[model]).status_code == 200
    refused = ask(client, keys[other])
    assert refused.status_code == 403
    assert message(refused) == f"this key is not for {model}, only for {other}"


def test_a_model_that_is_not_allowed_gets_no_work(make_client: Any, make_service: Any, path: Path) -> None:
    runner = EchoRunner()
    key = make(path, "a", "--model", "avision")
    client = make_client(make_service({"avibe": FakeLoaded(runner)}))
    steps = runner.num_steps
    assert_error(ask_text(client, key), "forbidden")
    assert_error(ask_text(client, key, stream=True), "forbidden")
    assert runner.num_steps == steps


def test_errors_have_the_shape_of_their_door(make_client: Any, path: Path) -> None:
    ops = make(path, "ops", "--scope", "ops")
    client = make_client()
    assert_error(ask_text(client), "unauthorized")
    assert_error(ask_text(client, ops), "forbidden")
    assert client.get("/v1/models").get_json() == {
        "error": {"message": "a key is needed", "type": "authentication_error", "param": None, "code": "unauthorized"}
    }
    page = ask_avibe_form(client, UNKNOWN).get_data(as_text=True)
    assert "api_key: there is no such key" in page and 'data-error-field="api_key"' in page
    assert re.search(r'name="api_key"[^>]*aria-invalid="true"', page)


@pytest.mark.parametrize(
    "path_", ["/v1/models", "/v1/chat/completions", "/v1/none", "/v1", "/api/v1", "/api/v1/new/door"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "PUT"])
def test_whatever_is_below_the_guarded_roots_needs_a_key(make_client: Any, path: Path, path_: str, method: str) -> None:
    key = make(path, "a")
    client = make_client()
    assert client.open(path_, method=method).status_code == 401
    assert client.open(path_, method=method, headers=bearer(key)).status_code in (200, 400, 404, 405, 415)


def test_wrong_methods_on_a_door_need_a_key_too(make_client: Any, path: Path) -> None:
    key = make(path, "a")
    client = make_client()
    assert [client.get(TEXT).status_code, client.put("/avibe").status_code] == [401, 401]
    assert client.get(TEXT, headers=bearer(key)).status_code == 405


def test_a_door_that_nobody_guards_still_reaches_no_model(make_app: Any, make_service: Any, path: Path) -> None:
    make(path, "a")
    service = make_service()
    app = make_app(service, AVITO_KEYS_FILE=str(path))
    parsed = RequestParser(Limits()).parse_text_json(b'{"prompt": "a"}')

    def answer() -> str:
        assert g.api_key is None
        return generation.complete(service, parsed.request).text

    app.add_url_rule("/new", view_func=answer, methods=["POST"])
    assert app.test_client().post("/new").status_code == 401


@pytest.mark.parametrize(
    "path_",
    ["/", "/docs", "/openapi.json", "/api/health", "/api/health/ready", "/api/health/live", "/metrics", "/api/metrics"],
)
def test_pages_health_and_metrics_stay_open(make_client: Any, path: Path, path_: str) -> None:
    make(path, "a")
    client = make_client()
    assert client.get(path_).status_code == 200
    assert client.get(path_, headers=bearer(UNKNOWN)).status_code == 200


def test_preflights_and_the_way_back_to_the_forms_need_no_key(make_client: Any, path: Path) -> None:
    make(path, "a")
    client = make_client(AVITO_CORS_ORIGINS="https://app.example")
    headers = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    for door in (TEXT, "/v1/models"):
        preflight = client.options(door, headers=headers)
        assert preflight.headers["Access-Control-Allow-Origin"] == "https://app.example"
        assert preflight.status_code != 401
    assert client.get("/avibe").status_code == 303


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_scheme_is_read_in_any_case_and_others_are_none(make_client: Any, path: Path, scheme: str) -> None:
    key = make(path, "a")
    client = make_client()
    body = {"prompt": "a"}
    assert client.post(TEXT, json=body, headers={"Authorization": f"{scheme} {key}"}).status_code == 200
    for given in (f"Basic {key}", key, "Bearer", f"Bearer {key} x", f"Token {key}", "Bearer é"):
        assert client.post(TEXT, json=body, headers={"Authorization": given}).status_code == 401


# The operator's doors.


@pytest.mark.parametrize("door", ["/api/metrics/reset", "/api/drain"])
@pytest.mark.parametrize("token", ["", TOKEN])
def test_operators_doors_take_a_key_with_the_scope_ops(make_client: Any, path: Path, door: str, token: str) -> None:
    ops, plain = make(path, "ops", "--scope", "ops"), make(path, "plain")
    expired = make(path, "expired", "--scope", "ops", "--expires", "2026-11-24")
    client = make_client(now=Clock(NOON + 24 * 3600), AVITO_OPS_TOKEN=token)
    assert_error(client.post(door, headers=bearer(UNKNOWN)), "unauthorized")
    assert_error(client.post(door, headers=bearer(expired)), "unauthorized")
    assert_error(client.post(door, headers=bearer(plain)), "forbidden")
    assert client.post(door, headers=bearer(ops)).status_code == 200
    if token:
        assert client.post(door, headers=bearer(token)).status_code == 200
        assert_error(client.post(door), "unauthorized")
    else:
        assert_error(client.post(door, headers=bearer("x" * 20)), "unauthorized")


def test_without_a_token_a_local_reset_stays_open(make_client: Any, path: Path) -> None:
    make(path, "a")
    client = make_client()
    assert client.post("/api/metrics/reset").status_code == 200
    assert_error(client.post("/api/metrics/reset", environ_base=PEER), "forbidden")


def test_the_operators_token_generates_nothing(make_client: Any, path: Path) -> None:
    make(path, "a")
    assert_error(ask_text(make_client(AVITO_OPS_TOKEN=TOKEN), TOKEN), "unauthorized")


# Reload.


def test_a_new_key_opens_and_a_revoked_one_does_not_a_second_later(
    make_client: Any, make_service: Any, path: Path
) -> None:
    clock = Clock()
    old = make(path, "old")
    client = make_client(make_service(clock=clock))
    assert ask_text(client, old).status_code == 200
    new = make(path, "new")
    run(path, "revoke", "old")
    clock.now += 1
    assert [ask_text(client, key).status_code for key in (old, new)] == [401, 200]


def test_a_bad_file_shows_in_health_and_metrics_and_mends(make_client: Any, make_service: Any, path: Path) -> None:
    clock = Clock()
    key = make(path, "a")
    client = make_client(make_service(clock=clock))
    health = client.get("/api/health").get_json()
    assert health["checks"]["keys"] == {"ok": True, "keys": 1}
    assert total(prometheus(client), "avito_keys_file_ok") == 1
    good = path.read_text()
    path.write_text("{")
    clock.now += 1
    health = client.get("/api/health").get_json()
    assert health["status"] == "degraded" and health["checks"]["keys"] == {"ok": False, "keys": 1}
    assert total(prometheus(client), "avito_keys_file_ok") == 0
    assert client.get("/api/health/ready").status_code == 200
    assert ask_text(client, key).status_code == 200
    path.write_text(good)
    clock.now += 1
    assert client.get("/api/health").get_json()["status"] == "healthy"


# Rate.


def test_each_key_has_its_own_rate(make_client: Any, path: Path) -> None:
    slow, usual, other = make(path, "slow", "--rate", "1"), make(path, "usual"), make(path, "other")
    client = make_client(AVITO_RATE_LIMIT="2/minute")
    first = ask_text(client, slow)
    assert first.status_code == 200
    assert (first.headers["X-RateLimit-Limit"], first.headers["X-RateLimit-Remaining"]) == ("1", "0")
    refused = ask_avibe_form(client, slow)
    assert refused.status_code == 429 and 1 <= int(refused.headers["Retry-After"]) <= 60
    assert [ask_text(client, usual).status_code for _ in range(3)] == [200, 200, 429]
    assert_error(ask_text(client, usual), "rate_limited")
    assert ask_text(client, other).status_code == 200, "one address, but another key"


def test_a_key_may_have_more_than_the_general_rate(make_client: Any, path: Path) -> None:
    fast = make(path, "fast", "--rate", "3")
    client = make_client(AVITO_RATE_LIMIT="1/minute")
    assert [ask_text(client, fast).status_code for _ in range(4)] == [200, 200, 200, 429]


def test_a_key_has_its_rate_where_there_is_no_general_one(make_client: Any, path: Path) -> None:
    slow, free = make(path, "slow", "--rate", "1"), make(path, "free")
    client = make_client(AVITO_RATE_LIMIT="")
    assert [ask_text(client, slow).status_code for _ in range(2)] == [200, 429]
    answers = [ask_text(client, free) for _ in range(12)]
    assert {answer.status_code for answer in answers} == {200}
    assert "X-RateLimit-Limit" not in answers[0].headers


def test_refused_keys_are_limited_by_address_and_use_up_no_good_keys_rate(make_client: Any, path: Path) -> None:
    good, ops = make(path, "good", "--rate", "2"), make(path, "ops", "--scope", "ops")
    client = make_client(AVITO_RATE_LIMIT="3/minute")
    assert [ask_text(client, key).status_code for key in (UNKNOWN, ops, None, UNKNOWN)] == [401, 403, 401, 429]
    assert ask_avibe_form(client, UNKNOWN).status_code == 429
    assert [ask_text(client, good).status_code for _ in range(3)] == [200, 200, 429]


def test_who_tries_keys_out_is_limited_at_doors_too_that_have_no_rate(
    make_app: Any, path: Path, make_service: Any
) -> None:
    key = make(path, "a")
    app = make_app(make_service(), AVITO_KEYS_FILE=str(path), AVITO_RATE_LIMIT="2/minute")
    app.add_url_rule("/v1/new", view_func=lambda: "open")
    client = app.test_client()
    assert [client.get("/v1/new", headers=bearer(UNKNOWN)).status_code for _ in range(3)] == [401, 401, 429]
    assert [client.get("/v1/new", headers=bearer(key)).status_code for _ in range(3)] == [200] * 3


# The budget.


def test_a_used_up_budget_refuses_until_midnight(make_client: Any, path: Path) -> None:
    now = Clock(NOON)
    key = make(path, "a", "--tokens-per-day", "7")
    client = make_client(now=now)
    assert ask_text(client, key).status_code == 200
    assert ask_text(client, key).status_code == 200, "6 of 7 are used; a request under way may exceed it"
    refused = ask_text(client, key)
    error = assert_error(refused, "token_budget_exhausted")
    assert error["message"] == "at most 7 tokens a day (UTC) for this key, 12 are used"
    assert refused.headers["Retry-After"] == str(12 * 3600)
    page = ask_avibe_form(client, key)
    assert page.status_code == 429 and "used up" in page.get_data(as_text=True)
    now.now += 12 * 3600
    assert ask_text(client, key).status_code == 200


def test_streams_count_too(make_client: Any, path: Path) -> None:
    key = make(path, "a", "--tokens-per-day", "6")
    client = make_client()
    assert ask_text(client, key, stream=True).status_code == 200
    assert_error(ask_text(client, key), "token_budget_exhausted")


def test_a_cancelled_stream_pays_for_what_was_made(
    make_app: Any, make_service: Any, path: Path, wait_until: Any
) -> None:
    key = make(path, "a", "--tokens-per-day", "1000")
    runner = EchoRunner()
    app = make_app(make_service({"avibe": FakeLoaded(runner)}), now=Clock(NOON), AVITO_KEYS_FILE=str(path))
    runner.gate.clear()
    response = app.test_client().post(TEXT, json={"prompt": "abc", "stream": True}, headers=bearer(key), buffered=False)
    runner.gate.set()
    response.close()
    samples = prometheus(app.test_client())
    assert total(samples, "avito_key_requests_total", key="a", outcome="cancelled") == 1
    assert total(samples, "avito_key_tokens_total", key="a", kind="prompt") == 3
    app.extensions["avito_access"].stop()
    used = json.loads(path.with_name("keys.json.usage").read_text())["tokens"]
    assert list(used.values()) == [total(samples, "avito_key_tokens_total", key="a")]


def test_a_budget_survives_a_restart(make_client: Any, path: Path) -> None:
    key = make(path, "a", "--tokens-per-day", "6")
    first = make_client()
    assert ask_text(first, key).status_code == 200
    first.application.extensions["avito_access"].stop()
    assert_error(ask_text(make_client(), key), "token_budget_exhausted")


def test_a_used_up_budget_still_lists_models(make_client: Any, path: Path) -> None:
    key = make(path, "a", "--tokens-per-day", "1")
    client = make_client()
    assert ask_text(client, key).status_code == 200
    assert client.get("/v1/models", headers=bearer(key)).status_code != 429


# Forms.


def test_pages_ask_for_a_key_only_if_keys_are_on(client: FlaskClient, make_client: Any, path: Path) -> None:
    assert 'name="api_key"' not in client.get("/").get_data(as_text=True)
    make(path, "a")
    for language, label in (("en", "API key"), ("ru", "Ключ API")):
        page = make_client().get(f"/?lang={language}").get_data(as_text=True)
        fields = re.findall(r'<input type="password"[^>]*>', page)
        assert len(fields) == 2 and label in page
        assert all('name="api_key"' in f and 'autocomplete="off"' in f and "value=" not in f for f in fields)


def test_forms_take_the_header_too_and_then_leave_the_field_out(make_client: Any, path: Path) -> None:
    key = make(path, "a")
    client = make_client()
    for data in ({"prompt": "abc"}, {"prompt": "abc", "api_key": ""}, {"prompt": "abc", "api_key": UNKNOWN}):
        assert client.post("/avibe", data=data, headers=bearer(key)).status_code == 200
    basic = {"Authorization": "Basic eDp5"}  # of a proxy in front
    assert client.post("/avibe", data={"prompt": "abc", "api_key": f" {key} "}, headers=basic).status_code == 200


def test_a_form_with_two_keys_is_refused(make_client: Any, path: Path) -> None:
    key = make(path, "a")
    response = make_client().post("/avibe", data={"prompt": "abc", "api_key": [key, key]})
    assert response.status_code == 400 and message(response) == "api_key: is given more than once"


def test_a_refused_form_keeps_what_was_typed_but_the_key(make_client: Any, path: Path) -> None:
    make(path, "a")
    client = make_client(AVITO_RATE_LIMIT="1/minute")
    for status in (401, 429):
        response = client.post("/avibe", data={"prompt": "keep me", "api_key": UNKNOWN}, environ_base=PEER)
        page = response.get_data(as_text=True)
        assert response.status_code == status and "keep me" in page and UNKNOWN not in page


def test_a_form_that_cannot_be_read_is_told_as_such(make_client: Any, path: Path) -> None:
    make(path, "a")
    client = make_client()
    assert client.post("/avibe", data=b"{}", content_type="application/json").status_code == 415
    assert client.post("/avibe", data=b"&" * 100, content_type="application/x-www-form-urlencoded").status_code == 413


def test_only_the_forms_take_the_field(make_client: Any, make_app: Any, path: Path) -> None:
    key = make(path, "a")
    client = make_client()
    assert_error(client.post(TEXT, json={"prompt": "a", "api_key": key}), "unauthorized")
    error = assert_error(ask_text(client, key, api_key=key), "unknown_field", "api_key")
    assert key not in error["message"]
    off = make_app().test_client().post("/avibe", data={"prompt": "a", "api_key": key})
    assert off.status_code == 400 and key not in off.get_data(as_text=True)


# What is told, and what is not.


def test_no_key_is_ever_logged_or_shown(make_client: Any, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good, expired = make(path, "good"), make(path, "expired", "--expires", "2026-11-24")
    ops = make(path, "ops", "--scope", "ops")
    client = make_client(now=Clock(NOON + 24 * 3600), AVITO_RATE_LIMIT="100/minute")
    answers = []
    with caplog.at_level(logging.DEBUG):
        for key in (good, expired, ops, UNKNOWN):
            answers += [ask(client, key) for ask in DOORS]
            answers.append(client.get("/v1/models", headers=bearer(key)))
            answers.append(client.post("/api/metrics/reset", headers=bearer(key)))
        answers += [client.get(page) for page in ("/metrics", "/api/metrics", "/api/health")]
    told = caplog.text + "".join(answer.get_data(as_text=True) + str(answer.headers) for answer in answers)
    for key in (good, expired, ops, UNKNOWN):
        assert key not in told and key[6:20] not in told
    assert "key=good" in told
    stored = [entry["sha256"] for entry in json.loads(path.read_text())["keys"]]
    assert not [digest for digest in stored if digest in told]


def test_the_audit_line_carries_the_keys_name(make_client: Any, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good, ops = make(path, "shop.1"), make(path, "ops", "--scope", "ops")
    client = make_client()
    with caplog.at_level(logging.INFO):
        for key in (good, ops, UNKNOWN, None):
            ask_text(client, key)
    audits = [record for record in caplog.records if record.name == "avito.audit"]
    assert [record.fields["key"] for record in audits] == ["shop.1", "ops", None, None]  # type: ignore[attr-defined]
    assert " key=shop.1 " in audits[0].getMessage() and " key=- " in audits[2].getMessage()


def test_counters_tell_outcomes_and_tokens_by_key(make_client: Any, path: Path) -> None:
    a, b = make(path, "a"), make(path, "b", "--model", "avision")
    client = make_client()
    for key in (a, a, b, UNKNOWN):
        ask_text(client, key)
    samples = prometheus(client)
    assert total(samples, "avito_key_requests_total", key="a", outcome="ok") == 2
    assert total(samples, "avito_key_requests_total", key="b", outcome="rejected") == 1
    assert total(samples, "avito_key_requests_total") == 3, "who has no key has no name"
    assert total(samples, "avito_key_tokens_total", key="a", kind="prompt") == 6
    assert total(samples, "avito_key_tokens_total", key="a", kind="generation") == 6
    assert total(samples, "avito_key_tokens_total", key="b") == 0
    assert total(samples, "avito_requests_received_total") == 4


# Off.


def test_with_keys_off_keys_mean_nothing(client: FlaskClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert ask_text(client, UNKNOWN).status_code == 200
        assert ask_text(client).status_code == 200
    assert " key=- " in caplog.text
    assert client.get("/v1/models").status_code == 200 and client.get("/v1/nothing").status_code == 404
    assert "keys" not in client.get("/api/health").get_json()["checks"]
    assert total(prometheus(client), "avito_key_requests_total") == 0
    assert total(prometheus(client), "avito_keys_file_ok") == 1
