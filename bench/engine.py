"""The engine in this process: real loop, scheduler and runners, and streams that note when each token came.

Everything but HTTP, text and the service around it; host work of the loop is part of every time measured here.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, pairwise

from bench.inputs import make_picture
from bench.models import BenchModel
from bench.report import Unable
from config import Limits
from models.engine.loop import EngineLoop
from models.engine.runner import PagedRunner
from models.engine.scheduler import SchedulerLimits
from models.engine.sequence import EndReason, SamplingOptions
from models.engine.sequence import Sequence as EngineSequence
from models.images import read_header
from models.prompts import EncodedPrompt, PromptEncoder
from models.schemas import ImageInput, ImageRequest, Message, SamplingParams

# Longer than any load here takes; a hung device ends the benchmark with a sentence.
_TIMEOUT_S = 900.0
_STOP_S = 30.0
_numbers = count()


@dataclass(eq=False)
class Stream:
    """One sequence, and when its tokens came, in readings of `time.perf_counter`.

    :param must_end: asked in the loop's thread after each token; True ends the stream.
    """

    prompt: EncodedPrompt
    sampling: SamplingOptions
    must_end: Callable[[Stream], bool] = lambda stream: False
    on_end: Callable[[Stream], None] = lambda stream: None
    added_s: float = 0.0
    times_s: list[float] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    reason: EndReason | None = None
    error: Exception | None = None
    sequence: EngineSequence = field(init=False)

    def __post_init__(self) -> None:
        self.sequence = EngineSequence(
            request_id=f"bench-{next(_numbers)}",
            prompt_ids=self.prompt.ids,
            sampling=self.sampling,
            deadline=float("inf"),
            on_token=self._on_token,
            on_end=self._on_end,
            vision=self.prompt.vision,
            pictures=self.prompt.pictures,
            prefix_ids=self.prompt.prefix_ids,
        )

    @property
    def output_ids(self) -> list[int]:
        return self.sequence.output_ids

    @property
    def first_token_s(self) -> float:
        """Seconds from when it was handed over to its first token."""
        return self.times_s[0] - self.added_s

    def gaps_s(self, begin_s: float, end_s: float) -> list[float]:
        """Between neighbouring tokens, of which the later came in that time."""
        return [after - before for before, after in pairwise(self.times_s) if begin_s < after <= end_s]

    def _on_token(self, token_id: int) -> bool:
        self.times_s.append(time.perf_counter())
        return self.must_end(self)

    def _on_end(self, sequence: EngineSequence, reason: EndReason, error: Exception | None) -> None:
        self.reason, self.error = reason, error
        self.on_end(self)
        self.ended.set()


class Engine:
    """A loop over one or two models; a context manager."""

    def __init__(
        self, models: Sequence[tuple[BenchModel, PagedRunner]], *, max_prefill_delay_s: float | None = None
    ) -> None:
        self._loop = EngineLoop(time.perf_counter)
        for model, runner in models:
            limits = model.limits
            self._loop.add_model(
                model.name,
                runner,
                SchedulerLimits(
                    max_running=model.loaded.max_running,
                    max_step_tokens=limits.max_step_tokens,
                    max_step_patches=limits.max_step_patches,
                    max_prefill_delay_s=limits.max_prefill_delay_s
                    if max_prefill_delay_s is None
                    else max_prefill_delay_s,
                ),
            )

    def __enter__(self) -> Engine:
        self._loop.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.stop(_STOP_S)

    def add(self, name: str, stream: Stream) -> None:
        stream.added_s = time.perf_counter()
        self._loop.add(name, stream.sequence)

    def reused_tokens(self, name: str) -> int:
        """Prompt tokens of this model that were found in the prefix cache so far."""
        return self._loop.snapshot().caches[name].reused_tokens

    def add_together(self, name: str, streams: Sequence[Stream]) -> None:
        """So that the next step sees all of them: they are added between two steps, by the loop's own thread."""

        def add_all(_: Stream) -> None:
            for stream in streams:
                self.add(name, stream)

        trigger = Stream(EncodedPrompt((1,)), sampling(1), on_end=add_all)
        self.add(name, trigger)

    def run(self, name: str, streams: Sequence[Stream]) -> None:
        """Add all at once, and wait for all. :raise Unable: see `wait`."""
        self.add_together(name, streams)
        self.wait(streams)

    def wait(self, streams: Sequence[Stream]) -> None:
        """:raise Unable: one failed, or it takes for ever."""
        deadline = time.perf_counter() + _TIMEOUT_S
        for stream in streams:
            if not stream.ended.wait(max(0.0, deadline - time.perf_counter())):
                raise Unable(f"the engine did not finish within {_TIMEOUT_S:g} s")
            if stream.error is not None:
                raise Unable(f"the engine failed: {stream.error}")


