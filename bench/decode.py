"""Milliseconds a decode step and tokens/s of the batch, in this process, beside transformers' `generate`.

All of a batch's prompts are read first; then steps are timed as the loop runs them, its host work included. `generate`
runs the same model at the same batch, in turns with ours in each round, timed from its first token on. Times are
medians of the rounds. For the shape qwen3-8b vLLM's figures stand beside, measured elsewhere: see the notes.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from bench import reference, report
from bench.engine import Engine, decode_together, numbers, random_prompt
from bench.models import (
    BenchModel,
    add_model_arguments,
    copy_gb_per_s,
    load,
    load_library_model,
    source_of,
)
from bench.report import Column, Panel, Progress, milliseconds

# The engine reads so many prompt tokens in a step, while the streams that are ahead go on decoding.
_SLACK_STEPS = 64
_WARM_UP_STEPS = 4
_TEMPERATURE = 0.7


@dataclass(frozen=True)
class DecodeRow:
    """One batch size. Seconds of one step, median of the rounds; `ratio` is how many times `generate`'s tokens/s ours
    are, `ratio_in_turn` the same against requests given to `generate` one after the other."""

    batch: int
    is_sampled: bool
    context_tokens: int
    num_steps: int
    step_s: float
    least_s: float
    greatest_s: float
    tokens_per_s: float
    generate_step_s: float | None
    generate_tokens_per_s: float | None
    ratio: float | None
    least_ratio: float | None
    greatest_ratio: float | None
    ratio_in_turn: float | None
    reference_s: float | None
    scaled_reference_s: float | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--batch", type=numbers, default=(1, 8, 32, 64, 128), metavar="N,N", help="(default 1,8,32,64,128)"
    )
    parser.add_argument("--context", type=int, default=450, metavar="N", help="prompt tokens (default 450)")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="steps that are timed (default 64)")
    parser.add_argument("--sampled", action="store_true", help=f"at temperature {_TEMPERATURE} (default: greedy)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="for each batch (default 3)")
    parser.add_argument("--no-generate", action="store_true", help="leave `generate` out")
    parser.add_argument("--generate-limit", type=int, default=64, metavar="N", help="its largest batch (default 64)")
    parser.add_argument("--generate-rounds", type=int, metavar="N", help="in so many of the rounds (default: all)")
    report.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """:raise Unable:"""
    report.check_files(arguments.json, arguments.plot)
    source = source_of(arguments)
    has_reference = source.shape == reference.TEXT_SHAPE
    with report.progress() as bar:
        bar.start("loading", None)
        copied = copy_gb_per_s(source.device)
        library_model = None if arguments.no_generate else load_library_model(source)
        model = load(source, max(arguments.batch))
        # What the prompts of the others take to be read is decoded by those that are ahead.
        longest = arguments.context + arguments.tokens + _SLACK_STEPS
        runner = model.make_runner(max(arguments.batch), longest)
        dice = random.Random(0)
        rows: list[DecodeRow] = []
        # Reading the prompts is not what is measured here: no stream is protected from it.
        with Engine([(model, runner)], max_prefill_delay_s=3600.0) as engine:
            for batch in arguments.batch:
                bar.start(f"batch {batch}", arguments.rounds)
                ours, theirs = _measure(engine, model, library_model, batch, arguments, dice, bar)
                scaled = reference.scaled_s(reference.DECODE_S[batch], copied) if batch in reference.DECODE_S else None
                alone = next((row.generate_step_s for row in rows if row.batch == 1), None)
                rows.append(
                    make_row(
                        batch,
                        arguments,
                        ours,
                        theirs,
                        alone_s=alone,
                        reference_s=reference.DECODE_S.get(batch) if has_reference else None,
                        scaled_s=scaled if has_reference else None,
                    )
                )
    notes = [model.describe(), *reference_notes(copied, has_reference)]
    print(report.describe(report.read_machine()))
    kind = f"temperature {_TEMPERATURE}" if arguments.sampled else "greedy"
    print(f"\n{source.label}, {kind}, {arguments.context} tokens of context\n{report.render_table(TABLE, rows)}\n")
    for note in notes:
        print(f"- {note}")
    if arguments.json:
        report.write_json(arguments.json, arguments, rows, notes, copy_gb_per_s=copied, device_type=source.device.type)
    if arguments.plot:
        report.write_plot(arguments.plot, source.label, panels(rows))
    return 0


def _measure(
    engine: Engine,
    model: BenchModel,
    library_model: Any,
    batch: int,
    arguments: argparse.Namespace,
    dice: random.Random,
    bar: Progress,
) -> tuple[list[float], list[float]]:
    """Seconds a step of each round: the engine's and `generate`'s."""
    temperature = _TEMPERATURE if arguments.sampled else 0.0
    has_generate = library_model is not None and batch <= arguments.generate_limit
    num_generate = arguments.rounds if arguments.generate_rounds is None else arguments.generate_rounds
    ours: list[float] = []
    theirs: list[float] = []

    def ours_once(num_steps: int) -> float:
        prompts = [random_prompt(dice, model, arguments.context) for _ in range(batch)]
        return decode_together(engine, model.name, prompts, num_steps, temperature).step_s

    def theirs_once(num_steps: int) -> float:
        prompts = [random_prompt(dice, model, arguments.context).ids for _ in range(batch)]
        return generate_step_s(library_model, prompts, num_steps, temperature)

    ours_once(_WARM_UP_STEPS)
    if has_generate:
        theirs_once(_WARM_UP_STEPS)
    for number in range(arguments.rounds):
        ours.append(ours_once(arguments.tokens))
        if has_generate and number < num_generate:
            theirs.append(theirs_once(arguments.tokens))
        bar.advance()
    return ours, theirs


class _Clock(StoppingCriteria):
    """Notes when each token was chosen. Stops nothing."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize(input_ids.device)
        self.times_s.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def generate_step_s(model: Any, prompts: Sequence[tuple[int, ...]], num_steps: int, temperature: float) -> float:
    """Seconds a step of transformers' `generate`, without the prompts."""
    ids = torch.tensor(prompts, device=model.device)
    clock = _Clock()
    how: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        how |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    with torch.inference_mode():
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=num_steps + 1,
            max_new_tokens=num_steps + 1,
            stopping_criteria=StoppingCriteriaList([clock]),
            **how,
        )
    return (clock.times_s[-1] - clock.times_s[0]) / (len(clock.times_s) - 1)


