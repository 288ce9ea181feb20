"""How to ask our own API and OpenAI's, and how to read their answers: whole, or as server-sent events.

Finds out what a server takes: a field that it refuses (`ignore_eos` is an extension) is left out, a server that does
not stream is asked for whole answers, and each such thing is noted. How fast it answers is for others to say.
"""

from __future__ import annotations

import base64
import json
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from bench.client import Client, Finished, Job, SseParser
from bench.inputs import WORDS, make_picture, make_prompt
from bench.report import Unable

Api = Literal["auto", "avito", "openai", "openai-completions"]
APIS: tuple[Api, ...] = ("auto", "avito", "openai", "openai-completions")
_MAX_PROBES = 8
_MAX_CALIBRATIONS = 8


@dataclass(frozen=True)
class Demand:
    """What each request of a load asks for."""

    answer_tokens: int
    temperature: float = 0.0
    picture_px: tuple[int, int] | None = None  # width, height


class AnswerReader(ABC):
    """Takes in one answer. Times are readings of `time.perf_counter`.

    `arrivals_s` has a time for each read from the network that brought text: deltas that came in one piece of the
    stream reached the user at once. `last_token_s` is when the server said that the answer was generated.
    """

    def __init__(self) -> None:
        self.arrivals_s: list[float] = []
        self.last_token_s: float | None = None
        self.num_deltas = 0
        self.input_tokens: int | None = None
        self.output_tokens: int | None = None
        self.is_counted_by_deltas = False  # the server named no number of tokens
        self.failure: str | None = None
        self.is_complete = False

    @abstractmethod
    def feed(self, data: bytes, now_s: float) -> None: ...

    @abstractmethod
    def finish(self) -> None:
        """The answer has been received."""

    def first_token_s(self, started_s: float) -> float | None:
        """Seconds from the request's start to its first token."""
        return self.arrivals_s[0] - started_s if self.arrivals_s else None

    def per_token_s(self, started_s: float) -> float | None:
        """Mean seconds for each token after the first."""
        if not self.arrivals_s or self.last_token_s is None or (self.output_tokens or 0) < 2:
            return None
        return (self.last_token_s - self.arrivals_s[0]) / ((self.output_tokens or 0) - 1)

    def _arrive(self, now_s: float) -> None:
        self.num_deltas += 1
        if not self.arrivals_s or self.arrivals_s[-1] != now_s:
            self.arrivals_s.append(now_s)


class _Stream(AnswerReader):
    def __init__(self) -> None:
        super().__init__()
        self._parser = SseParser()

    def feed(self, data: bytes, now_s: float) -> None:
        for event in self._parser.feed(data):
            self._take(event.name, event.data, now_s)

    @abstractmethod
    def _take(self, name: str, data: bytes, now_s: float) -> None: ...

    def finish(self) -> None:
        if self.failure is None and not self.is_complete:
            self.failure = "stream: ended before it was complete"


class AvitoStream(_Stream):
    """Events `delta` (text), then `done` (the whole success body) or `error`."""

    def _take(self, name: str, data: bytes, now_s: float) -> None:
        if name == "delta":  # not parsed: 128 streams on one core leave no time for what nobody reads
            self._arrive(now_s)
        elif name == "done":
            _take_success(self, _parse(data))
            self.last_token_s = now_s
        elif name == "error":
            self.failure = f"stream: {_error_code(_parse(data))}"


class AvitoWhole(AnswerReader):
    """A success body; the server's own clock says when the first token was there."""

    def __init__(self) -> None:
        super().__init__()
        self._body = b""
        self._metrics: Mapping[str, Any] = {}

    def feed(self, data: bytes, now_s: float) -> None:
        self._body += data

    def finish(self) -> None:
        body = _parse(self._body)
        _take_success(self, body)
        self._metrics = body.get("metrics") or {}

    def first_token_s(self, started_s: float) -> float | None:
        seconds = self._metrics.get("time_to_first_token")
        return None if seconds is None else float(seconds)

    def per_token_s(self, started_s: float) -> float | None:
        first, total = self._metrics.get("time_to_first_token"), self._metrics.get("total_time")
        if first is None or total is None or (self.output_tokens or 0) < 2:
            return None
        return (float(total) - float(first)) / ((self.output_tokens or 0) - 1)


