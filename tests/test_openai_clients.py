"""OpenAI's own Python client, sync and async, and curl against the real Gunicorn, over a model that repeats the last
message. What the embedded models answer is in `tests/test_openai_demo.py`."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel

from config import PROJECT_ROOT
from tests.test_images import png
from tests.test_server import GENEROUS_S, Server
from tests.test_tool_calls import written

TEXT = "Ёж, é and и\u0306: 👩\u200d👩\u200d👧 🎉 naïve\n"
ANSWERABLE_S = 0.002  # a step: slow enough that answers come in many pieces
BOTH_MODELS = {"AVISION_MODEL_PATH": "vision/demo"}  # its files are looked at, never loaded
PICTURE = "data:image/png;base64," + base64.b64encode(png(60, 40)).decode()


class Search(BaseModel):
    """Find advertisements."""

    query: str
    city: Literal["Москва", "Казань"]
    max_price: int | None


FOUND = Search(query="велосипед", city="Казань", max_price=None)
CALL = written("Search", FOUND.model_dump())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = {**BOTH_MODELS, "AVITO_MAX_RUNNING": "8"}
    server = Server(tmp_path_factory.mktemp("clients"), f"create(step_s={ANSWERABLE_S})", settings).wait_ready()
    yield server
    server.process.kill()
    server.process.wait(GENEROUS_S)


def options(server: Server, **given: Any) -> dict[str, Any]:
    url = f"http://127.0.0.1:{server.port}/v1"
    return {"base_url": url, "api_key": "none", "max_retries": 0, "timeout": GENEROUS_S} | given


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(**options(server)) as client:
        yield client


def user(text: str) -> list[ChatCompletionMessageParam]:
    return [{"role": "user", "content": text}]


def text_of(chunks: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


# Answers.


def test_models_are_listed_and_shown(client: OpenAI) -> None:
    models = client.models.list().data
    assert [model.id for model in models] == ["avibe", "avision"]
    assert client.models.retrieve("avision") == models[1]


def test_chat_whole_and_streamed(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="avibe", messages=user(TEXT), temperature=0, user="somebody")
    assert answer.choices[0].message.content == TEXT and answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.completion_tokens == len(TEXT.encode())
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    with client.chat.completions.create(model="avibe", messages=user(TEXT), **options) as stream:
        *chunks, end, usage = stream
    assert text_of(chunks) == TEXT and len(chunks) > 3
    assert end.choices[0].finish_reason == "stop"
    assert usage.choices == [] and usage.usage.model_dump() == answer.usage.model_dump() | {
        "prompt_tokens_details": usage.usage.prompt_tokens_details.model_dump()
    }


def test_stream_helper_builds_the_answer_from_its_chunks(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model="avibe", messages=user(TEXT), stream_options={"include_usage": True}
    ) as stream:
        deltas = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion()
    assert deltas == final.choices[0].message.content == TEXT
    assert final.usage is not None and final.usage.completion_tokens == len(TEXT.encode())


def test_many_async_calls_at_once_each_get_their_own_answer(server: Server) -> None:
    async def ask(client: AsyncOpenAI, index: int) -> str:
        messages = user(f"{index}: {TEXT}")
        if index % 2:
            answer = await client.chat.completions.create(model="avibe", messages=messages)
            return answer.choices[0].message.content or ""
        chunks = await client.chat.completions.create(model="avibe", messages=messages, stream=True)
        return text_of([chunk async for chunk in chunks])

    async def ask_all() -> list[str]:
        async with AsyncOpenAI(**options(server)) as client:
            return await asyncio.gather(*(ask(client, index) for index in range(32)))

    assert asyncio.run(ask_all()) == [f"{index}: {TEXT}" for index in range(32)]


def test_raw_completions_take_texts_ids_and_lists(client: OpenAI) -> None:
    ids = list(TEXT.encode())
    answer = client.completions.create(model="avibe", prompt=[TEXT, "b"], n=2, max_tokens=100)
    assert [choice.text for choice in answer.choices] == [TEXT, TEXT, "b", "b"]
    assert client.completions.create(model="avibe", prompt=ids, max_tokens=100).choices[0].text == TEXT
    with client.completions.create(model="avibe", prompt=TEXT, max_tokens=100, stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == TEXT
    found = client.completions.create(model="avibe", prompt="ab", logprobs=1).choices[0].logprobs
    assert found is not None and found.tokens == ["a", "b"] and found.token_logprobs == [-0.5, -0.5]


def test_several_answers_come_interleaved_and_are_told_apart(client: OpenAI) -> None:
    texts = ["", "", ""]
    with client.chat.completions.create(model="avibe", messages=user(TEXT), n=3, stream=True) as stream:
        for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [TEXT] * 3
    whole = client.chat.completions.create(model="avibe", messages=user(TEXT), n=3)
    assert [choice.message.content for choice in whole.choices] == texts


def test_logprobs_have_the_bytes_of_each_token(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="avibe", messages=user("ё"), logprobs=True, top_logprobs=2)
    found = answer.choices[0].logprobs
    assert found is not None and found.content is not None
    assert bytes(each for token in found.content for each in token.bytes or ()).decode() == "ё"
    assert [top.logprob for top in found.content[0].top_logprobs] == [-0.5, -1.5]


def test_stop_and_limit_are_told(client: OpenAI) -> None:
    stopped = client.chat.completions.create(model="avibe", messages=user("one two three"), stop=[" three"])
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("one two", "stop")
    cut = client.chat.completions.create(model="avibe", messages=user("one two"), max_completion_tokens=3)
    assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == ("one", "length")


def test_picture_comes_as_a_data_url(client: OpenAI) -> None:
    content: Any = [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": PICTURE, "detail": "auto"}},
    ]
    answer = client.chat.completions.create(model="avision", messages=[{"role": "user", "content": content}])
    assert answer.choices[0].message.content == "What is this?"
    content[1]["image_url"]["url"] = "https://example.com/a.png"
    with pytest.raises(openai.BadRequestError, match="never fetched"):
        client.chat.completions.create(model="avision", messages=[{"role": "user", "content": content}])


def test_raw_response_has_the_request_id_also_of_an_error(client: OpenAI) -> None:
    headers = {"X-Request-ID": "a-client-chose-this"}
    raw = client.chat.completions.with_raw_response.create(model="avibe", messages=user("a"), extra_headers=headers)
    assert raw.request_id == raw.headers["X-Request-ID"] == "a-client-chose-this"
    assert raw.parse()._request_id == "a-client-chose-this"
    with client.chat.completions.with_streaming_response.create(
        model="avibe", messages=user("a"), stream=True
    ) as streamed:
        assert streamed.request_id and streamed.headers["content-type"].startswith("text/event-stream")
        assert list(streamed.iter_lines())[-2:] == ["data: [DONE]", ""]
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="x", messages=user("a"), extra_headers=headers)
    assert error.value.request_id == "a-client-chose-this"


def test_parsed_answer_is_a_pydantic_model_whole_and_streamed(client: OpenAI) -> None:
    messages = user(FOUND.model_dump_json())
    answer = client.chat.completions.parse(model="avibe", messages=messages, response_format=Search)
    assert answer.choices[0].message.parsed == FOUND
    with client.chat.completions.stream(model="avibe", messages=messages, response_format=Search) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == FOUND


# Tools.


def test_calls_come_with_parsed_arguments_whole_and_streamed(client: OpenAI) -> None:
    tools = [openai.pydantic_function_tool(Search)]
    messages = user(f"Let me look.\n{CALL}")
    whole = client.chat.completions.parse(model="avibe", messages=messages, tools=tools).choices[0]
    with client.chat.completions.stream(model="avibe", messages=messages, tools=tools) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        streamed = stream.get_final_completion().choices[0]
    assert [event.parsed_arguments for event in done] == [FOUND]
    for choice in (whole, streamed):
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me look.")
        (call,) = choice.message.tool_calls or []
        assert call.id.startswith("call_")
        assert (call.function.name, call.function.parsed_arguments) == ("Search", FOUND)


@pytest.mark.parametrize("is_parsed", [False, True], ids=["created", "parsed"])
def test_message_with_calls_goes_back_as_it_came_with_the_results(client: OpenAI, is_parsed: bool) -> None:
    """The loop that every user of tools writes: the client's own message object is appended to the chat."""
    tools: Any = [openai.pydantic_function_tool(Search)]
    messages: list[Any] = user(CALL)
    ask: Any = client.chat.completions.parse if is_parsed else client.chat.completions.create
    message = ask(model="avibe", messages=messages, tools=tools).choices[0].message
    messages += [message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "Нашлось: 3"}]
    answer = ask(model="avibe", messages=messages, tools=tools).choices[0]
    assert (answer.message.content, answer.finish_reason) == ("Нашлось: 3", "stop")


