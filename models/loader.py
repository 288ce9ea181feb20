"""Where weights become a model on a device: local files only, safetensors only, no remote code.

Each step is a timed phase, so that `why_not_ready` and the start-up lines can tell what takes how long. Which folder
a path means was decided by `models/snapshots.py`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from config import DType, EngineOptions, Limits
from models.engine.attention import CPU_PAGE_TOKENS, CUDA_PAGE_TOKENS
from models.engine.kv_cache import KVCache
from models.engine.layers import SmallOperations, TextStack, fused
from models.engine.memory import ModelNeeds, ModelShare
from models.engine.runner import PagedRunner, RunnerSizes
from models.engine.sampling import race, race_rows
from models.engine.scheduler import Scheduler, SchedulerLimits
from models.engine.sequence import SamplingOptions, Sequence
from models.engine.vision import VisionTower
from models.errors import EngineDead, LoadError
from models.grammars import GrammarCompiler
from models.prompts import PromptEncoder
from models.snapshots import KNOWN_CLASSES, Snapshot, check_demo_files
from models.tokenizer import TextTokenizer

log = logging.getLogger("avito.loader")

# Graphs' own pools, cuBLAS workspaces and what the allocator loses to rounding; not measured per model.
_CUDA_OVERHEAD_BYTES = 512 * 1024**2

# How every file of a snapshot is read.
_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}

Phase = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True)
class LoadedModel:
    """Weights on their device, and what is needed to serve them once the memory for its cache is known.

    :param device: as torch writes it.
    :param gpu_uuid: as NVML writes it; None on a CPU.
    """

    device: str
    dtype: str
    gpu_uuid: str | None
    max_running: int
    needs: ModelNeeds
    stack: TextStack
    tower: VisionTower | None
    engine: EngineOptions
    make_encoder: Callable[[int], PromptEncoder]

    def budget_bytes(self, all_weights_bytes: int) -> int:
        """What all models together may take: of a card the fraction that is set, but no more than others left of it;
        on a CPU the caches alone are bounded, and weights come on top."""
        device = self.stack.device
        if device.type != "cuda":
            return self.engine.cpu_cache_bytes + all_weights_bytes
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        # The library reads all weights into one allocation. What merging freed of it are holes between weights, which
        # count against the limit but are too small for a cache.
        lost = max(0, reserved - all_weights_bytes)
        return int(min(total * self.engine.gpu_memory_fraction, free + reserved)) - lost

    def make_runner(self, share: ModelShare, phase: Phase) -> PagedRunner:
        """Allocate the cache, and run the model once in each way that it will run: what is compiled, captured or
        allocated at first use is paid for before the first request. Takes seconds on CUDA.

        :raise Exception: the model cannot run; better now than at the first request.
        """
        sizes = RunnerSizes(
            num_pages=share.num_pages,
            page_tokens=share.page_tokens,
            max_running=self.max_running,
            max_context_tokens=min(self.needs.max_context_tokens, share.capacity_tokens),
        )
        with phase("cache"):
            runner = PagedRunner(self.stack, sizes, tower=self.tower)
        is_cuda = self.stack.device.type == "cuda"
        if self.engine.compile == "on" or (self.engine.compile == "auto" and is_cuda):
            with phase("compile"):
                _compile(runner)
        with phase("warm-up"):
            _warm_up(runner)
        if is_cuda and self.engine.has_cuda_graphs:
            with phase("graphs"):
                _capture(runner)
        return runner


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


def load_model(snapshot: Snapshot, *, engine: EngineOptions, limits: Limits, phase: Phase) -> LoadedModel:
    """Read one model's files and put its weights on the device. Called in the loading thread; takes seconds.

    :param phase: a context manager factory that names and times each phase.
    :raise Exception: whatever the libraries raise; the caller shows the phase and logs the rest.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with phase("device"):
        device = pick_device(engine.device)
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(engine.gpu_memory_fraction, device)
        dtype = pick_dtype(snapshot.dtype, device)
    with phase("tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(snapshot.tokenizer_folder, **_LOCAL)
        _take_chat_template(tokenizer, snapshot)
        processor = None
        if snapshot.model == "avision":
            processor = read_processor(snapshot.folder, limits)
    with phase("weights"):
        check_demo_files(snapshot)
        model = read_weights(snapshot, device, dtype)
    return prepare_model(
        model, tokenizer, processor, engine=engine, limits=limits, phase=phase, name=snapshot.model, device=device
    )


def read_weights(snapshot: Snapshot, device: torch.device, dtype: torch.dtype) -> Any:
    """The library's own model on its device, in eval mode.

    :raise LoadError: weights are missing or have another shape than config.json says.
    """
    model_class: Any = AutoModelForCausalLM if snapshot.model == "avibe" else AutoModelForImageTextToText
    model, report = model_class.from_pretrained(
        snapshot.folder,
        dtype=dtype,
        device_map={"": device} if device.type == "cuda" else None,
        attn_implementation="sdpa",
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported, and refused with a sentence by _check_complete
        **_LOCAL,
    )
    _check_complete(report)
    return model.eval()


def read_processor(folder: Path, limits: Limits) -> Any:
    """The image processor of a snapshot, with our limit on pixels."""
    # backend="pil": the other one needs torchvision, which has no place in our requirements.
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil", **_LOCAL)
    processor.size = {**dict(processor.size), "longest_edge": _longest_edge(processor, limits)}
    return processor


def prepare_model(
    model: Any,
    tokenizer: Any,
    processor: Any,
    *,
    engine: EngineOptions,
    limits: Limits,
    phase: Phase,
    name: str,
    device: torch.device,
) -> LoadedModel:
    """The second half of `load_model`, for a model that is on its device already.

    :param processor: the image processor of an image-text model, else None.
    :raise LoadError: the engine does not know this class of model, or a feature of it.
    """
    kind = type(model).__name__
    if kind not in KNOWN_CLASSES:
        raise LoadError(f"the engine has no fast way to run {kind}; it knows {', '.join(KNOWN_CLASSES)}")
    is_cuda = device.type == "cuda"
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    with phase("merge"):
        stack = TextStack(model)
        tower = None
        if processor is not None:
            tower = VisionTower(model.model.visual, device, stack.dtype, engine.picture_cache_bytes)
        if is_cuda:
            torch.cuda.empty_cache()
    with phase("grammars"):
        stop_ids = _stop_ids(tokenizer, model)
        grammars = GrammarCompiler(tokenizer, stack.shape.vocab_size, stop_ids, limits)
    weights_bytes = stack.num_bytes + (0 if tower is None else tower.weights_bytes)
    log.info(
        "%s: %s, %.2f billion parameters, %.2f GB of weights", name, kind, num_parameters / 1e9, weights_bytes / 1e9
    )
    context_tokens = min(limits.max_context_tokens, stack.shape.max_positions)
    max_running = limits.max_running or (engine.max_running_cuda if is_cuda else engine.max_running_cpu)
    return LoadedModel(
        device=str(device),
        dtype=str(stack.dtype).removeprefix("torch."),
        gpu_uuid=f"GPU-{torch.cuda.get_device_properties(device).uuid}" if is_cuda else None,
        max_running=max_running,
        needs=ModelNeeds(
            weights_bytes=weights_bytes,
            workspace_bytes=_workspace_bytes(stack, tower, limits, engine, max_running) if is_cuda else 0,
            kv_bytes_per_token=stack.shape.kv_bytes_per_token,
            page_tokens=CUDA_PAGE_TOKENS if is_cuda else CPU_PAGE_TOKENS,
            max_context_tokens=context_tokens,
        ),
        stack=stack,
        tower=tower,
        engine=engine,
        make_encoder=lambda capacity: _make_encoder(
            tokenizer, model, processor, limits, min(context_tokens, capacity - 1), stop_ids, grammars
        ),
    )


def _workspace_bytes(
    stack: TextStack, tower: VisionTower | None, limits: Limits, engine: EngineOptions, max_running: int
) -> int:
    """An upper estimate of what steps allocate beside weights and pages, from the shapes of their largest tensors."""
    shape = stack.shape
    # Of a layer's activations these live at the same time: residual, norm, attention's input and output, the MLP's.
    widths = 4 * shape.hidden_size + 3 * shape.num_heads * shape.head_dim + 3 * shape.intermediate_size
    activations = limits.max_step_tokens * widths * shape.dtype_bytes
    # Logits, their buffer, and what sampling makes of them: scores, noise, copies: about 30 bytes a word. Two steps in
    # flight use the same memory: it is freed and taken again in the order of the stream.
    sampling = max_running * shape.vocab_size * (2 * shape.dtype_bytes + 30)
    tables = (max_running + 1) * shape.vocab_size * 5
    pictures = 0
    if tower is not None:
        pictures = engine.picture_cache_bytes + limits.max_step_patches * tower.bytes_per_patch
    return activations + sampling + tables + pictures + _CUDA_OVERHEAD_BYTES


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


def pick_dtype(setting: DType, device: torch.device) -> torch.dtype:
    """`auto` takes float16 on CUDA and float32 on a CPU.

    :raise LoadError: float32 on CUDA, which attention over pages does not take there.
    """
    if setting == "float32" and device.type == "cuda":
        raise LoadError("dtype float32 runs on a CPU only; on CUDA take float16 or bfloat16")
    if setting == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, setting)
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