def _take_success(reader: AnswerReader, body: Mapping[str, Any]) -> None:
    data = body.get("data")
    if body.get("success") is not True or not isinstance(data, dict):
        reader.failure = "answer: not a success body"
        return
    reader.input_tokens, reader.output_tokens = data.get("input_tokens"), data.get("generated_tokens")
    reader.is_complete = True


class OpenAIStream(_Stream):
    """Chunks of a chat or text completion, then `[DONE]`. A chunk that only names the role is no token yet.

    A reason to finish completes an answer too: `transformers serve` never says `[DONE]`.
    """

    def __init__(self, is_chat: bool) -> None:
        super().__init__()
        self._is_chat = is_chat

    def _take(self, name: str, data: bytes, now_s: float) -> None:
        if data == b"[DONE]":
            self.is_complete = True
            return
        chunk = _parse(data)
        if name == "error" or "error" in chunk or not chunk:
            self.failure = f"stream: {_error_code(chunk)}"
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            has_text = not self._is_chat or any(delta.get(key) for key in ("content", "reasoning_content", "reasoning"))
            if has_text:
                self._arrive(now_s)
            if has_text or choice.get("finish_reason"):
                self.last_token_s = now_s
            if choice.get("finish_reason"):
                self.is_complete = True
        if chunk.get("usage"):
            _take_usage(self, chunk["usage"])

    def finish(self) -> None:
        super().finish()
        if self.output_tokens is None:
            self.output_tokens, self.is_counted_by_deltas = self.num_deltas, True


class OpenAIWhole(AnswerReader):
    """A whole completion: nothing in it tells when the first token was there."""

    def __init__(self) -> None:
        super().__init__()
        self._body = b""

    def feed(self, data: bytes, now_s: float) -> None:
        self._body += data

    def finish(self) -> None:
        body = _parse(self._body)
        if not body.get("choices"):
            self.failure = "answer: no completion"
            return
        _take_usage(self, body.get("usage") or {})
        self.is_complete = True


def _take_usage(reader: AnswerReader, usage: Mapping[str, Any]) -> None:
    reader.input_tokens, reader.output_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")


def _parse(data: bytes) -> dict[str, Any]:
    """A JSON object; an empty one for anything else."""
    try:
        value = json.loads(data)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _error_code(body: Mapping[str, Any]) -> str:
    """The stable code in an error body of ours or of OpenAI's shape, or something short in its place."""
    error = body.get("error", body)
    if not isinstance(error, dict):
        return str(error)[:60]
    return str(error.get("code") or error.get("type") or error.get("message") or "error")[:60]


def failure_of(finished: Finished) -> str | None:
    """Why a request failed, in words to count by; None for an answer that is complete. Calls the reader's `finish`."""
    reader = finished.job.reader
    assert isinstance(reader, AnswerReader)
    if finished.error is not None:
        return finished.error
    if finished.status != 200:
        code = _error_code(_parse(finished.body)) if finished.body.lstrip().startswith(b"{") else ""
        return f"{finished.status} {code}".strip().removesuffix(f" {finished.status}")
    reader.finish()
    return reader.failure


