"""The door for user input in OpenAI's form: `OpenAIParser` turns the bodies of `/v1` into requests.

As `models/parsing.py`, whose rules for common fields are used here: what comes out is frozen and valid. `null` counts
as absent, which is how OpenAI's clients send what is not set; but not inside of schemas, which are the user's own data.
What is neither listed here nor neutral is refused by name: nothing is accepted and then ignored, but for `user`,
`metadata`, `store`, and what clients add to an answer before they send it back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, FailFast, Field, Tag, model_validator

from config import Limits
from models.errors import InvalidRequest, ModelNotFound, UnknownField
from models.images import read_header
from models.parsing import (
    body_model,
    decode_picture,
    load_json_object,
    sampling_fields,
    sampling_params,
    shown_name,
    validate,
    whole_number,
)
from models.schemas import (
    DEFAULT_TEMPERATURE,
    MODEL_NAMES,
    PICTURE,
    ChatOptions,
    Grammar,
    ImageInput,
    ImageRequest,
    JsonGrammar,
    Message,
    ModelName,
    PicturePlace,
    RawRequest,
    Request,
    Role,
    SamplingParams,
    TextRequest,
    ToolCall,
    ToolFunction,
    ToolGrammar,
)

#: Known elsewhere and not supported here, with the one value that changes nothing and is taken.
NEUTRAL_VALUES: Mapping[str, Any] = {
    "best_of": 1,
    "echo": False,
    "include_stop_str_in_output": False,
    "length_penalty": 1.0,
    "modalities": ["text"],
    "service_tier": "auto",
    "spaces_between_special_tokens": True,
    "use_beam_search": False,
}
#: Known elsewhere and not supported here, whatever the value.
UNSUPPORTED = frozenset(
    (
        "add_special_tokens", "allowed_token_ids", "audio", "bad_words", "cache_salt", "chat_template",
        "continue_final_message", "documents", "function_call", "functions", "guided_choice", "guided_grammar",
        "guided_json", "guided_regex", "kv_transfer_params", "logits_processors", "mm_processor_kwargs", "moderation",
        "prediction", "priority", "prompt_cache_key", "prompt_cache_retention", "prompt_embeds", "prompt_logprobs",
        "reasoning_effort", "safety_identifier", "structured_outputs", "suffix", "thinking_token_budget",
        "truncate_prompt_tokens", "verbosity", "web_search_options",
    )
)  # fmt: skip
#: Taken, and without effect.
WITHOUT_EFFECT = ("user", "metadata", "store")
_TOOL_NAME = r"^[A-Za-z0-9_-]{1,64}$"
_WORD = re.compile(_TOOL_NAME)
# No leading zeros: no two keys are the same id.
_TOKEN_ID = re.compile(r"^(0|[1-9][0-9]{0,9})$")


@dataclass(frozen=True)
class OpenAIRequest:
    """A request of `/v1`.

    :param prompts: one for a chat, several perhaps for `/v1/completions`; all for one model.
    :param num_choices: answers to each prompt.
    :param includes_usage: a streamed answer ends with its usage.
    :param has_tools: calls are to be looked for in the answer.
    :param has_certain_calls: a grammar sees to it that the answer is nothing but calls.
    """

    prompts: tuple[Request, ...]
    num_choices: int = 1
    is_streamed: bool = False
    includes_usage: bool = False
    has_tools: bool = False
    has_certain_calls: bool = False

    @property
    def model(self) -> ModelName:
        return self.prompts[0].model


@dataclass(frozen=True)
class TokenizeRequest:
    prompt: Request
    has_token_texts: bool


@dataclass(frozen=True)
class DetokenizeRequest:
    model: ModelName
    ids: tuple[int, ...]


def _as_parts(value: object) -> object:
    """A content is a text or a list of parts."""
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    return value


class _Strict(BaseModel):
    """`null` counts as absent; unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_null(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = {field.alias or name for name, field in cls.model_fields.items()}
        found, has_unknown = {}, False
        for key, value in data.items():
            # One unknown field is enough to tell of: Pydantic would make an error object for each of a million.
            if value is not None and (key in known or not has_unknown):
                found[key] = value
                has_unknown = has_unknown or key not in known
        return found


class _SentBack(_Strict):
    """A part of an earlier answer, as the client holds it.

    `made_by_client`: what OpenAI's own clients add to it and send back. It says nothing that the other fields do not.
    """

    made_by_client: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _drop_made(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if k not in cls.made_by_client} if isinstance(data, dict) else data


class _TextPart(_Strict):
    type: Literal["text"]
    text: str


class _ImageUrl(_Strict):
    url: Annotated[
        str, Field(min_length=1, description="A data URL with a picture.", json_schema_extra={"pattern": "^data:"})
    ]
    detail: Literal["auto"] = "auto"


class _ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: _ImageUrl


def _part_type(value: Any) -> str | None:
    return value.get("type") if isinstance(value, dict) else getattr(value, "type", None)


_Text = Annotated[list[_TextPart], BeforeValidator(_as_parts, json_schema_input_type=str | list[_TextPart])]
_Part = Annotated[
    Annotated[_TextPart, Tag("text")] | Annotated[_ImagePart, Tag("image_url")], Discriminator(_part_type)
]


class _SystemMessage(_Strict):
    role: Literal["system", "developer"]
    content: _Text


class _UserMessage(_Strict):
    role: Literal["user"]
    content: Annotated[list[_Part], BeforeValidator(_as_parts, json_schema_input_type=str | list[_Part])]


class _CalledFunction(_SentBack):
    made_by_client = frozenset(("parsed_arguments",))

    name: Annotated[str, Field(pattern=_TOOL_NAME)]
    arguments: Annotated[
        str,
        Field(
            description="The text of a JSON object.",
            json_schema_extra={"contentMediaType": "application/json", "contentSchema": {"type": "object"}},
        ),
    ]


class _Call(_SentBack):
    made_by_client = frozenset(("index",))

    id: str = ""
    type: Literal["function"] = "function"
    function: _CalledFunction


class _AssistantMessage(_SentBack):
    made_by_client = frozenset(("parsed",))

    role: Literal["assistant"]
    content: _Text = Field(default_factory=list)
    tool_calls: list[_Call] = Field(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, data: Any) -> Any:
        """Clients send back what an answer had, its empty lists too."""
        return {key: value for key, value in data.items() if value != []} if isinstance(data, dict) else data


class _ToolMessage(_Strict):
    role: Literal["tool"]
    content: _Text
    tool_call_id: str = ""


def _role(value: Any) -> str | None:
    role = value.get("role") if isinstance(value, dict) else getattr(value, "role", None)
    return "system" if role == "developer" else role if isinstance(role, str) else None


_AnyMessage = _SystemMessage | _UserMessage | _AssistantMessage | _ToolMessage
_Message = Annotated[
    Annotated[_SystemMessage, Tag("system")]
    | Annotated[_UserMessage, Tag("user")]
    | Annotated[_AssistantMessage, Tag("assistant")]
    | Annotated[_ToolMessage, Tag("tool")],
    Discriminator(_role),
]


class _Function(_Strict):
    name: Annotated[str, Field(pattern=_TOOL_NAME)]
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool = False


class _Tool(_Strict):
    type: Literal["function"]
    function: _Function


class _StreamOptions(_Strict):
    include_usage: bool = False


class _ChosenFunction(_Strict):
    name: str


class _NamedTool(_Strict):
    type: Literal["function"]
    function: _ChosenFunction


class _TextFormat(_Strict):
    type: Literal["text"]


class _ObjectFormat(_Strict):
    type: Literal["json_object"]


class _JsonSchema(_Strict):
    name: Annotated[str, Field(pattern=_TOOL_NAME)]
    description: str = ""
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool = False


class _SchemaFormat(_Strict):
    type: Literal["json_schema"]
    json_schema: _JsonSchema


_Format = Annotated[
    Annotated[_TextFormat, Tag("text")]
    | Annotated[_ObjectFormat, Tag("json_object")]
    | Annotated[_SchemaFormat, Tag("json_schema")],
    Discriminator(_part_type),
]


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _at_most(limit: int) -> BeforeValidator:
    """Of an object's members. Pydantic looks at them all before it counts them, and has an error for each."""

    def check(value: object) -> object:
        if isinstance(value, dict) and len(value) > limit:
            raise ValueError(f"must have at most {limit} items, got {len(value)}")
        return value

    return BeforeValidator(check)


def _as_given(value: object) -> object:
    return value


def _choice_kind(value: object) -> str:
    return "named" if isinstance(value, (dict, _NamedTool)) else "word"


_ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("word")] | Annotated[_NamedTool, Tag("named")],
    Discriminator(_choice_kind),
]


