"""`/v1`: what OpenAI's clients expect, over the same models, places and limits as our own API.

Models, chat completions, completions, and the tokenizer's two doors. Which parameters are taken is
`models/openai_parsing.py`'s to say; errors get OpenAI's form in `responses.py`.
"""

from __future__ import annotations

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol

from flask import Blueprint, Response, g, jsonify

import bodies
from generation import EventStream, complete_all, stream
from keys import check_model
from models.errors import ModelNotFound
from models.openai_parsing import OpenAIParser, OpenAIRequest
from models.schemas import Completion, FinishReason, ModelName, TokenLogprob
from models.service import ModelService
from models.streaming import Delta, Done, Failed
from models.tool_calls import CallArguments, CallStart, Piece, ToolCallParser
from responses import KEEP_ALIVE, as_web_error, openai_error_body, sse_response

_DONE = b"data: [DONE]\n\n"


def make_blueprint(service: ModelService, parser: OpenAIParser) -> Blueprint:
    bp = Blueprint("openai_api", __name__, url_prefix="/v1")
    created = int(time.time())

    @bp.get("/models")
    def list_models() -> Response:
        """The configured models that the request's key is for."""
        key = g.get("api_key")
        names = [name for name in service.configured_models if key is None or key.models is None or name in key.models]
        return jsonify({"object": "list", "data": [describe(name) for name in names]})

    @bp.get("/models/<name>")
    def show_model(name: str) -> Response:
        model = next((each for each in service.configured_models if each == name), None)
        if model is None:
            raise ModelNotFound("model: there is no such model", field="model")
        check_model(model)
        return jsonify(describe(model))

    def describe(name: ModelName) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": created, "owned_by": "avito"}

    def check(model: ModelName) -> None:
        """:raise ModelNotFound: the operator did not set this model up.
        :raise WebError: the request's key is not for it.
        """
        if model not in service.configured_models:
            raise ModelNotFound(f"model: {model} is not configured on this server", field="model")
        check_model(model)

    @bp.post("/chat/completions")
    def complete_chat() -> Response:
        """Answer a chat."""
        asked = parser.parse_chat(bodies.read_json())
        check(asked.model)
        return _answer(service, asked, _ChatForm(asked))

    @bp.post("/completions")
    def complete_text() -> Response:
        """Go on with a text."""
        asked = parser.parse_completion(bodies.read_json())
        check(asked.model)
        return _answer(service, asked, _TextForm(asked))

    @bp.post("/tokenize")
    def tokenize() -> Response:
        """The token ids of a text or a chat, as a request with it would have them."""
        asked = parser.parse_tokenize(bodies.read_json())
        check(asked.prompt.model)
        ids = service.tokenize(asked.prompt)
        texts = service.token_texts(asked.prompt.model, ids) if asked.has_token_texts else None
        return jsonify(
            {
                "count": len(ids),
                "max_model_len": service.context_tokens(asked.prompt.model),
                "tokens": ids,
                "token_strs": texts,
            }
        )

    @bp.post("/detokenize")
    def detokenize() -> Response:
        """The text of token ids, special ones too."""
        asked = parser.parse_detokenize(bodies.read_json())
        check(asked.model)
        return jsonify({"prompt": service.detokenize(asked.model, asked.ids)})

    return bp


def _answer(service: ModelService, asked: OpenAIRequest, form: _Form) -> Response:
    if asked.is_streamed:
        events = stream(service, asked.prompts, asked.num_choices)
        response = sse_response(_frames(events, asked, form), is_demo=events.is_demo)
        response.call_on_close(events.close)
        return response
    completions = complete_all(service, asked.prompts, asked.num_choices)
    choices = [form.choice(index, completion) for index, completion in enumerate(completions)]
    input_tokens = sum(completion.input_tokens for completion in completions[:: asked.num_choices])
    usage = _usage(input_tokens, completions, asked.num_choices)
    response = jsonify(form.body(form.whole_object, choices) | {"usage": usage})
    if completions[0].is_demo:
        response.headers["X-Avito-Demo"] = "1"
    return response


