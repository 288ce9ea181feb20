"""Tokens used today: in a file beside the keys, and in Redis."""

from __future__ import annotations

import json
import logging
import stat
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from limits.storage import MemoryStorage

from budgets import FileUsage, SharedUsage, seconds_to_midnight
from tests.fakes import GENEROUS_S, Clock

EVENING = datetime(2026, 11, 24, 23, 59, 50, tzinfo=UTC).timestamp()
INTERVAL_S = 5.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json.usage"


def written(path: Path) -> Any:
    return json.loads(path.read_text())


def test_counts_survive_a_restart(path: Path) -> None:
    first = FileUsage(path, INTERVAL_S, Clock(), Clock(EVENING))
    first.add("a", 3)
    first.add("a", 4)
    first.add("b", 1)
    first.flush()
    second = FileUsage(path, INTERVAL_S, Clock(), Clock(EVENING))
    assert [second.used(key) for key in ("a", "b", "c")] == [7, 1, 0]
    assert written(path) == {"day": "2026-11-24", "tokens": {"a": 7, "b": 1}}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_file_is_written_at_most_every_few_seconds_by_whoever_comes(path: Path) -> None:
    clock = Clock()
    usage = FileUsage(path, INTERVAL_S, clock, Clock(EVENING))
    usage.add("a", 1)
    assert written(path)["tokens"] == {"a": 1}, "at first at once"
    usage.add("a", 1)
    clock.now += INTERVAL_S - 0.01
    assert usage.used("a") == 2 and written(path)["tokens"] == {"a": 1}
    clock.now += 0.01
    assert usage.used("a") == 2 and written(path)["tokens"] == {"a": 2}, "a question is enough"
    inode = path.stat().st_ino
    clock.now += INTERVAL_S
    usage.used("a")
    assert path.stat().st_ino == inode, "nothing new, nothing written"


def test_midnight_begins_a_new_day(path: Path) -> None:
    now = Clock(EVENING)
    usage = FileUsage(path, INTERVAL_S, Clock(), now)
    usage.add("a", 7)
    now.now += 10
    assert usage.used("a") == 0
    usage.add("a", 2)
    usage.flush()
    assert written(path) == {"day": "2026-11-25", "tokens": {"a": 2}}
    now.now += 24 * 3600
    assert FileUsage(path, INTERVAL_S, Clock(), now).used("a") == 0, "a file of another day counts nothing"


@pytest.mark.parametrize("text", ["", "[]", '{"day": "2026-11-24", "tokens": {"a": -1}}', '{"day": 1, "tokens": {}}'])
def test_a_file_that_cannot_be_read_counts_from_0_and_is_told(
    path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    path.write_text(text)
    usage = FileUsage(path, INTERVAL_S, Clock(), Clock(EVENING))
    assert usage.used("a") == 0
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    usage.add("a", 1)
    assert written(path)["tokens"] == {"a": 1}


def test_a_file_that_cannot_be_written_is_told_once_and_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    path = tmp_path / "later" / "usage"
    usage = FileUsage(path, INTERVAL_S, clock, Clock(EVENING))
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            usage.add("a", 1)
            clock.now += INTERVAL_S
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    path.parent.mkdir()
    assert usage.used("a") == 3 and written(path)["tokens"] == {"a": 3}


def test_no_token_is_lost_between_threads(path: Path) -> None:
    clock = Clock()
    usage = FileUsage(path, 0.0, clock, Clock(EVENING))

    def add() -> None:
        for _ in range(50):
            usage.add("a", 1)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(GENEROUS_S)
    usage.flush()
    assert written(path)["tokens"] == {"a": 200}


@pytest.mark.parametrize(("before_s", "expected"), [(10, 10), (0.2, 1), (0, 24 * 3600), (24 * 3600, 24 * 3600)])
def test_seconds_to_midnight_are_whole_and_at_least_one(before_s: float, expected: int) -> None:
    assert seconds_to_midnight(EVENING + 10 - before_s) == expected


class Flaky(MemoryStorage):
    """A storage that does not answer while `is_away`."""

    is_away = False
    num_asked = 0

    def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        self._ask()
        return super().incr(key, expiry, amount)

    def get(self, key: str) -> int:
        self._ask()
        return super().get(key)

    def _ask(self) -> None:
        self.num_asked += 1
        if self.is_away:
            raise ConnectionError


def test_counts_are_shared_through_the_storage() -> None:
    storage = Flaky()
    first, second = (SharedUsage(storage, Clock(), Clock(EVENING)) for _ in range(2))
    first.add("a", 3)
    second.add("a", 4)
    assert first.used("a") == second.used("a") == 7


def test_what_is_used_while_the_storage_is_away_counts_and_is_told_later(caplog: pytest.LogCaptureFixture) -> None:
    storage, clock = Flaky(), Clock()
    usage, other = SharedUsage(storage, clock, Clock(EVENING)), SharedUsage(storage, Clock(), Clock(EVENING))
    usage.add("a", 3)
    storage.is_away = True
    usage.add("a", 4)
    asked = storage.num_asked
    assert usage.used("a") == 7 and storage.num_asked == asked, "it is left alone for a while"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    storage.is_away = False
    clock.now += 10
    usage.add("a", 1)
    assert usage.used("a") == other.used("a") == 8


def test_shared_counts_are_of_one_day() -> None:
    storage, now = Flaky(), Clock(EVENING)
    usage = SharedUsage(storage, Clock(), now)
    storage.is_away = True
    usage.add("a", 3)
    now.now += 10
    assert usage.used("a") == 0
    storage.is_away = False
    usage.flush()
    assert usage.used("a") == 0, "yesterday's are not told to today"
