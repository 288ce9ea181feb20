"""Where weights become a model on a device: local files only, safetensors only, no remote code.

Each step is a timed phase, so that `why_not_ready` and the start-up lines can tell what takes how long. Which folder
a path means was decided by `models/snapshots.py`.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from config import Limits
from models.engine.loop import Runner
from models.engine.runner import TransformersRunner
from models.engine.sequence import SamplingOptions, Sequence
from models.errors import LoadError
from models.prompts import PromptEncoder, TextTokenizer
from models.snapshots import Snapshot

log = logging.getLogger("avito.loader")

Phase = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True)
class LoadedModel:
    """A model that can serve. `gpu_uuid` as NVML writes it; None on a CPU."""

    encoder: PromptEncoder
    runner: Runner
    device: str
    dtype: str
    gpu_uuid: str | None


def pick_device(setting: str) -> torch.device:
    """`auto` takes CUDA if there is a card.

    :raise LoadError: a card was asked for that torch does not see.
    """
    if setting == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    device = torch.device(setting)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise LoadError(f"AVITO_DEVICE={setting}, but torch sees no CUDA device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise LoadError(f"AVITO_DEVICE={setting}, but torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def load_model(
    snapshot: Snapshot, *, device_setting: str, gpu_memory_fraction: float, limits: Limits, phase: Phase
) -> LoadedModel:
    """Load one model and run it once. Called in the loading thread; takes seconds.

    :param phase: a context manager factory that names and times each phase.
    :raise Exception: whatever the libraries raise; the caller shows the phase and logs the rest.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with phase("device"):
        device = pick_device(device_setting)
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(gpu_memory_fraction, device)
        dtype = _pick_dtype(snapshot, device)
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with phase("tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(snapshot.tokenizer_folder, **local)
        _take_chat_template(tokenizer, snapshot)
        processor = None
        if snapshot.model == "avision":
            # backend="pil": the other one needs torchvision, which has no place in our requirements.
            processor = AutoImageProcessor.from_pretrained(snapshot.folder, backend="pil", **local)
            processor.size = {**dict(processor.size), "longest_edge": _longest_edge(processor, limits)}
    with phase("weights"):
        model_class: Any = AutoModelForCausalLM if snapshot.model == "avibe" else AutoModelForImageTextToText
        model, report = model_class.from_pretrained(
            snapshot.folder,
            dtype=dtype,
            device_map={"": device} if device.type == "cuda" else None,
            attn_implementation="sdpa",
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported, and refused with a sentence by _check_complete
            **local,
        )
        _check_complete(report)
        model.eval()
    with phase("encoder"):
        encoder = _make_encoder(tokenizer, model, processor, limits)
    runner = TransformersRunner(model, limits.prefill_chunk_tokens)
    with phase("warm-up"):
        _warm_up(runner, encoder)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    log.info(
        "%s: %s, %.2f billion parameters, %.2f GB of weights",
        snapshot.model,
        type(model).__name__,
        num_parameters / 1e9,
        model.get_memory_footprint() / 1e9,
    )
    return LoadedModel(
        encoder=encoder,
        runner=runner,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        gpu_uuid=f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else None,
    )


def _check_complete(report: Any) -> None:
    """The library fills what it does not find with random numbers and carries on; we do not.

    :raise LoadError: weights are missing, or of another shape than config.json says.
    """
    for kind, what in (
        ("missing_keys", "are missing"),
        ("mismatched_keys", "have another shape than config.json says"),
    ):
        names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in report[kind])
        if names:
            raise LoadError(f"{len(names)} weights {what}, the first is {names[0]}")


def _pick_dtype(snapshot: Snapshot, device: torch.device) -> torch.dtype:
    if snapshot.dtype == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, snapshot.dtype)
    return dtype


def _take_chat_template(tokenizer: Any, snapshot: Snapshot) -> None:
    """A tokenizer folder of its own may lack the template that the model's folder has; processors keep it apart too."""
    if tokenizer.chat_template:
        return
    for folder in (snapshot.tokenizer_folder, snapshot.folder):
        if (folder / "chat_template.jinja").is_file():
            tokenizer.chat_template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
            return
        if (folder / "chat_template.json").is_file():
            text = (folder / "chat_template.json").read_text(encoding="utf-8")
            tokenizer.chat_template = json.loads(text)["chat_template"]
            return


def _longest_edge(processor: Any, limits: Limits) -> int:
    """The library calls the most pixels of a picture so; the snapshot's own limit counts if it is smaller."""
    own = dict(processor.size).get("longest_edge") or limits.max_visual_px
    return min(int(own), limits.max_visual_px)


def _make_encoder(tokenizer: Any, model: Any, processor: Any, limits: Limits) -> PromptEncoder:
    generation = model.generation_config
    config = model.config
    text_config = config.get_text_config()
    stop_ids: set[int] = set()
    for source in (generation.eos_token_id, text_config.eos_token_id, tokenizer.eos_token_id):
        stop_ids.update(source if isinstance(source, list) else [source] if source is not None else [])
    names = ("top_p", "top_k", "repetition_penalty")
    given = {name: getattr(generation, name, None) for name in names}
    return PromptEncoder(
        TextTokenizer(tokenizer),
        stop_ids=frozenset(stop_ids),
        generation_defaults={name: float(value) for name, value in given.items() if value is not None},
        context_tokens=min(limits.max_context_tokens, int(text_config.max_position_embeddings)),
        limits=limits,
        image_processor=processor,
        image_token_id=getattr(config, "image_token_id", None),
    )


def _warm_up(runner: TransformersRunner, encoder: PromptEncoder) -> None:
    """Two steps on a tiny prompt: what is compiled or allocated at first use is paid for before the first request.

    :raise Exception: the model cannot run; better now than at the first request.
    """
    options = SamplingOptions(2, 0.0, 1.0, 0, 1.0, 0, frozenset())
    ids = tuple(encoder.tokenizer.encode_content("warm-up"))
    sequence = Sequence("warm-up", ids, options, time.monotonic() + 3600, lambda _: False, lambda *_: None)
    try:
        for _ in range(2):
            (output,) = runner.step([sequence])
            if output.error is not None:
                raise output.error
            if output.token_id is not None:
                sequence.output_ids.append(output.token_id)
    finally:
        runner.release(sequence)
