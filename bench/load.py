"""Load over HTTP: closed loops of clients against our service or any OpenAI-compatible server, times and rates.

Each client sends its next request when its last answer has ended. Every prompt is new. Rates are over the whole round,
from the first request's start to the last answer's end. Client and server may share the machine's cores: the note on
the client's own use of a core tells whether the figures are its limit and not the server's.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise

from bench import report
from bench.client import Client, Finished, Job
from bench.dialects import APIS, AnswerReader, Api, Demand, Target, failure_of, find_target
from bench.report import Column, Panel, Progress, Spread, Value, milliseconds, spread

_WARM_UP_TOKENS = 16
_PREPARED_PER_CLIENT = 4  # requests made before the clock starts, where their number is not known
_BUSY_CLIENT = 0.8  # share of a core


@dataclass(frozen=True)
class Sample:
    """One request. `started_s` and `ended_s` are readings of `time.perf_counter`; None: the server did not tell."""

    started_s: float
    ended_s: float
    failure: str | None
    input_tokens: int | None
    output_tokens: int | None
    time_to_first_token_s: float | None
    time_per_output_token_s: float | None
    gaps_s: tuple[float, ...]  # between arrivals of text
    is_counted_by_deltas: bool


@dataclass(frozen=True)
class Round:
    """The samples of one closed loop, and how much CPU time the client itself took."""

    samples: tuple[Sample, ...]
    duration_s: float
    client_cpu_s: float


@dataclass(frozen=True)
class LoadRow:
    """One concurrency at one server, all rounds together (`round` None) or one of several rounds."""

    url: str
    api: str
    concurrency: int
    round: int | None
    num_requests: int
    failures: dict[str, int]
    duration_s: float
    mean_input_tokens: float | None
    mean_output_tokens: float | None
    output_tokens_per_s: float
    requests_per_s: float
    time_to_first_token_s: Spread | None
    time_per_output_token_s: Spread | None
    gap_s: Spread | None
    total_s: Spread | None
    client_cores: float

    @property
    def num_failed(self) -> int:
        return sum(self.failures.values())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_server_arguments(parser)
    parser.add_argument("--model", help="the model's name there (default: the first that /v1/models lists)")
    parser.add_argument(
        "--concurrency", type=_numbers, default=(1, 16, 64, 128), metavar="N,N", help="clients (default 1,16,64,128)"
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--requests", type=int, metavar="N", help="for each concurrency (default 4 a client, least 8)")
    length.add_argument("--duration", type=float, metavar="S", help="begin requests for so many seconds instead")
    parser.add_argument("--prompt-tokens", type=int, default=448, metavar="N", help="about (default 448)")
    parser.add_argument("--answer-tokens", type=int, default=128, metavar="N", help="max_tokens (default 128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="(default 0)")
    parser.add_argument(
        "--pictures", type=picture_size, metavar="WxH", help="a new picture of this size in each request"
    )
    parser.add_argument("--no-stream", action="store_true", help="ask for whole answers")
    parser.add_argument("--compare", metavar="URL", help="the same load on a second server, in turns, and ratios")
    parser.add_argument("--compare-api", choices=APIS, default="auto", help="its dialect (default auto)")
    parser.add_argument("--compare-model", metavar="NAME", help="its model (default: the first that it lists)")
    parser.add_argument("--rounds", type=int, metavar="N", help="for each concurrency (default 1; 3 with --compare)")
    report.add_arguments(parser)


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """Which server, and how it is asked: the same for each benchmark over HTTP."""
    parser.add_argument("--url", default="http://127.0.0.1:8085", help="the server (default %(default)s)")
    parser.add_argument("--api", choices=APIS, default="auto", help="its dialect (default auto: found out)")
    parser.add_argument("--key", default="", metavar="TOKEN", help="sent as a bearer token")
    parser.add_argument("--timeout", type=float, default=300.0, metavar="S", help="for one answer (default 300)")
    parser.add_argument("--seed", type=int, help="of prompts and pictures (default: a new one, so that no cache hits)")


def _numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(int(part) for part in text.split(","))
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError("must be numbers of at least 1, joined by commas")
    return numbers


def picture_size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise argparse.ArgumentTypeError("must be like 1024x768")
    return int(width), int(height)


def run(arguments: argparse.Namespace) -> int:
    """:return: 1 if any request failed. :raise Unable:"""
    report.check_files(arguments.json, arguments.plot)
    seed = fresh_seed(arguments.seed)
    demand = Demand(arguments.answer_tokens, arguments.temperature, arguments.pictures)
    rounds = arguments.rounds or (3 if arguments.compare else 1)
    rows: list[LoadRow] = []
    notes: list[str] = []
    with ExitStack() as stack, report.progress() as bar:
        targets: list[Target] = []
        for url, api, model in _servers(arguments):
            client = stack.enter_context(Client(url, arguments.timeout))
            bar.start(f"asking {url}", None)
            target = find_target(client, url, api, model, arguments.key, not arguments.no_stream)
            target.probe(random.Random(f"{seed}/{len(targets)}/probe"), demand, arguments.prompt_tokens)
            targets.append(target)
        for concurrency in arguments.concurrency:
            done: list[list[Round]] = [[] for _ in targets]
            for number in range(rounds):
                for side, target in enumerate(targets):
                    load = _ClosedLoop(target, demand, concurrency, f"{seed}/{side}/{concurrency}/{number}")
                    if number == 0:
                        bar.start(f"{target.url} x {concurrency}: warming up", None)
                        load.warm_up()
                    done[side].append(load.measure(arguments.requests, arguments.duration, bar))
            for target, results in zip(targets, done, strict=True):
                rows.append(make_row(target, concurrency, None, results))
                if rounds > 1:
                    rows += [make_row(target, concurrency, i, [result]) for i, result in enumerate(results, 1)]
                notes += _remarks(target, concurrency, results)
        notes = [note for target in targets for note in target.notes] + notes
    _tell(arguments, rows, list(dict.fromkeys(notes)), seed)
    return int(any(row.num_failed for row in rows))


def fresh_seed(given: int | None) -> int:
    """A seed that was used before would find its prompts in the server's prefix cache."""
    return random.SystemRandom().randrange(10**9) if given is None else given


