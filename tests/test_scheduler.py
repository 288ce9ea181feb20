"""The scheduler alone: plain Python, the clock in hand."""

from __future__ import annotations

from typing import Any

import pytest

from models.engine.kv_cache import KVCache
from models.engine.scheduler import MAX_RETRIES, PrefillPace, Scheduler, SchedulerLimits, Step, TokenIds
from models.engine.sequence import PictureSpan, SamplingOptions, Sequence
from models.errors import InternalError


def make(prompt: int | tuple[int, ...] = 1, *, max_tokens: int = 4, deadline: float = 1e9, **given: Any) -> Sequence:
    """A sequence of `prompt` tokens, different from all others' unless the ids are given."""
    if isinstance(prompt, int):
        make.calls = getattr(make, "calls", 0) + 1  # type: ignore[attr-defined]
        prompt = tuple(1000 * make.calls + index for index in range(prompt))  # type: ignore[attr-defined]
    options = SamplingOptions(max_tokens, 0.0, 1.0, 0, 1.0, 0, frozenset())
    return Sequence("t", prompt, options, deadline, lambda _: False, lambda *_: None, **given)


def scheduler_of(num_pages: int = 1000, page_tokens: int = 4, **limits: Any) -> Scheduler:
    return Scheduler(KVCache(num_pages, page_tokens), SchedulerLimits(**{"max_running": 8} | limits))


def parts(step: Step) -> tuple[list[tuple[Sequence, int, int]], list[tuple[Sequence, int, int]]]:
    decodes, prefills = ([(r.sequence, r.start, r.end) for r in rows] for rows in (step.decodes, step.prefills))
    return decodes, prefills


def finish(scheduler: Scheduler, step: Step) -> None:
    """What the loop does with a step in which every row gave a token."""
    for row in step.rows:
        if scheduler.is_current(row):
            scheduler.record_row(row)
            if row.is_sampled:
                row.sequence.output_ids.append(7)


def test_first_come_first_served_up_to_the_limit() -> None:
    scheduler = scheduler_of(max_running=2)
    first, second, third = make(), make(), make()
    for sequence in (first, second, third):
        scheduler.add(sequence, now=1.0)
    assert parts(scheduler.next_step(2.0)) == ([], [(first, 0, 1), (second, 0, 1)])
    scheduler.remove(first)
    decodes, prefills = parts(scheduler.next_step(3.0))
    assert (decodes, prefills) == ([(second, 1, 2)], [(third, 0, 1)])
    assert (first.added_at, first.started_at, third.started_at) == (1.0, 2.0, 3.0)


def test_cancelled_and_expired_leave_and_make_room() -> None:
    scheduler = scheduler_of(max_running=1)
    running, expired, waiting = make(), make(deadline=5.0), make()
    for sequence in (running, expired, waiting):
        scheduler.add(sequence, now=0.0)
    scheduler.next_step(1.0)
    running.is_cancelled = True
    step = scheduler.next_step(5.0)
    assert step.left == [(running, "cancelled", None), (expired, "expired", None)]
    assert [row.sequence for row in step.rows] == [waiting]


def test_sequence_expires_exactly_at_its_deadline() -> None:
    scheduler = scheduler_of()
    sequence = make(deadline=5.0)
    scheduler.add(sequence, now=0.0)
    assert scheduler.next_step(4.999).rows
    step = scheduler.next_step(5.0)
    assert (step.rows, step.left) == ([], [(sequence, "expired", None)])


def test_step_can_be_planned_before_the_one_before_is_known() -> None:
    scheduler = scheduler_of()
    sequence = make(5, max_tokens=3)
    scheduler.add(sequence, 0.0)
    steps = [scheduler.next_step(0.0) for _ in range(4)]
    assert [parts(step) for step in steps] == [
        ([], [(sequence, 0, 5)]),
        ([(sequence, 5, 6)], []),
        ([(sequence, 6, 7)], []),
        ([], []),  # three tokens are being chosen, which is all that was asked for
    ]
    assert [row.num_chosen for step in steps for row in step.rows] == [0, 1, 2]


def test_prompts_share_the_token_budget_and_only_the_last_chunk_chooses() -> None:
    scheduler = scheduler_of(max_step_tokens=10)
    long, short = make(25), make(3)
    scheduler.add(long, 0.0)
    scheduler.add(short, 0.0)
    steps = [scheduler.next_step(0.0) for _ in range(3)]
    assert [parts(step)[1] for step in steps] == [
        [(long, 0, 10)],
        [(long, 10, 20)],
        [(long, 20, 25), (short, 0, 3)],
    ]
    assert [[row.is_sampled for row in step.prefills] for step in steps] == [[False], [False], [True, True]]


