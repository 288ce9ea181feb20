"""The only caller of a model's forward: one step of each sequence of a batch, through the library's own model.

Each sequence has a key-value cache of its own and is run by itself; prompts are read in chunks, so that a long one
does not keep the others, or a cancellation, waiting for all of it. A step gives a token to each sequence whose prompt
has been read. Batched steps, pages and CUDA graphs will replace the inside of this file, not its two methods.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Sequences
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from models.engine.loop import StepOutput
from models.engine.sampling import Sampler
from models.engine.sequence import Sequence
from models.errors import EngineDead, InternalError


@dataclass(frozen=True)
class VisionInputs:
    """What the processor made of a request's pictures.

    :param pixel_values: (num_patches, channels * temporal * patch * patch), float32, on the CPU.
    :param image_grid_thw: (num_images, 3), int64: patches in time, height and width.
    """

    pixel_values: torch.Tensor
    image_grid_thw: torch.Tensor
    image_token_id: int


@dataclass
class _Running:
    """What the runner holds for a sequence: its cache, sampler and the number of tokens in the cache.

    `position_offset` is added to the cache length to get the rotary position of the next token: pictures take fewer
    positions than tokens (Qwen2.5-VL's `rope_deltas`).
    """

    cache: DynamicCache
    sampler: Sampler
    num_cached: int = 0
    position_offset: int = 0


class TransformersRunner:
    """Implements `loop.Runner` for `AutoModelForCausalLM` and Qwen2.5-VL models. The loop's thread only.

    :param model: on its device, in eval mode.
    :param prefill_chunk_tokens: most prompt tokens of one sequence in one step. A prompt with pictures is one chunk.
    """

    def __init__(self, model: Any, prefill_chunk_tokens: int) -> None:
        self._model = model
        self._device: torch.device = model.device
        self._vocab_size: int = model.get_output_embeddings().weight.shape[0]
        self._chunk = prefill_chunk_tokens
        self._running: dict[Sequence, _Running] = {}
        # Kept here, so that no other thread has to ask CUDA while the engine runs.
        self.memory_bytes = (0, 0)

    def step(self, batch: Sequences[Sequence]) -> Iterator[StepOutput]:
        for sequence in batch:
            yield self._step_one(sequence)
        if self._device.type == "cuda":
            self.memory_bytes = (
                torch.cuda.memory_allocated(self._device),
                torch.cuda.memory_reserved(self._device),
            )

    def release(self, sequence: Sequence) -> None:
        self._running.pop(sequence, None)

    @torch.inference_mode()
    def _step_one(self, sequence: Sequence) -> StepOutput:
        try:
            state = self._running.get(sequence)
            if state is None:
                sampler = Sampler(sequence.sampling, sequence.prompt_ids, self._vocab_size, self._device)
                state = self._running[sequence] = _Running(DynamicCache(config=self._model.config), sampler)
            logits = self._forward(sequence, state)
            if logits is None:
                return StepOutput(sequence)
            return StepOutput(sequence, token_id=state.sampler.choose(logits, len(sequence.output_ids)))
        except torch.OutOfMemoryError as error:
            self.release(sequence)
            torch.cuda.empty_cache()
            return StepOutput(sequence, error=InternalError(f"the device ran out of memory ({type(error).__name__})"))
        except torch.AcceleratorError as error:
            # An asynchronous CUDA error is sticky: every later call of this process fails too.
            raise EngineDead(f"the device failed: {type(error).__name__}") from error
        except Exception as error:
            return StepOutput(sequence, error=error)

    def _forward(self, sequence: Sequence, state: _Running) -> torch.Tensor | None:
        """Run the next chunk or token. Logits (vocab_size,) of the last position, None inside a prompt."""
        num_prompt = len(sequence.prompt_ids)
        if state.num_cached >= num_prompt:
            return self._call(state, (sequence.output_ids[-1],), {})[0, -1]
        if isinstance(sequence.vision, VisionInputs):
            return self._call(state, sequence.prompt_ids, self._vision_arguments(sequence, state))[0, -1]
        chunk = sequence.prompt_ids[state.num_cached : state.num_cached + self._chunk]
        logits = self._call(state, chunk, {})
        return logits[0, -1] if state.num_cached >= num_prompt else None

    def _call(self, state: _Running, ids: Sequences[int], arguments: dict[str, Any]) -> torch.Tensor:
        """Forward `ids`; logits (1, 1, vocab_size) of the last one."""
        if "position_ids" not in arguments:
            first = state.num_cached + state.position_offset
            positions = torch.arange(first, first + len(ids), device=self._device)
            # Qwen2.5-VL takes (3, batch, tokens), the others (batch, tokens); text is alike in all three axes.
            shape = (3, 1, len(ids)) if self._is_multimodal else (1, len(ids))
            arguments = {"position_ids": positions.expand(shape)}
        output = self._model(
            input_ids=torch.tensor([list(ids)], device=self._device),
            past_key_values=state.cache,
            use_cache=True,
            logits_to_keep=1,
            **arguments,
        )
        state.num_cached += len(ids)
        logits: torch.Tensor = output.logits
        return logits

    @property
    def _is_multimodal(self) -> bool:
        return hasattr(self._model.config, "vision_config")

    def _vision_arguments(self, sequence: Sequence, state: _Running) -> dict[str, Any]:
        vision = sequence.vision
        assert isinstance(vision, VisionInputs)
        ids = torch.tensor([sequence.prompt_ids], device=self._device)
        grid = vision.image_grid_thw.to(self._device)
        types = (ids == vision.image_token_id).int()
        # The library would keep the offset on the model, shared by all requests; so it is computed and kept here.
        positions, offset = self._model.model.get_rope_index(ids, mm_token_type_ids=types, image_grid_thw=grid)
        state.position_offset = int(offset)
        return {
            "pixel_values": vision.pixel_values.to(self._device, self._model.dtype),
            "image_grid_thw": grid,
            "mm_token_type_ids": types,
            "position_ids": positions,
        }
