"""A worker whose engine is lost is ended, with everybody answered and the stacks in the log."""

from __future__ import annotations

import logging
import queue
from typing import Any

import pytest

from models.errors import EngineDead
from tests.fakes import GENEROUS_S, Clock, EchoRunner, FakeLoaded
from tests.test_service import failure, submit
from watchdog import EXIT_CODE, Watchdog, dump_threads


@pytest.fixture
def watch() -> Any:
    ended: queue.Queue[int] = queue.Queue()
    dogs: list[Watchdog] = []

    def start(service: Any) -> queue.Queue[int]:
        dogs.append(Watchdog(service, end=ended.put, interval_s=0.01, farewell_s=0))
        dogs[-1].start()
        return ended

    yield start
    for dog in dogs:
        dog.stop()


def test_hung_engine_ends_the_worker_after_answering_everybody(
    make_service: Any, watch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    clock, runner = Clock(), EchoRunner()
    runner.gate.clear()
    service = make_service({"avibe": FakeLoaded(runner)}, clock=clock, stall_limit_s=60.0)
    channel = submit(service)
    ended = watch(service)
    with caplog.at_level(logging.CRITICAL):
        clock.now += 61
        assert ended.get(timeout=GENEROUS_S) == EXIT_CODE
    assert "the engine was lost" in failure(channel).message
    text = "\n".join(record.getMessage() for record in caplog.records)
    assert not any("\n" in record.getMessage() for record in caplog.records)
    assert "no step for 61.0 s" in text and "--- engine" in text and "self.gate.wait" in text


def test_dead_engine_ends_the_worker(make_service: Any, watch: Any) -> None:
    def die(_: Any) -> None:
        raise EngineDead("sticky")

    service = make_service({"avibe": FakeLoaded(EchoRunner(die))})
    ended = watch(service)
    submit(service)
    assert ended.get(timeout=GENEROUS_S) == EXIT_CODE


def test_busy_and_idle_engines_are_left_alone(make_service: Any, watch: Any) -> None:
    clock = Clock()

    def advance(_: Any) -> None:
        clock.now += 30.0

    service = make_service({"avibe": FakeLoaded(EchoRunner(advance))}, clock=clock, stall_limit_s=60.0)
    ended = watch(service)
    for _ in range(20):
        submit(service, "x" * 3).wait_end(GENEROUS_S)
        clock.now += 1000.0
    assert ended.empty()


def test_exit_code_lets_the_server_start_another_worker() -> None:
    from gunicorn.arbiter import Arbiter

    assert EXIT_CODE not in (0, Arbiter.WORKER_BOOT_ERROR, Arbiter.APP_LOAD_ERROR)


def test_dump_names_every_thread() -> None:
    assert "MainThread" in dump_threads() and "test_dump_names_every_thread" in dump_threads()