class OpenAIParser:
    """Built once; may be called from any thread.

    Every method raises `InvalidRequest` or a kind of it (`UnknownField`, `InvalidImage`, `ModelNotFound`), or an error
    of `images.read_header`, with the field, the limit and the value.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        common = _common_fields(limits)
        self.chat_body = body_model("ChatCompletionRequest", common | _chat_fields(limits))
        self.completion_body = body_model("CompletionRequest", common | _completion_fields(limits))
        self.tokenize_body = body_model("TokenizeRequest", _tokenize_fields(limits))
        self.detokenize_body = body_model("DetokenizeRequest", _detokenize_fields(limits))

    def parse_chat(self, body: bytes) -> OpenAIRequest:
        fields = self._validate(self.chat_body, body)
        model = _model(fields)
        sampling = self._sampling(fields, _chat_max_tokens(fields), _chat_logprobs(fields), _grammar(fields))
        prompt = self._chat(fields, model, sampling)
        choice = fields["tool_choice"]
        has_tools = bool(fields["tools"]) and choice != "none"
        return self._request(fields, (prompt,), has_tools, has_tools and choice != "auto")

    def parse_completion(self, body: bytes) -> OpenAIRequest:
        fields = self._validate(self.completion_body, body)
        model = _model(fields)
        sampling = self._sampling(fields, fields["max_tokens"], fields["logprobs"])
        prompts = tuple(RawRequest(prompt, sampling, model) for prompt in self._raw_prompts(fields["prompt"]))
        return self._request(fields, prompts)

    def parse_tokenize(self, body: bytes) -> TokenizeRequest:
        fields = self._validate(self.tokenize_body, body)
        model = _model(fields)
        sampling = SamplingParams(max_tokens=None, temperature=DEFAULT_TEMPERATURE)
        has_chat, has_text = fields["messages"] is not None, fields["prompt"] is not None
        if has_chat == has_text:
            raise InvalidRequest("prompt, messages: give one of the two", field="prompt")
        prompt = self._chat(fields, model, sampling) if has_chat else RawRequest(fields["prompt"], sampling, model)
        return TokenizeRequest(prompt, fields["return_token_strs"])

    def parse_detokenize(self, body: bytes) -> DetokenizeRequest:
        fields = self._validate(self.detokenize_body, body)
        return DetokenizeRequest(_model(fields), tuple(fields["tokens"]))

    def _validate(self, model: type[BaseModel], body: bytes) -> dict[str, Any]:
        fields = {name: value for name, value in load_json_object(body).items() if value is not None}
        for name, neutral in NEUTRAL_VALUES.items():
            if name in fields and name not in model.model_fields and not _is_same(fields.pop(name), neutral):
                raise UnknownField(f"{name}: only {json.dumps(neutral)} is supported here", field=name)
        for name in fields:
            if name in UNSUPPORTED:
                raise UnknownField(f"{name}: is not supported here", field=name)
        self._check_num_parts(fields.get("messages"))
        return validate(model, fields)

    def _check_num_parts(self, messages: object) -> None:
        """Before Pydantic, whose objects, and errors, take a hundred times the memory of their JSON."""
        if not isinstance(messages, list) or len(messages) > self.limits.max_messages:
            return  # refused at once
        lists = [each.get(key) for each in messages if isinstance(each, dict) for key in ("content", "tool_calls")]
        num_parts = sum(len(each) for each in lists if isinstance(each, list))
        if num_parts > self.limits.max_message_parts:
            raise InvalidRequest(
                f"messages: must have at most {self.limits.max_message_parts} parts and tool calls in all, "
                f"got {num_parts}",
                field="messages",
            )

    def _request(
        self,
        fields: Mapping[str, Any],
        prompts: tuple[Request, ...],
        has_tools: bool = False,
        has_certain_calls: bool = False,
    ) -> OpenAIRequest:
        num_answers = len(prompts) * fields["n"]
        if num_answers > self.limits.max_choices:
            raise InvalidRequest(
                f"n: at most {self.limits.max_choices} answers in all, got {num_answers} "
                f"({len(prompts)} prompts, n {fields['n']})",
                field="n",
            )
        if fields["stream_options"] is not None and not fields["stream"]:
            raise InvalidRequest("stream_options: only with stream true", field="stream_options")
        options: _StreamOptions | None = fields["stream_options"]
        return OpenAIRequest(
            prompts,
            fields["n"],
            is_streamed=fields["stream"],
            includes_usage=options is not None and options.include_usage,
            has_tools=has_tools,
            has_certain_calls=has_certain_calls,
        )

    def _sampling(
        self,
        fields: Mapping[str, Any],
        max_tokens: int | None,
        num_logprobs: int | None,
        grammar: Grammar | None = None,
    ) -> SamplingParams:
        if grammar is not None:
            for name in ("stop", "stop_token_ids", "min_tokens", "ignore_eos"):
                if fields[name]:  # each would end the answer where it is not valid, or keep it from its end
                    raise InvalidRequest(f"{name}: cannot go with {grammar.field}", field=name)
        if not fields["skip_special_tokens"] and fields["stop"]:
            # Stop strings are looked for in the text without them; where that text would be cut is not clear.
            raise InvalidRequest("skip_special_tokens: false cannot go with stop", field="skip_special_tokens")
        return replace(
            sampling_params(fields),
            max_tokens=max_tokens,
            top_k=0 if fields["top_k"] == -1 else fields["top_k"],
            stop_token_ids=tuple(fields["stop_token_ids"]),
            logit_bias=self._logit_bias(fields["logit_bias"]),
            num_logprobs=num_logprobs,
            skip_special_tokens=fields["skip_special_tokens"],
            grammar=grammar,
        )

    @staticmethod
    def _logit_bias(given: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
        for key in given:
            if not _TOKEN_ID.fullmatch(key):
                raise InvalidRequest(
                    f"logit_bias: each key must be a token id, got {shown_name(key)}", field="logit_bias"
                )
        return tuple((int(key), bias) for key, bias in given.items())

    def _raw_prompts(self, given: object) -> list[str | tuple[int, ...]]:
        """A text, token ids, a list of texts, or lists of token ids. Counts come before contents: a body has room for
        millions of either."""
        several: list[object] = [given]
        is_list = False
        if isinstance(given, list) and given and isinstance(given[0], (str, list)):
            several, is_list = given, True
        if len(several) > self.limits.max_choices:
            raise InvalidRequest(
                f"prompt: must be at most {self.limits.max_choices} prompts, got {len(several)}", field="prompt"
            )
        limit = self.limits.max_prompt_chars
        found: list[str | tuple[int, ...]] = []
        for index, prompt in enumerate(several):
            name = f"prompt[{index}]" if is_list else "prompt"
            if not isinstance(prompt, type(several[0])) or not isinstance(prompt, (str, list)):
                raise InvalidRequest(f"prompt: {_RAW_PROMPTS}", field="prompt")
            if not 1 <= len(prompt) <= limit:
                unit = "characters" if isinstance(prompt, str) else "token ids"
                raise InvalidRequest(f"{name}: must have 1 to {limit} {unit}, got {len(prompt)}", field="prompt")
            if isinstance(prompt, str):
                _check_unicode(prompt, name)
                found.append(prompt)
                continue
            numbers = map(whole_number, prompt)
            ids = tuple(each for each in numbers if isinstance(each, int) and not isinstance(each, bool))
            if len(ids) < len(prompt):
                raise InvalidRequest(f"prompt: {_RAW_PROMPTS}", field="prompt")
            found.append(ids)
        return found

    # Chats.

    def _chat(self, fields: Mapping[str, Any], model: ModelName, sampling: SamplingParams) -> Request:
        tools = self._tools(fields)
        num_chars = sum(_num_chars(message) for message in fields["messages"])
        num_chars += sum(len(_json_text(tool, f"tools[{index}]")) for index, tool in enumerate(tools))
        if num_chars > self.limits.max_prompt_chars:
            raise InvalidRequest(
                f"messages: must have at most {self.limits.max_prompt_chars} characters in all, with calls and tools, "
                f"got {num_chars}",
                field="messages",
            )
        messages: list[Message] = []
        pictures: list[tuple[str, str]] = []
        for index, given in enumerate(fields["messages"]):
            messages.append(self._message(given, f"messages[{index}]", model, pictures))
        chat = ChatOptions(
            tools=tuple(tools),
            template_values=_template_values(fields["chat_template_kwargs"]),
            has_answer_opening=fields["add_generation_prompt"],
            field="messages",
        )
        if not pictures:
            return TextRequest(tuple(messages), sampling, model, chat)
        return ImageRequest(tuple(messages), self._images(pictures), sampling, model, chat)

    def _message(self, given: Any, place: str, model: ModelName, pictures: list[tuple[str, str]]) -> Message:
        """:param pictures: those found so far, (URL, field); new ones are added."""
        parts: list[str | PicturePlace] = []
        for index, part in enumerate(given.content):
            if part.type == "text":
                _check_unicode(part.text, f"{place}.content")
                parts.append(part.text)
                continue
            name = f"{place}.content[{index}].image_url"
            if model != "avision":
                raise InvalidRequest(f"{name}: only avision takes pictures, {model} does not", field=name)
            if len(pictures) == self.limits.max_images:
                raise InvalidRequest(f"{name}: at most {self.limits.max_images} pictures, got more", field=name)
            pictures.append((part.image_url.url, name))
            parts.append(PICTURE)
        calls = getattr(given, "tool_calls", [])
        role: Role = "system" if given.role == "developer" else given.role
        # A template that knows no parts takes text; what the parts were apart for, a line end says.
        texts = [part for part in parts if isinstance(part, str)]
        content = "\n".join(texts) if len(texts) == len(parts) else tuple(parts)
        return Message(
            role,
            content,
            tuple(
                _tool_call(call, f"{place}.tool_calls[{i}]", self.limits.max_json_depth) for i, call in enumerate(calls)
            ),
        )

    def _images(self, sources: list[tuple[str, str]]) -> tuple[ImageInput, ...]:
        images = []
        for url, name in sources:
            if not url.lstrip()[:5].lower() == "data:":
                raise InvalidRequest(f"{name}: must be a data URL; other URLs are never fetched", field=name)
            _, data, declared = decode_picture(url, name)
            header = read_header(data, declared_type=declared, field=name, limits=self.limits)
            images.append(ImageInput(data, header, name))
        return tuple(images)

    def _tools(self, fields: Mapping[str, Any]) -> list[dict[str, Any]]:
        """As the chat template prints them: none with `tool_choice` none."""
        tools: list[_Tool] = fields["tools"]
        names = [tool.function.name for tool in tools]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise InvalidRequest(f"tools[{index}].function.name: is given more than once", field="tools")
            check_depth(
                tools[index].function.parameters, self.limits.max_json_depth, f"tools[{index}].function.parameters"
            )
        choice = fields["tool_choice"]
        if choice not in (None, "auto", "none") and not tools:
            raise InvalidRequest("tool_choice: there are no tools to choose from", field="tool_choice")
        if isinstance(choice, _NamedTool) and choice.function.name not in names:
            raise InvalidRequest("tool_choice.function.name: is not among the tools", field="tool_choice")
        if choice == "none":
            return []
        return [
            {
                "type": "function",
                "function": {
                    "name": tool.function.name,
                    "description": tool.function.description,
                    "parameters": tool.function.parameters,
                },
            }
            for tool in tools
        ]


def _num_chars(message: _AnyMessage) -> int:
    """Of its texts and calls."""
    num_chars = sum(len(part.text) for part in message.content if isinstance(part, _TextPart))
    calls = message.tool_calls if isinstance(message, _AssistantMessage) else ()
    return num_chars + sum(len(call.function.name) + len(call.function.arguments) for call in calls)


def _json_text(value: Any, name: str) -> str:
    """A user's JSON value as JSON text, which anybody can read.

    :raise InvalidRequest: it has lone surrogates or infinite numbers (`1e999`).
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise InvalidRequest(f"{name}: must have finite numbers only", field=name) from None
    _check_unicode(text, name)
    return text


