"""Sampling: the noise and its distribution, each option against its formula, and rows that do not know each other.

Seeds are fixed, so every test gives the same result each time; the odds told are those of a sound sampler failing with
seeds of its own.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from models.engine import sampling
from models.engine.sampling import BatchSampler, Row, Sampled, greedy, is_finite, noise_bits, noise_keys, race
from models.engine.sequence import SamplingOptions

CPU = torch.device("cpu")
LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0, 0.5, 1.5, -0.5])
ONE_IN_A_MILLION = 1e-6


def options(**changes: Any) -> SamplingOptions:
    values: dict[str, Any] = dict(
        max_tokens=99, temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=1.0, seed=3, stop_ids=frozenset({0})
    )
    return SamplingOptions(**{**values, **changes})


def row(allowed: set[int] | None = None, vocab_size: int = len(LOGITS), num_output: int = 0, **changes: Any) -> Row:
    return Row(options(**changes), None if allowed is None else mask(allowed, vocab_size), num_output)


def mask(allowed: set[int], vocab_size: int) -> np.ndarray[Any, Any]:
    words = np.zeros(-(-vocab_size // 32), dtype=np.uint32)
    for token_id in allowed:
        words[token_id // 32] |= np.uint32(1 << token_id % 32)
    return words.view(np.int32)


def sampler_of(
    rows: list[Row], vocab_size: int, prompt_ids: tuple[int, ...] = (), output_ids: tuple[int, ...] = ()
) -> BatchSampler:
    sampler = BatchSampler(len(rows), vocab_size, CPU)
    for slot, each in enumerate(rows):
        sampler.set_slot(slot, each.options, prompt_ids, output_ids)
    return sampler


def sample(sampler: BatchSampler, logits: torch.Tensor, rows: list[Row]) -> Sampled:
    return sampler.sample(logits, range(len(rows)), torch.arange(len(rows)), rows)


def distribution(logits: torch.Tensor, one: Row, **history: tuple[int, ...]) -> torch.Tensor:
    """What `sample` draws from, for one row of logits."""
    sampler = sampler_of([one], len(logits), **history)
    scores, can_choose = sampler.shape(logits[None], [0], torch.tensor([0]), [one])
    assert bool(can_choose)
    return scores[0].double().softmax(-1)


def keys_of(seeds: list[int]) -> torch.Tensor:
    return torch.tensor([noise_keys(seed) for seed in seeds])


def assert_drawn_from(tokens: torch.Tensor, probabilities: torch.Tensor) -> None:
    """Chi-square; words of which fewer than ten are expected are counted together. Odds: one in a million."""
    expected = probabilities.double() * len(tokens)
    counts = torch.bincount(tokens, minlength=len(expected)).double()
    assert not bool((counts[expected == 0] > 0).any())
    is_rare = expected < 10
    expected = torch.cat([expected[~is_rare], expected[is_rare].sum()[None]])
    counts = torch.cat([counts[~is_rare], counts[is_rare].sum()[None]])
    if expected[-1] < 10:
        assert counts[-1] < 50
        expected, counts = expected[:-1], counts[:-1]
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    assert float(torch.special.gammaincc(freedom, statistic / 2)) > ONE_IN_A_MILLION


# The noise


def mixed(x: int, key: int = 0) -> int:
    """triple32 as published, the key after its first round."""
    x ^= x >> 17
    x = x * 0xED5AD4BB % 2**32
    x = ((x ^ x >> 11) + key) % 2**32
    x = x * 0xAC4C1B51 % 2**32
    x ^= x >> 15
    x = x * 0x31848BAB % 2**32
    return x ^ x >> 14


def test_noise_is_the_published_hash_so_that_a_seed_means_the_same_on_every_device() -> None:
    seeds, positions, vocab_size = [0, 1, 2**63 - 1], [0, 5, 131_071], 70
    found = noise_bits(keys_of(seeds), torch.tensor(positions), vocab_size)
    for at, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        first, second = (mixed((key + position * 0x9E3779B9) % 2**32) for key in noise_keys(seed))
        expected = [mixed((first + word) % 2**32, second) for word in range(vocab_size)]
        assert [value % 2**32 for value in found[at].tolist()] == expected


def test_noise_of_neighbours_is_unrelated() -> None:
    """A million numbers each: every correlation, and every bit's share, within 6 standard deviations (odds: one in
    5e8 for each of the 40 numbers)."""
    num, vocab_size = 64, 2**14
    tables = {
        "positions": noise_bits(keys_of([7] * num), torch.arange(num), vocab_size),
        "seeds": noise_bits(keys_of(list(range(num))), torch.zeros(num, dtype=torch.int64), vocab_size),
    }
    bound = 6 / math.sqrt(num * vocab_size)
    for bits in tables.values():
        uniform = bits.double() / 2**31  # -1 to 1
        variance = uniform.square().mean()
        assert abs(float(variance) * 3 - 1) < bound
        for other in (
            uniform.roll(1, 0),
            uniform.roll(1, 1),
            uniform.roll((1, 1), (0, 1)),
            uniform.roll((1, -1), (0, 1)),
        ):
            assert abs(float((uniform * other).mean() / variance)) < bound
        for bit in range(32):
            assert abs(float(((bits >> bit) & 1).double().mean()) * 2 - 1) < bound
    assert abs(float((tables["positions"].double() * tables["seeds"].double()).mean()) / 2**62 * 3) < bound


@pytest.mark.parametrize(("bits", "word"), [(0, 0), (1, 1), (2**31 - 1, 2**31 - 1), (-(2**31), 2**31), (-1, 2**32 - 1)])
def test_exponential_noise_is_positive_finite_and_precise_where_it_wins(bits: int, word: int) -> None:
    found = float(sampling.log_exponentials(torch.tensor([bits], dtype=torch.int32)))
    exponential = math.exp(found)
    assert math.isfinite(found) and 0 < exponential < 17
    exact = -math.log1p(-(word + 0.5) / 2**32)
    assert exponential == pytest.approx(min(exact, 24 * math.log(2)), rel=3e-6)


def test_exponential_noise_falls_with_nothing_but_its_bits() -> None:
    words = torch.cat([torch.arange(0, 2**31, 2**18 + 1), torch.arange(-(2**31), 0, 2**18 + 1)]).int()
    found = sampling.log_exponentials(words)
    assert bool((found.diff() >= 0).all()) and bool(found.isfinite().all())


def test_process_wide_seed_is_neither_read_nor_moved() -> None:
    arguments = (LOGITS.expand(50, -1), torch.ones(50), keys_of([1] * 50), torch.arange(50))
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = race(*arguments)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(2)
    assert torch.equal(race(*arguments), first)


# The race


@pytest.mark.parametrize("temperature", [0.25, 0.8, 1.0, 2.0])
@pytest.mark.parametrize("is_one_seed", [True, False])
def test_draws_follow_the_softmax_over_positions_and_over_seeds(temperature: float, is_one_seed: bool) -> None:
    num = 40_000
    keys = keys_of([11]).expand(num, 2) if is_one_seed else keys_of(list(range(num)))
    positions = torch.arange(num) if is_one_seed else torch.full((num,), 4)
    tokens = race(LOGITS.expand(num, -1), torch.full((num,), temperature), keys, positions)
    assert_drawn_from(tokens, (LOGITS.double() / temperature).softmax(-1))


def test_draws_follow_the_softmax_over_a_wide_vocabulary() -> None:
    num, vocab_size = 2_000, 6_007
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(5))
    tokens = race(logits.expand(num, -1), torch.ones(num), keys_of([2] * num), torch.arange(num))
    shares = logits.double().softmax(-1)
    # In 61 groups of words, neighbours apart.
    group = torch.arange(vocab_size) % 61
    assert_drawn_from(group[tokens], torch.zeros(61, dtype=torch.float64).index_add_(0, group, shares))


@pytest.mark.parametrize("shape", [(9, 1003), (12, 49_157)])
def test_row_draws_the_same_alone_and_in_any_batch(shape: tuple[int, int]) -> None:
    logits = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    temperature = torch.linspace(0.0, 1.5, shape[0])
    keys, positions = keys_of(list(range(shape[0]))), torch.arange(shape[0]) * 3
    together = race(logits, temperature, keys, positions)
    order = torch.arange(shape[0]).flip(0)
    assert torch.equal(race(logits[order], temperature[order], keys[order], positions[order]), together[order])
    alone = [race(logits[i : i + 1], temperature[i : i + 1], keys[i : i + 1], positions[i : i + 1]) for i in order]
    assert torch.equal(torch.cat(alone), together[order])


def test_temperature_zero_takes_the_likeliest() -> None:
    logits = torch.randn(40, 300, generator=torch.Generator().manual_seed(2))
    for temperature in (0.0, 5e-324, 0.9e-4):
        tokens = race(logits, torch.full((40,), temperature), keys_of(list(range(40))), torch.arange(40))
        assert torch.equal(tokens, logits.argmax(-1)) and torch.equal(tokens, greedy(logits))


def test_half_precision_logits_are_taken() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        logits = torch.randn(6, 500, generator=torch.Generator().manual_seed(3)).to(dtype)
        arguments = (torch.ones(6), keys_of(list(range(6))), torch.arange(6))
        assert torch.equal(race(logits, *arguments), race(logits.float(), *arguments))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_bad_logit_makes_its_row_not_finite(value: float, dtype: torch.dtype) -> None:
    logits = (torch.randn(5, 1000, generator=torch.Generator().manual_seed(4)) * 100).to(dtype)
    logits[1, 999] = value
    logits[3, 0] = value
    assert is_finite(logits).tolist() == [True, False, True, False, True]


def test_largest_half_precision_logits_are_finite() -> None:
    assert bool(is_finite(torch.full((1, 150_000), 65504.0, dtype=torch.float16)))


# Filters


def table(kind: str, vocab_size: int = 3001) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(kind))
    normal = torch.randn(vocab_size, generator=generator)
    if kind == "heavy-tailed":
        return normal.sign() * (normal.abs() / torch.rand(vocab_size, generator=generator)).log1p() * 4
    if kind == "flat":
        return normal * 1e-3
    if kind == "peaked":
        return normal * 12
    if kind == "tied":
        return (normal * 4).round() / 2
    return normal * 3


KINDS = ["normal", "heavy-tailed", "flat", "peaked", "tied"]


def kept_by_top_k(probabilities: np.ndarray[Any, Any], top_k: int) -> np.ndarray[Any, Any]:
    if not 0 < top_k < len(probabilities):
        return np.ones(len(probabilities), dtype=bool)
    kept: np.ndarray[Any, Any] = probabilities >= np.sort(probabilities)[-top_k]
    return kept


def kept_by_top_p(probabilities: np.ndarray[Any, Any], top_p: float) -> np.ndarray[Any, Any]:
    """Sorted and summed; words as likely as the last one stay."""
    if top_p >= 1:
        return np.ones(len(probabilities), dtype=bool)
    ordered = np.sort(probabilities)[::-1]
    last = np.searchsorted(ordered.cumsum(), top_p * ordered.sum())
    kept: np.ndarray[Any, Any] = probabilities >= ordered[min(last, len(ordered) - 1)]
    return kept


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_p", [1e-9, 0.05, 0.3, 0.6, 0.9, 0.99, 0.9999])
@pytest.mark.parametrize("top_k", [0, 1, 7, 64, 65, 700, 2999, 10**6])
def test_top_k_and_top_p_keep_what_sorting_keeps(kind: str, top_p: float, top_k: int) -> None:
    logits = table(kind)
    found = distribution(logits, row(top_p=top_p, top_k=top_k, temperature=0.7))
    probabilities = (logits / 0.7).double().softmax(-1).numpy()
    left = probabilities * kept_by_top_k(probabilities, top_k)
    # float32 probabilities may put the edge a millionth of the whole to either side.
    fewest, most = ((kept_by_top_p(left, top_p + slack) & (left > 0)) for slack in (-1e-6, 1e-6))
    kept = (found > 0).numpy()
    assert not (fewest & ~kept).any() and not (kept & ~most & (probabilities > 1e-12)).any()
    expected = np.where(kept, probabilities, 0) / probabilities[kept].sum()
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-5, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("min_p", [1e-4, 0.02, 0.3, 1.0])
def test_min_p_keeps_what_is_a_share_of_the_likeliest_after_temperature(kind: str, min_p: float) -> None:
    logits = table(kind)
    probabilities = (logits.double() / 1.3).softmax(-1)
    expected = torch.where(probabilities >= min_p * probabilities.max(), probabilities, 0)
    found = distribution(logits, row(min_p=min_p, temperature=1.3))
    assert torch.allclose(found, expected / expected.sum(), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_search_finds_the_same_edge_compacting_or_not_and_in_any_batch(kind: str) -> None:
    logits = torch.stack([table(kind) * scale for scale in (0.3, 1.0, 2.0, 5.0)])
    distance = logits.amax(-1, keepdim=True) - logits
    for top_p in (0.1, 0.5, 0.95):
        shares = torch.full((4, 1), top_p)
        found = sampling._top_p_limit(distance, shares, is_compacting=True)
        assert torch.equal(sampling._top_p_limit(distance, shares, is_compacting=False), found)
        alone = [sampling._top_p_limit(distance[i : i + 1], shares[:1]) for i in range(4)]
        assert torch.equal(torch.cat(alone), found)
        by_list = sampling._top_k_limit(distance, torch.full((4, 1), 3001), 3001, shares)
        assert torch.equal(by_list, found)


def test_ties_with_the_kth_stay_and_count_towards_top_p() -> None:
    logits = torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0])
    assert (distribution(logits, row(top_k=2)) > 0).tolist() == [True, True, True, True, False]
    # e / (e + 3) is 0.48 of what top-k left; of the first two alone it would be 0.73.
    assert (distribution(logits, row(top_k=2, top_p=0.47)) > 0).tolist() == [False, True, False, False, False]
    assert (distribution(logits, row(top_k=2, top_p=0.6)) > 0).tolist() == [True, True, True, True, False]


def test_top_k_alone_keeps_even_what_is_too_rare_to_count() -> None:
    logits = torch.tensor([0.0, -40.0, -60.0, -80.0])
    rows = [row(top_k=3), row(top_k=3, top_p=0.9)]
    scores, _ = sampler_of(rows, 4).shape(logits.expand(2, -1), [0, 1], torch.arange(2), rows)
    assert (scores > -1e20).tolist() == [[True, True, True, False], [True, False, False, False]]


def test_likeliest_always_stays() -> None:
    for tiny in (dict(top_p=5e-324), dict(top_p=1e-9, top_k=3), dict(min_p=1.0), dict(top_k=1)):
        assert distribution(LOGITS, row(**tiny)).tolist() == [1.0] + [0.0] * 7


def test_draws_follow_the_filtered_and_penalised_distribution() -> None:
    num = 6_000
    rows = [row(seed=seed, temperature=0.9, top_p=0.9, top_k=6, presence_penalty=0.4) for seed in range(num)]
    sampler = sampler_of(rows, len(LOGITS), output_ids=(6, 6, 1))
    tokens = sample(sampler, LOGITS.expand(num, -1), rows).token_ids
    probabilities = distribution(LOGITS, rows[0], output_ids=(6, 6, 1))
    assert 1 < int((probabilities > 0).sum()) < 7
    assert_drawn_from(tokens, probabilities)


# Penalties, bias, masks


@pytest.mark.parametrize("penalty", [0.5, 1.3, 2.0])
def test_repetition_penalty_is_the_librarys_over_prompt_and_answer(penalty: float) -> None:
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([[0, 3, 3, 6]]), LOGITS[None].clone())[0]
    found = distribution(LOGITS, row(repetition_penalty=penalty), prompt_ids=(0, 3, 3), output_ids=(6,))
    assert torch.allclose(found, expected.double().softmax(-1), rtol=1e-5)


def test_presence_and_frequency_penalties_count_the_answer_only() -> None:
    counts = torch.tensor([0, 1, 0, 0, 3, 0, 0, 0])
    one = row(presence_penalty=0.7, frequency_penalty=-0.3)
    found = distribution(LOGITS, one, prompt_ids=(0, 0, 1, 5), output_ids=(4, 1, 4, 4))
    expected = LOGITS - counts * -0.3 - (counts > 0) * 0.7
    assert torch.allclose(found, expected.double().softmax(-1), rtol=1e-5)


@pytest.mark.parametrize("changes", [dict(repetition_penalty=1.6), dict(presence_penalty=1.1, frequency_penalty=0.6)])
def test_a_sequence_put_back_goes_on_as_if_it_had_never_left(changes: dict[str, Any]) -> None:
    one = row(seed=8, **changes)
    staying = sampler_of([one], len(LOGITS), prompt_ids=(2,))
    answer: list[int] = []
    for _ in range(30):
        returning = sampler_of([one], len(LOGITS), prompt_ids=(2,), output_ids=tuple(answer))
        again = sample(returning, LOGITS[None], [one]).token_ids
        token = sample(staying, LOGITS[None], [one]).token_ids
        assert torch.equal(token, again)
        answer.append(int(token))
    assert len(set(answer)) > 3


def test_a_slots_next_sequence_inherits_nothing() -> None:
    one = row(repetition_penalty=3.0, frequency_penalty=2.0, logit_bias=((1, 9.0),), min_tokens=4)
    sampler = sampler_of([one], len(LOGITS), prompt_ids=(0, 1, 2), output_ids=(3, 3))
    sample(sampler, LOGITS[None], [one])
    fresh = row(repetition_penalty=3.0, frequency_penalty=2.0, seed=4)
    sampler.set_slot(0, fresh.options, (5,), ())
    expected = sampler_of([fresh], len(LOGITS), prompt_ids=(5,))
    arguments = (LOGITS[None], [0], torch.tensor([0]), [fresh])
    assert torch.equal(sampler.shape(*arguments)[0], expected.shape(*arguments)[0])
    assert torch.equal(
        sample(sampler, LOGITS[None], [fresh]).token_ids, sample(expected, LOGITS[None], [fresh]).token_ids
    )


def test_bias_is_added_before_everything_else() -> None:
    bias = torch.zeros(8)
    bias[3], bias[0] = 2.5, -1.0
    found = distribution(
        LOGITS, row(logit_bias=((3, 2.5), (0, -1.0)), temperature=0.5, repetition_penalty=2.0), prompt_ids=(3,)
    )
    expected = LOGITS + bias
    expected[3] /= 2.0  # 1.5 is above 0 thanks to the bias alone
    assert torch.allclose(found, (expected.double() / 0.5).softmax(-1), rtol=1e-5)


@pytest.mark.parametrize("vocab_size", [8, 31, 32, 33, 100])
def test_grammars_mask_leaves_the_allowed_alone(vocab_size: int) -> None:
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(vocab_size))
    allowed = {0, 3, vocab_size - 1, vocab_size // 2}
    found = distribution(logits, row(allowed, vocab_size))
    assert {*found.nonzero().flatten().tolist()} == allowed
    expected = logits[sorted(allowed)].double().softmax(-1)
    assert torch.allclose(found[sorted(allowed)], expected, rtol=1e-5)


def test_filters_see_what_the_grammar_left() -> None:
    found = distribution(LOGITS, row({2, 3, 5}, top_k=2))
    assert {*found.nonzero().flatten().tolist()} == {2, 5}


def test_mask_of_another_vocabulary_is_refused() -> None:
    one = row({1}, 100)
    with pytest.raises(ValueError, match="mask"):
        sample(sampler_of([one], 8), LOGITS[None], [one])


@pytest.mark.parametrize("token_id", [-1, 8])
def test_ids_outside_the_vocabulary_are_refused_before_they_reach_the_device(token_id: int) -> None:
    with pytest.raises(ValueError, match="0 to 7"):
        sampler_of([row(logit_bias=((token_id, 1.0),))], 8)
    with pytest.raises(ValueError, match="0 to 7"):
        sampler_of([row(repetition_penalty=2.0)], 8, prompt_ids=(token_id,))


def test_stop_ids_cannot_be_chosen_until_min_tokens_are_out() -> None:
    stops: dict[str, Any] = dict(stop_ids=frozenset({0, 6, 9999}), min_tokens=3)
    for num_output, expected in ((0, False), (2, False), (3, True)):
        found = distribution(LOGITS, row(num_output=num_output, **stops)) > 0
        assert [bool(found[0]), bool(found[6]), bool(found[1])] == [expected, expected, True]


def test_row_without_a_choice_is_told_and_others_go_on() -> None:
    rows = [row(), row(set()), row({0}, min_tokens=1), row({4}), row(set(), temperature=0.0, top_p=0.5)]
    found = sample(sampler_of(rows, 8), LOGITS.expand(5, -1), rows)
    host = found.start_copy()
    assert host.has_choice() == [True, False, False, True, False]
    assert host.is_finite() == [True] * 5
    assert host.tokens()[3] == 4 and {*host.tokens()} <= {*range(8)}


# Rows and batches

BUSY: list[dict[str, Any]] = [
    dict(),
    dict(temperature=0.0),
    dict(top_p=0.8),
    dict(top_k=3, top_p=0.9),
    dict(top_k=70),
    dict(min_p=0.2, top_p=0.95),
    dict(repetition_penalty=1.7, temperature=0.0),
    dict(presence_penalty=0.5, frequency_penalty=0.2, top_p=0.7),
    dict(logit_bias=((1, 3.0), (5, -4.0)), min_tokens=9),
    dict(allowed=frozenset({2, 3, 60, 99})),
    dict(num_logprobs=2, temperature=0.3),
    dict(num_logprobs=0, top_p=0.5, allowed=frozenset({*range(0, 100, 2)})),
]


def busy_row(kind: int, seed: int) -> Row:
    changes = dict(BUSY[kind])
    allowed = changes.pop("allowed", None)
    return row(allowed, 100, seed=seed, **changes)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kinds=st.lists(st.integers(0, len(BUSY) - 1), min_size=1, max_size=14),
    seed=st.integers(0, 2**63 - 1),
    bad=st.none() | st.integers(0, 13),
)
def test_mixed_batch_gives_each_row_what_it_gets_alone(kinds: list[int], seed: int, bad: int | None) -> None:
    rows = [busy_row(kind, (seed + at) % 2**63) for at, kind in enumerate(kinds)]
    logits = torch.randn(3, len(rows), 100, generator=torch.Generator().manual_seed(seed % 2**32)) * 3
    if bad is not None and bad < len(rows):
        logits[1, bad, 17] = math.nan
    together = sampler_of(rows, 100, prompt_ids=(1, 2, 3))
    alone = [sampler_of([each], 100, prompt_ids=(1, 2, 3)) for each in rows]
    for step in range(3):
        host = sample(together, logits[step], rows).start_copy()
        for at, each in enumerate(rows):
            single = sample(alone[at], logits[step, at : at + 1], [each]).start_copy()
            assert host.is_finite()[at] == single.is_finite()[0] == (at != bad or step != 1)
            if at == bad and step >= 1:
                continue  # such a row is ended; its token and what it counts mean nothing
            assert host.tokens()[at] == single.tokens()[0]
            assert host.has_choice()[at] and single.has_choice()[0]
            assert host.logprobs(at) == single.logprobs(0)


@pytest.mark.parametrize("kind", range(len(BUSY)))
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
def test_bad_row_of_any_options_is_told_and_gives_some_token(kind: int, value: float) -> None:
    rows = [busy_row(kind, 1), busy_row(kind, 2)]
    logits = torch.randn(2, 100, generator=torch.Generator().manual_seed(9))
    logits[0] = value
    host = sample(sampler_of(rows, 100), logits, rows).start_copy()
    assert host.is_finite() == [False, True]
    assert 0 <= host.tokens()[0] < 100


def test_slots_may_stand_in_any_order_and_keep_their_own_positions() -> None:
    rows = [row(seed=seed, top_p=0.9) for seed in range(4)]
    forth, back = sampler_of(rows, 8), sampler_of(rows, 8)
    for _ in range(5):
        found = forth.sample(LOGITS.expand(4, -1), [0, 1, 2, 3], torch.arange(4), rows).token_ids
        for slot in (2, 0, 3, 1):
            one = back.sample(LOGITS[None], [slot], torch.tensor([slot]), [rows[slot]]).token_ids
            assert int(one) == int(found[slot])


def test_plain_draw_equals_sample_and_moves_on() -> None:
    rows = [row(seed=seed, temperature=seed / 4) for seed in range(6)]
    drawing, whole = sampler_of(rows, 8), sampler_of(rows, 8)
    answers = []
    for _ in range(12):
        tokens = drawing.draw(LOGITS.expand(6, -1), torch.arange(6))
        assert torch.equal(tokens, sample(whole, LOGITS.expand(6, -1), rows).token_ids)
        answers.append(tokens)
    assert all(len(set(answer)) > 1 for answer in torch.stack(answers)[:, 2:].T.tolist())


@pytest.mark.parametrize(
    ("changes", "is_plain"),
    [
        (dict(), True),
        (dict(temperature=0.0, top_p=0.5, top_k=4, min_p=0.1), True),
        (dict(min_tokens=3, stop_ids=frozenset()), True),
        (dict(min_tokens=3), False),
        (dict(top_p=0.5), False),
        (dict(top_k=4), False),
        (dict(min_p=0.1), False),
        (dict(repetition_penalty=1.1, temperature=0.0), False),
        (dict(presence_penalty=0.1), False),
        (dict(frequency_penalty=0.1), False),
        (dict(logit_bias=((1, 1.0),)), False),
        (dict(num_logprobs=0), False),
    ],
)
def test_plain_options_are_those_that_a_draw_fulfils(changes: dict[str, Any], is_plain: bool) -> None:
    assert BatchSampler.is_plain(options(**changes)) is is_plain


def test_logprobs_are_the_models_own_before_any_option() -> None:
    rows = [
        row(num_logprobs=3, temperature=0.2, top_k=1, logit_bias=((4, 50.0),)),
        row(),
        row(num_logprobs=0, temperature=0.0),
        row(num_logprobs=20),
    ]
    logits = torch.stack([LOGITS, LOGITS * 2, LOGITS.flip(0), LOGITS * 3]).bfloat16()
    host = sample(sampler_of(rows, 8), logits, rows).start_copy()
    expected = logits.float().log_softmax(-1)
    first, last = host.logprobs(0), host.logprobs(3)
    assert first is not None and last is not None
    assert host.tokens()[0] == 4 and first.chosen == pytest.approx(float(expected[0, 4]))
    assert [token_id for token_id, _ in first.top] == [0, 6, 1]
    assert [value for _, value in first.top] == pytest.approx([float(expected[0, i]) for i in (0, 6, 1)])
    assert host.logprobs(1) is None
    greedy_row = host.logprobs(2)
    assert greedy_row is not None and greedy_row.top == ()
    assert greedy_row.chosen == pytest.approx(float(expected[2].max()))
    assert [token_id for token_id, _ in last.top] == expected[3].argsort(descending=True).tolist()


@pytest.mark.parametrize(
    "odd",
    [
        dict(temperature=5e-324),
        dict(temperature=1e-4, top_p=5e-324),
        dict(temperature=1e30),
        dict(top_p=5e-324),
        dict(top_k=10**6),
        dict(top_k=1, top_p=1e-9, temperature=2.0),
        dict(min_p=5e-324, temperature=1e-4),
        dict(repetition_penalty=0.5),
        dict(repetition_penalty=2.0, temperature=1e-4),
        dict(presence_penalty=-2.0, frequency_penalty=2.0, temperature=1e-4),
        dict(logit_bias=((0, 100.0), (3, -100.0)), temperature=1e-4),
        dict(seed=2**63 - 1),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 1e4, 60000.0])
def test_odd_parameters_still_give_a_token(odd: dict[str, Any], scale: float) -> None:
    """One odd sampling parameter must not end the engine, nor give garbage (CVE-2026-44223)."""
    one = row(**odd)
    sampler = sampler_of([one], 8, prompt_ids=(0, 1))
    tokens = set()
    for _ in range(20):
        host = sample(sampler, LOGITS[None] * scale, [one]).start_copy()
        assert host.is_finite() == [True] and host.has_choice() == [True]
        tokens |= {*host.tokens()}
    assert tokens <= {*range(8)}
    if odd.get("temperature", 1) < 1e-3 and not {"repetition_penalty", "presence_penalty"} & {*odd}:
        assert tokens == {0}


def test_nothing_on_the_way_waits_for_the_device() -> None:
    """On the meta device tensors have shapes and no values: whatever would read one, or size one by another's values,
    fails. It takes the path of CUDA, which is any device's but the CPU's."""
    meta = torch.device("meta")
    rows = [busy_row(kind, kind) for kind in range(len(BUSY))]
    sampler = BatchSampler(len(rows), 100, meta)
    for slot, each in enumerate(rows):
        sampler.set_slot(slot, each.options, (1, 2), (3,))
    logits = torch.empty(len(rows), 100, dtype=torch.bfloat16, device=meta)
    slots = torch.empty(len(rows), dtype=torch.int64, device=meta)
    found = sampler.sample(logits, range(len(rows)), slots, rows)
    assert found.token_ids.shape == found.is_finite.shape == found.has_choice.shape == (len(rows),)
    assert sampler.draw(logits, slots).shape == (len(rows),)
    with pytest.raises(NotImplementedError):
        found.start_copy().tokens()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_draws_the_same_noise_in_a_graph_and_waits_for_nothing() -> None:
    cuda = torch.device("cuda")
    rows = [busy_row(kind, kind) for kind in range(len(BUSY))]
    samplers = [BatchSampler(len(rows), 100, device) for device in (cuda, CPU)]
    logits = torch.randn(len(rows), 100, generator=torch.Generator().manual_seed(1))
    for sampler in samplers:
        for slot, each in enumerate(rows):
            sampler.set_slot(slot, each.options, (1, 2), (3,))
    keys, positions = keys_of(list(range(5))), torch.arange(5)
    assert torch.equal(noise_bits(keys.to(cuda), positions.to(cuda), 999).cpu(), noise_bits(keys, positions, 999))
    on_cuda, slots = logits.to(cuda), torch.arange(len(rows), device=cuda)
    torch.cuda.set_sync_debug_mode("error")
    try:
        host = samplers[0].sample(on_cuda, range(len(rows)), slots, rows).start_copy()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert host.tokens() == sample(samplers[1], logits, rows).start_copy().tokens()

    plain = [row(seed=seed) for seed in range(4)]
    drawing, expected = BatchSampler(4, 8, cuda), sampler_of(plain, 8)
    for slot, each in enumerate(plain):
        drawing.set_slot(slot, each.options, (), ())
    static, slots = LOGITS.expand(4, -1).to(cuda), torch.arange(4, device=cuda)
    drawing.draw(static, slots)
    expected.draw(static.cpu(), torch.arange(4))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token_ids = drawing.draw(static, slots)
    for _ in range(10):
        graph.replay()
        assert torch.equal(token_ids.cpu(), expected.draw(static.cpu(), torch.arange(4)))
