"""What stands in for a model in tests: a byte tokenizer and a runner that does arithmetic on token ids.

Everything between HTTP and the runner is the real thing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Sequences
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from config import Limits
from models.engine.loop import StepOutput
from models.engine.sequence import PictureSpan, SamplingOptions, Sequence
from models.errors import PromptTooLong
from models.schemas import ImageRequest, ModelName, SamplingParams, TextRequest
from models.snapshots import Snapshot

END_ID = 256
GENEROUS_S = 20.0


@dataclass(frozen=True)
class FakePrompt:
    ids: tuple[int, ...]
    vision: object | None = None
    pictures: tuple[PictureSpan, ...] = ()
    prefix_ids: tuple[int, ...] | None = None


class ByteTokenizer:
    """One token per byte."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequences[int]) -> str:
        return bytes(ids).decode(errors="replace")


class FakeEncoder:
    def __init__(self, context_tokens: int = 10**12) -> None:
        self.tokenizer = ByteTokenizer()
        self.context_tokens = context_tokens

    def encode(self, request: TextRequest | ImageRequest, check: Callable[[], None]) -> FakePrompt:
        check()
        ids = tuple(self.tokenizer.encode(request.messages[-1].content))
        if len(ids) + request.sampling.max_tokens > self.context_tokens:
            raise PromptTooLong("prompt: too many tokens", field="prompt")
        return FakePrompt(ids)

    def sampling_options(self, params: SamplingParams) -> SamplingOptions:
        return SamplingOptions(params.max_tokens, params.temperature, 1.0, 0, 1.0, 0, frozenset({END_ID}))


class EchoRunner:
    """Answers a prompt with itself, byte by byte, then ends.

    :param before_step: called at the start of each step; may wait or raise. Set `gate` to let steps through.
    """

    memory_bytes = (0, 0)

    def __init__(self, before_step: Callable[[Sequences[Sequence]], None] | None = None) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.steps = threading.Semaphore(0)
        self.num_steps = 0
        self.released: list[Sequence] = []
        self._before_step = before_step

    def step(self, batch: Sequences[Sequence]) -> list[StepOutput]:
        assert self.gate.wait(GENEROUS_S * 3)
        self.num_steps += 1
        self.steps.release()
        if self._before_step:
            self._before_step(batch)
        return [StepOutput(sequence, self._next(sequence)) for sequence in batch]

    def release(self, sequence: Sequence) -> None:
        self.released.append(sequence)

    @staticmethod
    def _next(sequence: Sequence) -> int:
        position = len(sequence.output_ids)
        return sequence.prompt_ids[position] if position < len(sequence.prompt_ids) else END_ID


class EndlessRunner(EchoRunner):
    """Never ends by itself: repeats the prompt's first byte."""

    @staticmethod
    def _next(sequence: Sequence) -> int:
        return sequence.prompt_ids[0]


@dataclass
class FakeLoaded:
    runner: EchoRunner = field(default_factory=EchoRunner)
    encoder: FakeEncoder = field(default_factory=FakeEncoder)
    device: str = "cpu"
    dtype: str = "float32"
    gpu_uuid: str | None = None


class FakeLoad:
    """Takes the place of `loader.load_model`. `gate` holds loading back; `failures` make it raise, by model."""

    def __init__(self, models: Mapping[Any, FakeLoaded], failures: dict[str, Exception] | None = None) -> None:
        self.models = models
        self.failures = failures or {}
        self.gate = threading.Event()
        self.gate.set()

    def __call__(
        self,
        snapshot: Snapshot,
        *,
        device_setting: str,
        gpu_memory_fraction: float,
        limits: Limits,
        phase: Callable[[str], AbstractContextManager[None]],
    ) -> FakeLoaded:
        with phase("weights"):
            assert self.gate.wait(GENEROUS_S)
            if snapshot.model in self.failures:
                raise self.failures[snapshot.model]
        return self.models[snapshot.model]


def fake_snapshot(model: ModelName, is_demo: bool = False) -> Snapshot:
    folder = Path("/nowhere")
    return Snapshot(model, folder, folder, "auto", "FakeForCausalLM", is_demo)


class Clock:
    """A clock that moves when told to. It also moves by itself with real time if `real` is given."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now
