"""The scheduler alone: plain Python, the clock in hand."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from models.engine.scheduler import Scheduler
from models.engine.sequence import SamplingOptions, Sequence, State

OPTIONS = SamplingOptions(4, 0.0, 1.0, 0, 1.0, 0, frozenset())


def make(deadline: float = 1e9) -> Sequence:
    return Sequence("t", (1,), OPTIONS, deadline, lambda _: False, lambda *_: None)


def test_first_come_first_served_up_to_the_limit() -> None:
    scheduler = Scheduler(max_running=2)
    first, second, third = make(), make(), make()
    for sequence in (first, second, third):
        scheduler.add(sequence, now=1.0)
    assert scheduler.next_batch(2.0) == ([first, second], [])
    scheduler.remove(first)
    assert scheduler.next_batch(3.0) == ([second, third], [])
    assert (first.added_at, first.started_at, third.started_at) == (1.0, 2.0, 3.0)


def test_cancelled_and_expired_leave_and_make_room() -> None:
    scheduler = Scheduler(max_running=1)
    running, expired, waiting = make(), make(deadline=5.0), make()
    for sequence in (running, expired, waiting):
        scheduler.add(sequence, now=0.0)
    scheduler.next_batch(1.0)
    running.is_cancelled = True
    batch, left = scheduler.next_batch(5.0)
    assert left == [(running, "cancelled"), (expired, "expired")]
    assert batch == [waiting]


def test_sequence_expires_exactly_at_its_deadline() -> None:
    scheduler = Scheduler(max_running=1)
    sequence = make(deadline=5.0)
    scheduler.add(sequence, now=0.0)
    assert scheduler.next_batch(4.999) == ([sequence], [])
    assert scheduler.next_batch(5.0) == ([], [(sequence, "expired")])


def test_drain_time_follows_busy_time_and_queue_length() -> None:
    scheduler = Scheduler(max_running=1)
    assert scheduler.seconds_to_drain() is None
    scheduler.record_step(2.0)
    scheduler.record_completion()
    for _ in range(3):
        scheduler.add(make(), now=0.0)
    assert scheduler.seconds_to_drain() == 6.0
    for _ in range(50):
        scheduler.record_step(1.0)
        scheduler.record_completion()
    assert abs((scheduler.seconds_to_drain() or 0) - 3.0) < 0.01


@given(st.integers(1, 4), st.lists(st.sampled_from(["add", "cancel", "step", "finish", "expire"]), max_size=60))
def test_nobody_is_lost_or_run_twice(max_running: int, actions: list[str]) -> None:
    scheduler, now = Scheduler(max_running), 0.0
    everybody: list[Sequence] = []
    gone: list[Sequence] = []
    for action in actions:
        now += 1.0
        here = [s for s in everybody if s not in gone]
        if action == "add":
            everybody.append(make())
            scheduler.add(everybody[-1], now)
        elif action == "cancel" and here:
            here[len(here) // 2].is_cancelled = True
        elif action == "expire" and here:
            here[-1].deadline = now
        elif action == "finish" and scheduler.running:
            sequence = scheduler.running[0]
            scheduler.remove(sequence)
            gone.append(sequence)
        elif action == "step":
            batch, left = scheduler.next_batch(now)
            gone += [sequence for sequence, _ in left]
            assert len(batch) <= max_running
            assert all(s.state is State.RUNNING for s in batch)
        assert len(gone) == len(set(map(id, gone)))
        present = [*scheduler.running, *scheduler.waiting]
        assert sorted(map(id, present)) == sorted(id(s) for s in everybody if s not in gone)
