"""From token ids to text, and from the engine's thread to the request's: `Detokenizer`, `StopStrings`, `Channel`.

The engine knows ids only; what a client sees is made here: whole characters, nothing past a stop string, deltas that
carry all text since the last one, and exactly one `Done` or `Failed` at the end. No HTTP, no torch.

The engine's thread has steps to launch, so it does as little as can be: it appends an id. The reader's thread makes the
text, and sets the pace too. Only a request with stop strings has its text made in the engine's thread, because there
the text decides when the sequence ends.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from models.errors import InternalError, ServiceError
from models.schemas import Completion, Timing, TokenLogprob

log = logging.getLogger("avito.service")

_REPLACEMENT = "\ufffd"
# Ids that may wait for their character to be completed: bytes that never become one must not be decoded for ever.
_MAX_PENDING_IDS = 16
# A character of UTF-8 has at most 4 bytes and an id is at least one: what comes before the last 3 ids is settled.
_MAX_UNSETTLED_IDS = 3

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Delta:
    """New text since the last event, and the log-probabilities of new tokens if they were asked for. A token's text may
    come in a later delta than its log-probability: half a character waits for the rest."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Done:
    """The request is complete; `completion` has the whole text and all log-probabilities."""

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

    With byte-level BPE, which the loader insists on, what comes out is, joined, what decoding all ids at once gives,
    however they were split.

    :param decode: token ids -> text, special tokens left out.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._start = 0  # first id of the window
        self._read = 0  # ids before this one are already out as text

    def add(self, token_ids: Sequence[int]) -> str:
        num_tried = len(self._ids)
        self._ids += token_ids
        newest = len(self._ids)
        before = self._decode(self._ids[self._start : self._read])
        # The newest ids may be half a character: cut before them, but not where a cut was tried in vain.
        for end in range(newest, max(num_tried, newest - _MAX_PENDING_IDS), -1):
            now = self._decode(self._ids[self._start : end])
            if len(now) > len(before) and not now.endswith(_REPLACEMENT):
                return self._cut(end, now[len(before) :])
        if newest - self._read < _MAX_PENDING_IDS:
            return ""
        end = newest - _MAX_UNSETTLED_IDS
        return self._cut(end, self._decode(self._ids[self._start : end])[len(before) :])

    def flush(self, token_ids: Sequence[int] = ()) -> str:
        """The last ids, and what is left: an unfinished character shows as U+FFFD."""
        self._ids += token_ids
        before = self._decode(self._ids[self._start : self._read])
        now = self._decode(self._ids[self._start :])
        self._start = self._read = len(self._ids)
        return now[len(before) :]

    def _cut(self, end: int, text: str) -> str:
        self._start, self._read = self._read, end
        return text


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


class AnswerText(Protocol):
    """One answer's text on its way from the engine's thread, which writes, to the request's, which reads.

    There is no lock: the writer only appends to a list, and the reader remembers how far it is.
    """

    def add(self, token_id: int) -> bool:
        """Writer. True if a stop string was met."""

    def end(self) -> bool:
        """Writer, after the last id of a complete answer. True if a stop string was met only now."""

    @property
    def has_news(self) -> bool:
        """Whether the reader may find something. Any thread."""

    def take(self) -> str:
        """Reader: new text, whole characters; may be empty."""

    def take_rest(self) -> str:
        """Reader, after the writer's `end`: all that is left."""


class LazyText:
    """Text made in the reader's thread: the writer appends ids."""

    def __init__(self, decode: Decode) -> None:
        self._ids: list[int] = []
        self._num_taken = 0
        self._detokenizer = Detokenizer(decode)

    def add(self, token_id: int) -> bool:
        self._ids.append(token_id)
        return False

    def end(self) -> bool:
        return False

    @property
    def has_news(self) -> bool:
        return len(self._ids) > self._num_taken

    def take(self) -> str:
        return self._detokenizer.add(self._new())

    def take_rest(self) -> str:
        return self._detokenizer.flush(self._new())

    def _new(self) -> list[int]:
        ids = self._ids[self._num_taken :]
        self._num_taken += len(ids)
        return ids


class WatchedText:
    """Text made in the writer's thread, cut before the first stop string."""

    def __init__(self, decode: Decode, stops: Sequence[str]) -> None:
        self._parts: list[str] = []
        self._num_taken = 0
        self._detokenizer = Detokenizer(decode)
        self._stops = StopStrings(stops)

    def add(self, token_id: int) -> bool:
        text, is_stopped = self._stops.add(self._detokenizer.add([token_id]))
        if text:
            self._parts.append(text)
        return is_stopped

    def end(self) -> bool:
        text, is_stopped = self._stops.add(self._detokenizer.flush())
        self._parts.append(text + self._stops.flush())
        return is_stopped

    @property
    def has_news(self) -> bool:
        return len(self._parts) > self._num_taken

    def take(self) -> str:
        parts = self._parts[self._num_taken :]
        self._num_taken += len(parts)
        return "".join(parts)

    take_rest = take


