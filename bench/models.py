"""What the benchmarks in this process run: the embedded model, a snapshot, or random weights of a true shape.

Loaded and made ready by `models/loader.py`, as the service does it. The KV cache is made as large as the load needs and
not as the card allows: how much room there is, `python -m bench memory` asks the service.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from bench.report import Unable
from bench.shapes import SHAPES, Shape, make_model, make_tokenizer, write_processor
from config import EngineOptions, Limits, Settings, set_torch_environment
from models.engine.memory import ModelShare
from models.engine.runner import PagedRunner
from models.errors import LoadError, SnapshotError
from models.loader import LoadedModel, load_model, pick_device, pick_dtype, prepare_model, read_processor, read_weights
from models.prompts import PromptEncoder
from models.schemas import ModelName
from models.snapshots import DEMO_MARKER, Snapshot, find_snapshots, resolve_folder

_DEMOS: dict[ModelName, str] = {"avibe": "vibe/demo", "avision": "vision/demo"}
_COPIED_BYTES = 1024**3
_NUM_COPIES = 10


@dataclass(frozen=True)
class ModelSource:
    """Which model. `shape` or `path`, or neither for the embedded one."""

    name: ModelName
    shape: str | None
    path: str | None
    dtype: Any
    options: EngineOptions

    @property
    def label(self) -> str:
        """For the table: a name, no path."""
        return self.shape or (Path(self.path).name if self.path else "embedded")

    @property
    def device(self) -> torch.device:
        """:raise Unable: a card was asked for that is not there."""
        try:
            return pick_device(self.options.device)
        except LoadError as error:
            raise Unable(str(error)) from None


class Phases:
    """Times the phases of loading, as the service does; seconds in `seconds`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started