def _servers(arguments: argparse.Namespace) -> list[tuple[str, Api, str | None]]:
    servers = [(arguments.url, arguments.api, arguments.model)]
    if arguments.compare:
        servers.append((arguments.compare, arguments.compare_api, arguments.compare_model))
    return servers


# One round.


class _ClosedLoop:
    """Requests of one kind at one concurrency. :param name: what their dice start from."""

    def __init__(self, target: Target, demand: Demand, concurrency: int, name: str) -> None:
        self._target = target
        self._demand = demand
        self._concurrency = concurrency
        self._name = name

    def warm_up(self) -> None:
        """Open all connections and let the server meet this batch size, with short answers. Failures show later."""
        short = Demand(
            min(_WARM_UP_TOKENS, self._demand.answer_tokens), self._demand.temperature, self._demand.picture_px
        )
        jobs = [self._job(f"warm-up {i}", short) for i in range(self._concurrency)]
        self._target.client.run([lambda: jobs.pop() if jobs else None] * self._concurrency, lambda finished: None)

    def measure(self, num_requests: int | None, duration_s: float | None, bar: Progress) -> Round:
        """:param num_requests: None without a duration: four a client, at least eight."""
        total = None if duration_s is not None else num_requests or max(8, 4 * self._concurrency)
        num_prepared = _PREPARED_PER_CLIENT * self._concurrency if total is None else total
        jobs = [self._job(str(i), self._demand) for i in reversed(range(num_prepared))]
        num_made = num_prepared
        deadline = float("inf")

        def take() -> Job | None:
            nonlocal num_made
            if time.perf_counter() >= deadline:
                return None
            if not jobs and total is None:
                jobs.append(self._job(str(num_made), self._demand))
                num_made += 1
            return jobs.pop() if jobs else None

        bar.start(f"{self._target.url} x {self._concurrency}", total)
        samples: list[Sample] = []

        def deliver(finished: Finished) -> None:
            samples.append(sample_of(finished))
            bar.advance()

        cpu_s, started_s = time.thread_time(), time.perf_counter()
        if duration_s is not None:
            deadline = started_s + duration_s
        self._target.client.run([take] * self._concurrency, deliver)
        ended_s = max((sample.ended_s for sample in samples), default=started_s)
        return Round(tuple(samples), ended_s - started_s, time.thread_time() - cpu_s)

    def _job(self, name: str, demand: Demand) -> Job:
        return self._target.job(random.Random(f"{self._name}/{name}"), demand)