def _check_unicode(text: str, name: str) -> None:
    """JSON can escape a lone surrogate, no tokenizer can encode one; Pydantic lets it pass where no bounds are set.

    :raise InvalidRequest: there is one.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"{name}: must be valid Unicode without lone surrogates", field=name) from None


def _tool_call(call: _Call, place: str, max_depth: int) -> ToolCall:
    name = f"{place}.function.arguments"
    try:
        arguments = load_json_object(call.function.arguments.encode("utf-8", "surrogatepass"))
    except InvalidRequest as error:
        reason = error.message.removeprefix("body: ")
        raise InvalidRequest(f"{name}: must be the text of a JSON object: {reason}", field=name) from None
    check_depth(arguments, max_depth, name)
    _json_text(arguments, name)
    return ToolCall(call.function.name, arguments)


def check_depth(value: Any, limit: int, name: str) -> None:
    """:raise InvalidRequest: a decoded JSON value is nested more deeply than `limit`."""
    level = [value]
    for _ in range(limit):
        level = [
            child
            for each in level
            if isinstance(each, (dict, list))
            for child in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return
    if any(isinstance(each, (dict, list)) for each in level):
        raise InvalidRequest(f"{name}: must be nested at most {limit} levels deep, got more", field=name)


def _template_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """Words and numbers only: what a template prints of them cannot be a control token."""
    for key, value in given.items():
        is_word = isinstance(value, str) and _WORD.fullmatch(value)
        if not (is_word or isinstance(value, (bool, int, float))):
            raise InvalidRequest(
                f"chat_template_kwargs.{shown_name(key)}: must be a boolean, a number or a word of at most 64 "
                "letters, digits, - and _",
                field="chat_template_kwargs",
            )
    return dict(given)


def _chat_max_tokens(fields: Mapping[str, Any]) -> int | None:
    old, new = fields["max_tokens"], fields["max_completion_tokens"]
    if old is not None and new is not None and old != new:
        raise InvalidRequest(
            f"max_completion_tokens: differs from max_tokens, {new} and {old}", field="max_completion_tokens"
        )
    chosen: int | None = new if old is None else old
    return chosen


def _chat_logprobs(fields: Mapping[str, Any]) -> int | None:
    if not fields["logprobs"]:
        if fields["top_logprobs"]:
            raise InvalidRequest("top_logprobs: only with logprobs true", field="top_logprobs")
        return None
    return int(fields["top_logprobs"] or 0)


def _grammar(fields: Mapping[str, Any]) -> Grammar | None:
    """What `response_format`, or `tool_choice` and `strict`, hold the answer to."""
    form, choice, tools = fields["response_format"], fields["tool_choice"], fields["tools"]
    calls = None if choice == "none" else _tool_grammar(choice, tools, fields["parallel_tool_calls"])
    if form is None or isinstance(form, _TextFormat):
        return calls
    if tools and choice != "none":
        raise InvalidRequest(
            "response_format: cannot go with tools, unless tool_choice is none", field="response_format"
        )
    if isinstance(form, _ObjectFormat):
        return JsonGrammar()
    # Enforced with `strict` and without: nobody is served by an answer that does not fit the schema.
    return JsonGrammar(_json_text(form.json_schema.schema_, "response_format.json_schema.schema"))


def _tool_grammar(choice: str | _NamedTool, tools: list[_Tool], may_be_several: bool) -> ToolGrammar | None:
    is_forced = choice != "auto"
    if not may_be_several and not is_forced:
        raise InvalidRequest(
            "parallel_tool_calls: false needs a tool_choice that forces a call", field="parallel_tool_calls"
        )
    if not is_forced and not any(tool.function.strict for tool in tools):
        return None
    named = choice.function.name if isinstance(choice, _NamedTool) else None
    functions = tuple(
        ToolFunction(tool.function.name, _json_text(tool.function.parameters, f"tools[{index}].function.parameters"))
        for index, tool in enumerate(tools)
        if named in (None, tool.function.name)
    )
    return ToolGrammar(functions, is_single=named is not None or not may_be_several, is_optional=not is_forced)


def _model(fields: Mapping[str, Any]) -> ModelName:
    for name in MODEL_NAMES:
        if name == fields["model"]:
            return name
    raise ModelNotFound(f"model: there is no model {shown_name(fields['model'])}", field="model")


def _is_same(given: object, neutral: object) -> bool:
    """As JSON: for Python, true is 1 as well."""
    return given == neutral and isinstance(given, bool) == isinstance(neutral, bool)


_MODEL_FIELD: Any = (Annotated[str, Field(min_length=1, json_schema_extra={"enum": list(MODEL_NAMES)})], ...)
_RAW_PROMPTS = "must be a string, a list of strings, a list of token ids, or a list of such lists"
_NO_EFFECT = "Taken, and without effect."


def _common_fields(limits: Limits) -> dict[str, Any]:
    """Of both generating doors. Sampling is that of our own API, but for what OpenAI spells otherwise."""
    own = sampling_fields(limits, "avibe")
    stop_string = Annotated[str, Field(min_length=1, max_length=limits.max_stop_chars)]
    stop_strings = Annotated[list[stop_string], Field(max_length=limits.max_stop_strings)]
    token_id = Annotated[int, Field(ge=0), BeforeValidator(whole_number)]
    bias = Annotated[float, Field(ge=-limits.max_logit_bias, le=limits.max_logit_bias, allow_inf_nan=False)]
    return {
        "model": _MODEL_FIELD,
        **own,
        "max_tokens": (own["max_tokens"][0], None),
        "top_k": (
            Annotated[
                int,
                Field(ge=-1, le=limits.max_top_k, description="Keep so many of the likeliest; 0, -1: all."),
                BeforeValidator(whole_number),
            ],
            None,
        ),
        "stop": (
            Annotated[
                stop_strings,
                Field(description="A text before which the answer ends, or several."),
                BeforeValidator(_as_list, json_schema_input_type=stop_string | stop_strings),
            ],
            (),
        ),
        "stop_token_ids": (
            Annotated[
                list[token_id],
                Field(max_length=limits.max_stop_token_ids, description="Ids that end the answer."),
            ],
            (),
        ),
        "n": (
            Annotated[
                int,
                Field(ge=1, le=limits.max_choices, description="Answers to each prompt."),
                BeforeValidator(whole_number),
            ],
            1,
        ),
        "logit_bias": (
            Annotated[
                dict[str, bias],
                Field(
                    max_length=limits.max_logit_biases,
                    description="Token id -> what is added to its logit.",
                    json_schema_extra={"propertyNames": {"pattern": _TOKEN_ID.pattern}},
                ),
                _at_most(limits.max_logit_biases),
            ],
            {},
        ),
        "skip_special_tokens": (
            Annotated[bool, Field(description="Leave special tokens out of the answer's text.")],
            True,
        ),
        "stream": (Annotated[bool, Field(description="Send the answer as it is made: text/event-stream.")], False),
        "stream_options": (Annotated[_StreamOptions | None, Field(description="Only with stream true.")], None),
        "user": (Annotated[str, Field(description=_NO_EFFECT)], ""),
        "metadata": (
            Annotated[
                dict[str, str],
                Field(max_length=limits.max_metadata, description=_NO_EFFECT),
                _at_most(limits.max_metadata),
            ],
            {},
        ),
        "store": (Annotated[bool, Field(description=_NO_EFFECT)], False),
    }


def _template_fields(limits: Limits) -> dict[str, Any]:
    return {
        "tools": (Annotated[list[_Tool], Field(max_length=limits.max_tools)], ()),
        "tool_choice": (_ToolChoice, "auto"),
        "parallel_tool_calls": (Annotated[bool, Field(description="False: one call at most.")], True),
        "add_generation_prompt": (
            Annotated[bool, Field(description="Let the prompt end where the answer begins.")],
            True,
        ),
        "chat_template_kwargs": (
            Annotated[
                dict[str, Any],
                Field(
                    max_length=32,
                    description="Variables of the model's chat template.",
                    json_schema_extra={
                        "additionalProperties": {
                            "anyOf": [
                                {"type": "boolean"},
                                {"type": "number"},
                                {"type": "string", "pattern": _WORD.pattern},
                            ]
                        }
                    },
                ),
            ],
            {},
        ),
    }


def _chat_fields(limits: Limits) -> dict[str, Any]:
    own = sampling_fields(limits, "avibe")
    return {
        "messages": (Annotated[list[_Message], Field(min_length=1, max_length=limits.max_messages)], ...),
        **_template_fields(limits),
        "max_completion_tokens": (own["max_tokens"][0], None),
        "logprobs": (Annotated[bool, Field(description="Log-probabilities of the answer's tokens.")], False),
        "top_logprobs": (
            Annotated[
                int,
                Field(ge=0, le=limits.max_top_logprobs, description="And of so many likeliest in their place."),
                BeforeValidator(whole_number),
            ],
            None,
        ),
        "response_format": (_Format | None, None),
    }


def _completion_fields(limits: Limits) -> dict[str, Any]:
    own = sampling_fields(limits, "avibe")
    text = Annotated[str, Field(min_length=1, max_length=limits.max_prompt_chars)]
    ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=limits.max_prompt_chars)]
    texts = Annotated[list[text], Field(min_length=1, max_length=limits.max_choices)]
    lists = Annotated[list[ids], Field(min_length=1, max_length=limits.max_choices)]
    return {
        "prompt": (
            Annotated[
                Any,
                Field(description="A text, token ids, or a list of either."),
                BeforeValidator(_as_given, json_schema_input_type=text | ids | texts | lists),
            ],
            ...,
        ),
        "max_tokens": (own["max_tokens"][0], 16),
        "logprobs": (
            Annotated[
                int,
                Field(ge=0, le=limits.max_top_logprobs, description="Likeliest tokens told for each place."),
                BeforeValidator(whole_number),
            ],
            None,
        ),
    }


def _tokenize_fields(limits: Limits) -> dict[str, Any]:
    text = Annotated[str, Field(min_length=1, max_length=limits.max_prompt_chars)]
    return {
        "model": _MODEL_FIELD,
        "prompt": (text, None),
        "messages": (Annotated[list[_Message], Field(min_length=1, max_length=limits.max_messages)], None),
        **_template_fields(limits),
        "return_token_strs": (Annotated[bool, Field(description="Each token's text as well.")], False),
    }


def _detokenize_fields(limits: Limits) -> dict[str, Any]:
    return {
        "model": _MODEL_FIELD,
        "tokens": (
            # The bounds of ids are the model's to check.
            Annotated[
                list[Annotated[int, Field(json_schema_extra={"minimum": 0}), BeforeValidator(whole_number)]],
                Field(max_length=limits.max_prompt_chars),
                FailFast(),
            ],
            ...,
        ),
    }
