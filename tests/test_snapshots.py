"""Where a path leads, and what is refused before the port is bound."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from config import Settings
from models.errors import SnapshotError
from models.snapshots import DEMO_MARKER, find_snapshots, resolve_folder


def make_snapshot(folder: Path, architecture: str = "Qwen3ForCausalLM") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"x")
    return folder


def make_cache(root: Path, name: str = "AvitoTech--avibe", revision: str = "abc", ref: str | None = "abc") -> Path:
    cache = root / f"models--{name}"
    make_snapshot(cache / "snapshots" / revision)
    if ref is not None:
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text(ref + "\n")
    return cache


def find(**settings: Any) -> Any:
    return find_snapshots(Settings.model_validate(settings))


def test_plain_folder_hub_root_and_hub_folder_lead_to_the_snapshot(tmp_path: Path) -> None:
    plain = make_snapshot(tmp_path / "plain")
    cache = make_cache(tmp_path / "hub")
    for path in (plain, cache, tmp_path / "hub", cache / "snapshots" / "abc"):
        found = find(AVIBE_MODEL_PATH=str(path))["avibe"]
        assert (found.folder / "config.json").is_file()
        assert not found.is_demo


def test_ref_picks_among_several_revisions(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, revision="old", ref="new")
    make_snapshot(cache / "snapshots" / "new")
    assert find(AVIBE_MODEL_PATH=str(cache))["avibe"].folder.name == "new"


def test_only_revision_counts_without_a_ref(tmp_path: Path) -> None:
    assert find(AVIBE_MODEL_PATH=str(make_cache(tmp_path, ref=None)))["avibe"].folder.name == "abc"


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda root: make_cache(root, "Org--other"), "several models"),
        (lambda root: (root / "models--AvitoTech--avibe/refs/main").write_text("gone"), "not there"),
        (
            lambda root: [
                (root / "models--AvitoTech--avibe/refs/main").unlink(),
                make_snapshot(root / "models--AvitoTech--avibe/snapshots/second"),
            ],
            "2 snapshots",
        ),
    ],
)
def test_ambiguous_or_broken_hub_cache_is_one_sentence(tmp_path: Path, spoil: Any, what: str) -> None:
    make_cache(tmp_path)
    spoil(tmp_path)
    with pytest.raises(SnapshotError, match=what) as caught:
        find(AVIBE_MODEL_PATH=str(tmp_path))
    assert str(caught.value).startswith("AVIBE_MODEL_PATH: ")


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("config.json", None, "config.json is missing"),
        ("config.json", "{", "cannot be read as JSON"),
        ("config.json", "[]", "must hold a JSON object"),
        ("config.json", '{"architectures": ["Qwen2_5_VLForConditionalGeneration"]}', "ForCausalLM"),
        ("tokenizer.json", None, "no tokenizer"),
        ("tokenizer.json", "nonsense", "cannot be read as JSON"),
        ("model.safetensors", None, "safetensors only"),
    ],
)
def test_missing_or_broken_file_is_named(tmp_path: Path, name: str, content: str | None, what: str) -> None:
    folder = make_snapshot(tmp_path / "s")
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(SnapshotError, match=what):
        find(AVIBE_MODEL_PATH=str(folder))


def test_missing_shard_is_named(tmp_path: Path) -> None:
    folder = make_snapshot(tmp_path / "s")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SnapshotError, match=r"1 of 2 weight files .* model-2.safetensors"):
        find(AVIBE_MODEL_PATH=str(folder))
    (folder / "model-2.safetensors").write_bytes(b"x")
    find(AVIBE_MODEL_PATH=str(folder))


def test_tokenizer_may_have_a_folder_of_its_own(tmp_path: Path) -> None:
    folder = make_snapshot(tmp_path / "s")
    (folder / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    found = find(AVIBE_MODEL_PATH=str(folder), AVIBE_TOKENIZER_PATH=str(tmp_path))["avibe"]
    assert (found.folder, found.tokenizer_folder) == (folder, tmp_path)


def test_vision_snapshot_needs_a_picture_processor(tmp_path: Path) -> None:
    folder = make_snapshot(tmp_path / "s", "Qwen2_5_VLForConditionalGeneration")
    with pytest.raises(SnapshotError, match="AVISION_MODEL_PATH: no picture processor"):
        find(AVISION_MODEL_PATH=str(folder))
    (folder / "preprocessor_config.json").write_text("{}")
    assert list(find(AVISION_MODEL_PATH=str(folder))) == ["avision"]


def test_no_model_at_all_is_an_error() -> None:
    with pytest.raises(SnapshotError, match="no model is configured"):
        find()


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="is not a folder"):
        resolve_folder(str(tmp_path / "nowhere"), "X")


def test_production_refuses_a_demo_unless_allowed(tmp_path: Path) -> None:
    folder = make_snapshot(tmp_path / "s")
    (folder / DEMO_MARKER).write_text("{}")
    assert find(AVIBE_MODEL_PATH=str(folder))["avibe"].is_demo
    with pytest.raises(SnapshotError, match="AVITO_ALLOW_DEMO=true"):
        find(AVIBE_MODEL_PATH=str(folder), AVITO_ENV="production")
    assert find(AVIBE_MODEL_PATH=str(folder), AVITO_ENV="production", AVITO_ALLOW_DEMO="true")["avibe"].is_demo
