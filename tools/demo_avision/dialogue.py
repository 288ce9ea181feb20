"""What can be asked about a scene and what is right to answer, in English and Russian, each in several wordings.

Plain Python over `world.py`; the answers are what the embedded Avision is trained on and measured against.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from tools.demo_avision.words import (
    ADJECTIVES,
    NOUNS,
    PLACES,
    PLURALS,
    WORDINGS,
    Language,
    genitive_name_of,
    group_name_of,
    name_of,
    sentence,
    words_for,
)
from tools.demo_avision.world import (
    COLOURS,
    HELD_OUT,
    SHAPES,
    SIZES,
    Scene,
    Tag,
    Thing,
    sample_price,
)

#: What the model says to everything else. Learned, like all of its answers.
REFUSAL: dict[Language, str] = {
    "en": "I am a small demo model: I only know drawings of coloured shapes and price tags.",
    "ru": "Я маленькая демо-модель и знаю только рисунки с цветными фигурами и ценниками.",
}


@dataclass(frozen=True)
class Turn:
    """One question about one picture or two, and its only right answer.

    :param kind: what is asked for; scores are told by it.
    """

    kind: str
    language: Language
    question: str
    answer: str


#: Kinds of questions that neither name a colour nor ask for one.
COLOURLESS = frozenset(
    ("size", "shape_of_it", "count", "count_shape", "position", "price", "exists", "left", "right", "above", "below",
     "what_left", "what_right", "inside", "size_of_them", "shape_of_them", "no_price")
)  # fmt: skip

#: Kinds of questions that neither name a shape nor ask for one.
SHAPELESS = frozenset(("colour_of_it", "count", "count_colour", "price", "no_price"))

_YES_NO: dict[Language, dict[bool, str]] = {"en": {True: "Yes.", False: "No."}, "ru": {True: "Да.", False: "Нет."}}
_NO_TAG: dict[Language, str] = {"en": "There is no price tag.", "ru": "Ценника нет."}
_NOTHING: dict[Language, str] = {"en": "Nothing.", "ru": "Ничего."}
_NONE: dict[Language, str] = {"en": "There is none.", "ru": "Такой фигуры нет."}
_ONE_PICTURE: dict[Language, str] = {"en": "There is only one picture.", "ru": "Картинка только одна."}


def _shape_answer(thing: Thing, language: Language) -> str:
    return f"A {thing.shape}." if language == "en" else f"{NOUNS[thing.shape].nominative.capitalize()}."


def describe(scene: Scene, language: Language) -> str:
    """All that there is to say about a scene: its things from left to right, then the price."""
    things = scene.things
    if scene.layout == "group":
        text = group_name_of(things[0], len(things), language)
    elif scene.layout == "inside":
        inner, outer = things
        if language == "en":
            text = f"{name_of(inner, language)} inside {name_of(outer, language)}"
        else:
            text = f"{name_of(inner, language)} внутри {genitive_name_of(outer)}"
    else:
        text = ", ".join(f"{name_of(thing, language)} {place(scene, thing, language)}" for thing in things)
    sentences = [sentence(text)]
    if scene.tag is not None:
        sentences.append(("The price is {}." if language == "en" else "Цена {}.").format(scene.tag.price))
    return " ".join(sentences)


def place(scene: Scene, thing: Thing, language: Language) -> str:
    column, row = scene.third(thing)
    return PLACES[language][row][column]


def ask(kind: str, language: Language, random: Random, words: dict[str, str] | None = None) -> str:
    """A question of a kind in one of its wordings."""
    return typed(random.choice(WORDINGS[kind][language]).format(**(words or {})), language, random)


def typed(question: str, language: Language, random: Random) -> str:
    """As people type: at times with a please, in lower case, without the last mark, with е for ё."""
    if random.random() < 0.06:
        question = ("Please, " if language == "en" else "Пожалуйста, ") + question[0].lower() + question[1:]
    if random.random() < 0.15:
        question = question[0].lower() + question[1:]
    if random.random() < 0.15:
        question = question.rstrip("?.")
    if random.random() < 0.5:
        question = question.replace("ё", "е")
    return question


def turns(scene: Scene, random: Random, language: Language) -> list[Turn]:
    """All kinds of questions that have one clear answer for this scene, each once."""
    make = _Turns(scene, random, language)
    make.add("describe", describe(scene, language))
    make.about_price()
    make.about_counts()
    if scene.layout == "group":
        make.about_group()
    else:
        make.about_things()
    make.about_existence()
    make.about_what_is_not_there()
    if scene.layout == "apart":
        make.about_places()
    if scene.layout == "inside":
        make.about_inside()
    return make.made


def _quality(word: str, language: Language, question: str) -> str:
    """A colour or a size as the answer. In Russian «какого цвета» asks for the genitive, «какой цвет» does not."""
    if language == "en":
        return sentence(word)
    return sentence(ADJECTIVES[word].genitive if "акого" in question else ADJECTIVES[word].m)


class _Turns:
    """Collects the turns about one scene in one language."""

    def __init__(self, scene: Scene, random: Random, language: Language) -> None:
        self.made: list[Turn] = []
        self._scene = scene
        self._random = random
        self._language: Language = language
        self._shapes = {thing.shape for thing in scene.things}

    def add(self, kind: str, answer: str, words: dict[str, str] | None = None, *, wording: str = "") -> None:
        """:param wording: the kind whose wordings are used, if it is another."""
        question = ask(wording or kind, self._language, self._random, words)
        self.made.append(Turn(kind, self._language, question, answer))

    def _add_quality(self, kind: str, word: str, words: dict[str, str] | None = None) -> None:
        question = ask(kind, self._language, self._random, words)
        self.made.append(Turn(kind, self._language, question, _quality(word, self._language, question)))

    def _yes_no(self, kind: str, is_so: bool, words: dict[str, str]) -> None:
        self.add(kind, _YES_NO[self._language][is_so], words)

    def _absent_shape(self) -> str:
        return self._random.choice([shape for shape in SHAPES if shape not in self._shapes])

    def _absent_answer(self, shape: str) -> str:
        return f"There is no {shape}." if self._language == "en" else f"{NOUNS[shape].genitive.capitalize()} нет."

    def about_price(self) -> None:
        tag = self._scene.tag
        if tag is None:
            self.add("no_price", _NO_TAG[self._language], wording="price")
        else:
            self.add("price", str(tag.price))

    def about_counts(self) -> None:
        things = self._scene.things
        self.add("count", str(len(things)))
        chosen = self._random.choice(things)
        shape = chosen.shape if self._random.random() < 0.7 else self._absent_shape()
        self.add("count_shape", str(sum(thing.shape == shape for thing in things)), words_for(shape))
        colour = chosen.colour if self._random.random() < 0.7 else self._random.choice(COLOURS)
        self.add("count_colour", str(sum(thing.colour == colour for thing in things)), words_for(SHAPES[0], colour))

    def about_things(self) -> None:
        things, language = self._scene.things, self._language
        thing = self._random.choice(things)
        self._add_quality("colour", thing.colour, words_for(thing.shape))
        thing = self._random.choice(things)
        self.add("shape", _shape_answer(thing, language), words_for(thing.shape, thing.colour))
        thing = self._random.choice(things)
        self._add_quality("size", thing.size, words_for(thing.shape))
        if len(things) == 1:
            self._add_quality("colour_of_it", thing.colour)
            self.add("shape_of_it", _shape_answer(thing, language))

    def about_group(self) -> None:
        thing = self._scene.things[0]
        words = words_for(thing.shape, thing.colour)
        self._add_quality("colour_of_them", thing.colour, words)
        self._add_quality("size_of_them", thing.size, words)
        plural = PLURALS[thing.shape] if self._language == "en" else NOUNS[thing.shape].plural
        self.add("shape_of_them", sentence(plural), words)

    def about_what_is_not_there(self) -> None:
        """Questions that take for granted what is not so."""
        shape = self._absent_shape()
        if self._scene.layout != "group":
            kind = self._random.choice(("colour", "size", "position"))
            self.add("absent", self._absent_answer(shape), words_for(shape), wording=kind)
            colours = {thing.colour for thing in self._scene.things}
            colour = self._random.choice([colour for colour in COLOURS if colour not in colours])
            self.add("absent", _NONE[self._language], words_for(shape, colour), wording="shape")
        if self._scene.layout == "apart":
            self.add("absent", _NOTHING[self._language], words_for(self._scene.things[0].shape), wording="what_inside")
        self.add("absent", _ONE_PICTURE[self._language], wording="difference")

    def about_existence(self) -> None:
        random = self._random
        thing = random.choice(self._scene.things)
        is_there = random.random() < 0.5
        self._yes_no("exists", is_there, words_for(thing.shape if is_there else self._absent_shape()))
        is_there = random.random() < 0.5
        shape, colour = thing.shape, thing.colour
        pairs = {(other.shape, other.colour) for other in self._scene.things}
        while not is_there and ((shape, colour) in pairs or (shape, colour) in HELD_OUT):
            if random.random() < 0.5:
                shape, colour = random.choice(SHAPES), thing.colour
            else:
                shape, colour = thing.shape, random.choice(COLOURS)
        self._yes_no("exists_coloured", is_there, words_for(shape, colour))

    def about_places(self) -> None:
        scene, random = self._scene, self._random
        thing = random.choice(scene.things)
        self.add("position", sentence(place(scene, thing, self._language)), words_for(thing.shape))
        if len(scene.things) < 2:
            return
        first, second = random.sample(scene.things, 2)
        words = words_for(first.shape, other=second.shape)
        (column, row), (other_column, other_row) = scene.third(first), scene.third(second)
        if column != other_column:
            is_left = column < other_column
            if len(scene.things) == 2 and random.random() < 0.4:
                self.add("what_right" if is_left else "what_left", _shape_answer(second, self._language), words)
            else:
                kind = random.choice(("left", "right"))
                self._compare(kind, first, second, is_left == (kind == "left"))
        if row != other_row:
            kind = random.choice(("above", "below"))
            self._compare(kind, first, second, (row < other_row) == (kind == "above"))
        if random.random() < 0.2:
            self._yes_no("inside", False, words)

    def _compare(self, kind: str, first: Thing, second: Thing, is_so: bool) -> None:
        """The answer says first where both are: what follows from that is easier for a small model than what it sees
        at a glance, and the reader sees why."""
        language = self._language
        one, other = place(self._scene, first, language), place(self._scene, second, language)
        if language == "en":
            text = f"the {first.shape} is {one}, the {second.shape} {other}"
        else:
            text = f"{NOUNS[first.shape].nominative} {one}, {NOUNS[second.shape].nominative} {other}"
        verdict = _YES_NO[language][is_so].lower()
        self.add(kind, sentence(f"{text}: {verdict[:-1]}"), words_for(first.shape, other=second.shape))

    def about_inside(self) -> None:
        inner, outer = self._scene.things
        self.add("what_inside", sentence(name_of(inner, self._language)), words_for(outer.shape))
        if self._random.random() < 0.5:
            self._yes_no("inside", True, words_for(inner.shape, other=outer.shape))
        else:
            self._yes_no("inside", False, words_for(outer.shape, other=inner.shape))


# Two pictures.


_CHANGE_SHARE = 0.35


def change_scene(scene: Scene, random: Random) -> Scene:
    """A scene that may differ from this one in number, size, colour, shape and price, each at times; in one
    of three nothing differs. Take scenes of one thing or of a group."""
    for change in (_recount, _resize, _recolour, _reshape, _reprice):
        if random.random() < _CHANGE_SHARE:
            scene = change(scene, random)
    return scene


def _alter(scene: Scene, **changes: Any) -> Scene:
    """The same of all its things, unless that makes a pair that training never shows."""
    things = tuple(replace(each, **changes) for each in scene.things)
    return scene if (things[0].shape, things[0].colour) in HELD_OUT else replace(scene, things=things)


def _recolour(scene: Scene, random: Random) -> Scene:
    return _alter(scene, colour=random.choice(COLOURS))


def _reshape(scene: Scene, random: Random) -> Scene:
    return _alter(scene, shape=random.choice(SHAPES))


def _resize(scene: Scene, random: Random) -> Scene:
    thing = scene.things[0]
    if thing.size != SIZES[1]:  # what grows could run into something
        return scene
    things = tuple(replace(each, size=SIZES[0], radius=each.radius * 0.54) for each in scene.things)
    return replace(scene, things=things)


def _recount(scene: Scene, random: Random) -> Scene:
    if len(scene.things) < 3:
        return scene
    return replace(scene, things=scene.things[: random.randint(2, len(scene.things) - 1)])


def _reprice(scene: Scene, random: Random) -> Scene:
    if scene.tag is None:
        return scene
    old = str(scene.tag.price)
    index = random.randrange(len(old))
    price = int(f"{old[:index]}{random.randint(1, 9)}{old[index + 1 :]}")  # one digit: the hardest to tell apart
    while random.random() < 0.5 or len(str(price)) != len(old):  # a longer one may not have room
        price = sample_price(random)
    return replace(scene, tag=Tag(price, scene.tag.x, scene.tag.y))


def difference(first: Scene, second: Scene, language: Language) -> str:
    """The answer to what differs between two scenes of one thing or of a group: quality by quality what either shows,
    then whether that is the same. Each verdict stands right after the two words that it follows from; one verdict at
    the end of two whole descriptions was not learned."""
    compared = [
        f"{quality.name[language]} {quality.of(first, language)} {_AND[language]} {quality.of(second, language)}: "
        + (quality.same if quality.of(first, language) == quality.of(second, language) else quality.different)[language]
        for quality in _QUALITIES
        if quality.of(first, language) and quality.of(second, language)
    ]
    return sentence("; ".join(compared))


_AND: dict[Language, str] = {"en": "and", "ru": "и"}


@dataclass(frozen=True)
class _Quality:
    """What two scenes are compared by.

    :param of: its word for a scene, in the nominative; empty where a scene has none.
    """

    name: dict[Language, str]
    of: Callable[[Scene, Language], str]
    same: dict[Language, str]
    different: dict[Language, str]


def _quality_of_scenes(
    english: str, russian: str, same: str, different: str, of: Callable[[Scene, Language], str]
) -> _Quality:
    return _Quality(
        {"en": english, "ru": russian}, of, {"en": "the same", "ru": same}, {"en": "different", "ru": different}
    )


_QUALITIES = (
    _quality_of_scenes("number", "количество", "то же", "разное", lambda scene, language: str(len(scene.things))),
    _quality_of_scenes(
        "size", "размер", "тот же", "разный", lambda scene, language: _word(scene.things[0].size, language)
    ),
    _quality_of_scenes(
        "colour", "цвет", "тот же", "разный", lambda scene, language: _word(scene.things[0].colour, language)
    ),
    _quality_of_scenes(
        "shape", "форма", "та же", "разная", lambda scene, language: _word(scene.things[0].shape, language)
    ),
    _quality_of_scenes(
        "price", "цена", "та же", "разная", lambda scene, language: str(scene.tag.price) if scene.tag else ""
    ),
)


def _word(word: str, language: Language) -> str:
    if language == "en":
        return word
    return NOUNS[word].nominative if word in NOUNS else ADJECTIVES[word].m


_VERDICT = re.compile(r"(?<=: )[^;.]+")


def verdicts(answer: str) -> list[tuple[int, int]]:
    """(begin, end) in characters of what an answer concludes from the words before it: what stands after a colon."""
    return [match.span() for match in _VERDICT.finditer(answer)]
