"""The one engine thread: schedule, run, deliver, for every model in turn.

After its warm-up, all calls of a runner happen in this thread, because CUDA-graph and generation state is per thread.
The models share it fairly: the one that used less of the device so far goes next. A fault in one sequence ends that
sequence; a step that raises ends the sequences of that step; `EngineDead` ends the loop, and the service is no longer
alive.

Knows token ids and times only. Text is made by the callbacks of `Sequence`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Sequences
from dataclasses import dataclass
from typing import Protocol

from models.engine.scheduler import Scheduler
from models.engine.sequence import EndReason, Sequence, State
from models.errors import EngineDead

log = logging.getLogger("avito.engine")


@dataclass(frozen=True)
class StepOutput:
    """What one step gave a sequence: a token id, or None while its prompt is still being read, or an error."""

    sequence: Sequence
    token_id: int | None = None
    error: Exception | None = None


class Runner(Protocol):
    """Runs steps of one model. Called in the loop's thread only."""

    def step(self, batch: Sequences[Sequence]) -> Iterable[StepOutput]:
        """Advance every sequence of the batch by one step; one output for each, as they come.

        :raise EngineDead: the device cannot be used any more.
        """

    def release(self, sequence: Sequence) -> None:
        """Give back what the runner holds for a sequence; called once for each that was ever in a batch, unless the
        loop itself has ended."""

    @property
    def memory_bytes(self) -> tuple[int, int]:
        """(allocated, reserved) on the device after the newest step; any thread may read it."""


@dataclass(frozen=True)
class LoopSnapshot:
    """How the loop stands. `stalled_s`: seconds without a step while work is pending, 0 if none is."""

    is_dead: bool
    stalled_s: float
    num_waiting: dict[str, int]
    num_running: dict[str, int]


