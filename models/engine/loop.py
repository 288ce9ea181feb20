"""The one engine thread: schedule, launch, deliver, for every model in turn.

After its warm-up, all calls of a runner happen in this thread, because CUDA-graph state is per thread. It may have
several steps under way: the next is launched before the tokens of the one before are read, so that the device never
waits for the host. The models share the device fairly: the one that used less of it so far goes first. A fault in one
sequence ends that sequence; a step that raises ends the sequences of that step; `EngineDead` ends the loop, and the
service is no longer alive.

Knows token ids and times only. Text is made by the callbacks of `Sequence`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from models.engine.kv_cache import KVCache
from models.engine.scheduler import Row, Scheduler, SchedulerLimits, Step
from models.engine.sequence import EndReason, Sequence, State, TokenLogprobs
from models.errors import EngineDead

log = logging.getLogger("avito.engine")

# How often the thread looks which of two models' steps is done, and whether a host-side grammar is.
_POLL_S = 0.0002


@dataclass(frozen=True)
class StepOutput:
    """What one step gave a row: a token id, or None while its prompt is still being read, or an error.

    :param is_retryable: the error is a lack of memory; the sequence may start again.
    """

    row: Row
    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    error: Exception | None = None
    is_retryable: bool = False

    @property
    def sequence(self) -> Sequence:
        return self.row.sequence


class LaunchedStep(Protocol):
    """A step under way on the device."""

    def is_done(self) -> bool:
        """Whether `wait` would return at once.

        :raise EngineDead: the device cannot be used any more.
        """

    def wait(self) -> None:
        """:raise EngineDead: the device cannot be used any more."""

    def part_seconds(self) -> tuple[float, float]:
        """What the decodes took, and the prefills; after `wait`."""

    def outputs(self) -> Iterable[StepOutput]:
        """One for each row, after `wait`."""


class Runner(Protocol):
    """Runs steps of one model. Called in the loop's thread only, but for the properties."""

    @property
    def num_pages(self) -> int:
        """Pages of its cache, page 0 included, which takes what padding writes."""

    @property
    def page_tokens(self) -> int: ...

    @property
    def max_steps_in_flight(self) -> int:
        """1: `launch` returns when the step is done. More: steps run on the device while the host goes on."""

    def launch(self, step: Step) -> LaunchedStep:
        """Start a step; its rows' tokens may depend on those of steps launched before.

        :raise EngineDead: the device cannot be used any more.
        """

    def release(self, sequence: Sequence) -> None:
        """Forget a sequence that left or was preempted, perhaps one that was never launched. Harmless if repeated."""

    def zero_pages(self, pages: list[int]) -> None:
        """What these pages hold is not to be trusted."""

    @property
    def memory_bytes(self) -> tuple[int, int]:
        """(allocated, reserved) on the device after the newest step; any thread may read it."""


@dataclass(frozen=True)
class CacheSnapshot:
    """Books of one model's pages. `queried_tokens` are prompt tokens looked up, `reused_tokens` those found."""

    num_pages: int
    num_used_pages: int
    num_cached_pages: int
    page_tokens: int
    queried_tokens: int
    reused_tokens: int
    num_preemptions: int


@dataclass(frozen=True)
class LoopSnapshot:
    """How the loop stands. `stalled_s`: seconds without a step while work is pending, 0 if none is."""

    is_dead: bool
    stalled_s: float
    num_waiting: dict[str, int]
    num_running: dict[str, int]
    caches: dict[str, CacheSnapshot]


@dataclass
class _InFlight:
    step: Step
    launched: LaunchedStep
    started: float


@dataclass
class _Model:
    """One model in the loop. `used_s`: the time of the device that its steps took."""

    runner: Runner
    scheduler: Scheduler
    used_s: float = 0.0
    last_done: float = 0.0
    in_flight: deque[_InFlight] = field(default_factory=deque)

    @property
    def is_full(self) -> bool:
        return len(self.in_flight) >= self.runner.max_steps_in_flight


