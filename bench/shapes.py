"""Models of the true shapes with random weights, and what belongs to them: tokenizer, chat template, processor.

How fast a model runs depends on its shape and not on what it learned. `tiny` ones are for trying the benchmarks out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen3Config,
)

from bench.inputs import WORDS

_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_END, _PAD = "<|im_end|>", "<|endoftext|>"
_VISION_START, _VISION_END, _IMAGE, _VIDEO = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
_SPECIAL = (_PAD, "<|im_start|>", _END, _VISION_START, _VISION_END, _IMAGE, _VIDEO)
# As in the published preprocessor_config.json of Qwen2.5-VL.
_PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


@dataclass(frozen=True)
class Shape:
    """:param make_config: from the ids of the tokenizer's special tokens, the library's configuration."""

    vocab_size: int
    has_pictures: bool
    make_config: Callable[[dict[str, int]], Any]


def _qwen3(ids: dict[str, int], **sizes: Any) -> Qwen3Config:
    return Qwen3Config(
        **{"rms_norm_eps": 1e-6, "tie_word_embeddings": False, **sizes},
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        eos_token_id=ids[_END],
        pad_token_id=ids[_PAD],
        bos_token_id=None,
    )


def _qwen2_5_vl(
    ids: dict[str, int], mrope_section: list[int], vision: dict[str, Any], **sizes: Any
) -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig(
        text_config={
            "rms_norm_eps": 1e-6,
            **sizes,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": mrope_section},
            "eos_token_id": ids[_END],
            "pad_token_id": ids[_PAD],
            "bos_token_id": None,
        },
        vision_config={"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112}
        | vision,
        tie_word_embeddings=False,
        image_token_id=ids[_IMAGE],
        video_token_id=ids[_VIDEO],
        vision_start_token_id=ids[_VISION_START],
        vision_end_token_id=ids[_VISION_END],
    )


def _qwen3_8b(ids: dict[str, int]) -> Qwen3Config:
    return _qwen3(
        ids,
        vocab_size=151_936,
        hidden_size=4096,
        intermediate_size=12_288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40_960,
    )


def _qwen2_5_vl_7b(ids: dict[str, int]) -> Qwen2_5_VLConfig:
    return _qwen2_5_vl(
        ids,
        mrope_section=[16, 24, 24],
        vision=dict(
            depth=32,
            hidden_size=1280,
            intermediate_size=3420,
            num_heads=16,
            out_hidden_size=3584,
            fullatt_block_indexes=[7, 15, 23, 31],
        ),
        vocab_size=152_064,
        hidden_size=3584,
        intermediate_size=18_944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=128_000,
    )


_TINY = dict(
    vocab_size=1024,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=16_384,
    # With the usual 0.02 so small a model says the same word for ever.
    initializer_range=0.5,
)


def _tiny(ids: dict[str, int]) -> Qwen3Config:
    return _qwen3(ids, head_dim=16, **_TINY)


def _tiny_vl(ids: dict[str, int]) -> Qwen2_5_VLConfig:
    vision = dict(
        depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64, fullatt_block_indexes=[1]
    )
    return _qwen2_5_vl(ids, mrope_section=[2, 3, 3], vision=vision, **_TINY)


SHAPES = {
    "qwen3-8b": Shape(151_936, False, _qwen3_8b),
    "qwen2.5-vl-7b": Shape(152_064, True, _qwen2_5_vl_7b),
    "tiny": Shape(1024, False, _tiny),
    "tiny-vl": Shape(1024, True, _tiny_vl),
}


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the words of `bench/inputs.py`, filled up with words that it can only write.

    A model of random weights chooses any of its ids; one without text would never show as a delta of a stream.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab_size, 2000),
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f" {word}" for word in WORDS], trainer)
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    for token_id in range(len(vocabulary), vocab_size):
        vocabulary[f"Ġ{token_id:06d}"] = token_id  # Ġ is the space of byte-level BPE
    filled = Tokenizer.from_str(json.dumps(state))
    filled.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=filled,
        eos_token=_END,
        pad_token=_PAD,
        model_max_length=1 << 20,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = _CHAT_TEMPLATE
    return fast


def make_model(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 7) -> Any:
    """The library's model with random weights, made on the device, in eval mode."""
    ids = _special_ids(make_tokenizer(shape.vocab_size))
    auto: Any = AutoModelForImageTextToText if shape.has_pictures else AutoModelForCausalLM
    torch.manual_seed(seed)
    with torch.device(device):
        model = auto.from_config(shape.make_config(ids), dtype=dtype, attn_implementation="sdpa")
    model.generation_config.eos_token_id = [ids[_END], ids[_PAD]]
    model.generation_config.pad_token_id = ids[_PAD]
    return model.eval()


def write_processor(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(_PROCESSOR, indent=1) + "\n", encoding="utf-8")


def _special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    return {token: vocabulary[token] for token in _SPECIAL}
