"""The engine's thread with a fake runner: ends, faults, fairness, progress."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from typing import Any

import pytest

from models.engine.loop import EngineLoop, StepOutput
from models.engine.scheduler import SchedulerLimits
from models.engine.sequence import SamplingOptions, Sequence
from models.errors import EngineDead, NumericError
from tests.fakes import END_ID, GENEROUS_S, Clock, EchoRunner, EndlessRunner


class Ends:
    """Collects the ends of sequences; fails on a second one."""

    def __init__(self) -> None:
        self._queue: queue.Queue[tuple[str, str, Exception | None]] = queue.Queue()
        self.seen: list[str] = []

    def make(self, name: str, prompt: bytes = b"ab", max_tokens: int = 100, deadline: float = 1e18) -> Sequence:
        options = SamplingOptions(max_tokens, 0.0, 1.0, 0, 1.0, 0, frozenset({END_ID}))
        return Sequence(name, tuple(prompt), options, deadline, lambda _: False, self._on_end)

    def _on_end(self, sequence: Sequence, reason: str, error: Exception | None) -> None:
        self.seen.append(sequence.request_id)
        self._queue.put((sequence.request_id, reason, error))

    def next(self) -> tuple[str, str, Exception | None]:
        return self._queue.get(timeout=GENEROUS_S)


@pytest.fixture
def ends() -> Ends:
    return Ends()


@pytest.fixture
def loop() -> Iterator[EngineLoop]:
    engine = EngineLoop(time.monotonic)
    engine.start()
    yield engine
    for model in engine._models.values():
        model.runner.gate.set()  # type: ignore[attr-defined]
    engine.stop(GENEROUS_S)


def test_answer_ends_with_stop_and_is_released(loop: EngineLoop, ends: Ends) -> None:
    runner = EchoRunner()
    loop.add_model("avibe", runner, SchedulerLimits(2))
    sequence = ends.make("one")
    loop.add("avibe", sequence)
    assert ends.next() == ("one", "stop", None)
    assert bytes(sequence.output_ids) == b"ab"
    assert runner.released == [sequence]


def test_answer_at_max_tokens_ends_with_length(loop: EngineLoop, ends: Ends) -> None:
    loop.add_model("avibe", EndlessRunner(), SchedulerLimits(2))
    loop.add("avibe", ends.make("one", max_tokens=3))
    assert ends.next() == ("one", "length", None)


def test_waiting_sequence_is_cancelled_at_once_and_running_one_after_its_step(loop: EngineLoop, ends: Ends) -> None:
    runner = EndlessRunner()
    runner.gate.clear()
    loop.add_model("avibe", runner, SchedulerLimits(1))
    running, waiting = ends.make("running", max_tokens=10**9), ends.make("waiting")
    loop.add("avibe", running)
    loop.add("avibe", waiting)
    loop.cancel("avibe", waiting)
    assert ends.next() == ("waiting", "cancelled", None)
    loop.cancel("avibe", running)
    runner.gate.set()
    assert ends.next() == ("running", "cancelled", None)
    assert len(running.output_ids) <= 1
    assert runner.released in ([running], [])


def test_expired_sequence_ends_while_others_go_on(loop: EngineLoop, ends: Ends) -> None:
    loop.add_model("avibe", EndlessRunner(), SchedulerLimits(2))
    loop.add("avibe", ends.make("late", max_tokens=10**9, deadline=time.monotonic() + 0.05))
    loop.add("avibe", ends.make("other", max_tokens=10**9))
    assert ends.next() == ("late", "expired", None)
    assert "other" not in ends.seen


def test_step_that_raises_ends_its_batch_only(loop: EngineLoop, ends: Ends) -> None:
    failures = iter([ValueError("one bad step")])

    def fail_once(_: Any) -> None:
        for failure in failures:
            raise failure

    loop.add_model("avibe", EchoRunner(fail_once), SchedulerLimits(1))
    loop.add("avibe", ends.make("bad"))
    name, reason, error = ends.next()
    assert (name, reason, type(error)) == ("bad", "failed", ValueError)
    loop.add("avibe", ends.make("good"))
    assert ends.next() == ("good", "stop", None)
    assert not loop.snapshot().is_dead


def test_callback_that_raises_ends_its_sequence_only(loop: EngineLoop, ends: Ends) -> None:
    def refuse(_: int) -> bool:
        raise RuntimeError("no text")

    loop.add_model("avibe", EchoRunner(), SchedulerLimits(2))
    sequence = ends.make("bad")
    sequence.on_token = refuse
    loop.add("avibe", sequence)
    name, reason, error = ends.next()
    assert (name, reason, type(error)) == ("bad", "failed", RuntimeError)
    loop.add("avibe", ends.make("good"))
    assert ends.next()[1] == "stop"


def test_runner_that_raises_halfway_ends_only_those_without_an_output(loop: EngineLoop, ends: Ends) -> None:
    class Halfway(EchoRunner):
        def outputs(self, rows: Any) -> Any:
            for output in super().outputs(rows):
                if output.sequence.request_id == "second":
                    raise ValueError("halfway")
                yield output

    runner = Halfway()
    runner.gate.clear()
    loop.add_model("avibe", runner, SchedulerLimits(3))
    for name in ("first", "second", "third"):
        loop.add("avibe", ends.make(name))
    runner.gate.set()
    reasons = {name: reason for name, reason, _ in (ends.next(), ends.next(), ends.next())}
    assert reasons == {"first": "stop", "second": "failed", "third": "failed"}
    assert not loop.snapshot().is_dead


def test_end_that_cannot_be_delivered_ends_the_loop_and_nobody_is_left_waiting(loop: EngineLoop, ends: Ends) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("no end")

    runner = EchoRunner()
    runner.gate.clear()
    loop.add_model("avibe", runner, SchedulerLimits(1))
    bad = ends.make("bad", max_tokens=1)
    bad.on_end = refuse
    also_bad = ends.make("also bad")
    also_bad.on_end = refuse
    for sequence in (bad, also_bad, ends.make("other")):
        loop.add("avibe", sequence)
    runner.gate.set()
    assert ends.next()[:2] == ("other", "failed")
    assert loop.snapshot().is_dead


def test_error_of_one_sequence_leaves_the_batch_alone(loop: EngineLoop, ends: Ends) -> None:
    class Picky(EchoRunner):
        def outputs(self, rows: Any) -> Any:
            return [
                StepOutput(o.row, error=NumericError("NaN")) if o.sequence.request_id == "bad" else o
                for o in super().outputs(rows)
            ]

    runner = Picky()
    runner.gate.clear()
    loop.add_model("avibe", runner, SchedulerLimits(2))
    loop.add("avibe", ends.make("bad"))
    loop.add("avibe", ends.make("good"))
    runner.gate.set()
    reasons = {name: reason for name, reason, _ in (ends.next(), ends.next())}
    assert reasons == {"bad": "failed", "good": "stop"}


def test_dead_device_ends_the_loop_and_everybody(loop: EngineLoop, ends: Ends) -> None:
    def die(_: Any) -> None:
        raise EngineDead("sticky CUDA error")

    runner = EchoRunner(die)
    runner.gate.clear()
    loop.add_model("avibe", runner, SchedulerLimits(1))
    loop.add("avibe", ends.make("running"))
    loop.add("avibe", ends.make("waiting"))
    runner.gate.set()
    assert {ends.next()[:2], ends.next()[:2]} == {("running", "failed"), ("waiting", "failed")}
    assert loop.snapshot().is_dead
    with pytest.raises(EngineDead):
        loop.add("avibe", ends.make("late"))


def test_stop_ends_what_is_left_as_cancelled(ends: Ends) -> None:
    loop = EngineLoop(time.monotonic)
    loop.start()
    runner = EndlessRunner()
    loop.add_model("avibe", runner, SchedulerLimits(1))
    loop.add("avibe", ends.make("one", max_tokens=10**9))
    assert runner.steps.acquire(timeout=GENEROUS_S)
    loop.stop(GENEROUS_S)
    assert ends.next()[:2] == ("one", "cancelled")


def test_stall_counts_only_while_work_is_pending(loop: EngineLoop, ends: Ends) -> None:
    runner = EchoRunner()
    loop.add_model("avibe", runner, SchedulerLimits(1))
    assert loop.snapshot().stalled_s == 0
    runner.gate.clear()
    loop.add("avibe", ends.make("one"))
    deadline = time.monotonic() + GENEROUS_S
    while loop.snapshot().stalled_s < 0.05:
        assert time.monotonic() < deadline
    runner.gate.set()
    ends.next()
    while loop.snapshot().stalled_s:
        assert time.monotonic() < deadline


def test_two_busy_models_share_the_device_by_time(ends: Ends) -> None:
    """A model whose steps take four times as long gets a quarter of the steps."""
    clock = Clock()

    def taking(seconds: float) -> EndlessRunner:
        def advance(_: Any) -> None:
            clock.now += seconds

        return EndlessRunner(advance)

    slow, fast = taking(4.0), taking(1.0)
    slow.gate.clear()
    loop = EngineLoop(clock)
    loop.add_model("avision", slow, SchedulerLimits(1))
    loop.add_model("avibe", fast, SchedulerLimits(1))
    for name in ("avision", "avibe"):
        loop.add(name, ends.make(name, max_tokens=10**9, deadline=clock.now + 1000))
    loop.start()
    slow.gate.set()
    assert {ends.next()[1], ends.next()[1]} == {"expired"}
    loop.stop(GENEROUS_S)
    assert slow.num_steps == pytest.approx(125, abs=2)
    assert fast.num_steps == pytest.approx(500, abs=8)


def test_steps_that_are_all_done_are_collected_in_the_order_they_were_launched(ends: Ends) -> None:
    """A model whose steps are always done by the time that somebody looks does not keep the other one waiting."""
    engine = EngineLoop(time.monotonic)
    for name in ("avibe", "avision"):
        engine.add_model(name, EndlessRunner(max_steps_in_flight=2), SchedulerLimits(1))
    engine.add("avibe", ends.make("endless", max_tokens=10**9))
    engine.add("avision", ends.make("short", max_tokens=5))
    for _ in range(50):
        assert engine._pass()
    assert ends.seen == ["short"]