def sample_of(finished: Finished) -> Sample:
    failure = failure_of(finished)
    reader = finished.job.reader
    assert isinstance(reader, AnswerReader)
    arrivals = reader.arrivals_s
    return Sample(
        finished.started_s,
        finished.ended_s,
        failure,
        reader.input_tokens,
        reader.output_tokens,
        reader.first_token_s(finished.started_s),
        reader.per_token_s(finished.started_s),
        tuple(after - before for before, after in pairwise(arrivals)),
        reader.is_counted_by_deltas,
    )


def make_row(target: Target, concurrency: int, number: int | None, rounds: Sequence[Round]) -> LoadRow:
    """:param number: of the round, None for all together. Failed requests count as such and in nothing else."""
    samples = [sample for result in rounds for sample in result.samples]
    good = [sample for sample in samples if sample.failure is None]
    duration_s = sum(result.duration_s for result in rounds)
    inputs = [s.input_tokens for s in good if s.input_tokens is not None]
    outputs = [s.output_tokens for s in good if s.output_tokens is not None]
    return LoadRow(
        url=target.url,
        api=target.api,
        concurrency=concurrency,
        round=number,
        num_requests=len(samples),
        failures=dict(Counter(s.failure for s in samples if s.failure is not None)),
        duration_s=duration_s,
        mean_input_tokens=sum(inputs) / len(inputs) if inputs else None,
        mean_output_tokens=sum(outputs) / len(outputs) if outputs else None,
        output_tokens_per_s=sum(outputs) / duration_s if duration_s else 0.0,
        requests_per_s=len(good) / duration_s if duration_s else 0.0,
        time_to_first_token_s=spread([s.time_to_first_token_s for s in good if s.time_to_first_token_s is not None]),
        time_per_output_token_s=spread(
            [s.time_per_output_token_s for s in good if s.time_per_output_token_s is not None]
        ),
        gap_s=spread([gap for s in good for gap in s.gaps_s]),
        total_s=spread([s.ended_s - s.started_s for s in good]),
        client_cores=sum(result.client_cpu_s for result in rounds) / duration_s if duration_s else 0.0,
    )


# What is told.


def _remarks(target: Target, concurrency: int, rounds: Sequence[Round]) -> list[str]:
    notes = []
    samples = [sample for result in rounds for sample in result.samples]
    if any(sample.is_counted_by_deltas for sample in samples):
        notes.append(f"{target.url}: it reports no output tokens: deltas are counted in their place")
    cores = sum(r.client_cpu_s for r in rounds) / (sum(r.duration_s for r in rounds) or 1.0)
    if cores > _BUSY_CLIENT:
        notes.append(f"{target.url} x {concurrency}: the client used {cores:.0%} of a core and may be the limit itself")
    if len(samples) < concurrency * len(rounds):
        notes.append(f"{target.url} x {concurrency}: fewer requests than clients, so that the load was lower")
    return notes + failure_notes(f"{target.url} x {concurrency}", samples)


def failure_notes(where: str, samples: Sequence[Sample]) -> list[str]:
    """One line for each kind of failure, with what to do about the two that a default configuration brings."""
    advice = {
        "429 rate_limited": " (start the service with AVITO_RATE_LIMIT empty)",
        "503 queue_full": " (AVITO_MAX_RUNNING and AVITO_MAX_QUEUE bound what it takes at a time)",
    }
    failures = Counter(sample.failure for sample in samples if sample.failure is not None)
    return [f"{where}: {count} failed: {kind}{advice.get(kind, '')}" for kind, count in failures.most_common()]


def _spread_columns(group: str, read: Callable[[LoadRow], Spread | None], names: str) -> list[Column[LoadRow]]:
    def reading(name: str) -> Callable[[LoadRow], Value]:
        return lambda row: milliseconds(getattr(read(row), name, None))

    return [Column(name, reading(name), group) for name in names.split()]


TABLE: tuple[Column[LoadRow], ...] = (
    Column("clients", lambda row: row.concurrency),
    Column("requests", lambda row: row.num_requests),
    Column("failed", lambda row: row.num_failed),
    Column("in", lambda row: row.mean_input_tokens, "tokens each"),
    Column("out", lambda row: row.mean_output_tokens, "tokens each"),
    Column("tokens/s", lambda row: row.output_tokens_per_s),
    Column("req/s", lambda row: row.requests_per_s),
    *_spread_columns("to first token, ms", lambda row: row.time_to_first_token_s, "mean p50 p90 p99"),
    *_spread_columns("per output token, ms", lambda row: row.time_per_output_token_s, "mean p50 p90 p99"),
    *_spread_columns("between deltas, ms", lambda row: row.gap_s, "p50 p90 p99"),
    *_spread_columns("whole answer, ms", lambda row: row.total_s, "p50 p90 p99"),
)


