"""What stands in for a model in tests: a byte tokenizer and a runner that does arithmetic on token ids.

Everything between HTTP and the runner is the real thing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Sequences
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from config import EngineOptions, Limits
from models.engine.loop import StepOutput
from models.engine.memory import ModelNeeds, ModelShare
from models.engine.scheduler import Row, Step
from models.engine.sequence import PictureSpan, SamplingOptions, Sequence, TokenConstraint, TokenLogprobs
from models.errors import InvalidRequest, PromptTooLong
from models.schemas import ModelName, RawRequest, Request, SamplingParams
from models.service import Phase
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

    def decode(self, ids: Sequences[int], skip_special_tokens: bool = True) -> str:
        return bytes(ids).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < END_ID else b""


class FakeEncoder:
    def __init__(self, context_tokens: int = 10**12) -> None:
        self.tokenizer = ByteTokenizer()
        self.context_tokens = context_tokens

    def encode(self, request: Request, check: Callable[[], None]) -> FakePrompt:
        check()
        ids = tuple(self.encode_text(request))
        if len(ids) + (request.sampling.max_tokens or 1) > self.context_tokens:
            raise PromptTooLong("prompt: too many tokens", field="prompt")
        return FakePrompt(ids)

    def encode_text(self, request: Request) -> list[int]:
        """The last message alone, or the raw prompt."""
        if isinstance(request, RawRequest):
            if isinstance(request.prompt, str):
                return self.tokenizer.encode(request.prompt)
            for index, token_id in enumerate(request.prompt):
                self.check_id(token_id, "prompt", f"prompt[{index}]")
            return [*request.prompt]
        content = request.messages[-1].content
        parts = (content,) if isinstance(content, str) else content
        return self.tokenizer.encode("".join(part for part in parts if isinstance(part, str)))

    def check_id(self, token_id: int, field: str, place: str) -> None:
        if not 0 <= token_id < END_ID:  # as `PromptEncoder.check_id`
            raise InvalidRequest(f"{place}: a token id must be less than {END_ID}, got {token_id}", field=field)

    def constraint(self, params: SamplingParams, check: Callable[[], None]) -> TokenConstraint | None:
        return None

    def sampling_options(self, params: SamplingParams, num_prompt: int) -> SamplingOptions:
        return SamplingOptions(
            max_tokens=2048 if params.max_tokens is None else params.max_tokens,
            temperature=params.temperature,
            top_p=1.0,
            top_k=0,
            repetition_penalty=1.0,
            seed=0,
            stop_ids=frozenset({END_ID, *params.stop_token_ids}),
            num_logprobs=params.num_logprobs,
        )


class FakeLaunched:
    """A step of a fake runner: done at once."""

    def __init__(self, outputs: Iterable[StepOutput]) -> None:
        self._outputs = outputs

    def is_done(self) -> bool:
        return True

    def wait(self) -> None:
        return

    def part_seconds(self) -> tuple[float, float]:
        return 0.0, 0.0

    def outputs(self) -> Iterable[StepOutput]:
        return self._outputs


class EchoRunner:
    """Answers a prompt with itself, byte by byte, then ends.

    :param before_step: called at the start of each step; may wait or raise. Set `gate` to let steps through.
    """

    memory_bytes = (0, 0)
    page_tokens = 16

    def __init__(
        self,
        before_step: Callable[[Sequences[Sequence]], None] | None = None,
        *,
        num_pages: int = 100_000,
        max_steps_in_flight: int = 1,
    ) -> None:
        self.num_pages = num_pages
        self.max_steps_in_flight = max_steps_in_flight
        self.gate = threading.Event()
        self.gate.set()
        self.steps = threading.Semaphore(0)
        self.num_steps = 0
        self.released: list[Sequence] = []
        self.zeroed: list[int] = []
        self._before_step = before_step

    def launch(self, step: Step) -> FakeLaunched:
        assert self.gate.wait(GENEROUS_S * 3)
        self.num_steps += 1
        self.steps.release()
        if self._before_step:
            self._before_step([row.sequence for row in step.rows])
        return FakeLaunched(self.outputs(step.rows))

    def outputs(self, rows: list[Row]) -> Iterable[StepOutput]:
        return [self._output(row) if row.is_sampled else StepOutput(row) for row in rows]

    def _output(self, row: Row) -> StepOutput:
        token_id, num_top = self._next(row), row.sequence.sampling.num_logprobs
        if num_top is None:
            return StepOutput(row, token_id)
        top = tuple((each, -0.5 - index) for index, each in enumerate(range(token_id, token_id + num_top)))
        return StepOutput(row, token_id, TokenLogprobs(-0.5, top))

    def release(self, sequence: Sequence) -> None:
        self.released.append(sequence)

    def zero_pages(self, pages: list[int]) -> None:
        self.zeroed += pages

    @staticmethod
    def _next(row: Row) -> int:
        prompt = row.sequence.prompt_ids
        return prompt[row.num_chosen] if row.num_chosen < len(prompt) else END_ID


class EndlessRunner(EchoRunner):
    """Never ends by itself: repeats the prompt's first byte."""

    @staticmethod
    def _next(row: Row) -> int:
        return row.sequence.prompt_ids[0]


@dataclass
class FakeLoaded:
    runner: EchoRunner = field(default_factory=EchoRunner)
    encoder: FakeEncoder = field(default_factory=FakeEncoder)
    device: str = "cpu"
    dtype: str = "float32"
    gpu_uuid: str | None = None
    max_running: int = 4
    needs: ModelNeeds = field(default_factory=lambda: ModelNeeds(1000, 100, 1, 16, 16384))
    memory_bytes: int = 1_000_000

    def budget_bytes(self, all_weights_bytes: int) -> int:
        return self.memory_bytes + all_weights_bytes

    def make_encoder(self, capacity_tokens: int) -> FakeEncoder:
        return self.encoder

    def make_runner(self, share: ModelShare, phase: Phase) -> EchoRunner:
        with phase("cache"):
            self.share = share
        return self.runner


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
        engine: EngineOptions,
        limits: Limits,
        phase: Phase,
    ) -> FakeLoaded:
        with phase("weights"):
            assert self.gate.wait(GENEROUS_S)
            if snapshot.model in self.failures:
                raise self.failures[snapshot.model]
        loaded = self.models[snapshot.model]
        return replace(loaded, max_running=limits.max_running or loaded.max_running)


def fake_snapshot(model: ModelName, is_demo: bool = False) -> Snapshot:
    folder = Path("/nowhere")
    return Snapshot(model, folder, folder, "auto", "FakeForCausalLM", is_demo)


class Clock:
    """A clock that moves when told to. It also moves by itself with real time if `real` is given."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now
