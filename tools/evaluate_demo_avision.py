"""Measure the embedded Avision as its users meet it: through `POST /api/v1/image/analyze` at temperature 0.

Asks a running service about pictures that training never saw, counts exact matches and says for each subject whether
its bar holds. The rate limit must be off (`AVITO_RATE_LIMIT=`). Exit code 1 if a bar is missed.

    python -m tools.evaluate_demo_avision [--url http://localhost:8085] [--pictures 1000] [--json FILE]
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

from tqdm import tqdm

from config import PROJECT_ROOT
from tools.demo_avision.exam import Mark, Question, about_foreign, about_pairs, about_pictures, scores
from tools.demo_avision.snapshot import WEIGHTS, sha256_of
from tools.service_client import Failed, Service

DOOR = "/api/v1/image/analyze"
MAX_TOKENS = 128
#: Least share of exact matches by group of questions and subject; what is not named here is only reported.
BARS: dict[str, dict[str, float]] = {
    "pictures never seen": {
        "description": 0.85,
        "colour": 0.95,
        "shape": 0.95,
        "count": 0.95,
        "position": 0.95,
        "price": 0.90,
    },
    "pairs of shape and colour never seen": {
        "description": 0.80,
        "colour": 0.80,
        "shape": 0.80,
        "count": 0.80,
        "position": 0.80,
        "price": 0.80,
    },
    "outside its world": {"foreign question": 0.90, "foreign picture": 0.90},
    "two pictures": {"difference": 0.80},
}


def answer(service: Service, question: Question) -> tuple[str, float]:
    """The text, and how many seconds the service took for it.

    :raise Failed: the service did not answer with a completion, or its model is no embedded one.
    """
    pictures = [base64.b64encode(picture).decode() for picture in question.pictures]
    payload = {"prompt": question.prompt, "images": pictures, "temperature": 0, "max_tokens": MAX_TOKENS}
    reply = service.ask(DOOR, payload=payload, timeout_s=120)
    if reply.status == 200 and not reply.body["data"]["demo"]:
        raise Failed("the service does not run an embedded Avision")
    if reply.status != 200:
        raise Failed(f"{DOOR} answered {reply.status}: {reply.body.get('error', {}).get('message', reply.body)}")
    return str(reply.body["data"]["text"]), float(reply.body["metrics"]["total_time"])


def ask_all(service: Service, questions: Iterable[Question], num_clients: int) -> tuple[list[Mark], list[float]]:
    asked = list(questions)
    with ThreadPoolExecutor(num_clients) as pool:
        given = pool.map(lambda question: answer(service, question), asked)
        replies = list(tqdm(given, total=len(asked)))
    marks = [Mark(question, text) for question, (text, _) in zip(asked, replies, strict=True)]
    return marks, [seconds for _, seconds in replies]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure the embedded Avision through a running service.")
    parser.add_argument("--url", default="http://localhost:8085")
    parser.add_argument("--pictures", type=int, default=1000, help="never seen ones; default: 1000")
    parser.add_argument("--clients", type=int, default=16, help="questions under way at once; default: 16")
    parser.add_argument("--seed", default="evaluation", help="other pictures; default: evaluation")
    parser.add_argument("--wrong", type=int, default=0, metavar="N", help="show so many wrong answers of each subject")
    parser.add_argument("--json", type=Path, help="write the scores to this file, for the model card")
    parser.add_argument(
        "--snapshot", type=Path, default=PROJECT_ROOT / "vision" / "demo", help="what the service runs: vision/demo"
    )
    arguments = parser.parse_args(argv)
    service = Service(arguments.url)
    number, seed = arguments.pictures, arguments.seed
    groups: dict[str, Iterable[Question]] = {
        "pictures never seen": about_pictures(number, seed),
        "pairs of shape and colour never seen": about_pictures(number // 4, f"{seed} held out", held_out=True),
        "outside its world": about_foreign(number // 5, f"{seed} foreign"),
        "two pictures": about_pairs(number // 5, f"{seed} pairs"),
    }
    begun = time.monotonic()
    results: dict[str, dict[str, tuple[int, int]]] = {}
    are_all_met = True
    try:
        for group, questions in groups.items():
            marks, seconds = ask_all(service, questions, arguments.clients)
            results[group] = scores(marks)
            times = f"median {median(seconds):.2f} s, longest {max(seconds):.2f} s, {arguments.clients} at once"
            print(f"\n{group} ({times})")
            for subject, (right, asked) in results[group].items():
                bar = BARS[group].get(subject)
                is_met = bar is None or right >= bar * asked
                are_all_met &= is_met
                verdict = "" if bar is None else f"  bar {bar:.0%}: {'met' if is_met else 'MISSED'}"
                print(f"  {subject:18} {right:5} of {asked:5}  {right / asked:6.1%}{verdict}")
                wrong = [each for each in marks if each.question.subject == subject and not each.is_right]
                for each in wrong[: arguments.wrong]:
                    print(f"      {each.question.prompt} -> {each.given!r}, right: {each.question.answer!r}")
    except Failed as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    print(f"\n{time.monotonic() - begun:.0f} s")
    if arguments.json:
        scored = {"weights_sha256": sha256_of(arguments.snapshot / WEIGHTS), "scores": results}
        arguments.json.write_text(json.dumps(scored, indent=2) + "\n", encoding="utf-8")
    return 0 if are_all_met else 1


if __name__ == "__main__":
    sys.exit(main())
