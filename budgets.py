"""How many tokens each key has used today, in UTC: in Redis where the rate limits live there, else in a small file.

Counts only; what a key may use stands in `keys.py`, and who is refused is decided in `access.py`. Keys are known here
by their ids.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Protocol, cast

from limits.storage import Storage, storage_from_string
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from config import Settings
from keys import keys_path, write_atomically

log = logging.getLogger("avito.keys")

_REDIS_TIMEOUT_S = 1
# A Redis that did not answer is left alone for a while, so that not every request waits for it.
_RETRY_AFTER_S = 5.0
# Counts of a day outlive it a little, for clocks that differ.
_KEEP_S = 2 * 24 * 3600


class Usage(Protocol):
    """Tokens used today, by key. Any thread; nothing here fails a request."""

    def used(self, key_id: str) -> int: ...

    def add(self, key_id: str, tokens: int) -> None: ...

    def flush(self) -> None:
        """Put away what is not put away yet. At a stop."""


def open_usage(settings: Settings, clock: Callable[[], float], now: Callable[[], float]) -> Usage:
    """The place for these settings.

    :param clock: monotonic seconds. :param now: Unix seconds.
    """
    uri = settings.rate_limit_storage_uri
    if uri.startswith("memory://"):
        path = keys_path(settings)
        return FileUsage(path.with_name(f"{path.name}.usage"), settings.limits.usage_write_interval_s, clock, now)
    return SharedUsage(cast(Storage, storage_from_string(uri, **storage_options(uri))), clock, now)


def storage_options(uri: str) -> dict[str, int]:
    """A Redis that accepts and never answers must not hold requests up."""
    if uri.startswith("memory://"):
        return {}
    return {"socket_timeout": _REDIS_TIMEOUT_S, "socket_connect_timeout": _REDIS_TIMEOUT_S}


def seconds_to_midnight(now: float) -> int:
    """Until the next day of UTC begins, at least 1. :param now: Unix seconds."""
    moment = datetime.fromtimestamp(now, UTC)
    midnight = moment.replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)
    return max(1, round((midnight - moment).total_seconds()))


def _day(now: float) -> str:
    return datetime.fromtimestamp(now, UTC).date().isoformat()


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    day: str
    tokens: dict[str, Annotated[int, Field(ge=0)]]


class FileUsage:
    """Counts in memory, written to a file of one day at most once in `interval_s` and at `flush`.

    No thread of its own: whoever asks or adds writes, if it is time. What was added since the last writing is lost if
    the process is killed. A file that cannot be read counts as none, and one that cannot be written is tried again:
    both are told in the log.
    """

    def __init__(self, path: Path, interval_s: float, clock: Callable[[], float], now: Callable[[], float]) -> None:
        self._path = path
        self._interval_s = interval_s
        self._clock = clock
        self._now = now
        self._lock = threading.Lock()
        self._write_lock = threading.Lock()
        self._written_at = clock() - interval_s
        self._is_dirty = False
        self._can_write = True
        self._day = _day(now())
        self._tokens = self._read()

    def used(self, key_id: str) -> int:
        self._write_if_due()
        with self._lock:
            self._turn_the_page()
            return self._tokens[key_id]

    def add(self, key_id: str, tokens: int) -> None:
        with self._lock:
            self._turn_the_page()
            self._tokens[key_id] += tokens
            self._is_dirty = True
        self._write_if_due()

    def flush(self) -> None:
        with self._write_lock:
            self._write(0.0)

    def _turn_the_page(self) -> None:
        today = _day(self._now())
        if today != self._day:
            self._day, self._tokens = today, Counter()

    def _read(self) -> Counter[str]:
        try:
            file = _File.model_validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return Counter()
        except (OSError, ValidationError) as error:
            log.error("the tokens that keys used today cannot be read, so they count from 0: %s", _reason(error))
            return Counter()
        return Counter(file.tokens) if file.day == self._day else Counter()

    def _write_if_due(self) -> None:
        # Whoever comes while another one writes does not wait for the disk.
        if self._write_lock.acquire(blocking=False):
            try:
                self._write(self._interval_s)
            finally:
                self._write_lock.release()

    def _write(self, interval_s: float) -> None:
        with self._lock:
            if not self._is_dirty or self._clock() - self._written_at < interval_s:
                return
            self._written_at, self._is_dirty = self._clock(), False
            text = _File(day=self._day, tokens=dict(self._tokens)).model_dump_json() + "\n"
        try:
            write_atomically(self._path, text, is_durable=False)
            self._can_write = True
        except OSError as error:
            with self._lock:
                self._is_dirty = True
            if self._can_write:
                log.error("the tokens that keys used today cannot be written: %s", _reason(error))
            self._can_write = False


def _reason(error: Exception) -> str:
    return (error.strerror or "") if isinstance(error, OSError) else "it is not a file of ours"


class SharedUsage:
    """Counts in the storage of the rate limits, so that all processes that share it share the budgets.

    While it does not answer, what it said last and what was added here since count, and are told to it later; what is
    still to be told at the end of the process is lost.
    """

    def __init__(self, storage: Storage, clock: Callable[[], float], now: Callable[[], float]) -> None:
        self._storage = storage
        self._clock = clock
        self._now = now
        self._lock = threading.Lock()
        self._pending: Counter[str] = Counter()
        self._known: dict[str, int] = {}
        self._retry_at = clock()

    def used(self, key_id: str) -> int:
        name = self._name(key_id)
        count = self._ask(lambda: self._storage.get(name))
        with self._lock:
            if count is not None:
                self._known[name] = count
            return self._known.get(name, 0) + self._pending[name]

    def add(self, key_id: str, tokens: int) -> None:
        with self._lock:
            self._pending[self._name(key_id)] += tokens
        self.flush()

    def flush(self) -> None:
        with self._lock:
            self._forget_other_days()
            names = [name for name, tokens in self._pending.items() if tokens]
        for name in names:
            self._tell(name)

    def _tell(self, name: str) -> None:
        # Taken out first: two threads must not both tell the same tokens.
        with self._lock:
            tokens = self._pending.pop(name, 0)
        if not tokens:
            return
        count = self._ask(lambda: self._storage.incr(name, _KEEP_S, tokens))
        with self._lock:
            if count is None:
                self._pending[name] += tokens
            else:
                self._known[name] = count

    def _ask(self, question: Callable[[], int]) -> int | None:
        """None if the storage does not answer, or did not a moment ago."""
        if self._clock() < self._retry_at:
            return None
        try:
            return question()
        except Exception as error:  # each storage has errors of its own
            self._retry_at = self._clock() + _RETRY_AFTER_S
            log.warning("the storage of token budgets does not answer: %r", error)
            return None

    def _forget_other_days(self) -> None:
        today = self._name("")
        for counts in (self._pending, self._known):
            for name in [name for name in counts if not name.startswith(today)]:
                del counts[name]

    def _name(self, key_id: str) -> str:
        return f"avito-tokens/{_day(self._now())}/{key_id}"
