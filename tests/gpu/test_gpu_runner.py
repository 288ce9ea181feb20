"""The runner on a card: against the library's `generate` in FP16, captured against eager, and never waiting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from models.engine.layers import SmallOperations, add_norm, rms_norm, rotate_qk, silu_mul
from models.engine.loop import EngineLoop, LaunchedStep
from models.engine.runner import PagedRunner
from models.engine.scheduler import SchedulerLimits, Step
from models.engine.sequence import Sequence
from models.schemas import Message, SamplingParams, TextRequest
from tests.gpu.tiny import (
    LOGPROB_TOLERANCE,
    OnDevice,
    assert_parts_at_near_ties_only,
    generate_on,
    share_equal,
)
from tests.test_runner import NUM_TOKENS, PROMPTS, encode_pictures, make_sequence, picture, run, text_ids

# A token at a near tie may be another one in FP16, and then the rest of the answer is too. Random models have far more
# near ties than trained ones.
MIN_SHARE_EQUAL = 0.6
# Two roundings more or less to 11 bits, of values up to 8.
OPERATION_TOLERANCE = 8e-3


@pytest.fixture(params=["qwen3", "llama"])
def text_model(request: pytest.FixtureRequest, head_dim: int) -> OnDevice:
    served: OnDevice = request.getfixturevalue(request.param)
    return served


def all_logprobs(runner: PagedRunner, prompt: Any) -> torch.Tensor:
    """(vocab_size,): of the first token of an answer, in the order of ids."""
    vocab_size = runner._stack.shape.vocab_size
    sequence = make_sequence(prompt.ids, prompt, max_tokens=1, num_logprobs=vocab_size)
    run(runner, sequence)
    found = torch.full((vocab_size,), torch.nan)
    for token_id, logprob in sequence.logprobs[0].top:
        found[token_id] = logprob
    return found


def assert_as_generated(served: OnDevice, prompts: list[Any], *, is_captured: bool) -> None:
    answers = [generate_on(served, prompt) for prompt in prompts]
    for prompt, answer in zip(prompts, answers, strict=True):
        ours = all_logprobs(served.runner(is_captured=is_captured), prompt)
        print(f"log-probabilities of the first token differ by {(ours - answer.logprobs[0]).abs().max():.4f} at most")
        torch.testing.assert_close(ours, answer.logprobs[0], rtol=0, atol=LOGPROB_TOLERANCE)
    runner = served.runner(is_captured=is_captured)
    outputs = run(runner, *(make_sequence(prompt.ids, prompt) for prompt in prompts))
    for output, answer in zip(outputs, answers, strict=True):
        assert_parts_at_near_ties_only(output, answer, 2 * LOGPROB_TOLERANCE)
    share = share_equal(outputs, [answer.token_ids for answer in answers])
    print(f"tokens equal to generate's: {share:.1%}")
    assert share >= MIN_SHARE_EQUAL


@pytest.mark.parametrize("is_captured", [False, True], ids=["eager", "graphs"])
def test_texts_are_those_of_generate(text_model: OnDevice, is_captured: bool) -> None:
    prompts = [text_model.encoder.encode(text_request(text), lambda: None) for text in PROMPTS]
    assert_as_generated(text_model, prompts, is_captured=is_captured)


@pytest.mark.parametrize("is_captured", [False, True], ids=["eager", "graphs"])
def test_answers_about_pictures_are_those_of_generate(vision: OnDevice, is_captured: bool) -> None:
    prompts = [
        encode_pictures(vision, "a", picture(56, 56, 1)),
        encode_pictures(vision, "bb", picture(280, 168, 2), picture(84, 84, 3)),
        encode_pictures(vision, "a", picture(1, 1)),
    ]
    assert_as_generated(vision, prompts, is_captured=is_captured)


def text_request(text: str) -> Any:
    return TextRequest((Message("user", text),), SamplingParams(8, 0.0))


def prompts_of_32() -> list[tuple[int, ...]]:
    return [tuple(range(10 + 7 * index, 42 + 7 * index)) for index in range(8)]


def test_captured_steps_give_the_tokens_of_eager_ones(text_model: OnDevice) -> None:
    """Eight sequences of 32 tokens fill the graphs of 256 and 8 exactly: matrices have the same shapes, and kernels the
    same order of sums."""
    for temperature in (0.0, 0.9):
        eager, captured = (
            run(
                text_model.runner(is_captured=is_captured),
                *(make_sequence(ids, temperature=temperature, seed=ids[0]) for ids in prompts_of_32()),
            )
            for is_captured in (False, True)
        )
        assert captured == eager


def test_captured_forward_of_every_size_equals_the_eager_one(text_model: OnDevice) -> None:
    """Also where rows are padded. The step is not fed, so that it can be run again and again."""
    runner = text_model.runner(is_captured=True)
    loop = EngineLoop(lambda: 0.0)
    loop.add_model("m", runner, SchedulerLimits(max_running=8))
    sequences = [make_sequence(ids, max_tokens=99) for ids in prompts_of_32()]
    for sequence in sequences:
        loop.add("m", sequence)
    while min(len(sequence.output_ids) for sequence in sequences) < 3:
        loop._pass()
    while loop._models["m"].in_flight:
        loop._collect(loop._models["m"])
    graphs = runner._decode_graphs
    assert graphs is not None and graphs.sizes == (1, 2, 4, 8)
    slots = [runner._slots[sequence] for sequence in sequences]
    for size in graphs.sizes:
        num = max(1, size - 1)
        padded = slots[:num] + [0] * (size - num)
        with runner._device.scope(), torch.inference_mode():
            runner._row_slots[:size] = runner._device.put(padded)
            eager = runner._decode_forward(runner._row_slots[:size], runner._sizes.max_pages).clone()
            captured = graphs.replay(size).clone()
            alone = runner._decode_forward(runner._row_slots[:num], runner._sizes.max_pages).clone()
            largest = float(eager[:num].abs().max())
            # Read on the stream that they were made on.
            ours, same_shape, other_shape = (x[:num].float().cpu() for x in (captured, eager, alone))
        assert largest > 1
        torch.testing.assert_close(ours, same_shape, rtol=0, atol=2e-3 * largest)
        torch.testing.assert_close(ours, other_shape, rtol=0, atol=2e-2 * largest)


def test_compiled_operations_equal_eager_ones(device: torch.device) -> None:
    compiled = SmallOperations.compiled()
    source = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=source).half().to(device)

    weight, head_weight, other_head_weight = random(512), random(64), random(64)
    angles = random(1, 64).float()
    for num_tokens in (1, 8, 300):
        x, residual, gate_up = random(num_tokens, 512), random(num_tokens, 512), random(num_tokens, 1024)
        qkv, at = random(num_tokens, 8 * 64), angles * torch.arange(num_tokens, device=device)[:, None]
        cos, sin = at.cos().half(), at.sin().half()
        calls: list[tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]] = [
            (compiled.norm, rms_norm, (x, weight, 1e-6)),
            (compiled.add_norm, add_norm, (x, residual, weight, 1e-6)),
            (compiled.silu_mul, silu_mul, (gate_up,)),
            (compiled.rotate_qk, rotate_qk, (qkv, cos, sin, None, 4, 2, 64, 1e-6)),
            (compiled.rotate_qk, rotate_qk, (qkv, cos, sin, (head_weight, other_head_weight), 4, 2, 64, 1e-6)),
        ]
        for ours, theirs, arguments in calls:
            with torch.inference_mode():
                found, expected = ours(*arguments), theirs(*arguments)
            torch.testing.assert_close(found, expected, rtol=OPERATION_TOLERANCE, atol=OPERATION_TOLERANCE)


def test_sampled_answers_alone_and_in_a_batch_agree_for_the_most_part(text_model: OnDevice) -> None:
    """The noise is the same; products of matrices of another height may round the logits otherwise. The share is
    measured, and bounded only loosely."""

    def make(index: int) -> Sequence:
        return make_sequence(text_ids(text_model, PROMPTS[index]), temperature=0.9, top_p=0.95, seed=5 + index)

    indices = range(len(PROMPTS))
    for is_captured in (False, True):
        alone = [run(text_model.runner(is_captured=is_captured), make(index))[0] for index in indices]
        together = run(text_model.runner(is_captured=is_captured), *map(make, indices))
        share = share_equal(alone, together)
        print(f"tokens equal alone and in a batch, {'captured' if is_captured else 'eager'}: {share:.1%}")
        assert share >= 0.4


def test_same_batch_twice_gives_the_same_tokens(text_model: OnDevice) -> None:
    runs = [
        run(
            text_model.runner(is_captured=True),
            *(make_sequence(ids, temperature=0.9, top_k=20, seed=ids[0]) for ids in prompts_of_32()),
        )
        for _ in range(2)
    ]
    assert runs[0] == runs[1]


def test_two_models_in_one_loop_answer_as_each_alone(qwen3: OnDevice, llama: OnDevice) -> None:
    """Each on a stream of its own. One sequence of a model at a time, so that its steps have the same shapes however
    the two take turns."""
    served = {"a": qwen3, "b": llama}
    limits = SchedulerLimits(max_running=1, min_chunk_tokens=4096)

    def make(name: str) -> list[Sequence]:
        texts = (text_ids(served[name], text) for text in PROMPTS)
        return [make_sequence(ids, temperature=0.8, seed=1) for ids in texts]

    alone = {name: run(each.runner(is_captured=True), *make(name), limits=limits) for name, each in served.items()}
    loop = EngineLoop(lambda: 0.0)
    runners = {name: each.runner(is_captured=True) for name, each in served.items()}
    sequences = {name: make(name) for name in served}
    ended: list[str] = []
    for name, runner in runners.items():
        loop.add_model(name, runner, limits)
        for sequence in sequences[name]:
            sequence.on_end = lambda _, reason, error: ended.append(reason)
    for pair in zip(*sequences.values(), strict=True):
        for name, sequence in zip(sequences, pair, strict=True):
            loop.add(name, sequence)
    for _ in range(10_000):
        if len(ended) == 2 * len(PROMPTS):
            break
        assert loop._pass()
    assert ended == ["length"] * (2 * len(PROMPTS))
    assert {name: [each.output_ids for each in those] for name, those in sequences.items()} == alone


class WithoutWaiting:
    """In force, a launch that waits for the device fails."""

    def __init__(self, runner: PagedRunner) -> None:
        self.runner = runner
        self.num_launched = 0

    def __enter__(self) -> WithoutWaiting:
        launch = self.runner.launch

        def strict(step: Step) -> LaunchedStep:
            self.num_launched += 1
            torch.cuda.set_sync_debug_mode("error")
            try:
                return launch(step)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        self.runner.launch = strict  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        del self.runner.launch


SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 0.8},
    "top-p": {"temperature": 0.8, "top_p": 0.9},
    "top-k": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "many": {"temperature": 0.8, "top_k": 200},
    "penalties": {"temperature": 0.8, "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.1},
    "rest": {"logit_bias": ((5, 1.0),), "min_tokens": 4, "num_logprobs": 3, "stop_ids": frozenset({2})},
}


@pytest.mark.parametrize("is_captured", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("name", SAMPLING)
def test_no_launch_waits_for_the_device(card: torch.device, qwen3: OnDevice, name: str, is_captured: bool) -> None:
    runner = qwen3.runner(is_captured=is_captured)

    def ask() -> None:
        run(runner, *(make_sequence(text_ids(qwen3, text), **SAMPLING[name]) for text in PROMPTS))

    ask()
    with WithoutWaiting(runner) as watched:
        ask()
    assert watched.num_launched >= NUM_TOKENS


@pytest.mark.parametrize("is_captured", [False, True], ids=["eager", "graphs"])
def test_no_launch_with_pictures_waits_for_the_device(card: torch.device, vision: OnDevice, is_captured: bool) -> None:
    runner = vision.runner(is_captured=is_captured)

    def ask(seed: int) -> None:
        prompts = [encode_pictures(vision, "a", picture(84, 56, seed)), encode_pictures(vision, "b", picture(140, 84))]
        run(runner, *(make_sequence(prompt.ids, prompt) for prompt in prompts))

    ask(1)
    with WithoutWaiting(runner) as watched:
        ask(2)  # a picture that is not cached
    assert watched.num_launched >= NUM_TOKENS


def test_a_launch_that_waits_is_noticed(card: torch.device, qwen3: OnDevice) -> None:
    """Without this the tests above could pass with a watch that sees nothing."""
    runner = qwen3.runner()
    decode = runner._decode
    runner._decode = lambda rows: (runner._tokens.tolist(), decode(rows))[1]  # type: ignore[method-assign]
    with WithoutWaiting(runner), pytest.raises(AssertionError, match="synchronizing"):
        run(runner, make_sequence((5, 6, 7)))
