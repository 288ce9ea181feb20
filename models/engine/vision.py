"""Pictures inside the engine: what a prompt brings of them, the vision tower that encodes them, a cache of its output.

The library's own Qwen2.5-VL tower does the forward, all pictures of a step in one call. Three things around it are
ours. Attention: under `sdpa` the library splits at each window in a Python loop, with a device sync for each layer;
under a registered name that contains "flash" it makes one call with the bounds of all segments, which is the form of
PyTorch's `varlen_attn`. The layout (window order, bounds, positions): computed from the grids on the host and passed
in, so that the forward never waits for the device. The patch embedding: a convolution whose stride is its kernel is
a matrix product, and as one it takes a quarter of the time on a CPU (1,024 patches of the 7B shape: 15 ms of 56).

Knows nothing of requests, steps or prompts: the runner says which pictures a step needs, and when the step is over.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from collections.abc import Sequence as Sequences
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from models.engine.sequence import PictureSpan

# The library looks for "flash" in the name.
VARLEN_ATTENTION = "avito_flash_varlen"
GROUPED_ATTENTION = "avito_flash_grouped"

AttentionFunction = Callable[..., tuple[torch.Tensor, None]]
Picture = tuple[PictureSpan, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class VisionInputs:
    """The pictures of one prompt, made in the request's thread. All tensors are on the CPU.

    :param pixel_values: for each picture (num_patches, channels * temporal * patch * patch), float32.
    :param grids: (num_pictures, 3), int64: patches in time, height and width.
    :param positions: (3, num_prompt_tokens), int64: rotary positions in time, height and width.
    :param rope_delta: what is added to the index of a token after the prompt to get its rotary position.
    """

    pixel_values: tuple[torch.Tensor, ...]
    grids: torch.Tensor
    positions: torch.Tensor
    rope_delta: int


def varlen_attention(kernel: Callable[..., Any] = varlen_attn) -> AttentionFunction:
    """The attention function of transformers' `AttentionInterface` for packed segments, by one call of `kernel`.

    :param kernel: `torch.nn.attention.varlen.varlen_attn` or another with its signature. PyTorch's own takes CUDA
        tensors of half precision.
    """

    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: None,
        *,
        scaling: float,
        cu_seq_lens_q: torch.Tensor,
        cu_seq_lens_k: torch.Tensor,
        max_length_q: int,
        max_length_k: int,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        # (1, heads, tokens, head_dim) -> (tokens, heads, head_dim): a view, the library packs tokens first itself.
        query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        output: torch.Tensor = kernel(
            query, key, value, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, scale=scaling
        )
        return output[None], None

    return attention


def grouped_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    scaling: float,
    cu_seq_lens_q: torch.Tensor,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The same where `varlen_attn` does not run (CPU, FP32): one `scaled_dot_product_attention` for all segments of
    the same length. Windows have few lengths: whole, and cut at the right and lower edges of a picture.

    Reads the bounds, which costs a sync on CUDA.

    :param query: (1, heads, tokens, head_dim), as are `key` and `value`.
    :param cu_seq_lens_q: (num_segments + 1,), where segments begin, and the end of the last.
    :return: (1, tokens, heads, head_dim).
    """
    starts_of: dict[int, list[int]] = {}
    for start, end in pairwise(cu_seq_lens_q.tolist()):
        starts_of.setdefault(end - start, []).append(start)
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    output = torch.empty_like(query)
    for length, starts in starts_of.items():
        tokens = (torch.tensor(starts)[:, None] + torch.arange(length)).to(query.device)
        # (segments, length, heads, head_dim) -> (segments, heads, length, head_dim)
        q, k, v = (tensor[tokens].transpose(1, 2) for tensor in (query, key, value))
        output[tokens] = scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2)
    return output[None], None


