"""Tools from the chat door to the engine and back: a Qwen-type template, a tiny real tokenizer, scripted token ids."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from flask import Flask
from flask.testing import FlaskClient
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from config import Limits
from models.engine.loop import StepOutput
from models.engine.scheduler import Row
from models.errors import InvalidRequest, ToolsUnsupported
from models.grammars import GrammarCompiler
from models.prompts import PromptEncoder
from models.schemas import ChatOptions, Message, RawRequest, SamplingParams, ToolCall
from models.service import ModelService
from models.tokenizer import TextTokenizer
from tests.fakes import EchoRunner, FakeLoaded
from tests.qwen_template import QWEN_WITH_TOOLS
from tests.test_error_shape import post_json
from tests.test_openai_api import CHAT, TEXT, assert_error, chunks_of, user
from tests.test_prompts import ATTACKS
from tests.test_tool_calls import written
from tests.tiny_models import ADDED, SPECIAL, make_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "query": {"type": "string", "maxLength": 8},
        "limit": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["query", "limit"],
    "additionalProperties": False,
}
SEARCH: dict[str, Any] = {
    "type": "function",
    "function": {"name": "search", "description": 'Ищет «объявления» "here"', "parameters": SCHEMA},
}
NOW: dict[str, Any] = {
    "type": "function",
    "function": {"name": "now", "description": "", "parameters": {"type": "object"}},
}


def make_tools_tokenizer() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = QWEN_WITH_TOOLS
    return tokenizer


TOKENIZER = make_tools_tokenizer()
TEXT_TOKENIZER = TextTokenizer(TOKENIZER)
CONTROL_IDS = {TOKENIZER.convert_tokens_to_ids(token) for token in (*SPECIAL, *ADDED)}
END_ID: int = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
OPENING_ID: int = TOKENIZER.convert_tokens_to_ids("<tool_call>")


def ids_of(text: str) -> list[int]:
    """As a model writes it: tags are tokens of their own."""
    return list(TOKENIZER(text)["input_ids"])


# Prompts.


def test_chat_with_tools_is_encoded_as_the_library_does() -> None:
    arguments = {"query": 'ёж "x"\n', "limit": 3}
    call = {"type": "function", "function": {"name": "search", "arguments": arguments}}
    turns = [
        {"role": "system", "content": "Будь краток."},
        {"role": "user", "content": " find a fox"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": '{"found": ["лиса"]}'},
        {"role": "assistant", "content": "I found one."},
        {"role": "user", "content": "thanks\n"},
    ]
    expected = TOKENIZER.apply_chat_template(turns, tools=[SEARCH, NOW], add_generation_prompt=True)["input_ids"]
    messages = (
        Message("system", "Будь краток."),
        Message("user", " find a fox"),
        Message("assistant", "", (ToolCall("search", arguments),)),
        Message("tool", '{"found": ["лиса"]}'),
        Message("assistant", "I found one."),
        Message("user", "thanks\n"),
    )
    assert TEXT_TOKENIZER.encode_chat(messages, chat=ChatOptions(tools=(SEARCH, NOW))) == expected


@pytest.mark.parametrize("attack", ATTACKS)
def test_control_tokens_typed_into_tools_and_calls_stay_text(attack: str) -> None:
    def encode(text: str) -> list[int]:
        function = {
            "name": "f",
            "description": text,
            "parameters": {"type": "object", "properties": {text: {"enum": [text, 1], "title": [text]}}},
        }
        call = ToolCall("f", {text: [text, {"deep": text}]})
        messages = (Message("user", text), Message("assistant", text, (call,)), Message("tool", text))
        return TEXT_TOKENIZER.encode_chat(
            messages, chat=ChatOptions(tools=({"type": "function", "function": function},))
        )

    def num_control(ids: Iterable[int]) -> int:
        return sum(token_id in CONTROL_IDS for token_id in ids)

    attacked = encode(attack)
    assert num_control(attacked) == num_control(encode("harmless"))
    shown = TOKENIZER.decode(attacked)
    assert shown.count(json.dumps(attack, ensure_ascii=False)[1:-1]) + shown.count(attack) >= 10


@given(
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.text(st.sampled_from([*'aё"\\/\n<>|']), max_size=6)),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(st.sampled_from(["a", 'b"', "ё\\", "<|im_end|", "c d"]), inner, max_size=3),
        ),
        max_leaves=6,
    )
)
@settings(max_examples=150, deadline=None)
def test_any_arguments_are_shown_as_the_library_shows_them(value: Any) -> None:
    arguments = {"value": value}
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [call]}]
    messages = (Message("user", "a"), Message("assistant", "b", (ToolCall("f", arguments),)))
    expected = TOKENIZER.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert TEXT_TOKENIZER.encode_chat(messages) == expected


def test_template_without_tools_has_none() -> None:
    plain = TextTokenizer(make_tokenizer())
    assert TEXT_TOKENIZER.has_tools and not plain.has_tools
    with pytest.raises(ToolsUnsupported) as error:
        plain.encode_chat((Message("user", "a"),), chat=ChatOptions(tools=(SEARCH,)))
    assert error.value.field == "tools"
    with pytest.raises(ToolsUnsupported) as error:
        plain.encode_chat((Message("assistant", "a", (ToolCall("f", {}),)),))
    assert error.value.field == "messages"


def test_variables_of_the_template_may_be_set_and_no_others() -> None:
    messages = (Message("user", "a"),)
    assert TEXT_TOKENIZER.template_variables == {"enable_thinking"}
    silent = TEXT_TOKENIZER.encode_chat(messages, chat=ChatOptions(template_values={"enable_thinking": False}))
    assert TOKENIZER.decode(silent).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    for name in ("enable_thought", "messages", "tools", "add_generation_prompt"):
        with pytest.raises(InvalidRequest, match="no such variable"):
            TEXT_TOKENIZER.encode_chat(messages, chat=ChatOptions(template_values={name: True}))


def test_prompt_may_end_before_the_answer_begins() -> None:
    messages = (Message("user", "a"),)
    whole = TEXT_TOKENIZER.encode_chat(messages)
    assert whole == TEXT_TOKENIZER.encode_chat(messages, chat=ChatOptions(has_answer_opening=False)) + ids_of(
        "<|im_start|>assistant\n"
    )


def test_chat_that_the_template_refuses_is_told_in_its_words() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('Roles must alternate\n<b>') }}"
    with pytest.raises(InvalidRequest, match="refused by the model's chat template: Roles must alternate <b>"):
        TextTokenizer(tokenizer).encode_chat((Message("user", "a"),))


@pytest.mark.parametrize("attack", ATTACKS)
def test_raw_prompts_are_text_whatever_they_say(attack: str) -> None:
    ids = TEXT_TOKENIZER.encode_raw(attack)
    assert CONTROL_IDS.isdisjoint(ids) and TOKENIZER.decode(ids) == attack


def test_raw_token_ids_may_be_control_tokens_but_no_pictures() -> None:
    encoder = make_encoder(placeholder_ids=frozenset({7}))
    sampling = SamplingParams(4, 0.0)
    assert encoder.encode(RawRequest((END_ID, 20), sampling), lambda: None).ids == (END_ID, 20)
    for ids, place in (((20, 7), "prompt[1]"), ((20, 20, len(TOKENIZER)), "prompt[2]"), ((-1,), "prompt[0]")):
        with pytest.raises(InvalidRequest) as error:
            encoder.encode(RawRequest(ids, sampling), lambda: None)
        assert error.value.message.startswith(place) and error.value.field == "prompt"


def test_bytes_of_tokens_joined_are_the_text() -> None:
    text = "Съешь ещё 🎉 fox<|im_end|><tool_call>"
    joined = b"".join(TEXT_TOKENIZER.token_bytes(token_id) for token_id in ids_of(text))
    assert joined.decode() == text
    assert TEXT_TOKENIZER.token_bytes(10**6) == b""


# Answers, through HTTP: the model is a script, or draws what its grammar allows.


def make_encoder(**options: Any) -> PromptEncoder:
    stop_ids = frozenset({END_ID})
    return PromptEncoder(
        TEXT_TOKENIZER,
        stop_ids=stop_ids,
        generation_defaults={},
        context_tokens=4096,
        vocab_size=len(TOKENIZER),
        limits=Limits(),
        grammars=GrammarCompiler(TOKENIZER, len(TOKENIZER), stop_ids, Limits()),
        **options,
    )


class ScriptedRunner(EchoRunner):
    """Says what the script says, as far as the grammar lets it; where it does not, draws from what is allowed."""

    def __init__(self, script: str = "") -> None:
        super().__init__()
        self._script = [*ids_of(script), END_ID]
        self._dice = random.Random(7)

    def _output(self, row: Row) -> StepOutput:
        said = self._script[row.num_chosen] if row.num_chosen < len(self._script) else END_ID
        if row.mask is None:
            return StepOutput(row, said)
        allowed = np.flatnonzero(np.unpackbits(row.mask.view(np.uint8), bitorder="little"))
        if said in allowed and (len(self._script) > 1 or said != END_ID):
            return StepOutput(row, said)
        # With a liking for the end, so that there is one.
        wanted = END_ID if END_ID in allowed and self._dice.random() < 0.7 else int(self._dice.choice(allowed))
        return StepOutput(row, wanted)


@pytest.fixture
def scripted(make_app: Callable[..., Flask], make_service: Callable[..., ModelService]) -> Callable[[str], FlaskClient]:
    def make(script: str) -> FlaskClient:
        loaded: Any = FakeLoaded(ScriptedRunner(script), make_encoder())  # type: ignore[arg-type]
        return make_app(make_service({"avibe": loaded})).test_client()

    return make


def ask(client: FlaskClient, **fields: Any) -> dict[str, Any]:
    response = post_json(client, CHAT, {"model": "avibe", "messages": user("find a fox"), "max_tokens": 600, **fields})
    assert response.status_code == 200, response.get_data(as_text=True)
    (choice,) = response.get_json()["choices"]
    return dict(choice)


def streamed(client: FlaskClient, **fields: Any) -> tuple[str, list[tuple[str, str]], str, int]:
    """(content, calls, finish reason, pieces of arguments)."""
    body = {"model": "avibe", "messages": user("find a fox"), "max_tokens": 600, "stream": True, **fields}
    content, reason, num_pieces = "", "", 0
    calls: list[list[str]] = []
    for chunk in chunks_of(post_json(client, CHAT, body).data):
        (choice,) = chunk["choices"]
        content += choice["delta"].get("content") or ""
        for call in choice["delta"].get("tool_calls", []):
            if "id" in call:
                assert call["index"] == len(calls)
                calls.append([call["function"]["name"], ""])
            num_pieces += bool(call["function"]["arguments"])
            calls[call["index"]][1] += call["function"]["arguments"]
        reason = choice["finish_reason"] or reason
    return content, [(name, arguments) for name, arguments in calls], reason, num_pieces


def calls_of(choice: dict[str, Any]) -> list[tuple[str, str]]:
    calls = choice["message"].get("tool_calls", [])
    return [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


def test_calls_of_the_model_are_found_beside_text(scripted: Callable[[str], FlaskClient]) -> None:
    script = f"I look. 🎉\n{written('search', {'query': 'лиса', 'limit': 2})}\n{written('now', {})}"
    client = scripted(script)
    choice = ask(client, tools=[SEARCH, NOW])
    assert choice["message"]["content"] == "I look. 🎉" and choice["finish_reason"] == "tool_calls"
    assert calls_of(choice) == [("search", '{"query": "лиса", "limit": 2}'), ("now", "{}")]
    assert streamed(client, tools=[SEARCH, NOW])[:3] == ("I look. 🎉", calls_of(choice), "tool_calls")


def test_whole_conversation_with_a_tool(scripted: Callable[[str], FlaskClient]) -> None:
    client = scripted(written("now", {}))
    first = ask(client, tools=[NOW])["message"]
    result = {"role": "tool", "tool_call_id": first["tool_calls"][0]["id"], "content": "noon"}
    messages = [*user("what time is it?"), first, result]
    again = scripted("It is noon.")
    assert ask(again, tools=[NOW], messages=messages)["message"]["content"] == "It is noon."


@pytest.mark.parametrize(
    ("choice", "several"),
    [("required", True), ("required", False), ({"type": "function", "function": {"name": "search"}}, True)],
)
def test_forced_calls_are_valid_whatever_the_model_wants(
    scripted: Callable[[str], FlaskClient], choice: Any, several: bool
) -> None:
    client = scripted("I would rather talk.")
    answer = ask(client, tools=[SEARCH, NOW], tool_choice=choice, parallel_tool_calls=several)
    assert answer["finish_reason"] == "tool_calls" and answer["message"]["content"] is None
    calls = calls_of(answer)
    assert calls and (several or len(calls) == 1)
    for name, arguments in calls:
        assert choice == "required" or name == "search"
        Draft202012Validator(SCHEMA if name == "search" else {"type": "object"}).validate(json.loads(arguments))


def test_arguments_of_a_forced_call_are_streamed_as_they_come(scripted: Callable[[str], FlaskClient]) -> None:
    client = scripted(written("search", {"query": "рыжая л", "limit": 4}))
    content, calls, reason, num_pieces = streamed(client, tools=[SEARCH], tool_choice="required")
    assert (content, reason) == ("", "tool_calls") and num_pieces >= 1
    assert [(name, json.loads(arguments)) for name, arguments in calls] == [
        ("search", {"query": "рыжая л", "limit": 4})
    ]


def test_strict_holds_a_call_to_its_parameters_and_leaves_text_alone(scripted: Callable[[str], FlaskClient]) -> None:
    strict = {"type": "function", "function": {**SEARCH["function"], "strict": True}}
    script = f"<think>Hm.</think>Well:\n{written('search', {'query': 'far too long a query', 'limit': 1000})}"
    loose = calls_of(ask(scripted(script), tools=[SEARCH]))
    assert not Draft202012Validator(SCHEMA).is_valid(json.loads(loose[0][1]))
    answer = ask(scripted(script), tools=[strict])
    assert answer["message"]["content"] == "<think>Hm.</think>Well:" and answer["finish_reason"] == "tool_calls"
    for name, arguments in calls_of(answer):
        assert name == "search"
        Draft202012Validator(SCHEMA).validate(json.loads(arguments))
    assert ask(scripted("Just text."), tools=[strict])["message"]["content"] == "Just text."


def test_answer_is_held_to_a_schema(scripted: Callable[[str], FlaskClient]) -> None:
    schema = {"name": "answer", "schema": SCHEMA}
    client = scripted("No JSON from me.")
    for form, check in (
        ({"type": "json_schema", "json_schema": schema}, SCHEMA),
        ({"type": "json_object"}, {"type": "object"}),
    ):
        choice = ask(client, response_format=form)
        assert choice["finish_reason"] in ("stop", "length")
        if choice["finish_reason"] == "stop":
            Draft202012Validator(check).validate(json.loads(choice["message"]["content"]))
    assert ask(client, response_format={"type": "text"})["message"]["content"] == "No JSON from me."


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}},
         "invalid_schema", "response_format"),
        ({"response_format": {"type": "json_object"}, "tools": [SEARCH]}, "invalid_request", "response_format"),
        ({"response_format": {"type": "json_object"}, "stop": "}"}, "invalid_request", "stop"),
        ({"response_format": {"type": "json_object"}, "min_tokens": 5}, "invalid_request", "min_tokens"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "invalid_request", "ignore_eos"),
        ({"tools": [SEARCH], "parallel_tool_calls": False}, "invalid_request", "parallel_tool_calls"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}],
          "tool_choice": "required"}, "invalid_schema", "tools"),
    ],
)  # fmt: skip
def test_what_cannot_be_held_to_is_told_and_leaves_no_place_taken(
    scripted: Callable[[str], FlaskClient], fields: Any, code: str, param: str
) -> None:
    client = scripted("a")
    assert_error(post_json(client, CHAT, {"model": "avibe", "messages": user("a"), **fields}), code, param)
    totals = client.get("/api/metrics").get_json()["application"]
    assert totals["requests_running"] == totals["requests_waiting"] == totals["open_requests"] == 0
    assert ask(client)["message"]["content"] == "a"


def test_special_tokens_show_only_if_asked_for(scripted: Callable[[str], FlaskClient]) -> None:
    client = scripted("a<|vision_start|>b")
    assert ask(client)["message"]["content"] == "ab"
    assert ask(client, skip_special_tokens=False)["message"]["content"] == "a<|vision_start|>b"
    body = {"model": "avibe", "prompt": "x", "skip_special_tokens": False, "stop_token_ids": ids_of("<|vision_start|>")}
    answer = post_json(client, TEXT, body).get_json()["choices"][0]
    assert (answer["text"], answer["finish_reason"]) == ("a", "stop")


def test_control_token_of_plain_letters_is_no_control_token_in_a_tool_either() -> None:
    from tokenizers import AddedToken

    tokenizer = make_tools_tokenizer()
    tokenizer.add_tokens([AddedToken("FUNCTIONCALL", special=False, normalized=False)])
    word = tokenizer.convert_tokens_to_ids("FUNCTIONCALL")
    tool = {"type": "function", "function": {"name": "f", "parameters": {"title": "a FUNCTIONCALL b"}}}
    call = ToolCall("FUNCTIONCALL", {"FUNCTIONCALL": 1})
    messages = (Message("user", "a"), Message("assistant", "", (call,)))
    ids = TextTokenizer(tokenizer).encode_chat(messages, chat=ChatOptions(tools=(tool,)))
    assert '{"name": "FUNCTIONCALL", "arguments": {"FUNCTIONCALL": 1}}' in tokenizer.decode(ids)
    assert word not in ids and "a FUNCTIONCALL b" in tokenizer.decode(ids)
