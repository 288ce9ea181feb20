"""Which requests of one model run next: plain Python, the clock passed in, no torch, no threads.

First come, first served into at most `max_running` places; cancelled and expired sequences leave between steps.
The loop owns the lock under which all of this is called.
"""

from __future__ import annotations

from collections import deque

from models.engine.sequence import EndReason, Sequence, State

# Weight of the newest measurement in the drain rate: about the last ten completions count.
_SMOOTHING = 0.2


class Scheduler:
    def __init__(self, max_running: int) -> None:
        self.max_running = max_running
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._seconds_per_completion: float | None = None
        self._busy_s = 0.0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence, now: float) -> None:
        sequence.added_at = now
        self.waiting.append(sequence)

    def next_batch(self, now: float) -> tuple[list[Sequence], list[tuple[Sequence, EndReason]]]:
        """The sequences to step now, and those that left instead: cancelled, or expired at `now`."""
        left: list[tuple[Sequence, EndReason]] = []
        for sequence in [*self.running, *self.waiting]:
            if sequence.is_cancelled:
                left.append((sequence, "cancelled"))
            elif now >= sequence.deadline:
                left.append((sequence, "expired"))
        for sequence, _ in left:
            self.remove(sequence)
        while self.waiting and len(self.running) < self.max_running:
            sequence = self.waiting.popleft()
            sequence.state = State.RUNNING
            sequence.started_at = now
            self.running.append(sequence)
        return list(self.running), left

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is. Unknown ones are ignored: it may have left by another way."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def record_step(self, seconds: float) -> None:
        self._busy_s += seconds

    def record_completion(self) -> None:
        """A sequence left after running. The rate counts busy time only, so that idle gaps do not slow it."""
        measured, self._busy_s = self._busy_s, 0.0
        known = self._seconds_per_completion
        self._seconds_per_completion = measured if known is None else (1 - _SMOOTHING) * known + _SMOOTHING * measured

    def seconds_to_drain(self) -> float | None:
        """How long what waits and runs now will take at the measured rate; None before the first completion."""
        if self._seconds_per_completion is None:
            return None
        return self._seconds_per_completion * (len(self.waiting) + len(self.running))
