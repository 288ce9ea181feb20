"""Where a model's files are, and whether they can be a model: checked before the port is bound, without torch.

A path may be a plain snapshot folder or a hub cache root (`models--ORG--NAME/{refs,snapshots}`), or the
`models--ORG--NAME` folder itself. Loading the files is `models/loader.py`'s work.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import PROJECT_ROOT, DType, Settings
from models.errors import LoadError, SnapshotError
from models.schemas import ModelName

DEMO_MARKER = "avito_demo.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
# The classes of transformers that the engine runs (models/engine/layers.py): it computes their layers itself.
_CLASSES: dict[ModelName, tuple[str, ...]] = {
    "avibe": ("Qwen3ForCausalLM", "LlamaForCausalLM"),
    "avision": ("Qwen2_5_VLForConditionalGeneration",),
}
KNOWN_CLASSES = tuple(name for names in _CLASSES.values() for name in names)


@dataclass(frozen=True)
class Snapshot:
    """A model that passed the checks: its folders, dtype and whether it is an embedded demo model."""

    model: ModelName
    folder: Path
    tokenizer_folder: Path
    dtype: DType
    architecture: str
    is_demo: bool


def find_snapshots(settings: Settings) -> dict[ModelName, Snapshot]:
    """The configured models, checked.

    :raise SnapshotError: none is configured, a path is missing or ambiguous, a file is missing or broken, or
        production was given an embedded model without AVITO_ALLOW_DEMO.
    """
    wanted: list[tuple[ModelName, str, str, DType]] = [
        ("avibe", settings.avibe_model_path, settings.avibe_tokenizer_path, settings.avibe_dtype),
        ("avision", settings.avision_model_path, "", settings.avision_dtype),
    ]
    found: dict[ModelName, Snapshot] = {}
    mistakes: list[str] = []
    for model, path, tokenizer_path, dtype in wanted:
        if path:
            try:
                found[model] = _check(model, path, tokenizer_path, dtype)
            except SnapshotError as error:
                mistakes.append(str(error))
    mistakes += [
        f"{snapshot.model.upper()}_MODEL_PATH: {snapshot.folder} is an embedded demo model, which "
        "AVITO_ENV=production refuses unless AVITO_ALLOW_DEMO=true"
        for snapshot in found.values()
        if snapshot.is_demo and settings.env == "production" and not settings.allow_demo
    ]
    if not found and not mistakes:
        mistakes.append("no model is configured: set AVIBE_MODEL_PATH or AVISION_MODEL_PATH")
    if mistakes:
        raise SnapshotError("; ".join(mistakes))
    return found


def resolve_folder(path: str, setting: str) -> Path:
    """The snapshot folder that `path` names; a relative path counts from the project's root.

    :raise SnapshotError: there is none, or more than one.
    """
    root = PROJECT_ROOT / Path(path).expanduser()
    if not root.is_dir():
        raise SnapshotError(f"{setting}: {root} is not a folder")
    if (root / "snapshots").is_dir():
        return _pick_revision(root, setting)
    if not any((root / name).is_file() for name in ("config.json", *_TOKENIZER_FILES)):
        caches = sorted(entry for entry in root.glob("models--*") if (entry / "snapshots").is_dir())
        if len(caches) > 1:
            names = ", ".join(entry.name for entry in caches)
            raise SnapshotError(f"{setting}: {root} holds several models ({names}); name one of these folders")
        if caches:
            return _pick_revision(caches[0], setting)
    return root


def _pick_revision(cache: Path, setting: str) -> Path:
    main = cache / "refs" / "main"
    if main.is_file():
        folder = cache / "snapshots" / main.read_text(encoding="utf-8").strip()
        if not folder.is_dir():
            raise SnapshotError(f"{setting}: {main} names a snapshot that is not there: {folder}")
        return folder
    revisions = sorted(entry for entry in (cache / "snapshots").iterdir() if entry.is_dir())
    if len(revisions) != 1:
        raise SnapshotError(
            f"{setting}: {cache} has no refs/main and {len(revisions)} snapshots, exactly one is needed"
        )
    return revisions[0]


def _check(model: ModelName, path: str, tokenizer_path: str, dtype: DType) -> Snapshot:
    setting = f"{model.upper()}_MODEL_PATH"
    folder = resolve_folder(path, setting)
    config = _read_json(folder / "config.json", setting)
    architectures = config.get("architectures") or []
    if not (isinstance(architectures, list) and architectures and architectures[0] in _CLASSES[model]):
        raise SnapshotError(
            f"{setting}: the engine computes the layers of {', '.join(_CLASSES[model])} itself and knows no others; "
            f"{folder / 'config.json'} names {architectures}"
        )
    _check_weights(folder, setting)
    tokenizer_setting = "AVIBE_TOKENIZER_PATH" if tokenizer_path else setting
    tokenizer_folder = resolve_folder(tokenizer_path, tokenizer_setting) if tokenizer_path else folder
    if not any((tokenizer_folder / name).is_file() for name in _TOKENIZER_FILES):
        raise SnapshotError(f"{tokenizer_setting}: no tokenizer ({', '.join(_TOKENIZER_FILES)}) in {tokenizer_folder}")
    if (tokenizer_folder / "tokenizer.json").is_file():
        _read_json(tokenizer_folder / "tokenizer.json", tokenizer_setting)
    if model == "avision" and not any((folder / name).is_file() for name in _PROCESSOR_FILES):
        raise SnapshotError(f"{setting}: no picture processor ({' or '.join(_PROCESSOR_FILES)}) in {folder}")
    is_demo = (folder / DEMO_MARKER).is_file()
    return Snapshot(model, folder, tokenizer_folder, dtype, str(architectures[0]), is_demo)


def check_demo_files(snapshot: Snapshot) -> None:
    """An embedded model must be the one that its marker was written for: its scores and its card are told of that one.

    Reads every file that the marker gives a hash of, so it takes a moment. Called while loading.

    :raise LoadError: the marker cannot be read, or a file is not the one that it names.
    """
    if not snapshot.is_demo:
        return
    try:
        marker = json.loads((snapshot.folder / DEMO_MARKER).read_text(encoding="utf-8"))
        hashes: dict[str, str] = dict(marker["sha256"])
        if not any(name.endswith(".safetensors") for name in hashes):
            raise LoadError(f"{DEMO_MARKER} of the embedded model names no weights")
        for name, expected in hashes.items():
            with (snapshot.folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    raise LoadError(f"{name} of the embedded model is not the file that {DEMO_MARKER} names: damaged?")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoadError(f"{DEMO_MARKER} or a file that it names cannot be read ({type(error).__name__})") from error


def _check_weights(folder: Path, setting: str) -> None:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_json(index, setting).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise SnapshotError(f"{setting}: {index} must hold a weight_map of file names")
        shards = sorted(set(weight_map.values()))
        missing = [name for name in shards if not (folder / name).is_file()]
        if missing or not shards:
            raise SnapshotError(
                f"{setting}: {len(missing)} of {len(shards)} weight files named by {index} are missing"
                + (f", the first is {missing[0]}" if missing else "")
            )
    elif not (folder / "model.safetensors").is_file():
        raise SnapshotError(
            f"{setting}: no weights in {folder}: model.safetensors or model.safetensors.index.json is needed "
            "(safetensors only)"
        )


def _read_json(file: Path, setting: str) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SnapshotError(f"{setting}: {file} is missing") from None
    except (OSError, ValueError) as error:
        raise SnapshotError(f"{setting}: {file} cannot be read as JSON ({type(error).__name__})") from None
    if not isinstance(value, dict):
        raise SnapshotError(f"{setting}: {file} must hold a JSON object")
    return value
