"""Write a whole snapshot of a true shape with random weights: for starting the real server without the real model.

Weights as safetensors in shards of 5 GB, configuration, tokenizer, chat template and, for pictures, the processor's
configuration. The folder is one for AVIBE_MODEL_PATH or AVISION_MODEL_PATH.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from bench.report import Unable
from bench.shapes import SHAPES, make_model, make_tokenizer, write_processor
from models.errors import LoadError
from models.loader import pick_device, pick_dtype


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="where to: a new or an empty folder")
    parser.add_argument("--shape", choices=SHAPES, required=True, help="of which model")
    parser.add_argument(
        "--dtype", choices=("float16", "bfloat16", "float32"), default="float16", help="(default float16)"
    )
    parser.add_argument("--device", default="auto", help="where the weights are made (default auto)")


def run(arguments: argparse.Namespace) -> int:
    """:raise Unable: the folder has something in it."""
    folder: Path = arguments.folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Unable(f"{folder}: must be a new or an empty folder")
    started = time.perf_counter()
    try:
        device = pick_device(arguments.device)
    except LoadError as error:
        raise Unable(str(error)) from None
    shape = SHAPES[arguments.shape]
    model = make_model(shape, device, pick_dtype(arguments.dtype, device))
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, max_shard_size="5GB")
    make_tokenizer(shape.vocab_size).save_pretrained(folder)
    if shape.has_pictures:
        write_processor(folder)
    num_bytes = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {num_bytes / 1e9:.2f} GB in {time.perf_counter() - started:.1f} s")
    return 0
