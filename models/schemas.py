"""What a request and an answer are: frozen types that the whole model layer shares.

Made by `models/parsing.py` alone; whoever holds one need not check it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from models.images import ImageHeader

ModelName = Literal["avibe", "avision"]
MODEL_NAMES: tuple[ModelName, ...] = ("avibe", "avision")
DEFAULT_MAX_TOKENS: Mapping[ModelName, int] = {"avibe": 256, "avision": 200}
DEFAULT_TEMPERATURE = 0.7

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class JsonGrammar:
    """The answer is one JSON value valid against `schema` (JSON Schema as JSON text); None: any JSON object.

    :param field: the user's name of it, for errors.
    """

    schema: str | None = None
    field: str = "response_format"


@dataclass(frozen=True)
class ToolFunction:
    """`parameters`: JSON Schema of the arguments, an object, as JSON text."""

    name: str
    parameters: str


@dataclass(frozen=True)
class ToolGrammar:
    """The answer is one or several calls of these functions and nothing else, in Qwen's form (and Hermes'):

        <tool_call>
        {"name": "f", "arguments": {"x": 1}}
        </tool_call>

    with a line feed between two calls.

    :param is_single: exactly one call.
    :param is_optional: any text may come before the first call, or no call at all.
    :param field: the user's name of it, for errors.
    """

    functions: tuple[ToolFunction, ...]
    is_single: bool = False
    is_optional: bool = False
    field: str = "tools"


Grammar = JsonGrammar | ToolGrammar


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. None: the snapshot's `generation_config.json` decides, and if it is silent, nothing.

    :param max_tokens: None: as many as the limit and the context leave.
    :param stop_token_ids: end the answer beside the model's own stop ids, also with `ignore_eos`.
    :param logit_bias: (token id, what is added to its logit).
    :param num_logprobs: None for none, else the log-probability of each token and of so many likeliest ones.
    :param skip_special_tokens: leave special tokens out of the answer's text.
    :param grammar: what the answer is held to.
    """

    max_tokens: int | None
    temperature: float
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    min_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_tokens: int = 0
    ignore_eos: bool = False
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    num_logprobs: int | None = None
    skip_special_tokens: bool = True
    grammar: Grammar | None = None


Role = Literal["system", "user", "assistant", "tool"]


class PicturePlace:
    """Where the next picture of the request stands in a content."""

    def __repr__(self) -> str:
        return "PICTURE"


PICTURE = PicturePlace()


@dataclass(frozen=True)
class ToolCall:
    """A call that the model made earlier in the chat. `arguments`: the decoded JSON object."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Message:
    """One turn of a chat. `content` is the user's text and never becomes a control token; in parts where pictures stand
    between texts."""

    role: Role
    content: str | tuple[str | PicturePlace, ...]
    tool_calls: tuple[ToolCall, ...] = ()

    @property
    def num_chars(self) -> int:
        parts = (self.content,) if isinstance(self.content, str) else self.content
        return sum(len(part) for part in parts if isinstance(part, str))


@dataclass(frozen=True)
class ChatOptions:
    """What the chat template is given beside the messages.

    :param tools: decoded JSON objects in OpenAI's form, as the template prints them.
    :param template_values: further variables of the template: booleans, numbers, plain words.
    :param has_answer_opening: let the prompt end where the answer begins.
    :param field: the user's name of the chat, for errors.
    """

    tools: tuple[Mapping[str, Any], ...] = ()
    template_values: Mapping[str, Any] = field(default_factory=dict)
    has_answer_opening: bool = True
    field: str = "prompt"


@dataclass(frozen=True)
class ImageInput:
    """A picture that passed its header checks: the encoded bytes, not yet decoded; `field` is its name in messages."""

    data: bytes
    header: ImageHeader
    field: str = "image"


@dataclass(frozen=True)
class TextRequest:
    """A chat without pictures, for either model."""

    messages: tuple[Message, ...]
    sampling: SamplingParams

    model: ModelName = "avibe"
    chat: ChatOptions = ChatOptions()


@dataclass(frozen=True)
class ImageRequest:
    """A chat with pictures: in order at the `PICTURE` places, or, without any, before the text of the last message."""

    messages: tuple[Message, ...]
    images: tuple[ImageInput, ...]
    sampling: SamplingParams

    model: ModelName = "avision"
    chat: ChatOptions = ChatOptions()

    def host_bytes(self, max_visual_px: int) -> int:
        """About the host memory that the pictures take until the answer is done: the files, and their patches, which
        are float32 in 3 channels and 2 equal frames (Qwen2-VL), 24 bytes a pixel."""
        headers = [image.header for image in self.images]
        return sum(h.num_bytes + 24 * min(h.width * h.height, max_visual_px) for h in headers)


@dataclass(frozen=True)
class RawRequest:
    """A prompt without a chat template: text, of which nothing becomes a control token, or token ids."""

    prompt: str | tuple[int, ...]
    sampling: SamplingParams

    model: ModelName = "avibe"


Request = TextRequest | ImageRequest | RawRequest


@dataclass(frozen=True)
class Timing:
    """Durations in seconds, all measured with one monotonic clock.

    `queue_s` ends at the first step, `generation_s` is the rest, `decode_s` the part of it after the first token;
    `time_to_first_token_s` (None without a token) and `total_s` count from the request's first byte.
    """

    queue_s: float
    time_to_first_token_s: float | None
    decode_s: float
    generation_s: float
    total_s: float

    def tokens_per_second(self, generated_tokens: int) -> float:
        return generated_tokens / self.generation_s if self.generation_s > 0 else 0.0


@dataclass(frozen=True)
class TokenLogprob:
    """One token of an answer: its bytes, its natural log-probability, and the likeliest tokens in its place."""

    token: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...] = ()


@dataclass(frozen=True)
class Completion:
    """A complete answer.

    :param cached_tokens: tokens of the prompt that an earlier request had left in the cache.
    :param logprobs: of each generated token, those of a stop string too; empty if nobody asked.
    """

    model: ModelName
    text: str
    input_tokens: int
    generated_tokens: int
    finish_reason: FinishReason
    is_demo: bool
    timing: Timing
    cached_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
