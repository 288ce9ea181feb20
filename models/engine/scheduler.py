"""What one model computes next: plain Python, the clock passed in, no torch, no threads.

First come, first served. Running sequences get one token each per step; what the token budget leaves goes to prompts,
in chunks. A sequence is admitted when there are pages for its whole prompt; when pages run out, the youngest gives its
own back and is computed again later. Cancelled and expired sequences leave between steps.

A step is planned before the one before it has been read, so the books distinguish what was launched from what is known.
The loop owns the lock under which all of this is called.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Sequences
from dataclasses import dataclass, field
from typing import Any, overload

from models.engine.kv_cache import KVCache, PageCopy, PageTable
from models.engine.sequence import EndReason, Sequence, State
from models.errors import InternalError

# Weight of the newest measurement in rates: about the last ten count.
_SMOOTHING = 0.2
# Where a decode step alone takes longer than the delay that prompts may add (a CPU), prompts get the time of so many
# steps instead: else newcomers would wait for ever and the batch would never fill.
_MAX_DELAY_STEPS = 3
# A sequence whose step failed for want of memory is tried again so often.
MAX_RETRIES = 2


@dataclass(frozen=True)
class SchedulerLimits:
    """
    :param max_running: sequences in the batch.
    :param max_step_tokens: most prompt tokens in one step.
    :param max_step_patches: most picture patches in one step; a single larger picture is still taken.
    :param min_chunk_tokens: prompt tokens that a step may read however slow they are.
    :param max_prefill_delay_s: how long prompt tokens may hold back running streams in one step, or three decode steps
        if that is longer.
    """

    max_running: int
    max_step_tokens: int = 4096
    max_step_patches: int = 16384
    min_chunk_tokens: int = 16
    max_prefill_delay_s: float = 0.05


class TokenIds(Sequences[int]):
    """A sequence's ids as the page cache compares them, without joining two lists for every token."""

    def __init__(self, prompt: Sequences[int], output: list[int]) -> None:
        self._prompt, self._output = prompt, output

    def __len__(self) -> int:
        return len(self._prompt) + len(self._output)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        num_prompt = len(self._prompt)
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                return [self[at] for at in range(start, stop, step)]
            output = self._output[max(0, start - num_prompt) : max(0, stop - num_prompt)]
            return [*self._prompt[start:stop], *output]
        if index < 0:
            index += len(self)
        return self._prompt[index] if index < num_prompt else self._output[index - num_prompt]


@dataclass(eq=False)
class Admission:
    """A sequence's stay in the batch, until it leaves or is preempted.

    :param ids: prompt and answer so far, by the ids that prefixes are compared by.
    :param num_prefill: ids that were known at admission, all to be computed before the next token is chosen.
    :param num_launched: tokens whose keys and values are computed, or being computed by a launched step.
    :param num_chosen: tokens of the answer that are chosen, or being chosen by a launched step.
    :param num_computed: tokens whose keys and values are known to be right.
    """

    sequence: Sequence
    table: PageTable
    ids: TokenIds
    num_prefill: int
    num_launched: int
    num_chosen: int
    num_computed: int = 0
    num_in_flight: int = 0

    @property
    def is_prefilling(self) -> bool:
        return self.num_launched < self.num_prefill

    @property
    def is_complete(self) -> bool:
        """The last token that `max_tokens` allows is being chosen."""
        return self.num_chosen >= self.sequence.sampling.max_tokens


@dataclass(frozen=True)
class Row:
    """One sequence's part of a step: tokens [start, end) are computed; with `is_sampled`, the next one is chosen.

    :param num_chosen: index in the answer of the token that is chosen.
    :param mask: what a host-side grammar allows, see `TokenConstraint.allowed_mask`.
    """

    admission: Admission
    start: int
    end: int
    is_sampled: bool
    num_chosen: int
    mask: Any = None

    @property
    def sequence(self) -> Sequence:
        return self.admission.sequence

    @property
    def pages(self) -> list[int]:
        return self.admission.table.pages


