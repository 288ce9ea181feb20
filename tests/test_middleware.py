"""Rate limit, CORS, proxies, security headers, logs of a request."""

from __future__ import annotations

import hashlib
import logging
from typing import Any

import pytest
from flask.testing import FlaskClient

from tests.test_error_shape import IMAGE, TEXT, post_form, post_json
from tests.test_images import png

FOREIGN = "https://evil.example"
FRIEND = "https://app.example:8443"


def ask(client: FlaskClient, peer: str = "9.9.9.9", **headers: str) -> int:
    response = client.post(TEXT, json={"prompt": "a"}, headers=headers, environ_base={"REMOTE_ADDR": peer})
    return int(response.status_code)


def test_rate_is_one_count_per_client_over_all_doors(make_app: Any) -> None:
    client = make_app(AVITO_RATE_LIMIT="2/minute").test_client()
    assert ask(client) == 200
    assert client.post("/avibe", data={"prompt": "a"}, environ_base={"REMOTE_ADDR": "9.9.9.9"}).status_code == 200
    assert ask(client) == 429
    assert client.post("/avibe", data={"prompt": "a"}, environ_base={"REMOTE_ADDR": "9.9.9.9"}).status_code == 429
    assert ask(client, peer="8.8.8.8") == 200


def test_forwarded_address_is_not_believed_without_proxies(make_app: Any) -> None:
    client = make_app(AVITO_RATE_LIMIT="1/minute").test_client()
    assert ask(client, **{"X-Forwarded-For": "1.1.1.1"}) == 200
    assert ask(client, **{"X-Forwarded-For": "2.2.2.2"}) == 429


def test_forwarded_address_is_believed_from_so_many_proxies_only(make_app: Any) -> None:
    client = make_app(AVITO_RATE_LIMIT="1/minute", AVITO_TRUSTED_PROXIES=1).test_client()
    assert ask(client, **{"X-Forwarded-For": "1.1.1.1"}) == 200
    assert ask(client, **{"X-Forwarded-For": "2.2.2.2"}) == 200
    assert ask(client, **{"X-Forwarded-For": "7.7.7.7, 2.2.2.2"}) == 429, "only the last entry is the proxy's own"


def test_ipv6_clients_are_counted_by_their_network(make_app: Any) -> None:
    client = make_app(AVITO_RATE_LIMIT="1/minute").test_client()
    assert ask(client, peer="2001:db8::1") == 200
    assert ask(client, peer="2001:db8::2") == 429
    assert ask(client, peer="2001:db8:0:1::1") == 200


def test_empty_rate_is_off(client: FlaskClient) -> None:
    response = [post_json(client, TEXT, {"prompt": "a"}) for _ in range(15)][-1]
    assert response.status_code == 200 and "X-RateLimit-Limit" not in response.headers


def test_method_that_is_not_allowed_is_not_counted(make_app: Any) -> None:
    client = make_app(AVITO_RATE_LIMIT="1/minute").test_client()
    assert [client.get(TEXT).status_code for _ in range(3)] == [405] * 3
    assert post_json(client, TEXT, {"prompt": "a"}).status_code == 200


def test_refused_requests_count_too(make_app: Any) -> None:
    client = make_app(AVITO_RATE_LIMIT="1/minute").test_client()
    assert post_json(client, TEXT, {}).status_code == 400
    assert post_json(client, TEXT, {"prompt": "a"}).status_code == 429


def test_foreign_origin_gets_its_answer_without_cors_headers(make_app: Any) -> None:
    for settings in ({}, {"AVITO_CORS_ORIGINS": FRIEND}):
        response = post_json(make_app(**settings).test_client(), TEXT, {"prompt": "a"}, Origin=FOREIGN)
        assert response.status_code == 200
        assert not [name for name, _ in response.headers if name.startswith("Access-Control")]


def test_configured_origin_may_read_the_answer_and_our_headers(make_app: Any) -> None:
    client = make_app(AVITO_CORS_ORIGINS=f"https://other.example, {FRIEND}").test_client()
    response = post_json(client, TEXT, {"prompt": "a"}, Origin=FRIEND)
    assert response.headers["Access-Control-Allow-Origin"] == FRIEND
    assert "X-Request-ID" in response.headers["Access-Control-Expose-Headers"]
    assert "Origin" in response.headers["Vary"]
    preflight = client.options(TEXT, headers={"Origin": FRIEND, "Access-Control-Request-Method": "POST"})
    assert preflight.status_code == 200 and "POST" in preflight.headers["Access-Control-Allow-Methods"]


def test_errors_carry_cors_headers_too(make_app: Any) -> None:
    client = make_app(AVITO_CORS_ORIGINS=FRIEND).test_client()
    response = post_json(client, TEXT, {}, Origin=FRIEND)
    assert response.status_code == 400 and response.headers["Access-Control-Allow-Origin"] == FRIEND


def test_json_answers_allow_nothing_and_are_not_stored(client: FlaskClient) -> None:
    response = client.get("/api/health")
    assert response.headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert response.headers["Cache-Control"] == "no-store"


def test_request_flow_is_five_lines_and_one_audit_line(client: FlaskClient, caplog: pytest.LogCaptureFixture) -> None:
    secret = "a secret prompt"
    with caplog.at_level(logging.INFO):
        response = post_json(client, TEXT, {"prompt": secret})
    lines = [r.getMessage() for r in caplog.records if r.name in ("avito.http", "avito.audit")]
    starts = [
        "Request received",
        "Input validated",
        "Tokenized: 15 tokens",
        "Generated: 15 tokens in",
        "Response sent: 200 OK",
        "audit ",
    ]
    assert [line.startswith(start) for line, start in zip(lines, starts, strict=True)] == [True] * 6
    assert not any(secret in line for line in lines)
    (audit,) = [r for r in caplog.records if r.name == "avito.audit"]
    fields = audit.fields  # type: ignore[attr-defined]
    assert fields["outcome"] == "ok" and fields["door"] == "api_text_generate"
    assert (fields["input_tokens"], fields["generated_tokens"], fields["client"]) == (15, 15, "127.0.0.1")
    assert fields["prompt_chars"] == 15
    assert fields["queue_s"] >= 0 and fields["first_s"] > 0 and fields["total_s"] > 0
    assert response.status_code == 200


def test_pictures_are_audited_by_size_and_hash(client: FlaskClient, caplog: pytest.LogCaptureFixture) -> None:
    data = png()
    with caplog.at_level(logging.INFO):
        assert post_form(client, IMAGE, (data, "secret-name.png", "image/png"), prompt="a").status_code == 200
    (audit,) = [r for r in caplog.records if r.name == "avito.audit"]
    expected = f"PNG:24x16:{len(data)}:{hashlib.sha256(data).hexdigest()[:12]}"
    assert audit.fields["images"] == expected  # type: ignore[attr-defined]
    assert "secret-name" not in caplog.text


def test_refusal_is_audited_with_its_reason(client: FlaskClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        post_json(client, TEXT, {"prompt": ""})
    (audit,) = [r for r in caplog.records if r.name == "avito.audit"]
    assert (audit.fields["outcome"], audit.fields["reason"]) == ("rejected", "invalid_request")  # type: ignore[attr-defined]
