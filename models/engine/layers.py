"""The decoder stack of Qwen3, Llama and Qwen2.5-VL over packed tokens and paged keys and values.

Made from the library's own model: its weights (query, key and value merged into one matrix, gate and up into one), its
embedding, rotary module, final norm and output head. The library's layers are let go one by one, so that merging never
needs more than one layer of extra memory. The small operations between the matrix products can be compiled.

The library's own decoder is not called, because a step has to read pages, take tokens of many sequences in one row, and
be captured in a CUDA graph; tests compare both token for token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from models.engine.attention import AttentionPlan, PagedKV, attend
from models.errors import LoadError

# Rotary embeddings that depend on positions alone. Others change with the longest sequence so far, which differs
# between the requests of a batch.
KNOWN_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass
class LayerWeights:
    """One layer. Matrices are (out, in); a bias is None where the model has none."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: Tensor
    output_bias: Tensor | None
    post_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


@dataclass(frozen=True)
class StackShape:
    """The numbers that the engine plans memory by."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    dtype_bytes: int

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype_bytes


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm (arXiv:1910.07467), in float32 as the library computes it."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum, and its norm."""
    residual = residual + x
    return rms_norm(residual, weight, eps), residual


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (arXiv:2104.09864) in the half-split form. x: (T, heads, head_dim); cos, sin: (T, head_dim)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


