"""Tool calls in an answer's text, in the form of Qwen and Hermes, found as the text comes: `ToolCallParser`.

    <tool_call>
    {"name": "search", "arguments": {"query": "a red bicycle"}}
    </tool_call>

Knows text only: what a call is good for is the client's business.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

OPENING, CLOSING = "<tool_call>", "</tool_call>"
_ARGUMENTS = '"arguments":'


@dataclass(frozen=True)
class CallStart:
    """The next call of the answer."""

    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of the last call's arguments: joined, they are the text of one JSON object."""

    text: str


Piece = str | CallStart | CallArguments


class ToolCallParser:
    """Cuts an answer into ordinary text and calls. `add` new text, at the end `flush`.

    A call is told once it is complete and its arguments are a JSON object. What only looks like one stays ordinary
    text, as the model wrote it: nothing is lost. With a grammar behind it (`is_certain`) nothing can go wrong any more
    once the arguments begin, so that they are told as they come.
    """

    def __init__(self, *, is_certain: bool = False) -> None:
        self.num_calls = 0
        self._is_certain = is_certain
        self._held = ""  # not yet told
        self._gap = ""  # white space before the call that is being read: part of the form, unless it is no call
        self._state: Literal["text", "call", "arguments", "closing"] = "text"
        self._scanner = _ObjectScanner()  # of the object that is being read
        self._num_scanned = 0  # characters of `_held` that it has seen, in a call that is not certain

    def add(self, text: str) -> list[Piece]:
        self._held += text
        pieces: list[Piece] = []
        step = {"text": self._read_text, "call": self._read_call, "arguments": self._read_arguments,
                "closing": self._skip_closing}  # fmt: skip
        while step[self._state](pieces):
            pass
        return pieces

    def flush(self) -> list[Piece]:
        """The answer has ended: what is held back is told as text."""
        held, self._held = self._held, ""
        if self._state == "call":
            return [self._gap + OPENING + held]
        if self._state != "text" or not held or (self.num_calls and held.isspace()):
            return []
        return [held]

    # Each of these takes what it can of `_held`, and tells whether the state has changed, so that there may be more.

    def _read_text(self, pieces: list[Piece]) -> bool:
        before, found, after = self._held.partition(OPENING)
        if not found:
            # Half a tag may become a whole one, and white space may stand before a call.
            half = max((size for size in range(1, len(OPENING)) if before.endswith(OPENING[:size])), default=0)
            before = before[: len(before) - half]
        text = before.rstrip()
        if text:
            pieces.append(text)
        if found:
            self._gap, self._held, self._state = before[len(text) :], after, "call"
            self._scanner, self._num_scanned = _ObjectScanner(), 0
            return True
        self._held = self._held[len(text) :]
        return False

    def _read_call(self, pieces: list[Piece]) -> bool:
        if self._is_certain:
            head, found, after = self._held.partition(_ARGUMENTS)
            if not found:
                return False
            name = json.loads(head.strip().rstrip(",") + "}")["name"]
            pieces.append(CallStart(name))
            self.num_calls += 1
            self._held, self._state = after.lstrip(), "arguments"
            return True
        # Arguments may hold the tag as text: what ends the call comes after its object.
        if not self._is_past_object():
            return False
        end = self._held.find(CLOSING, self._num_scanned)
        if end < 0:
            return False
        inside, self._held, self._state = self._held[:end], self._held[end + len(CLOSING) :], "text"
        call = _read_call(inside)
        if call is None:
            pieces.append(self._gap + OPENING + inside + CLOSING)
        else:
            pieces += [CallStart(call[0]), CallArguments(call[1])]
            self.num_calls += 1
        return True

    def _is_past_object(self) -> bool:
        """Whether the call's object has ended, at `_num_scanned`, or what is there begins with none. Each character is
        looked at once, however many parts they come in."""
        if self._scanner.has_ended or not self._held.lstrip().startswith("{"):
            return True
        found = self._scanner.find_end(self._held[self._num_scanned :])
        self._num_scanned = len(self._held) if found is None else self._num_scanned + found
        return found is not None

    def _read_arguments(self, pieces: list[Piece]) -> bool:
        self._held = self._held if self._scanner.has_begun else self._held.lstrip()
        end = self._scanner.find_end(self._held)
        told = self._held[:end]
        self._held = "" if end is None else self._held[end:]
        if told:
            pieces.append(CallArguments(told))
        if end is None:
            return False
        self._scanner, self._state = _ObjectScanner(), "closing"
        return True

    def _skip_closing(self, pieces: list[Piece]) -> bool:
        """The call's own brace and the tag."""
        _, found, after = self._held.partition(CLOSING)
        if not found:
            return False
        self._held, self._state = after, "text"
        return True


def _read_call(text: str) -> tuple[str, str] | None:
    """(name, arguments as JSON text as the model wrote it); None: no call."""
    try:
        call: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict):
        return None
    return call["name"], json.dumps(arguments, ensure_ascii=False)


class _ObjectScanner:
    """Finds the end of a JSON object that comes in parts and is known to be valid."""

    def __init__(self) -> None:
        self._depth = 0
        self.has_ended = False
        self._is_string = self._is_escaped = False

    @property
    def has_begun(self) -> bool:
        return self._depth > 0

    def find_end(self, text: str) -> int | None:
        """Index after the object's closing brace in this part."""
        for index, char in enumerate(text):
            if self._is_string:
                if self._is_escaped:
                    self._is_escaped = False
                elif char == "\\":
                    self._is_escaped = True
                elif char == '"':
                    self._is_string = False
            elif char == '"':
                self._is_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.has_ended = True
                    return index + 1
        return None
