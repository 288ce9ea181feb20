"""Text and pictures together: each load alone, then both at once, and what share of its own rate each keeps.

On one card that runs one thing at a time the two shares add up to 1; what they add up to above that is what running
both at once gains. Rates are those of a window in which all clients are at work: an answer that lies only partly in
it counts with that part.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal

from bench import report
from bench.client import Client, Finished, Job, Take
from bench.dialects import Demand, Target, find_target
from bench.load import Sample, add_server_arguments, failure_notes, fresh_seed, picture_size, sample_of
from bench.report import Column, Panel, Progress, Spread, Value, milliseconds, spread

Kind = Literal["text", "pictures"]
KINDS: tuple[Kind, ...] = ("text", "pictures")
# Share of the duration that is let pass before the window begins, so that all clients are in their stride.
_LEAD_IN = 0.2
_PREPARED_PER_CLIENT = 4


@dataclass(frozen=True)
class MixedRow:
    """One kind of request in one phase, all rounds together. `share` is of the rate of the same load alone."""

    kind: Kind
    is_alone: bool
    num_clients: int
    num_requests: int
    failures: int
    output_tokens_per_s: float
    requests_per_s: float
    share: float | None
    time_to_first_token_s: Spread | None
    time_per_output_token_s: Spread | None


@dataclass(frozen=True)
class _Phase:
    """What was measured of one kind in one run of the loop; the window in readings of `time.perf_counter`."""

    samples: tuple[Sample, ...]
    window_s: tuple[float, float]


class _Load:
    """One kind of request: whom to ask, for what, and by how many clients. No two requests are alike, in any phase."""

    def __init__(self, target: Target, demand: Demand, num_clients: int, name: str) -> None:
        self.target = target
        self.demand = demand
        self.num_clients = num_clients
        self._name = name
        self._numbers = count()
        self._prepared: list[Job] = []

    def prepare(self) -> None:
        """Make some before the clock starts: pictures take a while."""
        self._prepared += [self._make() for _ in range(_PREPARED_PER_CLIENT * self.num_clients - len(self._prepared))]

    def next_job(self) -> Job:
        return self._prepared.pop() if self._prepared else self._make()

    def _make(self) -> Job:
        return self.target.job(random.Random(f"{self._name}/{next(self._numbers)}"), self.demand)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_server_arguments(parser)
    parser.add_argument("--model", help="the text model's name there (default: the first that /v1/models lists)")
    parser.add_argument("--picture-model", metavar="NAME", help="the other's (default: the same)")
    parser.add_argument("--text-streams", type=int, default=32, metavar="N", help="clients (default 32)")
    parser.add_argument("--image-streams", type=int, default=8, metavar="N", help="clients (default 8)")
    parser.add_argument("--duration", type=float, default=30.0, metavar="S", help="of each phase (default 30)")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="of the three phases (default 1)")
    parser.add_argument("--prompt-tokens", type=int, default=448, metavar="N", help="of a text request (default 448)")
    parser.add_argument("--picture-prompt-tokens", type=int, default=16, metavar="N", help="beside it (default 16)")
    parser.add_argument("--answer-tokens", type=int, default=128, metavar="N", help="of either (default 128)")
    parser.add_argument("--pictures", type=picture_size, default=(1024, 768), metavar="WxH", help="(default 1024x768)")
    parser.add_argument("--no-stream", action="store_true", help="ask for whole answers")
    report.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """:return: 1 if any request failed. :raise Unable:"""
    report.check_files(arguments.json, arguments.plot)
    seed = fresh_seed(arguments.seed)
    phases: dict[tuple[Kind, bool], list[_Phase]] = {(kind, alone): [] for kind in KINDS for alone in (True, False)}
    with Client(arguments.url, arguments.timeout) as client, report.progress() as bar:
        loads: dict[Kind, _Load] = {}
        for kind in KINDS:
            bar.start(f"asking for {kind}", None)
            loads[kind] = _find_load(client, arguments, kind, seed)
        for number in range(arguments.rounds):
            for kinds in (KINDS[:1], KINDS[1:], KINDS):
                bar.start(f"round {number + 1}: {' and '.join(kinds)}", None)
                mine = {kind: loads[kind] for kind in kinds}
                for kind, phase in _measure(client, mine, arguments.duration, bar).items():
                    phases[kind, len(kinds) == 1].append(phase)
    rows = make_rows(phases, {kind: load.num_clients for kind, load in loads.items()})
    notes = [note for load in loads.values() for note in load.target.notes]
    for (kind, is_alone), found in phases.items():
        where = f"{kind} {'alone' if is_alone else 'with the other'}"
        notes += failure_notes(where, [sample for phase in found for sample in phase.samples])
    _tell(arguments, rows, list(dict.fromkeys(notes)), seed)
    return int(any(row.failures for row in rows))


def _find_load(client: Client, arguments: argparse.Namespace, kind: Kind, seed: int) -> _Load:
    is_picture = kind == "pictures"
    model = (arguments.picture_model or arguments.model) if is_picture else arguments.model
    target = find_target(client, arguments.url, arguments.api, model, arguments.key, not arguments.no_stream)
    demand = Demand(arguments.answer_tokens, picture_px=arguments.pictures if is_picture else None)
    prompt_tokens = arguments.picture_prompt_tokens if is_picture else arguments.prompt_tokens
    target.probe(random.Random(f"{seed}/{kind}/probe"), demand, prompt_tokens)
    clients = arguments.image_streams if is_picture else arguments.text_streams
    return _Load(target, demand, clients, f"{seed}/{kind}")


def _measure(client: Client, loads: dict[Kind, _Load], duration_s: float, bar: Progress) -> dict[Kind, _Phase]:
    """All loads at once, for the lead-in and the window; what is under way at its end is let finish."""
    samples: dict[Kind, list[Sample]] = {kind: [] for kind in loads}
    readers: dict[int, Kind] = {}  # by id of the request's reader, while it runs
    for load in loads.values():
        load.prepare()
    begun_s = time.perf_counter()
    window = begun_s + _LEAD_IN * duration_s, begun_s + (1 + _LEAD_IN) * duration_s

    def taking(kind: Kind, load: _Load) -> Take:
        def take() -> Job | None:
            if time.perf_counter() >= window[1]:
                return None
            job = load.next_job()
            readers[id(job.reader)] = kind
            return job

        return take

    def deliver(finished: Finished) -> None:
        samples[readers.pop(id(finished.job.reader))].append(sample_of(finished))
        bar.advance()

    takes: list[Take] = []
    for kind, load in loads.items():
        takes += [taking(kind, load)] * load.num_clients
    client.run(takes, deliver)
    return {kind: _Phase(tuple(found), window) for kind, found in samples.items()}


def part_in(window_s: tuple[float, float], sample: Sample) -> float:
    """Which part of a request's time lies in the window, 0 to 1."""
    begin, end = max(window_s[0], sample.started_s), min(window_s[1], sample.ended_s)
    length = sample.ended_s - sample.started_s
    return max(0.0, end - begin) / length if length > 0 else float(window_s[0] <= sample.started_s < window_s[1])


