"""Rates and token budgets in a real Redis: shared by two applications, and still there when Redis goes away."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import GENEROUS_S, EchoRunner, FakeLoaded
from tests.test_access import ask_text
from tests.test_error_shape import TEXT, assert_error
from tests.test_keys import make
from tests.test_middleware import ask

pytestmark = pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + GENEROUS_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
    yield process, f"redis://127.0.0.1:{port}"
    process.kill()
    process.wait()


def test_count_is_shared_and_limits_go_on_without_redis(make_app: Any, redis: Any) -> None:
    process, uri = redis
    settings = {"AVITO_RATE_LIMIT": "2/minute", "AVITO_RATE_LIMIT_STORAGE_URI": uri}
    first, second = (make_app(**settings).test_client() for _ in range(2))
    assert [ask(first), ask(second), ask(first), ask(second)] == [200, 200, 429, 429]
    process.kill()
    process.wait()
    assert [ask(first, peer="7.7.7.7") for _ in range(3)] == [200, 200, 429], "each application counts for itself"
    form = first.post("/avibe", data={"prompt": "a"}, environ_base={"REMOTE_ADDR": "7.7.7.7"})
    assert form.status_code == 429, "and all its doors together"


def test_answer_survives_redis_dying_while_it_is_made(make_app: Any, make_service: Any, redis: Any) -> None:
    process, uri = redis

    def kill(_: Any) -> None:
        process.kill()
        process.wait()

    service = make_service({"avibe": FakeLoaded(EchoRunner(kill))})
    app = make_app(service, AVITO_RATE_LIMIT="5/minute", AVITO_RATE_LIMIT_STORAGE_URI=uri)
    response = app.test_client().post(TEXT, json={"prompt": "a"})
    assert response.status_code == 200 and response.headers["X-Request-ID"]
    application = app.test_client().get("/api/metrics").get_json()["application"]
    assert (application["ok_requests"], application["open_requests"]) == (1, 0)


def test_rates_and_budgets_of_keys_are_shared_and_go_on_without_redis(
    make_app: Any, redis: Any, tmp_path: Path
) -> None:
    process, uri = redis
    path = tmp_path / "keys.json"
    rated, budgeted = make(path, "rated", "--rate", "2"), make(path, "budgeted", "--tokens-per-day", "12")
    settings = {"AVITO_KEYS_FILE": str(path), "AVITO_RATE_LIMIT_STORAGE_URI": uri}
    first, second = (make_app(**settings).test_client() for _ in range(2))
    assert [ask_text(client, rated).status_code for client in (first, second, first)] == [200, 200, 429]
    answers = [ask_text(client, budgeted) for client in (first, second, first)]
    assert [answer.status_code for answer in answers] == [200, 200, 429], "6 tokens each"
    assert_error(answers[-1], "token_budget_exhausted")
    assert not path.with_name("keys.json.usage").exists()
    process.kill()
    process.wait()
    assert [ask_text(first, rated).status_code for _ in range(3)] == [200, 200, 429], "each counts for itself"
    assert_error(ask_text(first, budgeted), "token_budget_exhausted")
