"""How every benchmark shows what it measured: a table on the terminal, JSON and a plot in files, a progress bar.

A benchmark has rows (frozen dataclasses) and says which columns of them the table shows; the JSON file holds all of
their fields. Measures nothing itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, TypeVar

import psutil

from config import VERSION

Row = TypeVar("Row")
# What a number of a table is drawn from; None, for what was not measured, is shown as a dash.
Value = float | int | str | None


class Unable(Exception):
    """The benchmark cannot run like this; the message is one sentence for whoever started it."""


@dataclass(frozen=True)
class Spread:
    """What is told of many measurements of one quantity; the unit is in the name of the field that holds it."""

    num: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True)
class Machine:
    """Where it was measured. `gpus` are all cards that NVML shows; empty without a driver."""

    cpu: str
    num_cores: int
    memory_bytes: int
    gpus: tuple[str, ...]
    system: str
    python: str
    torch: str | None
    transformers: str | None


@dataclass(frozen=True)
class Column(Generic[Row]):
    """One column: columns side by side with the same `group` share a heading above theirs."""

    title: str
    read: Callable[[Row], Value]
    group: str = ""
    is_left: bool = False


@dataclass(frozen=True)
class Panel:
    """One drawing of a plot: lines over numbers, or groups of bars over names. One series: (x, y) in order."""

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, Sequence[tuple[float | str, float]]]


def spread(values: Sequence[float]) -> Spread | None:
    """None of no values."""
    if not values:
        return None
    ordered = sorted(values)
    p50, p90, p99 = (percentile(ordered, percent) for percent in (50, 90, 99))
    return Spread(len(ordered), sum(ordered) / len(ordered), p50, p90, p99, ordered[-1])


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Between the two nearest of at least one ascending value, linearly: what `numpy.percentile` does by default."""
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


# The table.


def render_table(columns: Sequence[Column[Row]], rows: Sequence[Row]) -> str:
    """Aligned plain text, a line for each row, and above the titles a line of group headings if there are any."""
    cells = [[show(column.read(row)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in [[c.title for c in columns], *cells]) for i in range(len(columns))]
    spans = _spans(columns)
    for name, first, last in spans:  # a heading that is wider than its columns widens the first of them
        missing = len(name) - sum(widths[first : last + 1]) - 2 * (last - first)
        widths[first] += max(0, missing)
    lines = []
    if any(name for name, _, _ in spans):
        lines.append("  ".join(name.center(sum(widths[a : b + 1]) + 2 * (b - a)) for name, a, b in spans))
    for line in [[column.title for column in columns], *cells]:
        aligned = [
            text.ljust(width) if column.is_left else text.rjust(width)
            for text, width, column in zip(line, widths, columns, strict=True)
        ]
        lines.append("  ".join(aligned))
    return "\n".join(line.rstrip() for line in lines)


def _spans(columns: Sequence[Column[Row]]) -> list[tuple[str, int, int]]:
    """(group, first, last) of neighbouring columns with one group; columns without one stand alone."""
    spans: list[tuple[str, int, int]] = []
    for i, column in enumerate(columns):
        if spans and column.group and spans[-1][0] == column.group:
            spans[-1] = (column.group, spans[-1][1], i)
        else:
            spans.append((column.group, i, i))
    return spans


def show(value: Value) -> str:
    """A number with about three digits that mean something; a dash for None."""
    if value is None:
        return "-"
    if isinstance(value, float):
        digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
        return f"{value:.{digits}f}"
    return str(value)


def milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


# Files.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--json` and `--plot`, the same in each benchmark."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures, the machine and the options")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw them (needs matplotlib)")


def check_files(json_file: Path | None, plot_file: Path | None) -> None:
    """Before minutes of measuring rather than after them.

    :raise Unable: a folder is missing, the plot is to be no PNG, or matplotlib is missing.
    """
    for file in (json_file, plot_file):
        if file is not None and not file.absolute().parent.is_dir():
            raise Unable(f"{file}: there is no folder {file.absolute().parent}")
    if plot_file is None:
        return
    if plot_file.suffix != ".png":
        raise Unable(f"--plot {plot_file}: the file must end in .png")
    if importlib.util.find_spec("matplotlib") is None:
        raise Unable("--plot needs matplotlib, which is not installed: pip install -r requirements-dev.txt")


def write_json(
    file: Path, arguments: argparse.Namespace, rows: Sequence[Any], notes: Sequence[str], **chosen: Any
) -> None:
    """:param rows: dataclasses, each with all of its fields. :param chosen: what stands among the options too."""
    options = {name: value for name, value in vars(arguments).items() if name not in ("command", "argv")} | chosen
    if options.get("key"):
        options["key"] = "***"
    report = {
        "benchmark": arguments.command,
        "version": VERSION,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(arguments.argv),
        "machine": dataclasses.asdict(read_machine()),
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in options.items()},
        "rows": [dataclasses.asdict(row) for row in rows],
        "notes": list(notes),
    }
    file.write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def write_plot(file: Path, title: str, panels: Sequence[Panel]) -> None:
    """A PNG with the panels side by side. Needs matplotlib, see `check_files`."""
    from matplotlib.figure import Figure  # the class and not pyplot: no window system, no state

    figure = Figure(figsize=(5.2 * len(panels), 4.2), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=10)
    for number, panel in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), number)
        names = list(dict.fromkeys(x for points in panel.series.values() for x, _ in points))
        are_numbers = not any(isinstance(name, str) for name in names)
        for index, (label, points) in enumerate(panel.series.items()):
            heights = [y for _, y in points]
            if are_numbers:
                axes.plot([float(x) for x, _ in points], heights, marker="o", label=label)
            else:
                width = 0.8 / len(panel.series)
                places = [names.index(x) + (index - (len(panel.series) - 1) / 2) * width for x, _ in points]
                axes.bar(places, heights, width, label=label)
        if are_numbers and names and min(float(name) for name in names) > 0:
            axes.set_xscale("log", base=2)
            axes.set_xticks([float(name) for name in names], [f"{name:g}" for name in map(float, names)])
            axes.minorticks_off()
        elif not are_numbers:
            axes.set_xticks(range(len(names)), [str(name) for name in names], rotation=20, ha="right")
        axes.margins(y=0.1)
        axes.set_ylim(bottom=0)
        axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
        axes.grid(alpha=0.3)
        if panel.series:
            axes.legend(fontsize=8)
    figure.savefig(file, format="png")


