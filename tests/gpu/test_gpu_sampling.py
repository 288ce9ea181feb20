"""The sampler on a card: the same noise as on a CPU, captured in a graph, compiled."""

from __future__ import annotations

import pytest
import torch

from models.engine.graphs import Capture, capture_cuda
from models.engine.sampling import BatchSampler, noise_bits, noise_keys, race
from models.engine.sampling import Row as Asked
from models.engine.sequence import SamplingOptions
from tests.test_runner import replayed
from tests.test_sampling import options

NUM_ROWS, VOCAB_SIZE = 8, 50_001


def keys_and_positions() -> tuple[torch.Tensor, torch.Tensor]:
    keys = torch.tensor([noise_keys(seed) for seed in (0, 1, 2**63 - 1)])
    return keys, torch.tensor([0, 5, 131_071])


def test_noise_has_the_bits_that_it_has_on_a_cpu(device: torch.device) -> None:
    keys, positions = keys_and_positions()
    found = noise_bits(keys.to(device), positions.to(device), VOCAB_SIZE)
    assert torch.equal(found.cpu(), noise_bits(keys, positions, VOCAB_SIZE))


def test_compiled_noise_has_the_same_bits(device: torch.device) -> None:
    keys, positions = keys_and_positions()
    compiled = torch.compile(noise_bits, dynamic=True, fullgraph=True)
    found = compiled(keys.to(device), positions.to(device), VOCAB_SIZE)
    assert torch.equal(found.cpu(), noise_bits(keys, positions, VOCAB_SIZE))


def sampler_on(device: torch.device, rows: list[SamplingOptions]) -> BatchSampler:
    sampler = BatchSampler(len(rows) + 1, VOCAB_SIZE, device)
    for slot, each in enumerate(rows, 1):
        sampler.set_slot(slot, each, (1, 2, 3), ())
    return sampler


def rows() -> list[SamplingOptions]:
    return [options(temperature=0.0 if seed == 3 else 1.0, seed=seed) for seed in range(NUM_ROWS)]


def logits_on(device: torch.device) -> torch.Tensor:
    return torch.randn(NUM_ROWS, VOCAB_SIZE, generator=torch.Generator().manual_seed(0)).half().to(device)


def capture_on(device: torch.device) -> Capture:
    if device.type == "cpu":
        return replayed
    return capture_cuda(torch.cuda.current_stream(device), torch.cuda.graph_pool_handle())


@pytest.mark.parametrize("is_compiled", [False, True])
def test_captured_draw_advances_positions_and_gives_the_tokens_of_eager_ones(
    device: torch.device, is_compiled: bool
) -> None:
    """The same logits again and again: what changes the token is the position alone."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    with torch.cuda.stream(stream), torch.inference_mode():
        captured, eager = sampler_on(device, rows()), sampler_on(device, rows())
        if is_compiled:
            captured.race = eager.race = torch.compile(race, dynamic=True)
        logits, slots = logits_on(device), torch.arange(1, NUM_ROWS + 1, device=device)
        replay = capture_on(device)(lambda: captured.draw(logits, slots))
        # Capturing ran it too; those who enter now begin anew.
        for slot, each in enumerate(rows(), 1):
            captured.set_slot(slot, each, (1, 2, 3), ())
        ours = [replay().tolist() for _ in range(6)]
        theirs = [eager.draw(logits, slots).tolist() for _ in range(6)]
    assert ours == theirs
    assert len({tokens[0] for tokens in ours}) > 1 and len({tokens[3] for tokens in ours}) == 1


def test_compiled_race_draws_the_eager_tokens_but_at_near_ties(device: torch.device) -> None:
    """The last digits of a logarithm may differ, so a token in thousands may."""
    keys = torch.tensor([noise_keys(7)]).expand(256, 2).to(device)
    positions = torch.arange(256, device=device)
    temperature = torch.full((256,), 0.9, device=device)
    logits = torch.randn(256, 5000, generator=torch.Generator().manual_seed(2)).half().to(device)
    found = torch.compile(race, dynamic=True)(logits, temperature, keys, positions)
    expected = race(logits, temperature, keys, positions)
    assert (found == expected).float().mean() >= 0.98
    assert len(set(expected.tolist())) > 100


def test_filtered_tokens_are_those_of_a_cpu_for_the_most_part(device: torch.device) -> None:
    """Thresholds are found by another way on a card: no top-p or top-k may let other tokens in."""
    rows = [options(top_p=0.7), options(top_p=0.95, top_k=30), options(top_k=400), options(min_p=0.2)]
    logits = 3 * torch.randn(len(rows), 5000, generator=torch.Generator().manual_seed(4))
    kept = []
    for place in (device, torch.device("cpu")):
        sampler = BatchSampler(len(rows), 5000, place)
        for slot, each in enumerate(rows):
            sampler.set_slot(slot, each, (), ())
        slots = torch.arange(len(rows), device=place)
        scores, can_choose = sampler.shape(logits.to(place), range(len(rows)), slots, [Asked(each) for each in rows])
        assert bool(can_choose.all())
        kept.append((scores > -1e20).cpu())
    # The exponential of a device differs in its last digits: at the edge one token more or less.
    assert ((kept[0] != kept[1]).sum(-1) <= 1).all()
    assert kept[1].sum(-1).tolist()[1] <= 30
