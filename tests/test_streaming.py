"""Text from ids: whole characters and stop strings at every possible boundary; channels end exactly once."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import InternalError
from models.schemas import Completion, Timing
from models.streaming import Channel, Delta, Detokenizer, Done, Failed, StopStrings
from tests.fakes import GENEROUS_S

DONE = Completion("avibe", "ab", 1, 2, "stop", False, Timing(0, 0, 0, 1, 1))


def decode(ids: Sequence[int]) -> str:
    return bytes(ids).decode(errors="replace")


@given(st.text(max_size=40))
def test_any_text_comes_out_whole_one_byte_at_a_time(text: str) -> None:
    detokenizer = Detokenizer(decode)
    parts = [detokenizer.add(byte) for byte in text.encode()]
    assert "".join(parts) + detokenizer.flush() == text
    assert "\ufffd" in text or not any("\ufffd" in part for part in parts)


def test_half_a_character_waits_and_shows_at_the_end_only() -> None:
    detokenizer = Detokenizer(decode)
    assert [detokenizer.add(byte) for byte in "я🎉".encode()[:5]] == ["", "я", "", "", ""]
    assert detokenizer.flush() == "\ufffd"


def test_each_step_decodes_a_short_window_however_long_the_text() -> None:
    windows: list[int] = []
    detokenizer = Detokenizer(lambda ids: windows.append(len(ids)) or decode(ids))  # type: ignore[func-returns-value]
    for byte in b"abc" * 1000:
        detokenizer.add(byte)
    assert max(windows) <= 2


def test_bytes_that_never_become_a_character_stay_cheap_and_are_shown() -> None:
    windows: list[int] = []
    detokenizer = Detokenizer(lambda ids: windows.append(len(ids)) or decode(ids))  # type: ignore[func-returns-value]
    shown = "".join(detokenizer.add(0xFF) for _ in range(2000)) + detokenizer.flush()
    assert shown == "\ufffd" * 2000
    assert max(windows) <= 40


def through(stops: Sequence[str], parts: Sequence[str]) -> tuple[str, bool]:
    stopper, shown = StopStrings(stops), []
    for part in parts:
        text, is_stopped = stopper.add(part)
        shown.append(text)
        if is_stopped:
            return "".join(shown), True
    return "".join(shown) + stopper.flush(), False


@pytest.mark.parametrize("cut", range(12))
def test_stop_string_is_found_across_any_split(cut: int) -> None:
    text = "hello STOP world"
    assert through(["STOP"], [text[:cut], text[cut:]]) == ("hello ", True)
    assert through(["STOP"], list(text)) == ("hello ", True)


@given(st.text("abc", max_size=20), st.lists(st.text("abc", min_size=1, max_size=4), max_size=4), st.data())
def test_result_never_depends_on_how_the_text_is_split(text: str, stops: list[str], data: st.DataObject) -> None:
    """One character at a time is the engine's way; the first stop string to be complete ends it."""
    parts, rest = [], text
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        parts.append(rest[:size])
        rest = rest[size:]
    shown, is_stopped = through(stops, parts)
    assert is_stopped == any(stop in text for stop in stops)
    assert text.startswith(shown)
    assert not any(stop in shown for stop in stops)
    if not is_stopped:
        assert shown == text


def test_nothing_is_shown_after_a_stop_string() -> None:
    stopper = StopStrings(["x"])
    assert stopper.add("axb") == ("a", True)
    assert stopper.add("more") == ("", True)
    assert stopper.flush() == ""


def test_what_could_become_a_stop_string_is_held_back() -> None:
    stopper = StopStrings(["END"])
    assert stopper.add("theEN") == ("the", False)
    assert stopper.add("Z") == ("ENZ", False)


def make_channel() -> Channel:
    return Channel(lambda: None)


def test_deltas_carry_all_text_since_the_last_one_then_one_end() -> None:
    channel = make_channel()
    channel.put("a")
    channel.put("b")
    assert channel.get(0) == Delta("ab")
    assert channel.get(0) is None
    channel.put("c")
    channel.finish(DONE)
    assert channel.get(0) == Delta("c")
    assert channel.get(0) == Done(DONE)
    assert channel.get(0) is None


def test_only_the_first_end_counts() -> None:
    channel = make_channel()
    error = InternalError("x")
    assert channel.fail(error)
    assert not channel.finish(DONE)
    channel.put("late")
    end = channel.get(0)
    assert isinstance(end, Failed) and end.error is error
    assert channel.get(0) is None


def test_reader_wakes_when_the_end_comes_from_another_thread() -> None:
    channel = make_channel()
    threading.Timer(0.01, channel.finish, (DONE,)).start()
    assert channel.wait_end(GENEROUS_S) == Done(DONE)


def test_cancel_after_the_end_does_nothing() -> None:
    calls: list[int] = []
    channel = Channel(lambda: calls.append(1))
    channel.cancel()
    channel.finish(DONE)
    channel.cancel()
    assert calls == [1]
