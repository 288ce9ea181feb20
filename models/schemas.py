"""What a request and an answer are: frozen types that the whole model layer shares.

Made by `models/parsing.py` alone; whoever holds one need not check it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from models.images import ImageHeader

ModelName = Literal["avibe", "avision"]
MODEL_NAMES: tuple[ModelName, ...] = ("avibe", "avision")
DEFAULT_MAX_TOKENS: Mapping[ModelName, int] = {"avibe": 256, "avision": 200}
DEFAULT_TEMPERATURE = 0.7

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. None: the snapshot's `generation_config.json` decides, and if it is silent, nothing."""

    max_tokens: int
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


@dataclass(frozen=True)
class Message:
    """One turn of a chat. `content` is the user's text and never becomes a control token."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class ImageInput:
    """A picture that passed its header checks: the encoded bytes, not yet decoded; `field` is its name in messages."""

    data: bytes
    header: ImageHeader
    field: str = "image"


@dataclass(frozen=True)
class TextRequest:
    messages: tuple[Message, ...]
    sampling: SamplingParams

    model: ModelName = "avibe"


@dataclass(frozen=True)
class ImageRequest:
    """The pictures come before the text of the last user message, in the order given."""

    messages: tuple[Message, ...]
    images: tuple[ImageInput, ...]
    sampling: SamplingParams

    model: ModelName = "avision"

    def host_bytes(self, max_visual_px: int) -> int:
        """About the host memory that the pictures take until the answer is done: the files, and their patches, which
        are float32 in 3 channels and 2 equal frames (Qwen2-VL), 24 bytes a pixel."""
        headers = [image.header for image in self.images]
        return sum(h.num_bytes + 24 * min(h.width * h.height, max_visual_px) for h in headers)


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
    :param field: the user's name of it, for errors.
    """

    functions: tuple[ToolFunction, ...]
    is_single: bool = False
    field: str = "tools"


Grammar = JsonGrammar | ToolGrammar


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
class Completion:
    """A complete answer."""

    model: ModelName
    text: str
    input_tokens: int
    generated_tokens: int
    finish_reason: FinishReason
    is_demo: bool
    timing: Timing
