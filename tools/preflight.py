"""What a host must have before the service is deployed on it, as sentences that say what to do.

Each check takes facts and returns problems; `read_*` functions collect facts and judge nothing. Standard library only,
for it runs before anything is installed. What only the release's own packages can say is in tools/release_check.py.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

GB = 10**9
MIB = 1024**2
# Packages as installed, and pip's copies beside them while it works. The usual torch brings CUDA's libraries: 2.8 GB to
# download, 5 GB unpacked. A build for CPUs comes from an index of its own.
VENV_BYTES_CUDA = 12 * GB
VENV_BYTES_CPU = 4 * GB
RELEASE_BYTES = GB // 4
# The oldest driver of each CUDA generation (NVIDIA, "CUDA Compatibility", minor version compatibility).
MIN_DRIVERS = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}
GPU_FIELDS = ("index", "uuid", "name", "driver_version", "memory.total", "memory.free")
MODEL_SETTINGS = ("AVIBE_MODEL_PATH", "AVIBE_TOKENIZER_PATH", "AVISION_MODEL_PATH")
PREFIXES = ("AVITO_", "AVIBE_", "AVISION_")


class Gpu(NamedTuple):
    number: int
    uuid: str
    name: str
    driver: str
    total_bytes: int
    free_bytes: int


def read_environment_file(text: str) -> dict[str, str]:
    """`EnvironmentFile=` as systemd reads it: no comment after a value, quotes taken off, backslash joins lines."""
    values = {}
    for line in text.replace("\\\n", "").splitlines():
        name, equals, value = line.strip().partition("=")
        if not equals or name[:1] in ("#", ";"):
            continue
        value = value.strip()
        if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1]
        values[name.strip()] = value
    return values


def read_unit_environment(unit: str) -> dict[str, str]:
    """The `Environment=` lines of a unit, one or more assignments each, quoted or not."""
    values = {}
    for line in re.findall(r"^Environment=(.*)$", unit, re.MULTILINE):
        for quoted, bare in re.findall(r"\"([^\"]*)\"|(\S+)", line):
            name, equals, value = (quoted or bare).partition("=")
            if equals:
                values[name] = value
    return values


# The machine.


def check_root(uid: int) -> list[str]:
    if uid == 0:
        return []
    return ["this needs root, for it writes to /opt, /etc and /var and talks to systemd: sudo ./deploy.sh production"]


def check_system(os_release: str, has_systemd: bool) -> list[str]:
    """:param os_release: the text of /etc/os-release."""
    values = read_environment_file(os_release)
    problems = []
    if not {"debian", "ubuntu"} & {values.get("ID", ""), *values.get("ID_LIKE", "").split()}:
        name = values.get("PRETTY_NAME", "this system")
        problems.append(f"{name} is neither Debian nor Ubuntu nor made from them, and nothing else was tried")
    if not has_systemd:
        problems.append("systemd does not run here (a container?), and it is what keeps the service up")
    return problems


def check_python(version: tuple[int, ...], executable: str) -> list[str]:
    """:param executable: of the Python that the release's .venv would be made from, links followed."""
    problems = []
    if version < (3, 11):
        shown = ".".join(str(part) for part in version)
        problems.append(f"Python 3.11 or newer is needed and this is {shown}: apt install python3 python3-venv")
    if executable.startswith(("/root/", "/home/")):
        problems.append(
            f"the service's user cannot reach {executable}: use the system's Python "
            "(PATH=/usr/sbin:/usr/bin:/sbin:/bin ./deploy.sh production)"
        )
    return problems


def check_disk(folder: Path, free_bytes: int, needed_bytes: int) -> list[str]:
    if free_bytes >= needed_bytes:
        return []
    return [
        f"{folder} has {free_bytes / GB:.1f} GB of free disk and this takes {needed_bytes / GB:.1f} GB: make room, "
        "or keep fewer releases (DEPLOY_KEEP_RELEASES)"
    ]


