"""The part of `/openapi.json` about `/v1`: requests from the models that validate them, answers in OpenAI's form."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from models.openai_parsing import NEUTRAL_VALUES, OpenAIParser
from models.schemas import MODEL_NAMES
from openapi_parts import (
    COUNT,
    EVENTS,
    JSON,
    NUMBER,
    OPTIONAL_KEY,
    STRING,
    Schema,
    answer,
    array,
    errors,
    nullable,
    object_of,
    operation,
    ref,
)
from responses import OPENAI_ERROR_TYPES, STATUS_BY_CODE

_TAG = "openai"
_REFS = "#/components/schemas/"
# Under /v1 a model that is not configured is one that there is not.
_ELSEWHERE = frozenset({"model_not_configured", "method_not_allowed"})
_REFUSALS = ("400", "401", "403", "404", "413", "415", "429", "500", "503")
_CREATED, _ID = 1790000000, "2f1c9c1e-0d6b-4d0b-9a55-3f6c1e1f7a10"
_MODEL: Schema = {"enum": list(MODEL_NAMES)}

_MODEL_EXAMPLE = {"id": "avibe", "object": "model", "created": _CREATED, "owned_by": "avito"}
_CHAT_EXAMPLE = {
    "model": "avibe",
    "messages": [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "What is the capital of France?"},
    ],
    "temperature": 0,
    "max_tokens": 16,
}
_USAGE_EXAMPLE = {
    "prompt_tokens": 24,
    "completion_tokens": 2,
    "total_tokens": 26,
    "prompt_tokens_details": {"cached_tokens": 16},
}
_CHAT_ANSWER_EXAMPLE = {
    "id": f"chatcmpl-{_ID}",
    "object": "chat.completion",
    "created": _CREATED,
    "model": "avibe",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Paris"},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ],
    "usage": _USAGE_EXAMPLE,
}
_TEXT_EXAMPLE = {"model": "avibe", "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
_TEXT_ANSWER_EXAMPLE = {
    "id": f"cmpl-{_ID}",
    "object": "text_completion",
    "created": _CREATED,
    "model": "avibe",
    "choices": [{"index": 0, "text": " Paris.", "logprobs": None, "finish_reason": "stop"}],
    "usage": _USAGE_EXAMPLE,
}
_TOKENIZE_EXAMPLE = {"model": "avibe", "prompt": "Hi", "return_token_strs": True}
_TOKENS_EXAMPLE = {"count": 2, "max_model_len": 16384, "tokens": [72, 105], "token_strs": ["H", "i"]}
_DETOKENIZE_EXAMPLE = {"model": "avibe", "tokens": [72, 105]}


def paths() -> dict[str, Any]:
    name = {"name": "name", "in": "path", "required": True, "schema": _MODEL}
    models_example = {"object": "list", "data": [_MODEL_EXAMPLE]}
    return {
        "/v1/models": {
            "get": _reading(
                "listModels", "The models that are set up, and that the key is for", "Models", models_example
            )
        },
        "/v1/models/{name}": {
            "get": _reading("showModel", "One of the models", "Model", _MODEL_EXAMPLE, "404") | {"parameters": [name]}
        },
        "/v1/chat/completions": {
            "post": _asking(
                "createChatCompletion",
                "Answer a chat, one with pictures with Avision",
                ("ChatCompletionRequest", _CHAT_EXAMPLE),
                ("ChatCompletion", _CHAT_ANSWER_EXAMPLE),
                "ChatCompletionEvent",
            )
        },
        "/v1/completions": {
            "post": _asking(
                "createCompletion",
                "Go on with a text, without a chat template",
                ("CompletionRequest", _TEXT_EXAMPLE),
                ("TextCompletion", _TEXT_ANSWER_EXAMPLE),
                "TextCompletionEvent",
            )
        },
        "/v1/tokenize": {
            "post": _asking(
                "tokenize",
                "The token ids of a text or a chat",
                ("TokenizeRequest", _TOKENIZE_EXAMPLE),
                ("Tokens", _TOKENS_EXAMPLE),
            )
        },
        "/v1/detokenize": {
            "post": _asking(
                "detokenize",
                "The text of token ids",
                ("DetokenizeRequest", _DETOKENIZE_EXAMPLE),
                ("Detokenized", {"prompt": "Hi"}),
            )
        },
    }


def _reading(name: str, summary: str, schema: str, example: object, *statuses: str) -> dict[str, Any]:
    success = {"200": answer("Success", ref(schema), example=example)}
    refusals = _errors("401", "403", *statuses, "429")
    return operation(name, _TAG, summary, success | refusals) | OPTIONAL_KEY


def _asking(
    name: str, summary: str, asked: tuple[str, object], answered: tuple[str, object], event: str | None = None
) -> dict[str, Any]:
    """:param asked, answered: schema and example. :param event: the schema of a stream's events, if it generates."""
    success = answer("Success", ref(answered[0]), *(["X-Avito-Demo"] if event else []), example=answered[1])
    if event:
        success["content"][EVENTS] = {"schema": ref(event)}
    refusals = _errors(*_REFUSALS, *(["504"] if event else []))
    content = {JSON: {"schema": ref(asked[0]), "example": asked[1]}}
    return operation(name, _TAG, summary, {"200": success} | refusals, content) | OPTIONAL_KEY


