"""The vision tower against the library's own, and the cache of what it gives."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from models.engine.sequence import PictureSpan
from models.engine.vision import Picture, VisionTower, varlen_attention

CPU = torch.device("cpu")
HIDDEN = 64
PATCH_DIM = 3 * 2 * 14 * 14
# A window is 8 x 8 patches. Grids smaller, as large, a multiple, and with a remainder in one or both directions.
GRIDS = [(2, 2), (4, 6), (8, 8), (16, 8), (10, 14), (18, 2), (2, 34), (24, 20)]
# FP32: the order of sums differs with the number of rows that are multiplied and with the kernel of attention. The
# embeddings here are about 2, the largest 9, and differ by 0.00001 at most.
RTOL, ATOL = 1e-5, 3e-5


@pytest.fixture(scope="module")
def library_tower(vision_folder: Path) -> Any:
    """The library's tower as it comes, with `sdpa`."""
    model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(vision_folder, attn_implementation="sdpa")
    visual = model.eval().model.visual
    with torch.no_grad():
        # As made, weights are so small that a mistake in attention would hardly show.
        for weight in visual.parameters():
            weight.mul_(4)
    assert visual.config._attn_implementation == "sdpa"
    return visual


@pytest.fixture
def tower(library_tower: Any) -> VisionTower:
    return make_tower(library_tower)


def make_tower(library_tower: Any, cache_bytes: int = 10**9) -> VisionTower:
    return VisionTower(copy.deepcopy(library_tower), CPU, torch.float32, cache_bytes)


def make_picture(height: int, width: int, seed: int = 0, time: int = 1) -> Picture:
    """Of random patches; sizes in patches."""
    num_patches = time * height * width
    pixels = torch.randn(num_patches, PATCH_DIM, generator=torch.Generator().manual_seed(seed))
    key = f"{time}x{height}x{width}#{seed}".encode()
    return PictureSpan(0, num_patches // 4, num_patches, key), pixels, torch.tensor([time, height, width])


def expected(library_tower: Any, picture: Picture) -> torch.Tensor:
    _, pixels, grid = picture
    with torch.inference_mode():
        output: torch.Tensor = library_tower(pixels, grid_thw=grid[None]).pooler_output
    return output


def num_bytes(picture: Picture) -> int:
    return picture[0].num_tokens * HIDDEN * 4


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=RTOL, atol=ATOL)


def count_forwards(tower: VisionTower) -> list[int]:
    """Filled with the number of patches of each forward."""
    calls: list[int] = []
    tower._visual.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    return calls


@pytest.mark.parametrize("grid", GRIDS)
def test_embeddings_of_one_picture_equal_the_librarys(
    library_tower: Any, tower: VisionTower, grid: tuple[int, int]
) -> None:
    picture = make_picture(*grid)
    tower.encode([picture])
    ours = tower.embeddings(picture[0].key)
    assert ours.shape == (picture[0].num_tokens, HIDDEN)
    assert_close(ours, expected(library_tower, picture))


def test_embeddings_of_a_batch_equal_those_of_each_alone_by_one_forward(library_tower: Any, tower: VisionTower) -> None:
    pictures = [make_picture(*grid, seed) for seed, grid in enumerate([*GRIDS, (4, 6)])]
    calls = count_forwards(tower)
    tower.encode(pictures)
    assert calls == [sum(span.num_patches for span, _, _ in pictures)]
    for picture in pictures:
        assert_close(tower.embeddings(picture[0].key), expected(library_tower, picture))


def test_frames_of_one_picture_attend_as_in_the_library(library_tower: Any, tower: VisionTower) -> None:
    picture = make_picture(10, 6, time=3)
    tower.encode([make_picture(4, 4), picture])
    assert_close(tower.embeddings(picture[0].key), expected(library_tower, picture))


