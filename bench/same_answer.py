"""How often the same prompt with the same seed is answered otherwise in a full batch than alone.

In FP32 on a CPU never. On CUDA matrix products depend on the size of the batch, and where two words are nearly as
likely, the last bit decides. Random weights make near ties of all words, so that a real model differs less.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from bench import report
from bench.engine import Engine, Stream, as_new, random_prompt, sampling
from bench.models import add_model_arguments, load, source_of
from bench.report import Column, Panel

_TEMPERATURE = 0.7


@dataclass(frozen=True)
class SameAnswerRow:
    """One way of choosing tokens. Shares are of all answers and of all tokens; after the first other token an answer
    is another one, so most tokens that differ follow from one. `first_difference` is the median place of that one."""

    is_sampled: bool
    batch: int
    num_answers: int
    answer_tokens: int
    differing_answers: float
    differing_tokens: float
    first_difference: float | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--batch", type=int, default=64, metavar="N", help="answers, alone and all at once (default 64)"
    )
    parser.add_argument("--prompt-tokens", type=int, default=128, metavar="N", help="(default 128)")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="of an answer (default 64)")
    report.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """:raise Unable:"""
    report.check_files(arguments.json, arguments.plot)
    source = source_of(arguments)
    with report.progress() as bar:
        bar.start("loading", None)
        model = load(source, arguments.batch)
        runner = model.make_runner(arguments.batch, arguments.prompt_tokens + arguments.tokens)
        rows = []
        dice = random.Random(0)
        with Engine([(model, runner)]) as engine:
            for temperature in (0.0, _TEMPERATURE):
                bar.start(f"temperature {temperature:g}", arguments.batch)
                prompts = [random_prompt(dice, model, arguments.prompt_tokens) for _ in range(arguments.batch)]
                options = [sampling(arguments.tokens, temperature, seed) for seed in range(arguments.batch)]
                # Under new names: the one must not find in the prefix cache what the other computed.
                together = [Stream(as_new(dice, p), o) for p, o in zip(prompts, options, strict=True)]
                alone = [Stream(as_new(dice, p), o) for p, o in zip(prompts, options, strict=True)]
                engine.run(model.name, together)
                for stream in alone:
                    engine.run(model.name, [stream])
                    bar.advance()
                pairs = [(one.output_ids, other.output_ids) for one, other in zip(alone, together, strict=True)]
                rows.append(compare(pairs, temperature > 0, arguments.tokens))
    notes = [model.describe()]
    print(report.describe(report.read_machine()))
    print(f"\n{source.label}: alone against {arguments.batch} at once\n{report.render_table(TABLE, rows)}\n")
    for note in notes:
        print(f"- {note}")
    if arguments.json:
        report.write_json(arguments.json, arguments, rows, notes)
    if arguments.plot:
        bars: dict[str, list[tuple[float | str, float]]] = {
            "answers": [(_name(row), 100 * row.differing_answers) for row in rows],
            "tokens": [(_name(row), 100 * row.differing_tokens) for row in rows],
        }
        report.write_plot(arguments.plot, source.label, [Panel("Other than alone", "", "percent", bars)])
    return 0


def compare(pairs: Sequence[tuple[list[int], list[int]]], is_sampled: bool, answer_tokens: int) -> SameAnswerRow:
    """:param pairs: ids of each answer, alone and in the batch."""
    firsts = []
    num_differing = 0
    for alone, together in pairs:
        places = [i for i, (a, b) in enumerate(zip(alone, together, strict=True)) if a != b]
        num_differing += len(places)
        firsts += places[:1]
    return SameAnswerRow(
        is_sampled=is_sampled,
        batch=len(pairs),
        num_answers=len(pairs),
        answer_tokens=answer_tokens,
        differing_answers=len(firsts) / len(pairs),
        differing_tokens=num_differing / sum(len(alone) for alone, _ in pairs),
        first_difference=statistics.median(firsts) if firsts else None,
    )


def _name(row: SameAnswerRow) -> str:
    return f"temperature {_TEMPERATURE}" if row.is_sampled else "greedy"


TABLE: tuple[Column[SameAnswerRow], ...] = (
    Column("how", _name, is_left=True),
    Column("answers", lambda row: row.num_answers),
    Column("tokens each", lambda row: row.answer_tokens),
    Column("answers, %", lambda row: 100 * row.differing_answers, "other than alone"),
    Column("tokens, %", lambda row: 100 * row.differing_tokens, "other than alone"),
    Column("first at token", lambda row: row.first_difference, "other than alone"),
)