class Target(ABC):
    """One server and how it wants to be asked. `probe` it before `job`.

    :param model: its name there; None: the first that the server lists, if it lists any.
    :param key: sent as a bearer token; empty: none.
    """

    api: str
    # Left out where a server refuses them, in this order.
    optional_fields: tuple[str, ...]

    def __init__(self, client: Client, url: str, model: str | None, key: str, is_streamed: bool) -> None:
        self.client = client
        self.url = url
        self.model = model
        self.is_streamed = is_streamed
        self.notes: list[str] = []
        self.num_words = 1
        self._key = key
        self._dropped: set[str] = set()

    @abstractmethod
    def path(self, demand: Demand) -> str: ...

    @abstractmethod
    def fields(self, prompt: str, picture: bytes | None, demand: Demand) -> dict[str, Any]: ...

    @abstractmethod
    def reader(self) -> AnswerReader: ...

    def turn_to(self, demand: Demand, finished: Finished) -> bool:
        """Another way to ask after this refusal, if there is one."""
        return False

    def job(self, dice: random.Random, demand: Demand, prompt: str | None = None) -> Job:
        """A request like no other: prompt and picture come from the dice. :param prompt: this one instead."""
        prompt = make_prompt(dice, self.num_words) if prompt is None else prompt
        picture = make_picture(dice, *demand.picture_px) if demand.picture_px else None
        fields = {k: v for k, v in self.fields(prompt, picture, demand).items() if k not in self._dropped}
        return Job(request_bytes(self.client, self.path(demand), self._key, fields), self.reader())

    def probe(self, dice: random.Random, demand: Demand, prompt_tokens: int) -> None:
        """Find out what the server takes, and how many of our words are `prompt_tokens` of its tokens.

        What is there without any word, such as a chat template, counts; the tokens of a picture do not.

        :raise Unable: it does not answer, or refuses a plain request too.
        """
        short = Demand(min(2, demand.answer_tokens), demand.temperature, demand.picture_px)
        one = self._ask_until_taken(dice, short, WORDS[0]).input_tokens
        # All words in turn, in prompts that are surely no longer than what was asked for.
        words = dice.sample(WORDS, len(WORDS))
        size = max(2, prompt_tokens // 4)
        num_words = num_tokens = 0
        for start in range(0, min(len(words), size * _MAX_CALIBRATIONS), size):
            part = words[start : start + size]
            many = self._ask_until_taken(dice, short, " ".join(part)).input_tokens
            if one is None or many is None or (many <= one and len(part) > 1):
                self.num_words = max(1, prompt_tokens // 2)
                self._note("it reports no prompt tokens: two for each word are assumed")
                return
            num_words += len(part) - 1
            num_tokens += many - one
        per_word = num_tokens / num_words
        fixed = 0.0 if demand.picture_px or one is None else max(0.0, one - per_word)
        self.num_words = max(1, round((prompt_tokens - fixed) / per_word))

    def _ask_until_taken(self, dice: random.Random, demand: Demand, prompt: str) -> AnswerReader:
        for _ in range(_MAX_PROBES):
            finished = self.client.ask(self.job(dice, demand, prompt))
            failure = failure_of(finished)
            reader = finished.job.reader
            assert isinstance(reader, AnswerReader)
            if failure is None:
                return reader
            is_stream = "event-stream" in finished.headers.get("content-type", "")
            if self.is_streamed and finished.status == 200 and not is_stream:
                self._stop_streaming()
            elif not (self.turn_to(demand, finished) or self._drop_field(finished)):
                detail = finished.body.decode(errors="replace")[:300]
                raise Unable(f"{self.url} does not answer a plain request: {failure}{': ' if detail else ''}{detail}")
        raise Unable(f"{self.url} refused {_MAX_PROBES} ways of asking, the last with: {failure}")

    def _drop_field(self, finished: Finished) -> bool:
        """Leave out a field that is refused: the one that is named, else the first that not every server knows."""
        if finished.status not in (400, 422):
            return False
        error = _parse(finished.body).get("error")
        named = (error.get("field") or error.get("param")) if isinstance(error, dict) else None
        if self.is_streamed and named == "stream":
            self._stop_streaming()
            return True
        left = [field for field in self.optional_fields if field not in self._dropped]
        text = finished.body.decode(errors="replace")
        candidates = [field for field in left if named == field or re.search(rf"\b{field}\b", text)] or left
        if not candidates or named in ("prompt", "max_tokens", "image", "model", "messages"):
            return False
        self.leave_out(candidates[0])
        self._note(f"it refuses {candidates[0]}, which is left out")
        return True

    def leave_out(self, field: str) -> None:
        """Never send this field."""
        self._dropped.add(field)

    def _stop_streaming(self) -> None:
        self.is_streamed = False
        self._note("it does not stream: whole answers are measured")

    def _note(self, text: str) -> None:
        note = f"{self.url}: {text}"
        if note not in self.notes:
            self.notes.append(note)


class AvitoTarget(Target):
    """Our own API: one door for text, one for pictures."""

    api = "avito"
    optional_fields = ("ignore_eos",)

    def path(self, demand: Demand) -> str:
        return "/api/v1/image/analyze" if demand.picture_px else "/api/v1/text/generate"

    def fields(self, prompt: str, picture: bytes | None, demand: Demand) -> dict[str, Any]:
        fields: dict[str, Any] = {"prompt": prompt}
        if picture is not None:
            fields["image"] = base64.b64encode(picture).decode()
        fields |= {"max_tokens": demand.answer_tokens, "temperature": demand.temperature, "ignore_eos": True}
        return fields | ({"stream": True} if self.is_streamed else {})

    def reader(self) -> AnswerReader:
        return AvitoStream() if self.is_streamed else AvitoWhole()


class OpenAITarget(Target):
    """Any server that speaks OpenAI's API; chat completions unless it has none or is told otherwise."""

    api = "openai"
    optional_fields = ("ignore_eos", "stream_options")

    def __init__(
        self, client: Client, url: str, model: str | None, key: str, is_streamed: bool, is_chat: bool = True
    ) -> None:
        super().__init__(client, url, model, key, is_streamed)
        self._is_chat = is_chat

    def path(self, demand: Demand) -> str:
        return "/v1/chat/completions" if self._is_chat else "/v1/completions"

    def fields(self, prompt: str, picture: bytes | None, demand: Demand) -> dict[str, Any]:
        fields: dict[str, Any] = {} if self.model is None else {"model": self.model}
        if self._is_chat:
            content: Any = prompt
            if picture is not None:
                url = "data:image/png;base64," + base64.b64encode(picture).decode()
                content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": prompt}]
            fields["messages"] = [{"role": "user", "content": content}]
        else:
            fields["prompt"] = prompt
        fields |= {"max_tokens": demand.answer_tokens, "temperature": demand.temperature, "ignore_eos": True}
        return fields | ({"stream": True, "stream_options": {"include_usage": True}} if self.is_streamed else {})

    def reader(self) -> AnswerReader:
        return OpenAIStream(self._is_chat) if self.is_streamed else OpenAIWhole()

    def turn_to(self, demand: Demand, finished: Finished) -> bool:
        is_chatless = finished.status in (404, 405) or b"chat template" in finished.body.lower()
        if not self._is_chat or demand.picture_px or not is_chatless:
            return False
        self._is_chat = False
        self._note("it has no chat completions: /v1/completions is asked")
        return True


def find_target(client: Client, url: str, api: Api, model: str | None, key: str, is_streamed: bool) -> Target:
    """The server at this address in its dialect. :raise Unable: nobody answers there, or in no dialect we know."""
    if api == "auto":
        api = _detect(client, url, key)
    if api == "avito":
        return AvitoTarget(client, url, model, key, is_streamed)
    if model is None:
        listed = get_json(client, "/v1/models", key).get("data") or [{}]
        model = listed[0].get("id")
    return OpenAITarget(client, url, model, key, is_streamed, is_chat=api == "openai")


def _detect(client: Client, url: str, key: str) -> Api:
    if "engine" in get_json(client, "/api/health/live", key):
        return "avito"
    if "data" in get_json(client, "/v1/models", key):
        return "openai"
    raise Unable(f"{url} answers, but neither like Avito AI API nor like OpenAI's: say which with --api")


class _Body(AnswerReader):
    def __init__(self) -> None:
        super().__init__()
        self.body = b""

    def feed(self, data: bytes, now_s: float) -> None:
        self.body += data

    def finish(self) -> None:
        self.is_complete = True


def get_json(client: Client, path: str, key: str = "") -> dict[str, Any]:
    """What is at `path`; an empty object for anything but a JSON object. :raise Unable: nobody answers."""
    return _parse(_get(client, path, key))


def get_text(client: Client, path: str, key: str = "") -> str:
    """What is at `path`. :raise Unable: nobody answers."""
    return _get(client, path, key).decode(errors="replace")


def _get(client: Client, path: str, key: str) -> bytes:
    reader = _Body()
    finished = client.ask(Job(request_bytes(client, path, key, None), reader))
    if finished.error is not None:
        raise Unable(f"http://{client.host}{client.prefix}{path} does not answer: {finished.error}")
    return reader.body or finished.body


def request_bytes(client: Client, path: str, key: str, fields: Mapping[str, Any] | None) -> bytes:
    """A whole request: POST with these fields as JSON, GET without any."""
    method = "GET" if fields is None else "POST"
    lines = [f"{method} {client.prefix}{path} HTTP/1.1", f"Host: {client.host}", "Accept: */*"]
    if key:
        lines.append(f"Authorization: Bearer {key}")
    body = b""
    if fields is not None:
        body = json.dumps(fields, ensure_ascii=False).encode()
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body
