"""Text from ids: whole characters and stop strings at every possible boundary; deltas at their pace; one end each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import InternalError
from models.schemas import Completion, Timing
from models.streaming import (
    AnswerText,
    Channel,
    Delta,
    Detokenizer,
    Done,
    Event,
    Failed,
    LazyText,
    StopStrings,
    WatchedText,
)
from tests.fakes import GENEROUS_S, Clock

DONE = Completion("avibe", "", 1, 2, "stop", False, Timing(0, 0, 0, 1, 1))
HOUR_S = 3600.0


def decode(ids: Sequence[int]) -> str:
    return bytes(ids).decode(errors="replace")


def parts_of(draw: st.DrawFn, whole: Any) -> list[Any]:
    """`whole`, cut at arbitrary places."""
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(whole) - 1)), max_size=12)))
    return [whole[i:j] for i, j in zip([0, *cuts], [*cuts, len(whole)], strict=True)]


@given(st.text(max_size=40))
def test_any_text_comes_out_whole_one_byte_at_a_time(text: str) -> None:
    detokenizer = Detokenizer(decode)
    parts = [detokenizer.add([byte]) for byte in text.encode()]
    assert "".join(parts) + detokenizer.flush() == text
    assert "\ufffd" in text or not any("\ufffd" in part for part in parts)


@given(st.one_of(st.binary(max_size=60), st.text(max_size=30).map(str.encode)), st.data())
def test_any_bytes_come_out_as_if_decoded_at_once_however_they_are_split(data: bytes, draws: st.DataObject) -> None:
    """Broken bytes too: who streams an answer reads the same as who waits for it."""
    detokenizer = Detokenizer(decode)
    *parts, last = draws.draw(st.composite(parts_of)(data))
    shown = [detokenizer.add(list(part)) for part in parts]
    assert "".join(shown) + detokenizer.flush(list(last)) == decode(data)


def test_every_split_of_a_text_in_two_shows_whole_characters_only() -> None:
    data = "aя漢🎉é\u0301b".encode()
    for cut in range(len(data) + 1):
        detokenizer = Detokenizer(decode)
        shown = [detokenizer.add(list(part)) for part in (data[:cut], data[cut:])]
        assert shown[0] == data[:cut].decode(errors="ignore")
        assert "".join(shown) == data.decode()


def test_half_a_character_waits_and_shows_at_the_end_only() -> None:
    detokenizer = Detokenizer(decode)
    assert [detokenizer.add([byte]) for byte in "я🎉".encode()[:5]] == ["", "я", "", "", ""]
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_each_step_decodes_a_short_window_however_long_the_text() -> None:
    windows: list[int] = []
    detokenizer = Detokenizer(lambda ids: windows.append(len(ids)) or decode(ids))  # type: ignore[func-returns-value]
    for byte in b"abc" * 1000:
        detokenizer.add([byte])
    assert max(windows) <= 2


def test_bytes_that_never_become_a_character_stay_cheap_and_are_shown() -> None:
    windows: list[int] = []
    detokenizer = Detokenizer(lambda ids: windows.append(len(ids)) or decode(ids))  # type: ignore[func-returns-value]
    shown = "".join(detokenizer.add([0xFF]) for _ in range(2000)) + detokenizer.flush()
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


def make_channel(
    stops: Sequence[str] = (),
    *,
    delta_interval_s: float = 0.0,
    clock: Callable[[], float] | None = None,
    text: AnswerText | None = None,
    on_cancel: Callable[[], None] = lambda: None,
) -> Channel:
    text = text or (WatchedText(decode, stops) if stops else LazyText(decode))
    return Channel(on_cancel, text, delta_interval_s=delta_interval_s, clock=clock or Clock())


def put(channel: Channel, text: str | bytes) -> bool:
    """As the engine does, which stops at a stop string."""
    return any(channel.put(byte) for byte in (text.encode() if isinstance(text, str) else text))


def finish(channel: Channel) -> None:
    channel.end_text()
    channel.finish(DONE)


def done(text: str) -> Done:
    return Done(Completion("avibe", text, 1, 2, "stop", False, DONE.timing))


def events(channel: Channel) -> list[Event]:
    """What can be read now."""
    found = []
    while (event := channel.get(0)) is not None:
        found.append(event)
    return found


# A stop string that never comes puts the text through the engine's thread.
both_ways = pytest.mark.parametrize("stops", [(), ("never" * 20,)], ids=["reader's thread", "engine's thread"])


@both_ways
def test_deltas_carry_all_text_since_the_last_one_then_one_end(stops: Sequence[str]) -> None:
    channel = make_channel(stops)
    put(channel, "ab")
    assert channel.get(0) == Delta("ab")
    assert channel.get(0) is None
    put(channel, "c")
    finish(channel)
    assert events(channel) == [Delta("c"), done("abc")]
    assert channel.get(0) is None and channel.wait_end(0) is None


@both_ways
@given(data=st.one_of(st.binary(max_size=40), st.text(max_size=20).map(str.encode)), draws=st.data())
def test_deltas_joined_are_the_text_of_the_end_wherever_the_reader_looks_in(
    stops: Sequence[str], data: bytes, draws: st.DataObject
) -> None:
    channel, whole = make_channel(stops), make_channel(stops)
    shown: list[Event] = []
    for part in draws.draw(st.composite(parts_of)(data)):
        put(channel, part)
        shown += events(channel)
        put(whole, part)
    finish(channel)
    *deltas, end = shown + events(channel)
    finish(whole)
    assert end == done(decode(data)) == whole.wait_end(0)
    assert "".join(delta.text for delta in deltas if isinstance(delta, Delta)) == decode(data)
    assert all(isinstance(delta, Delta) and delta.text for delta in deltas)


@given(st.text("abя", max_size=12), st.lists(st.text("abя", min_size=1, max_size=3), min_size=1, max_size=3), st.data())
def test_stop_strings_cut_the_same_text_wherever_the_reader_looks_in(
    text: str, stops: list[str], draws: st.DataObject
) -> None:
    channel, whole = make_channel(stops), make_channel(stops)
    shown: list[Event] = []
    is_stopped = False
    for part in draws.draw(st.composite(parts_of)(text)):
        is_stopped = is_stopped or put(channel, part)
        shown += events(channel)
    finish(channel)
    assert put(whole, text) == is_stopped == any(stop in text for stop in stops)
    finish(whole)
    *deltas, end = shown + events(channel)
    assert end == whole.wait_end(0) == done(through(stops, list(text))[0])
    assert "".join(delta.text for delta in deltas if isinstance(delta, Delta)) == through(stops, list(text))[0]


@both_ways
def test_unfinished_character_shows_at_the_end(stops: Sequence[str]) -> None:
    channel = make_channel(stops)
    put(channel, "я🎉".encode()[:4])
    assert events(channel) == [Delta("я")]
    finish(channel)
    assert events(channel) == [Delta("\ufffd"), done("я\ufffd")]


def test_held_back_text_comes_before_the_end() -> None:
    channel = make_channel(["STOP"])
    put(channel, "one STO")
    assert events(channel) == [Delta("one ")]
    finish(channel)
    assert events(channel) == [Delta("STO"), done("one STO")]


@both_ways
def test_whole_answer_is_read_without_its_deltas(stops: Sequence[str]) -> None:
    channel = make_channel(stops, delta_interval_s=HOUR_S)
    put(channel, "привет")
    assert channel.wait_end(0) is None
    finish(channel)
    assert channel.wait_end(0) == done("привет")
    assert channel.get(0) is None


def test_whole_answer_is_decoded_at_once() -> None:
    windows: list[int] = []
    text = LazyText(lambda ids: windows.append(len(ids)) or decode(ids))  # type: ignore[func-returns-value]
    channel = make_channel(text=text)
    put(channel, "x" * 1000)
    assert windows == [], "the engine's thread decodes nothing"
    finish(channel)
    assert channel.wait_end(0) == done("x" * 1000)
    assert sum(windows) <= 2000


# Pace.


@both_ways
def test_first_delta_comes_at_once_and_the_next_after_the_interval(stops: Sequence[str]) -> None:
    clock = Clock()
    channel = make_channel(stops, delta_interval_s=0.03, clock=clock)
    assert channel.get(0) is None
    put(channel, "a")
    assert channel.get(0) == Delta("a")
    put(channel, "b")
    clock.now += 0.029
    assert channel.get(0) is None
    put(channel, "c")
    clock.now += 0.002
    assert channel.get(0) == Delta("bc")
    assert channel.get(0) is None
    put(channel, "d")
    assert channel.get(0) is None


def test_interval_counts_from_a_delta_and_not_from_half_a_character() -> None:
    clock = Clock()
    channel = make_channel(delta_interval_s=HOUR_S, clock=clock)
    first, second = "я".encode()
    channel.put(first)
    assert channel.get(0) is None
    channel.put(second)
    assert channel.get(0) == Delta("я")


@both_ways
def test_end_is_never_held_back(stops: Sequence[str]) -> None:
    channel = make_channel(stops, delta_interval_s=HOUR_S)
    put(channel, "a")
    assert channel.get(0) == Delta("a")
    put(channel, "bc")
    assert channel.get(0) is None
    finish(channel)
    assert events(channel) == [Delta("bc"), done("abc")]


@both_ways
def test_failure_is_never_held_back_and_comes_after_the_text(stops: Sequence[str]) -> None:
    channel = make_channel(stops, delta_interval_s=HOUR_S)
    put(channel, "a")
    assert channel.get(0) == Delta("a")
    put(channel, "bc")
    error = InternalError("x")
    channel.fail(error)
    assert events(channel) == [Delta("bc"), Failed(error)]


# Threads.


@both_ways
def test_reader_that_waits_for_text_wakes_for_it(stops: Sequence[str]) -> None:
    channel = make_channel(stops)
    threading.Timer(0.01, put, (channel, "🎉")).start()
    assert channel.get(GENEROUS_S) == Delta("🎉")


@both_ways
def test_reader_that_keeps_its_pace_wakes_for_the_end(stops: Sequence[str]) -> None:
    channel = make_channel(stops, delta_interval_s=HOUR_S)
    put(channel, "a")
    assert channel.get(0) == Delta("a")
    put(channel, "b")
    threading.Timer(0.01, finish, (channel,)).start()
    assert channel.get(GENEROUS_S) == Delta("b")
    assert channel.get(GENEROUS_S) == done("ab")


def test_reader_of_the_whole_answer_wakes_when_the_end_comes_from_another_thread() -> None:
    channel = make_channel()
    threading.Timer(0.01, finish, (channel,)).start()
    assert channel.wait_end(GENEROUS_S) == done("")


@both_ways
def test_no_text_is_lost_or_doubled_between_fast_threads(stops: Sequence[str]) -> None:
    text = "ёжик 漢字 🎉 " * 500
    channel = make_channel(stops)

    def write() -> None:
        put(channel, text)
        finish(channel)

    writer = threading.Thread(target=write)
    writer.start()
    found = [channel.get(GENEROUS_S)]
    while isinstance(found[-1], Delta):
        found.append(channel.get(GENEROUS_S))
    writer.join(GENEROUS_S)
    *deltas, end = found
    assert end == done(text)
    assert "".join(delta.text for delta in deltas if isinstance(delta, Delta)) == text


def test_writer_wakes_nobody_but_a_reader_that_waits_for_text() -> None:
    """What the engine's thread does for each token of a paced or whole answer: no lock is touched."""
    channel = make_channel(delta_interval_s=HOUR_S)
    put(channel, "a")
    assert channel.get(0) == Delta("a")
    with channel._news:  # whoever needed it now would wait for ever: it is no other thread's
        writer = threading.Thread(target=put, args=(channel, "bcd"), daemon=True)
        writer.start()
        writer.join(GENEROUS_S)
        assert not writer.is_alive()


