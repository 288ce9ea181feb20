"""Text and picture streams in one engine: each load alone, then both at once, and what share of its rate each keeps.

In this process, without HTTP: `python -m bench mixed` is the same over HTTP. Each stream is a closed loop of requests,
prompts and pictures new to every cache; a picture's patches are made before, its encoding by the vision tower counts.
Rates are of the tokens that came in a window in which all streams are at work.
"""

from __future__ import annotations

import argparse
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from bench import report
from bench.engine import Engine, Stream, as_new, encode, picture_request, random_prompt, sampling
from bench.load import picture_size
from bench.models import BenchModel, add_model_arguments, add_picture_model_arguments, load, source_of
from bench.report import Column, Panel, Spread, Unable, milliseconds, spread
from models.prompts import EncodedPrompt

# Share of the duration that is let pass before the window begins.
_LEAD_IN = 0.25
# Pictures that are prepared; requests take turns with them, under new names.
_NUM_PICTURES = 8
_TEMPERATURE = 0.7


@dataclass(frozen=True)
class PairRow:
    """One load in one phase, all rounds together. `share` is of the rate of the same load alone, in tokens/s."""

    kind: str
    is_alone: bool
    num_streams: int
    num_tokens: int
    tokens_per_s: float
    share: float | None
    gap_s: Spread | None


class _Load:
    """Closed loops of one model: a stream that ends is followed by the next at once, in the loop's thread."""

    def __init__(
        self,
        engine: Engine,
        kind: str,
        model: BenchModel,
        prompts: Sequence[EncodedPrompt],
        num_streams: int,
        max_tokens: int,
    ) -> None:
        self.kind, self.num_streams = kind, num_streams
        self._engine, self._model, self._prompts = engine, model, prompts
        self._max_tokens = max_tokens
        self._dice = random.Random(kind)
        self._numbers = count()

    def run(self, is_over: threading.Event) -> _Running:
        running = _Running()
        for _ in range(self.num_streams):
            self._add(running, is_over)
        return running

    def _add(self, running: _Running, is_over: threading.Event) -> None:
        number = next(self._numbers)

        def on_end(stream: Stream) -> None:
            if stream.error is None and not is_over.is_set():
                self._add(running, is_over)

        prompt = as_new(self._dice, self._prompts[number % len(self._prompts)])
        options = sampling(self._max_tokens, _TEMPERATURE, number)
        stream = Stream(prompt, options, lambda _: is_over.is_set(), on_end)
        running.streams.append(stream)
        self._engine.add(self._model.name, stream)


class _Running:
    """The streams of one load in one phase, ended ones included."""

    def __init__(self) -> None:
        self.streams: list[Stream] = []


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_picture_model_arguments(parser)
    parser.add_argument("--text-streams", type=int, default=32, metavar="N", help="(default 32)")
    parser.add_argument("--image-streams", type=int, default=8, metavar="N", help="(default 8)")
    parser.add_argument("--duration", type=float, default=10.0, metavar="S", help="of each phase (default 10)")
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help="of the three phases (default 2)")
    parser.add_argument("--prompt-tokens", type=int, default=448, metavar="N", help="of a text request (default 448)")
    parser.add_argument("--answer-tokens", type=int, default=128, metavar="N", help="of either (default 128)")
    parser.add_argument("--pictures", type=picture_size, default=(1024, 768), metavar="WxH", help="(default 1024x768)")
    report.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """:raise Unable:"""
    report.check_files(arguments.json, arguments.plot)
    sources = (
        source_of(arguments, is_picture_model=False),
        source_of(arguments, is_picture_model=True, prefix="picture_"),
    )
    dice = random.Random(0)
    with report.progress() as bar:
        bar.start("loading", None)
        text = load(sources[0], arguments.text_streams)
        pictures = load(sources[1], arguments.image_streams)
        encoder = pictures.make_encoder()
        picture_prompts = [
            encode(encoder, picture_request(dice, arguments.pictures, pictures.limits)) for _ in range(_NUM_PICTURES)
        ]
        text_prompts = [random_prompt(dice, text, arguments.prompt_tokens) for _ in range(arguments.text_streams)]
        answer = arguments.answer_tokens
        runners = [
            (text, text.make_runner(arguments.text_streams, arguments.prompt_tokens + answer)),
            (pictures, pictures.make_runner(arguments.image_streams, len(picture_prompts[0].ids) + answer)),
        ]
        with Engine(runners) as engine:
            loads = [
                _Load(engine, "text", text, text_prompts, arguments.text_streams, answer),
                _Load(engine, "pictures", pictures, picture_prompts, arguments.image_streams, answer),
            ]
            measured: dict[tuple[str, bool], list[_Window]] = {}
            for number in range(arguments.rounds):
                for chosen in (loads[:1], loads[1:], loads):
                    bar.start(f"round {number + 1}: {' and '.join(one.kind for one in chosen)}", None)
                    for window in _measure(engine, chosen, arguments.duration):
                        measured.setdefault((window.kind, len(chosen) == 1), []).append(window)
    rows = make_rows(measured, {one.kind: one.num_streams for one in loads})
    notes = [text.describe(), pictures.describe()]
    total = share_sum(rows)
    print(report.describe(report.read_machine()))
    print(f"\n{sources[0].label} and {sources[1].label}\n{report.render_table(TABLE, rows)}\n")
    print(f"The two shares add up to {report.show(total)}")
    for note in notes:
        print(f"- {note}")
    if arguments.json:
        report.write_json(arguments.json, arguments, rows, notes, share_sum=total)
    if arguments.plot:
        bars: dict[str, list[tuple[float | str, float]]] = {
            name: [(row.kind, row.tokens_per_s) for row in rows if row.is_alone == is_alone]
            for name, is_alone in (("alone", True), ("together", False))
        }
        report.write_plot(arguments.plot, "Both models in one engine", [Panel("Output", "", "tokens/s", bars)])
    return 0