@dataclass(frozen=True)
class BenchModel:
    """A model on its device, and how long each phase of that took."""

    source: ModelSource
    loaded: LoadedModel
    limits: Limits
    phases: Phases

    @property
    def name(self) -> ModelName:
        return self.source.name

    @property
    def vocab_size(self) -> int:
        return self.loaded.stack.shape.vocab_size

    @property
    def max_context_tokens(self) -> int:
        return self.loaded.needs.max_context_tokens

    @property
    def has_pictures(self) -> bool:
        return self.loaded.tower is not None

    def make_encoder(self) -> PromptEncoder:
        return self.loaded.make_encoder(self.max_context_tokens + 1)

    def make_runner(self, num_sequences: int, sequence_tokens: int) -> PagedRunner:
        """With room for so many sequences of so many tokens, and at least for the longest that the model takes: as in
        the service, the tables of pages are as wide as that."""
        needs = self.loaded.needs
        page_tokens = needs.page_tokens
        # A page for each to grow into, or the scheduler would hold the newest back.
        wanted = num_sequences * (-(-sequence_tokens // page_tokens) + 2)
        num_pages = 1 + max(wanted, -(-self.max_context_tokens // page_tokens))
        share = ModelShare(
            needs.weights_bytes, needs.workspace_bytes, num_pages * needs.page_bytes, num_pages, page_tokens
        )
        return self.loaded.make_runner(share, self.phases)

    def describe(self) -> str:
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.phases.seconds.items())
        return (
            f"{self.source.label}: {self.loaded.device}, {self.loaded.dtype}, "
            f"{self.loaded.needs.weights_bytes / 1e9:.2f} GB of weights; seconds: {phases}"
        )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, and how it is run: the same for each benchmark in this process."""
    _add_source(parser, "")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    parser.add_argument(
        "--dtype", choices=("auto", "float16", "bfloat16", "float32"), default="auto", help="(default auto)"
    )
    parser.add_argument("--no-graphs", action="store_true", help="without CUDA graphs")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto", help="(default auto: on CUDA)")


def add_picture_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The second model of a benchmark that runs two."""
    _add_source(parser, "picture-")


def _add_source(parser: argparse.ArgumentParser, prefix: str) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument(f"--{prefix}model", metavar="PATH", help="a snapshot (default: the embedded one)")
    source.add_argument(f"--{prefix}shape", choices=SHAPES, help="random weights of this shape instead")


def source_of(arguments: argparse.Namespace, *, is_picture_model: bool | None = None, prefix: str = "") -> ModelSource:
    """What the options ask for.

    :param is_picture_model: which kind it must be; None: either, by default text.
    :raise Unable: the shape is of the other kind.
    """
    shape = getattr(arguments, f"{prefix}shape")
    has_pictures = bool(is_picture_model)
    if shape is not None:
        has_pictures = SHAPES[shape].has_pictures
        if is_picture_model is not None and has_pictures != is_picture_model:
            of_kind = [name for name, other in SHAPES.items() if other.has_pictures == is_picture_model]
            raise Unable(f"--{prefix.replace('_', '-')}shape {shape}: here it must be one of {', '.join(of_kind)}")
    path = getattr(arguments, f"{prefix}model")
    if path is not None and is_picture_model is None:
        has_pictures = _has_pictures(path)
    return ModelSource(
        name="avision" if has_pictures else "avibe",
        shape=shape,
        path=path,
        dtype=arguments.dtype,
        options=EngineOptions(
            device=arguments.device, has_cuda_graphs=not arguments.no_graphs, compile=arguments.compile
        ),
    )


def _has_pictures(path: str) -> bool:
    try:
        folder = resolve_folder(path, "--model")
    except SnapshotError as error:
        raise Unable(str(error)) from None
    return any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json"))


def load(source: ModelSource, max_running: int) -> BenchModel:
    """Put the model on its device; seconds to a minute.

    :param max_running: the most sequences at a time that the benchmark has; no less than the service would take.
    :raise Unable: there is no such model, or the engine does not run it.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    set_torch_environment(Settings.model_validate({}))  # the service's own, so that neither compiles for the other
    device, options = source.device, source.options
    default = options.max_running_cuda if device.type == "cuda" else options.max_running_cpu
    limits = Limits(max_running=max(max_running, default))
    phases = Phases()
    try:
        if source.shape is None:
            loaded = load_model(_find(source), engine=options, limits=limits, phase=phases)
        else:
            loaded = _load_shape(source, SHAPES[source.shape], limits, phases)
    except (LoadError, SnapshotError) as error:
        raise Unable(str(error)) from None
    return BenchModel(source, loaded, limits, phases)


def _load_shape(source: ModelSource, shape: Shape, limits: Limits, phases: Phases) -> LoadedModel:
    device = source.device
    with phases("weights"):
        model = make_model(shape, device, pick_dtype(source.dtype, device))
    processor = None
    if shape.has_pictures:
        with tempfile.TemporaryDirectory() as folder:
            write_processor(Path(folder))
            processor = read_processor(Path(folder), limits)
    return prepare_model(
        model,
        make_tokenizer(shape.vocab_size),
        processor,
        engine=source.options,
        limits=limits,
        phase=phases,
        name=source.name,
        device=device,
    )


def load_library_model(source: ModelSource) -> Any:
    """The same model as the library runs it, on the same device: what `generate` is measured with. Its weights come on
    top of ours, because ours are merged."""
    device = source.device
    dtype = pick_dtype(source.dtype, device)
    try:
        if source.shape is not None:
            return make_model(SHAPES[source.shape], device, dtype)
        return read_weights(_find(source), device, dtype)
    except (LoadError, SnapshotError) as error:
        raise Unable(str(error)) from None


def _find(source: ModelSource) -> Snapshot:
    path = source.path
    if path is None:
        path = _DEMOS[source.name]
        try:
            is_there = (resolve_folder(path, "--model") / DEMO_MARKER).is_file()
        except SnapshotError:
            is_there = False
        if not is_there:
            raise Unable(f"there is no embedded model in {path}: name one with --model or --shape")
    setting = source.name.upper()
    settings = Settings.model_validate({f"{setting}_MODEL_PATH": path, f"{setting}_DTYPE": source.dtype})
    return find_snapshots(settings)[source.name]


def copy_gb_per_s(device: torch.device) -> float | None:
    """GB/s that a copy from the device to itself moves, reads and writes together; None on a CPU."""
    if device.type != "cuda":
        return None
    source = torch.empty(_COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(_NUM_COPIES):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * _COPIED_BYTES / min(seconds) / 1e9
