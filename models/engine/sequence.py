"""One request inside the engine: token ids, how to sample, its state and its times. No text, no users."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

EndReason = Literal["stop", "length", "cancelled", "expired", "failed"]


class State(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(frozen=True)
class SamplingOptions:
    """Everything resolved: no None, no text. `top_p` 1, `top_k` 0 and `repetition_penalty` 1 mean off.

    `stop_ids` are the end-of-sequence ids; they end a sequence and are not part of the answer.
    """

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    seed: int
    stop_ids: frozenset[int]


@dataclass(eq=False)
class Sequence:
    """Made in a request's thread; once added, only the loop's thread changes it, but for `is_cancelled`.

    :param prompt_ids: token ids of the whole prompt, picture placeholders included.
    :param vision: what the runner needs besides ids for pictures, opaque here; None for text.
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

    state: State = State.WAITING
    is_cancelled: bool = False
    output_ids: list[int] = field(default_factory=list)
    added_at: float = 0.0
    started_at: float | None = None
    first_token_at: float | None = None
    ended_at: float | None = None