class _LinearPatchEmbed(nn.Module):
    """`Qwen2_5_VisionPatchEmbed` as a matrix product, on the same memory: patches come flattened as its kernel is."""

    def __init__(self, proj: nn.Conv3d) -> None:
        super().__init__()
        if proj.stride != proj.kernel_size or proj.bias is not None:
            raise ValueError("the patch embedding is not a plain product of patches")
        self.weight = nn.Parameter(proj.weight.detach().flatten(1), requires_grad=False)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(num_patches, channels * temporal * patch * patch) -> (num_patches, hidden)."""
        return nn.functional.linear(patches, self.weight)


class VisionTower:
    """Encodes pictures, equal ones once, and keeps what it gave, least recently used first to go. Loop's thread only.

    Nothing is evicted before `trim`, which the runner calls once a step is over: what a step has asked for is there
    until its end, so that its own pictures may exceed `cache_bytes` for that long. Encode, read and trim on the same
    stream.

    :param visual: `Qwen2_5_VisionTransformerPretrainedModel` on `device`, in eval mode. Its attention and its patch
        embedding are replaced.
    :param dtype: of its weights.
    :param cache_bytes: most bytes of embeddings between two steps, on the device.
    """

    def __init__(self, visual: Any, device: torch.device, dtype: torch.dtype, cache_bytes: int) -> None:
        self._visual = visual
        self._device = device
        self._dtype = dtype
        self._cache_bytes = cache_bytes
        self._cache: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        #: Bytes of embeddings held now.
        self.num_bytes = 0
        #: Pictures given to `encode` that needed no encoding (cached, or twice in one call), and those that did.
        self.num_hits = 0
        self.num_misses = 0

        config = visual.config
        has_kernel = (
            device.type == "cuda"
            and dtype in (torch.float16, torch.bfloat16)
            and config.hidden_size // config.num_heads % 8 == 0
        )
        ALL_ATTENTION_FUNCTIONS.register(VARLEN_ATTENTION, varlen_attention())
        ALL_ATTENTION_FUNCTIONS.register(GROUPED_ATTENTION, grouped_attention)
        # Only after loading: while it loads, the library takes such a name for a kernel on the hub.
        config._attn_implementation = VARLEN_ATTENTION if has_kernel else GROUPED_ATTENTION
        if not isinstance(visual.patch_embed, _LinearPatchEmbed):
            visual.patch_embed = _LinearPatchEmbed(visual.patch_embed.proj)

    @property
    def weights_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self._visual.parameters())

    @property
    def bytes_per_patch(self) -> int:
        """About what encoding takes for each patch at its peak: of a block's activations, those that live together
        (residual, norm, merged query-key-value and its rotated parts, or the MLP's), and the pixels."""
        config = self._visual.config
        patch_width = config.in_channels * config.temporal_patch_size * config.patch_size**2
        width = patch_width + 4 * config.hidden_size + max(8 * config.hidden_size, 3 * config.intermediate_size)
        return int(width * torch.empty((), dtype=self._dtype).element_size())

    def is_cached(self, key: bytes) -> bool:
        return key in self._cache

    def missing(self, spans: Iterable[PictureSpan]) -> list[PictureSpan]:
        """Those that `encode` would have to encode: the first of each key that is not cached."""
        found: dict[bytes, PictureSpan] = {}
        for span in spans:
            if span.key not in self._cache:
                found.setdefault(span.key, span)
        return list(found.values())

    @torch.inference_mode()
    def encode(self, pictures: Sequences[Picture]) -> None:
        """Make the embeddings of all these pictures available, by at most one forward.

        :param pictures: (span, pixel_values, grid) of each; the tensors as in `VisionInputs`, the grid a row of (3,).
        :raise torch.OutOfMemoryError: nothing was added, counted or dropped.
        """
        new: dict[bytes, Picture] = {}
        for picture in pictures:
            key = picture[0].key
            if key in self._cache:
                self._cache.move_to_end(key)
            else:
                new.setdefault(key, picture)
        if new:
            spans, pixels, grids = zip(*new.values(), strict=True)
            output = self._forward(pixels, torch.stack(grids))
            parts = torch.split(output, [span.num_tokens for span in spans])
            for span, part in zip(spans, parts, strict=True):
                # A copy: a part would keep the memory of the whole output for as long as it lives.
                self._cache[span.key] = part.clone()
                self.num_bytes += part.nbytes
        self.num_misses += len(new)
        self.num_hits += len(pictures) - len(new)

    def embeddings(self, key: bytes) -> torch.Tensor:
        """(num_tokens, hidden of the text model) of an encoded picture, on the device. Not to be written to.

        :raise KeyError: it was never encoded, or has been dropped since.
        """
        self._cache.move_to_end(key)
        return self._cache[key]

    def trim(self, keep: Collection[bytes] = ()) -> None:
        """A step is over: drop the least recently used until `cache_bytes` are kept.

        One that is larger than all of `cache_bytes` goes first, and so drives no other out.

        :param keep: what is not to be dropped in any case: pictures of which a prompt has been read in part.
        """
        too_large = [key for key, entry in self._cache.items() if entry.nbytes > self._cache_bytes]
        for key in (*too_large, *(key for key in self._cache if key not in set(too_large))):
            if self.num_bytes <= self._cache_bytes:
                break
            if key not in keep:
                self.num_bytes -= self._cache.pop(key).nbytes

    def _forward(self, pixels: Sequences[torch.Tensor], grids: torch.Tensor) -> torch.Tensor:
        """(all tokens of all pictures, hidden)."""
        # Converted and staged in one pass, so that half the bytes travel; on CUDA the allocator keeps the pinned
        # buffer until the copy is done.
        num_patches = [len(patches) for patches in pixels]
        staged = torch.empty(
            (sum(num_patches), pixels[0].shape[1]), dtype=self._dtype, pin_memory=self._device.type == "cuda"
        )
        for part, patches in zip(torch.split(staged, num_patches), pixels, strict=True):
            part.copy_(patches)
        output = self._visual(
            staged.to(self._device, non_blocking=True), grid_thw=grids, return_dict=True, **self._layout(grids)
        )
        embeddings: torch.Tensor = output.pooler_output
        return embeddings

    def _layout(self, grids: torch.Tensor) -> dict[str, Any]:
        """All that the tower's forward would compute from the grids on the device, under the names that it takes."""
        visual = self._visual
        windows, window_bounds = get_vision_window_index(
            grids, visual.spatial_merge_size, visual.window_size, visual.patch_size
        )
        bounds = get_vision_cu_seqlens(grids)
        return {
            "position_ids": self._to_device(get_vision_position_ids(grids, visual.spatial_merge_size)),
            "cu_seqlens": self._to_device(bounds),
            "max_seqlen": int(bounds.diff().max()),
            "window_index": self._to_device(windows),
            "cu_window_seqlens": self._to_device(window_bounds),
            "max_window_seqlen": int(window_bounds.diff().max()),
        }

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        # From pageable memory a copy waits for the stream.
        pinned = tensor.pin_memory() if self._device.type == "cuda" else tensor
        return pinned.to(self._device, non_blocking=True)
