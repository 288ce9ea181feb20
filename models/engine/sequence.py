"""One request inside the engine: token ids, how to sample, its state and its times. No text, no users."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, Protocol

EndReason = Literal["stop", "length", "cancelled", "expired", "failed"]


class State(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


class TokenConstraint(Protocol):
    """What may come next, decided on the host (a grammar). One object per sequence, used in the loop's thread only."""

    def advance(self, token_id: int) -> None:
        """A token was chosen; called once for each, in order, stop ids included."""

    def allowed_mask(self) -> Any | None:
        """Which ids may come next: numpy int32 (ceil(vocab_size / 32),), bit `i % 32` of word `i // 32` set if id `i`
        is allowed (xgrammar's and llguidance's form). None: not computed yet; the sequence sits out this step and is
        asked again before the next one."""


@dataclass(frozen=True)
class SamplingOptions:
    """Everything resolved: no None, no text. `top_p` 1, `top_k` 0, `min_p` 0, `repetition_penalty` 1 and the other
    penalties 0 mean off.

    `stop_ids` end a sequence and are not part of the answer. Until `min_tokens` ids are out, they cannot be chosen.
    `logit_bias` is added
    to the logits of its ids. `num_logprobs`: None for none, else the chosen id's log-probability and that of so many
    likeliest ids, both of the model's own distribution, before anything on this page changed it.
    """

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    seed: int
    stop_ids: frozenset[int]
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_tokens: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    num_logprobs: int | None = None


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms. `top`: (id, logprob) of the likeliest ids, likeliest first."""

    chosen: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class PictureSpan:
    """Where one picture's placeholders stand in the prompt, and what its encoding costs.

    :param start: index of its first placeholder in the prompt.
    :param num_tokens: placeholders, which is also the number of embeddings that the vision tower gives for it.
    :param num_patches: what the vision tower reads.
    :param key: digest of its pixels as the tower reads them: equal pictures have equal keys.
    """

    start: int
    num_tokens: int
    num_patches: int
    key: bytes


@dataclass(eq=False)
class Sequence:
    """Made in a request's thread; once added, only the loop's thread changes it, but for `is_cancelled`.

    :param prompt_ids: token ids of the whole prompt, picture placeholders included.
    :param vision: what the runner needs besides ids for pictures, opaque here; None for text.
    :param pictures: the pictures of `vision`, by their place in the prompt.
    :param prefix_ids: the ids by which prompts are compared for reuse of their keys and values, as long as
        `prompt_ids`; placeholders of a picture are replaced by negative numbers made of its content. None: prompt_ids.
    :param deadline: monotonic seconds at which the sequence expires.
    :param on_token: called in the loop's thread with each new id; True ends the sequence with "stop".
    :param on_end: called exactly once, in the loop's thread or in the one that cancelled; `error` only with "failed".
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingOptions
    deadline: float
    on_token: Callable[[int], bool]
    on_end: Callable[[Sequence, EndReason, Exception | None], None]
    vision: object | None = None
    pictures: tuple[PictureSpan, ...] = ()
    prefix_ids: tuple[int, ...] | None = None
    constraint: TokenConstraint | None = None

    state: State = State.WAITING
    is_cancelled: bool = False
    num_retries: int = 0
    num_cached: int = 0  # tokens of the prompt found in the cache when it was first admitted
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    added_at: float = 0.0
    started_at: float | None = None
    first_token_at: float | None = None
    ended_at: float | None = None