def test_tolerance_is_finer_than_what_a_wrong_window_would_change(library_tower: Any) -> None:
    """Without this the tests above could pass with no windows at all."""
    picture = make_picture(24, 20)
    wrong = copy.deepcopy(library_tower)
    wrong.fullatt_block_indexes = [0, 1]
    difference = (expected(wrong, picture) - expected(library_tower, picture)).abs().max()
    assert difference > 100 * ATOL


def reference_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """What `varlen_attn` promises, segment by segment, and what its kernel demands of the arguments."""
    assert cu_seq_k is not None
    for tensor in (query, key, value):
        assert tensor.shape == (int(cu_seq_q[-1]), 2, 16) and tensor.stride(-1) == 1
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert type(max_q) is int and max_q == max_k == int(cu_seq_q.diff().max())
    parts = []
    for start, end in pairwise(cu_seq_q.tolist()):
        q, k, v = (tensor[start:end].transpose(0, 1) for tensor in (query, key, value))
        parts.append(scaled_dot_product_attention(q, k, v, scale=scale).transpose(0, 1))
    return torch.cat(parts)


def use_varlen(tower: VisionTower, kernel: Any) -> None:
    ALL_ATTENTION_FUNCTIONS.register("flash_of_this_test", varlen_attention(kernel))
    tower._visual.config._attn_implementation = "flash_of_this_test"


def test_varlen_attn_gets_its_arguments_as_it_documents_them(library_tower: Any, tower: VisionTower) -> None:
    use_varlen(tower, reference_varlen)
    pictures = [make_picture(*grid, seed) for seed, grid in enumerate(GRIDS)]
    tower.encode(pictures)
    for picture in pictures:
        assert_close(tower.embeddings(picture[0].key), expected(library_tower, picture))


def test_forward_with_varlen_attn_never_waits_for_the_device(library_tower: Any) -> None:
    """On the meta device whatever reads a value back raises, as the grouped attention shows."""
    visual = copy.deepcopy(library_tower).to("meta", torch.float16)
    tower = VisionTower(visual, torch.device("meta"), torch.float16, 10**9)
    pictures = [make_picture(*grid, seed) for seed, grid in enumerate(GRIDS)]
    with pytest.raises(NotImplementedError, match="meta tensor"):
        tower.encode(pictures)
    use_varlen(tower, varlen_attn)
    tower.encode(pictures)
    for span, _, _ in pictures:
        embeddings = tower.embeddings(span.key)
        assert (embeddings.shape, embeddings.dtype) == ((span.num_tokens, HIDDEN), torch.float16)


def test_equal_pictures_are_encoded_once_and_counted_as_hits(tower: VisionTower) -> None:
    first, second = make_picture(4, 4, 1), make_picture(4, 4, 2)
    calls = count_forwards(tower)
    tower.encode([first, second, first])
    assert calls == [32]
    assert (tower.num_misses, tower.num_hits) == (2, 1)
    tower.encode([second, first])
    assert calls == [32]
    assert (tower.num_misses, tower.num_hits) == (2, 3)
    tower.encode([])
    assert calls == [32]
    assert (tower.num_misses, tower.num_hits) == (2, 3)


def test_missing_names_each_picture_to_encode_once_and_counts_nothing(tower: VisionTower) -> None:
    cached, first, second = (make_picture(4, 4, seed) for seed in range(3))
    tower.encode([cached])
    spans = [picture[0] for picture in (second, cached, first, second)]
    assert tower.missing(spans) == [second[0], first[0]]
    assert tower.is_cached(cached[0].key) and not tower.is_cached(first[0].key)
    assert (tower.num_misses, tower.num_hits) == (1, 0)


def test_embeddings_never_encoded_are_a_key_error(tower: VisionTower) -> None:
    with pytest.raises(KeyError):
        tower.embeddings(b"nothing")


