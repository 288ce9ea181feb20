"""Say how much `pip install` is about to download, before it does.

Asks pip for its plan (a dry run, which installs nothing) and sums the sizes of the files in it. It
only informs: whatever goes wrong is told in a line, and the exit code stays 0.

    python tools/download_size.py -r requirements.txt    (arguments as for pip install)
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

HEAD_TIMEOUT_S = 5
UNPACKED_FACTOR = 3.5  # wheel and unpacked files side by side: 2.5 measured for torch, and some air

SizeOf = Callable[[str], int | None]


class Plan(NamedTuple):
    """What pip would download: bytes by package name, None where the size could not be learned."""

    sizes_bytes: dict[str, int | None]

    @property
    def total_bytes(self) -> int:
        return sum(size or 0 for size in self.sizes_bytes.values())

    @property
    def unknown(self) -> int:
        return sum(size is None for size in self.sizes_bytes.values())


def size_of(url: str) -> int | None:
    """Bytes behind a URL of pip's plan, or None."""
    parts = urllib.parse.urlsplit(url)
    try:
        if parts.scheme == "file":
            return Path(urllib.request.url2pathname(parts.path)).stat().st_size
        request = urllib.request.Request(url, method="HEAD")
        with urllib.request.urlopen(request, timeout=HEAD_TIMEOUT_S) as response:
            length = response.headers.get("Content-Length")
            return int(length) if length else None
    except (OSError, ValueError):  # URLError and time-outs are OSErrors
        return None


def read_plan(report: dict[str, Any], size_of: SizeOf = size_of) -> Plan:
    """The plan in a report of `pip install --report` (version 1 of its format)."""
    entries = [(item["metadata"]["name"].lower(), item["download_info"]["url"]) for item in report["install"]]
    with ThreadPoolExecutor(max_workers=16) as pool:
        sizes = pool.map(size_of, (url for _, url in entries))
        return Plan(dict(zip((name for name, _ in entries), sizes, strict=True)))


def human(size_bytes: int) -> str:
    if size_bytes >= 1_000_000_000:
        return f"{size_bytes / 1e9:.1f} GB"
    return f"{max(size_bytes, 1_000_000) / 1e6:.0f} MB"


def describe(plan: Plan, free_bytes: int, has_gpu: bool) -> list[str]:
    """The lines to print: the total with its largest parts, then what deserves a warning."""
    if not plan.sizes_bytes:
        return ["Nothing to download"]
    known = sorted(((size, name) for name, size in plan.sizes_bytes.items() if size), reverse=True)
    large = [f"{name} {human(size)}" for size, name in known if size * 10 >= plan.total_bytes]
    detail = f" ({', '.join(large)})" if large else ""
    count = len(plan.sizes_bytes)
    line = f"Downloading {count} package{'' if count == 1 else 's'}, {human(plan.total_bytes)}{detail}"
    if plan.unknown:
        line += f", and {plan.unknown} of unknown size"
    lines = [line]
    if not has_gpu and any(name.startswith("nvidia-cu") for name in plan.sizes_bytes):
        lines.append(
            "There is no GPU here, and most of this is for GPUs: AVITO_TORCH_INDEX_URL, set to an index of "
            "CPU builds of torch, makes it far smaller"
        )
    if free_bytes < plan.total_bytes * UNPACKED_FACTOR:
        need = human(int(plan.total_bytes * UNPACKED_FACTOR))
        lines.append(f"Warning: {human(free_bytes)} of disk are free, and this may take {need}")
    return lines


def main(arguments: list[str]) -> int:
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--report", "-", *arguments]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    try:
        if result.returncode != 0:
            raise ValueError((result.stderr.strip().splitlines() or ["pip gave no reason"])[-1])
        plan = read_plan(json.loads(result.stdout))
    except (ValueError, KeyError) as error:
        print(f"Downloading packages, size unknown: {error}")
        return 0
    free_bytes = shutil.disk_usage(Path.cwd()).free
    print("\n".join(describe(plan, free_bytes, has_gpu=shutil.which("nvidia-smi") is not None)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
