"""Seconds until pictures have their first tokens, in this process, and decoding after them.

The processor (decoding, scaling, patches) runs on the host in the requests' threads, as in the service; it is measured
by itself, within the whole, and left out. Every picture is a new one, so that the picture cache finds none.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from bench import reference, report
from bench.decode import reference_notes
from bench.engine import Engine, Stream, as_new, decode_together, encode, numbers, picture_request, sampling
from bench.load import picture_size
from bench.models import BenchModel, add_model_arguments, copy_gb_per_s, load, source_of
from bench.report import Column, Panel, milliseconds
from models.prompts import PromptEncoder

_SLACK_STEPS = 64


@dataclass(frozen=True)
class VisionRow:
    """Requests with one picture each that arrive together. Medians of the rounds, in seconds.

    :param processor_s: of one picture, alone on the machine.
    :param all_first_tokens_s: from the first byte of all requests, processor included, to the last first token.
    :param engine_s: the same from prompts that are encoded already.
    """

    num_pictures: int
    prompt_tokens: int
    processor_s: float
    all_first_tokens_s: float
    engine_s: float
    reference_s: float | None


@dataclass(frozen=True)
class VisionDecodeRow:
    """Decoding of requests with a picture each. Seconds of one step, median of the rounds."""

    batch: int
    num_steps: int
    step_s: float
    tokens_per_s: float
    reference_s: float | None
    scaled_reference_s: float | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--requests", type=numbers, default=(1, 8, 32), metavar="N,N", help="(default 1,8,32)")
    parser.add_argument("--batch", type=numbers, default=(1, 8), metavar="N,N", help="of decoding (default 1,8)")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="steps that are timed (default 64)")
    parser.add_argument("--pictures", type=picture_size, default=(1024, 768), metavar="WxH", help="(default 1024x768)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of each (default 3)")
    report.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """:raise Unable:"""
    report.check_files(arguments.json, arguments.plot)
    source = source_of(arguments, is_picture_model=True)
    has_reference = source.shape == reference.PICTURE_SHAPE and arguments.pictures == (1024, 768)
    with report.progress() as bar:
        bar.start("loading", None)
        copied = copy_gb_per_s(source.device)
        model = load(source, max(*arguments.requests, *arguments.batch))
        encoder = model.make_encoder()
        dice = random.Random(0)
        sample = encode(encoder, picture_request(dice, arguments.pictures, model.limits))
        num_tokens = len(sample.ids)
        num_sequences = max(*arguments.requests, *arguments.batch)
        runner = model.make_runner(num_sequences, num_tokens + arguments.tokens + _SLACK_STEPS)
        rows: list[VisionRow] = []
        with Engine([(model, runner)]) as engine:
            for num in arguments.requests:
                bar.start(f"{num} pictures", arguments.rounds)
                _answer(engine, model, encoder, num, arguments, dice)
                rounds = []
                for _ in range(arguments.rounds):
                    rounds.append(_answer(engine, model, encoder, num, arguments, dice))
                    bar.advance()
                processor, whole, alone = (statistics.median(column) for column in zip(*rounds, strict=True))
                expected = reference.PICTURES_S.get(num) if has_reference else None
                rows.append(VisionRow(num, num_tokens, processor, whole, alone, expected))
        decode_rows: list[VisionDecodeRow] = []
        # As in `bench decode`: no stream is protected from what is not measured here.
        with Engine([(model, runner)], max_prefill_delay_s=3600.0) as engine:
            for batch in arguments.batch:
                bar.start(f"decoding, batch {batch}", arguments.rounds)
                prompts = [as_new(dice, sample) for _ in range(batch)]
                decode_together(engine, model.name, prompts, 4, 0.0)
                steps = []
                for _ in range(arguments.rounds):
                    prompts = [as_new(dice, sample) for _ in range(batch)]
                    steps.append(decode_together(engine, model.name, prompts, arguments.tokens, 0.0).step_s)
                    bar.advance()
                decode_rows.append(_decode_row(batch, arguments.tokens, steps, has_reference, copied))
    notes = [model.describe(), *reference_notes(copied, has_reference)]
    _tell(arguments, source.label, rows, decode_rows, notes, copied)
    return 0


def _answer(
    engine: Engine,
    model: BenchModel,
    encoder: PromptEncoder,
    num: int,
    arguments: argparse.Namespace,
    dice: random.Random,
) -> tuple[float, float, float]:
    """Seconds of the processor for one picture, to all first tokens with it, and to all without it."""
    requests = [picture_request(dice, arguments.pictures, model.limits) for _ in range(num)]
    started = time.perf_counter()
    encode(encoder, requests[0])
    processor_s = time.perf_counter() - started

    def answer(index: int) -> Stream:
        stream = Stream(encode(encoder, requests[index]), sampling(1))
        engine.add(model.name, stream)
        return stream

    with ThreadPoolExecutor(num) as threads:
        started = time.perf_counter()
        streams = list(threads.map(answer, range(num)))
    engine.wait(streams)
    whole_s = max(stream.times_s[0] for stream in streams) - started
    again = [Stream(as_new(dice, stream.prompt), sampling(1)) for stream in streams]
    engine.run(model.name, again)
    engine_s = max(stream.times_s[0] for stream in again) - min(stream.added_s for stream in again)
    return processor_s, whole_s, engine_s


def _decode_row(
    batch: int, num_steps: int, steps: Sequence[float], has_reference: bool, copied: float | None
) -> VisionDecodeRow:
    step_s = statistics.median(steps)
    expected = reference.PICTURE_DECODE_S.get(batch) if has_reference else None
    scaled = None if expected is None else reference.scaled_s(expected, copied)
    return VisionDecodeRow(batch, num_steps, step_s, batch / step_s, expected, scaled)


TABLE: tuple[Column[VisionRow], ...] = (
    Column("pictures", lambda row: row.num_pictures),
    Column("tokens each", lambda row: row.prompt_tokens),
    Column("processor, one", lambda row: milliseconds(row.processor_s), "ms"),
    Column("all first tokens", lambda row: milliseconds(row.all_first_tokens_s), "ms"),
    Column("without processor", lambda row: milliseconds(row.engine_s), "ms"),
    Column("vLLM", lambda row: milliseconds(row.reference_s), "ms"),
)
DECODE_TABLE: tuple[Column[VisionDecodeRow], ...] = (
    Column("batch", lambda row: row.batch),
    Column("ms a step", lambda row: milliseconds(row.step_s)),
    Column("tokens/s", lambda row: row.tokens_per_s),
    Column("there", lambda row: milliseconds(row.reference_s), "vLLM, ms a step"),
    Column("scaled", lambda row: milliseconds(row.scaled_reference_s), "vLLM, ms a step"),
)


def _tell(
    arguments: argparse.Namespace,
    label: str,
    rows: Sequence[VisionRow],
    decode_rows: Sequence[VisionDecodeRow],
    notes: Sequence[str],
    copied: float | None,
) -> None:
    width, height = arguments.pictures
    print(report.describe(report.read_machine()))
    print(f"\n{label}, one picture of {width}x{height} in each request\n{report.render_table(TABLE, rows)}")
    print(f"\nDecoding after them\n{report.render_table(DECODE_TABLE, decode_rows)}\n")
    for note in notes:
        print(f"- {note}")
    if arguments.json:
        report.write_json(arguments.json, arguments, [*rows, *decode_rows], notes, copy_gb_per_s=copied)
    if arguments.plot:
        series: dict[str, list[tuple[float | str, float]]] = {
            "with processor": [(row.num_pictures, 1e3 * row.all_first_tokens_s) for row in rows],
            "without": [(row.num_pictures, 1e3 * row.engine_s) for row in rows],
        }
        steps: list[tuple[float | str, float]] = [(row.batch, 1e3 * row.step_s) for row in decode_rows]
        drawn = [Panel("All first tokens", "pictures", "ms", series), Panel("A step", "batch", "ms", {"engine": steps})]
        report.write_plot(arguments.plot, label, drawn)
