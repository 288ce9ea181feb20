"""The embedded models behind a real Gunicorn, asked by OpenAI's clients for Python and for Node: answers that keep to
JSON schemas, pictures, 64 streams at once, and streams that join to the unstreamed answer."""

from __future__ import annotations

import asyncio
import base64
import datetime
import json
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

import jsonschema
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field

from config import PROJECT_ROOT
from models.snapshots import DEMO_MARKER
from tests.test_openai_clients import options, user
from tests.test_server import GENEROUS_S, Server
from tools.demo_avision.dialogue import describe
from tools.demo_avision.samples import SAMPLES

CLIENTS = PROJECT_ROOT / "tests" / "clients"
SAMPLE_FILES = PROJECT_ROOT / "static" / "samples"
DEMOS = {"AVIBE_MODEL_PATH": "vibe/demo", "AVISION_MODEL_PATH": "vision/demo", "AVITO_DEVICE": "cpu"}
NUM_AT_ONCE = 16  # as many as run at once on a CPU
ANSWER_S = 240.0  # more than the server takes at most
pytestmark = pytest.mark.skipif(
    not (PROJECT_ROOT / "vibe" / "demo" / DEMO_MARKER).is_file(),
    reason="vibe/demo is missing: tools/prepare_demo_avibe.py makes it",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("demo"), "", DEMOS).wait_ready()
    yield server
    server.process.terminate()
    assert server.process.wait(GENEROUS_S) == 0, server.log.read_text()


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(**options(server, timeout=ANSWER_S)) as client:
        yield client


def picture_url(name: str) -> str:
    return "data:image/png;base64," + base64.b64encode((SAMPLE_FILES / f"{name}.png").read_bytes()).decode()


def test_answers_are_sensible_and_marked_as_a_demos(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="avibe", messages=user("What is the capital of France?"), temperature=0, max_tokens=20
    )
    assert raw.headers["X-Avito-Demo"] == "1"
    assert "Paris" in (raw.parse().choices[0].message.content or "")


@pytest.mark.parametrize("name", SAMPLES)
def test_pictures_are_described_whole_and_streamed(client: OpenAI, name: str) -> None:
    def messages(question: str) -> Any:
        picture = {"type": "image_url", "image_url": {"url": picture_url(name)}}
        return [{"role": "user", "content": [picture, {"type": "text", "text": question}]}]

    english, russian = messages("Describe the picture."), messages("Опиши картинку.")
    answer = client.chat.completions.create(model="avision", messages=english, temperature=0)
    assert answer.choices[0].message.content == describe(SAMPLES[name], "en")
    with client.chat.completions.stream(model="avision", messages=russian, temperature=0) as stream:
        assert stream.get_final_completion().choices[0].message.content == describe(SAMPLES[name], "ru")


def test_model_without_tools_in_its_template_says_so(client: OpenAI) -> None:
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="avibe", messages=user("a"), tools=tools)
    assert caught.value.code == "tools_unsupported"


# Structured output.


class Seller(BaseModel):
    name: str = Field(max_length=8)
    rating: int = Field(ge=0, le=5)


class Advertisement(BaseModel):
    """What a shop's page would ask for: nested, optional, enumerated, bounded."""

    city: Literal["Москва", "Казань"]
    price: Annotated[int, Field(ge=0, le=9999)] | None
    posted: datetime.date
    tags: list[Literal["дом", "сад", "авто"]] = Field(max_length=2)
    seller: Seller


def test_parsed_answer_is_a_valid_pydantic_model(client: OpenAI) -> None:
    asked: Any = {"messages": user("Invent an advertisement."), "response_format": Advertisement, "max_tokens": 120}
    whole = client.chat.completions.parse(model="avibe", temperature=1, seed=7, **asked).choices[0].message
    assert isinstance(whole.parsed, Advertisement)
    with client.chat.completions.stream(model="avibe", temperature=1, seed=7, **asked) as stream:
        streamed = stream.get_final_completion().choices[0].message
    assert (streamed.parsed, streamed.content) == (whole.parsed, whole.content)