def _frames(events: EventStream, asked: OpenAIRequest, form: _Form) -> Iterator[bytes]:
    """The answers as chunks, then the usage if it was asked for, then `[DONE]`; an error ends them."""
    # With include_usage each chunk has the field, empty until the last.
    extra: dict[str, Any] = {"usage": None} if asked.includes_usage else {}
    completions: dict[int, Completion] = {}
    states = [form.begin(index) for index in range(len(asked.prompts) * asked.num_choices)]

    def chunk(choices: Sequence[Mapping[str, Any]]) -> bytes:
        return _data(form.body(form.chunk_object, choices) | extra)

    for each in events:
        if each is None:
            yield KEEP_ALIVE
            continue
        index, event = each
        choices: list[dict[str, Any]] = []
        if not isinstance(event, Failed):
            try:
                choices = states[index].chunks(event)
            except Exception as failure:  # the headers are out: only the stream itself can still tell
                _, event = events.fail(failure)
        if isinstance(event, Failed):
            yield _data(openai_error_body(as_web_error(event.error))) + _DONE
            return
        if isinstance(event, Done):
            completions[index] = event.completion
        if choices:
            yield b"".join(chunk([choice]) for choice in choices)
    if len(completions) < len(states):
        return  # the client has left
    if asked.includes_usage:
        ordered = [completions[index] for index in range(len(states))]
        usage = _usage(events.input_tokens, ordered, asked.num_choices)
        yield _data(form.body(form.chunk_object, []) | {"usage": usage})
    yield _DONE


def _data(body: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


def _usage(input_tokens: int, completions: Sequence[Completion], num_choices: int) -> dict[str, Any]:
    """The engine's counts; of several answers to a prompt, the prompt counts once."""
    generated = sum(completion.generated_tokens for completion in completions)
    return {
        "prompt_tokens": input_tokens,
        "completion_tokens": generated,
        "total_tokens": input_tokens + generated,
        "prompt_tokens_details": {"cached_tokens": sum(each.cached_tokens for each in completions[::num_choices])},
    }


class _Form(ABC):
    """How one door words its answers."""

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, asked: OpenAIRequest) -> None:
        self.asked = asked
        self._id = f"{self.prefix}-{g.exchange.request_id}"
        self._created = int(time.time())

    def body(self, kind: str, choices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self.asked.model,
            "choices": choices,
        }

    @abstractmethod
    def choice(self, index: int, completion: Completion) -> dict[str, Any]:
        """A whole answer."""

    @abstractmethod
    def begin(self, index: int) -> _Streamed:
        """For the chunks of one answer."""


class _Streamed(Protocol):
    """One answer's way into chunks."""

    def chunks(self, event: Delta | Done) -> list[dict[str, Any]]:
        """What an event gives: choices, one for each chunk."""