def free_bytes_at(folder: Path) -> int:
    """Of the disk that holds `folder`, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def check_port(settings: Mapping[str, str], our_port: int | None, owner: str | None = None) -> list[str]:
    """:param our_port: where the running service listens already; None: it does not run.
    :param owner: who listens there, if that is known. None: look.
    """
    text = settings.get("AVITO_PORT", "8085")
    if not text.isdecimal() or not 0 < int(text) < 65536:
        return [f"AVITO_PORT={text}: must be a number from 1 to 65535"]
    port = int(text)
    if port == our_port or not is_port_taken(settings.get("AVITO_HOST", "127.0.0.1"), port):
        return []
    return [f"port {port} is in use by {owner or port_owner(port)}: stop that, or set another AVITO_PORT"]


def is_port_taken(host: str, port: int) -> bool:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    try:
        with socket.create_connection((host, port), timeout=2):
            return True
    except OSError:
        return False


def port_owner(port: int) -> str:
    listing = run_quietly(["ss", "-ltnpH", f"sport = :{port}"])
    found = re.search(r'users:\(\("([^"]+)",pid=(\d+)', listing)
    return f"{found[1]}, pid {found[2]}" if found else "another process"


def check_model_paths(settings: Mapping[str, str], release: Path) -> list[str]:
    """Only whether the folders are there; what is in them, the release looks at.

    :param release: where relative paths count from.
    """
    problems = [
        f"{name}={settings[name]}: there is no such folder"
        for name in MODEL_SETTINGS
        if settings.get(name) and not (release / settings[name]).is_dir()
    ]
    if not settings.get("AVIBE_MODEL_PATH") and not settings.get("AVISION_MODEL_PATH"):
        problems.append("no model is configured: set AVIBE_MODEL_PATH or AVISION_MODEL_PATH")
    return problems


# The card.


def is_cpu(settings: Mapping[str, str]) -> bool:
    return settings.get("AVITO_DEVICE") == "cpu"


def read_gpus() -> list[Gpu] | None:
    """The cards by nvidia-smi; None: it is not here or fails, so there is no working driver."""
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse_gpus(result.stdout) if result.returncode == 0 else None


def parse_gpus(listing: str) -> list[Gpu]:
    gpus = []
    for line in listing.strip().splitlines():
        number, uuid, name, driver, total, free = (cell.strip() for cell in line.split(","))
        # A card that shares the host's memory says "[N/A]".
        sizes = [int(cell) * MIB if cell.isdecimal() else 0 for cell in (total, free)]
        gpus.append(Gpu(int(number), uuid, name, driver, *sizes))
    return gpus


def read_gpu_bytes_of(pids: set[int]) -> dict[str, int]:
    """Memory that these processes hold, by the card's UUID."""
    held: dict[str, int] = {}
    query = ["nvidia-smi", "--query-compute-apps=gpu_uuid,pid,used_memory", "--format=csv,noheader,nounits"]
    for line in run_quietly(query).splitlines():
        uuid, pid, used = (cell.strip() for cell in line.split(","))
        if pid.isdecimal() and int(pid) in pids and used.isdecimal():
            held[uuid] = held.get(uuid, 0) + int(used) * MIB
    return held


def pick_gpu(gpus: list[Gpu], environment: Mapping[str, str]) -> Gpu | str:
    """The card that the service will use, or the problem.

    :param environment: of the service: CUDA_VISIBLE_DEVICES picks and orders, AVITO_DEVICE=cuda:N counts in that.
    """
    there = ", ".join(f"{gpu.number} ({gpu.name})" for gpu in gpus) or "none"
    visible = gpus
    wanted = environment.get("CUDA_VISIBLE_DEVICES")
    if wanted is not None:
        visible = []
        for entry in (part.strip() for part in wanted.split(",")):
            found = [g for g in gpus if entry and (str(g.number) == entry or g.uuid.startswith(entry))]
            if not found:
                break  # as CUDA does: the first that is not there ends the list
            visible += found
    _, _, number = environment.get("AVITO_DEVICE", "auto").partition(":")
    if int(number or 0) < len(visible):
        return visible[int(number or 0)]
    asked = f"AVITO_DEVICE={environment.get('AVITO_DEVICE', 'auto')}"
    if wanted is not None:
        asked += f" with CUDA_VISIBLE_DEVICES={wanted}"
    return f"{asked} asks for a card that is not there; nvidia-smi shows: {there}"


