"""Health tells the truth; metrics are the same counters everywhere; the operator's doors are guarded."""

from __future__ import annotations

from typing import Any

import pytest
from flask.testing import FlaskClient
from prometheus_client.parser import text_string_to_metric_families

from tests.fakes import Clock, EchoRunner, FakeLoad, FakeLoaded
from tests.test_error_shape import IMAGE, TEXT, assert_error, post_form, post_json
from tests.test_images import png
from tests.test_service import submit

TOKEN = "operator-token-of-the-tests"


def prometheus(client: FlaskClient) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = client.get("/metrics").get_data(as_text=True)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def total(samples: dict[Any, float], name: str, **labels: str) -> float:
    return sum(v for (n, found), v in samples.items() if n == name and set(labels.items()) <= set(found))


def test_healthy_service_says_so_everywhere(client: FlaskClient) -> None:
    health = client.get("/api/health")
    assert health.status_code == 200
    body = health.get_json()
    assert body["status"] == "healthy" and body["version"] and body["uptime_seconds"] >= 0
    assert body["models"]["avibe"]["state"] == "ready" and body["demo"] is False
    ready = client.get("/api/health/ready")
    assert (ready.status_code, ready.get_json()["status"]) == (200, "ready")
    assert set(ready.get_json()["checks"]) >= {"engine", "queue", "disk", "gpu"}
    live = client.get("/api/health/live")
    assert (live.status_code, live.get_json()["status"]) == (200, "alive")


def test_loading_is_alive_but_not_ready_with_the_reason(make_app: Any, make_service: Any) -> None:
    models = {"avibe": FakeLoaded()}
    load = FakeLoad(models)
    load.gate.clear()
    client = make_app(make_service(models, load=load, wait=False)).test_client()
    assert client.get("/api/health").get_json()["status"] == "degraded"
    ready = client.get("/api/health/ready")
    assert (ready.status_code, ready.get_json()["status"]) == (503, "not_ready")
    assert any("avibe" in why for why in ready.get_json()["why_not_ready"])
    assert client.get("/api/health/live").status_code == 200
    load.gate.set()


def test_hung_engine_is_not_ready_then_not_live(make_app: Any, make_service: Any) -> None:
    clock, runner = Clock(), EchoRunner()
    runner.gate.clear()
    service = make_service({"avibe": FakeLoaded(runner)}, clock=clock)
    client = make_app(service).test_client()
    submit(service)
    clock.now += 31
    assert client.get("/api/health/ready").status_code == 503
    assert client.get("/api/health/live").status_code == 200
    clock.now += 30
    live = client.get("/api/health/live")
    assert (live.status_code, live.get_json()["engine"]) == (503, "hung")
    assert client.get("/api/health").get_json()["status"] == "unhealthy"


def test_failed_model_makes_degraded_and_all_failed_unhealthy(make_app: Any, make_service: Any) -> None:
    models = {"avibe": FakeLoaded(), "avision": FakeLoaded()}
    one = make_service(models, load=FakeLoad(models, {"avision": OSError()}))
    assert make_app(one).test_client().get("/api/health").get_json()["status"] == "degraded"
    both = make_service(models, load=FakeLoad(models, {"avision": OSError(), "avibe": OSError()}))
    client = make_app(both).test_client()
    assert client.get("/api/health").get_json()["status"] == "unhealthy"
    assert client.get("/api/health/live").status_code == 200, "a restart would not help"


def test_demo_is_told_by_health_and_ready(make_app: Any, make_service: Any) -> None:
    client = make_app(make_service(is_demo=True)).test_client()
    assert client.get("/api/health").get_json()["demo"] is True
    assert client.get("/api/health/ready").get_json()["demo"] is True


def test_health_is_never_rate_limited(make_app: Any) -> None:
    client = make_app(AVITO_RATE_LIMIT="1/minute").test_client()
    for path in ("/api/health", "/api/health/ready", "/api/health/live", "/api/metrics", "/metrics", "/"):
        for _ in range(3):
            assert client.get(path).status_code == 200


def test_metrics_have_the_seeds_fields(client: FlaskClient) -> None:
    post_json(client, TEXT, {"prompt": "abc"})
    body = client.get("/api/metrics").get_json()
    assert {"cpu_percent", "memory_percent", "disk_percent"} <= set(body["system"])
    assert {"available", "memory_allocated_bytes", "memory_reserved_bytes", "utilization_percent"} <= set(body["gpu"])
    application = body["application"]
    assert application["total_requests"] == application["avibe_requests"] == 1
    assert application["avision_requests"] == 0
    assert application["success_rate_percent"] == 100.0
    assert application["average_response_time_seconds"] > 0
    assert application["total_tokens_generated"] == 3


def test_every_request_is_accounted_for_once(make_app: Any, make_service: Any) -> None:
    def sometimes(batch: Any) -> None:
        if batch[0].prompt_ids[0] == ord("!"):
            raise RuntimeError("boom")

    service = make_service({"avibe": FakeLoaded(EchoRunner(sometimes)), "avision": FakeLoaded()})
    client = make_app(service).test_client()
    post_json(client, TEXT, {"prompt": "ok"})
    client.post("/avibe", data={"prompt": "ok"})
    post_form(client, IMAGE, (png(), "x", "image/png"), prompt="ok")
    post_json(client, TEXT, {"prompt": "!"})
    post_json(client, TEXT, {"prompt": ""})
    client.get(TEXT)
    client.post("/avision", data={"prompt": "no picture"}, content_type="multipart/form-data")
    client.options(TEXT)
    client.get("/avibe")
    client.get("/api/nothing")

    samples = prometheus(client)
    assert total(samples, "avito_requests_total", outcome="ok") == 3
    assert total(samples, "avito_requests_total", outcome="error") == 1
    assert total(samples, "avito_requests_total", outcome="rejected") == 3
    assert total(samples, "avito_requests_received_total") == total(samples, "avito_requests_total") == 7
    assert total(samples, "avito_requests_open") == 0
    assert total(samples, "avito_requests_rejected_total", reason="method_not_allowed", door="api_text_generate") == 1
    assert total(samples, "avito_requests_rejected_total") == 3
    application = client.get("/api/metrics").get_json()["application"]
    outcomes = ("ok", "rejected", "expired", "cancelled", "error")
    assert application["total_requests"] == sum(application[f"{outcome}_requests"] for outcome in outcomes) == 7


