"""Train the embedded stand-in for Avision and write it as an ordinary snapshot.

Its world is in `tools/demo_avision/`: drawings of coloured shapes and price tags. Training goes in stages, each going
on from the checkpoint of the last; it may be stopped at any time and goes on from the last checkpoint, three minutes
old at most. Reads nothing but this project and needs no network; the service is not involved.

    python -m tools.train_demo_avision train --stage one --minutes 6
    python -m tools.train_demo_avision write

The whole recipe is in docs/demo-avision.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

from tokenizers import Tokenizer
from tqdm import tqdm

from tools.demo_avision import foreign
from tools.demo_avision.dialogue import REFUSAL, ask, change_scene, difference, turns
from tools.demo_avision.examples import Mix
from tools.demo_avision.scoring import Exam, table
from tools.demo_avision.snapshot import WEIGHTS, make_model, sha256_of, train_tokenizer, write_rest, write_weights
from tools.demo_avision.training import Learner, Plan, Trainer
from tools.demo_avision.words import LANGUAGES
from tools.demo_avision.world import (
    COLOURS,
    HELD_OUT,
    MAX_ASPECT_RATIO,
    MAX_COUNT,
    MAX_PRICE,
    MAX_SIDE_PX,
    MIN_SIDE_PX,
    SHAPES,
    STAGES,
    sample_scene,
)

PROJECT = Path(__file__).resolve().parent.parent
SEED = 20261124
NAME = "Avision-Drawings-7M"
_CORPUS_SCENES = 4000


def corpus() -> Iterator[str]:
    """What the tokenizer is made from: all that can be asked and answered, and a share of what is foreign."""
    random = Random(SEED)
    for _ in range(_CORPUS_SCENES):
        scene = sample_scene(random)
        for language in LANGUAGES:
            for turn in turns(scene, random, language):
                yield turn.question
                yield turn.answer
            if scene.layout == "group":
                other = change_scene(scene, random)
                yield ask("difference", language, random)
                yield difference(scene, other, language)
            yield foreign.sample_question(random, language)
    for _ in range(200):
        yield from REFUSAL.values()
        yield "user\nassistant\nsystem\n"


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of this training, made at its first start."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        train_tokenizer(corpus()).save(str(file))
    return Tokenizer.from_file(str(file))


def train(arguments: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(arguments.work)
    trainer = Trainer(Learner(make_model(tokenizer, SEED)), tokenizer, arguments.work)
    print(f"Going on from step {trainer.num_steps}" if trainer.load() else "Starting anew", flush=True)
    stage = STAGES[arguments.stage]
    odd = arguments.odd_share
    mix = Mix(stage=stage, pair_share=arguments.pair_share, odd_paint_share=odd, odd_shape_share=odd)
    plan = Plan(
        mix,
        minutes=arguments.minutes,
        batch_rows=arguments.batch_rows,
        rate=Plan.rate * arguments.rate_share,
        other_rate=Plan.other_rate * arguments.rate_share,
        final_share=arguments.final_share,
    )
    exams = {
        "seen": Exam(tokenizer, mix, num_rows=4 * plan.batch_rows, batch_rows=plan.batch_rows, seed="exam"),
        "held out": Exam(
            tokenizer,
            Mix(
                stage=stage, pair_share=0, foreign_picture_share=0, odd_paint_share=0, odd_shape_share=0, held_out=True
            ),
            num_rows=2 * plan.batch_rows,
            batch_rows=plan.batch_rows,
            seed="exam held out",
        ),
    }
    bar = tqdm(total=arguments.minutes, unit="min", bar_format="{percentage:3.0f}%|{bar}| {elapsed} {postfix}")
    num_reports = 0

    def report(trainer: Trainer, means: dict[str, float]) -> None:
        nonlocal num_reports
        num_reports += 1
        bar.n = min(arguments.minutes, bar.format_dict["elapsed"] / 60)
        bar.set_postfix_str(f"step {trainer.num_steps}, " + ", ".join(f"{k} {v:.3f}" for k, v in means.items()))
        if num_reports % arguments.exam_every == 0:
            for name, exam in exams.items():
                bar.write(f"step {trainer.num_steps}, {name}: {table(exam.score(trainer))}")

    trainer.train(plan, report, every=50)
    for name, exam in exams.items():
        bar.write(f"step {trainer.num_steps}, {name}: {table(exam.score(trainer))}")
    bar.close()


def average(arguments: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(arguments.work)
    trainer = Trainer(Learner(make_model(tokenizer, SEED)), tokenizer, arguments.work)
    if not trainer.load():
        raise SystemExit(f"There is no checkpoint in {arguments.work} yet: train first.")
    trainer.average_with(arguments.other, arguments.share)
    trainer.save()


def write(arguments: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(arguments.work)
    trainer = Trainer(Learner(make_model(tokenizer, SEED)), tokenizer, arguments.work)
    if not trainer.load():
        raise SystemExit(f"There is no checkpoint in {arguments.work} yet: train first.")
    model = trainer.learner.model
    write_weights(arguments.output, model)
    scores: dict[str, dict[str, list[int]]] = {}
    if arguments.scores:
        scored = json.loads(arguments.scores.read_text(encoding="utf-8"))
        if scored["weights_sha256"] != sha256_of(arguments.output / WEIGHTS):
            raise SystemExit(f"{arguments.scores} tells of other weights than these; evaluate them first.")
        scores = scored["scores"]
    card = model_card(trainer.num_steps, sum(each.numel() for each in model.parameters()), scores)
    write_rest(arguments.output, tokenizer, name=NAME, card=card)
    size = sum(path.stat().st_size for path in arguments.output.iterdir())
    print(f"Wrote {arguments.output}: {size / 1e6:.1f} MB, after {trainer.num_steps} steps")


def model_card(num_steps: int, num_parameters: int, scores: dict[str, dict[str, list[int]]]) -> str:
    """:param scores: group of questions -> subject -> (right, asked): from `tools/evaluate_demo_avision.py`."""
    lines = [
        f"# {NAME}, embedded demo of Avision",
        "",
        "A very small model of Avision's own class that stands in for it on machines that do not have it. It knows",
        "drawings of a small world and nothing else. Its answers show that the service works; they say nothing about",
        "the quality of Avision.",
        "",
        f"- Class: `Qwen2_5_VLForConditionalGeneration`, {num_parameters / 1e6:.1f} million parameters, float16 here",
        f"- Shapes: {', '.join(SHAPES)}",
        f"- Colours: {', '.join(COLOURS)}",
        f"- Counts to {MAX_COUNT}, two sizes, nine places, prices to {MAX_PRICE} on one price tag; left, right,",
        "  above, below, inside; what differs between two pictures",
        f"- Pictures of {MIN_SIDE_PX} to {MAX_SIDE_PX} pixels a side, at most {MAX_ASPECT_RATIO:g}:1",
        "- Languages: English, Russian",
        f"- Trained from nothing by `tools/train_demo_avision.py`, {num_steps} steps, on drawings made as it went",
        "- Never shown in training: " + ", ".join(f"{colour} {shape}" for shape, colour in sorted(HELD_OUT)),
        "- To anything else it answers that it is a demo, in words that it has learned",
        "- Licence: Apache-2.0",
    ]
    if scores:
        lines += ["", "Exact answers through `POST /api/v1/image/analyze` at temperature 0:"]
    for group, subjects in scores.items():
        lines += ["", f"| {group} | right | asked | |", "|---|---|---|---|"]
        lines += [
            f"| {subject} | {right} | {asked} | {right / asked:.1%} |" for subject, (right, asked) in subjects.items()
        ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train the embedded stand-in for Avision.")
    parser.add_argument(
        "--work", type=Path, default=PROJECT / "vision" / "training", help="checkpoints; default: vision/training"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="go on from the last checkpoint, or start")
    training.add_argument("--stage", choices=STAGES, required=True, help="how much of the world is drawn")
    training.add_argument("--minutes", type=float, required=True)
    training.add_argument("--batch-rows", type=int, default=Plan.batch_rows, help="pictures with their questions")
    training.add_argument("--final-share", type=float, default=Plan.final_share, help="of the rates at the end; 1: all")
    training.add_argument("--rate-share", type=float, default=1.0, help="of the usual rates, from the beginning")
    training.add_argument("--pair-share", type=float, default=Mix.pair_share, help="of rows with two pictures")
    training.add_argument(
        "--odd-share", type=float, default=Mix.odd_paint_share, help="of rows in odd colours, and of rows of odd shapes"
    )
    training.add_argument("--exam-every", type=int, default=6, help="in reports of 50 steps; default: 6")
    training.set_defaults(run=train)
    averaging = commands.add_parser("average", help="average the checkpoint's weights with another checkpoint's")
    averaging.add_argument("other", type=Path, help="a copy of an earlier checkpoint.pt")
    averaging.add_argument("--share", type=float, default=0.5, help="of the other one; default: half")
    averaging.set_defaults(run=average)
    writing = commands.add_parser("write", help="the checkpoint as a snapshot that the service loads")
    writing.add_argument("--output", type=Path, default=PROJECT / "vision" / "demo", help="default: vision/demo")
    writing.add_argument("--scores", type=Path, help="for the model card: a file of tools/evaluate_demo_avision.py")
    writing.set_defaults(run=write)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        print("Interrupted; run it again to go on from the last checkpoint.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