def test_running_streams_come_before_prompts_and_shrink_their_chunk() -> None:
    scheduler = scheduler_of(max_step_tokens=1000, min_chunk_tokens=4, max_prefill_delay_s=0.05)
    stream, long = make(1, max_tokens=100), make(500)
    scheduler.add(stream, 0.0)
    step = scheduler.next_step(0.0)
    scheduler.record_step(step, 0.001, 0.0, 0.001)
    finish(scheduler, step)
    scheduler.add(long, 0.0)
    for _ in range(30):
        step = scheduler.next_step(0.0)
        assert step.decodes[0].sequence is stream
        if not step.prefills:
            break
        prefill_s = 0.005 * step.num_prefill_tokens
        scheduler.record_step(step, 0.001 + prefill_s, 0.001, prefill_s)
        finish(scheduler, step)
        last_chunk = step.num_prefill_tokens
    # 5 ms a token: about ten of them take 50 ms
    assert last_chunk <= 14


def test_pace_keeps_to_the_delay_and_to_its_bounds() -> None:
    limits = SchedulerLimits(max_running=1, max_step_tokens=4096, min_chunk_tokens=16, max_prefill_delay_s=0.05)
    for token_s, expected in ((25e-6, 2000), (1e-9, 4096), (0.1, 16)):
        pace = PrefillPace(limits)
        assert pace.max_tokens(is_decoding=False) == 4096
        assert 16 <= pace.max_tokens(is_decoding=True) < 4096  # nothing measured yet: a careful guess
        scheduler = scheduler_of()
        scheduler.add(make(100), 0.0)
        pace.record(scheduler.next_step(0.0), 0.0, 100 * token_s)
        assert pace.max_tokens(is_decoding=True) == pytest.approx(expected, abs=1)
        assert pace.max_tokens(is_decoding=False) == 4096


def test_slow_device_gives_prompts_the_time_of_three_decode_steps() -> None:
    pace = PrefillPace(SchedulerLimits(max_running=1, min_chunk_tokens=1, max_prefill_delay_s=0.05))
    scheduler = scheduler_of()
    scheduler.add(make(100, max_tokens=1000), 0.0)
    pace.record(scheduler.next_step(0.0), 0.0, 1.0)  # 10 ms a token
    assert pace.max_tokens(is_decoding=True) == 5
    for _ in range(100):
        pace.record(scheduler.next_step(0.0), 0.1, 0.0)  # 100 ms a decode step
    assert pace.max_tokens(is_decoding=True) in (29, 30)


def test_pictures_of_a_step_keep_to_the_patch_budget() -> None:
    scheduler = scheduler_of(max_step_patches=100)
    pictures = tuple(PictureSpan(2 + 10 * index, 8, 60, bytes([index])) for index in range(3))
    sequence = make(40, pictures=pictures)
    huge = make(10, pictures=(PictureSpan(0, 9, 500, b"huge"),))
    scheduler.add(sequence, 0.0)
    scheduler.add(huge, 0.0)
    chunks = []
    while step := scheduler.next_step(0.0).prefills:
        chunks.append([(row.sequence, row.start, row.end) for row in step])
    # one picture a step, and one that is larger than the budget is taken by itself
    assert chunks == [[(sequence, 0, 12)], [(sequence, 12, 22)], [(sequence, 22, 40)], [(huge, 0, 10)]]


def test_youngest_gives_its_pages_to_the_oldest_and_comes_back_first() -> None:
    scheduler = scheduler_of(num_pages=5, page_tokens=2)  # 8 tokens in all
    old, young, third = make(2, max_tokens=20), make(2, max_tokens=20), make(1)
    for sequence in (old, young, third):
        scheduler.add(sequence, 0.0)
    step = scheduler.next_step(0.0)
    finish(scheduler, step)
    running = [row.sequence for row in step.rows]
    assert running == [old]  # two pages taken, and with a page to grow for the old one the young has no room
    while len(old.output_ids) < 6:
        step = scheduler.next_step(0.0)
        assert step.rows[0].sequence is old
        finish(scheduler, step)
    assert young not in scheduler.running
    scheduler.remove(old)
    assert scheduler.next_step(0.0).rows[0].sequence is young


