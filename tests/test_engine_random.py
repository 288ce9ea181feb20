"""Loop, scheduler and cache together over random arrivals, cancellations, faults and too few pages.

The runner is a simulated device: it keeps the ids written to each page, chooses every token from all ids that it finds
in a sequence's pages, and so gives a wrong answer as soon as a page is leaked to, lost to or overwritten by another.
"""

from __future__ import annotations

import hashlib
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.engine.loop import EngineLoop, StepOutput
from models.engine.scheduler import Row, SchedulerLimits, Step
from models.engine.sequence import SamplingOptions, Sequence
from models.errors import InternalError, NumericError
from tests.fakes import FakeLaunched

MAX_TOKENS = 6
POISON = -1


def choose(ids: list[int]) -> int:
    """A token that depends on everything before it, out of a small alphabet so that prefixes repeat."""
    return hashlib.blake2b(repr(ids).encode()).digest()[0] % 3


class SimulatedDevice:
    """Implements `loop.Runner` on lists of ids. What decoding feeds back never passes the host."""

    memory_bytes = (0, 0)

    def __init__(self, num_pages: int, page_tokens: int, max_steps_in_flight: int) -> None:
        self.num_pages, self.page_tokens = num_pages, page_tokens
        self.max_steps_in_flight = max_steps_in_flight
        self.pages: list[list[int | None]] = [[None] * page_tokens for _ in range(num_pages)]
        self.newest: dict[Sequence, int] = {}
        self.faults: dict[Sequence, str] = {}

    def launch(self, step: Step) -> FakeLaunched:
        for copy in step.copies:
            self.pages[copy.target][: copy.num_tokens] = self.pages[copy.source][: copy.num_tokens]
        seen: set[Sequence] = set()
        for row in step.rows:
            assert row.sequence not in seen, "twice in one step"
            seen.add(row.sequence)
        return FakeLaunched([self._run(row, row in step.decodes) for row in step.rows])

    def _run(self, row: Row, is_decode: bool) -> StepOutput:
        sequence = row.sequence
        assert len(row.pages) * self.page_tokens >= row.end and 0 not in row.pages
        known = [*sequence.prompt_ids, *sequence.output_ids]
        fault = self.faults.pop(sequence, None)
        if fault == "memory":
            return StepOutput(row, error=InternalError("no memory"), is_retryable=True)
        for at in range(row.start, row.end):
            token: int | None = self.newest[sequence] if is_decode else known[at]
            self.pages[row.pages[at // self.page_tokens]][at % self.page_tokens] = token
        if fault == "nan":
            for at in range(row.start, row.end):
                self.pages[row.pages[at // self.page_tokens]][at % self.page_tokens] = POISON
            return StepOutput(row, error=NumericError("NaN"))
        if not row.is_sampled:
            return StepOutput(row)
        read = [self.pages[row.pages[at // self.page_tokens]][at % self.page_tokens] for at in range(row.end)]
        assert POISON not in read and None not in read
        self.newest[sequence] = choose(read)  # type: ignore[arg-type]
        return StepOutput(row, self.newest[sequence])

    def release(self, sequence: Sequence) -> None:
        self.newest.pop(sequence, None)

    def zero_pages(self, pages: list[int]) -> None:
        for page in pages:
            self.pages[page] = [None] * self.page_tokens


def expected_answer(prompt: tuple[int, ...], length: int) -> list[int]:
    ids = list(prompt)
    for _ in range(length):
        ids.append(choose(ids))
    return ids[len(prompt) :]


actions = st.one_of(
    st.tuples(st.just("add"), st.lists(st.integers(0, 2), min_size=1, max_size=9), st.integers(1, MAX_TOKENS)),
    st.tuples(st.sampled_from(["cancel", "expire", "memory", "nan"]), st.integers(0, 100), st.just(0)),
    st.tuples(st.just("pass"), st.integers(1, 4), st.just(0)),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(5, 12),
    st.integers(2, 4),
    st.integers(1, 2),
    st.integers(1, 4),
    st.integers(1, 8),
    st.lists(actions, max_size=50),
)
def test_every_sequence_ends_once_with_its_own_answer(
    num_pages: int, page_tokens: int, depth: int, max_running: int, budget: int, script: list[Any]
) -> None:
    now = [0.0]
    device = SimulatedDevice(num_pages, page_tokens, depth)
    loop = EngineLoop(lambda: now[0])
    loop.add_model("m", device, SchedulerLimits(max_running=max_running, max_step_tokens=budget, min_chunk_tokens=1))
    scheduler = loop._models["m"].scheduler
    scheduler.cache._min_copy_tokens = 1
    ends: dict[Sequence, tuple[str, Exception | None]] = {}
    everybody: list[Sequence] = []
    capacity = (num_pages - 1) * page_tokens

    def on_end(sequence: Sequence, reason: str, error: Exception | None) -> None:
        assert sequence not in ends, "ended twice"
        ends[sequence] = (reason, error)

    def run_pass() -> None:
        if loop._has_work:
            assert loop._pass()
        assert scheduler.num_running <= max_running
        assert not {*scheduler.running} & {*scheduler.waiting}

    for action, value, length in script:
        alive = [sequence for sequence in everybody if sequence not in ends]
        if action == "add" and len(value) + length <= capacity:
            options = SamplingOptions(length, 0.0, 1.0, 0, 1.0, 0, frozenset())
            sequence = Sequence("t", tuple(value), options, 1e9, lambda _: False, on_end)
            everybody.append(sequence)
            loop.add("m", sequence)
        elif action == "pass":
            for _ in range(value):
                run_pass()
        elif alive and action != "add":
            sequence = alive[value % len(alive)]
            if action == "cancel":
                loop.cancel("m", sequence)
            elif action == "expire":
                sequence.deadline = now[0]
            else:
                device.faults[sequence] = action
    for _ in range(2000):
        run_pass()
        if not loop._has_work:
            break
    assert {*ends} == {*everybody}, "somebody never ended"
    assert scheduler.cache.num_used_pages == 0
    for sequence, (reason, error) in ends.items():
        answer = expected_answer(sequence.prompt_ids, len(sequence.output_ids))
        assert sequence.output_ids == answer
        assert (reason == "length") == (len(sequence.output_ids) == sequence.sampling.max_tokens) or reason != "length"
        assert (error is not None) == (reason == "failed")
