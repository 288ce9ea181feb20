"""The house's rules, read from the import statements: downwards only, and libraries where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from config import PROJECT_ROOT

MODULES = sorted([*PROJECT_ROOT.glob("*.py"), *PROJECT_ROOT.glob("models/**/*.py")])
OURS = {".".join(file.relative_to(PROJECT_ROOT).with_suffix("").parts).removesuffix(".__init__") for file in MODULES}
# Who may import torch and transformers, Pillow, llguidance.
TORCH = {
    "models.prompts",
    "models.tokenizer",
    "models.loader",
    *(f"models.engine.{name}" for name in ("attention", "graphs", "layers", "runner", "sampling", "vision")),
}
PILLOW = {"models.images"}
LLGUIDANCE = {"models.grammars"}
# Top-level modules from the bottom to the top: each imports only from those before it and from `models`.
LAYERS = [
    ["config", "translations"],
    ["logs", "accounting", "system", "pages"],
    ["responses", "watchdog", "notify"],
    ["bodies", "keys", "openapi_parts"],
    ["budgets", "openapi_v1"],
    ["access"],
    ["generation", "middleware", "connections"],
    ["api", "openai_api", "web", "health", "openapi"],
    ["app_production", "gunicorn_config"],
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(PROJECT_ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def tops(file: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(file)}


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_imports_go_downwards_only(file: Path) -> None:
    name, found = name_of(file), imports(file)
    ours = found & OURS
    if name.startswith("models.engine"):
        allowed = {"models.errors", "models.metrics"}
        assert not {n for n in ours if n.startswith("models.") and not n.startswith("models.engine")} - allowed
    if name.startswith("models"):
        assert {n for n in ours if not n.startswith("models")} <= {"config"}
    else:
        assert name in RANK, f"{name} has no place in LAYERS"
        upwards = {n for n in ours if n in RANK and RANK[n] >= RANK[name]}
        assert not upwards - {"pages"} if name != "pages" else not upwards


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_libraries_stay_where_they_belong(file: Path) -> None:
    name, found = name_of(file), tops(file)
    assert name in TORCH or not found & {"torch", "transformers", "tokenizers"}
    assert name in PILLOW or "PIL" not in found
    assert name in LLGUIDANCE or "llguidance" not in found
    if name.startswith("models"):
        assert not found & {"flask", "werkzeug", "gunicorn"}
    assert name == "config" or "os.environ" not in file.read_text()


def test_importing_everything_starts_nothing() -> None:
    """No thread, no torch, no CUDA: the application is imported in a fresh interpreter."""
    code = (
        "import threading, sys, app_production, watchdog, notify, connections\n"
        "assert threading.active_count() == 1, threading.enumerate()\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT_ROOT, check=True, timeout=60)