# Errors and clients that leave.


@pytest.mark.parametrize(
    ("fields", "kind", "code", "param"),
    [
        ({"model": "gpt-4o"}, openai.NotFoundError, "model_not_found", "model"),
        ({"temperature": 3}, openai.BadRequestError, "invalid_request", "temperature"),
        ({"messages": [{"role": "user"}]}, openai.BadRequestError, "invalid_request", "messages[0].content"),
        ({"reasoning_effort": "low"}, openai.BadRequestError, "unknown_field", "reasoning_effort"),
        ({"extra_body": {"guided_json": {}}}, openai.BadRequestError, "unknown_field", "guided_json"),
        ({"n": 9}, openai.BadRequestError, "invalid_request", "n"),
        ({"messages": [{"role": "user", "content": "x" * 17_000_000}]}, openai.APIStatusError, "payload_too_large",
         None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
def test_errors_are_the_clients_own_exceptions(
    client: OpenAI, fields: dict[str, Any], kind: type[openai.APIStatusError], code: str, param: str | None,
    is_streamed: bool,
) -> None:  # fmt: skip
    asked: dict[str, Any] = {"model": "avibe", "messages": user("a"), "stream": is_streamed}
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**(asked | fields))
    error = caught.value
    assert (error.code, error.param) == (code, param)
    assert error.message and error.request_id


def test_unknown_address_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.embeddings.create(model="avibe", input="a")
    assert caught.value.code == "not_found"


def test_error_in_mid_stream_is_raised_where_it_happens(client: OpenAI) -> None:
    told: list[str] = []

    def read() -> None:
        with client.chat.completions.create(model="avibe", messages=user("failing"), stream=True) as stream:
            for chunk in stream:
                told.append(chunk.choices[0].delta.content or "")

    with pytest.raises(openai.APIError) as caught:
        read()
    assert (caught.value.code, "".join(told)) == ("numeric_error", "fa")
    with pytest.raises(openai.InternalServerError) as whole:
        client.chat.completions.create(model="avibe", messages=user("failing"))
    assert whole.value.code == "numeric_error"


def test_client_that_is_turned_away_comes_again_by_itself(tmp_path_factory: pytest.TempPathFactory) -> None:
    """While the model loads there is a 503 with Retry-After, which the client understands."""
    server = Server(tmp_path_factory.mktemp("loading"), "create(load_s=4)", {})
    try:
        server.wait(lambda: server.get("/api/health/live")[0] == 200, "live")
        with OpenAI(**options(server)) as impatient, pytest.raises(openai.InternalServerError) as caught:
            impatient.chat.completions.create(model="avibe", messages=user("a"))
        assert (caught.value.status_code, caught.value.code) == (503, "not_ready")
        with OpenAI(**options(server, max_retries=10)) as patient:
            assert patient.completions.create(model="avibe", prompt="abc").choices[0].text == "abc"
    finally:
        server.process.kill()
        server.process.wait(GENEROUS_S)


def leave_a_stream(server: Server) -> None:
    with OpenAI(**options(server)) as client:
        stream = client.chat.completions.create(model="avibe", messages=user("x" * 2000), stream=True)
        next(stream)
        stream.close()


def leave_by_timeout(server: Server) -> None:
    with OpenAI(**options(server, timeout=0.3)) as client, pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(model="avibe", messages=user("x" * 2000))


def leave_by_cancelling(server: Server) -> None:
    async def leave() -> None:
        async with AsyncOpenAI(**options(server)) as client:
            asked = client.chat.completions.create(model="avibe", messages=user("x" * 2000))
            task = asyncio.ensure_future(asked)
            while not server.application()["requests_running"]:
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(leave())


@pytest.mark.parametrize("leave", [leave_a_stream, leave_by_timeout, leave_by_cancelling])
def test_client_that_leaves_frees_its_place(server: Server, leave: Callable[[Server], None]) -> None:
    before = server.application()["cancelled_requests"]
    leave(server)
    server.wait(lambda: server.application()["cancelled_requests"] == before + 1, "a cancelled request")
    now = server.application()
    assert (now["requests_running"], now["requests_waiting"], now["open_requests"]) == (0, 0, 0)


def test_keys_models_and_rates_are_told_by_exceptions(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("keys")

    def make(*arguments: str) -> str:
        command = [sys.executable, "-m", "keys", "--file", str(folder / "keys.json"), "make", *arguments]
        return subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=True).stdout.strip()

    seeing, slow = make("seeing", "--model", "avision"), make("slow", "--rate", "1")
    settings = {**BOTH_MODELS, "AVITO_KEYS_FILE": str(folder / "keys.json")}
    server = Server(folder, "create()", settings)
    try:
        server.wait(lambda: server.get("/api/health/ready")[0] == 200, "ready")
        with OpenAI(**options(server)) as stranger, pytest.raises(openai.AuthenticationError) as unknown:
            stranger.models.list()
        assert unknown.value.code == "unauthorized"
        with OpenAI(**options(server, api_key=seeing)) as client:
            assert [model.id for model in client.models.list()] == ["avision"]
            with pytest.raises(openai.PermissionDeniedError) as forbidden:
                client.chat.completions.create(model="avibe", messages=user("a"))
            assert forbidden.value.code == "forbidden"
            assert client.completions.create(model="avision", prompt="a").choices[0].text == "a"
        with OpenAI(**options(server, api_key=slow)) as client:
            assert client.completions.create(model="avibe", prompt="a").choices[0].text == "a"
            with pytest.raises(openai.RateLimitError) as limited:
                client.completions.create(model="avibe", prompt="a", stream=True)
        assert limited.value.code == "rate_limited" and int(limited.value.response.headers["Retry-After"]) > 0
    finally:
        server.process.kill()
        server.process.wait(GENEROUS_S)


# curl.


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("has_usage", [False, True], ids=["without usage", "with usage"])
def test_curl_sees_a_stream_line_by_line(server: Server, has_usage: bool) -> None:
    body = {"model": "avibe", "messages": user(TEXT), "stream": True}
    body |= {"stream_options": {"include_usage": True}} if has_usage else {}
    command = ["curl", "-sSN", "-D", "/dev/stderr", f"http://127.0.0.1:{server.port}/v1/chat/completions"]
    command += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
    result = subprocess.run(command, capture_output=True, check=True, timeout=GENEROUS_S)
    head = result.stderr.decode().lower()
    assert head.startswith("http/1.1 200 ok\r\n")
    assert "\r\ncontent-type: text/event-stream; charset=utf-8\r\n" in head
    assert "\r\ncache-control: no-store\r\n" in head and "\r\nx-accel-buffering: no\r\n" in head
    assert result.stdout.endswith(b"\n\ndata: [DONE]\n\n") and b"\r" not in result.stdout
    *events, rest = result.stdout.decode().split("\n\n")
    assert rest == "" and events[0] == ": waiting", "a comment at once: the client learns that it is admitted"
    data = [event.removeprefix("data: ") for event in events if not event.startswith(":")]
    assert all(event.startswith(("data: ", ":")) and "\n" not in event for event in events)
    assert data.pop() == "[DONE]"
    chunks = [json.loads(each) for each in data]
    assert ("usage" in chunks[0]) == has_usage and (chunks[-1]["choices"] == []) == has_usage
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == TEXT