def _stop_ids(tokenizer: Any, model: Any) -> frozenset[int]:
    """The ids that end an answer, by all three that name such."""
    stop_ids: set[int] = set()
    text_config = model.config.get_text_config()
    for source in (model.generation_config.eos_token_id, text_config.eos_token_id, tokenizer.eos_token_id):
        stop_ids.update(source if isinstance(source, list) else [source] if source is not None else [])
    return frozenset(stop_ids)


def _make_encoder(
    tokenizer: Any,
    model: Any,
    processor: Any,
    limits: Limits,
    context_tokens: int,
    stop_ids: frozenset[int],
    grammars: GrammarCompiler,
) -> PromptEncoder:
    generation = model.generation_config
    config = model.config
    text_config = config.get_text_config()
    names = ("top_p", "top_k", "min_p", "repetition_penalty")
    given = {name: getattr(generation, name, None) for name in names}
    return PromptEncoder(
        TextTokenizer(tokenizer),
        stop_ids=stop_ids,
        generation_defaults={name: float(value) for name, value in given.items() if value is not None},
        context_tokens=context_tokens,
        vocab_size=text_config.vocab_size,
        placeholder_ids=frozenset(
            token_id
            for name in ("image_token_id", "video_token_id")
            if (token_id := getattr(config, name, None)) is not None
        ),
        limits=limits,
        image_processor=processor,
        image_token_id=getattr(config, "image_token_id", None),
        rope_index=model.model.get_rope_index if processor is not None else None,
        grammars=grammars,
    )