def test_running_and_waiting_are_told_and_zero_when_idle(make_app: Any, make_service: Any, wait_until: Any) -> None:
    runner = EchoRunner()
    runner.gate.clear()
    service = make_service({"avibe": FakeLoaded(runner)}, max_running=1, max_waiting=5)
    client = make_app(service).test_client()
    channels = [submit(service) for _ in range(3)]
    wait_until(lambda: total(prometheus(client), "avito_requests_running", model="avibe") == 1)
    assert total(prometheus(client), "avito_requests_waiting", model="avibe") == 2
    runner.gate.set()
    for channel in channels:
        channel.wait_end(20)
    samples = prometheus(client)
    assert total(samples, "avito_requests_running") == total(samples, "avito_requests_waiting") == 0
    assert total(samples, "avito_time_to_first_token_seconds_count", model="avibe") == 3
    assert total(samples, "avito_generation_tokens_total", model="avibe") == 15


def test_reset_starts_the_json_anew_and_leaves_prometheus_alone(make_app: Any) -> None:
    client = make_app(AVITO_OPS_TOKEN=TOKEN).test_client()
    post_json(client, TEXT, {"prompt": "abc"})
    before = total(prometheus(client), "avito_requests_total")
    assert client.post("/api/metrics/reset", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
    application = client.get("/api/metrics").get_json()["application"]
    assert (application["total_requests"], application["total_tokens_generated"]) == (0, 0)
    assert application["success_rate_percent"] == 100.0
    assert total(prometheus(client), "avito_requests_total") == before == 1
    post_json(client, TEXT, {"prompt": "abcd"})
    application = client.get("/api/metrics").get_json()["application"]
    assert (application["total_requests"], application["total_tokens_generated"]) == (1, 4)


@pytest.mark.parametrize("path", ["/api/metrics/reset", "/api/drain"])
@pytest.mark.parametrize("given", [None, "Bearer wrong", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x", "Bearer é"])
def test_wrong_operator_token_is_unauthorized(make_app: Any, path: str, given: str | None) -> None:
    client = make_app(AVITO_OPS_TOKEN=TOKEN).test_client()
    response = client.post(path, headers={"Authorization": given} if given else {})
    assert_error(response, "unauthorized")
    assert response.headers["WWW-Authenticate"].startswith("Bearer")
    assert client.get("/api/health/ready").status_code == 200


@pytest.mark.parametrize(
    ("peer", "headers", "settings", "allowed"),
    [
        ("127.0.0.1", {}, {}, True),
        ("::1", {}, {}, True),
        ("::ffff:127.0.0.1", {}, {}, True),
        ("::ffff:10.0.0.1", {}, {}, False),
        ("10.0.0.1", {}, {}, False),
        ("127.0.0.1", {"X-Forwarded-For": "1.2.3.4"}, {}, False),
        ("127.0.0.1", {"Forwarded": "for=1.2.3.4"}, {}, False),
        ("127.0.0.1", {"X-Real-IP": "1.2.3.4"}, {}, False),
        ("127.0.0.1", {"Origin": "http://localhost:8085"}, {}, False),
        ("127.0.0.1", {}, {"AVITO_TRUSTED_PROXIES": 1}, False),
    ],
)
def test_without_a_token_only_a_direct_local_peer_is_let_in(
    make_app: Any, peer: str, headers: dict[str, str], settings: dict[str, Any], allowed: bool
) -> None:
    client = make_app(**settings).test_client()
    response = client.post("/api/metrics/reset", headers=headers, environ_base={"REMOTE_ADDR": peer})
    if allowed:
        assert response.status_code == 200
    else:
        assert_error(response, "forbidden")


def test_drain_needs_a_token_even_from_a_local_peer(client: FlaskClient) -> None:
    assert_error(client.post("/api/drain"), "unauthorized")
    assert_error(client.post("/api/drain", headers={"Authorization": "Bearer x"}), "forbidden")
    assert client.get("/api/health/ready").status_code == 200


def test_drain_turns_ready_away_and_keeps_the_doors_open(make_app: Any) -> None:
    client = make_app(AVITO_OPS_TOKEN=TOKEN).test_client()
    assert client.post("/api/drain", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
    ready = client.get("/api/health/ready")
    assert ready.status_code == 503
    assert ready.get_json()["why_not_ready"] == ["service: draining before a stop"]
    assert post_json(client, TEXT, {"prompt": "a"}).status_code == 200
    assert client.get("/api/health/live").status_code == 200


def test_gpu_is_matched_by_uuid_and_absent_without_a_card(client: FlaskClient) -> None:
    gpu = client.get("/api/metrics").get_json()["gpu"]
    assert gpu["available"] is False and gpu["memory_allocated_bytes"] == 0
    assert total(prometheus(client), "avito_cpu_percent") >= 0