def make_row(
    batch: int,
    arguments: argparse.Namespace,
    ours: Sequence[float],
    theirs: Sequence[float],
    *,
    alone_s: float | None,
    reference_s: float | None,
    scaled_s: float | None,
) -> DecodeRow:
    """:param alone_s: a step of `generate` at batch 1, if measured before."""
    step_s = statistics.median(ours)
    generate_s = statistics.median(theirs) if theirs else None
    ratios = [other / own for own, other in zip(ours, theirs, strict=False)]
    if batch == 1:
        alone_s = generate_s
    return DecodeRow(
        batch=batch,
        is_sampled=arguments.sampled,
        context_tokens=arguments.context,
        num_steps=arguments.tokens,
        step_s=step_s,
        least_s=min(ours),
        greatest_s=max(ours),
        tokens_per_s=batch / step_s,
        generate_step_s=generate_s,
        generate_tokens_per_s=None if generate_s is None else batch / generate_s,
        ratio=None if generate_s is None else generate_s / step_s,
        least_ratio=min(ratios, default=None),
        greatest_ratio=max(ratios, default=None),
        ratio_in_turn=None if alone_s is None else batch * alone_s / step_s,
        reference_s=reference_s,
        scaled_reference_s=scaled_s,
    )


TABLE: tuple[Column[DecodeRow], ...] = (
    Column("batch", lambda row: row.batch),
    Column("median", lambda row: milliseconds(row.step_s), "ms a step"),
    Column("least", lambda row: milliseconds(row.least_s), "ms a step"),
    Column("greatest", lambda row: milliseconds(row.greatest_s), "ms a step"),
    Column("tokens/s", lambda row: row.tokens_per_s),
    Column("ms a step", lambda row: milliseconds(row.generate_step_s), "generate"),
    Column("tokens/s", lambda row: row.generate_tokens_per_s, "generate"),
    Column("ratio", lambda row: row.ratio, "ours to generate's"),
    Column("least", lambda row: row.least_ratio, "ours to generate's"),
    Column("greatest", lambda row: row.greatest_ratio, "ours to generate's"),
    Column("in turn", lambda row: row.ratio_in_turn, "ours to generate's"),
    Column("there", lambda row: milliseconds(row.reference_s), "vLLM, ms a step"),
    Column("scaled", lambda row: milliseconds(row.scaled_reference_s), "vLLM, ms a step"),
)


def reference_notes(copied: float | None, has_reference: bool) -> list[str]:
    """What the figures of elsewhere mean here."""
    notes = [f"a copy on the device moves {copied:.0f} GB/s, reads and writes together"] if copied is not None else []
    if has_reference:
        notes.append(
            f"vLLM: {reference.SERVER} on one {reference.CARD}, measured elsewhere; scaled: by what a copy on the "
            f"device moves here over {reference.COPY_GB_PER_S:.0f} GB/s there"
        )
    return notes


def panels(rows: Sequence[DecodeRow]) -> list[Panel]:
    steps: dict[str, list[tuple[float | str, float]]] = {"engine": [(row.batch, 1e3 * row.step_s) for row in rows]}
    rates: dict[str, list[tuple[float | str, float]]] = {"engine": [(row.batch, row.tokens_per_s) for row in rows]}
    for name, field in (("generate", "generate_step_s"), ("vLLM, scaled", "scaled_reference_s")):
        known = [(row.batch, value) for row in rows if (value := getattr(row, field)) is not None]
        if known:
            steps[name] = [(batch, 1e3 * value) for batch, value in known]
            rates[name] = [(batch, batch / value) for batch, value in known]
    return [Panel("A step", "batch", "ms", steps), Panel("Output", "batch", "tokens/s", rates)]
