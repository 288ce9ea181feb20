"""Bodies of `/v1` that are small to send and would be dear to take: refused early, by their numbers."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest

from config import Limits
from models.errors import InvalidRequest
from models.openai_parsing import OpenAIParser

LIMITS = Limits()
PARSER = OpenAIParser(LIMITS)
# Enough to tell an object for each from none.
MANY = 50_000
CALL = {"function": {"name": "f", "arguments": "{}"}}


def chat_body(**fields: Any) -> dict[str, Any]:
    return {"model": "avibe", "messages": [{"role": "user", "content": "a"}], **fields}


def user(content: Any) -> dict[str, Any]:
    return chat_body(messages=[{"role": "user", "content": content}])


def calling(*calls: Any) -> dict[str, Any]:
    return chat_body(messages=[{"role": "assistant", "tool_calls": list(calls)}])


def refusal(body: dict[str, Any] | str) -> InvalidRequest:
    text = body if isinstance(body, str) else json.dumps(body)
    with pytest.raises(InvalidRequest) as caught:
        (PARSER.parse_completion if '"prompt"' in text else PARSER.parse_chat)(text.encode())
    return caught.value


UNKNOWN = {str(index): 1 for index in range(MANY)}
CROWDED: dict[str, tuple[dict[str, Any], str]] = {
    "parts": (user([{}] * MANY), "messages"),
    "good parts": (user([{"type": "text", "text": ""}] * MANY), "messages"),
    "parts of several": (chat_body(messages=[{"role": "user", "content": [{}] * 100}] * 1000), "messages"),
    "calls": (calling(*[CALL] * MANY), "messages"),
    "messages": (chat_body(messages=[{}] * MANY), "messages"),
    "unknown fields": (chat_body(messages=[{"role": "user", "content": "a", **UNKNOWN}]), "messages[0].0"),
    "metadata": (chat_body(metadata=UNKNOWN), "metadata"),
    "biases": (chat_body(logit_bias=dict.fromkeys(UNKNOWN, "x")), "logit_bias"),
    "variables": (chat_body(chat_template_kwargs=UNKNOWN), "chat_template_kwargs"),
    "tools": (chat_body(tools=[{}] * MANY), "tools"),
    "stops": (chat_body(stop=["a"] * MANY), "stop"),
    "stop ids": (chat_body(stop_token_ids=["a"] * MANY), "stop_token_ids"),
    "prompts": ({"model": "avibe", "prompt": ["a"] * MANY}, "prompt"),
}


@pytest.mark.parametrize("name", CROWDED)
def test_crowd_is_refused_without_an_object_for_each(name: str) -> None:
    """A million of them fit into a body. Each would be some hundred bytes, and as an error some thousand."""
    body, field = CROWDED[name]
    parsed = json.loads(json.dumps(body))
    text = json.dumps(body)
    tracemalloc.start()
    try:
        kept = json.loads(text)
        json_bytes = tracemalloc.get_traced_memory()[1]
        del kept
        tracemalloc.reset_peak()
        error = refusal(text)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert error.field == field and parsed == body
    assert peak_bytes < 2 * json_bytes + 100 * MANY


def test_number_of_parts_is_taken_at_the_limit_and_not_beyond() -> None:
    limit = LIMITS.max_message_parts
    PARSER.parse_chat(json.dumps(user([{"type": "text", "text": "a"}] * limit)).encode())
    error = refusal(user([{"type": "text", "text": "a"}] * (limit + 1)))
    assert f"at most {limit} parts and tool calls in all, got {limit + 1}" in error.message


def test_calls_count_for_the_length_of_a_chat() -> None:
    arguments = json.dumps({"a": "x" * LIMITS.max_prompt_chars})
    error = refusal(calling({"function": {"name": "f", "arguments": arguments}}))
    assert f"at most {LIMITS.max_prompt_chars} characters in all" in error.message


SURROGATE = {"a": "\ud800"}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"model": "avibe", "prompt": "\ud800"}, "prompt"),
        ({"model": "avibe", "prompt": ["a", "\ud800"]}, "prompt[1]"),
        (user("\ud800"), "messages[0].content"),
        (
            chat_body(messages=[{"role": "system", "content": [{"type": "text", "text": "\ud800"}]}]),
            "messages[0].content",
        ),
        (
            calling({"function": {"name": "f", "arguments": json.dumps(SURROGATE)}}),
            "messages[0].tool_calls[0].function.arguments",
        ),
        (chat_body(tools=[{"type": "function", "function": {"name": "f", "parameters": SURROGATE}}]), "tools[0]"),
        (
            chat_body(response_format={"type": "json_schema", "json_schema": {"name": "f", "schema": SURROGATE}}),
            "response_format.json_schema.schema",
        ),
    ],
)
def test_lone_surrogates_are_refused_wherever_they_are(body: dict[str, Any], field: str) -> None:
    """JSON can escape them, no tokenizer can encode them."""
    error = refusal(body)
    assert "without lone surrogates" in error.message and error.field == field


def test_numbers_beyond_all_bounds_are_refused_in_schemas_and_arguments() -> None:
    """1e999 is valid JSON, and what Python makes of it is not."""
    for body in (
        chat_body(tools=[{"type": "function", "function": {"name": "f", "parameters": {"maximum": "HUGE"}}}]),
        chat_body(response_format={"type": "json_schema", "json_schema": {"name": "f", "schema": {"const": "HUGE"}}}),
        calling({"function": {"name": "f", "arguments": '{"a": HUGE}'}}),
    ):
        assert "finite numbers" in refusal(json.dumps(body).replace('"HUGE"', "1e999").replace("HUGE", "1e999")).message