class EngineLoop:
    """May be called from any thread, but for `_run` and what it calls."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._wake = threading.Condition()
        self._schedulers: dict[str, Scheduler] = {}
        self._runners: dict[str, Runner] = {}
        self._used_s: dict[str, float] = {}
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

    def add_model(self, name: str, runner: Runner, max_running: int) -> None:
        with self._wake:
            self._schedulers[name] = Scheduler(max_running)
            self._runners[name] = runner
            self._used_s[name] = 0.0

    def add(self, name: str, sequence: Sequence) -> None:
        """Hand over a sequence. From here `on_end` is certain to be called once.

        :raise EngineDead: the loop has ended.
        """
        with self._wake:
            if self._is_dead or self._is_stopping:
                raise EngineDead("the engine has ended")
            scheduler = self._schedulers[name]
            if not scheduler.has_work:
                # A model that was idle starts level with the others, it has no claim to the time it did not use.
                busy = [self._used_s[other] for other, s in self._schedulers.items() if s.has_work]
                self._used_s[name] = max(self._used_s[name], min(busy, default=0.0))
            now = self._clock()
            scheduler.add(sequence, now)
            if self._pending_since is None:
                self._pending_since = now
            self._wake.notify_all()

    def cancel(self, name: str, sequence: Sequence) -> None:
        """End a sequence: at once if it still waits, else after the step that is running."""
        with self._wake:
            sequence.is_cancelled = True
            was_waiting = sequence.state is State.WAITING and sequence in self._schedulers[name].waiting
            if was_waiting:
                self._schedulers[name].remove(sequence)
                self._note_idle()
        if was_waiting:
            self._end(sequence, "cancelled", None)

    def seconds_to_drain(self, name: str) -> float | None:
        with self._wake:
            return self._schedulers[name].seconds_to_drain()

    def snapshot(self) -> LoopSnapshot:
        with self._wake:
            since = self._pending_since
            return LoopSnapshot(
                is_dead=self._is_dead,
                stalled_s=0.0 if since is None else max(0.0, self._clock() - since),
                num_waiting={name: len(s.waiting) for name, s in self._schedulers.items()},
                num_running={name: len(s.running) for name, s in self._schedulers.items()},
            )

    def _run(self) -> None:
        try:
            while self._step():
                pass
            self._end_all("cancelled", None)
        except Exception as error:  # whatever it is, the loop has ended and everybody must learn it
            log.critical("engine loop ended: %r", error, exc_info=not isinstance(error, EngineDead))
            self._end_all("failed", error)

    def _step(self) -> bool:
        """One pass: wait for work, run one step of one model, deliver. False when the loop was told to stop."""
        with self._wake:
            self._note_idle()
            self._wake.wait_for(lambda: self._is_stopping or any(s.has_work for s in self._schedulers.values()))
            if self._is_stopping:
                return False
            name = min((n for n, s in self._schedulers.items() if s.has_work), key=self._used_s.__getitem__)
            scheduler, runner = self._schedulers[name], self._runners[name]
            started = self._clock()
            batch, left = scheduler.next_batch(started)
        for sequence, reason in left:
            self._leave(runner, sequence, reason, None)
        self._run_batch(name, batch, started)
        with self._wake:
            self._pending_since = self._clock()
        return True

    def _run_batch(self, name: str, batch: list[Sequence], started: float) -> None:
        """Run one step and deliver each output as it comes: a runner that steps one by one shows progress in between.

        If the runner raises, the sequences that had no output yet end with that error. What goes wrong in delivering
        is no fault of the step: it ends the loop, so that nobody is left without an end.
        """
        rest, mark = list(batch), started
        for output in self._outputs(self._runners[name], rest):
            rest.remove(output.sequence)
            mark = self._finish_output(name, output, mark)

    def _outputs(self, runner: Runner, rest: list[Sequence]) -> Iterator[StepOutput]:
        """The outputs of one step over `rest`, from which the caller takes each as it comes; a fault of the runner
        becomes the output of those that are left."""
        if not rest:
            return
        try:
            yield from runner.step(list(rest))
        except EngineDead:
            raise
        except Exception as error:
            log.exception("a step failed, %d sequences had no output yet", len(rest))
            yield from [StepOutput(sequence, error=error) for sequence in rest]

    def _finish_output(self, name: str, output: StepOutput, mark: float) -> float:
        """Deliver one output; `mark` is when the one before was done. Returns when this one was."""
        scheduler = self._schedulers[name]
        now = self._clock()
        # Before the completion is counted: its last step belongs to it.
        scheduler.record_step(now - mark)
        end, error = self._deliver(output)
        if end is not None:
            with self._wake:
                scheduler.remove(output.sequence)
                scheduler.record_completion()
            self._leave(self._runners[name], output.sequence, end, error)
        with self._wake:
            self._pending_since = self._clock()
            self._used_s[name] += now - mark
        return now

    def _deliver(self, output: StepOutput) -> tuple[EndReason | None, Exception | None]:
        sequence = output.sequence
        if output.error is not None:
            return "failed", output.error
        if output.token_id is None:
            return None, None
        if sequence.first_token_at is None:
            sequence.first_token_at = self._clock()
        if output.token_id in sequence.sampling.stop_ids:
            return "stop", None
        sequence.output_ids.append(output.token_id)
        try:
            is_stopped = sequence.on_token(output.token_id)
        except Exception as error:
            log.exception("[%s] a token could not be delivered", sequence.request_id)
            return "failed", error
        if is_stopped:
            return "stop", None
        if len(sequence.output_ids) >= sequence.sampling.max_tokens:
            return "length", None
        return None, None

    def _leave(self, runner: Runner, sequence: Sequence, reason: EndReason, error: Exception | None) -> None:
        if sequence.started_at is not None:
            runner.release(sequence)
        self._end(sequence, reason, error)

    def _end(self, sequence: Sequence, reason: EndReason, error: Exception | None) -> None:
        sequence.state = State.ENDED
        sequence.ended_at = self._clock()
        sequence.on_end(sequence, reason, error)

    def _end_all(self, reason: EndReason, error: Exception | None) -> None:
        with self._wake:
            self._is_dead = True
            self._pending_since = None
            rest = [sequence for s in self._schedulers.values() for sequence in (*s.running, *s.waiting)]
            for scheduler in self._schedulers.values():
                scheduler.running.clear()
                scheduler.waiting.clear()
        for sequence in rest:
            try:
                self._end(sequence, reason, error)
            except Exception:  # the others still have to learn it
                log.exception("[%s] the end could not be delivered", sequence.request_id)

    def _note_idle(self) -> None:
        if not any(s.has_work for s in self._schedulers.values()):
            self._pending_since = None
