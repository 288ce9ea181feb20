"""Sampling: order of the filters, seeds, penalties, and the distribution itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor, TopPLogitsWarper

from models.engine.sampling import Sampler
from models.engine.sequence import SamplingOptions
from models.errors import NumericError

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0, 0.5, 1.5, -0.5])


def sampler(prompt_ids: tuple[int, ...] = (), **options: Any) -> Sampler:
    values: dict[str, Any] = dict(
        max_tokens=1, temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=1.0, seed=3, stop_ids=frozenset()
    )
    values.update(options)
    return Sampler(SamplingOptions(**values), prompt_ids, len(LOGITS), torch.device("cpu"))


def draws(num: int, **options: Any) -> list[int]:
    chooser = sampler(**options)
    return [chooser.choose(LOGITS, position) for position in range(num)]


def test_temperature_zero_takes_the_likeliest() -> None:
    assert set(draws(20, temperature=0.0)) == {0}


def test_same_seed_and_position_give_the_same_token_whatever_was_drawn_before() -> None:
    first = draws(50, seed=11)
    assert first == draws(50, seed=11)
    late = sampler(seed=11)
    assert [late.choose(LOGITS, position) for position in range(49, -1, -1)] == first[::-1]


def test_other_seed_gives_another_answer() -> None:
    assert draws(50, seed=11) != draws(50, seed=12)


def test_the_process_wide_seed_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = draws(20)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(2)
    assert draws(20) == first


def test_draws_follow_the_softmax() -> None:
    """20,000 draws: each share within 5 standard deviations of its probability, so a sound sampler fails about once
    in 200,000 runs; one that forgets the temperature is off by over 20."""
    num = 20_000
    chosen = torch.tensor(draws(num, temperature=0.8))
    expected = (LOGITS / 0.8).softmax(-1)
    share = torch.bincount(chosen, minlength=len(LOGITS)) / num
    deviation = (expected * (1 - expected) / num).sqrt()
    assert bool(((share - expected).abs() < 5 * deviation).all())


def test_top_k_keeps_only_the_likeliest() -> None:
    assert set(draws(300, top_k=3)) == {0, 6, 1}
    assert set(draws(50, top_k=1)) == {0}


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.6, 0.9, 0.999])
def test_top_p_keeps_what_the_library_keeps(top_p: float) -> None:
    kept = TopPLogitsWarper(top_p)(torch.zeros(1, 0, dtype=torch.long), LOGITS[None]).isfinite()[0]
    assert set(draws(1500, top_p=top_p, temperature=1.0)) <= set(kept.nonzero().flatten().tolist())
    likeliest = set(kept.nonzero().flatten().tolist()) if top_p < 0.95 else {0}
    assert set(draws(1500, top_p=top_p)) >= likeliest


def test_repetition_penalty_equals_the_librarys_for_prompt_and_answer() -> None:
    chooser = sampler(prompt_ids=(0, 3), repetition_penalty=1.8)
    assert chooser._penalise(LOGITS).tolist() == pytest.approx(
        RepetitionPenaltyLogitsProcessor(1.8)(torch.tensor([[0, 3]]), LOGITS[None].clone())[0].tolist()
    )
    greedy = sampler(prompt_ids=(0,), repetition_penalty=2.1, temperature=0.0)
    assert [greedy.choose(LOGITS, position) for position in range(3)] == [6, 1, 0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_logits_are_a_numeric_error(value: float) -> None:
    bad = LOGITS.clone()
    bad[2] = value
    with pytest.raises(NumericError):
        sampler().choose(bad, 0)


def test_half_precision_logits_are_taken() -> None:
    assert sampler(temperature=0.0).choose(LOGITS.half(), 0) == 0


@pytest.mark.parametrize(
    "odd",
    [
        {"temperature": 5e-324},
        {"temperature": 1e-4, "top_p": 5e-324},
        {"top_p": 5e-324},
        {"top_k": 10**6},
        {"top_k": 1, "top_p": 1e-9, "temperature": 2.0},
        {"repetition_penalty": 0.5},
        {"repetition_penalty": 2.0, "temperature": 1e-4},
        {"seed": 2**63 - 1},
    ],
)
@pytest.mark.parametrize("scale", [1.0, 1e4, 60000.0])
def test_odd_parameters_still_give_a_token(odd: dict[str, float], scale: float) -> None:
    """One odd sampling parameter must not end the engine, nor give garbage (CVE-2026-44223)."""
    chooser = sampler(prompt_ids=(0, 1), **odd)
    chosen = [chooser.choose(LOGITS * scale, position) for position in range(20)]
    assert set(chosen) <= set(range(len(LOGITS)))
    if odd.get("temperature", 1) < 1e-3 and "repetition_penalty" not in odd:
        assert set(chosen) == {0}
