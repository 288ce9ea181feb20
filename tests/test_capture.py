"""What only a GPU runs, as far as a CPU can tell: captured functions, the paged kernel's arguments, half precision."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from config import DType, EngineOptions, Limits
from models.engine import layers
from models.engine.attention import CUDA_PAGE_TOKENS, AttentionPlan, attend
from models.engine.graphs import Run
from models.engine.layers import TextStack
from models.engine.loop import EngineLoop
from models.engine.scheduler import SchedulerLimits
from models.errors import LoadError
from models.loader import load_model, pick_dtype
from models.snapshots import Snapshot
from tests.capture_guard import CaptureGuard, IllegalInCapture
from tests.test_runner import (
    PROMPTS,
    Poison,
    Served,
    encode_pictures,
    expected_texts,
    generate_pictures,
    llama,
    make_sequence,
    picture,
    qwen3,
    run,
    text_ids,
    vision,
)

__all__ = ["llama", "qwen3", "vision"]

# Pages and contexts as on CUDA, but few.
CUDA_SIZES: dict[str, Any] = dict(num_pages=16, page_tokens=CUDA_PAGE_TOKENS, max_running=5, max_context_tokens=512)


def reference_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor,
    block_table: Tensor,
    num_splits: int | None = None,
) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn` over pages, as its documentation describes it, with the checks of its
    kernel (`mha_varlen_fwd` in PyTorch's flash_api.cpp). Looks at no tensor's content on the host."""
    num, table_width = block_table.shape
    num_tokens, num_heads, head_dim = query.shape
    page_tokens, num_kv_heads = key.shape[1:3]
    assert cu_seq_k is not None
    for tensor in (cu_seq_q, cu_seq_k, seqused_k, block_table):
        assert tensor.dtype == torch.int32 and tensor.is_contiguous()
    assert cu_seq_q.shape == cu_seq_k.shape == (num + 1,) and seqused_k.shape == (num,)
    assert query.dtype == key.dtype == value.dtype and key.shape == value.shape
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert page_tokens % 256 == 0 and max_k == table_width * page_tokens
    assert head_dim % 8 == 0 and num_heads % num_kv_heads == 0 and (enable_gqa or num_heads == num_kv_heads)
    # With one query the kernel folds the heads of a group into rows: it takes one token for each sequence then.
    assert max_q > 1 or num_tokens == num
    assert window_size in ((-1, -1), (-1, 0)) and num_splits == 1

    places = torch.arange(num_tokens)
    sequence = (places[:, None] >= cu_seq_q[1:]).sum(1)
    last = cu_seq_q[1:][sequence]
    num_keys = seqused_k[sequence]
    columns = torch.arange(max_k)
    is_seen = columns < num_keys[:, None]
    if window_size == (-1, 0):
        is_seen = is_seen & (columns <= (num_keys - last + places)[:, None])
    k, v = (pool[block_table].flatten(1, 2)[sequence].float() for pool in (key, value))
    grouped = query.float().unflatten(1, (num_kv_heads, -1))
    scores = torch.einsum("tkgd,tskd->tkgs", grouped, k).mul(scale)
    shares = scores.masked_fill(~is_seen[:, None, None], -torch.inf).softmax(-1)
    return torch.einsum("tkgs,tskd->tkgd", shares, v).flatten(1, 2).to(query.dtype)