def make_rows(phases: dict[tuple[Kind, bool], list[_Phase]], num_clients: dict[Kind, int]) -> list[MixedRow]:
    """Text alone, pictures alone, then both together with their shares."""
    rows: list[MixedRow] = []
    for is_alone in (True, False):
        for kind in KINDS:
            found = phases[kind, is_alone]
            samples = [sample for phase in found for sample in phase.samples]
            good = [sample for sample in samples if sample.failure is None]
            seconds = sum(phase.window_s[1] - phase.window_s[0] for phase in found)
            parts = [(s, part_in(phase.window_s, s)) for phase in found for s in phase.samples if s.failure is None]
            requests_per_s = sum(part for _, part in parts) / seconds if seconds else 0.0
            alone = next((row.requests_per_s for row in rows if row.kind == kind and row.is_alone), None)
            firsts = [s.time_to_first_token_s for s in good if s.time_to_first_token_s is not None]
            per_token = [s.time_per_output_token_s for s in good if s.time_per_output_token_s is not None]
            rows.append(
                MixedRow(
                    kind=kind,
                    is_alone=is_alone,
                    num_clients=num_clients[kind],
                    num_requests=len(samples),
                    failures=len(samples) - len(good),
                    output_tokens_per_s=sum((s.output_tokens or 0) * part for s, part in parts) / (seconds or 1.0),
                    requests_per_s=requests_per_s,
                    share=requests_per_s / alone if alone else None,
                    time_to_first_token_s=spread(firsts),
                    time_per_output_token_s=spread(per_token),
                )
            )
    return rows


def share_sum(rows: Sequence[MixedRow]) -> float | None:
    """The two shares added up; None where one of them is not known."""
    shares = [row.share for row in rows if not row.is_alone]
    known = [share for share in shares if share is not None]
    return sum(known) if len(known) == len(KINDS) else None


def _columns(group: str, read: Callable[[MixedRow], Spread | None]) -> list[Column[MixedRow]]:
    def reading(name: str) -> Callable[[MixedRow], Value]:
        return lambda row: milliseconds(getattr(read(row), name, None))

    return [Column(name, reading(name), group) for name in ("p50", "p99")]


TABLE: tuple[Column[MixedRow], ...] = (
    Column("load", lambda row: f"{row.kind}, {'alone' if row.is_alone else 'together'}", is_left=True),
    Column("clients", lambda row: row.num_clients),
    Column("requests", lambda row: row.num_requests),
    Column("failed", lambda row: row.failures),
    Column("tokens/s", lambda row: row.output_tokens_per_s),
    Column("req/s", lambda row: row.requests_per_s),
    Column("share of alone", lambda row: row.share),
    *_columns("to first token, ms", lambda row: row.time_to_first_token_s),
    *_columns("per output token, ms", lambda row: row.time_per_output_token_s),
)


def _tell(arguments: argparse.Namespace, rows: Sequence[MixedRow], notes: Sequence[str], seed: int) -> None:
    print(report.describe(report.read_machine()))
    print(f"\n{arguments.url}\n{report.render_table(TABLE, rows)}\n")
    print(f"The two shares add up to {report.show(share_sum(rows))}")
    for note in [*notes, f"seed {seed}"]:
        print(f"- {note}")
    if arguments.json:
        report.write_json(arguments.json, arguments, rows, notes, seed=seed, share_sum=share_sum(rows))
    if arguments.plot:
        bars = {
            name: [(f"{row.kind}", row.output_tokens_per_s) for row in rows if row.is_alone == is_alone]
            for name, is_alone in (("alone", True), ("together", False))
        }
        report.write_plot(arguments.plot, arguments.url, [Panel("Text and pictures", "", "tokens/s", bars)])