@dataclass(frozen=True)
class _Window:
    """What one load did in the window of one phase."""

    kind: str
    seconds: float
    num_tokens: int
    gaps_s: tuple[float, ...]


def _measure(engine: Engine, loads: Sequence[_Load], duration_s: float) -> list[_Window]:
    """All of these loads at once. :raise Unable: a stream failed."""
    is_over = threading.Event()
    begun_s = time.perf_counter()
    begin_s, end_s = begun_s + _LEAD_IN * duration_s, begun_s + (1 + _LEAD_IN) * duration_s
    running = [one.run(is_over) for one in loads]
    is_over.wait(end_s - begun_s)  # nobody sets it before
    is_over.set()
    windows = []
    for one, found in zip(loads, running, strict=True):
        engine.wait(found.streams)
        times = [at for stream in found.streams for at in stream.times_s if begin_s < at <= end_s]
        gaps = [gap for stream in found.streams for gap in stream.gaps_s(begin_s, end_s)]
        windows.append(_Window(one.kind, end_s - begin_s, len(times), tuple(gaps)))
    return windows


def make_rows(measured: dict[tuple[str, bool], list[_Window]], num_streams: dict[str, int]) -> list[PairRow]:
    """:raise Unable: a load had not one token in its window."""
    rows: list[PairRow] = []
    for is_alone in (True, False):
        for kind, num in num_streams.items():
            windows = measured[kind, is_alone]
            num_tokens = sum(window.num_tokens for window in windows)
            if not num_tokens:
                raise Unable(f"{kind}: no token came within the time, --duration must be longer")
            rate = num_tokens / sum(window.seconds for window in windows)
            alone = next((row.tokens_per_s for row in rows if row.kind == kind and row.is_alone), rate)
            rows.append(
                PairRow(
                    kind=kind,
                    is_alone=is_alone,
                    num_streams=num,
                    num_tokens=num_tokens,
                    tokens_per_s=rate,
                    share=None if is_alone else rate / alone,
                    gap_s=spread([gap for window in windows for gap in window.gaps_s]),
                )
            )
    return rows


def share_sum(rows: Sequence[PairRow]) -> float:
    return sum(row.share for row in rows if row.share is not None)


TABLE: tuple[Column[PairRow], ...] = (
    Column("load", lambda row: f"{row.kind}, {'alone' if row.is_alone else 'together'}", is_left=True),
    Column("streams", lambda row: row.num_streams),
    Column("tokens/s", lambda row: row.tokens_per_s),
    Column("share of alone", lambda row: row.share),
    Column("p50", lambda row: milliseconds(row.gap_s.p50 if row.gap_s else None), "between tokens, ms"),
    Column("p99", lambda row: milliseconds(row.gap_s.p99 if row.gap_s else None), "between tokens, ms"),
)
