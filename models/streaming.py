"""From token ids to text, and from the engine's thread to the request's: `Detokenizer`, `StopStrings`, `Channel`.

The engine knows ids only; what a client sees is made here: whole characters, nothing past a stop string, deltas that
carry all text since the last one, and exactly one `Done` or `Failed` at the end. No HTTP, no torch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from models.errors import ServiceError
from models.schemas import Completion, Timing

_REPLACEMENT = "\ufffd"
# Ids that may wait for their character to be completed. Bytes that never become one must not be decoded again and
# again in the engine's thread.
_MAX_PENDING_IDS = 16


@dataclass(frozen=True)
class Delta:
    """New text since the last event."""

    text: str


@dataclass(frozen=True)
class Done:
    """The request is complete; `completion.text` is the whole text."""

    completion: Completion


@dataclass(frozen=True)
class Failed:
    """The request ended without a complete answer."""

    error: ServiceError


Event = Delta | Done | Failed


class Detokenizer:
    """Turns ids into text as they come, whole characters only.

    A window of ids is decoded with and without the newest ones and the difference is new text; the window starts at
    the last clean cut, so that each step costs the same however long the answer is. Text that ends in U+FFFD may be
    half a character and waits for the next id. (The method of text-generation-inference and vLLM.)

    :param decode: token ids -> text, special tokens left out.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._start = 0  # first id of the window
        self._read = 0  # ids before this one are already out as text

    def add(self, token_id: int) -> str:
        self._ids.append(token_id)
        before = self._decode(self._ids[self._start : self._read])
        now = self._decode(self._ids[self._start :])
        is_whole = len(now) > len(before) and not now.endswith(_REPLACEMENT)
        if not is_whole and len(self._ids) - self._read < _MAX_PENDING_IDS:
            return ""
        self._start, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def flush(self) -> str:
        """What is left at the end: an unfinished character shows as U+FFFD."""
        before = self._decode(self._ids[self._start : self._read])
        now = self._decode(self._ids[self._start :])
        self._start = self._read = len(self._ids)
        return now[len(before) :]


class StopStrings:
    """Cuts a text before the first stop string and holds back what could still become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self._is_met = False

    def add(self, text: str) -> tuple[str, bool]:
        """Take new text; give what may be shown, and whether a stop string was met."""
        if not self._stops or self._is_met:
            return ("" if self._is_met else text), self._is_met
        text = self._held + text
        hits = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if hits:
            self._held, self._is_met = "", True
            return text[: min(hits)], True
        keep = max(self._tail(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _tail(text: str, stop: str) -> int:
        """Length of the longest end of `text` that begins `stop`."""
        for length in range(min(len(text), len(stop) - 1), 0, -1):
            if text.endswith(stop[:length]):
                return length
        return 0


class Channel:
    """One request's way from the engine to its reader. Writers never block: a slow reader costs the engine nothing.

    `put`, `finish` and `fail` may be called from any thread; `get` from one. Text not yet read waits as one string,
    bounded by the request's `max_tokens`. `input_tokens`, `generated_tokens` and `timing` are kept up to date by the
    writer, so that requests which end early can be accounted for too.

    :param on_cancel: called by `cancel`; ends the work behind this channel.
    """

    def __init__(self, on_cancel: Callable[[], None]) -> None:
        self.input_tokens = 0
        self.generated_tokens = 0
        self.timing: Timing | None = None
        self._on_cancel = on_cancel
        self._ready = threading.Condition()
        self._text: list[str] = []
        self._end: Done | Failed | None = None
        self._is_ended = False

    def put(self, text: str) -> None:
        with self._ready:
            if text and not self._is_ended:
                self._text.append(text)
                self._ready.notify_all()

    def finish(self, completion: Completion) -> bool:
        """End with `Done`. False if the channel had ended before: the first end counts."""
        return self._close(Done(completion))

    def fail(self, error: ServiceError) -> bool:
        """End with `Failed`. False if the channel had ended before."""
        return self._close(Failed(error))

    def _close(self, end: Done | Failed) -> bool:
        with self._ready:
            if self._is_ended:
                return False
            self._is_ended = True
            self._end = end
            self._ready.notify_all()
            return True

    def cancel(self) -> None:
        """Nobody reads any more: give the work up. Harmless after the end."""
        if not self._is_ended:
            self._on_cancel()

    @property
    def is_ended(self) -> bool:
        return self._is_ended

    def get(self, timeout_s: float) -> Event | None:
        """The next event: all text since the last `Delta`, then once the end. None if nothing came in time."""
        with self._ready:
            self._ready.wait_for(lambda: self._text or self._end is not None, timeout_s)
            if self._text:
                text, self._text = "".join(self._text), []
                return Delta(text)
            end, self._end = self._end, None
            return end

    def wait_end(self, timeout_s: float) -> Done | Failed | None:
        """For readers that want the whole answer only: the end, skipping deltas. None if it did not come in time."""
        with self._ready:
            self._ready.wait_for(lambda: self._end is not None, timeout_s)
            end, self._end = self._end, None
            return end