class EngineLoop:
    """May be called from any thread, but for `_run` and what it calls."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._wake = threading.Condition()
        self._models: dict[str, _Model] = {}
        self._pending_since: float | None = None  # last sign of progress while there is work
        self._is_stopping = False
        self._is_dead = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """End the thread after the current step; what is still there ends as cancelled."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def add_model(self, name: str, runner: Runner, limits: SchedulerLimits) -> None:
        with self._wake:
            self._models[name] = _Model(runner, Scheduler(KVCache(runner.num_pages, runner.page_tokens), limits))

    def add(self, name: str, sequence: Sequence) -> None:
        """Hand over a sequence. From here `on_end` is certain to be called once.

        :raise EngineDead: the loop has ended.
        """
        with self._wake:
            if self._is_dead or self._is_stopping:
                raise EngineDead("the engine has ended")
            model = self._models[name]
            if not model.scheduler.has_work:
                # A model that was idle starts level with the others, it has no claim to the time it did not use.
                busy = [other.used_s for other in self._models.values() if other.scheduler.has_work]
                model.used_s = max(model.used_s, min(busy, default=0.0))
            now = self._clock()
            model.scheduler.add(sequence, now)
            if self._pending_since is None:
                self._pending_since = now
            self._wake.notify_all()

    def cancel(self, name: str, sequence: Sequence) -> None:
        """End a sequence: at once if it never ran, else after the step that is running."""
        with self._wake:
            sequence.is_cancelled = True
            scheduler = self._models[name].scheduler
            # One that was preempted waits too, but has more to be let go of than its place in the queue.
            was_waiting = sequence.started_at is None and sequence in scheduler.waiting
            if was_waiting:
                scheduler.remove(sequence)
                self._note_idle()
        if was_waiting:
            self._end(sequence, "cancelled", None)

    def seconds_to_drain(self, name: str) -> float | None:
        with self._wake:
            return self._models[name].scheduler.seconds_to_drain()

    def snapshot(self) -> LoopSnapshot:
        with self._wake:
            since = self._pending_since
            schedulers = {name: model.scheduler for name, model in self._models.items()}
            return LoopSnapshot(
                is_dead=self._is_dead,
                stalled_s=0.0 if since is None else max(0.0, self._clock() - since),
                num_waiting={name: len(s.waiting) for name, s in schedulers.items()},
                num_running={name: s.num_running for name, s in schedulers.items()},
                caches={name: _cache_snapshot(s) for name, s in schedulers.items()},
            )

    def _run(self) -> None:
        try:
            while self._pass():
                pass
            self._end_all("cancelled", None)
        except Exception as error:  # whatever it is, the loop has ended and everybody must learn it
            log.critical("engine loop ended: %r", error, exc_info=not isinstance(error, EngineDead))
            self._end_all("failed", error)

    def _pass(self) -> bool:
        """Wait for work, launch what there is room for, deliver what is done. False when told to stop."""
        with self._wake:
            self._note_idle()
            self._wake.wait_for(lambda: self._is_stopping or self._has_work)
            if self._is_stopping:
                return False
        has_launched = self._launch_steps()
        if has_launched and not any(model.is_full for model in self._models.values()):
            return True
        name = self._next_done()
        if name is not None:
            self._collect(self._models[name])
        elif not has_launched:
            # Everybody waits for a host-side grammar, or has just left.
            time.sleep(_POLL_S)
        return True

    @property
    def _has_work(self) -> bool:
        return any(model.scheduler.has_work or model.in_flight for model in self._models.values())

    def _launch_steps(self) -> bool:
        """Launch one step for each model that has room for it. Where `launch` itself takes the step's time, only for
        the one that used least so far. True if anything was launched."""
        has_launched = False
        with self._wake:
            models = sorted(self._models.values(), key=lambda model: model.used_s)
        for model in models:
            if model.is_full:
                continue
            with self._wake:
                now = self._clock()
                elsewhere = any(other.scheduler.is_decoding for other in models if other is not model)
                step = model.scheduler.next_step(now, is_decoding_elsewhere=elsewhere)
            for sequence in step.preempted:
                model.runner.release(sequence)
            for sequence, reason, error in step.left:
                self._leave(model, sequence, reason, error)
            if step.decodes or step.prefills:
                self._launch(model, step, now)
                has_launched = True
                if model.runner.max_steps_in_flight == 1:
                    break
        return has_launched

    def _launch(self, model: _Model, step: Step, now: float) -> None:
        try:
            launched = model.runner.launch(step)
        except EngineDead:
            raise
        except Exception as error:
            log.exception("a step of %d sequences failed", len(step.rows))
            launched = _FailedStep(step, error)
        model.in_flight.append(_InFlight(step, launched, now))

    def _next_done(self) -> str | None:
        """The model whose oldest step is done first; waits for it. None: no step is under way."""
        names = [name for name, model in self._models.items() if model.in_flight]
        # Of several that are done the one launched first, or a busy model would never let the other one's be read.
        names.sort(key=lambda name: self._models[name].in_flight[0].started)
        if len(names) > 1:
            while True:
                for name in names:
                    if self._models[name].in_flight[0].launched.is_done():
                        return name
                time.sleep(_POLL_S)
        return names[0] if names else None

    def _collect(self, model: _Model) -> None:
        """Wait for a model's oldest step and deliver what it gave.

        If the runner raises, the rows that had no output yet end with that error. What goes wrong in delivering is no
        fault of the step: it ends the loop, so that nobody is left without an end.
        """
        flight = model.in_flight[0]
        rest = {id(row): row for row in flight.step.rows}
        for output in self._outputs(flight, rest):
            if len(rest) == len(flight.step.rows):
                self._record_time(model, flight)
            rest.pop(id(output.row))
            self._finish_output(model, output)
        model.in_flight.popleft()

    def _outputs(self, flight: _InFlight, rest: dict[int, Row]) -> Iterator[StepOutput]:
        """The outputs of a step over `rest`, from which the caller takes each as it comes; a fault of the runner
        becomes the output of those that are left."""
        try:
            flight.launched.wait()
            yield from flight.launched.outputs()
        except EngineDead:
            raise
        except Exception as error:
            log.exception("a step failed, %d sequences had no output yet", len(rest))
            yield from [StepOutput(row, error=error) for row in rest.values()]

    def _record_time(self, model: _Model, flight: _InFlight) -> None:
        """Before any completion is counted: its last step belongs to it."""
        now = self._clock()
        seconds = now - max(flight.started, model.last_done)
        with self._wake:
            model.last_done = now
            model.used_s += seconds
            model.scheduler.record_step(flight.step, seconds, *flight.launched.part_seconds())
            self._pending_since = now

    def _finish_output(self, model: _Model, output: StepOutput) -> None:
        """Deliver one output, unless its sequence has left or lost its place since the step was planned."""
        scheduler, sequence = model.scheduler, output.sequence
        with self._wake:
            if not scheduler.is_current(output.row):
                return
            if output.error is None:
                scheduler.record_row(output.row)
            has_retried = output.is_retryable and scheduler.retry(output.row)
        if has_retried:
            model.runner.release(sequence)
            return
        end, error = self._deliver(output)
        if end is not None:
            with self._wake:
                tainted = scheduler.discard(sequence) if output.error is not None else []
                scheduler.remove(sequence)
                scheduler.record_completion()
            if tainted:
                model.runner.zero_pages(tainted)
            self._leave(model, sequence, end, error)
        with self._wake:
            self._pending_since = self._clock()

    def _deliver(self, output: StepOutput) -> tuple[EndReason | None, Exception | None]:
        sequence, sampling = output.sequence, output.sequence.sampling
        if output.error is not None:
            return "failed", output.error
        if output.token_id is None:
            return None, None
        if sequence.first_token_at is None:
            sequence.first_token_at = self._clock()
        try:
            if sequence.constraint is not None:
                sequence.constraint.advance(output.token_id)
            if output.token_id in sampling.stop_ids:
                return "stop", None
            sequence.output_ids.append(output.token_id)
            if output.logprobs is not None:
                sequence.logprobs.append(output.logprobs)
            is_stopped = sequence.on_token(output.token_id)
        except Exception as error:
            log.exception("[%s] a token could not be delivered", sequence.request_id)
            return "failed", error
        if is_stopped:
            return "stop", None
        if len(sequence.output_ids) >= sampling.max_tokens:
            return "length", None
        return None, None

    def _leave(self, model: _Model, sequence: Sequence, reason: EndReason, error: Exception | None) -> None:
        if sequence.started_at is not None:
            model.runner.release(sequence)
        self._end(sequence, reason, error)

    def _end(self, sequence: Sequence, reason: EndReason, error: Exception | None) -> None:
        sequence.state = State.ENDED
        sequence.ended_at = self._clock()
        sequence.on_end(sequence, reason, error)

    def _end_all(self, reason: EndReason, error: Exception | None) -> None:
        with self._wake:
            self._is_dead = True
            self._pending_since = None
            rest = [sequence for model in self._models.values() for sequence in model.scheduler.clear()]
        for sequence in rest:
            try:
                self._end(sequence, reason, error)
            except Exception:  # the others still have to learn it
                log.exception("[%s] the end could not be delivered", sequence.request_id)

    def _note_idle(self) -> None:
        if not any(model.scheduler.has_work for model in self._models.values()):
            self._pending_since = None


class _FailedStep:
    """A step that could not be launched."""

    def __init__(self, step: Step, error: Exception) -> None:
        self._step, self._error = step, error

    def is_done(self) -> bool:
        return True

    def wait(self) -> None:
        return

    def part_seconds(self) -> tuple[float, float]:
        return 0.0, 0.0

    def outputs(self) -> Iterable[StepOutput]:
        return [StepOutput(row, error=self._error) for row in self._step.rows]


def _cache_snapshot(scheduler: Scheduler) -> CacheSnapshot:
    cache = scheduler.cache
    return CacheSnapshot(
        num_pages=cache.num_pages - 1,
        num_used_pages=cache.num_used_pages,
        num_cached_pages=cache.num_cached_pages,
        page_tokens=cache.page_tokens,
        queried_tokens=cache.num_queried_tokens,
        reused_tokens=cache.num_reused_tokens,
        num_preemptions=scheduler.num_preemptions,
    )