class GuardedCaptures:
    """Captures that refuse what CUDA graphs do, and replay into the same output as they do."""

    def __init__(self) -> None:
        self.num_captures = 0
        self.num_replays = 0

    def __call__(self, run: Run) -> Run:
        output = self._run(run).clone()
        self.num_captures += 1

        def replay() -> Tensor:
            self.num_replays += 1
            output.copy_(self._run(run))
            return output

        return replay

    def _run(self, run: Run) -> Tensor:
        with CaptureGuard() as guard:
            result = run()
        assert guard.num_operations > 0
        return result


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention the CUDA way."""
    monkeypatch.setattr(layers, "attend", partial(attend, kernel=reference_varlen))


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_captured_functions_of_text_models_are_legal_and_equal_generate(
    kind: str, request: pytest.FixtureRequest
) -> None:
    served: Served = request.getfixturevalue(kind)
    captures = GuardedCaptures()
    runner = served.runner(capture=captures, max_steps_in_flight=2, **CUDA_SIZES)
    assert captures.num_captures > 10
    before = captures.num_replays
    sequences = [make_sequence(text_ids(served, text)) for text in PROMPTS]
    assert run(runner, *sequences) == expected_texts(served)
    # The prompts, then a forward and a draw for each token.
    assert captures.num_replays - before > 2 * (len(sequences[0].output_ids) - 1)


@pytest.mark.usefixtures("as_on_cuda")
def test_captured_functions_of_vision_model_are_legal_and_equal_generate(vision: Served) -> None:
    captures = GuardedCaptures()
    runner = vision.runner(capture=captures, max_steps_in_flight=2, **CUDA_SIZES)
    prompts = [
        encode_pictures(vision, "a", picture(56, 56, 1)),
        encode_pictures(vision, "bb", picture(280, 168, 2), picture(84, 84, 3)),
    ]
    ours = run(runner, *(make_sequence(prompt.ids, prompt) for prompt in prompts))
    assert ours == [generate_pictures(vision, prompt) for prompt in prompts]


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize("has_graphs", [True, False])
def test_launching_a_step_waits_for_nothing(qwen3: Served, has_graphs: bool) -> None:
    options: dict[str, Any] = {"capture": GuardedCaptures()} if has_graphs else {}
    runner = qwen3.runner(max_steps_in_flight=2, **CUDA_SIZES, **options)
    launch = runner.launch

    def guarded(step: Any) -> Any:
        with CaptureGuard(is_capture=False):
            return launch(step)

    runner.launch = guarded  # type: ignore[method-assign]
    given: list[dict[str, Any]] = [
        {},
        {"temperature": 0.8},
        {"temperature": 0.8, "top_k": 7, "top_p": 0.9, "repetition_penalty": 1.2},
        {"presence_penalty": 0.5, "num_logprobs": 2, "logit_bias": ((3, 1.5),)},
        {"temperature": 0.7, "min_p": 0.1, "min_tokens": 4, "stop_ids": frozenset({1})},
    ]
    sequences = [make_sequence(text_ids(qwen3, PROMPTS[i]), **sampling) for i, sampling in enumerate(given)]
    run(runner, *sequences)


@pytest.mark.parametrize(
    "forbidden",
    [
        lambda x: x[0].item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: bool(x.any()),
        lambda x: torch.tensor([1, 2]),
        lambda x: x.__setitem__(1, 5.0),
    ],
)
def test_guard_refuses_what_a_capture_cannot_hold(forbidden: Callable[[Tensor], Any]) -> None:
    with pytest.raises(IllegalInCapture), CaptureGuard():
        forbidden(torch.ones(3))


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([(1, 1), (1, 300), (1, 256), (1, 257)], id="decode"),
        pytest.param([(7, 7), (300, 300), (1, 1)], id="whole-prompts"),
        pytest.param([(7, 300), (2, 258), (256, 512)], id="chunks"),
        pytest.param([(7, 7), (1, 290), (40, 300), (1, 1)], id="mix"),
    ],
)
def test_varlen_attention_equals_the_gathered_one(rows: list[tuple[int, int]]) -> None:
    """:param rows: new tokens and all tokens of each sequence."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    pages = random(9, CUDA_PAGE_TOKENS, 2, 16), random(9, CUDA_PAGE_TOKENS, 2, 16)
    table = torch.randperm(8, generator=generator).view(4, 2)[: len(rows)].int() + 1
    counts, key_counts = [new for new, _ in rows], [total for _, total in rows]
    places = [
        table[index, i // CUDA_PAGE_TOKENS].item() * CUDA_PAGE_TOKENS + i % CUDA_PAGE_TOKENS
        for index, (new, total) in enumerate(rows)
        for i in range(total - new, total)
    ]
    total = sum(counts)
    query, key, value = random(total, 4, 16), random(total, 2, 16), random(total, 2, 16)

    def compute(kernel: Any) -> Tensor:
        plan = AttentionPlan(
            write_at=torch.tensor(places),
            page_table=table,
            num_keys=torch.tensor(key_counts, dtype=torch.int32),
            cu_queries=torch.tensor([0, *counts]).cumsum(0).int(),
            max_queries=max(counts),
            query_counts=counts,
            key_counts=key_counts,
        )
        return attend(query, key, value, (pages[0].clone(), pages[1].clone()), plan, 0.25, kernel)

    torch.testing.assert_close(compute(reference_varlen), compute(None), rtol=1e-4, atol=1e-5)


def load_half(folder: Path, model: Any, dtype: DType) -> Served:
    snapshot = Snapshot(model, folder, folder, dtype, "", False)
    loaded = load_model(snapshot, engine=EngineOptions(device="cpu"), limits=Limits(), phase=lambda _: nullcontext())
    return Served(loaded, loaded.make_encoder(100_000), folder)


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_text_model_in_half_precision_answers(qwen3_folder: Path, dtype: DType) -> None:
    served = load_half(qwen3_folder, "avibe", dtype)
    assert served.loaded.stack.dtype == getattr(torch, dtype)
    runner = served.runner(capture=GuardedCaptures(), **CUDA_SIZES)
    sequences = [make_sequence(text_ids(served, text), temperature=0.5, top_p=0.9) for text in PROMPTS[:2]]
    sequences.append(make_sequence(text_ids(served, PROMPTS[2])))
    # Longer than any captured prefill.
    sequences.append(make_sequence(tuple(range(10, 210)) * 2 + (7,) * 80))
    assert all(len(answer) == 24 for answer in run(runner, *sequences))


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_vision_model_in_half_precision_answers(vision_folder: Path, dtype: DType) -> None:
    served = load_half(vision_folder, "avision", dtype)
    prompt = encode_pictures(served, "What is it?", picture(140, 84), picture(56, 112))
    runner = served.runner(capture=GuardedCaptures(), **CUDA_SIZES)
    assert [len(answer) for answer in run(runner, make_sequence(prompt.ids, prompt))] == [24]


def test_float32_on_cuda_is_refused_with_a_sentence() -> None:
    with pytest.raises(LoadError, match="float16 or bfloat16"):
        pick_dtype("float32", torch.device("cuda:0"))


def test_merging_keeps_no_more_than_one_layer_of_parts() -> None:
    """Nothing may wait for the garbage collector: a card has no room for two copies of a model."""
    config = Qwen3Config(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, head_dim=8
    )
    model: Any = Qwen3ForCausalLM(config)
    parts = [
        weakref.ref(part.weight)
        for layer in model.model.layers
        for part in (layer.self_attn.q_proj, layer.mlp.gate_proj)
    ]
    stack = TextStack(model)
    assert len(stack.layers) == 3 and [part() for part in parts] == [None] * 6


def test_steps_planned_after_one_that_failed_write_into_nobodys_pages(qwen3: Served) -> None:
    """A step may be under way before it is read that the one before it could not read a prompt."""
    runner = qwen3.runner(max_steps_in_flight=2)
    loop = EngineLoop(lambda: 0.0)
    loop.add_model("m", runner, SchedulerLimits(max_running=8))
    long, short = tuple(range(10, 70)), tuple(range(10, 30))
    expected = run(runner, make_sequence(long), loop=loop)
    failures = iter([True])
    seen: list[int] = []
    forward = type(runner)._decode_forward

    def watch(slots: Tensor, width: int) -> Tensor:
        seen.extend(slots.tolist())
        return forward(runner, slots, width)

    def fail(ids: Tensor, x: Tensor) -> Tensor:
        if next(failures, False):
            raise ValueError("injected")
        return x

    runner._decode_forward = watch  # type: ignore[method-assign]
    bad = make_sequence(short, max_tokens=2)
    ends: list[str] = []
    bad.on_end = lambda _, reason, __: ends.append(reason)
    with Poison(qwen3, fail):
        loop.add("m", bad)
        while not ends:
            loop._pass()
    while loop._models["m"].in_flight:
        loop._pass()
    assert ends == ["failed"] and not seen
    assert run(runner, make_sequence(long), loop=loop) == expected