class _ChatForm(_Form):
    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def tool_parser(self) -> ToolCallParser | None:
        return ToolCallParser(is_certain=self.asked.has_certain_calls) if self.asked.has_tools else None

    def choice(self, index: int, completion: Completion) -> dict[str, Any]:
        parser = self.tool_parser()
        pieces: list[Piece] = [completion.text]
        if parser is not None:
            pieces = parser.add(completion.text) + parser.flush()
        message: dict[str, Any] = {"role": "assistant", "content": "".join(p for p in pieces if isinstance(p, str))}
        calls: list[dict[str, Any]] = []
        for piece in pieces:
            if isinstance(piece, CallStart):
                calls.append(_call(piece.name))
            elif isinstance(piece, CallArguments):
                calls[-1]["function"]["arguments"] += piece.text
        if calls:
            message = {"role": "assistant", "content": message["content"] or None, "tool_calls": calls}
        return {
            "index": index,
            "message": message,
            "logprobs": self.logprobs(completion.logprobs),
            "finish_reason": _finish_reason(completion.finish_reason, parser),
        }

    def begin(self, index: int) -> _Streamed:
        return _StreamedChat(index, self)

    def logprobs(self, found: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self.asked.prompts[0].sampling.num_logprobs is None:
            return None
        return {"content": [_token(each.token, each.logprob) | {"top_logprobs": _top(each)} for each in found]}


class _StreamedChat:
    def __init__(self, index: int, form: _ChatForm) -> None:
        self._index = index
        self._form = form
        self._parser = form.tool_parser()
        self._has_begun = False
        self._num_told = -1  # index of the newest call

    def chunks(self, event: Delta | Done) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        if not self._has_begun:
            self._has_begun = True
            deltas.append({"role": "assistant", "content": ""})
        if isinstance(event, Delta):
            pieces: list[Piece] = [event.text] if self._parser is None else self._parser.add(event.text)
            deltas += [self._delta(piece) for piece in pieces]
            choices = [self._choice(delta) for delta in deltas]
            if event.logprobs:
                choices = choices or [self._choice({})]
                choices[-1]["logprobs"] = self._form.logprobs(event.logprobs)
            return choices
        deltas += [self._delta(piece) for piece in self._parser.flush()] if self._parser is not None else []
        end = self._choice({}, _finish_reason(event.completion.finish_reason, self._parser))
        return [*(self._choice(delta) for delta in deltas), end]

    def _choice(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        return {"index": self._index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}

    def _delta(self, piece: Piece) -> dict[str, Any]:
        if isinstance(piece, str):
            return {"content": piece}
        assert self._parser is not None
        if isinstance(piece, CallStart):
            self._num_told += 1
            return {"tool_calls": [{"index": self._num_told} | _call(piece.name)]}
        return {"tool_calls": [{"index": self._num_told, "function": {"arguments": piece.text}}]}


class _TextForm(_Form):
    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def choice(self, index: int, completion: Completion) -> dict[str, Any]:
        return {
            "index": index,
            "text": completion.text,
            "logprobs": self.logprobs(completion.logprobs, 0),
            "finish_reason": completion.finish_reason,
        }

    def begin(self, index: int) -> _Streamed:
        return _StreamedText(index, self)

    def logprobs(self, found: Sequence[TokenLogprob], offset: int) -> dict[str, Any] | None:
        """:param offset: characters of the answer before these tokens."""
        if self.asked.prompts[0].sampling.num_logprobs is None:
            return None
        texts = [_text(each.token) for each in found]
        offsets = list(accumulate(map(len, texts), initial=offset))[:-1]
        return {
            "tokens": texts,
            "token_logprobs": [_finite(each.logprob) for each in found],
            "top_logprobs": [{_text(token): _finite(logprob) for token, logprob in each.top} for each in found],
            "text_offset": offsets,
        }


class _StreamedText:
    def __init__(self, index: int, form: _TextForm) -> None:
        self._index = index
        self._form = form
        self._offset = 0

    def chunks(self, event: Delta | Done) -> list[dict[str, Any]]:
        if isinstance(event, Delta):
            logprobs = self._form.logprobs(event.logprobs, self._offset)
            self._offset += sum(len(_text(each.token)) for each in event.logprobs)
            return [self._choice(event.text, logprobs)]
        return [self._choice("", None, event.completion.finish_reason)]

    def _choice(self, text: str, logprobs: Any, finish_reason: str | None = None) -> dict[str, Any]:
        return {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def _call(name: str) -> dict[str, Any]:
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": {"name": name, "arguments": ""}}


def _finish_reason(reason: FinishReason, parser: ToolCallParser | None) -> str:
    return "tool_calls" if reason == "stop" and parser is not None and parser.num_calls else reason


def _text(token: bytes) -> str:
    """A part of a character shows as U+FFFD."""
    return token.decode(errors="replace")


def _token(token: bytes, logprob: float) -> dict[str, Any]:
    return {"token": _text(token), "logprob": _finite(logprob), "bytes": list(token)}


def _finite(logprob: float) -> float:
    """JSON has no -Infinity, which is what a token of probability 0 has; OpenAI says -9999."""
    return max(logprob, -9999.0)


def _top(found: TokenLogprob) -> list[dict[str, Any]]:
    return [_token(token, logprob) for token, logprob in found.top]
