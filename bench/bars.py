"""The bars that the engine must reach, and what the JSON files of a run say about each: one Markdown table.

Reads the files that `tools/gpu_run.sh` writes; measures nothing. Rows that are bound by memory are held against what a
card of this one's copy bandwidth would have to reach.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import reference
from bench.report import Unable, show

Verdict = str
_PASS, _FAIL, _ABOVE_UNSCALED, _NOT_MEASURED, _NOT_JUDGED = (
    "pass",
    "FAIL",
    "FAIL scaled, pass there",
    "not measured",
    "-",
)


@dataclass(frozen=True)
class Bar:
    """One line.

    :param here: the bar scaled to this card, where it is bound by memory.
    :param ours: None: not measured.
    :param is_upper: at most the bar, else at least.
    :param is_on_cpu: a bar of machines without a card.
    """

    what: str
    unit: str
    bar: float | None
    here: float | None
    ours: float | None
    is_upper: bool = True
    is_on_cpu: bool = False

    def verdict(self) -> Verdict:
        if self.ours is None:
            return _NOT_MEASURED
        if self.bar is None:
            return _NOT_JUDGED
        if self._holds(self.bar if self.here is None else self.here):
            return _PASS
        return _ABOVE_UNSCALED if self.here is not None and self._holds(self.bar) else _FAIL

    def _holds(self, bar: float) -> bool:
        assert self.ours is not None
        return self.ours <= bar if self.is_upper else self.ours >= bar


class Results:
    """The JSON files of a run, by name without the suffix; what is missing has no rows."""

    def __init__(self, folder: Path) -> None:
        self._reports: dict[str, dict[str, Any]] = {}
        for file in sorted(folder.glob("*.json")):
            try:
                report = json.loads(file.read_text(encoding="utf-8"))
            except ValueError:
                continue  # cut off: as if it were not there
            if isinstance(report, dict) and "rows" in report:
                self._reports[file.stem] = report

    @property
    def names(self) -> list[str]:
        return list(self._reports)

    def machine(self) -> str:
        machines = [report["machine"] for report in self._reports.values()]
        return ", ".join(machines[0]["gpus"]) or machines[0]["cpu"] if machines else "-"

    def option(self, name: str, key: str) -> Any:
        return self._reports.get(name, {}).get("options", {}).get(key)

    def rows(self, name: str) -> list[dict[str, Any]]:
        return list(self._reports.get(name, {}).get("rows", []))

    def value(self, name: str, key: str, **where: Any) -> Any:
        """`key` of the first row that has these values; None if there is none. A dot goes into a nested object."""
        for row in self.rows(name):
            if all(row.get(field) == value for field, value in where.items()):
                found: Any = row
                for part in key.split("."):
                    found = found.get(part) if isinstance(found, dict) else None
                if found is not None:
                    return found
        return None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="where the JSON files are")
    parser.add_argument("--tried-out", action="store_true", help="tiny shapes or no card: show figures, judge none")


def run(arguments: argparse.Namespace) -> int:
    """:return: 1 if a bar was measured and not reached. :raise Unable: there is no folder."""
    if not arguments.folder.is_dir():
        raise Unable(f"{arguments.folder}: there is no such folder")
    results = Results(arguments.folder)
    bars = all_bars(results)
    verdicts = [bar.verdict() if bar.is_on_cpu or not arguments.tried_out else _NOT_JUDGED for bar in bars]
    print(render(results, bars, verdicts))
    return int(any(verdict in (_FAIL, _ABOVE_UNSCALED) for verdict in verdicts))


def all_bars(results: Results) -> list[Bar]:
    copied = results.option("decode", "copy_gb_per_s")
    makers: tuple[Callable[[Results, float | None], list[Bar]], ...] = (
        _decode,
        _prefill,
        _vision,
        _pair,
        _http,
        _start,
        _same_answer,
        _cpu,
    )
    return [bar for maker in makers for bar in maker(results, copied)]


def _decode(results: Results, copied: float | None) -> list[Bar]:
    bars = []
    for name, how in (("decode", "greedy"), ("decode-sampled", "sampled")):
        for batch, seconds in reference.DECODE_S.items():
            ours = _milli(results.value(name, "step_s", batch=batch))
            here = _milli(reference.scaled_s(seconds, copied))
            bars.append(Bar(f"decode, batch {batch}, {how}", "ms a step", 1e3 * seconds, here, ours))
    for batch in reference.DECODE_S:
        ratio = results.value("decode", "ratio", batch=batch)
        if ratio is not None:
            bars.append(Bar(f"decode, batch {batch}: to `generate`", "times its tokens/s", None, None, ratio))
    return bars


def _prefill(results: Results, _: float | None) -> list[Bar]:
    bars = []
    for num, bar in ((1, None), (8, None), (18, None), (128, 1e3 * reference.MAX_PREFILL_S)):
        ours = _milli(results.value("prefill", "all_first_tokens_s", num_prompts=num))
        bars.append(Bar(f"prefill, {_count(num, 'prompt')} of 448 tokens", "ms", bar, None, ours))
    held = [row["held_back_s"] for row in results.rows("prefill") if "held_back_s" in row]
    worst = _milli(max(held, default=None))
    bars.append(Bar("a long prompt holds streams back", "ms", 1e3 * reference.MAX_HELD_BACK_S, None, worst))
    return bars


def _vision(results: Results, copied: float | None) -> list[Bar]:
    bars = []
    limits = {1: reference.MAX_ONE_PICTURE_S, 8: None, 32: reference.MAX_32_PICTURES_S}
    for num, limit in limits.items():
        ours = _milli(results.value("vision", "all_first_tokens_s", num_pictures=num))
        bars.append(Bar(f"{_count(num, 'picture')}, all first tokens", "ms", _milli(limit), None, ours))
    for batch, seconds in reference.PICTURE_DECODE_S.items():
        ours = _milli(results.value("vision", "step_s", batch=batch))
        here = _milli(reference.scaled_s(seconds, copied))
        bars.append(Bar(f"decode after pictures, batch {batch}", "ms a step", 1e3 * seconds, here, ours))
    return bars


def _pair(results: Results, _: float | None) -> list[Bar]:
    bar = reference.MIN_SHARE_SUM
    return [
        Bar("both models busy, in process", "sum of shares", bar, None, results.option("pair", "share_sum"), False),
        Bar("both models busy, over HTTP", "sum of shares", bar, None, results.option("mixed", "share_sum"), False),
    ]


def _http(results: Results, copied: float | None) -> list[Bar]:
    bars = []
    for clients, (rate, first_s) in reference.HTTP.items():
        here = rate * copied / reference.COPY_GB_PER_S if copied else None
        where: dict[str, Any] = {"concurrency": clients, "round": None}
        ours = results.value("load", "output_tokens_per_s", **where)
        bars.append(Bar(f"HTTP, {_count(clients, 'client')}", "tokens/s", rate, here, ours, False))
        first = _milli(results.value("load", "time_to_first_token_s.mean", **where))
        bars.append(Bar(f"HTTP, {_count(clients, 'client')}, mean to first token", "ms", 1e3 * first_s, None, first))
    for clients in (1, 8, 32):
        first = _milli(results.value("load-pictures", "time_to_first_token_s.mean", concurrency=clients, round=None))
        bars.append(
            Bar(f"HTTP, {_count(clients, 'client')} with a picture, mean to first token", "ms", None, None, first)
        )
    return bars


def _start(results: Results, _: float | None) -> list[Bar]:
    ready = [row["ready_s"] for row in results.rows("startup")]
    room = results.option("memory", "cache_share")
    percent = None if room is None else 100 * room
    return [
        Bar("ready, both models, first start (nothing compiled)", "s", None, None, ready[0] if ready else None),
        Bar("ready, both models, restart", "s", reference.MAX_READY_S, None, ready[-1] if ready else None),
        Bar("KV room, of what weights leave", "%", 100 * reference.MIN_CACHE_SHARE, None, percent, False),
    ]


def _same_answer(results: Results, _: float | None) -> list[Bar]:
    bars = []
    for is_sampled, how in ((False, "greedy"), (True, "sampled")):
        for field in ("answers", "tokens"):
            share = results.value("same-answer", f"differing_{field}", is_sampled=is_sampled)
            percent = None if share is None else 100 * share
            bars.append(Bar(f"same answer, {how}: {field} other than alone", "%", None, None, percent))
    return bars


def _cpu(results: Results, _: float | None) -> list[Bar]:
    one = results.value("cpu", "ratio", batch=1)
    many = results.value("cpu", "ratio_in_turn", batch=16)
    return [
        Bar("CPU, one stream", "times `generate`", reference.MIN_CPU_ONE_STREAM, None, one, False, True),
        Bar("CPU, 16 streams", "times `generate` in turn", reference.MIN_CPU_16_STREAMS, None, many, False, True),
    ]


def render(results: Results, bars: Sequence[Bar], verdicts: Sequence[Verdict]) -> str:
    copied = results.option("decode", "copy_gb_per_s")
    copying = "not measured" if copied is None else f"{copied:.0f} GB/s"
    lines = [
        f"On {results.machine()}; a copy on the device: {copying}, on the {reference.CARD} of the bars "
        f"{reference.COPY_GB_PER_S:.0f} GB/s.",
        "",
        "| | unit | bar | bar on this card | ours | |",
        "|---|---|---|---|---|---|",
    ]
    for bar, verdict in zip(bars, verdicts, strict=True):
        sign = "" if bar.bar is None else "≤ " if bar.is_upper else "≥ "
        limit, here = ("" if value is None else f"{sign}{show(value)}" for value in (bar.bar, bar.here))
        lines.append(f"| {bar.what} | {bar.unit} | {limit} | {here} | {show(bar.ours)} | {verdict} |")
    return "\n".join(lines)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _milli(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds
