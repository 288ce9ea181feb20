"""The real runner, scheduler, cache and loop on tiny random models of the true classes, against `generate`."""

from __future__ import annotations

import io
import json
import random
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from config import EngineOptions, Limits
from models.engine.graphs import Run
from models.engine.loop import EngineLoop
from models.engine.runner import PagedRunner, RunnerSizes
from models.engine.scheduler import SchedulerLimits
from models.engine.sequence import SamplingOptions, Sequence
from models.errors import EngineDead, InternalError, InvalidRequest, LoadError, NumericError
from models.images import read_header
from models.loader import LoadedModel, _capture, load_model
from models.prompts import PromptEncoder
from models.schemas import ImageInput, ImageRequest, Message, SamplingParams, TextRequest
from models.snapshots import Snapshot

NUM_TOKENS = 24


@dataclass
class Served:
    """A model ready to be stepped, and the same one as the library runs it."""

    loaded: LoadedModel
    encoder: PromptEncoder
    folder: Path
    _reference: list[Any] = field(default_factory=list)

    def runner(self, **given: Any) -> PagedRunner:
        """Small pages, so that every test crosses several."""
        sizes: dict[str, Any] = dict(num_pages=400, page_tokens=4, max_running=8, max_context_tokens=1024)
        options = {key: given.pop(key) for key in ("max_steps_in_flight", "capture") if key in given}
        sizes.update(given)
        runner = PagedRunner(self.loaded.stack, RunnerSizes(**sizes), tower=self.loaded.tower, **options)
        if "capture" in options:
            runner.capture_graphs()
        return runner

    @property
    def reference(self) -> Any:
        if not self._reference:
            kind: Any = AutoModelForCausalLM if self.loaded.tower is None else AutoModelForImageTextToText
            self._reference.append(kind.from_pretrained(self.folder, dtype=torch.float32).eval())
        return self._reference[0]


def load(folder: Path, model: Any, **limits: Any) -> Served:
    snapshot = Snapshot(model, folder, folder, "auto", "", False)
    loaded = load_model(
        snapshot, engine=EngineOptions(device="cpu"), limits=Limits(**limits), phase=lambda _: nullcontext()
    )
    return Served(loaded, loaded.make_encoder(100_000), folder)


def make_sequence(ids: tuple[int, ...], prompt: Any = None, **sampling: Any) -> Sequence:
    options: dict[str, Any] = dict(
        max_tokens=NUM_TOKENS,
        temperature=0.0,
        top_p=1.0,
        top_k=0,
        repetition_penalty=1.0,
        seed=0,
        stop_ids=frozenset(),
    )
    options.update(sampling)
    sequence = Sequence("t", ids, SamplingOptions(**options), 1e18, lambda _: False, lambda *_: None)
    if prompt is not None:
        sequence.vision, sequence.pictures, sequence.prefix_ids = prompt.vision, prompt.pictures, prompt.prefix_ids
    return sequence


class Ends:
    """How sequences ended: reason and error."""

    def __init__(self, *sequences: Sequence) -> None:
        self.seen: dict[Sequence, tuple[str, Exception | None]] = {}
        for sequence in sequences:
            sequence.on_end = self._on_end

    def _on_end(self, sequence: Sequence, reason: str, error: Exception | None) -> None:
        assert sequence not in self.seen, "ended twice"
        self.seen[sequence] = (reason, error)


def step_all(
    runner: PagedRunner, *sequences: Sequence, limits: SchedulerLimits | None = None, loop: EngineLoop | None = None
) -> Ends:
    """The engine's loop, pass by pass in this thread, until everybody has ended."""
    if loop is None:
        loop = EngineLoop(lambda: 0.0)
        loop.add_model("m", runner, limits or SchedulerLimits(max_running=8, max_step_tokens=4096))
    ends = Ends(*sequences)
    for sequence in sequences:
        loop.add("m", sequence)
    for _ in range(10_000):
        if len(ends.seen) == len(sequences):
            break
        assert loop._pass()
    assert len(ends.seen) == len(sequences)
    while loop._models["m"].in_flight:
        loop._pass()
    cache = loop._models["m"].scheduler.cache
    assert (cache.num_used_pages, runner.num_slots_taken) == (0, 0), "something was not given back"
    return ends


def run(runner: PagedRunner, *sequences: Sequence, **options: Any) -> list[list[int]]:
    """The answers, all of which must be complete."""
    ends = step_all(runner, *sequences, **options)
    assert {end for end, _ in ends.seen.values()} <= {"length", "stop"}, ends.seen.values()
    return [sequence.output_ids for sequence in sequences]


def generate(model: Any, ids: tuple[int, ...], **inputs: Any) -> list[int]:
    model.generation_config.eos_token_id = None
    with torch.inference_mode():
        output = model.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            **inputs,
        )
    return list(output[0, len(ids) :].tolist())


def generate_pictures(served: Served, prompt: Any) -> list[int]:
    ids = torch.tensor([prompt.ids])
    return generate(
        served.reference,
        prompt.ids,
        pixel_values=torch.cat(prompt.vision.pixel_values),
        image_grid_thw=prompt.vision.grids,
        mm_token_type_ids=(ids == served.reference.config.image_token_id).int(),
    )


def replayed(run: Run) -> Run:
    """What a CUDA graph is to its caller, on a CPU: the same computation into the same output buffer."""
    output = run().clone()

    def replay() -> torch.Tensor:
        output.copy_(run())
        return output

    return replay


def text_ids(served: Served, text: str) -> tuple[int, ...]:
    return served.encoder.encode(TextRequest((Message("user", text),), SamplingParams(8, 0.0)), lambda: None).ids


def picture(width: int, height: int, seed: int = 0) -> ImageInput:
    image = Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(width * height * 3))
    file = io.BytesIO()
    image.save(file, "PNG")
    data = file.getvalue()
    return ImageInput(data, read_header(data, declared_type="", field="image", limits=Limits()))


def image_request(text: str, *images: ImageInput) -> ImageRequest:
    return ImageRequest((Message("user", text),), images, SamplingParams(8, 0.0))


PROMPTS = ("Привет, как дела?", "The quick brown fox", "x", "Съешь ещё этих мягких французских булок " * 3, "one two")


def encode_pictures(served: Served, text: str, *pictures: ImageInput) -> Any:
    return served.encoder.encode(image_request(text, *pictures), lambda: None)


@pytest.fixture(scope="session")
def qwen3(qwen3_folder: Path) -> Served:
    return load(qwen3_folder, "avibe")


@pytest.fixture(scope="session")
def llama(llama_folder: Path) -> Served:
    return load(llama_folder, "avibe")


@pytest.fixture(scope="session")
def vision(vision_folder: Path) -> Served:
    return load(vision_folder, "avision")


@pytest.fixture(params=["qwen3", "llama"])
def text_model(request: pytest.FixtureRequest) -> Served:
    served: Served = request.getfixturevalue(request.param)
    return served


def expected_texts(served: Served) -> list[list[int]]:
    return [generate(served.reference, text_ids(served, text)) for text in PROMPTS]


def test_greedy_alone_equals_generate(text_model: Served) -> None:
    runner = text_model.runner()
    ours = [run(runner, make_sequence(text_ids(text_model, text)))[0] for text in PROMPTS]
    assert ours == expected_texts(text_model)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"max_steps_in_flight": 2}, id="pipelined"),
        pytest.param({"capture": replayed}, id="graphs"),
        pytest.param({"capture": replayed, "max_steps_in_flight": 2, "page_tokens": 32}, id="graphs-pipelined"),
    ],
)
def test_greedy_batched_equals_generate(text_model: Served, options: dict[str, Any]) -> None:
    sequences = [make_sequence(text_ids(text_model, text)) for text in PROMPTS]
    assert run(text_model.runner(**options), *sequences) == expected_texts(text_model)


def test_short_prompt_after_long_ones_in_captured_prefill_equals_generate(qwen3: Served) -> None:
    """All graphs of the ladder share buffers, and what earlier prompts left there must not reach a smaller one."""
    runner = qwen3.runner(capture=replayed)
    long, short = [tuple(range(10 + index, 70 + index)) for index in range(3)], tuple(range(10, 30))
    expected = [generate(qwen3.reference, ids) for ids in (*long, short)]
    assert run(runner, *map(make_sequence, long)) == expected[:3]
    assert run(runner, make_sequence(short)) == expected[3:]


@pytest.mark.parametrize("budget", [1, 5, 17])
def test_prompts_read_in_chunks_equal_generate(text_model: Served, budget: int) -> None:
    sequences = [make_sequence(text_ids(text_model, text)) for text in PROMPTS]
    limits = SchedulerLimits(max_running=3, max_step_tokens=budget, min_chunk_tokens=1)
    assert run(text_model.runner(), *sequences, limits=limits) == expected_texts(text_model)


@pytest.mark.parametrize("depth", [1, 2])
def test_preempted_sequences_equal_generate(text_model: Served, depth: int) -> None:
    """Pages for about two of five sequences: the young are computed again, and nobody's answer changes."""
    sequences = [make_sequence(text_ids(text_model, text)) for text in PROMPTS]
    longest = max(len(sequence.prompt_ids) for sequence in sequences)
    runner = text_model.runner(num_pages=(longest + 2 * NUM_TOKENS) // 4 + 12, max_steps_in_flight=depth)
    loop = EngineLoop(lambda: 0.0)
    loop.add_model("m", runner, SchedulerLimits(max_running=8))
    assert run(runner, *sequences, loop=loop) == expected_texts(text_model)
    assert loop.snapshot().caches["m"].num_preemptions > 0


def test_reused_prefixes_equal_generate(text_model: Served) -> None:
    """The same prompt again, and one that parts from it in the middle of a page."""
    runner = text_model.runner(page_tokens=16)
    loop = EngineLoop(lambda: 0.0)
    loop.add_model("m", runner, SchedulerLimits(max_running=8))
    first = text_ids(text_model, "Съешь ещё этих мягких французских булок, да выпей чаю.")
    other = (*first[: len(first) - 12], *reversed(first[-12:]))
    for ids in (first, first, other, first):
        assert run(runner, make_sequence(ids), loop=loop) == [generate(text_model.reference, ids)]
    books = loop.snapshot().caches["m"]
    assert books.reused_tokens >= 3 * (len(first) - 12) - 16


def test_sampled_answer_does_not_depend_on_the_batch(qwen3: Served) -> None:
    def make(index: int) -> Sequence:
        extras = [
            {},
            {"top_p": 0.8},
            {"top_k": 7, "repetition_penalty": 1.3},
            {"presence_penalty": 0.5},
            {"min_p": 0.02},
        ]
        return make_sequence(text_ids(qwen3, PROMPTS[index]), temperature=0.9, seed=5 + index, **extras[index])

    alone = [run(qwen3.runner(), make(index))[0] for index in range(5)]
    assert run(qwen3.runner(), *map(make, range(5))) == alone
    assert run(qwen3.runner(capture=replayed, max_steps_in_flight=2), *map(make, range(5))) == alone
    tight = SchedulerLimits(max_running=2, max_step_tokens=7, min_chunk_tokens=1)
    assert run(qwen3.runner(num_pages=60), *map(make, range(5)), limits=tight) == alone


@pytest.mark.parametrize("sizes", [[(84, 56)], [(1, 1)], [(140, 84), (56, 112)]])
def test_greedy_pictures_equal_generate(vision: Served, sizes: list[tuple[int, int]]) -> None:
    prompt = encode_pictures(vision, "What is it?", *(picture(*size) for size in sizes))
    assert run(vision.runner(), make_sequence(prompt.ids, prompt)) == [generate_pictures(vision, prompt)]


@pytest.mark.parametrize(
    ("options", "limits"),
    [
        ({}, {}),
        ({"max_steps_in_flight": 2, "capture": replayed}, {}),
        ({}, {"max_step_tokens": 5, "min_chunk_tokens": 1}),
        ({}, {"max_step_patches": 1}),
        ({"num_pages": 60}, {}),
    ],
    ids=["plain", "graphs-pipelined", "chunks", "one-picture-a-step", "few-pages"],
)
def test_mixed_batch_of_pictures_and_text_equals_generate(
    vision: Served, options: dict[str, Any], limits: dict[str, Any]
) -> None:
    prompts = [
        encode_pictures(vision, "a", picture(56, 56, 1)),
        encode_pictures(vision, "bb", picture(280, 168, 2), picture(84, 84, 3)),
        encode_pictures(vision, "a", picture(56, 56, 1)),
        encode_pictures(vision, "c", picture(84, 84, 3), picture(280, 168, 2)),
    ]
    sequences = [make_sequence(prompt.ids, prompt) for prompt in prompts]
    text = text_ids(vision, "No picture at all")
    ours = run(
        vision.runner(**options),
        *sequences,
        make_sequence(text),
        limits=SchedulerLimits(**{"max_running": 8} | limits),
    )
    assert ours == [generate_pictures(vision, prompt) for prompt in prompts] + [generate(vision.reference, text)]


def test_other_picture_is_no_prefix_hit(vision: Served) -> None:
    """Placeholders are the same ids for all pictures; what is compared is their content."""
    runner = vision.runner()
    loop = EngineLoop(lambda: 0.0)
    loop.add_model("m", runner, SchedulerLimits(max_running=8))
    prompts = [encode_pictures(vision, "a", picture(84, 56, seed)) for seed in (1, 2, 1)]
    answers = [run(runner, make_sequence(p.ids, p), loop=loop)[0] for p in prompts]
    assert answers == [generate_pictures(vision, prompt) for prompt in prompts]
    assert answers[0] != answers[1]
    assert loop.snapshot().caches["m"].reused_tokens > 0


def test_same_picture_is_encoded_once(vision: Served) -> None:
    tower = vision.loaded.tower
    assert tower is not None
    prompts = [encode_pictures(vision, text, picture(84, 56, 99)) for text in ("a", "b", "c")]
    before = tower.num_misses
    run(vision.runner(), *(make_sequence(p.ids, p) for p in prompts))
    assert tower.num_misses == before + 1


class Poison:
    """Changes the stack's embeddings of one token id while it is in force."""

    def __init__(self, served: Served, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        self.stack, self.change = served.loaded.stack, change

    def __enter__(self) -> None:
        original = type(self.stack).embed
        self.stack.embed = lambda ids: self.change(ids, original(self.stack, ids))  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        del self.stack.embed


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_logits_end_only_their_request(qwen3: Served, value: float) -> None:
    good, bad, after = make_sequence((5, 6, 7)), make_sequence((8, 9, 10)), make_sequence((11, 12, 13, 14, 15))
    expected = run(qwen3.runner(), make_sequence((5, 6, 7)), make_sequence((11, 12, 13, 14, 15)))
    runner = qwen3.runner(num_pages=20)
    loop = EngineLoop(lambda: 0.0)
    loop.add_model("m", runner, SchedulerLimits(max_running=8))
    with Poison(qwen3, lambda ids, x: torch.where((ids == 9)[:, None], x + value, x)):
        ends = step_all(runner, good, bad, loop=loop)
    assert isinstance(ends.seen[bad][1], NumericError)
    assert good.output_ids == expected[0]
    # Its pages serve others, and nothing of it is left in them.
    assert run(runner, after, loop=loop) == [expected[1]]


def test_step_without_memory_is_tried_again_and_nobody_loses_a_token(qwen3: Served) -> None:
    sequences = [make_sequence(text_ids(qwen3, text)) for text in PROMPTS]
    failures = iter([False, False, True, False, True])

    def exhaust(ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if next(failures, False):
            raise torch.OutOfMemoryError("injected")
        return x

    with Poison(qwen3, exhaust):
        assert run(qwen3.runner(), *sequences) == expected_texts(qwen3)


def test_request_that_never_fits_into_memory_ends_with_an_error_and_others_go_on(qwen3: Served) -> None:
    good, bad = make_sequence((5, 6, 7)), make_sequence((8, 9, 10))
    expected = run(qwen3.runner(), make_sequence((5, 6, 7)))

    def exhaust(ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if 9 in ids:
            raise torch.OutOfMemoryError("injected")
        return x

    runner = qwen3.runner()
    loop = EngineLoop(lambda: 0.0)
    loop.add_model("m", runner, SchedulerLimits(max_running=8))
    with Poison(qwen3, exhaust):
        assert run(runner, good, loop=loop) == expected
        ends = step_all(runner, bad, loop=loop)
    reason, error = ends.seen[bad]
    assert reason == "failed" and isinstance(error, InternalError) and "memory" in str(error)
    assert bad.num_retries == 3
    assert run(runner, make_sequence((5, 6, 7)), loop=loop) == expected


def test_sticky_device_error_ends_the_engine_and_everybody_learns_it(qwen3: Served) -> None:
    def fail(ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        raise torch.AcceleratorError("injected: device-side assert")

    loop = EngineLoop(lambda: 0.0)
    loop.add_model("m", qwen3.runner(), SchedulerLimits(max_running=1))
    sequences = [make_sequence((5, 6, 7)), make_sequence((8, 9))]
    ends = Ends(*sequences)
    for sequence in sequences:
        loop.add("m", sequence)
    with Poison(qwen3, fail):
        loop._run()
    assert loop.snapshot().is_dead
    assert {type(error) for _, error in ends.seen.values()} == {EngineDead} and len(ends.seen) == 2
    with pytest.raises(EngineDead):
        loop.add("m", make_sequence((5,)))


def test_card_that_cannot_capture_serves_without_graphs(qwen3: Served) -> None:
    def refuse(run: Run) -> Run:
        raise RuntimeError("operation not permitted when stream is capturing")

    runner = qwen3.runner()
    runner._capture = refuse
    _capture(runner)
    assert not runner.has_graphs
    sequences = [make_sequence(text_ids(qwen3, text)) for text in PROMPTS]
    assert run(runner, *sequences) == expected_texts(qwen3)


class Alternating:
    """Allows even ids after odd ones and odd ids after even ones; each mask is ready at the second asking."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.parity, self.num_asked = vocab_size, 0, 0
        self.seen: list[int] = []

    def advance(self, token_id: int) -> None:
        self.seen.append(token_id)
        self.parity = 1 - token_id % 2

    def allowed_mask(self) -> Any:
        self.num_asked += 1
        if self.num_asked % 2:
            return None
        word = 0x55555555 if self.parity == 0 else 0xAAAAAAAA - 2**32
        return np.full(-(-self.vocab_size // 32), word, dtype=np.int32)


@pytest.mark.parametrize("depth", [1, 2])
def test_grammar_row_keeps_to_its_mask_and_changes_nobody_else(qwen3: Served, depth: int) -> None:
    grammar = Alternating(qwen3.loaded.stack.shape.vocab_size)
    bound, free = make_sequence((5, 6, 7), temperature=0.9, seed=3), make_sequence((5, 6, 7), temperature=0.9, seed=3)
    bound.constraint = grammar
    alone = run(qwen3.runner(), make_sequence((5, 6, 7), temperature=0.9, seed=3))
    answers = run(qwen3.runner(max_steps_in_flight=depth), bound, free)
    assert [token_id % 2 for token_id in answers[0]] == [0, 1] * (NUM_TOKENS // 2)
    assert grammar.seen == answers[0] and answers[1] == alone[0]


def test_grammar_that_allows_nothing_ends_its_request_with_an_error(qwen3: Served) -> None:
    class Nothing(Alternating):
        def allowed_mask(self) -> Any:
            return np.zeros(-(-self.vocab_size // 32), dtype=np.int32)

    bad, good = make_sequence((5, 6, 7)), make_sequence((5, 6, 7))
    bad.constraint = Nothing(qwen3.loaded.stack.shape.vocab_size)
    ends = step_all(qwen3.runner(), bad, good)
    assert isinstance(ends.seen[bad][1], InternalError) and ends.seen[good][0] == "length"


def test_logprobs_are_those_of_the_model(qwen3: Served) -> None:
    ids = text_ids(qwen3, PROMPTS[0])
    asked, other = make_sequence(ids, num_logprobs=3, temperature=0.8, seed=1), make_sequence(ids, num_logprobs=None)
    run(qwen3.runner(), asked, other)
    assert other.logprobs == [] and len(asked.logprobs) == NUM_TOKENS
    with torch.inference_mode():
        logits = qwen3.reference(torch.tensor([[*ids, *asked.output_ids]])).logits[0, len(ids) - 1 : -1]
    expected = logits.log_softmax(-1)
    for at, given in enumerate(asked.logprobs):
        assert given.chosen == pytest.approx(float(expected[at, asked.output_ids[at]]), abs=1e-3)
        assert [token_id for token_id, _ in given.top] == expected[at].topk(3).indices.tolist()


def test_stop_ids_end_and_min_tokens_hold_them_back(qwen3: Served) -> None:
    answer = run(qwen3.runner(), make_sequence((5, 6, 7)))[0]
    stop = answer[4]
    first = answer.index(stop)
    stopped, held = (
        make_sequence((5, 6, 7), stop_ids=frozenset({stop}), **given) for given in ({}, {"min_tokens": first + 3})
    )
    run(qwen3.runner(), stopped, held)
    assert stopped.output_ids == answer[:first]
    assert len(held.output_ids) >= first + 3 and stop not in held.output_ids


def test_two_models_in_one_loop_answer_as_each_alone(qwen3: Served, vision: Served) -> None:
    prompt = encode_pictures(vision, "a", picture(84, 56, 7))
    loop = EngineLoop(time.monotonic)
    runners = {"avibe": qwen3.runner(max_steps_in_flight=2), "avision": vision.runner(max_steps_in_flight=2)}
    for name, runner in runners.items():
        loop.add_model(name, runner, SchedulerLimits(max_running=8))
    texts = [make_sequence(text_ids(qwen3, text)) for text in PROMPTS]
    seeing = make_sequence(prompt.ids, prompt)
    ends = Ends(*texts, seeing)
    for sequence in texts:
        loop.add("avibe", sequence)
    loop.add("avision", seeing)
    while len(ends.seen) < len(texts) + 1:
        assert loop._pass()
    assert [sequence.output_ids for sequence in texts] == expected_texts(qwen3)
    assert seeing.output_ids == generate_pictures(vision, prompt)


def test_id_outside_the_vocabulary_ends_only_its_request(qwen3: Served) -> None:
    good, bad = make_sequence((5, 6, 7)), make_sequence((5, 6), logit_bias=((10**6, 1.0),))
    ends = step_all(qwen3.runner(), good, bad)
    assert ends.seen[good][0] == "length" and isinstance(ends.seen[bad][1], ValueError)


def test_generation_config_counts_where_request_is_silent(qwen3_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "snapshot"
    shutil.copytree(qwen3_folder, folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "top_k": 7, "top_p": 0.5, "temperature": 0.1}))
    encoder = load(folder, "avibe").encoder
    silent = encoder.sampling_options(SamplingParams(8, 0.7), 5)
    assert (silent.top_k, silent.top_p, silent.temperature, silent.repetition_penalty) == (7, 0.5, 0.7, 1.0)
    spoken = encoder.sampling_options(SamplingParams(8, 0.7, top_k=3, top_p=0.9), 5)
    assert (spoken.top_k, spoken.top_p) == (3, 0.9)
    everything: dict[str, Any] = dict(
        min_p=0.1, presence_penalty=0.5, frequency_penalty=-0.5, min_tokens=3, logit_bias=((4, -1.0),), num_logprobs=2
    )
    options = encoder.sampling_options(SamplingParams(8, 0.7, **everything), 5)
    assert {name: getattr(options, name) for name in everything} == everything


def test_ignore_eos_leaves_only_the_stop_ids_that_were_asked_for(qwen3: Served) -> None:
    def stop_ids(**given: Any) -> frozenset[int]:
        return qwen3.encoder.sampling_options(SamplingParams(8, 0.7, **given), 5).stop_ids

    own = stop_ids()
    assert len(own) == 2 and 7 not in own
    assert stop_ids(stop_token_ids=(7,)) == own | {7}
    assert stop_ids(ignore_eos=True) == frozenset()
    assert stop_ids(ignore_eos=True, stop_token_ids=(7,)) == {7}


def test_without_max_tokens_there_are_as_many_as_the_limit_and_the_context_leave(qwen3: Served) -> None:
    encoder = qwen3.encoder
    for num_prompt in (5, encoder.context_tokens - 3):
        options = encoder.sampling_options(SamplingParams(None, 0.7), num_prompt)
        assert options.max_tokens == min(Limits().max_tokens, encoder.context_tokens - num_prompt)


@pytest.mark.parametrize(
    ("given", "field"), [({"stop_token_ids": (10**6,)}, "stop_token_ids"), ({"logit_bias": ((-1, 1.0),)}, "logit_bias")]
)
def test_token_ids_that_the_model_does_not_have_are_refused(qwen3: Served, given: Any, field: str) -> None:
    with pytest.raises(InvalidRequest, match="less than") as error:
        qwen3.encoder.sampling_options(SamplingParams(8, 0.7, **given), 5)
    assert error.value.field == field


def test_weights_other_than_safetensors_are_refused(qwen3_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(qwen3_folder, tmp_path / "snapshot")
    file = tmp_path / "snapshot" / "model.safetensors"
    torch.save({}, tmp_path / "snapshot" / "pytorch_model.bin")
    file.unlink()
    with pytest.raises(OSError, match="safetensors"):
        load(tmp_path / "snapshot", "avibe")


@pytest.mark.parametrize(("layers", "what"), [(3, "are missing"), (2, None)])
def test_incomplete_weights_are_not_filled_with_random_numbers(
    qwen3_folder: Path, tmp_path: Path, layers: int, what: str | None
) -> None:
    folder = tmp_path / "snapshot"
    shutil.copytree(qwen3_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": layers, "layer_types": ["full_attention"] * layers}
    (folder / "config.json").write_text(json.dumps(config))
    if what is None:
        load(folder, "avibe")
    else:
        with pytest.raises(LoadError, match=what):
            load(folder, "avibe")


def test_weights_of_another_shape_are_refused(qwen3_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "snapshot"
    shutil.copytree(qwen3_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 80}))
    with pytest.raises(LoadError, match="6 weights have another shape than"):
        load(folder, "avibe")
