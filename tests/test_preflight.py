"""What is refused before a deployment, and in what words; the facts are passed in, nvidia-smi is a stand-in."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from config import PROJECT_ROOT
from tests.test_snapshots import make_snapshot
from tools import preflight

GB = 10**9
SMI = """\
0, GPU-aaaa, NVIDIA H200, 570.86.15, 143771, 143000
1, GPU-bbbb, NVIDIA H200, 570.86.15, 143771, 20000
"""
SETTINGS_FILE = Path("/etc/avito-ai/avito-ai.env")
DEBIAN = 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nID=debian\n'


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[preflight.Gpu] | None:
    """Two cards, told by a command of that name."""
    command = tmp_path / "nvidia-smi"
    command.write_text(
        f"#!/bin/sh\ncase $1 in *query-gpu*) cat <<'END'\n{SMI}END\n;; *) echo 'GPU-bbbb, 7, 120000' ;; esac\n"
    )
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return preflight.read_gpus()


def test_cards_and_what_a_process_holds_of_them_are_read_from_nvidia_smi(gpus: list[preflight.Gpu]) -> None:
    assert [(gpu.number, gpu.uuid, gpu.driver) for gpu in gpus] == [
        (0, "GPU-aaaa", "570.86.15"),
        (1, "GPU-bbbb", "570.86.15"),
    ]
    assert preflight.read_gpu_bytes_of({7, 8}) == {"GPU-bbbb": 120000 * 1024**2}
    assert preflight.read_gpu_bytes_of({8}) == {}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 0),
        ({"CUDA_VISIBLE_DEVICES": "1"}, 1),
        ({"CUDA_VISIBLE_DEVICES": "GPU-bb"}, 1),
        ({"CUDA_VISIBLE_DEVICES": "1,0", "AVITO_DEVICE": "cuda:1"}, 0),
        ({"CUDA_VISIBLE_DEVICES": "1", "AVITO_DEVICE": "cuda:1"}, None),
        ({"CUDA_VISIBLE_DEVICES": "2"}, None),
        ({"CUDA_VISIBLE_DEVICES": ""}, None),
        ({"AVITO_DEVICE": "cuda:2"}, None),
    ],
)
def test_the_card_is_the_one_that_both_variables_name(
    gpus: list[preflight.Gpu], environment: dict[str, str], expected: int | None
) -> None:
    picked = preflight.pick_gpu(gpus, environment)
    if expected is None:
        assert isinstance(picked, str)
        assert picked.endswith("a card that is not there; nvidia-smi shows: 0 (NVIDIA H200), 1 (NVIDIA H200)")
    else:
        assert picked == gpus[expected]


def test_a_card_that_others_fill_is_refused_but_what_our_service_holds_counts_as_free(
    gpus: list[preflight.Gpu],
) -> None:
    environment = {"CUDA_VISIBLE_DEVICES": "1"}
    (problem,) = preflight.check_gpu(gpus, environment, {})
    assert problem.startswith(
        "card 1 (NVIDIA H200) has 21 GB of free memory and AVITO_GPU_MEMORY_FRACTION=0.9 asks for"
    )
    assert preflight.check_gpu(gpus, environment, {"GPU-bbbb": 120000 * 1024**2}) == []
    assert preflight.check_gpu(gpus, {"CUDA_VISIBLE_DEVICES": "0"}, {}) == []


def test_without_a_driver_both_ways_out_are_named() -> None:
    (problem,) = preflight.check_gpu(None, {}, {})
    assert "nvidia-smi does not answer" in problem and "AVITO_DEVICE=cpu" in problem


def test_a_driver_too_old_for_torch_is_named_with_the_index_as_the_way_out() -> None:
    (problem,) = preflight.check_torch("2.13.0+cu130", "13.0", False, "570.86.15", SETTINGS_FILE)
    assert "driver 570.86.15 is too old for torch 2.13.0+cu130" in problem
    assert "built for CUDA 13.0 and needs 580.65.06 or newer" in problem
    assert f"AVITO_TORCH_INDEX_URL in {SETTINGS_FILE} to an index of the same torch built for CUDA 12" in problem


def test_a_driver_new_enough_passes_and_one_that_torch_does_not_see_is_told_apart() -> None:
    assert preflight.check_torch("2.13.0+cu130", "13.0", True, "580.65.06", SETTINGS_FILE) == []
    assert preflight.check_torch("2.13.0+cu126", "12.6", True, "570.86.15", SETTINGS_FILE) == []
    (problem,) = preflight.check_torch("2.13.0+cu130", "13.0", False, "580.65.06", SETTINGS_FILE)
    assert "sees no card although the driver 580.65.06 answers" in problem


def test_a_build_of_torch_for_cpus_is_refused_where_a_card_is_meant() -> None:
    (problem,) = preflight.check_torch("2.13.0+cpu", None, False, "580.65.06", SETTINGS_FILE)
    assert problem.startswith("torch 2.13.0+cpu is a build for CPUs: set AVITO_TORCH_INDEX_URL")


def test_root_system_and_python_are_looked_at() -> None:
    assert preflight.check_root(0) == []
    assert "sudo ./deploy.sh production" in preflight.check_root(1000)[0]
    assert preflight.check_system(DEBIAN, has_systemd=True) == []
    assert preflight.check_system("ID=mint\nID_LIKE=ubuntu\n", has_systemd=True) == []
    assert len(preflight.check_system('PRETTY_NAME="Fedora"\nID=fedora\n', has_systemd=False)) == 2
    assert preflight.check_python((3, 11, 2), "/usr/bin/python3.11") == []
    assert len(preflight.check_python((3, 10, 4), "/home/x/python3.10")) == 2


def test_too_little_disk_is_refused_with_both_figures(tmp_path: Path) -> None:
    assert preflight.check_disk(tmp_path, 5 * GB, 5 * GB) == []
    (problem,) = preflight.check_disk(tmp_path, 5 * GB - 1, 14 * GB)
    assert "has 5.0 GB of free disk and this takes 14.0 GB" in problem
    assert preflight.free_bytes_at(tmp_path / "not" / "there" / "yet") > 0


def test_a_port_in_use_by_others_is_refused_and_our_own_is_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        settings = {"AVITO_PORT": str(port)}
        assert preflight.check_port(settings, our_port=port) == []
        (problem,) = preflight.check_port(settings, our_port=None, owner="nginx, pid 7")
        assert problem == f"port {port} is in use by nginx, pid 7: stop that, or set another AVITO_PORT"
    assert preflight.check_port({"AVITO_PORT": "0"}, None) == ["AVITO_PORT=0: must be a number from 1 to 65535"]


def test_files_of_settings_are_read_as_systemd_reads_them() -> None:
    text = '# A=1\n; B=2\nC = x y # no comment \nD="q r"\nE=\nF=a\\\nb\nnothing\n'
    assert preflight.read_environment_file(text) == {"C": "x y # no comment", "D": "q r", "E": "", "F": "ab"}


def test_assignments_of_a_unit_are_read_one_or_several_a_line() -> None:
    unit = '[Service]\nEnvironment=A=1 B=2\nEnvironment="C=x y"\n# Environment=D=1\nEnvironmentFile=/x\n'
    assert preflight.read_unit_environment(unit) == {"A": "1", "B": "2", "C": "x y"}


def release_check(**settings: str) -> dict[str, object]:
    environ = {"PATH": os.environ["PATH"], "AVITO_DEVICE": "cpu", **settings}
    command = [sys.executable, "-m", "tools.release_check"]
    result = subprocess.run(command, cwd=PROJECT_ROOT, env=environ, capture_output=True, text=True, check=True)
    return dict(json.loads(result.stdout))


def test_a_release_tells_all_that_is_wrong_with_settings_that_can_be_read(tmp_path: Path) -> None:
    make_snapshot(tmp_path / "avibe")
    good = {"AVIBE_MODEL_PATH": str(tmp_path / "avibe")}
    assert release_check(**good) == {"problems": [], "torch": {}}
    wrong = {
        "AVITO_LOG_FILE": str(tmp_path / "no" / "log"),
        "AVITO_KEYS_FILE": str(tmp_path / "keys"),
        "AVISION_MODEL_PATH": "x",
    }
    problems = release_check(**good, **wrong)["problems"]
    assert isinstance(problems, list)
    assert [problem.split("=")[0].split(":")[0] for problem in problems] == [
        "AVITO_LOG_FILE",
        "AVITO_KEYS_FILE",
        "AVISION_MODEL_PATH",
    ]
