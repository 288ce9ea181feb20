"""The only caller of a model's forward: one step of many sequences, over paged keys and values.

A step is at most two forwards: one token for each sequence that is decoding, and one packed row of prompt chunks. What
decoding needs of a sequence stays on the device, by slot: its newest token, its length, its pages, how it samples. So a
step can be launched before the tokens of the step before have been read. On CUDA the decode forward, and that of short
prompts, is a graph; on a CPU the same functions run as they are.

Which rows a step has is decided by `scheduler.py`; how tokens are chosen by `sampling.py`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.engine.attention import AttentionPlan, PagedKV
from models.engine.graphs import PREFILL_SIZES, Capture, GraphLadder, capture_cuda, decode_sizes
from models.engine.layers import SmallOperations, TextStack
from models.engine.loop import LaunchedStep, StepOutput
from models.engine.sampling import BatchSampler, HostSampled, Race, Sampled, is_finite
from models.engine.sampling import Row as SampledRow
from models.engine.scheduler import Row, Step
from models.engine.sequence import Sequence
from models.engine.vision import VisionInputs, VisionTower
from models.errors import EngineDead, InternalError, NumericError

log = logging.getLogger("avito.engine")

# Sequences in one captured prefill; more go the uncaptured way, which then is not bound by launches.
_PREFILL_GRAPH_ROWS = 8
# How old `memory_bytes` may be while steps run.
_MEMORY_INTERVAL_S = 1.0


@dataclass(frozen=True)
class RunnerSizes:
    """
    :param num_pages: pages of the cache, page 0 included.
    :param max_running: sequences at a time.
    :param max_context_tokens: most tokens of one sequence.
    """

    num_pages: int
    page_tokens: int
    max_running: int
    max_context_tokens: int

    @property
    def max_pages(self) -> int:
        """Pages of the longest sequence."""
        return -(-self.max_context_tokens // self.page_tokens)


class _Device:
    """How to hand data to the device without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_cuda = device.type == "cuda"
        self.stream: torch.cuda.Stream | None = None
        if self.is_cuda:
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            # Weights were read and merged on the loading thread's stream, which this one does not wait for by itself.
            self.stream.wait_stream(torch.cuda.current_stream(device))

    def put(self, data: Any, dtype: torch.dtype = torch.int64) -> Tensor:
        """A tensor on the device. On CUDA the copy is ordered by the stream; its pinned source is kept until then by
        PyTorch's host allocator."""
        if not self.is_cuda:
            return torch.as_tensor(data, dtype=dtype)
        return torch.as_tensor(data, dtype=dtype).pin_memory().to(self.device, non_blocking=True)

    def scope(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)


class _Mark:
    """A moment in the work of the device."""

    def __init__(self, is_cuda: bool) -> None:
        self._event: torch.cuda.Event | None = None
        self._time = time.perf_counter()
        if is_cuda:
            self._event = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
            self._event.record()

    def is_reached(self) -> bool:
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()

    def seconds_to(self, other: _Mark) -> float:
        if self._event is None or other._event is None:
            return other._time - self._time
        return float(self._event.elapsed_time(other._event)) / 1000


@dataclass
class _Part:
    """The decodes or the prefills of a launched step: what they gave, or why they failed.

    :param sampled_rows: the rows that chose a token, in the order of `sampled`.
    """

    rows: list[Row]
    sampled_rows: list[Row]
    sampled: HostSampled | None = None
    error: Exception | None = None
    is_retryable: bool = False

    def outputs(self) -> Iterable[StepOutput]:
        if self.error is not None:
            # The youngest first: whoever comes last to the front of the queue again is served first.
            for row in reversed(self.rows):
                yield StepOutput(row, error=self.error, is_retryable=self.is_retryable)
            return
        chosen = dict(zip(map(id, self.sampled_rows), self._chosen(), strict=True))
        for row in self.rows:
            yield chosen.get(id(row)) or StepOutput(row)

    def _chosen(self) -> Iterable[StepOutput]:
        sampled = self.sampled
        if sampled is None:
            return
        tokens, are_finite, have_choice = sampled.tokens(), sampled.is_finite(), sampled.has_choice()
        for index, row in enumerate(self.sampled_rows):
            if not are_finite[index]:
                yield StepOutput(row, error=NumericError("the model gave NaN or Inf; the request was ended"))
            elif not have_choice[index]:
                yield StepOutput(row, error=InternalError("the constraint of this request allows no token"))
            else:
                yield StepOutput(row, token_id=tokens[index], logprobs=sampled.logprobs(index))