def check_gpu(gpus: list[Gpu] | None, environment: Mapping[str, str], ours: Mapping[str, int]) -> list[str]:
    """:param ours: bytes that the running service holds, by the card's UUID: it will have gone by then."""
    if gpus is None:
        return [
            "there is no working NVIDIA driver (nvidia-smi does not answer): install one (apt install "
            "nvidia-driver-580-server, then reboot), or set AVITO_DEVICE=cpu to run without a card"
        ]
    gpu = pick_gpu(gpus, environment)
    if isinstance(gpu, str):
        return [gpu]
    try:
        fraction = float(environment.get("AVITO_GPU_MEMORY_FRACTION") or 0.9)
    except ValueError:
        return []  # the release says what is wrong with it
    free_bytes, needed_bytes = gpu.free_bytes + ours.get(gpu.uuid, 0), fraction * gpu.total_bytes
    if free_bytes < needed_bytes:
        return [
            f"card {gpu.number} ({gpu.name}) has {free_bytes / GB:.0f} GB of free memory and "
            f"AVITO_GPU_MEMORY_FRACTION={fraction:g} asks for {needed_bytes / GB:.0f} GB: end what else uses it "
            "(nvidia-smi lists it), or lower the fraction, or name another card in CUDA_VISIBLE_DEVICES"
        ]
    return []


def check_torch(torch: str, cuda: str | None, sees_cuda: bool, driver: str, settings_file: Path) -> list[str]:
    """Whether this build of torch works with this driver.

    :param torch: its version. :param cuda: the CUDA that it was built for, as torch.version.cuda; None: for CPUs.
    :param sees_cuda: torch.cuda.is_available().
    :param driver: its version, by nvidia-smi.
    """
    if cuda is None:
        return [
            f"torch {torch} is a build for CPUs: set AVITO_TORCH_INDEX_URL in {settings_file} to an index of a "
            "build for CUDA, or to nothing for the usual one, or AVITO_DEVICE=cpu"
        ]
    if sees_cuda:
        return []
    needed = MIN_DRIVERS.get(int(cuda.split(".")[0]))
    if needed and _numbers(driver) < _numbers(needed):
        fits = [str(major) for major, least in MIN_DRIVERS.items() if _numbers(driver) >= _numbers(least)]
        older = f"CUDA {fits[-1]}" if fits else "an older CUDA"
        return [
            f"the NVIDIA driver {driver} is too old for torch {torch}, which was built for CUDA {cuda} and needs "
            f"{needed} or newer: install that, or set AVITO_TORCH_INDEX_URL in {settings_file} to an index of "
            f"the same torch built for {older} (https://download.pytorch.org/whl/ lists them)"
        ]
    return [
        f"torch {torch} (CUDA {cuda}) sees no card although the driver {driver} answers: look at "
        "CUDA_VISIBLE_DEVICES, at the rights of /dev/nvidia*, and whether the driver was updated without a reboot"
    ]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def run_quietly(command: list[str]) -> str:
    """Its output; empty if it is not here, fails or hangs."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout if result.returncode == 0 else ""


def process_tree(root: int) -> set[int]:
    """A process and all that descend from it."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
        except (OSError, IndexError, ValueError):
            continue  # it has just ended
    tree = {root}
    while more := {pid for pid, parent in parents.items() if parent in tree} - tree:
        tree |= more
    return tree


def has_systemd() -> bool:
    return os.path.isdir("/run/systemd/system")  # noqa: PTH112 as sd_booted(3) looks