@dataclass(frozen=True)
class Ratio:
    """The first server's figure over the second's: of all rounds together, least and greatest of single rounds."""

    concurrency: int
    quantity: str
    ratio: float | None
    least: float | None
    greatest: float | None


RATIOS: tuple[Column[Ratio], ...] = (
    Column("clients", lambda row: row.concurrency),
    Column("first / second", lambda row: row.quantity, is_left=True),
    Column("ratio", lambda row: row.ratio),
    Column("least", lambda row: row.least, "of one round"),
    Column("greatest", lambda row: row.greatest, "of one round"),
)
_QUANTITIES: tuple[tuple[str, Callable[[LoadRow], float | None]], ...] = (
    ("output tokens/s", lambda row: row.output_tokens_per_s),
    ("mean time to first token", lambda row: row.time_to_first_token_s.mean if row.time_to_first_token_s else None),
    (
        "mean time per output token",
        lambda row: row.time_per_output_token_s.mean if row.time_per_output_token_s else None,
    ),
)


def ratios(rows: Sequence[LoadRow], first: str, second: str) -> list[Ratio]:
    """Of the first server's rows to the second's, concurrency by concurrency, round by round.

    The two may have the same address: then its rows come in this order.
    """
    found = []
    for concurrency in dict.fromkeys(row.concurrency for row in rows):
        here = [row for row in rows if row.concurrency == concurrency]
        middle = len(here) // 2
        for quantity, read in _QUANTITIES:
            quotients = []
            for one, other in zip(here[:middle], here[middle:], strict=True):
                assert (one.url, other.url, one.round) == (first, second, other.round)
                above, below = read(one), read(other)
                quotients.append(above / below if above is not None and below else None)
            single = [quotient for quotient in quotients[1:] if quotient is not None]
            found.append(
                Ratio(concurrency, quantity, quotients[0], min(single, default=None), max(single, default=None))
            )
    return found


def _tell(arguments: argparse.Namespace, rows: Sequence[LoadRow], notes: Sequence[str], seed: int) -> None:
    print(report.describe(report.read_machine()))
    num_servers = 2 if arguments.compare else 1
    shown = [row for row in rows if row.round is None]
    for side in range(num_servers):
        mine = shown[side::num_servers]
        print(f"\n{mine[0].url} ({mine[0].api})\n{report.render_table(TABLE, mine)}")
    if arguments.compare:
        compared = ratios(rows, arguments.url, arguments.compare)
        print(f"\nFirst: {arguments.url}, second: {arguments.compare}\n{report.render_table(RATIOS, compared)}")
    print()
    for note in [*notes, f"seed {seed}"]:
        print(f"- {note}")
    if arguments.json:
        report.write_json(arguments.json, arguments, rows, notes, seed=seed)
    if arguments.plot:
        title = f"{arguments.prompt_tokens} tokens in, {arguments.answer_tokens} out"
        report.write_plot(arguments.plot, title, panels(shown, num_servers))


def panels(rows: Sequence[LoadRow], num_servers: int) -> list[Panel]:
    """Rows of all rounds together, server by server for each concurrency."""
    sides = [rows[side::num_servers] for side in range(num_servers)]

    def series(name: str, read: Callable[[LoadRow], float | None]) -> dict[str, list[tuple[float | str, float]]]:
        found: dict[str, list[tuple[float | str, float]]] = {}
        for side, mine in enumerate(sides, 1):
            points = [(row.concurrency, read(row)) for row in mine]
            where = f"{side}: {mine[0].url} " if num_servers > 1 else ""
            known: list[tuple[float | str, float]] = [(x, y) for x, y in points if y is not None]
            if known:
                found[f"{where}{name}".strip()] = known
        return found

    def of_spread(name: str, read: Callable[[LoadRow], Spread | None]) -> Callable[[LoadRow], float | None]:
        return lambda row: milliseconds(getattr(read(row), name, None))

    drawn = [Panel("Output", "clients", "tokens/s", series("all clients", lambda row: row.output_tokens_per_s))]
    for title, read in (
        ("Time to first token", lambda row: row.time_to_first_token_s),
        ("Time per output token", lambda row: row.time_per_output_token_s),
    ):
        both = series("p50", of_spread("p50", read)) | series("p99", of_spread("p99", read))
        drawn.append(Panel(title, "clients", "ms", both))
    return drawn
