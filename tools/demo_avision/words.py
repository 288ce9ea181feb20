"""The words of the embedded Avision's world: names of things in English and Russian, in the forms that sentences need,
and the wordings of its questions. Which question has which answer is `dialogue.py`'s work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tools.demo_avision.world import COLOURS, MAX_COUNT, SHAPES, Thing

Language = Literal["en", "ru"]
LANGUAGES: tuple[Language, ...] = ("en", "ru")

# Russian words in the forms that are needed here.


@dataclass(frozen=True)
class _Noun:
    gender: Literal["m", "f", "n"]
    nominative: str
    genitive: str
    genitive_plural: str
    plural: str


@dataclass(frozen=True)
class _Adjective:
    m: str
    f: str
    n: str
    genitive: str
    genitive_f: str
    plural: str
    genitive_plural: str

    def agreeing(self, noun: _Noun) -> str:
        return {"m": self.m, "f": self.f, "n": self.n}[noun.gender]

    def agreeing_genitive(self, noun: _Noun) -> str:
        return self.genitive_f if noun.gender == "f" else self.genitive


def _hard(stem: str) -> _Adjective:
    return _Adjective(*(stem + ending for ending in ("ый", "ая", "ое", "ого", "ой", "ые", "ых")))


NOUNS = {
    "circle": _Noun("m", "круг", "круга", "кругов", "круги"),
    "square": _Noun("m", "квадрат", "квадрата", "квадратов", "квадраты"),
    "triangle": _Noun("m", "треугольник", "треугольника", "треугольников", "треугольники"),
    "star": _Noun("f", "звезда", "звезды", "звёзд", "звёзды"),
    "heart": _Noun("n", "сердце", "сердца", "сердец", "сердца"),
    "cross": _Noun("m", "крест", "креста", "крестов", "кресты"),
    "moon": _Noun("m", "месяц", "месяца", "месяцев", "месяцы"),
    "house": _Noun("m", "дом", "дома", "домов", "дома"),
}
ADJECTIVES = {
    "red": _hard("красн"),
    "orange": _hard("оранжев"),
    "yellow": _hard("жёлт"),
    "green": _hard("зелён"),
    "blue": _Adjective("синий", "синяя", "синее", "синего", "синей", "синие", "синих"),
    "purple": _hard("фиолетов"),
    "pink": _hard("розов"),
    "black": _hard("чёрн"),
    "small": _Adjective("маленький", "маленькая", "маленькое", "маленького", "маленькой", "маленькие", "маленьких"),
    "large": _Adjective("большой", "большая", "большое", "большого", "большой", "большие", "больших"),
}
_NUMBERS: dict[Language, tuple[str, ...]] = {
    "en": ("", "", "two", "three", "four", "five"),
    "ru": ("", "", "два", "три", "четыре", "пять"),
}
PLACES: dict[Language, tuple[tuple[str, str, str], ...]] = {
    "en": (
        ("at the top left", "at the top", "at the top right"),
        ("on the left", "in the centre", "on the right"),
        ("at the bottom left", "at the bottom", "at the bottom right"),
    ),
    "ru": (
        ("слева вверху", "вверху", "справа вверху"),
        ("слева", "в центре", "справа"),
        ("слева внизу", "внизу", "справа внизу"),
    ),
}

# The wordings of each kind of question. Names in braces: see `words_for`.
WORDINGS: dict[str, dict[Language, tuple[str, ...]]] = {
    "describe": {
        "en": ("Describe the picture.", "What is in the picture?", "What do you see?", "What is shown here?",
               "Describe this drawing.", "What does the picture show?", "What is this?", "Describe the image.",
               "What is in the image?", "Tell me about the picture.", "What's in this picture?"),
        "ru": ("Опиши картинку.", "Что на картинке?", "Что ты видишь?", "Что здесь нарисовано?", "Опиши рисунок.",
               "Что изображено на картинке?", "Что это?", "Опиши изображение.", "Расскажи, что на картинке.",
               "Что на рисунке?", "Что на этой картинке?"),
    },
    "colour": {
        "en": ("What colour is the {shape}?", "What color is the {shape}?", "Name the colour of the {shape}.",
               "Which colour does the {shape} have?"),
        "ru": ("Какого цвета {nominative}?", "Какой цвет у {genitive}?", "Назови цвет {genitive}."),
    },
    "colour_of_it": {
        "en": ("What colour is it?", "What color is the object?", "What colour is the shape?"),
        "ru": ("Какого цвета фигура?", "Какой цвет у фигуры?", "Какого цвета объект?"),
    },
    "colour_of_them": {
        "en": ("What colour are they?", "What color are the objects?", "What colour are the shapes?",
               "What colour are the {plural}?", "What color are the {plural}?"),
        "ru": ("Какого цвета фигуры?", "Какой цвет у фигур?", "Какого цвета объекты?",
               "Какого цвета {nominative_plural}?", "Какой цвет у {genitive_plural}?"),
    },
    "shape_of_them": {
        "en": ("What shapes are they?", "What objects are they?"),
        "ru": ("Какие это фигуры?", "Какие фигуры на картинке?", "Что это за фигуры?"),
    },
    "size_of_them": {
        "en": ("What size are they?", "What size are the {plural}?", "Are the {plural} large or small?"),
        "ru": ("Какого размера фигуры?", "Какого размера {nominative_plural}?", "Какой размер у {genitive_plural}?"),
    },
    "shape": {
        "en": ("What shape is the {colour} object?", "What is the {colour} thing?", "Which shape is {colour}?"),
        "ru": ("Какая фигура {colour_genitive} цвета?", "Что здесь {colour_genitive} цвета?",
               "Какой формы {colour_f} фигура?"),
    },
    "shape_of_it": {
        "en": ("What shape is it?", "Which shape is in the picture?", "What object is it?"),
        "ru": ("Какая это фигура?", "Какая фигура на картинке?", "Что это за фигура?"),
    },
    "size": {
        "en": ("What size is the {shape}?", "Is the {shape} large or small?", "How large is the {shape}?"),
        "ru": ("Какого размера {nominative}?", "Какой размер у {genitive}?"),
    },
    "count": {
        "en": ("How many shapes are there?", "How many objects are in the picture?", "Count the shapes.",
               "How many objects do you see?", "How many shapes?"),
        "ru": ("Сколько фигур на картинке?", "Сколько здесь фигур?", "Посчитай фигуры.", "Сколько фигур ты видишь?",
               "Сколько фигур?", "Сколько здесь объектов?"),
    },
    "count_shape": {
        "en": ("How many {plural} are there?", "How many {plural} do you see?", "Count the {plural}."),
        "ru": ("Сколько {genitive_plural} на картинке?", "Сколько здесь {genitive_plural}?"),
    },
    "count_colour": {
        "en": ("How many {colour} shapes are there?", "How many {colour} objects do you see?"),
        "ru": ("Сколько здесь {colour_genitive_plural} фигур?", "Сколько {colour_genitive_plural} фигур на картинке?"),
    },
    "position": {
        "en": ("Where is the {shape}?", "In which part of the picture is the {shape}?",
               "Where in the picture is the {shape}?"),
        "ru": ("Где {nominative}?", "Где находится {nominative}?", "В какой части картинки {nominative}?"),
    },
    "price": {
        "en": ("What is the price?", "How much does it cost?", "What does the price tag say?", "Read the price tag.",
               "How much is it?", "What's the price?", "Price?"),
        "ru": ("Какая цена?", "Сколько это стоит?", "Что написано на ценнике?", "Назови цену.",
               "Какая цена на ценнике?", "Цена?", "Сколько стоит?"),
    },
    "exists": {
        "en": ("Is there a {shape}?", "Do you see a {shape}?", "Is there a {shape} in the picture?"),
        "ru": ("Есть ли здесь {nominative}?", "На картинке есть {nominative}?", "Есть ли на картинке {nominative}?"),
    },
    "exists_coloured": {
        "en": ("Is there {a_colour} {shape}?", "Do you see {a_colour} {shape}?"),
        "ru": ("Есть ли здесь {colour_agreeing} {nominative}?", "На картинке есть {colour_agreeing} {nominative}?"),
    },
    "left": {
        "en": ("Is the {shape} to the left of the {other}?", "Is the {shape} left of the {other}?"),
        "ru": ("{Nominative} слева от {other_genitive}?", "{Nominative} левее {other_genitive}?"),
    },
    "right": {
        "en": ("Is the {shape} to the right of the {other}?", "Is the {shape} right of the {other}?"),
        "ru": ("{Nominative} справа от {other_genitive}?", "{Nominative} правее {other_genitive}?"),
    },
    "above": {"en": ("Is the {shape} above the {other}?", "Is the {shape} higher than the {other}?"),
              "ru": ("{Nominative} выше {other_genitive}?",)},
    "below": {"en": ("Is the {shape} below the {other}?", "Is the {shape} lower than the {other}?"),
              "ru": ("{Nominative} ниже {other_genitive}?",)},
    "what_left": {"en": ("What is to the left of the {shape}?", "What is left of the {shape}?"),
                  "ru": ("Что слева от {genitive}?", "Что находится слева от {genitive}?")},
    "what_right": {"en": ("What is to the right of the {shape}?", "What is right of the {shape}?"),
                   "ru": ("Что справа от {genitive}?", "Что находится справа от {genitive}?")},
    "what_inside": {"en": ("What is inside the {shape}?", "What is in the {shape}?"),
                    "ru": ("Что внутри {genitive}?", "Что находится внутри {genitive}?")},
    "inside": {"en": ("Is the {shape} inside the {other}?", "Is the {shape} in the {other}?"),
               "ru": ("{Nominative} внутри {other_genitive}?",)},
    "describe_first": {
        "en": ("Describe the first picture.", "What is in the first picture?"),
        "ru": ("Опиши первую картинку.", "Что на первой картинке?"),
    },
    "describe_second": {
        "en": ("Describe the second picture.", "What is in the second picture?"),
        "ru": ("Опиши вторую картинку.", "Что на второй картинке?"),
    },
    "difference": {
        "en": ("Which differs?", "What is the difference?", "What differs?", "How do the pictures differ?",
               "Compare the pictures."),
        "ru": ("Чем отличаются картинки?", "В чём разница?", "Чем они отличаются?", "Какое отличие?",
               "Сравни картинки."),
    },
}  # fmt: skip

PLURALS = {shape: shape + ("es" if shape == "cross" else "s") for shape in SHAPES}


def words_for(shape: str, colour: str = COLOURS[0], other: str = SHAPES[0]) -> dict[str, str]:
    noun, adjective = NOUNS[shape], ADJECTIVES[colour]
    return {
        "shape": shape,
        "plural": PLURALS[shape],
        "colour": colour,
        "a_colour": f"{'an' if colour[0] in 'aeiou' else 'a'} {colour}",
        "other": other,
        "nominative": noun.nominative,
        "Nominative": noun.nominative.capitalize(),
        "genitive": noun.genitive,
        "genitive_plural": noun.genitive_plural,
        "nominative_plural": noun.plural,
        "colour_genitive": adjective.genitive,
        "colour_genitive_plural": adjective.genitive_plural,
        "colour_f": adjective.f,
        "colour_agreeing": adjective.agreeing(noun),
        "other_genitive": NOUNS[other].genitive,
    }


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def name_of(thing: Thing, language: Language) -> str:
    """`a small red star`, `маленькая красная звезда`."""
    if language == "en":
        return f"a {thing.size} {thing.colour} {thing.shape}"
    noun = NOUNS[thing.shape]
    return f"{ADJECTIVES[thing.size].agreeing(noun)} {ADJECTIVES[thing.colour].agreeing(noun)} {noun.nominative}"


def genitive_name_of(thing: Thing) -> str:
    noun = NOUNS[thing.shape]
    size, colour = ADJECTIVES[thing.size], ADJECTIVES[thing.colour]
    return f"{size.agreeing_genitive(noun)} {colour.agreeing_genitive(noun)} {noun.genitive}"


def group_name_of(thing: Thing, count: int, language: Language) -> str:
    """`three small red stars`, `три маленькие красные звезды`: after two to four Russian has its own forms."""
    number = _NUMBERS[language][count]
    if language == "en":
        return f"{number} {thing.size} {thing.colour} {PLURALS[thing.shape]}"
    noun, size, colour = NOUNS[thing.shape], ADJECTIVES[thing.size], ADJECTIVES[thing.colour]
    if count == MAX_COUNT:
        return f"{number} {size.genitive_plural} {colour.genitive_plural} {noun.genitive_plural}"
    if noun.gender == "f":
        number = "две" if count == 2 else number
        return f"{number} {size.plural} {colour.plural} {noun.genitive}"
    return f"{number} {size.genitive_plural} {colour.genitive_plural} {noun.genitive}"
