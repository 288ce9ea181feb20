"""Paged attention: where keys and values live, how new ones are written, and attention over them.

One packed row of tokens at a time: the new tokens of all sequences of a step, one sequence after the other. On CUDA the
work is done by PyTorch's own `varlen_attn` (FlashAttention with a block table), on a CPU by
`scaled_dot_product_attention` over gathered pages. Which page belongs to whom is decided in `kv_cache.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from models.engine.kv_cache import PageCopy

# FlashAttention takes pages of a multiple of 256 tokens only.
CUDA_PAGE_TOKENS = 256
# Smaller pages waste less of a CPU's small budget, and padding is what a gather costs.
CPU_PAGE_TOKENS = 32


class PagedKV:
    """Keys and values of one model: two tensors (num_layers, num_pages, page_tokens, num_kv_heads, head_dim).

    Zeroed when made: a page is read as far as its sequence is long, but what lies behind is multiplied by 0 on a CPU,
    and 0 * NaN is NaN.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_pages: int,
        page_tokens: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, num_pages, page_tokens, num_kv_heads, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.num_pages = num_pages
        self.page_tokens = page_tokens

    @property
    def num_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def copy(self, copies: Iterable[PageCopy]) -> None:
        """Copy the first tokens of pages into others, in order, for all layers."""
        for copy in copies:
            for store in (self.keys, self.values):
                store[:, copy.target, : copy.num_tokens] = store[:, copy.source, : copy.num_tokens]

    def zero(self, pages: Iterable[int]) -> None:
        """Forget what pages hold, after NaN or Inf may have got into them."""
        for page in pages:
            self.keys[:, page] = 0
            self.values[:, page] = 0


@dataclass
class AttentionPlan:
    """What all layers of one step share. T tokens in N sequences; the last tokens of a sequence are the new ones.

    :param write_at: (T,) int64: page * page_tokens + offset of each new token.
    :param page_table: (N, width) int32: the pages of each sequence, 0 where it has none.
    :param num_keys: (N,) int32: tokens of each sequence, the new ones included.
    :param cu_queries: (N + 1,) int32: where the new tokens of each sequence begin.
    :param max_queries: most new tokens of one sequence; 1 for decoding.
    :param query_counts: the new tokens per sequence as ints, and
    :param key_counts: the tokens per sequence as ints: needed on a CPU only when `max_queries` > 1.
    """

    write_at: Tensor
    page_table: Tensor
    num_keys: Tensor
    cu_queries: Tensor
    max_queries: int
    query_counts: list[int] | None = None
    key_counts: list[int] | None = None

    def __post_init__(self) -> None:
        self._mask: Tensor | None = None
        self._cu_keys: Tensor | None = None

    def decode_mask(self, page_tokens: int) -> Tensor:
        """(N, 1, 1, width * page_tokens) bool, True where there is a key; made once per step."""
        if self._mask is None:
            columns = torch.arange(self.page_table.shape[1] * page_tokens, device=self.num_keys.device)
            self._mask = (columns < self.num_keys[:, None])[:, None, None]
        return self._mask

    def cu_keys(self, max_keys: int) -> Tensor:
        """(N + 1,) int32; the kernel wants it beside a block table, though only its length matters."""
        if self._cu_keys is None:
            num = self.num_keys.shape[0]
            self._cu_keys = torch.arange(
                0, (num + 1) * max_keys, max_keys, dtype=torch.int32, device=self.num_keys.device
            )
        return self._cu_keys


VarlenAttention = Callable[..., Any]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pages: tuple[Tensor, Tensor],
    plan: AttentionPlan,
    scale: float,
    kernel: VarlenAttention | None = None,
) -> Tensor:
    """Write the new keys and values of one layer, then attend causally over each sequence's pages.

    :param query: (T, num_heads, head_dim).
    :param key: (T, num_kv_heads, head_dim), rotated; `value` likewise.
    :param pages: the layer's keys and values, each (num_pages, page_tokens, num_kv_heads, head_dim).
    :param kernel: for `attend_varlen`; default PyTorch's own on CUDA, none on a CPU.
    :return: (T, num_heads, head_dim).
    """
    all_keys, all_values = pages
    all_keys.flatten(0, 1).index_copy_(0, plan.write_at, key)
    all_values.flatten(0, 1).index_copy_(0, plan.write_at, value)
    if kernel is None and query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn as kernel
    if kernel is not None:
        return attend_varlen(query, all_keys, all_values, plan, scale, kernel)
    if plan.max_queries == 1:
        return _decode_gathered(query, all_keys, all_values, plan, scale)
    return _prefill_gathered(query, all_keys, all_values, plan, scale)


def attend_varlen(
    query: Tensor, keys: Tensor, values: Tensor, plan: AttentionPlan, scale: float, kernel: VarlenAttention
) -> Tensor:
    """The CUDA way; `kernel` has the signature of `torch.nn.attention.varlen.varlen_attn`."""
    max_keys = plan.page_table.shape[1] * keys.shape[1]
    output: Tensor = kernel(
        query,
        keys,
        values,
        plan.cu_queries,
        plan.cu_keys(max_keys),
        plan.max_queries,
        max_keys,
        scale=scale,
        # One query is causal by itself, and (-1, 0) would turn the kernel's grouped-query fast path off. Several
        # queries need (-1, 0), which aligns the mask at the end: the new tokens are the last ones.
        window_size=(-1, -1) if plan.max_queries == 1 else (-1, 0),
        enable_gqa=True,
        seqused_k=plan.num_keys,
        block_table=plan.page_table,
        # One split: a row's result is the same alone as in any batch.
        num_splits=1,
    )
    return output


def _decode_gathered(query: Tensor, keys: Tensor, values: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    num, num_heads, head_dim = query.shape
    num_kv_heads = keys.shape[2]
    # The query heads that share a key head are attended to as if they were several queries.
    grouped = query.view(num, num_kv_heads, num_heads // num_kv_heads, head_dim)
    table = plan.page_table
    k = keys[table].view(num, -1, num_kv_heads, head_dim).transpose(1, 2)
    v = values[table].view(num, -1, num_kv_heads, head_dim).transpose(1, 2)
    mask = plan.decode_mask(keys.shape[1])
    output = scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale)
    return output.reshape(num, num_heads, head_dim)


def _prefill_gathered(query: Tensor, keys: Tensor, values: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    assert plan.query_counts is not None and plan.key_counts is not None
    page_tokens = keys.shape[1]
    outputs = []
    for row, q in enumerate(torch.split(query, plan.query_counts)):
        num_queries, num_keys = plan.query_counts[row], plan.key_counts[row]
        if num_queries == 0:
            continue
        table = plan.page_table[row, : -(-num_keys // page_tokens)]
        k = keys[table].flatten(0, 1)[:num_keys].transpose(0, 1)[None]
        v = values[table].flatten(0, 1)[:num_keys].transpose(0, 1)[None]
        is_whole = num_queries == num_keys
        mask = None
        if not is_whole:
            mask = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
        output = scaled_dot_product_attention(
            q.transpose(0, 1)[None], k, v, attn_mask=mask, is_causal=is_whole, scale=scale, enable_gqa=True
        )
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)
