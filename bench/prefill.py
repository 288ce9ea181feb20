"""Seconds until prompts have their first tokens, in this process, and what a long prompt does to running streams.

All prompts of a row arrive at once, between two steps. The long prompt arrives while streams are decoding: what counts
is the longest pause of any stream until the prompt is read, less an ordinary step.
"""

from __future__ import annotations

import argparse
import random
import statistics
from dataclasses import dataclass

from bench import reference, report
from bench.decode import reference_notes
from bench.engine import Engine, Stream, numbers, random_prompt, sampling
from bench.models import BenchModel, add_model_arguments, copy_gb_per_s, load, source_of
from bench.report import Column, Panel, Spread, Unable, milliseconds, spread

# Steps of the streams before the long prompt arrives: an ordinary step is measured over these.
_STEPS_BEFORE = 32
_LONG_TOKENS = 8192
# Room for what the streams decode while it is read.
_STREAM_TOKENS = 4096


@dataclass(frozen=True)
class PrefillRow:
    """Prompts that arrive together. Seconds to the last first token (median of the rounds) and to their mean."""

    num_prompts: int
    prompt_tokens: int
    all_first_tokens_s: float
    least_s: float
    greatest_s: float
    mean_first_token_s: float
    tokens_per_s: float
    reference_s: float | None