class _Launched:
    """Implements `loop.LaunchedStep`."""

    def __init__(self, parts: list[_Part], marks: list[_Mark], on_done: Callable[[], None]) -> None:
        self._parts, self._marks, self._on_done = parts, marks, on_done

    def is_done(self) -> bool:
        try:
            return self._marks[-1].is_reached()
        except torch.AcceleratorError as error:
            raise _dead(error) from error

    def wait(self) -> None:
        try:
            self._marks[-1].wait()
        except torch.AcceleratorError as error:
            raise _dead(error) from error
        self._on_done()

    def part_seconds(self) -> tuple[float, float]:
        before, between, after = self._marks
        return before.seconds_to(between), between.seconds_to(after)

    def outputs(self) -> Iterable[StepOutput]:
        for part in self._parts:
            yield from part.outputs()


def _dead(error: Exception) -> EngineDead:
    # An asynchronous CUDA error is sticky: every later call of this process fails too.
    return EngineDead(f"the device failed: {type(error).__name__}")


class PagedRunner:
    """Implements `loop.Runner`. The loop's thread only, after `warm_up`.

    :param tower: the vision tower of an image-text model.
    :param max_steps_in_flight: steps launched before the first is read; default 2 on CUDA, 1 on a CPU, where launching
        is computing.
    :param capture: how to make graphs; default CUDA graphs on CUDA, none on a CPU.
    """

    def __init__(
        self,
        stack: TextStack,
        sizes: RunnerSizes,
        *,
        tower: VisionTower | None = None,
        max_steps_in_flight: int | None = None,
        capture: Capture | None = None,
    ) -> None:
        self._stack, self._sizes, self._tower = stack, sizes, tower
        self._device = _Device(stack.device)
        self.max_steps_in_flight = max_steps_in_flight or (2 if self._device.is_cuda else 1)
        # Kept here, so that no other thread has to ask CUDA while the engine runs.
        self.memory_bytes = (0, 0)
        self._measure_memory_at = 0.0
        # Slot 0 belongs to nobody: the rows that pad a graph use it, and it writes to page 0.
        num_slots, shape, device = sizes.max_running + 1, stack.shape, stack.device
        self._capture = capture
        with self._device.scope(), torch.inference_mode():
            self._cache = PagedKV(
                num_layers=shape.num_layers,
                num_pages=sizes.num_pages,
                page_tokens=sizes.page_tokens,
                num_kv_heads=shape.num_kv_heads,
                head_dim=shape.head_dim,
                dtype=stack.dtype,
                device=device,
            )
            self._tokens = torch.zeros(num_slots, dtype=torch.int64, device=device)
            self._lengths = torch.zeros(num_slots, dtype=torch.int64, device=device)
            self._rope_deltas = torch.zeros(num_slots, dtype=torch.int64, device=device)
            self._page_table = torch.zeros(num_slots, sizes.max_pages, dtype=torch.int32, device=device)
            self._counts = torch.arange(num_slots + 1, dtype=torch.int32, device=device)
            self._row_slots = torch.zeros(sizes.max_running, dtype=torch.int64, device=device)
            self._sampler = BatchSampler(num_slots, shape.vocab_size, device)
        self._decode_rows: list[int] = []  # what `_row_slots` holds
        self._slots: dict[Sequence, int] = {}
        self._failures: dict[Sequence, Exception] = {}
        self._num_pages_known: dict[int, int] = {}
        self._free_slots = list(range(sizes.max_running, 0, -1))
        self._decode_graphs: GraphLadder | None = None
        self._draw_graphs: GraphLadder | None = None
        self._prefill_graphs: _PrefillGraphs | None = None

    @property
    def num_pages(self) -> int:
        return self._sizes.num_pages

    @property
    def page_tokens(self) -> int:
        return self._sizes.page_tokens

    @property
    def max_running(self) -> int:
        return self._sizes.max_running

    @property
    def cache_bytes(self) -> int:
        return self._cache.num_bytes

    @property
    def num_slots_taken(self) -> int:
        return len(self._slots)

    @property
    def has_graphs(self) -> bool:
        return self._decode_graphs is not None

    # Steps.

    def launch(self, step: Step) -> LaunchedStep:
        with self._device.scope(), torch.inference_mode():
            self._cache.copy(step.copies)
            parts = self._enter_rows(step.rows)
            refused = {id(row) for part in parts for row in part.rows}
            marks = [_Mark(self._device.is_cuda)]
            for run, rows in ((self._decode, step.decodes), (self._prefill, step.prefills)):
                rows = [row for row in rows if id(row) not in refused]
                if rows:
                    parts.append(self._guarded(run, rows))
                marks.append(_Mark(self._device.is_cuda))
        return _Launched(parts, marks, self._after_step)

    def release(self, sequence: Sequence) -> None:
        self._failures.pop(sequence, None)
        slot = self._slots.pop(sequence, None)
        if slot is not None:
            self._num_pages_known.pop(slot)
            self._free_slots.append(slot)

    def zero_pages(self, pages: list[int]) -> None:
        with self._device.scope(), torch.inference_mode():
            self._cache.zero(pages)

    def _guarded(self, run: Callable[[list[Row]], _Part], rows: list[Row]) -> _Part:
        """A part that fails does so by itself: what else the step has goes on."""
        try:
            return run(rows)
        except torch.OutOfMemoryError as error:
            log.warning("the device ran out of memory in a step of %d sequences: %s", len(rows), type(error).__name__)
        except torch.AcceleratorError as error:
            raise _dead(error) from error
        except EngineDead:
            raise
        except Exception as error:
            log.exception("a step of %d sequences failed", len(rows))
            return self._failed(rows, error)
        # Only here: inside of the handler the error's traceback still holds the tensors of the step.
        if self._device.is_cuda:
            torch.cuda.empty_cache()
        return self._failed(rows, InternalError("the device ran out of memory"), is_retryable=True)

    def _failed(self, rows: list[Row], error: Exception, *, is_retryable: bool = False) -> _Part:
        """The part of rows that did not run. Until they are released, what the device knows of their slots is not to be
        trusted: steps that were planned before this one is read must not run them."""
        self._failures.update(dict.fromkeys((row.sequence for row in rows), error))
        return _Part(rows, [], error=error, is_retryable=is_retryable)

    def _after_step(self) -> None:
        # PyTorch makes a table of all its statistics for each of these numbers: too slow for every step.
        if self._device.is_cuda and time.monotonic() >= self._measure_memory_at:
            self._measure_memory_at = time.monotonic() + _MEMORY_INTERVAL_S
            device = self._device.device
            self.memory_bytes = (torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device))

    def _enter_rows(self, rows: list[Row]) -> list[_Part]:
        """Give new sequences a slot, and tell the device about new pages, in one copy. Returns those it cannot take."""
        entries: list[tuple[int, int, int]] = []
        deltas: list[tuple[int, int]] = []
        refused: list[_Part] = []
        for row in rows:
            sequence = row.sequence
            if sequence in self._failures:
                refused.append(_Part([row], [], error=self._failures[sequence]))
                continue
            slot = self._slots.get(sequence)
            if slot is None:
                slot = self._slots[sequence] = self._free_slots.pop()
                self._num_pages_known[slot] = 0
                try:
                    self._check_ids(sequence.prompt_ids)
                    self._sampler.set_slot(slot, sequence.sampling, sequence.prompt_ids, sequence.output_ids)
                except ValueError as error:  # an id outside the vocabulary
                    refused.append(self._failed([row], error))
                    continue
                if self._stack.num_position_axes > 1:
                    vision = sequence.vision
                    deltas.append((slot, vision.rope_delta if isinstance(vision, VisionInputs) else 0))
            known = self._num_pages_known[slot]
            if len(row.pages) > known:
                entries += [(slot, column, page) for column, page in enumerate(row.pages[known:], known)]
                self._num_pages_known[slot] = len(row.pages)
        if entries:
            slots, columns, pages = self._device.put(entries).unbind(1)
            self._page_table[slots, columns] = pages.int()
        if deltas:
            slots, values = self._device.put(deltas).unbind(1)
            self._rope_deltas[slots] = values
        return refused

    def _check_ids(self, ids: tuple[int, ...]) -> None:
        """:raise ValueError: an id without an embedding, which on CUDA would end the process."""
        num_embeddings = self._stack.embedding.shape[0]
        if not 0 <= min(ids) <= max(ids) < num_embeddings:
            raise ValueError(f"a token id of the prompt is outside of 0 to {num_embeddings - 1}")

    def _sample(self, logits: Tensor, rows: list[Row], slots: Tensor, slot_ids: list[int]) -> Sampled:
        asked = [SampledRow(row.sequence.sampling, row.mask, row.num_chosen) for row in rows]
        return self._sampler.sample(logits, slot_ids, slots, asked)

    # Decoding.

    def _decode(self, rows: list[Row]) -> _Part:
        slot_ids = [self._slots[row.sequence] for row in rows]
        num = len(rows)
        size = self._decode_graphs.size_for(num) if self._decode_graphs else None
        padded = slot_ids + [0] * ((size or num) - num)
        if padded != self._decode_rows:
            self._row_slots[: len(padded)] = self._device.put(padded)
            self._decode_rows = padded
        graphs = self._decode_graphs
        if graphs is not None and size is not None:
            logits = graphs.replay(size)
            if self._draw_graphs is not None and all(_is_plain(row) for row in rows):
                token_ids, finite, choice = self._draw_graphs.replay(size)[:, :num].unbind(0)
                sampled = Sampled(token_ids, finite, choice)
                return _Part(rows, rows, sampled.start_copy())
            logits = logits[:num]
        else:
            page_tokens = self._sizes.page_tokens
            width = max((row.end - 1) // page_tokens for row in rows) + 1
            logits = self._decode_forward(
                self._row_slots[:num], self._sizes.max_pages if self._device.is_cuda else width
            )
        slots = self._row_slots[:num]
        sampled = self._sample(logits, rows, slots, slot_ids)
        self._feed(slots, sampled.token_ids)
        return _Part(rows, rows, sampled.start_copy())

    def _feed(self, slots: Tensor, token_ids: Tensor) -> None:
        """What was chosen is the input of the next step."""
        self._tokens.index_copy_(0, slots, token_ids)
        self._lengths.index_add_(0, slots, torch.ones_like(slots))
        self._lengths[:1].zero_()  # padding never gets longer

    def _draw(self, logits: Tensor, slots: Tensor) -> Tensor:
        """Choose for rows that have a temperature and nothing else, and feed; can be captured.

        :return: (3, B) int64: ids, whether the logits were finite, and 1 for there having been a choice.
        """
        token_ids = self._sampler.draw(logits, slots)
        self._feed(slots, token_ids)
        return torch.stack([token_ids, is_finite(logits).long(), torch.ones_like(token_ids)])

    def _decode_forward(self, slots: Tensor, width: int) -> Tensor:
        """One token for each slot. Looks at nothing but buffers on the device, so it can be captured.

        :param slots: (B,) int64.
        :param width: pages of each sequence that are looked at.
        :return: (B, vocab_size).
        """
        page_tokens = self._sizes.page_tokens
        lengths = self._lengths[slots]
        table = self._page_table[slots, :width]
        pages = table.gather(1, (lengths // page_tokens)[:, None])[:, 0].long()
        plan = AttentionPlan(
            write_at=pages * page_tokens + lengths % page_tokens,
            page_table=table,
            num_keys=(lengths + 1).int(),
            cu_queries=self._counts[: slots.shape[0] + 1],
            max_queries=1,
        )
        positions = lengths + self._rope_deltas[slots]
        if self._stack.num_position_axes > 1:
            positions = positions.expand(3, -1)
        hidden = self._stack.forward(self._stack.embed(self._tokens[slots]), positions, self._cache, plan)
        return self._stack.logits(hidden)

    # Prompts.

    def _prefill(self, rows: list[Row]) -> _Part:
        slot_ids = [self._slots[row.sequence] for row in rows]
        hidden = self._stack.embed(self._device.put([id_ for row in rows for id_ in _known_ids(row)]))
        if self._tower is not None:
            self._put_pictures(hidden, rows, self._tower)
        positions = self._positions(rows)
        ends = [row.end - row.start for row in rows]
        last = [sum(ends[: index + 1]) - 1 for index, row in enumerate(rows) if row.is_sampled]
        sampled_rows = [row for row in rows if row.is_sampled]
        logits = None
        if self._prefill_graphs is not None and self._prefill_graphs.fits(rows):
            logits = self._prefill_graphs.run(hidden, positions, self._prefill_plan(rows, slot_ids), last)
        else:
            output = self._stack.forward(hidden, positions, self._cache, self._prefill_plan(rows, slot_ids))
            if last:
                logits = self._stack.logits(output[self._device.put(last)])
        if self._tower is not None:
            # Of a picture that is read in part, the next chunk needs the rest.
            spans = [(span, row.end) for row in rows for span in row.sequence.pictures]
            self._tower.trim({span.key for span, end in spans if span.start + span.num_tokens > end})
        if logits is None or not sampled_rows:
            return _Part(rows, [])
        sampled_ids = [self._slots[row.sequence] for row in sampled_rows]
        slots, lengths = self._device.put([sampled_ids, [row.end for row in sampled_rows]]).unbind(0)
        sampled = self._sample(logits, sampled_rows, slots, sampled_ids)
        self._tokens.index_copy_(0, slots, sampled.token_ids)
        self._lengths.index_copy_(0, slots, lengths)
        return _Part(rows, sampled_rows, sampled.start_copy())

    def _prefill_plan(self, rows: list[Row], slot_ids: list[int]) -> AttentionPlan:
        page_tokens = self._sizes.page_tokens
        write_at = torch.cat([_places(row, page_tokens) for row in rows])
        counts = [row.end - row.start for row in rows]
        key_counts = [row.end for row in rows]
        width = -(-max(key_counts) // page_tokens)
        starts = [0]
        for count in counts:
            starts.append(starts[-1] + count)
        return AttentionPlan(
            write_at=self._device.put(write_at),
            page_table=self._page_table[self._device.put(slot_ids), :width],
            num_keys=self._device.put(key_counts, torch.int32),
            cu_queries=self._device.put(starts, torch.int32),
            max_queries=max(counts),
            query_counts=counts,
            key_counts=key_counts,
        )

    def _positions(self, rows: list[Row]) -> Tensor:
        if self._stack.num_position_axes == 1:
            return self._device.put(torch.cat([torch.arange(row.start, row.end) for row in rows]))
        return self._device.put(torch.cat([_picture_positions(row) for row in rows], dim=1))

    def _put_pictures(self, hidden: Tensor, rows: list[Row], tower: VisionTower) -> None:
        """Replace the placeholders' embeddings by what the vision tower makes of the pictures."""
        wanted = []
        for row in rows:
            vision = row.sequence.vision
            if not isinstance(vision, VisionInputs):
                continue
            for index, span in enumerate(row.sequence.pictures):
                if span.start < row.end and span.start + span.num_tokens > row.start:
                    wanted.append((span, vision.pixel_values[index], vision.grids[index]))
        tower.encode(wanted)
        offset = 0
        for row in rows:
            for span in row.sequence.pictures:
                first, last = max(span.start, row.start), min(span.start + span.num_tokens, row.end)
                if first < last:
                    embeddings = tower.embeddings(span.key)[first - span.start : last - span.start]
                    hidden[offset + first - row.start : offset + last - row.start] = embeddings
            offset += row.end - row.start

    # Before the first request.

    def capture_graphs(self) -> None:
        """Capture the decode forward over the ladder of batch sizes, and that of short prompts. Does nothing where
        there is nothing to capture with (a CPU)."""
        capture = self._capture
        with self._device.scope(), torch.inference_mode():
            if capture is None:
                if self._device.stream is None:
                    return
                capture = capture_cuda(self._device.stream, torch.cuda.graph_pool_handle())
            self._row_slots.zero_()
            self._decode_rows = []

            # One buffer for the logits of all sizes: each graph's own would add up to several times as much.
            logits_of = torch.empty(
                self._sizes.max_running,
                self._stack.shape.vocab_size,
                dtype=self._stack.dtype,
                device=self._stack.device,
            )

            def make(size: int) -> Callable[[], Tensor]:
                slots = self._row_slots[:size]
                return lambda: logits_of[:size].copy_(self._decode_forward(slots, self._sizes.max_pages))

            def make_draw(size: int) -> Callable[[], Tensor]:
                return lambda: self._draw(logits_of[:size], self._row_slots[:size])

            sizes = decode_sizes(self._sizes.max_running)
            forwards = GraphLadder(sizes, make, capture)
            draws = GraphLadder(sizes, make_draw, capture)
            prefills = _PrefillGraphs(self._stack, self._cache, self._sizes, self._device, capture)
            self._decode_graphs, self._draw_graphs, self._prefill_graphs = forwards, draws, prefills

    def drop_graphs(self) -> None:
        """Run without them from now on."""
        self._decode_graphs = self._draw_graphs = self._prefill_graphs = None

    def use(self, operations: SmallOperations, race: Race) -> None:
        """Run with these from now on: eager or compiled ones."""
        self._stack.operations = operations
        self._sampler.race = race


class _PrefillGraphs:
    """Captured forwards of short prompts: up to `_PREFILL_GRAPH_ROWS` sequences, padded up to a ladder of tokens.

    The padding tokens are a sequence of their own, whose keys go to page 0.
    """

    def __init__(self, stack: TextStack, cache: PagedKV, sizes: RunnerSizes, link: _Device, capture: Capture) -> None:
        self._stack, self._cache, self._link = stack, cache, link
        device, shape, rows = stack.device, stack.shape, _PREFILL_GRAPH_ROWS
        # The padding's own pages must be within the page table too.
        ladder = tuple(size for size in PREFILL_SIZES if size <= sizes.max_pages * sizes.page_tokens)
        self._largest = largest = max(ladder, default=0)
        axes = (3,) if stack.num_position_axes > 1 else ()
        self._hidden = torch.zeros(largest, shape.hidden_size, dtype=stack.dtype, device=device)
        self._positions = torch.zeros(*axes, largest, dtype=torch.int64, device=device)
        self._write_at = torch.zeros(largest, dtype=torch.int64, device=device)
        self._page_table = torch.zeros(rows + 1, sizes.max_pages, dtype=torch.int32, device=device)
        self._num_keys = torch.zeros(rows + 1, dtype=torch.int32, device=device)
        self._cu_queries = torch.zeros(rows + 2, dtype=torch.int32, device=device)
        self._last = torch.zeros(rows, dtype=torch.int64, device=device)
        self._ladder = GraphLadder(ladder, self._make, capture)

    def _make(self, size: int) -> Callable[[], Tensor]:
        # A valid input to capture with: all tokens are padding.
        self._cu_queries.fill_(size)
        self._cu_queries[:1].zero_()
        self._num_keys.fill_(size)

        def run() -> Tensor:
            plan = AttentionPlan(
                write_at=self._write_at[:size],
                page_table=self._page_table,
                num_keys=self._num_keys,
                cu_queries=self._cu_queries,
                max_queries=size,
                query_counts=self._counts(),
                key_counts=self._num_keys.tolist() if not self._num_keys.is_cuda else None,
            )
            output = self._stack.forward(self._hidden[:size], self._positions[..., :size], self._cache, plan)
            return self._stack.logits(output[self._last])

        return run

    def _counts(self) -> list[int] | None:
        """What attention needs on a CPU, where this runs in tests only."""
        return None if self._cu_queries.is_cuda else self._cu_queries.diff().tolist()

    def fits(self, rows: list[Row]) -> bool:
        num_tokens = sum(row.end - row.start for row in rows)
        return len(rows) <= _PREFILL_GRAPH_ROWS and num_tokens <= self._largest

    def run(self, hidden: Tensor, positions: Tensor, plan: AttentionPlan, last: list[int]) -> Tensor:
        """Logits (len(last), vocab_size) of the tokens at `last`, in a buffer that the next replay overwrites."""
        num_tokens, num_rows = hidden.shape[0], plan.page_table.shape[0]
        size = self._ladder.size_for(num_tokens)
        assert size is not None
        padding = size - num_tokens
        self._hidden[:num_tokens] = hidden
        self._positions[..., :num_tokens] = positions
        self._positions[..., num_tokens:size] = 0
        self._write_at[:num_tokens] = plan.write_at
        self._write_at[num_tokens:size] = 0
        self._page_table.zero_()
        self._page_table[:num_rows, : plan.page_table.shape[1]] = plan.page_table
        self._num_keys.zero_()
        self._num_keys[:num_rows] = plan.num_keys
        # Not `[num_rows] = padding`: PyTorch makes that a copy of one number from the host, and waits for the device.
        self._num_keys[num_rows].fill_(padding)
        self._cu_queries.fill_(size)
        self._cu_queries[: num_rows + 1] = plan.cu_queries
        # What a longer prompt left there would lie outside of this graph's output, and on CUDA end the process.
        self._last.zero_()
        if last:
            self._last[: len(last)] = self._link.put(last)
        return self._ladder.replay(size)[: len(last)]


def _is_plain(row: Row) -> bool:
    return row.mask is None and BatchSampler.is_plain(row.sequence.sampling)


def _known_ids(row: Row) -> list[int]:
    """The ids of a row of a prompt; after preemption the answer so far is part of it."""
    prompt, output = row.sequence.prompt_ids, row.sequence.output_ids
    num_prompt = len(prompt)
    return [*prompt[row.start : row.end], *output[max(0, row.start - num_prompt) : max(0, row.end - num_prompt)]]


def _places(row: Row, page_tokens: int) -> Tensor:
    """(tokens,) int64: where in the cache a row's new keys and values go."""
    index = torch.arange(row.start, row.end)
    return torch.tensor(row.pages)[index // page_tokens] * page_tokens + index % page_tokens


def _picture_positions(row: Row) -> Tensor:
    """(3, tokens) int64: rotary positions of a row of a prompt that may have pictures."""
    vision = row.sequence.vision
    if not isinstance(vision, VisionInputs):
        return torch.arange(row.start, row.end).expand(3, -1)
    num_prompt = vision.positions.shape[1]
    after = torch.arange(max(row.start, num_prompt), max(row.end, num_prompt)) + vision.rope_delta
    return torch.cat([vision.positions[:, row.start : row.end], after.expand(3, -1)], dim=1)
