"""Tiny random models in FP16 on a device, with heads as wide as true models have them, and the library's answers."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig

from config import EngineOptions, Limits
from models.engine.attention import CUDA_PAGE_TOKENS
from models.engine.layers import TextStack
from models.engine.runner import PagedRunner, RunnerSizes
from models.loader import load_model
from models.snapshots import Snapshot
from tests.test_runner import NUM_TOKENS, Served, replayed

# FP16 rounds to 11 bits at every step of a layer, and kernels sum in orders of their own. In a rehearsal on a CPU the
# log-probabilities of these models differed from the library's by 0 (texts) to 0.025 (pictures).
LOGPROB_TOLERANCE = 0.15


class OnDevice(Served):
    """`Served` with the card's pages and dtype, and the library's model on the same device."""

    @property
    def device(self) -> torch.device:
        return self.loaded.stack.device

    def runner(self, *, is_captured: bool = False, **given: Any) -> PagedRunner:
        sizes: dict[str, Any] = dict(num_pages=48, page_tokens=CUDA_PAGE_TOKENS, max_running=8, max_context_tokens=1024)
        sizes.update(given)
        emulated: dict[str, Any] = {"capture": replayed} if is_captured and self.device.type == "cpu" else {}
        runner = PagedRunner(
            self.loaded.stack, RunnerSizes(**sizes), tower=self.loaded.tower, max_steps_in_flight=2, **emulated
        )
        if is_captured:
            runner.capture_graphs()
            assert runner.has_graphs
        return runner

    @property
    def reference(self) -> Any:
        if not self._reference:
            kind: Any = AutoModelForCausalLM if self.loaded.tower is None else AutoModelForImageTextToText
            model = kind.from_pretrained(self.folder, dtype=torch.float16, attn_implementation="sdpa")
            self._reference.append(model.eval().to(self.device))
        return self._reference[0]


@dataclass(frozen=True)
class Answer:
    """What `generate` gave. `logprobs`: (tokens, vocab_size) float32 on the CPU."""

    token_ids: list[int]
    logprobs: torch.Tensor


def load_on(device: torch.device, folder: Path, model: Any) -> OnDevice:
    snapshot = Snapshot(model, folder, folder, "float16", "", False)
    loaded = load_model(
        snapshot, engine=EngineOptions(device=str(device)), limits=Limits(), phase=lambda _: nullcontext()
    )
    return OnDevice(loaded, loaded.make_encoder(100_000), folder)


def widen(folder: Path, target: Path, head_dim: int) -> Path:
    """A snapshot like the one in `folder`, with heads of this width and other random weights."""
    shutil.copytree(folder, target)
    config: Any = AutoConfig.from_pretrained(folder)
    text = config.get_text_config()
    text.hidden_size, text.intermediate_size = 4 * head_dim, 6 * head_dim
    if hasattr(text, "head_dim"):
        text.head_dim = head_dim
    if hasattr(config, "vision_config"):
        config.vision_config.out_hidden_size = text.hidden_size
        # As wide as the true tower's heads: 80.
        config.vision_config.hidden_size = 80 * config.vision_config.num_heads
        text.rope_parameters["mrope_section"] = [head_dim // 8, 3 * head_dim // 16, 3 * head_dim // 16]
    # Activations as large as those of the narrow model.
    config.initializer_range = text.initializer_range = 4.0 / text.hidden_size**0.5
    torch.manual_seed(11)
    model = getattr(transformers, config.architectures[0])(config)
    model.generation_config = GenerationConfig.from_pretrained(folder)
    model.save_pretrained(target)
    return target


def make_stack(device: torch.device, **changes: Any) -> TextStack:
    """A tiny Qwen3 in FP16 without files; `changes` are of its configuration."""
    shape: dict[str, Any] = dict(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=65_536,
    )
    torch.manual_seed(3)
    config = transformers.Qwen3Config(**{**shape, **changes})
    model = transformers.Qwen3ForCausalLM(config).eval().to(torch.float16).to(device)
    return TextStack(model)


def generate_on(served: OnDevice, prompt: Any) -> Answer:
    """Greedy, `NUM_TOKENS` long, whatever they are. `prompt`: of the encoder, with or without pictures."""
    model, device = served.reference, served.device
    ids = torch.tensor([prompt.ids], device=device)
    inputs: dict[str, Any] = {}
    if prompt.vision is not None:
        inputs = dict(
            pixel_values=torch.cat(prompt.vision.pixel_values).to(device, torch.float16),
            image_grid_thw=prompt.vision.grids.to(device),
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
        )
    model.generation_config.eos_token_id = None
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            **inputs,
        )
    logits = torch.stack([step[0].float().cpu() for step in output.logits])
    return Answer(output.sequences[0, len(prompt.ids) :].tolist(), logits.log_softmax(-1))


def share_equal(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Of all tokens, those that are the same at the same place."""
    pairs = [pair for one, other in zip(ours, theirs, strict=True) for pair in zip(one, other, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


def assert_parts_at_near_ties_only(ours: list[int], answer: Answer, tolerance: float) -> None:
    """Where our answer first leaves the library's, the library found both tokens as likely. What follows is another
    text, and not compared."""
    for index, (our, their) in enumerate(zip(ours, answer.token_ids, strict=True)):
        if our != their:
            gap = float(answer.logprobs[index, their] - answer.logprobs[index, our])
            assert gap <= tolerance, f"token {index}: {our} for {their}, {gap:.3f} less likely"
            return