def test_preempted_sequence_computes_its_answer_so_far_again() -> None:
    scheduler = scheduler_of(num_pages=8, page_tokens=2, max_running=2)
    old, young = make(3, max_tokens=20), make(3, max_tokens=20)
    for sequence in (old, young):
        scheduler.add(sequence, 0.0)
    preempted: list[Sequence] = []
    for _ in range(10):
        step = scheduler.next_step(0.0)
        preempted += step.preempted
        finish(scheduler, step)
        if preempted:
            break
    assert preempted == [young] and scheduler.waiting[0] is young and scheduler.num_preemptions == 1
    given = len(young.output_ids)
    scheduler.remove(old)
    step = scheduler.next_step(0.0)
    (row,) = step.prefills
    assert row.end == 3 + given and row.is_sampled and row.num_chosen == given
    assert row.start > 0  # what nobody took in the meantime is found again


def test_prompt_larger_than_the_whole_cache_fails_instead_of_waiting_for_ever() -> None:
    scheduler = scheduler_of(num_pages=3, page_tokens=2)
    sequence, other = make(9), make(1)
    scheduler.add(sequence, 0.0)
    scheduler.add(other, 0.0)
    step = scheduler.next_step(0.0)
    ((left, reason, error),) = step.left
    assert (left, reason) == (sequence, "failed") and isinstance(error, InternalError)
    assert [row.sequence for row in scheduler.next_step(0.0).rows] == [other]


def test_shared_prefix_counts_once_when_room_is_looked_for() -> None:
    scheduler = scheduler_of(num_pages=12, page_tokens=4)
    prompt = tuple(range(32))
    first = make((*prompt, 1))
    scheduler.add(first, 0.0)
    finish(scheduler, scheduler.next_step(0.0))
    scheduler.add(make((*prompt, 2)), 0.0)  # 9 pages by itself, one beside the first
    step = scheduler.next_step(0.0)
    assert [(row.start, row.end) for row in step.prefills] == [(32, 33)]


class Grammar:
    """Ready when told to be."""

    def __init__(self) -> None:
        self.mask: Any = None
        self.error: Exception | None = None

    def advance(self, token_id: int) -> None: ...

    def allowed_mask(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.mask


def test_row_with_a_grammar_waits_for_its_mask_without_holding_up_others() -> None:
    scheduler = scheduler_of()
    grammar = Grammar()
    slow, fast = make(3, max_tokens=9, constraint=grammar), make(3, max_tokens=9)
    scheduler.add(slow, 0.0)
    scheduler.add(fast, 0.0)
    steps = [scheduler.next_step(0.0)]
    assert [row.sequence for row in steps[0].rows] == [fast]
    grammar.mask = "first"
    steps.append(scheduler.next_step(0.0))
    assert {row.sequence: row.mask for row in steps[1].rows} == {slow: "first", fast: None}
    # the second mask depends on the first token, which is still being chosen
    steps.append(scheduler.next_step(0.0))
    assert [row.sequence for row in steps[2].rows] == [fast]
    for step in steps:
        finish(scheduler, step)
    assert slow in [row.sequence for row in scheduler.next_step(0.0).rows]


def test_grammar_that_fails_ends_its_own_sequence() -> None:
    scheduler = scheduler_of()
    grammar = Grammar()
    grammar.error = ValueError("bad grammar")
    bad, good = make(3, constraint=grammar), make(3)
    scheduler.add(bad, 0.0)
    scheduler.add(good, 0.0)
    step = scheduler.next_step(0.0)
    assert step.left == [(bad, "failed", grammar.error)]
    assert [row.sequence for row in step.rows] == [good]


def test_retried_sequence_starts_again_a_few_times_only() -> None:
    scheduler = scheduler_of()
    sequence = make(3)
    scheduler.add(sequence, 0.0)
    for _ in range(MAX_RETRIES):
        (row,) = scheduler.next_step(0.0).rows
        assert scheduler.retry(row)
        assert not scheduler.is_current(row) and list(scheduler.waiting) == [sequence]
    (row,) = scheduler.next_step(0.0).rows
    assert not scheduler.retry(row)


def test_drain_time_follows_busy_time_and_queue_length() -> None:
    scheduler = scheduler_of(max_running=1)
    assert scheduler.seconds_to_drain() is None
    scheduler.record_step(Step(), 2.0)
    scheduler.record_completion()
    for _ in range(3):
        scheduler.add(make(), now=0.0)
    assert scheduler.seconds_to_drain() == 6.0
    for _ in range(50):
        scheduler.record_step(Step(), 1.0)
        scheduler.record_completion()
    assert abs((scheduler.seconds_to_drain() or 0) - 3.0) < 0.01


@pytest.mark.parametrize(
    "where", [slice(0, 2), slice(1, 5), slice(3, 6), slice(2, None), slice(None, None, 2), 0, 4, -1]
)
def test_token_ids_read_like_the_joined_list(where: slice | int) -> None:
    assert TokenIds((1, 2, 3), [4, 5, 6])[where] == [1, 2, 3, 4, 5, 6][where]