def rotate_qk(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split (T, (num_heads + 2 * num_kv_heads) * head_dim) into query, key, value; norm and rotate the first two."""
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    query, key, value = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    if norms is not None:
        query, key = rms_norm(query, norms[0], eps), rms_norm(key, norms[1], eps)
    return _rotate(query, cos, sin), _rotate(key, cos, sin), value.contiguous()


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


def fused(function: Callable[..., Any], num_batched: int) -> Callable[..., Any]:
    """`function` compiled by `torch.compile`, for any number of rows.

    Compiling takes seconds and happens at the first call with one row, and at the first with several; other dtypes of
    the arguments count as first calls again. All sizes but the number of rows are constants of the kernels: with
    `dynamic=True` widths, numbers of heads and even eps would be arguments of general, slower ones. What one model has
    compiled does not count against the limit of another, which has other widths.

    :param num_batched: so many of the first arguments are tensors with a row for each token or sequence.
    """
    from torch._dynamo import maybe_mark_dynamic

    options: dict[str, Any] = dict(dynamic=False, fullgraph=True, isolate_recompiles=True)
    compiled: Callable[..., Any] = torch.compile(function, **options)

    def run(*arguments: Any) -> Any:
        for tensor in arguments[:num_batched]:
            if len(tensor) > 1:  # one row is always a kernel of its own
                maybe_mark_dynamic(tensor, 0)
        return compiled(*arguments)

    return run


@dataclass
class SmallOperations:
    """What happens between the matrix products; eager or compiled."""

    norm: Callable[..., Tensor] = rms_norm
    add_norm: Callable[..., tuple[Tensor, Tensor]] = add_norm
    rotate_qk: Callable[..., tuple[Tensor, Tensor, Tensor]] = rotate_qk
    silu_mul: Callable[..., Tensor] = silu_mul

    @classmethod
    def compiled(cls) -> SmallOperations:
        """Each fused into one kernel. Compiling happens at the first calls, see `fused`."""
        return cls(fused(rms_norm, 1), fused(add_norm, 2), fused(rotate_qk, 3), fused(silu_mul, 1))


class TextStack:
    """The decoder of one model. Takes the layers out of the library's model: `generate` no longer works on it.

    :param model: `Qwen3ForCausalLM`, `LlamaForCausalLM` or `Qwen2_5_VLForConditionalGeneration`, in eval mode.
    :raise LoadError: a feature of the model's configuration is not one that this stack computes.
    """

    def __init__(self, model: Any, operations: SmallOperations | None = None) -> None:
        config = model.config.get_text_config()
        check_config(config)
        decoder = model.model.language_model if hasattr(model.model, "language_model") else model.model
        head = model.get_output_embeddings()
        self.operations = operations or SmallOperations()
        self.embedding: Tensor = model.get_input_embeddings().weight.detach()
        self._head: Tensor = head.weight.detach()
        self._head_bias: Tensor | None = None if head.bias is None else head.bias.detach()
        self._final_norm: Tensor = decoder.norm.weight.detach()
        self._rotary = decoder.rotary_emb
        self._eps = float(config.rms_norm_eps)
        num_heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
        self._scale = head_dim**-0.5
        # Pictures have a height and a width beside their place in the text.
        self.num_position_axes = 3 if hasattr(model.config, "vision_config") else 1
        self.shape = StackShape(
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_heads=num_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            vocab_size=self._head.shape[0],
            max_positions=config.max_position_embeddings,
            dtype_bytes=self.embedding.element_size(),
        )
        self.layers: list[LayerWeights] = []
        while len(decoder.layers):
            self.layers.append(_merge(decoder.layers[0]))
            del decoder.layers[0]

    @property
    def num_bytes(self) -> int:
        """Of all weights, those shared (a head tied to the embedding) counted once."""
        tensors = [self.embedding, self._head, self._final_norm]
        for layer in self.layers:
            tensors += [value for value in vars(layer).values() if value is not None]
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    def embed(self, ids: Tensor) -> Tensor:
        """(T,) int64 -> (T, hidden_size)."""
        return torch.nn.functional.embedding(ids, self.embedding)

    def forward(self, hidden: Tensor, positions: Tensor, cache: PagedKV, plan: AttentionPlan) -> Tensor:
        """Run new tokens through all layers, the final norm included.

        :param hidden: (T, hidden_size), the embeddings.
        :param positions: (T,) int64, or (3, T) where pictures have positions of their own.
        :return: (T, hidden_size).
        """
        ops, shape, eps = self.operations, self.shape, self._eps
        position_ids = positions[:, None] if self.num_position_axes > 1 else positions[None]
        cos, sin = (part[0] for part in self._rotary(hidden, position_ids))
        residual = hidden
        x = ops.norm(hidden, self.layers[0].input_norm, eps)
        for index, layer in enumerate(self.layers):
            qkv = linear(x, layer.qkv, layer.qkv_bias)
            norms = None
            if layer.query_norm is not None and layer.key_norm is not None:
                norms = (layer.query_norm, layer.key_norm)
            query, key, value = ops.rotate_qk(
                qkv, cos, sin, norms, shape.num_heads, shape.num_kv_heads, shape.head_dim, eps
            )
            pages = (cache.keys[index], cache.values[index])
            attended = attend(query, key, value, pages, plan, self._scale)
            x = linear(attended.flatten(1), layer.output, layer.output_bias)
            x, residual = ops.add_norm(x, residual, layer.post_norm, eps)
            x = linear(ops.silu_mul(linear(x, layer.gate_up, layer.gate_up_bias)), layer.down, layer.down_bias)
            is_last = index + 1 == len(self.layers)
            weight = self._final_norm if is_last else self.layers[index + 1].input_norm
            x, residual = ops.add_norm(x, residual, weight, eps)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, hidden_size) after `forward` -> (N, vocab_size), in the model's dtype."""
        return linear(hidden, self._head, self._head_bias)


def check_config(config: Any) -> None:
    """:raise LoadError: naming the feature that this stack does not compute."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(config, "use_sliding_window", False):
        raise LoadError("the engine computes full attention only, the model has layers with a sliding window")
    if config.hidden_act != "silu":
        raise LoadError(f"the engine computes hidden_act silu only, the model has {config.hidden_act}")
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope_type not in KNOWN_ROPE_TYPES:
        known = ", ".join(KNOWN_ROPE_TYPES)
        raise LoadError(f"the engine computes rope_type {known}, the model has {rope_type}")


def _merge(layer: Any) -> LayerWeights:
    """One layer's weights; merging leaves the parts to be freed with the layer."""
    attention, mlp = layer.self_attn, layer.mlp
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    qkv, qkv_bias = _stack(attention.q_proj, attention.k_proj, attention.v_proj)
    gate_up, gate_up_bias = _stack(mlp.gate_proj, mlp.up_proj)
    output, output_bias = _stack(attention.o_proj)
    down, down_bias = _stack(mlp.down_proj)
    return LayerWeights(
        input_norm=layer.input_layernorm.weight.detach(),
        qkv=qkv,
        qkv_bias=qkv_bias,
        query_norm=None if norms[0] is None else norms[0].weight.detach(),
        key_norm=None if norms[1] is None else norms[1].weight.detach(),
        output=output,
        output_bias=output_bias,
        post_norm=layer.post_attention_layernorm.weight.detach(),
        gate_up=gate_up,
        gate_up_bias=gate_up_bias,
        down=down,
        down_bias=down_bias,
    )


def _stack(*projections: Any) -> tuple[Tensor, Tensor | None]:
    """Weights and biases of linear modules, one below the other."""
    if len(projections) == 1:
        (only,) = projections
        return only.weight.detach(), None if only.bias is None else only.bias.detach()
    weight = torch.cat([projection.weight.detach() for projection in projections])
    biases = [projection.bias for projection in projections]
    return weight, None if biases[0] is None else torch.cat([bias.detach() for bias in biases])
