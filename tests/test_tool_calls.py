"""Tool calls are found in text however it is cut, and what is none is lost nowhere."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.tool_calls import CLOSING, OPENING, CallArguments, CallStart, Piece, ToolCallParser


def written(name: str, arguments: Any) -> str:
    """As Qwen's chat template shows a call to the model."""
    return f'{OPENING}\n{{"name": "{name}", "arguments": {json.dumps(arguments, ensure_ascii=False)}}}\n{CLOSING}'


def parse(*parts: str, is_certain: bool = False) -> tuple[str, list[tuple[str, Any]]]:
    """(text, calls with decoded arguments)."""
    parser = ToolCallParser(is_certain=is_certain)
    pieces: list[Piece] = [piece for part in parts for piece in parser.add(part)] + parser.flush()
    text, calls = "", list[list[str]]()
    for piece in pieces:
        if isinstance(piece, CallStart):
            calls.append([piece.name, ""])
        elif isinstance(piece, CallArguments):
            calls[-1][1] += piece.text
        else:
            assert isinstance(piece, str) and piece, "no empty pieces"
            text += piece
    assert parser.num_calls == len(calls)
    return text, [(name, json.loads(arguments)) for name, arguments in calls]


ARGUMENTS = {"query": 'a "red" } bicycle { </tool_call>', "pages": [1, {"x": None}], "ё": "\\"}


def test_text_and_calls_are_told_apart() -> None:
    answer = f"Let me look.\n{written('search', ARGUMENTS)}\n{written('now', {})}"
    assert parse(answer) == ("Let me look.", [("search", ARGUMENTS), ("now", {})])


def test_text_without_a_call_stays_as_it_is() -> None:
    for text in ("", "plain", "a <tool", "a < b, <tool_calls>", "ends with spaces \n ", " \n", "x <tool_call"):
        assert parse(text) == (text, [])


@pytest.mark.parametrize(
    "inside",
    ["", "no json", '{"name": "f"', '{"name": 1, "arguments": {}}', '{"arguments": {}}', "[1]",
     '{"name": "f", "arguments": [1]}', '{"name": "f", "arguments": "{}"}'],
)  # fmt: skip
def test_what_only_looks_like_a_call_stays_text(inside: str) -> None:
    answer = f"a {OPENING}{inside}{CLOSING} b"
    assert parse(answer) == (answer, [])


def test_call_that_the_limit_of_tokens_cut_off_stays_text() -> None:
    half = written("search", ARGUMENTS)[:-5]
    assert parse(f"a {half}") == (f"a {half}", [])


def test_call_without_arguments_has_empty_ones() -> None:
    assert parse(f'{OPENING}{{"name": "f"}}{CLOSING}') == ("", [("f", {})])


@given(
    st.lists(
        st.one_of(
            st.sampled_from([OPENING, CLOSING, "<tool", "_call>", "\n", " ", "ё", "🎉", "{", '"']),
            st.builds(written, st.sampled_from(["f", "g_1"]), st.fixed_dictionaries({"a": st.text(max_size=5)})),
        ),
        max_size=6,
    ).map("".join),
    st.data(),
)
@settings(max_examples=300, deadline=None)
def test_however_the_text_is_cut_the_same_comes_out(answer: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(answer)), max_size=8)))
    parts = [answer[start:end] for start, end in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
    assert parse(*parts) == parse(answer)


def test_ordinary_call_is_told_only_when_it_is_complete() -> None:
    parser = ToolCallParser()
    answer = written("search", ARGUMENTS)
    assert parser.add(answer[:-1]) == []
    assert [type(piece) for piece in parser.add(answer[-1:])] == [CallStart, CallArguments]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_arguments_of_certain_calls_are_told_as_they_come(size: int) -> None:
    answer = f"{written('search', ARGUMENTS)}\n{written('now', {})}"
    parts = [answer[start : start + size] for start in range(0, len(answer), size)]
    assert parse(*parts, is_certain=True) == ("", [("search", ARGUMENTS), ("now", {})])
    parser = ToolCallParser(is_certain=True)
    begun = parser.add(answer[: answer.index("bicycle")])
    assert isinstance(begun[0], CallStart) and isinstance(begun[1], CallArguments)
    assert begun[1].text == '{"query": "a \\"red\\" } '


def test_certain_call_that_the_limit_cut_off_keeps_what_was_told() -> None:
    parser = ToolCallParser(is_certain=True)
    answer = written("search", ARGUMENTS)
    pieces = parser.add(answer[: answer.index("bicycle")]) + parser.flush()
    assert pieces[0] == CallStart("search") and all(isinstance(piece, CallArguments) for piece in pieces[1:])