def _compile(runner: PagedRunner) -> None:
    """Compile the small operations, or go on without if this machine cannot: it costs speed, not answers."""
    runner.use(SmallOperations.compiled(), partial(race, run=fused(race_rows, 4)))
    try:
        _warm_up(runner)
    except Exception as error:  # no C compiler, an unwritable cache folder, a driver that Triton does not know
        log.warning("torch.compile does not work here (%s), steps run uncompiled", type(error).__name__, exc_info=error)
        runner.use(SmallOperations(), race)


def _capture(runner: PagedRunner) -> None:
    """Capture the graphs, or go on without if this card cannot: it costs speed, not answers."""
    try:
        runner.capture_graphs()
        _warm_up(runner)
    except EngineDead:
        raise
    except Exception as error:  # a driver or a library that cannot be captured
        log.warning("CUDA graphs do not work here (%s), steps run uncaptured", type(error).__name__, exc_info=error)
        runner.drop_graphs()


def _warm_up(runner: PagedRunner) -> None:
    """Prompts and answers of two tokens, as the loop would run them, in a scheduler of its own: alone and by twos, with
    the rows that are drawn from the logits as they are and with those that are not. What is compiled or loaded at first
    use has then been used in each way."""
    plain = SamplingOptions(2, 0.7, 1.0, 0, 1.0, 0, frozenset())
    shaped = SamplingOptions(2, 0.7, 0.9, 20, 1.0, 0, frozenset())
    for options in (plain, shaped):
        for num in sorted({1, min(2, runner.max_running)}):
            _warm_up_batch(runner, options, num)


def _warm_up_batch(runner: PagedRunner, options: SamplingOptions, num: int) -> None:
    scheduler = Scheduler(KVCache(runner.num_pages, runner.page_tokens), SchedulerLimits(max_running=num))
    sequences = [
        Sequence("warm-up", (0,) * 24, options, float("inf"), lambda _: False, lambda *_: None) for _ in range(num)
    ]
    for sequence in sequences:
        scheduler.add(sequence, 0.0)
    try:
        for _ in range(2):
            step = scheduler.next_step(0.0)
            launched = runner.launch(step)
            launched.wait()
            for output in launched.outputs():
                if output.error is not None:
                    raise output.error
                scheduler.record_row(output.row)
                assert output.token_id is not None
                output.sequence.output_ids.append(output.token_id)
    finally:
        for sequence in sequences:
            runner.release(sequence)
