"""The questions that the embedded Avision is measured by: pictures and scenes that training never saw.

Makes questions and counts right answers; who is asked is the caller's business: a running service
(`tools/evaluate_demo_avision.py`) or the application inside a test.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from random import Random

from tools.demo_avision import foreign
from tools.demo_avision.dialogue import REFUSAL, Turn, ask, change_scene, difference, turns, typed
from tools.demo_avision.drawing import draw_scene, encode
from tools.demo_avision.words import LANGUAGES
from tools.demo_avision.world import sample_scene

#: What is asked of a picture where it has an answer, and the kinds of `dialogue.py` that count as it.
SUBJECTS: dict[str, tuple[str, ...]] = {
    "description": ("describe",),
    "price": ("price",),
    "colour": ("colour", "colour_of_it", "colour_of_them"),
    "shape": ("shape", "shape_of_it", "shape_of_them"),
    "count": ("count", "count_shape", "count_colour"),
    "position": ("position",),
    "size": ("size", "size_of_them"),
    "absence": ("absent", "no_price"),
    "existence": ("exists", "exists_coloured"),
    "relation": ("left", "right", "above", "below", "what_left", "what_right", "inside", "what_inside"),
}


@dataclass(frozen=True)
class Question:
    """:param subject: what its score is counted under.
    :param pictures: encoded files.
    """

    subject: str
    pictures: tuple[bytes, ...]
    prompt: str
    answer: str


@dataclass(frozen=True)
class Mark:
    question: Question
    given: str

    @property
    def is_right(self) -> bool:
        return self.given == self.question.answer


def about_pictures(number: int, seed: str, *, held_out: bool = False) -> Iterator[Question]:
    """One question of each subject that applies, for so many pictures; as many English as Russian ones.

    :param held_out: with the pairs of shape and colour that training never showed.
    """
    random = Random(seed)
    for index in range(number):
        scene = sample_scene(random, held_out=held_out)
        picture = encode(draw_scene(scene, random), random)
        possible = turns(scene, random, LANGUAGES[index % 2])
        for subject, kinds in SUBJECTS.items():
            chosen = [turn for turn in possible if turn.kind in kinds]
            if chosen:
                yield _question(subject, (picture,), random.choice(chosen))


def about_pairs(number: int, seed: str) -> Iterator[Question]:
    """What differs between two pictures."""
    random = Random(seed)
    for index in range(number):
        scene = sample_scene(random)
        while scene.layout != "group" and len(scene.things) > 1:
            scene = sample_scene(random)
        changed = change_scene(scene, random)
        if random.random() < 0.5:
            scene, changed = changed, scene
        language = LANGUAGES[index % 2]
        turn = Turn("difference", language, ask("difference", language, random), difference(scene, changed, language))
        pictures = tuple(encode(draw_scene(each, random), random) for each in (scene, changed))
        yield _question("difference", pictures, turn)


def about_foreign(number: int, seed: str) -> Iterator[Question]:
    """By turns a foreign question about a picture of ours and a question of ours about a foreign picture."""
    random = Random(seed)
    questions = [(language, text) for language in LANGUAGES for text in foreign.HELD_OUT_QUESTIONS[language]]
    random.shuffle(questions)
    for index in range(number):
        scene = sample_scene(random)
        if index % 2:
            language = random.choice(LANGUAGES)
            turn = random.choice(turns(scene, random, language))
            picture = encode(foreign.held_out_picture(f"{seed}-{index}"), random)
            yield Question("foreign picture", (picture,), turn.question, REFUSAL[language])
        else:
            language, text = questions[index // 2 % len(questions)]
            picture = encode(draw_scene(scene, random), random)
            yield Question("foreign question", (picture,), typed(text, language, random), REFUSAL[language])


def _question(subject: str, pictures: tuple[bytes, ...], turn: Turn) -> Question:
    return Question(subject, pictures, turn.question, turn.answer)


def scores(marks: Iterable[Mark]) -> dict[str, tuple[int, int]]:
    """Subject -> (right, asked)."""
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for each in marks:
        asked[each.question.subject] += 1
        right[each.question.subject] += each.is_right
    return {subject: (right[subject], asked[subject]) for subject in asked}
