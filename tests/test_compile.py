"""What `torch.compile` makes of the small operations computes the same, and is not made again while serving."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

from models.engine import sampling
from models.engine.layers import SmallOperations, fused, rms_norm
from models.loader import _compile
from tests.test_runner import (
    PROMPTS,
    Served,
    encode_pictures,
    expected_texts,
    generate_pictures,
    make_sequence,
    picture,
    qwen3,
    replayed,
    run,
    text_ids,
    vision,
)

__all__ = ["qwen3", "vision"]  # fixtures

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU"),
    # What torch says of its own old parts while it compiles.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, WIDTH, EPS = 4, 2, 16, 64, 1e-6


def arguments(num: int, dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """Of each small operation."""
    rng = torch.Generator().manual_seed(num)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng).to(dtype)

    x, residual, weight = random(num, WIDTH), random(num, WIDTH), random(WIDTH)
    qkv = random(num, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM)
    norms = (random(HEAD_DIM), random(HEAD_DIM))
    rotary = (random(num, HEAD_DIM), random(num, HEAD_DIM))
    return {
        "norm": (x, weight, EPS),
        "add_norm": (x, residual, weight, EPS),
        "rotate_qk": (qkv, *rotary, norms, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, EPS),
        "silu_mul": (random(num, 2 * WIDTH),),
    }


def race_arguments(num: int, dtype: torch.dtype) -> tuple[Any, Any, Any, Any]:
    rng = torch.Generator().manual_seed(num)
    logits = (torch.randn(num, 400, generator=rng) * 3).to(dtype)
    keys = torch.tensor([sampling.noise_keys(seed) for seed in range(num)])
    return logits, torch.rand(num, generator=rng).round(decimals=1), keys, torch.arange(num) * 7


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 4e-3)])
def test_compiled_operations_equal_eager_ones_and_serve_any_number_of_tokens(
    dtype: torch.dtype, tolerance: float
) -> None:
    """In half precision a fused kernel rounds once where eager rounds after each operation."""
    eager, compiled = SmallOperations(), SmallOperations.compiled()
    with torch.inference_mode():
        for num in (24, 1):
            for name, given in arguments(num, dtype).items():
                getattr(compiled, name)(*given)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for num in (1, 2, 3, 24, 64, 127):
                for name, given in arguments(num, dtype).items():
                    ours, theirs = getattr(compiled, name)(*given), getattr(eager, name)(*given)
                    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, check_stride=True)


def test_compiled_operations_of_two_models_do_not_count_against_one_limit() -> None:
    with torch._dynamo.config.patch(recompile_limit=2), torch.inference_mode():
        for width in (8, 16, 24):
            compiled = SmallOperations.compiled()
            for num in (5, 1, 6):
                x = torch.rand(num, width)
                assert compiled.silu_mul(x).shape == (num, width // 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_compiled_race_draws_the_same_tokens_for_any_number_of_rows(dtype: torch.dtype) -> None:
    compiled = fused(sampling.race_rows, 4)
    with torch.inference_mode():
        for num in (5, 1):
            compiled(*race_arguments(num, dtype))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for num in (1, 2, 40, 200):
                given = race_arguments(num, dtype)
                assert torch.equal(sampling.race(*given, run=compiled), sampling.race(*given))


def test_compiled_runner_equals_generate_and_compiles_nothing_after_its_warm_up(qwen3: Served) -> None:
    served, runner = qwen3, qwen3.runner()
    _compile(runner)
    try:
        assert served.loaded.stack.operations.norm is not rms_norm, "fell back to eager operations"
        with torch._dynamo.config.patch(error_on_recompile=True):
            plain = [make_sequence(text_ids(served, text)) for text in PROMPTS]
            assert run(runner, *plain) == expected_texts(served)
            ways: list[dict[str, Any]] = [{}, {"top_p": 0.5}, {"top_k": 3}, {"repetition_penalty": 1.2}, {"min_p": 0.1}]
            run(runner, *(make_sequence((5, 6, 7), temperature=0.8, **way) for way in ways))
            runner._capture = replayed
            runner.capture_graphs()
            drawn = [make_sequence(text_ids(served, text), temperature=0.0) for text in PROMPTS]
            assert run(runner, *drawn) == expected_texts(served)
    finally:
        served.loaded.stack.operations = SmallOperations()


def test_compiled_runner_with_pictures_equals_generate(vision: Served) -> None:
    runner = vision.runner()
    _compile(runner)
    try:
        assert vision.loaded.stack.operations.norm is not rms_norm, "fell back to eager operations"
        prompts = [encode_pictures(vision, text, picture(84, 56, seed)) for seed, text in enumerate("ab")]
        with torch._dynamo.config.patch(error_on_recompile=True):
            answers = run(runner, *(make_sequence(prompt.ids, prompt) for prompt in prompts))
        assert answers == [generate_pictures(vision, prompt) for prompt in prompts]
    finally:
        vision.loaded.stack.operations = SmallOperations()