# Faults and ends.


def broken(ids: Sequence[int]) -> str:
    if len(ids) > 2:
        raise ValueError("no such id")
    return decode(ids)


@pytest.mark.parametrize("is_whole", [False, True], ids=["deltas", "whole answer"])
def test_error_in_making_the_text_reaches_the_reader_and_ends_the_work(is_whole: bool) -> None:
    calls: list[int] = []
    channel = make_channel(text=LazyText(broken), on_cancel=lambda: calls.append(1))
    put(channel, "abc")
    if is_whole:
        finish(channel)
    end = channel.wait_end(0) if is_whole else channel.get(0)
    assert isinstance(end, Failed) and isinstance(end.error, InternalError)
    assert channel.is_ended and calls == ([] if is_whole else [1])
    assert channel.get(0) is None


def test_only_the_first_end_counts() -> None:
    channel = make_channel()
    error = InternalError("x")
    assert channel.fail(error)
    assert not channel.finish(DONE)
    put(channel, "late")
    assert events(channel) == [Failed(error)]
    assert channel.generated_tokens == 4, "they were generated all the same"


def test_tokens_are_counted_though_nobody_reads() -> None:
    channel = make_channel()
    put(channel, "я")
    assert channel.generated_tokens == 2


def test_cancel_after_the_end_does_nothing() -> None:
    calls: list[int] = []
    channel = make_channel(on_cancel=lambda: calls.append(1))
    channel.cancel()
    channel.finish(DONE)
    channel.cancel()
    assert calls == [1]