class Channel:
    """One request's way from the engine to its reader. Writers never block: a slow reader costs the engine nothing.

    `put` and `end_text` are called by the engine's thread, `finish` and `fail` by any, `get` and `wait_end` by one, the
    reader's. Ids not yet read wait here, bounded by the request's `max_tokens`. `input_tokens`, `generated_tokens` and
    `timing` are kept up to date by the writer, so that requests which end early can be accounted for too.

    The reader paces itself: it sleeps until a delta is due, and the writer wakes it only while it waits for text that
    is overdue, and at the end.

    :param on_cancel: called by `cancel`; ends the work behind this channel.
    :param text: where `put` and the reader meet.
    :param delta_interval_s: least time between two deltas; the first one and the end never wait for it.
    :param clock: monotonic seconds, for the pace.
    :param read_logprobs: called by the reader with the number of tokens whose log-probabilities it has already; gives
        those of the rest. None: they were not asked for.
    """

    def __init__(
        self,
        on_cancel: Callable[[], None],
        text: AnswerText,
        *,
        delta_interval_s: float,
        clock: Callable[[], float],
        read_logprobs: Callable[[int], tuple[TokenLogprob, ...]] | None = None,
    ) -> None:
        self.input_tokens = 0
        self.cached_tokens = 0
        self.generated_tokens = 0
        self.timing: Timing | None = None
        self._on_cancel = on_cancel
        self._text = text
        self._delta_interval_s = delta_interval_s
        self._clock = clock
        self._news = threading.Condition()
        self._end: Done | Failed | None = None
        # Set by a reader that waits for text, before it looks whether there is any. The writer looks at it after it has
        # appended: either the reader sees the text or the writer sees the reader.
        self._is_text_awaited = False
        # The reader's own.
        self._delta_due_at = -math.inf
        self._shown: list[str] = []
        self._read_logprobs = read_logprobs
        self._shown_logprobs: list[TokenLogprob] = []
        self._is_read = False

    def put(self, token_id: int) -> bool:
        """A new id; called for each of the answer, in order. True if its text completes a stop string."""
        self.generated_tokens += 1
        if self._end is not None:
            return False
        is_stopped = self._text.add(token_id)
        if self._is_text_awaited and self._text.has_news:
            with self._news:
                self._is_text_awaited = False  # the next id need not wake it again
                self._news.notify_all()
        return is_stopped

    def end_text(self) -> bool:
        """The answer is complete: nothing is held back any more. True if a stop string was met only now."""
        return self._text.end()

    def finish(self, completion: Completion) -> bool:
        """End with `Done`, after `end_text`. The reader fills in `completion.text`.

        False if the channel had ended before: the first end counts.
        """
        return self._close(Done(completion))

    def fail(self, error: ServiceError) -> bool:
        """End with `Failed`. False if the channel had ended before."""
        return self._close(Failed(error))

    def _close(self, end: Done | Failed) -> bool:
        with self._news:
            if self._end is not None:
                return False
            self._end = end
            self._news.notify_all()
            return True

    def cancel(self) -> None:
        """Nobody reads any more: give the work up. Harmless after the end."""
        if self._end is None:
            self._on_cancel()

    @property
    def is_ended(self) -> bool:
        return self._end is not None

    def get(self, timeout_s: float) -> Event | None:
        """The next event: all text since the last `Delta`, then once the end. None if nothing came in time."""
        give_up_at = self._clock() + timeout_s
        if self._clock() < self._delta_due_at:
            with self._news:
                self._await_end(min(give_up_at, self._delta_due_at) - self._clock())
        while not self._is_read and (self._end is not None or self._clock() >= self._delta_due_at):
            if not self._await_text(give_up_at - self._clock()):
                break
            event = self._next_event()
            if event is not None:
                return event
        return None

    def wait_end(self, timeout_s: float) -> Done | Failed | None:
        """For readers that want the whole answer only: the end, skipping deltas. None if it did not come in time."""
        with self._news:
            if self._is_read or not self._await_end(timeout_s):
                return None
        event = self._next_event()
        while isinstance(event, Delta):
            event = self._next_event()
        return event

    def _await_end(self, timeout_s: float) -> bool:
        """Holding the lock."""
        return self._news.wait_for(lambda: self._end is not None, timeout_s)

    def _await_text(self, timeout_s: float) -> bool:
        """Wait for text, or the end. False if neither came in time."""
        give_up_at = self._clock() + timeout_s
        with self._news:
            while True:
                self._is_text_awaited = True
                if self._end is not None or self._text.has_news:
                    break
                if not self._news.wait(give_up_at - self._clock()):
                    break
            self._is_text_awaited = False
            return self._end is not None or self._text.has_news

    def _next_event(self) -> Event | None:
        """What there is now. None if the new ids make no whole character yet."""
        end = self._end  # first: what was put before the end is then taken before it
        try:
            text = self._text.take_rest() if isinstance(end, Done) else self._text.take()
            logprobs = () if self._read_logprobs is None else self._read_logprobs(len(self._shown_logprobs))
        except Exception as failure:
            log.error("the answer's text could not be made: %r", failure, exc_info=failure)
            error = InternalError("the answer could not be completed")
            self._is_read = True
            if self.fail(error):
                self._on_cancel()
            return Failed(error)
        if text or logprobs:
            self._shown.append(text)
            self._shown_logprobs += logprobs
            self._delta_due_at = self._clock() + self._delta_interval_s
            return Delta(text, logprobs)
        if end is None:
            return None
        self._is_read = True
        if isinstance(end, Done):
            text, logprobs = "".join(self._shown), tuple(self._shown_logprobs)
            return Done(replace(end.completion, text=text, logprobs=logprobs))
        return end