def command_line(argv: Sequence[str]) -> str:
    """As it could be typed again, but with the token of `--key` hidden."""
    shown = ["python", "-m", "bench"]
    is_secret = False
    for argument in argv:
        name, equals, _ = argument.partition("=")
        shown.append("***" if is_secret else "--key=***" if equals and name == "--key" else argument)
        is_secret = argument == "--key"
    return shlex.join(shown)


def read_machine() -> Machine:
    return Machine(
        cpu=_cpu_model(),
        num_cores=len(os.sched_getaffinity(0)),
        memory_bytes=psutil.virtual_memory().total,
        gpus=_gpu_names(),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        torch=_version("torch"),
        transformers=_version("transformers"),
    )


def describe(machine: Machine) -> str:
    """One line for the terminal."""
    gpus = ", ".join(machine.gpus) or "no GPU"
    return f"{machine.cpu}, {machine.num_cores} cores, {gpus}, torch {machine.torch or '-'}"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _gpu_names() -> tuple[str, ...]:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return tuple(str(pynvml.nvmlDeviceGetName(handle)) for handle in handles)
    except pynvml.NVMLError:
        return ()
    finally:
        pynvml.nvmlShutdown()


def _version(package: str) -> str | None:
    """From the package's metadata: importing torch for it would take seconds and a card's memory."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# Progress.


class Progress:
    """A bar on stderr, or nothing at all where that is no terminal. `advance` from one thread."""

    def __init__(self, bar: Any = None) -> None:
        self._bar = bar
        self._task: Any = None

    def start(self, what: str, total: float | None) -> None:
        """:param total: how much `advance` will add up to; None: not known."""
        if self._bar is not None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(what, total=total)

    def advance(self, amount: float = 1.0) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, amount)


@contextmanager
def progress() -> Iterator[Progress]:
    if not sys.stderr.isatty():
        yield Progress()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Drawn twice a second: the cores may be shared with the server that is being measured.
    with Bar(*columns, console=Console(stderr=True), refresh_per_second=2, transient=True) as bar:
        yield Progress(bar)