def test_parsed_answer_that_is_cut_off_is_told_by_the_client(client: OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(
            model="avibe", messages=user("Invent one."), response_format=Advertisement, max_tokens=4
        )


def obj(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def text(size: int = 12) -> dict[str, Any]:
    return {"type": "string", "maxLength": size}


DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
SCHEMAS: dict[str, dict[str, Any]] = {
    "a flag": {"type": "boolean"},
    "a rating": {"type": "integer", "minimum": 1, "maximum": 5},
    "a price": {"type": "integer", "exclusiveMinimum": 0, "maximum": 1000, "multipleOf": 50},
    "a colour": {"enum": ["red", "green", "blue"]},
    "a Russian colour": {"enum": ["красный", "зелёный", "синий", None]},
    "a city": {"type": "string", "pattern": "^(Москва|Санкт-Петербург|Казань)$"},
    "a Russian word": {"type": "string", "pattern": "^[А-ЯЁ][а-яё]{2,10}$"},
    "a phone": {"type": "string", "pattern": r"^\+7 \(\d{3}\) \d{3}-\d{2}-\d{2}$"},
    "a date": {"type": "string", "format": "date"},
    "an email": obj(email={"type": "string", "format": "email", "maxLength": 24}),
    "an id": obj(id={"type": "string", "format": "uuid"}),
    "an address": obj(ip={"type": "string", "format": "ipv4"}),
    "a person": obj(name=text(), age={"type": "integer", "minimum": 0, "maximum": 120}),
    "an advertisement": obj(
        заголовок=text(), цена={"type": "integer", "minimum": 0, "maximum": 99999}, продавец=obj(имя=text(8))
    ),
    "some numbers": {
        "type": "array",
        "items": {"type": "integer", "minimum": 0, "maximum": 99},
        "minItems": 2,
        "maxItems": 4,
    },
    "points": {
        "type": "array",
        "maxItems": 2,
        "items": obj(x={"type": "integer", "maximum": 50, "minimum": -50}, tag={"enum": ["🎉", "ё"]}),
    },
    "a pair": {"type": "array", "prefixItems": [text(8), {"type": "boolean"}], "items": False, "minItems": 2},
    "a text or a number": {
        "anyOf": [obj(kind={"const": "text"}, value=text(8)), obj(kind={"const": "number"}, value={"type": "integer"})]
    },
    "lists in lists": {
        "$defs": {"list": {"type": "array", "maxItems": 2, "items": {"anyOf": [{"$ref": "#/$defs/list"}, DIGIT]}}},
        "$ref": "#/$defs/list",
    },
    "what may be left out": {
        "type": "object",
        "properties": {"a": {"type": ["string", "null"], "maxLength": 6}, "b": {"type": "boolean"}},
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def answers(server: Server) -> dict[str, list[Any]]:
    """Five answers to each schema, seeds 0 to 4, as many at once as the server runs."""

    def ask(name: str, seed: int) -> Any:
        form: Any = {"name": "form", "schema": SCHEMAS[name], "strict": bool(seed % 2)}
        return asking.chat.completions.create(
            model="avibe",
            messages=user(f"Answer in JSON. Give an example of {name}."),
            response_format={"type": "json_schema", "json_schema": form},
            temperature=1,
            seed=seed,
            max_tokens=80,
        ).choices[0]

    with OpenAI(**options(server, timeout=ANSWER_S)) as asking, ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        asked = {name: [pool.submit(ask, name, seed) for seed in range(5)] for name in SCHEMAS}
        return {name: [each.result() for each in futures] for name, futures in asked.items()}


@pytest.mark.parametrize("name", SCHEMAS)
def test_finished_answers_are_valid(answers: dict[str, list[Any]], name: str) -> None:
    finished = [each.message.content for each in answers[name] if each.finish_reason == "stop"]
    assert finished, answers[name]
    validator = jsonschema.Draft202012Validator(SCHEMAS[name], format_checker=jsonschema.FormatChecker())
    for answer in finished:
        validator.validate(json.loads(answer))


def test_most_answers_come_to_their_end(answers: dict[str, list[Any]]) -> None:
    ends = [each.finish_reason for found in answers.values() for each in found]
    assert len(ends) == 100 and ends.count("stop") >= 80


def test_a_json_object_is_one_without_a_schema(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="avibe",
        messages=user('Answer with {"name": "..."} in JSON.'),
        response_format={"type": "json_object"},
        temperature=0,
        max_tokens=80,
    ).choices[0]
    assert answer.finish_reason == "stop" and isinstance(json.loads(answer.message.content or ""), dict)


# Streams.

#: Raw texts that the model goes on with in kind: characters of several bytes, several tokens, several code points.
BEGINNINGS = [
    "🎉🐱🚲 🎉🐱🚲 🎉🐱🚲 🎉🐱",
    "Ёжик и лось. Ёжик и лось. Ёжик и лось. Ёжик",
    "e\u0301 и\u0306 a\u0308 e\u0301 и\u0306 a\u0308 e\u0301 и\u0306 a\u0308 e\u0301",
    "👩\u200d👩\u200d👧 👨\u200d🚀 👩\u200d👩\u200d👧 👨\u200d🚀 👩\u200d👩\u200d👧",
]


def test_streams_join_to_the_answer_though_tokens_split_characters(server: Server) -> None:
    def ask(index: int) -> bool:
        """Whether a token of the answer was a part of a character."""
        prompt, seed = BEGINNINGS[index % len(BEGINNINGS)], index // len(BEGINNINGS)
        asked: Any = {"model": "avibe", "prompt": prompt, "temperature": 1, "seed": seed, "max_tokens": 24}
        asked["extra_body"] = {"min_tokens": 24}
        whole = asking.completions.create(**asked, logprobs=0).choices[0]
        assert whole.logprobs is not None and whole.logprobs.tokens is not None
        with asking.completions.create(**asked, stream=True) as stream:
            chunks = list(stream)
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text
        assert chunks[-1].choices[0].finish_reason == whole.finish_reason
        return any("\ufffd" in token for token in whole.logprobs.tokens) and "\ufffd" not in whole.text.rstrip("\ufffd")

    with OpenAI(**options(server, timeout=ANSWER_S)) as asking, ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        has_split = list(pool.map(ask, range(3 * len(BEGINNINGS))))
    assert has_split.count(True) >= len(BEGINNINGS), "or this shows nothing"


def test_64_streams_at_once_are_each_whole_and_end_with_usage_and_done(server: Server) -> None:
    """No text lost, doubled or reordered: each is the unstreamed answer of its seed, which came in another batch."""

    def asked(index: int) -> dict[str, Any]:
        messages = user(f"Ёжик 🎉 и\u0306 number {index}")
        return {"model": "avibe", "messages": messages, "temperature": 1, "seed": index, "max_tokens": 10}

    async def stream(client: AsyncOpenAI, index: int) -> tuple[str, Any, Any]:
        raw = client.chat.completions.with_streaming_response
        more: Any = {"stream": True, "stream_options": {"include_usage": True}}
        async with raw.create(**asked(index), **more) as response:
            lines = [line async for line in response.iter_lines() if line.startswith("data: ")]
        assert lines.pop() == "data: [DONE]"
        *chunks, end, usage = [json.loads(line.removeprefix("data: ")) for line in lines]
        assert [len(chunk["choices"]) for chunk in chunks] == [1] * len(chunks) and usage["choices"] == []
        told = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)
        return told, end["choices"][0]["finish_reason"], usage["usage"]["completion_tokens"]

    async def stream_all() -> list[tuple[str, Any, Any]]:
        async with AsyncOpenAI(**options(server, timeout=ANSWER_S)) as client:
            return await asyncio.gather(*(stream(client, index) for index in range(64)))

    def whole(client: OpenAI, index: int) -> tuple[str, Any, Any]:
        answer = client.chat.completions.create(**asked(index))
        assert answer.usage is not None
        return answer.choices[0].message.content or "", answer.choices[0].finish_reason, answer.usage.completion_tokens

    streamed = asyncio.run(stream_all())
    with OpenAI(**options(server, timeout=ANSWER_S)) as client, ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        wholes = list(pool.map(lambda index: whole(client, index), reversed(range(64))))[::-1]
        assert [whole(client, index) for index in (0, 33)] == [wholes[0], wholes[33]], "alone as in a batch"
    assert streamed == wholes
    assert len({told for told, _, _ in streamed}) > 32, "answers that differ, or mixing them up would not show"


# Node.


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
@pytest.mark.skipif(
    not (CLIENTS / "node_modules" / "openai").is_dir(),
    reason="tests/clients/node_modules is missing: `make clients` installs it, with npm",
)
def test_client_for_node(server: Server) -> None:
    answer = {name: describe(SAMPLES["shapes"], name) for name in ("en", "ru")}
    given = {"url": f"http://127.0.0.1:{server.port}/v1", "picture": picture_url("shapes"), "description": answer["en"]}
    result = subprocess.run(
        ["node", "check.mjs"], cwd=CLIENTS, input=json.dumps(given), capture_output=True, text=True, timeout=ANSWER_S
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["models", "chat", "stream", "completions", "error", "picture", "schema", "leave"]
    server.wait(lambda: server.application()["open_requests"] == 0, "the end of the stream that was left")
    assert server.application()["cancelled_requests"] == 1
