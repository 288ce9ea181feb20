"""Trains the embedded Avision: a plain PyTorch loop over `examples.py`, restarted from its last checkpoint.

The forward here computes what the library's own does (a test holds the two together), for many rows at once. Windows
and questions are masks, not loops, and pictures are padded to one size, so that `torch.compile` makes one program of
each model. On a CPU with AMX most of the time would else go to small operations.

Two things make it learn in two hours on two cores. Every patch is labelled with what it shows (shape, colour, size,
digit), and a linear layer that is thrown away afterwards must tell it from the vision tower's output. And each picture
answers ten or more questions at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader

from tools.demo_avision.examples import IGNORED, PATCH_LABELS, Mix, Stream
from tools.demo_avision.snapshot import IMAGE_MEAN, IMAGE_STD, MERGE, PATCH_PX, WINDOW_PX

Batch = dict[str, torch.Tensor]
_SAVE_EVERY_S = 180
_WINDOW = WINDOW_PX // PATCH_PX // MERGE  # in merged tokens


class Learner(nn.Module):
    """The library's model with a forward for whole batches, and the linear layer that tells what each patch shows.

    :param model: `Qwen2_5_VLForConditionalGeneration`, float32. Its parameters are the ones trained.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.tell = nn.Linear(model.config.text_config.hidden_size, MERGE**2 * sum(PATCH_LABELS.values()))
        mean = torch.tensor(IMAGE_MEAN).repeat_interleave(PATCH_PX**2)
        std = torch.tensor(IMAGE_STD).repeat_interleave(PATCH_PX**2)
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", mean / std, persistent=False)

    def see(self, patches: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """The vision tower.

        :param patches: (pictures, patches, 3 * 14 * 14) uint8.
        :param grids: (pictures, 2): rows and columns in merged tokens.
        :return: (pictures, patches / 4, hidden of the text model); what lies beyond a picture's grid is meaningless.
        """
        visual = self.model.model.visual
        count, num_patches = patches.shape[:2]
        row, column = _merged_places(grids, num_patches // MERGE**2)
        inside = (row < grids[:, :1]).repeat_interleave(MERGE**2, 1)
        window = (row // _WINDOW * 100 + column // _WINDOW).repeat_interleave(MERGE**2, 1)
        whole = inside[:, None, None, :].expand(-1, 1, num_patches, -1)
        windows = whole & (window[:, None, :, None] == window[:, None, None, :])
        # Both frames of a still picture are the same, so their two kernels act as their sum.
        kernel = visual.patch_embed.proj.weight.sum(2).flatten(1)
        hidden = F.linear(patches * self.scale - self.shift, kernel)
        angles = _vision_angles(visual, row, column)
        cos, sin = angles.cos(), angles.sin()
        for index, block in enumerate(visual.blocks):
            mask = whole if index in visual.fullatt_block_indexes else windows
            normed = _norm(block.norm1, hidden)
            query, key, value = (
                block.attn.qkv(normed).view(count, num_patches, 3, block.attn.num_heads, -1).permute(2, 0, 3, 1, 4)
            )
            seen = F.scaled_dot_product_attention(
                _rotate(query, cos, sin), _rotate(key, cos, sin), value, attn_mask=mask
            )
            hidden = hidden + block.attn.proj(seen.transpose(1, 2).reshape(count, num_patches, -1))
            normed = _norm(block.norm2, hidden)
            hidden = hidden + block.mlp.down_proj(F.silu(block.mlp.gate_proj(normed)) * block.mlp.up_proj(normed))
        merged = _norm(visual.merger.ln_q, hidden).reshape(count, num_patches // MERGE**2, -1)
        output: torch.Tensor = visual.merger.mlp(merged)
        return output

    def read(self, embeddings: torch.Tensor, positions: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
        """The text model.

        :param embeddings: (rows, tokens, hidden).
        :param positions: (3, rows, tokens).
        :param segments: (rows, tokens): a token sees its own segment and segment 0, as far as they lie before it.
        :return: (rows, tokens, hidden), normed, ready for the last product.
        """
        text = self.model.model.language_model
        count, length = segments.shape
        same = segments[:, :, None] == segments[:, None, :]
        earlier = torch.ones(length, length, dtype=torch.bool).tril()
        mask = ((same | (segments[:, None, :] == 0)) & earlier)[:, None]
        cos, sin = text.rotary_emb(embeddings, positions)
        cos, sin = cos[:, None], sin[:, None]
        hidden: torch.Tensor = embeddings
        for layer in text.layers:
            attention = layer.self_attn
            normed = _norm(layer.input_layernorm, hidden)
            query, key, value = (
                project(normed).view(count, length, -1, attention.head_dim).transpose(1, 2)
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            groups = attention.num_key_value_groups
            key, value = _rotate(key, cos, sin).repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
            seen = F.scaled_dot_product_attention(_rotate(query, cos, sin), key, value, attn_mask=mask)
            hidden = hidden + attention.o_proj(seen.transpose(1, 2).reshape(count, length, -1))
            normed = _norm(layer.post_attention_layernorm, hidden)
            hidden = hidden + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed))
        return _norm(text.norm, hidden)

    def embed(self, batch: Batch, seen: torch.Tensor) -> torch.Tensor:
        """(rows, tokens, hidden): words from the table, pictures from `see`'s output."""
        table = self.model.model.language_model.embed_tokens
        flat = table(batch["ids"]).flatten(0, 1)
        parts = seen.flatten(0, 1)[batch["sources"]].to(flat.dtype)
        whole: torch.Tensor = flat.index_copy(0, batch["slots"], parts)
        return whole.view(*batch["ids"].shape, -1)


def _merged_places(grids: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(row, column) of each merged token, both (pictures, tokens); rows go on beyond the grid."""
    index = torch.arange(num_tokens)[None]
    return index // grids[:, 1:], index % grids[:, 1:]


def _vision_angles(visual: Any, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """(pictures, 1, patches, head_dim), as `Qwen2_5_VLVisionRotaryEmbedding` gives them."""
    unit_y, unit_x = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    y = (row[:, :, None] * MERGE + unit_y).flatten(1)
    x = (column[:, :, None] * MERGE + unit_x).flatten(1)
    frequencies = visual.rotary_pos_emb.inv_freq
    both = torch.cat([y[..., None] * frequencies, x[..., None] * frequencies], dim=-1)
    return torch.cat([both, both], dim=-1)[:, None]


def _norm(norm: Any, hidden: torch.Tensor) -> torch.Tensor:
    """RMSNorm in float32."""
    scale = torch.rsqrt(hidden.float().square().mean(-1, keepdim=True) + norm.variance_epsilon)
    normed: torch.Tensor = norm.weight * (hidden * scale)
    return normed


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = heads.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (heads * cos + turned * sin).to(heads.dtype)


def patch_loss(told: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy over the kinds of labels. What shows something counts more than what does not, for most
    patches show nothing.

    :param told: (pictures, tokens, 4 * values).
    :param labels: (pictures, labels, patches).
    """
    count, num_tokens = told.shape[:2]
    values = told.float().view(count, num_tokens * MERGE**2, -1)
    losses = []
    for index, part in enumerate(torch.split(values, list(PATCH_LABELS.values()), dim=-1)):
        target = labels[:, index].long()
        each = F.cross_entropy(part.flatten(0, 1), target.flatten(), ignore_index=IGNORED, reduction="none")
        weight = torch.where(target > 0, 1.0, 0.1).flatten() * (target >= 0).flatten()
        losses.append((each * weight).sum() / weight.sum().clamp(min=1.0))
    return torch.stack(losses).mean()


@dataclass(frozen=True)
class Plan:
    """:param minutes: how long this call trains, for the schedule of the rates too: what went before does not count.
    :param rate: of Muon (matrices); the rest is trained by AdamW at `other_rate`.
    :param final_share: of both rates, reached over the last quarter.
    :param noise_share: of the words of answers, which are misheard as they are read back.
    :param patch_weight: of the loss over patches, beside that over answers.
    """

    mix: Mix
    minutes: float
    batch_rows: int = 32
    rate: float = 2e-3
    other_rate: float = 1e-3
    warmup_steps: int = 100
    patch_weight: float = 1.0
    noise_share: float = 0.15
    final_share: float = 0.03
    num_drawers: int = 1


class Trainer:
    """One learner, its optimizers, its checkpoint.

    :param folder: where the checkpoint is kept.
    :param prepare: what is done to each function that is called in every step.
    """

    def __init__(
        self,
        learner: Learner,
        tokenizer: Tokenizer,
        folder: Path,
        prepare: Callable[[Callable[..., Any]], Callable[..., Any]] = torch.compile,
    ) -> None:
        self.learner = learner
        self._tokenizer = tokenizer
        self._file = folder / "checkpoint.pt"
        self.num_steps = 0
        matrices = [p for n, p in learner.named_parameters() if _is_matrix(n, p)]
        others = [p for n, p in learner.named_parameters() if not _is_matrix(n, p)]
        self._muon: Any = torch.optim.Muon(matrices, lr=1.0, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
        self._adam: Any = torch.optim.AdamW(others, lr=1.0, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        self._see = prepare(learner.see)
        self._read = prepare(learner.read)
        self._loss = prepare(answer_loss)
        self._patch_loss = prepare(patch_loss)

    def load(self) -> bool:
        if not self._file.is_file():
            return False
        state = torch.load(self._file, weights_only=True)
        self.learner.load_state_dict(state["learner"])
        self._muon.load_state_dict(state["muon"])
        self._adam.load_state_dict(state["adam"])
        self.num_steps = state["num_steps"]
        return True

    def average_with(self, checkpoint: Path, share: float) -> None:
        """Replace the weights by an average with those of another checkpoint of the same training, and forget the
        optimizers' state. Two ends of training err on different pictures, and their average errs less (model soups,
        arXiv:2203.05482).

        :param share: of the other checkpoint.
        """
        other = torch.load(checkpoint, weights_only=True)["learner"]
        own = self.learner.state_dict()
        self.learner.load_state_dict({name: torch.lerp(own[name], other[name], share) for name in own})
        for optimizer in (self._muon, self._adam):
            optimizer.state.clear()

    def save(self) -> None:
        state = {
            "learner": self.learner.state_dict(),
            "muon": self._muon.state_dict(),
            "adam": self._adam.state_dict(),
            "num_steps": self.num_steps,
        }
        self._file.parent.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_suffix(".partial")
        torch.save(state, partial)
        partial.rename(self._file)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens with a target, vocabulary) logits as float32 and the loss over patches."""
        with torch.autocast("cpu", torch.bfloat16):
            seen = self._see(batch["patches"], batch["grids"])
            told = self.learner.tell(seen)
            patches = self._patch_loss(told, batch["labels"])
            hidden = self._read(self.learner.embed(batch, seen), batch["positions"], batch["segments"])
            wanted = hidden.flatten(0, 1)[batch["targets"].flatten() != IGNORED]
            logits = F.linear(wanted, self.learner.model.lm_head.weight)
        return logits, patches

    def step(self, batch: Batch, plan: Plan, share: float) -> tuple[float, float]:
        """Learn from one batch.

        :param share: of the plan's rates.
        :return: the losses over answers and over patches.
        """
        for optimizer, rate in ((self._muon, plan.rate), (self._adam, plan.other_rate)):
            for group in optimizer.param_groups:
                group["lr"] = rate * share
        logits, patches = self.forward(batch | {"ids": self._misheard(batch, plan.noise_share)})
        targets = batch["targets"].flatten()
        is_target = targets != IGNORED
        answers = self._loss(logits, targets[is_target], batch["weights"].flatten()[is_target])
        (answers + plan.patch_weight * patches).backward()
        nn.utils.clip_grad_norm_(self.learner.parameters(), 1.0)
        for optimizer in (self._muon, self._adam):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.num_steps += 1
        return answers.item(), patches.item()

    def _misheard(self, batch: Batch, share: float) -> torch.Tensor:
        """The ids with a share of each answer's words exchanged for any others, while what is to be said stays as it
        is: after "blue" the next word must come from the picture, not from which shapes have been blue so far."""
        ids, targets = batch["ids"], batch["targets"]
        is_said = (targets[:, :-1] != IGNORED) & (targets[:, 1:] != IGNORED)
        chosen = F.pad(is_said, (1, 0)) & batch["is_open"] & (torch.rand(ids.shape) < share)
        return torch.where(chosen, torch.randint(self._tokenizer.get_vocab_size(), ids.shape), ids)

    def train(self, plan: Plan, report: Callable[[Trainer, dict[str, float]], None], every: int) -> None:
        """Until the time is up. `report` is called every so many steps with the mean losses since the last call."""
        stream = Stream(self._tokenizer, plan.mix, batch_rows=plan.batch_rows, seed=f"train-{self.num_steps}")
        loader: Iterator[Batch] = iter(
            DataLoader(stream, batch_size=None, num_workers=plan.num_drawers, prefetch_factor=8)
        )
        begun = saved = time.monotonic()
        first_step = self.num_steps
        sums = {"answers": 0.0, "patches": 0.0, "waiting_s": 0.0, "step_s": 0.0}
        since = 0
        while (spent := (time.monotonic() - begun) / (60 * plan.minutes)) < 1:
            waiting = time.monotonic()
            batch = next(loader)
            working = time.monotonic()
            # Flat, then to almost nothing over the last quarter.
            share = min(1.0, (self.num_steps - first_step + 1) / plan.warmup_steps)
            share *= min(1.0, plan.final_share + (1 - plan.final_share) * (1 - spent) / 0.25)
            answers, patches = self.step(batch, plan, share)
            since += 1
            sums["answers"] += answers
            sums["patches"] += patches
            sums["waiting_s"] += working - waiting
            sums["step_s"] += time.monotonic() - working
            if math.isnan(sums["answers"]):
                raise RuntimeError("the loss is not a number: start again from the last checkpoint")
            if since == every:
                report(self, {name: value / since for name, value in sums.items()})
                sums, since = dict.fromkeys(sums, 0.0), 0
            if time.monotonic() - saved > _SAVE_EVERY_S:
                self.save()
                saved = time.monotonic()
        self.save()


def answer_loss(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean cross entropy; all but the vocabulary is flat."""
    each = F.cross_entropy(logits.float(), targets, reduction="none")
    return (each * weights).sum() / weights.sum()


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """What Muon is for: the inner products. Embeddings, the first and the last layer are AdamW's."""
    return parameter.ndim == 2 and "embed" not in name and not name.startswith("tell")
