"""Tests that need a card: skipped with the reason where there is none.

`pytest tests/gpu --rehearse` runs on the CPU what can run there, with graphs emulated: it tries the tests out, and
shows nothing about a card.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.gpu.tiny import OnDevice, load_on, widen

HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rehearse", action="store_true", help="run the card's tests on the CPU, as far as they can")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            # What libraries warn of on one card or driver is nothing that this code could avoid on all of them.
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.config.getoption("--rehearse", default=False):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda:0")


@pytest.fixture
def card(device: torch.device) -> torch.device:
    """For what has no meaning on a CPU, not even in a rehearsal."""
    if device.type != "cuda":
        pytest.skip("needs a CUDA device")
    return device


@pytest.fixture(autouse=True)
def memory_given_back(device: torch.device) -> Iterator[None]:
    """Loading bounds the whole process, and graphs are let go only with what refers to them."""
    yield
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0, device)


@pytest.fixture(scope="session", params=[64, 128], ids=lambda head_dim: f"head{head_dim}")
def head_dim(request: pytest.FixtureRequest) -> int:
    found: int = request.param
    return found


@pytest.fixture(scope="session")
def qwen3(
    device: torch.device, qwen3_folder: Path, head_dim: int, tmp_path_factory: pytest.TempPathFactory
) -> OnDevice:
    return load_on(device, widen(qwen3_folder, tmp_path_factory.mktemp("wide") / "snapshot", head_dim), "avibe")


@pytest.fixture(scope="session")
def llama(
    device: torch.device, llama_folder: Path, head_dim: int, tmp_path_factory: pytest.TempPathFactory
) -> OnDevice:
    return load_on(device, widen(llama_folder, tmp_path_factory.mktemp("wide") / "snapshot", head_dim), "avibe")


@pytest.fixture(scope="session")
def vision(
    device: torch.device, vision_folder: Path, head_dim: int, tmp_path_factory: pytest.TempPathFactory
) -> OnDevice:
    return load_on(device, widen(vision_folder, tmp_path_factory.mktemp("wide") / "snapshot", head_dim), "avision")