@dataclass(frozen=True)
class Step:
    """What a runner does in one go: copies first, in order, then `decodes` (one known-or-coming token each), then
    `prefills`. The other lists tell the loop who left or lost its place while the step was planned."""

    decodes: list[Row] = field(default_factory=list)
    prefills: list[Row] = field(default_factory=list)
    copies: list[PageCopy] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    left: list[tuple[Sequence, EndReason, Exception | None]] = field(default_factory=list)

    @property
    def rows(self) -> list[Row]:
        return [*self.decodes, *self.prefills]

    @property
    def num_prefill_tokens(self) -> int:
        return sum(row.end - row.start for row in self.prefills)


class PrefillPace:
    """How many prompt tokens fit into a step beside running streams, learned from the steps before."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self._limits = limits
        self._decode_s = 0.0
        self._token_s: float | None = None

    def record(self, step: Step, decode_s: float, prefill_s: float) -> None:
        """What the two parts of a step took. Those with new pictures tell nothing about tokens."""
        if step.decodes:
            self._decode_s += _SMOOTHING * (decode_s - self._decode_s)
        num_tokens = step.num_prefill_tokens
        if num_tokens and not any(_new_patches(row.sequence, row.start, row.end) for row in step.prefills):
            measured = prefill_s / num_tokens
            known = measured if self._token_s is None else self._token_s
            self._token_s = known + _SMOOTHING * (measured - known)

    def max_tokens(self, is_decoding: bool) -> int:
        """The budget of the next step. `is_decoding`: a running stream would have to wait for it."""
        limits = self._limits
        if not is_decoding or self._token_s == 0.0:
            return limits.max_step_tokens
        if self._token_s is None:
            return min(limits.max_step_tokens, 8 * limits.min_chunk_tokens)
        delay_s = max(limits.max_prefill_delay_s, _MAX_DELAY_STEPS * self._decode_s)
        fitting = int(delay_s / self._token_s)
        return min(limits.max_step_tokens, max(limits.min_chunk_tokens, fitting))


class Scheduler:
    def __init__(self, cache: KVCache, limits: SchedulerLimits) -> None:
        self.cache = cache
        self.limits = limits
        self.waiting: deque[Sequence] = deque()
        self.num_preemptions = 0
        self._admissions: dict[Sequence, Admission] = {}  # in the order of admission
        self._num_free_when_refused: int | None = None
        self._pace = PrefillPace(limits)
        self._seconds_per_completion: float | None = None
        self._busy_s = 0.0

    @property
    def running(self) -> list[Sequence]:
        return list(self._admissions)

    @property
    def num_running(self) -> int:
        return len(self._admissions)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self._admissions)

    @property
    def is_decoding(self) -> bool:
        return any(not admission.is_prefilling for admission in self._admissions.values())

    def add(self, sequence: Sequence, now: float) -> None:
        sequence.added_at = now
        self.waiting.append(sequence)

    def next_step(self, now: float, *, is_decoding_elsewhere: bool = False) -> Step:
        """Plan the next step; its rows count as launched from here. It may be empty.

        :param is_decoding_elsewhere: streams of another model would have to wait for this step too.
        """
        step = Step()
        self._sweep(now, step)
        for admission in list(self._admissions.values()):
            if admission.sequence in self._admissions and not admission.is_prefilling:
                self._plan_decode(admission, step)
        budget = self._pace.max_tokens(is_decoding_elsewhere or bool(step.decodes))
        num_patches = 0
        for admission in list(self._admissions.values()):
            if admission.is_prefilling and budget > 0:
                used, num_patches = self._plan_chunk(admission, budget, num_patches, step)
                budget -= used
        while budget > 0 and self.waiting and len(self._admissions) < self.limits.max_running:
            admitted = self._admit(self.waiting[0], now, step)
            if admitted is None:
                break
            self.waiting.popleft()
            used, num_patches = self._plan_chunk(admitted, budget, num_patches, step)
            budget -= used
        return step

    def _sweep(self, now: float, step: Step) -> None:
        for sequence in [*self._admissions, *self.waiting]:
            if sequence.is_cancelled:
                step.left.append((sequence, "cancelled", None))
            elif now >= sequence.deadline:
                step.left.append((sequence, "expired", None))
        for sequence, _, _ in step.left:
            self.remove(sequence)

    def _admit(self, sequence: Sequence, now: float, step: Step) -> Admission | None:
        """Give a waiting sequence its pages. None: not enough of them."""
        prefix = sequence.prompt_ids if sequence.prefix_ids is None else sequence.prefix_ids
        ids = TokenIds(prefix, sequence.output_ids)
        if self._admissions and self.cache.num_free_pages == self._num_free_when_refused:
            return None  # nothing has changed since, and looking for the prefix again costs time
        # Room to grow for those that run, else the newcomer would be preempted at once.
        opened = self.cache.open(ids, len(ids) + 1, num_spare_pages=len(self._admissions))
        self._num_free_when_refused = self.cache.num_free_pages if opened is None else None
        if opened is None:
            if not self._admissions:
                # All pages are free and it still does not fit. The door refuses such prompts; nothing may hang here.
                self.waiting.popleft()
                error = InternalError(
                    f"{len(ids) + 1} tokens do not fit into {self.cache.capacity_tokens} of the cache"
                )
                step.left.append((sequence, "failed", error))
            return None
        table, copy = opened
        if copy is not None:
            step.copies.append(copy)
        sequence.state = State.RUNNING
        if sequence.started_at is None:
            sequence.started_at = now
            sequence.num_cached = table.num_reused
        num_outputs = len(sequence.output_ids)
        admission = Admission(sequence, table, ids, len(ids), table.num_reused, num_outputs)
        self._admissions[sequence] = admission
        return admission

    def _plan_decode(self, admission: Admission, step: Step) -> None:
        sequence = admission.sequence
        if admission.is_complete:
            return
        mask = None
        if sequence.constraint is not None:
            # What is allowed depends on the token before, which must be known first.
            if admission.num_in_flight:
                return
            is_ready, mask = self._ask(sequence, step)
            if not is_ready:
                return
        start = admission.num_launched
        while not self.cache.extend(admission.table, start + 1):
            youngest = next(reversed(self._admissions.values()))
            self._preempt(youngest, step)
            if youngest is admission:
                return
        step.decodes.append(self._launch(admission, start + 1, is_sampled=True, mask=mask))

    def _plan_chunk(self, admission: Admission, budget: int, num_patches: int, step: Step) -> tuple[int, int]:
        """Plan as much of a prompt as fits. Returns the tokens used and the patches of the step so far."""
        sequence, start = admission.sequence, admission.num_launched
        end = min(start + budget, admission.num_prefill)
        for picture in sequence.pictures:
            if picture.start + picture.num_tokens <= start or picture.start >= end:
                continue
            if num_patches and num_patches + picture.num_patches > self.limits.max_step_patches:
                end = max(start, picture.start)
                break
            num_patches += picture.num_patches
        if end == start:
            return 0, num_patches
        is_last, mask = end == admission.num_prefill, None
        if is_last and sequence.constraint is not None:
            is_ready, mask = self._ask(sequence, step)
            if not is_ready:
                return 0, num_patches
        step.prefills.append(self._launch(admission, end, is_sampled=is_last, mask=mask))
        return end - start, num_patches

    def _ask(self, sequence: Sequence, step: Step) -> tuple[bool, Any]:
        """(is ready, mask) of a sequence's constraint; one that fails ends its own sequence only."""
        assert sequence.constraint is not None
        try:
            mask = sequence.constraint.allowed_mask()
        except Exception as error:
            self.remove(sequence)
            step.left.append((sequence, "failed", error))
            return False, None
        return mask is not None, mask

    def _launch(self, admission: Admission, end: int, *, is_sampled: bool, mask: Any) -> Row:
        row = Row(admission, admission.num_launched, end, is_sampled, admission.num_chosen, mask)
        admission.num_launched = end
        admission.num_chosen += is_sampled
        admission.num_in_flight += 1
        return row

    def _preempt(self, admission: Admission, step: Step) -> None:
        """Take the pages back; what was computed stays findable for as long as nobody needs its pages."""
        self.num_preemptions += 1
        step.preempted.append(admission.sequence)
        for rows in (step.decodes, step.prefills):
            rows[:] = [row for row in rows if row.admission is not admission]
        self._put_back(admission)

    def _put_back(self, admission: Admission) -> None:
        sequence = admission.sequence
        del self._admissions[sequence]
        self._close(admission)
        sequence.state = State.WAITING
        self.waiting.appendleft(sequence)

    def is_current(self, row: Row) -> bool:
        """Whether the sequence is still in the stay that the row was planned for."""
        return self._admissions.get(row.sequence) is row.admission

    def record_row(self, row: Row) -> None:
        """A launched row was computed; the token it chose, if any, is not yet among the outputs."""
        admission = row.admission
        admission.num_in_flight -= 1
        admission.num_computed = row.end
        self.cache.commit(admission.table, admission.ids, row.end)
        if row.end == admission.num_prefill:
            self.cache.commit_tail(admission.table, admission.ids, row.end)

    def retry(self, row: Row) -> bool:
        """A launched row could not be computed for want of memory. True: its sequence starts again; False: it had its
        chances and has to be ended."""
        sequence = row.sequence
        sequence.num_retries += 1
        if sequence.num_retries > MAX_RETRIES:
            return False
        self._put_back(row.admission)
        return True

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is. Unknown ones are ignored: it may have left by another way."""
        admission = self._admissions.pop(sequence, None)
        if admission is not None:
            self._close(admission)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def _close(self, admission: Admission) -> None:
        """Give the pages back; what is in them stays findable, for the next turn of a chat or for starting again."""
        self.cache.commit_tail(admission.table, admission.ids, min(admission.num_computed, len(admission.ids)))
        self.cache.close(admission.table)

    def discard(self, sequence: Sequence) -> list[int]:
        """Take a running sequence out and trust nothing that it computed. Returns the pages to be zeroed."""
        admission = self._admissions.pop(sequence, None)
        return [] if admission is None else self.cache.discard(admission.table)

    def clear(self) -> list[Sequence]:
        """Take everybody out."""
        rest = [*self._admissions, *self.waiting]
        for sequence in rest:
            self.remove(sequence)
        return rest

    def record_step(self, step: Step, seconds: float, decode_s: float = 0.0, prefill_s: float = 0.0) -> None:
        """A step took so much of the device's time, and its parts so much each."""
        self._busy_s += seconds
        self._pace.record(step, decode_s, prefill_s)

    def record_completion(self) -> None:
        """A sequence left after running. The rate counts busy time only, so that idle gaps do not slow it."""
        measured, self._busy_s = self._busy_s, 0.0
        known = self._seconds_per_completion
        self._seconds_per_completion = measured if known is None else (1 - _SMOOTHING) * known + _SMOOTHING * measured

    def seconds_to_drain(self) -> float | None:
        """How long what waits and runs now will take at the measured rate; None before the first completion."""
        if self._seconds_per_completion is None:
            return None
        return self._seconds_per_completion * (len(self.waiting) + len(self._admissions))


def _new_patches(sequence: Sequence, start: int, end: int) -> int:
    """Patches of the pictures that reach into tokens [start, end)."""
    pictures = sequence.pictures
    return sum(p.num_patches for p in pictures if p.start < end and p.start + p.num_tokens > start)