def sampling(max_tokens: int, temperature: float = 0.0, seed: int = 0) -> SamplingOptions:
    """Temperature and nothing else; no end but the length."""
    return SamplingOptions(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=1.0,
        top_k=0,
        repetition_penalty=1.0,
        seed=seed,
        stop_ids=frozenset(),
    )


def random_prompt(dice: random.Random, model: BenchModel, num_tokens: int) -> EncodedPrompt:
    """Ids of no meaning, none of them among the control tokens that stand first or last in a vocabulary."""
    size = model.vocab_size
    return EncodedPrompt(tuple(dice.choices(range(size // 4, 3 * size // 4), k=num_tokens)))


def picture_request(dice: random.Random, size_px: tuple[int, int], limits: Limits) -> ImageRequest:
    """A new picture and a short question."""
    data = make_picture(dice, *size_px)
    image = ImageInput(data, read_header(data, declared_type="", field="image", limits=limits))
    message = Message("user", "What is in this picture?")
    return ImageRequest((message,), (image,), SamplingParams(1, 0.0))


def encode(encoder: PromptEncoder, request: ImageRequest) -> EncodedPrompt:
    return encoder.encode(request, lambda: None)


def as_new(dice: random.Random, prompt: EncodedPrompt) -> EncodedPrompt:
    """The same under a name that no cache has seen, neither that of prefixes nor that of pictures.

    Encoding a new picture costs the host 50 ms, which a load of many pictures cannot pay while it measures the device.
    """
    known = prompt.ids if prompt.prefix_ids is None else prompt.prefix_ids
    pictures = tuple(replace(span, key=dice.randbytes(16)) for span in prompt.pictures)
    # The first id is enough: what follows is found by all that stands before it.
    return replace(prompt, prefix_ids=(-dice.getrandbits(56) - 1, *known[1:]), pictures=pictures)


@dataclass(frozen=True)
class Decoded:
    """What a batch did while all of it was decoding."""

    num_streams: int
    num_steps: int
    seconds: float

    @property
    def step_s(self) -> float:
        return self.seconds / self.num_steps

    @property
    def tokens_per_s(self) -> float:
        return self.num_streams / self.step_s


def decode_together(
    engine: Engine, name: str, prompts: Sequence[EncodedPrompt], num_steps: int, temperature: float
) -> Decoded:
    """Read all prompts, then time `num_steps` steps, counted by the stream that began last."""
    num_begun = 0
    last: Stream | None = None

    def must_end(stream: Stream) -> bool:
        nonlocal num_begun, last
        if len(stream.times_s) == 1:
            num_begun += 1
            if num_begun == len(prompts):
                last = stream
        return last is not None and len(last.times_s) > num_steps

    # The early ones go on while the late ones are read, so the end is not theirs to decide.
    endless = [sampling(1 << 20, temperature, seed) for seed in range(len(prompts))]
    streams = [Stream(prompt, options, must_end) for prompt, options in zip(prompts, endless, strict=True)]
    engine.run(name, streams)
    assert last is not None
    return Decoded(len(streams), num_steps, last.times_s[num_steps] - last.times_s[0])


def numbers(text: str) -> tuple[int, ...]:
    """For argparse: `1,8,32`."""
    found = tuple(int(part) for part in text.split(","))
    if min(found) < 1:
        raise ValueError
    return found