def _errors(*statuses: str) -> dict[str, Any]:
    return errors(statuses, ref("OpenAIError"), without=_ELSEWHERE)


def schemas(parser: OpenAIParser) -> dict[str, Schema]:
    found: dict[str, Schema] = {}
    for model in (parser.chat_body, parser.completion_body, parser.tokenize_body, parser.detokenize_body):
        found |= _request_schemas(model)
    for name in ("ChatCompletionRequest", "CompletionRequest"):
        found[name]["properties"] |= _neutral_fields(found[name])
        found[name]["allOf"] = [_unless("stream_options", {"type": "null"}, "stream")]
    found["ChatCompletionRequest"]["allOf"].append(_unless("top_logprobs", {"enum": [None, 0]}, "logprobs"))
    found["TokenizeRequest"]["oneOf"] = [
        {"required": ["prompt"], "properties": {"prompt": {"type": "string"}}},
        {"required": ["messages"], "properties": {"messages": {"type": "array"}}},
    ]
    return found | _answer_schemas()


def _request_schemas(model: type[BaseModel]) -> dict[str, Schema]:
    """A body and the parts of it, each under its own name: what Pydantic says, and that `null` counts as absent."""
    body = model.model_json_schema(ref_template=_REFS + "{model}")
    parts: dict[str, Schema] = body.pop("$defs", {})
    return {name.lstrip("_"): _described(schema) for name, schema in {model.__name__: body, **parts}.items()}


def _described(schema: Schema) -> Schema:
    """An object of ours. Other fields than these are errors, unless they are null."""
    fields = {name: _without_titles(field) for name, field in schema["properties"].items()}
    for name, field in fields.items():
        if name not in schema.get("required", ()) and {"type": "null"} not in field.get("anyOf", ()):
            fields[name] = _or_null(field)
    rest = {key: value for key, value in schema.items() if key != "title"}
    return rest | {"additionalProperties": {"type": "null"}, "properties": fields}


def _or_null(field: Schema) -> Schema:
    """What tells about a field stays where readers look for it."""
    told = {key: field[key] for key in ("description", "default") if key in field}
    value = {key: each for key, each in field.items() if key not in told}
    if list(value) == ["anyOf"]:
        return {"anyOf": [*value["anyOf"], {"type": "null"}]} | told
    return nullable(value) | told


def _without_titles(value: Any) -> Any:
    """Pydantic's titles repeat names; references lose the mark of a private class."""
    if isinstance(value, list):
        return [_without_titles(each) for each in value]
    if not isinstance(value, dict):
        return value
    found = {key: _without_titles(each) for key, each in value.items() if key != "title"}
    if "$ref" in found:
        found["$ref"] = _REFS + found["$ref"].removeprefix(_REFS).lstrip("_")
    return found


def _neutral_fields(schema: Schema) -> dict[str, Schema]:
    told = "Only this value, which changes nothing."
    return {
        name: nullable({"const": value}) | {"description": told}
        for name, value in NEUTRAL_VALUES.items()
        if name not in schema["properties"]
    }


def _unless(name: str, neutral: Schema, switch: str) -> Schema:
    """A field has a neutral value, or is absent, unless another is true."""
    return {"anyOf": [{"properties": {name: neutral}}, {"required": [switch], "properties": {switch: {"const": True}}}]}


