"""The embedded Avision as files: its tokenizer, its shape, and the snapshot folder that the service loads.

The class is the true one, `Qwen2_5_VLForConditionalGeneration`, only small. Knows nothing of scenes or training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

PADDING, END = "<|endoftext|>", "<|im_end|>"
SPECIAL_TOKENS = (
    PADDING,
    "<|im_start|>",
    END,
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
VOCABULARY = 1536
MAX_POSITIONS = 2048

# As Qwen2.5-VL's own, less the system line that it puts in when the caller gave none.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

PATCH_PX = 14
MERGE = 2
TOKEN_PX = PATCH_PX * MERGE
WINDOW_PX = 112
#: A picture is scaled to between so many visual tokens: enough for the digits of a price tag, and never more work.
MIN_PICTURE_TOKENS, MAX_PICTURE_TOKENS = 42, 64
MIN_PIXELS, MAX_PIXELS = MIN_PICTURE_TOKENS * TOKEN_PX**2, MAX_PICTURE_TOKENS * TOKEN_PX**2
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

# An answer is right or wrong and there is nothing to vary: at the default temperature of the service, too.
TOP_P = 0.5

MARKER = "avito_demo.json"
WEIGHTS = "model.safetensors"


def train_tokenizer(corpus: Iterable[str]) -> Tokenizer:
    """A byte-level BPE with every digit a token of its own, so that prices are read digit by digit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    found = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    return {token: token_id for token, token_id in found.items() if token_id is not None}


def make_config(tokenizer: Tokenizer) -> Any:
    ids = special_ids(tokenizer)
    return Qwen2_5_VLConfig(
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        text_config=dict(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=640,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=MAX_POSITIONS,
            # The library splits the rotary frequencies between time, height and width, width has the lowest. Pictures
            # here have at most 12 tokens a side: with Qwen's base of a million their columns could not be told apart.
            rope_parameters={"rope_type": "default", "rope_theta": 20.0, "mrope_section": [8, 12, 12]},
            bos_token_id=None,
            eos_token_id=ids["<|im_end|>"],
            pad_token_id=ids["<|endoftext|>"],
            tie_word_embeddings=True,
            use_sliding_window=False,
        ),
        vision_config=dict(
            depth=4,
            hidden_size=192,
            intermediate_size=512,
            num_heads=4,
            out_hidden_size=256,
            patch_size=PATCH_PX,
            spatial_merge_size=MERGE,
            temporal_patch_size=2,
            window_size=WINDOW_PX,
            fullatt_block_indexes=[1, 3],
        ),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def make_model(tokenizer: Tokenizer, seed: int) -> Any:
    """The untrained model, float32."""
    torch.manual_seed(seed)
    return Qwen2_5_VLForConditionalGeneration(make_config(tokenizer))


def write_weights(folder: Path, model: Any) -> None:
    """Write weights, as float16, and configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    halved: Any = Qwen2_5_VLForConditionalGeneration(model.config)
    halved.load_state_dict(model.state_dict())
    halved.to(torch.float16).save_pretrained(folder)


def write_rest(folder: Path, tokenizer: Tokenizer, *, name: str, card: str) -> None:
    """Write what the service reads besides, and last the marker of a demo with the hash of every file."""
    ids = special_ids(tokenizer)
    generation = GenerationConfig(
        eos_token_id=[ids[END], ids[PADDING]], pad_token_id=ids[PADDING], do_sample=True, top_p=TOP_P
    )
    generation.save_pretrained(folder)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PADDING,
        model_max_length=MAX_POSITIONS,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "min_pixels": MIN_PIXELS,
        "max_pixels": MAX_PIXELS,
        "patch_size": PATCH_PX,
        "temporal_patch_size": 2,
        "merge_size": MERGE,
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
    }
    _write_json(folder / "preprocessor_config.json", processor)
    (folder / "README.md").write_text(card, encoding="utf-8")
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes 0600; a service under another user must read it
    files = sorted(path for path in folder.iterdir() if path.name != MARKER)
    _write_json(folder / MARKER, {"demo": True, "name": name, "sha256": {path.name: sha256_of(path) for path in files}})


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
