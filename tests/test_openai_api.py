"""The doors of `/v1`, in process: answers, streams, parameters as docs/openai.md says, errors in OpenAI's form."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from hypothesis import given, settings
from hypothesis import strategies as st

from config import PROJECT_ROOT, Limits
from models.errors import NumericError
from models.openai_parsing import NEUTRAL_VALUES, UNSUPPORTED, WITHOUT_EFFECT, OpenAIParser
from models.service import ModelService
from responses import STATUS_BY_CODE
from tests.fakes import EchoRunner, EndlessRunner, FakeEncoder, FakeLoaded
from tests.test_error_shape import post_json
from tests.test_images import png
from tests.test_tool_calls import written

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
MakeApp = Callable[..., Flask]
MakeService = Callable[..., ModelService]
PICTURE_URL = "data:image/png;base64," + base64.b64encode(png(60, 40)).decode()
DEEP = '{"a":' * 70 + "1" + "}" * 70
TOOL = {"type": "function", "function": {"name": "search", "description": "Find", "parameters": {"type": "object"}}}


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def chat(client: FlaskClient, text: str, **fields: Any) -> dict[str, Any]:
    """The answer of a model that repeats the last message."""
    response = post_json(client, CHAT, {"model": "avibe", "messages": user(text), **fields})
    assert response.status_code == 200, response.get_data(as_text=True)
    return dict(response.get_json())


def chunks_of(body: bytes) -> list[dict[str, Any]]:
    """The data of each event; the last must be [DONE]."""
    events = [block for block in body.decode().split("\n\n") if block and not block.startswith(":")]
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    assert events[-1] == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]


def stream(client: FlaskClient, path: str, **body: Any) -> list[dict[str, Any]]:
    response = post_json(client, path, {"model": "avibe", "stream": True, **body})
    assert response.status_code == 200, response.get_data(as_text=True)
    assert response.content_type == "text/event-stream; charset=utf-8"
    return chunks_of(response.data)


def assert_error(response: Any, code: str, param: str | None = None) -> dict[str, Any]:
    body = response.get_json()
    assert response.status_code == STATUS_BY_CODE[code], body
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert (body["error"]["code"], body["error"]["param"]) == (code, param), body
    assert response.headers["X-Request-ID"]
    return dict(body["error"])


# Models and tokens.


def test_models_are_those_that_are_set_up(make_app: MakeApp, make_service: MakeService) -> None:
    client = make_app(make_service({"avision": FakeLoaded()})).test_client()
    (model,) = client.get("/v1/models").get_json()["data"]
    assert (model["id"], model["object"]) == ("avision", "model") and isinstance(model["created"], int)
    assert client.get("/v1/models/avision").get_json() == model
    assert_error(client.get("/v1/models/avibe"), "model_not_found", "model")
    for name in ("avibe", "gpt-4o"):
        assert_error(post_json(client, CHAT, {"model": name, "messages": user("a")}), "model_not_found", "model")


def test_tokens_there_and_back(client: FlaskClient) -> None:
    body = {"model": "avibe", "prompt": "Hi ё", "return_token_strs": True}
    found = post_json(client, "/v1/tokenize", body).get_json()
    assert found["tokens"] == list("Hi ё".encode()) and found["count"] == 5
    assert found["token_strs"] == ["H", "i", " ", "\ufffd", "\ufffd"]
    back = post_json(client, "/v1/detokenize", {"model": "avibe", "tokens": found["tokens"]}).get_json()
    assert back == {"prompt": "Hi ё"}
    chat = post_json(client, "/v1/tokenize", {"model": "avibe", "messages": user("Hi")}).get_json()
    assert chat["tokens"] == [72, 105] and chat["token_strs"] is None
    for fields in ({}, {"prompt": "a", "messages": user("a")}):
        assert_error(post_json(client, "/v1/tokenize", {"model": "avibe", **fields}), "invalid_request", "prompt")
    wrong = post_json(client, "/v1/detokenize", {"model": "avibe", "tokens": [1, 300]})
    assert "tokens[1]" in assert_error(wrong, "invalid_request", "tokens")["message"]


# Answers.


def test_chat_answer_has_openais_form(client: FlaskClient) -> None:
    answer = chat(client, "Привет 🎉", max_tokens=100)
    assert answer["object"] == "chat.completion" and answer["model"] == "avibe"
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Привет 🎉"}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    size = len("Привет 🎉".encode())
    assert answer["usage"] == {
        "prompt_tokens": size,
        "completion_tokens": size,
        "total_tokens": 2 * size,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert chat(client, "abcdef", max_completion_tokens=2)["choices"][0]["finish_reason"] == "length"


def test_tokens_found_in_the_cache_are_told(client: FlaskClient) -> None:
    text = "a long text that fills several pages of the cache, and once more the same"
    chat(client, text)
    assert chat(client, text)["usage"]["prompt_tokens_details"]["cached_tokens"] >= 64


def test_raw_prompts_are_texts_ids_or_lists_of_them(client: FlaskClient) -> None:
    for prompt, expected in (
        ("ab", ["ab"]),
        (["ab", "c"], ["ab", "c"]),
        ([97, 98], ["ab"]),
        ([[97, 98], [99]], ["ab", "c"]),
    ):
        answer = post_json(client, TEXT, {"model": "avibe", "prompt": prompt}).get_json()
        assert answer["object"] == "text_completion"
        assert [choice["text"] for choice in answer["choices"]] == expected
        assert [choice["index"] for choice in answer["choices"]] == list(range(len(expected)))
    wrong: tuple[Any, ...] = ("", [], [""], [[]], [1, "a"], ["a", [1]], [True], [1.5], 5, {}, [["a"]], ["a"] * 9)
    for each in wrong:
        assert_error(post_json(client, TEXT, {"model": "avibe", "prompt": each}), "invalid_request", "prompt")


def test_whole_numbers_are_integers_and_truth_is_no_number(client: FlaskClient) -> None:
    """JSON has one kind of number, and other languages write 5 as 5.0."""
    for path, fields in (
        (TEXT, {"prompt": [97.0], "n": 2.0, "top_k": 5.0, "logprobs": 1.0, "stop_token_ids": [98.0]}),
        (CHAT, {"messages": user("a"), "logprobs": True, "top_logprobs": 2.0}),
        ("/v1/detokenize", {"tokens": [97.0]}),
    ):
        answer = post_json(client, path, {"model": "avibe", **fields})
        assert answer.status_code == 200, answer.get_json()
    for name, value in (("best_of", True), ("echo", 0), ("length_penalty", True)):
        refused = post_json(client, TEXT, {"model": "avibe", "prompt": "a", name: value})
        assert_error(refused, "unknown_field", name)


def test_keys_of_logit_bias_are_token_ids_as_they_are_written(client: FlaskClient) -> None:
    for key in ("05", "-1", "x", "1" * 11, "\u0665"):
        refused = post_json(client, TEXT, {"model": "avibe", "prompt": "a", "logit_bias": {key: 1}})
        assert "token id" in assert_error(refused, "invalid_request", "logit_bias")["message"]
    refused = post_json(client, TEXT, {"model": "avibe", "prompt": "a", "logit_bias": {"5": 101}})
    assert "at most 100, got 101" in assert_error(refused, "invalid_request", "logit_bias.5")["message"]


def test_raw_prompt_generates_16_tokens_by_default(client: FlaskClient) -> None:
    answer = post_json(client, TEXT, {"model": "avibe", "prompt": "x" * 20}).get_json()
    assert answer["usage"]["completion_tokens"] == 16 and answer["choices"][0]["finish_reason"] == "length"


def test_several_answers_count_their_prompt_once(client: FlaskClient) -> None:
    answer = post_json(client, TEXT, {"model": "avibe", "prompt": ["ab", "c"], "n": 3}).get_json()
    assert [choice["text"] for choice in answer["choices"]] == ["ab"] * 3 + ["c"] * 3
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (3, 9)
    refused = post_json(client, TEXT, {"model": "avibe", "prompt": ["a"] * 3, "n": 3})
    assert "at most 8" in assert_error(refused, "invalid_request", "n")["message"]


def test_seeds_of_several_answers_follow_each_other(make_app: MakeApp, make_service: MakeService) -> None:
    seen: list[Any] = []
    loaded = FakeLoaded()
    original = loaded.encoder.sampling_options

    def watched(params: Any, num_prompt: int) -> Any:
        seen.append(params)
        return original(params, num_prompt)

    loaded.encoder.sampling_options = watched  # type: ignore[method-assign]
    client = make_app(make_service({"avibe": loaded})).test_client()
    chat(client, "a", n=3, seed=2**63 - 2)
    assert [params.seed for params in seen] == [2**63 - 2, 2**63 - 1, 0]
    chat(client, "a", n=2)
    assert [params.seed for params in seen[3:]] == [None, None]


def test_all_answers_are_admitted_or_none(make_app: MakeApp, make_service: MakeService, wait_until: Any) -> None:
    runner = EchoRunner()
    runner.gate.clear()
    service = make_service({"avibe": FakeLoaded(runner, max_running=1)}, max_waiting=2)
    client = make_app(service).test_client()
    assert_error(post_json(client, CHAT, {"model": "avibe", "messages": user("a"), "n": 4}), "queue_full")
    runner.gate.set()
    wait_until(lambda: service.snapshot().models["avibe"].num_waiting == 0, "the places are given back")
    assert len(chat(client, "a", n=3)["choices"]) == 3


def test_logprobs_of_a_chat(client: FlaskClient) -> None:
    content = chat(client, "ё", logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    assert [bytes(token["bytes"]) for token in content] == [b"\xd1", b"\x91"]
    assert {token["token"] for token in content} == {"\ufffd"}
    assert content[0]["logprob"] == -0.5 and [top["logprob"] for top in content[0]["top_logprobs"]] == [-0.5, -1.5]
    assert chat(client, "a", logprobs=True)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    refused = post_json(client, CHAT, {"model": "avibe", "messages": user("a"), "top_logprobs": 1})
    assert_error(refused, "invalid_request", "top_logprobs")


def test_logprobs_of_a_raw_prompt(client: FlaskClient) -> None:
    answer = post_json(client, TEXT, {"model": "avibe", "prompt": "abc", "logprobs": 1}).get_json()
    assert answer["choices"][0]["logprobs"] == {
        "tokens": ["a", "b", "c"],
        "token_logprobs": [-0.5] * 3,
        "top_logprobs": [{"a": -0.5}, {"b": -0.5}, {"c": -0.5}],
        "text_offset": [0, 1, 2],
    }


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_logprobs_of_a_stream_are_those_of_the_whole(client: FlaskClient, path: str) -> None:
    text = "Ёжик 🎉 and"
    asked = {"messages": user(text), "logprobs": True} if path == CHAT else {"prompt": text, "logprobs": 0}
    whole = post_json(client, path, {"model": "avibe", **asked, "stop": "nd"}).get_json()["choices"][0]["logprobs"]
    parts = [
        c["choices"][0]["logprobs"] for c in stream(client, path, **asked, stop="nd") if c["choices"][0]["logprobs"]
    ]
    assert {name: [each for part in parts for each in part[name]] for name in whole} == whole


# Streams.


def test_stream_of_a_chat_begins_with_the_role_and_ends_with_reason_and_usage(client: FlaskClient) -> None:
    first, *middle, last, usage = stream(client, CHAT, messages=user("Привет"), stream_options={"include_usage": True})
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in middle) == "Привет"
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "stop")
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 12
    assert all(chunk["usage"] is None for chunk in (first, *middle, last))
    assert len({(chunk["id"], chunk["created"], chunk["object"]) for chunk in (first, *middle, last, usage)}) == 1


def test_stream_without_usage_does_not_speak_of_it(client: FlaskClient) -> None:
    for chunk in stream(client, TEXT, prompt="abc"):
        assert "usage" not in chunk
    refused = post_json(client, CHAT, {"model": "avibe", "messages": user("a"), "stream_options": {}})
    assert_error(refused, "invalid_request", "stream_options")


@given(
    text=st.lists(
        st.sampled_from([*"аёЖ e\n", "🎉", "👩\u200d👩\u200d👧", "e\u0301", "и\u0306", "STOP"]), min_size=1, max_size=20
    ).map("".join),
    stop=st.lists(st.sampled_from(["STOP", "🎉", "ё", "e\u0301 ", "\n\n"]), max_size=2),
    size=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_joined_chunks_are_the_whole_answer(text: str, stop: list[str], size: int) -> None:
    client = _shared_client()
    for path, prompt in ((CHAT, {"messages": user(text)}), (TEXT, {"prompt": text})):
        fields = {**prompt, "stop": stop, "n": size, "max_tokens": 100}
        whole = post_json(client, path, {"model": "avibe", **fields}).get_json()
        texts, reasons = [""] * size, [""] * size
        for chunk in stream(client, path, **fields):
            (choice,) = chunk["choices"]
            assert not reasons[choice["index"]], "nothing comes after the end of an answer"
            texts[choice["index"]] += choice["delta"].get("content", "") if path == CHAT else choice["text"]
            reasons[choice["index"]] = choice["finish_reason"] or ""
        shown = [c["message"]["content"] if path == CHAT else c["text"] for c in whole["choices"]]
        assert texts == shown and reasons == [c["finish_reason"] for c in whole["choices"]]


_CLIENTS: list[FlaskClient] = []


@pytest.fixture(autouse=True)
def _keep_client(client: FlaskClient) -> Any:
    """Hypothesis runs one test many times; this is the client of the test at hand."""
    _CLIENTS[:] = [client]
    yield
    _CLIENTS.clear()


def _shared_client() -> FlaskClient:
    return _CLIENTS[0]


def test_error_in_a_stream_is_an_event_and_counts_as_an_error(make_app: MakeApp, make_service: MakeService) -> None:
    def fail(sequences: Any) -> None:
        if any(len(sequence.output_ids) == 2 for sequence in sequences):
            raise NumericError("the model gave NaN")

    client = make_app(make_service({"avibe": FakeLoaded(EchoRunner(fail))})).test_client()
    for size in (1, 2):
        *_, error = stream(client, CHAT, messages=user("abcdef"), n=size)
        assert error["error"]["type"] == "server_error" and error["error"]["code"] == "numeric_error"
    totals = client.get("/api/metrics").get_json()["application"]
    assert (totals["error_requests"], totals["ok_requests"], totals["open_requests"]) == (2, 0, 0)
    assert totals["requests_running"] == totals["requests_waiting"] == 0


def test_requests_count_for_their_model(make_app: MakeApp, make_service: MakeService) -> None:
    client = make_app(make_service()).test_client()
    chat(client, "a")
    post_json(client, TEXT, {"model": "avision", "prompt": "a"})
    assert_error(post_json(client, CHAT, {"model": "avibe"}), "invalid_request", "messages")
    totals = client.get("/api/metrics").get_json()["application"]
    assert (totals["avibe_requests"], totals["avision_requests"], totals["total_requests"]) == (1, 1, 3)


# Pictures and messages.


def test_pictures_come_as_data_urls_for_avision_only(client: FlaskClient) -> None:
    def ask(model: str, url: str, **image: Any) -> Any:
        part = {"type": "image_url", "image_url": {"url": url, **image}}
        content = [{"type": "text", "text": "What is "}, part, {"type": "text", "text": "this?"}]
        return post_json(client, CHAT, {"model": model, "messages": [{"role": "user", "content": content}]})

    answer = ask("avision", PICTURE_URL, detail="auto").get_json()
    assert answer["choices"][0]["message"]["content"] == "What is this?"
    name = "messages[0].content[1].image_url"
    assert "never fetched" in assert_error(ask("avision", "http://10.0.0.1/x.png"), "invalid_request", name)["message"]
    assert_error(ask("avision", base64.b64encode(png()).decode()), "invalid_request", name)
    assert_error(ask("avision", "data:image/png;base64,AAAA"), "unsupported_image", name)
    assert_error(ask("avision", PICTURE_URL, detail="high"), "invalid_request", f"{name}.detail")
    assert_error(ask("avibe", PICTURE_URL), "invalid_request", name)


def test_one_picture_too_many_is_told(client: FlaskClient) -> None:
    parts = [{"type": "image_url", "image_url": {"url": PICTURE_URL}}] * 5
    refused = post_json(client, CHAT, {"model": "avision", "messages": [{"role": "user", "content": parts}]})
    assert "at most 4" in assert_error(refused, "invalid_request", "messages[0].content[4].image_url")["message"]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("a", "messages"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "robot", "content": "a"}], "messages[0].role"),
        ([{"content": "a"}], "messages[0].role"),
        ([{"role": "user", "content": 1}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "video"}]}], "messages[0].content[0].type"),
        ([{"role": "system", "content": [{"type": "image_url"}]}], "messages[0].content[0].type"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
         "messages[0].tool_calls[0].function.arguments"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}],
         "messages[0].tool_calls[0].function.arguments"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": DEEP}}]}],
         "messages[0].tool_calls[0].function.arguments"),
    ],
)  # fmt: skip
def test_wrong_messages_are_told_by_their_place(client: FlaskClient, messages: Any, param: str) -> None:
    assert_error(post_json(client, CHAT, {"model": "avibe", "messages": messages}), "invalid_request", param)


def test_message_of_an_answer_is_taken_back_with_what_clients_made_of_it(client: FlaskClient) -> None:
    """As the Python client sends what `parse` and the stream helper gave; elsewhere the same names are refused."""
    function = {"name": "f", "arguments": '{"a": 1}', "parsed_arguments": {"a": 1}}
    calls = [{"id": "call_1", "type": "function", "function": function, "index": 0}]
    unset = dict.fromkeys(("content", "refusal", "annotations", "audio", "function_call"))
    for message in (
        {"tool_calls": calls, "parsed": None},
        {"content": '{"a": 1}', "tool_calls": [], "parsed": {"a": 1}},
    ):
        messages = [{"role": "assistant", **unset, **message}, *user("b")]
        assert post_json(client, CHAT, {"model": "avibe", "messages": messages}).status_code == 200
    messages = [{"role": "user", "content": "a", "parsed": {}}]
    refused = post_json(client, CHAT, {"model": "avibe", "messages": messages})
    assert_error(refused, "unknown_field", "messages[0].parsed")


def test_unknown_fields_are_told_wherever_they_are(client: FlaskClient) -> None:
    for body, param in (
        ({"x": 1}, "x"),
        ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "messages[0].name"),
        ({"stream_options": {"x": 1}, "stream": True}, "stream_options.x"),
    ):
        refused = post_json(client, CHAT, {"model": "avibe", "messages": user("a"), **body})
        assert_error(refused, "unknown_field", param)


def test_texts_of_all_messages_and_tools_have_one_limit(make_app: MakeApp) -> None:
    client = make_app(AVITO_MAX_PROMPT_CHARS=20).test_client()

    def ask(text: str) -> Any:
        parts = [{"type": "text", "text": text}]
        messages = [{"role": "system", "content": "x" * 10}, {"role": "user", "content": parts}]
        return post_json(client, CHAT, {"model": "avibe", "messages": messages})

    assert ask("y" * 10).status_code == 200
    assert "at most 20 characters" in assert_error(ask("y" * 11), "invalid_request", "messages")["message"]


def test_too_long_a_chat_is_told_as_messages(make_app: MakeApp, make_service: MakeService) -> None:
    client = make_app(make_service({"avibe": FakeLoaded(encoder=FakeEncoder(context_tokens=5))})).test_client()
    refused = post_json(client, CHAT, {"model": "avibe", "messages": user("abcdef")})
    assert refused.get_json()["error"]["code"] == "prompt_too_long"


def test_null_is_absent_but_not_within_a_schema(client: FlaskClient) -> None:
    nulls = dict.fromkeys(("temperature", "stop", "tools", "response_format", "stream_options", "n", "audio"))
    messages = [{"role": "assistant", "content": None, "refusal": None, "tool_calls": None}, *user("a")]
    answer = post_json(client, CHAT, {"model": "avibe", "messages": messages, **nulls})
    assert answer.status_code == 200, answer.get_json()
    parameters = {"type": "object", "properties": {"a": {"enum": ["x", None], "default": None}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters, "description": None}}
    parsed = OpenAIParser(Limits()).parse_chat(
        json.dumps({"model": "avibe", "messages": user("a"), "tools": [tool]}).encode()
    )
    assert parsed.prompts[0].chat.tools[0]["function"]["parameters"] == parameters  # type: ignore[union-attr]


# Tools, by what the model writes.


def test_calls_in_the_answer_are_found_streamed_or_not(client: FlaskClient) -> None:
    text = f"Let me look.\n{written('search', {'q': 'ё'})}\n{written('now', {})}"
    asked = {"messages": user(text), "tools": [TOOL]}
    (choice,) = chat(client, text, tools=[TOOL])["choices"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "Let me look."
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in choice["message"]["tool_calls"]]
    assert calls == [("search", '{"q": "ё"}'), ("now", "{}")]
    assert len({call["id"] for call in choice["message"]["tool_calls"]}) == 2
    content, found = "", dict[int, list[str]]()
    for chunk in stream(client, CHAT, **asked):
        delta = chunk["choices"][0]["delta"]
        content += delta.get("content") or ""
        for call in delta.get("tool_calls", []):
            if "id" in call:
                found[call["index"]] = [call["function"]["name"], ""]
            found[call["index"]][1] += call["function"]["arguments"]
    assert content == "Let me look." and [tuple(found[index]) for index in sorted(found)] == calls
    assert chunk["choices"][0]["finish_reason"] == "tool_calls"


def test_calls_stay_text_without_tools_and_with_tool_choice_none(client: FlaskClient) -> None:
    text = written("search", {})
    for fields in ({}, {"tools": [TOOL], "tool_choice": "none"}):
        (choice,) = chat(client, text, **fields)["choices"]
        assert choice["message"] == {"role": "assistant", "content": text} and choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "sometimes"}, "tool_choice"),
    ],
)
def test_wrong_tools_are_told(client: FlaskClient, fields: Any, param: str) -> None:
    refused = post_json(client, CHAT, {"model": "avibe", "messages": user("a"), **fields})
    assert_error(refused, "invalid_request", param)


def test_answer_that_cannot_be_framed_is_an_error_and_not_a_client_that_left(client: FlaskClient) -> None:
    """The fake model has no grammar, so that a forced call may be broken JSON."""
    broken = {"messages": user('<tool_call>{"name": f, "arguments": {}}'), "tools": [TOOL], "tool_choice": "required"}
    assert_error(post_json(client, CHAT, {"model": "avibe", **broken}), "internal_error")
    *_, error = stream(client, CHAT, **broken)
    assert error["error"]["code"] == "internal_error"
    totals = client.get("/api/metrics").get_json()["application"]
    assert (totals["error_requests"], totals["cancelled_requests"], totals["open_requests"]) == (2, 0, 0)
    assert chat(client, "still here")["choices"][0]["message"]["content"] == "still here"


# The table of docs/openai.md, line by line.

EXAMPLES: dict[str, Any] = {
    "model": "avibe", "messages": user("ab"), "prompt": "ab", "max_tokens": 5, "max_completion_tokens": 5,
    "temperature": 0.5, "top_p": 0.5, "top_k": -1, "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": -2,
    "frequency_penalty": 2.0, "n": 2, "seed": 5, "stop": "x", "stop_token_ids": [5], "min_tokens": 1,
    "ignore_eos": True, "logit_bias": {"50": -100}, "logprobs": {CHAT: True, TEXT: 3}, "top_logprobs": 0,
    "skip_special_tokens": False, "stream": True, "stream_options": {"include_usage": True}, "tools": [TOOL],
    "tool_choice": "auto", "parallel_tool_calls": True, "response_format": {"type": "text"},
    "add_generation_prompt": False, "chat_template_kwargs": {"enable_thinking": True}, "user": "someone",
    "metadata": {"a": "b"}, "store": True,
}  # fmt: skip


def table() -> list[tuple[str, str, str]]:
    text = (PROJECT_ROOT / "docs" / "openai.md").read_text(encoding="utf-8")
    rows = text.partition("| Parameter | chat | completions | Notes |\n|---|---|---|---|\n")[2].partition("\n\n")[0]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows.split("\n")]
    return [(cell[0].strip("`"), cell[1], cell[2]) for cell in cells]


@pytest.mark.parametrize(("name", "chat_says", "text_says"), table(), ids=lambda value: str(value))
def test_parameter_is_taken_as_the_table_says(client: FlaskClient, name: str, chat_says: str, text_says: str) -> None:
    for path, says in ((CHAT, chat_says), (TEXT, text_says)):
        needed: dict[str, Any] = {"model": "avibe", **({"messages": user("ab")} if path == CHAT else {"prompt": "ab"})}
        if says in ("no", "–"):
            refused = post_json(client, path, {**needed, name: EXAMPLES.get(name, "x")})
            assert_error(refused, "unknown_field", name)
            continue
        if says.startswith("only "):
            neutral = json.loads(says.removeprefix("only "))
            assert post_json(client, path, {**needed, name: neutral}).status_code == 200
            assert_error(post_json(client, path, {**needed, name: "else"}), "unknown_field", name)
            continue
        assert says in ("yes", "no effect")
        value = EXAMPLES[name]
        value = value[path] if name == "logprobs" else value
        others: dict[str, Any] = {"stream": True} if name == "stream_options" else {}
        others |= {"tools": [TOOL]} if name == "tool_choice" else {}
        answer = post_json(client, path, {**needed, **others, name: value})
        assert answer.status_code == 200, answer.get_data(as_text=True)
        wrong = post_json(client, path, {**needed, name: [{}]})
        assert wrong.status_code in (400, 404) and re.match(rf"{name}\b", wrong.get_json()["error"]["param"])


def test_table_names_every_parameter_that_is_known() -> None:
    parser = OpenAIParser(Limits())
    rows = {name: (chat_says, text_says) for name, chat_says, text_says in table()}
    known = {*parser.chat_body.model_fields, *parser.completion_body.model_fields}
    assert set(rows) == known | set(NEUTRAL_VALUES) | UNSUPPORTED
    assert {name for name, says in rows.items() if "no effect" in says} == set(WITHOUT_EFFECT)


def test_endless_answer_without_max_tokens_ends_at_the_limit(make_app: MakeApp, make_service: MakeService) -> None:
    client = make_app(make_service({"avibe": FakeLoaded(EndlessRunner())})).test_client()
    answer = chat(client, "a")
    assert answer["usage"]["completion_tokens"] == Limits().max_tokens
    assert answer["choices"][0]["finish_reason"] == "length"