@dataclass(frozen=True)
class LongPromptRow:
    """One round of a long prompt beside streams. `held_back_s` is the longest pause less the median step before."""

    long_tokens: int
    num_streams: int
    step_s: float
    pause_s: Spread
    held_back_s: float
    first_token_s: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--prompts", type=numbers, default=(1, 8, 18, 128), metavar="N,N", help="(default 1,8,18,128)")
    parser.add_argument("--prompt-tokens", type=int, default=448, metavar="N", help="of each (default 448)")
    parser.add_argument(
        "--long-tokens", type=int, metavar="N", help="0: no long prompt (default 8192, or less where no more fits)"
    )
    parser.add_argument("--streams", type=int, default=8, metavar="N", help="that decode beside it (default 8)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of each (default 3)")
    report.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """:raise Unable:"""
    report.check_files(arguments.json, arguments.plot)
    source = source_of(arguments)
    has_reference = source.shape == reference.TEXT_SHAPE
    with report.progress() as bar:
        bar.start("loading", None)
        copied = copy_gb_per_s(source.device)
        model = load(source, max(*arguments.prompts, arguments.streams + 1))
        longest = model.max_context_tokens - 1
        long_tokens = min(_LONG_TOKENS, longest) if arguments.long_tokens is None else arguments.long_tokens
        if long_tokens > longest:
            raise Unable(f"--long-tokens {long_tokens}: must be at most {longest} here")
        num_sequences = max(arguments.prompts)
        room = max(num_sequences * arguments.prompt_tokens, long_tokens + arguments.streams * _STREAM_TOKENS)
        runner = model.make_runner(num_sequences, -(-room // num_sequences))
        dice = random.Random(0)
        rows = []
        with Engine([(model, runner)]) as engine:
            for num in arguments.prompts:
                bar.start(f"{num} prompts", arguments.rounds)
                read_together(engine, model, num, arguments.prompt_tokens, dice)
                rounds = []
                for _ in range(arguments.rounds):
                    rounds.append(read_together(engine, model, num, arguments.prompt_tokens, dice))
                    bar.advance()
                expected = reference.PREFILL_S.get(num) if has_reference and arguments.prompt_tokens == 448 else None
                rows.append(make_row(num, arguments.prompt_tokens, rounds, expected))
            long_rows = []
            if long_tokens:
                bar.start("a long prompt", arguments.rounds)
                for _ in range(arguments.rounds):
                    long_rows.append(read_beside(engine, model, long_tokens, arguments, dice))
                    bar.advance()
    notes = [model.describe(), *reference_notes(copied, False)]
    if has_reference:
        notes.append(f"vLLM: {reference.SERVER} on one {reference.CARD}, measured elsewhere")
    print(report.describe(report.read_machine()))
    print(f"\n{source.label}, prompts of {arguments.prompt_tokens} tokens\n{report.render_table(TABLE, rows)}")
    if long_rows:
        print(f"\nA long prompt beside streams, a line for each round\n{report.render_table(LONG_TABLE, long_rows)}")
    print()
    for note in notes:
        print(f"- {note}")
    if arguments.json:
        everything = [*rows, *long_rows]
        report.write_json(arguments.json, arguments, everything, notes, copy_gb_per_s=copied)
    if arguments.plot:
        times: list[tuple[float | str, float]] = [(row.num_prompts, 1e3 * row.all_first_tokens_s) for row in rows]
        rates: list[tuple[float | str, float]] = [(row.num_prompts, row.tokens_per_s) for row in rows]
        drawn = [
            Panel("All first tokens", "prompts", "ms", {"engine": times}),
            Panel("Prompt tokens", "prompts", "tokens/s", {"engine": rates}),
        ]
        report.write_plot(arguments.plot, source.label, drawn)
    return 0


def read_together(
    engine: Engine, model: BenchModel, num: int, prompt_tokens: int, dice: random.Random
) -> tuple[float, float]:
    """Seconds to all first tokens, and to their mean."""
    streams = [Stream(random_prompt(dice, model, prompt_tokens), sampling(1)) for _ in range(num)]
    engine.run(model.name, streams)
    begin_s = min(stream.added_s for stream in streams)
    firsts = [stream.times_s[0] - begin_s for stream in streams]
    return max(firsts), statistics.mean(firsts)


def make_row(num: int, prompt_tokens: int, rounds: list[tuple[float, float]], reference_s: float | None) -> PrefillRow:
    seconds = [last for last, _ in rounds]
    median = statistics.median(seconds)
    return PrefillRow(
        num_prompts=num,
        prompt_tokens=prompt_tokens,
        all_first_tokens_s=median,
        least_s=min(seconds),
        greatest_s=max(seconds),
        mean_first_token_s=statistics.median(mean for _, mean in rounds),
        tokens_per_s=num * prompt_tokens / median,
        reference_s=reference_s,
    )


def read_beside(
    engine: Engine, model: BenchModel, long_tokens: int, arguments: argparse.Namespace, dice: random.Random
) -> LongPromptRow:
    """Streams that decode; after some steps the long prompt; the end when it has its first token."""
    long = Stream(random_prompt(dice, model, long_tokens), sampling(1))
    num_ready = 0

    def must_end(stream: Stream) -> bool:
        nonlocal num_ready
        if len(stream.times_s) == _STEPS_BEFORE:
            num_ready += 1
            if num_ready == arguments.streams:
                engine.add(model.name, long)
        return long.ended.is_set()

    streams = [
        Stream(random_prompt(dice, model, min(arguments.prompt_tokens, 64)), sampling(1 << 20), must_end)
        for _ in range(arguments.streams)
    ]
    engine.run(model.name, streams)
    engine.wait([long])
    begin_s, end_s = long.added_s, long.times_s[0]
    before = [gap for stream in streams for gap in stream.gaps_s(stream.times_s[0], begin_s)]
    # What came last may lie after the prompt's own first token, and was held back by it.
    pauses = spread([gap for stream in streams for gap in stream.gaps_s(begin_s, max(end_s, stream.times_s[-1]))])
    assert pauses is not None
    step_s = statistics.median(before)
    return LongPromptRow(
        long_tokens=long_tokens,
        num_streams=arguments.streams,
        step_s=step_s,
        pause_s=pauses,
        held_back_s=max(0.0, pauses.max - step_s),
        first_token_s=long.first_token_s,
    )


TABLE: tuple[Column[PrefillRow], ...] = (
    Column("prompts", lambda row: row.num_prompts),
    Column("median", lambda row: milliseconds(row.all_first_tokens_s), "all first tokens, ms"),
    Column("least", lambda row: milliseconds(row.least_s), "all first tokens, ms"),
    Column("greatest", lambda row: milliseconds(row.greatest_s), "all first tokens, ms"),
    Column("mean one, ms", lambda row: milliseconds(row.mean_first_token_s)),
    Column("tokens/s", lambda row: row.tokens_per_s),
    Column("vLLM, ms", lambda row: milliseconds(row.reference_s)),
)
LONG_TABLE: tuple[Column[LongPromptRow], ...] = (
    Column("tokens", lambda row: row.long_tokens),
    Column("streams", lambda row: row.num_streams),
    Column("a step, ms", lambda row: milliseconds(row.step_s)),
    Column("p50", lambda row: milliseconds(row.pause_s.p50), "between tokens meanwhile, ms"),
    Column("p99", lambda row: milliseconds(row.pause_s.p99), "between tokens meanwhile, ms"),
    Column("longest", lambda row: milliseconds(row.pause_s.max), "between tokens meanwhile, ms"),
    Column("held back, ms", lambda row: milliseconds(row.held_back_s)),
    Column("first token of the prompt, ms", lambda row: milliseconds(row.first_token_s)),
)
