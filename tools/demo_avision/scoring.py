"""Exact match by kind of question, from logits alone: quick enough to be looked at while training goes on.

If every token of the right answer is the likeliest one after those before it, greedy decoding gives that very answer.
What counts in the end is measured over HTTP, by `tools/evaluate_demo_avision.py`.
"""

from __future__ import annotations

from collections import defaultdict
from random import Random

from tokenizers import Tokenizer

from tools.demo_avision.examples import IGNORED, Mix, Row, Wording, collate, sample_row
from tools.demo_avision.training import Trainer


class Exam:
    """The same rows each time, so that scores can be compared.

    :param seed: not one that training uses.
    """

    def __init__(self, tokenizer: Tokenizer, mix: Mix, *, num_rows: int, batch_rows: int, seed: str) -> None:
        random, words = Random(seed), Wording(tokenizer)
        rows = [sample_row(random, mix, words) for _ in range(num_rows)]
        self._batches = [rows[index : index + batch_rows] for index in range(0, num_rows, batch_rows)]

    def score(self, trainer: Trainer) -> dict[str, tuple[int, int]]:
        """Kind -> (right, all)."""
        right: defaultdict[str, int] = defaultdict(int)
        total: defaultdict[str, int] = defaultdict(int)
        for rows in self._batches:
            # Not under no_grad: that would be compiled anew, which takes longer than the gradients' memory is worth.
            logits, _ = trainer.forward(collate(rows))
            found = logits.detach().argmax(-1).tolist()
            start = 0
            for row in rows:
                start = self._count(row, found, start, right, total)
        return {kind: (right[kind], total[kind]) for kind in sorted(total)}

    def _count(
        self, row: Row, found: list[int], start: int, right: defaultdict[str, int], total: defaultdict[str, int]
    ) -> int:
        is_right = [True] * len(row.kinds)
        for target, segment in zip(row.targets.tolist(), row.segments.tolist(), strict=True):
            if target != IGNORED:
                is_right[segment - 1] &= found[start] == target
                start += 1
        for kind, ok in zip(row.kinds, is_right, strict=True):
            right[kind] += ok
            total[kind] += 1
        return start


def table(scores: dict[str, tuple[int, int]]) -> str:
    """One line: `describe 61/64, price 50/64`."""
    return ", ".join(f"{kind} {right}/{total}" for kind, (right, total) in scores.items())