def test_least_recently_used_is_dropped_first_by_bytes(library_tower: Any) -> None:
    large, small, third = make_picture(8, 8), make_picture(4, 4, 1), make_picture(4, 4, 2)
    tower = make_tower(library_tower, cache_bytes=num_bytes(large) + num_bytes(small))
    tower.encode([large, small])
    tower.trim()
    assert tower.num_bytes == num_bytes(large) + num_bytes(small)  # exactly full
    tower.embeddings(large[0].key)
    tower.encode([third])
    tower.trim()
    assert [tower.is_cached(picture[0].key) for picture in (large, small, third)] == [True, False, True]
    tower.encode([third, small])  # a hit counts as a use too
    tower.trim()
    assert [tower.is_cached(picture[0].key) for picture in (large, small, third)] == [False, True, True]
    assert tower.num_bytes == num_bytes(small) + num_bytes(third)


def test_nothing_of_a_step_is_dropped_before_its_end(library_tower: Any) -> None:
    cached, *rest = pictures = [make_picture(4, 4, seed) for seed in range(4)]
    tower = make_tower(library_tower, cache_bytes=num_bytes(cached))
    tower.encode([cached])
    tower.trim()
    tower.encode(pictures)
    assert all(len(tower.embeddings(span.key)) == span.num_tokens for span, _, _ in pictures)
    assert tower.num_bytes == 4 * num_bytes(cached)
    tower.trim()
    assert [tower.is_cached(span.key) for span, _, _ in pictures] == [False, False, False, True]
    assert tower.num_bytes == num_bytes(rest[-1])


def test_picture_larger_than_the_cache_serves_its_step_and_drives_no_other_out(library_tower: Any) -> None:
    small, large = make_picture(4, 4), make_picture(8, 8)
    tower = make_tower(library_tower, cache_bytes=num_bytes(large) - 1)
    tower.encode([small])
    tower.encode([large])
    assert len(tower.embeddings(large[0].key)) == large[0].num_tokens
    tower.trim()
    assert tower.is_cached(small[0].key) and not tower.is_cached(large[0].key)
    assert tower.num_bytes == num_bytes(small)


def test_cache_of_no_bytes_holds_nothing_between_steps(library_tower: Any) -> None:
    tower = make_tower(library_tower, cache_bytes=0)
    tower.encode([make_picture(4, 4)])
    tower.trim()
    assert tower.num_bytes == 0


def test_picture_of_a_half_read_prompt_is_kept(library_tower: Any) -> None:
    kept, large, other = make_picture(4, 4, 1), make_picture(8, 8, 1), make_picture(4, 4, 2)
    tower = make_tower(library_tower, cache_bytes=num_bytes(kept))
    tower.encode([kept, large, other])
    tower.trim(keep={kept[0].key, large[0].key})
    assert [tower.is_cached(picture[0].key) for picture in (kept, large, other)] == [True, True, False]
    tower.trim()
    assert tower.num_bytes == num_bytes(kept)


def test_dropped_picture_gives_its_memory_back(tower: VisionTower) -> None:
    """An entry owns its memory: as a part of the batch's output it would keep all of that."""
    pictures = [make_picture(8, 8, seed) for seed in range(3)]
    tower.encode(pictures)
    for picture in pictures:
        assert tower.embeddings(picture[0].key).untyped_storage().nbytes() == num_bytes(picture)


def test_failed_forward_adds_and_counts_nothing(tower: VisionTower) -> None:
    def fail(_: Any, args: Any) -> None:
        raise torch.OutOfMemoryError

    cached, picture = make_picture(4, 4, 1), make_picture(4, 4, 2)
    tower.encode([cached])
    hook = tower._visual.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        tower.encode([cached, picture])
    assert (tower.num_misses, tower.num_hits, tower.num_bytes) == (1, 0, num_bytes(cached))
    hook.remove()
    tower.encode([cached, picture])
    assert (tower.num_misses, tower.num_hits, tower.num_bytes) == (2, 1, 2 * num_bytes(cached))
