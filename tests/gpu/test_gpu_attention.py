"""Attention over pages in any order, against FP32 over the same keys and values in one piece."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from models.engine.attention import CUDA_PAGE_TOKENS, AttentionPlan, attend

# FP16 keeps 11 bits; the softmax's weights and the result are rounded to it once each. Values here are N(0, 1).
TOLERANCE = 2e-3
NUM_PAGES, WIDTH = 40, 5

# (new tokens, all tokens) of each sequence, around the ends of pages.
STEPS = {
    "decode": [(1, 1), (1, 255), (1, 256), (1, 257), (1, 700)],
    "whole-prompts": [(1, 1), (7, 7), (256, 256), (300, 300), (1000, 1000)],
    "chunks": [(16, 40), (100, 356), (1, 513), (256, 512), (300, 1100)],
    # As the captured prefill has them: rows that are not there, before the padding.
    "empty-rows": [(20, 20), (30, 290), (0, 0), (0, 0), (14, 14)],
}


class Case:
    """Random keys and values in random pages; the new ones are still to be written."""

    def __init__(self, device: torch.device, counts: list[tuple[int, int]], num_heads: int, head_dim: int) -> None:
        source = torch.Generator().manual_seed(5)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=source).half().to(device)

        self.counts, self.num_heads, self.scale = counts, num_heads, head_dim**-0.5
        self.keys, self.values = ([random(n, 2, head_dim) for _, n in counts] for _ in range(2))
        self.queries = [random(n, num_heads, head_dim) for n, _ in counts]
        # What lies in pages of nobody, and behind the end of a sequence, must not count.
        self.pages = (
            random(NUM_PAGES, CUDA_PAGE_TOKENS, 2, head_dim),
            random(NUM_PAGES, CUDA_PAGE_TOKENS, 2, head_dim),
        )
        shuffled = iter((torch.randperm(NUM_PAGES - 1, generator=source) + 1).tolist())
        self.page_lists = [[next(shuffled) for _ in range(-(-n // CUDA_PAGE_TOKENS))] for _, n in counts]

    def places(self, row: int) -> Tensor:
        num_all = self.counts[row][1]
        pages = torch.tensor(self.page_lists[row], dtype=torch.int64)
        index = torch.arange(num_all)
        at = pages[index // CUDA_PAGE_TOKENS] * CUDA_PAGE_TOKENS + index % CUDA_PAGE_TOKENS
        return at.to(self.pages[0].device)

    def attend(self, rows: list[int]) -> list[Tensor]:
        device = self.pages[0].device
        counts = [self.counts[row] for row in rows]
        table = torch.zeros(len(rows), WIDTH, dtype=torch.int32)
        write_at, new_keys, new_values = [], [], []
        for index, row in enumerate(rows):
            num_new, num_all = self.counts[row]
            table[index, : len(self.page_lists[row])] = torch.tensor(self.page_lists[row])
            places, num_old = self.places(row), num_all - num_new
            for store, dense in zip(self.pages, (self.keys[row], self.values[row]), strict=True):
                store.flatten(0, 1)[places[:num_old]] = dense[:num_old]
            write_at.append(places[num_old:])
            new_keys.append(self.keys[row][num_old:])
            new_values.append(self.values[row][num_old:])
        num_new_of = [num_new for num_new, _ in counts]
        plan = AttentionPlan(
            write_at=torch.cat(write_at),
            page_table=table.to(device),
            num_keys=torch.tensor([num_all for _, num_all in counts], dtype=torch.int32, device=device),
            cu_queries=torch.tensor([0, *num_new_of]).cumsum(0).int().to(device),
            max_queries=max(num_new_of),
            query_counts=num_new_of,
            key_counts=[num_all for _, num_all in counts],
        )
        queries = torch.cat([self.queries[row] for row in rows])
        output = attend(queries, torch.cat(new_keys), torch.cat(new_values), self.pages, plan, self.scale)
        return list(torch.split(output, num_new_of))

    def expected(self, row: int) -> Tensor:
        num_new, num_all = self.counts[row]
        query, key, value = (
            tensor.float().transpose(0, 1)[None] for tensor in (self.queries[row], self.keys[row], self.values[row])
        )
        mask = torch.ones(num_new, num_all, dtype=torch.bool, device=query.device).tril(num_all - num_new)
        key, value = (tensor.repeat_interleave(self.num_heads // 2, dim=1) for tensor in (key, value))
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scale)[0].transpose(0, 1)


@pytest.mark.parametrize("num_heads", [2, 8])
@pytest.mark.parametrize("width", [16, 64, 128])
@pytest.mark.parametrize("name", STEPS)
def test_attention_over_random_pages_is_as_in_fp32(device: torch.device, name: str, width: int, num_heads: int) -> None:
    case = Case(device, STEPS[name], num_heads, width)
    for row, output in enumerate(case.attend(list(range(len(case.counts))))):
        if case.counts[row][0]:
            torch.testing.assert_close(output.float(), case.expected(row), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", STEPS)
def test_tolerance_is_finer_than_what_one_forgotten_key_would_change(device: torch.device, name: str) -> None:
    """Without this the test above could pass with a mask that is off by one."""
    case = Case(device, STEPS[name], 8, 64)
    row = max(range(len(case.counts)), key=lambda row: case.counts[row][1])
    expected = case.expected(row)
    case.values[row][0] = 0
    assert (case.expected(row) - expected).abs().max() > 2 * TOLERANCE


@pytest.mark.parametrize("name", ["decode", "chunks"])
def test_attention_of_a_sequence_is_bit_for_bit_the_same_alone_and_in_a_batch(card: torch.device, name: str) -> None:
    case = Case(card, STEPS[name], 8, 128)
    rows = list(range(len(case.counts)))
    for row, together in zip(rows, case.attend(rows), strict=True):
        # One query takes another path of the kernel when it is alone.
        if name == "decode" or case.counts[row][0] > 1:
            assert torch.equal(case.attend([row])[0], together)