def _answer_schemas() -> dict[str, Schema]:
    token = object_of(
        {"token": STRING, "logprob": NUMBER, "bytes": array({"type": "integer", "minimum": 0, "maximum": 255})}
    )
    chat_logprobs = nullable(
        object_of({"content": array({"allOf": [token, object_of({"top_logprobs": array(token)})]})})
    )
    text_logprobs = nullable(
        object_of(
            {
                "tokens": array(STRING),
                "token_logprobs": array(NUMBER),
                "top_logprobs": array({"type": "object", "additionalProperties": NUMBER}),
                "text_offset": array(COUNT),
            }
        )
    )
    function = object_of({"name": STRING, "arguments": {**STRING, "contentMediaType": JSON}})
    call = object_of({"id": STRING, "type": {"const": "function"}, "function": function})
    message = object_of({"role": {"const": "assistant"}, "content": nullable(STRING)}, tool_calls=array(call))
    delta = object_of(
        {},
        role={"const": "assistant"},
        content=STRING,
        tool_calls=array(
            object_of(
                {"index": COUNT, "function": object_of({"arguments": STRING}, name=STRING)},
                id=STRING,
                type={"const": "function"},
            )
        ),
    )
    chat_reason, text_reason = {"enum": ["stop", "length", "tool_calls"]}, {"enum": ["stop", "length"]}
    chat_choice = object_of(
        {"index": COUNT, "message": message, "logprobs": chat_logprobs, "finish_reason": chat_reason}
    )
    chunk_choice = object_of(
        {"index": COUNT, "delta": delta, "logprobs": chat_logprobs, "finish_reason": nullable(chat_reason)}
    )
    text_choice = object_of({"index": COUNT, "text": STRING, "logprobs": text_logprobs, "finish_reason": text_reason})
    text_chunk_choice = object_of(
        {"index": COUNT, "text": STRING, "logprobs": text_logprobs, "finish_reason": nullable(text_reason)}
    )
    usage = ref("Usage")
    return {
        "Model": object_of({"id": _MODEL, "object": {"const": "model"}, "created": COUNT, "owned_by": STRING}),
        "Models": object_of({"object": {"const": "list"}, "data": array(ref("Model"))}),
        "Usage": object_of(
            {
                "prompt_tokens": COUNT,
                "completion_tokens": COUNT,
                "total_tokens": COUNT,
                "prompt_tokens_details": object_of({"cached_tokens": COUNT}),
            }
        ),
        "ChatCompletion": _completion("chat.completion", chat_choice, usage=usage),
        "ChatCompletionChunk": _chunk("chat.completion.chunk", chunk_choice),
        "ChatCompletionEvent": _event("ChatCompletionChunk"),
        "TextCompletion": _completion("text_completion", text_choice, usage=usage),
        "TextCompletionChunk": _chunk("text_completion", text_chunk_choice),
        "TextCompletionEvent": _event("TextCompletionChunk"),
        "Tokens": object_of(
            {
                "count": COUNT,
                "max_model_len": COUNT,
                "tokens": array(COUNT),
                "token_strs": nullable(array(STRING)),
            }
        ),
        "Detokenized": object_of({"prompt": STRING}),
        "OpenAIError": object_of(
            {
                "error": object_of(
                    {
                        "message": STRING,
                        "type": {"enum": list(OPENAI_ERROR_TYPES)},
                        "param": nullable(STRING),
                        "code": {"enum": [code for code in STATUS_BY_CODE if code != "model_not_configured"]},
                    }
                )
            }
        ),
    }


def _completion(kind: str, choice: Schema, **more: Schema) -> Schema:
    return object_of(
        {"id": STRING, "object": {"const": kind}, "created": COUNT, "model": _MODEL, "choices": array(choice), **more}
    )


def _chunk(kind: str, choice: Schema) -> Schema:
    chunk = _completion(kind, choice)
    chunk["properties"]["usage"] = nullable(ref("Usage"))
    return chunk


def _event(chunk: str) -> Schema:
    data = {**STRING, "contentMediaType": JSON}
    return {
        "description": 'With `"stream": true`: one of the Server-Sent Events. Chunks carry the answer as it comes, '
        "then, with `include_usage`, one without choices the usage; an error ends them. Last is `[DONE]`. Comments may "
        "come in between.",
        "oneOf": [
            object_of({"data": data | {"contentSchema": ref(chunk)}}),
            object_of({"data": data | {"contentSchema": ref("OpenAIError")}}),
            object_of({"data": {"const": "[DONE]"}}),
        ],
    }
