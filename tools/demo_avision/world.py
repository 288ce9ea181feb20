"""The small world that the embedded Avision knows: drawings of coloured shapes and of a price tag.

A `Scene` says what is on a picture and where; `sample_scene` makes one up. Plain Python: drawing is `drawing.py`'s
work, and what can be asked about a scene `dialogue.py`'s.

Lengths are in *units*: one unit is the square root of the picture's area in pixels, so that a thing keeps its share of
the picture whatever the picture's size and shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from random import Random
from typing import Literal

Size = Literal["small", "large"]
Layout = Literal["apart", "group", "inside"]

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "moon", "house")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
SIZES: tuple[Size, ...] = ("small", "large")
#: Shapes roomy enough to hold a small thing.
CONTAINERS = ("circle", "square")

#: Pairs that training never shows, one for each shape and each colour: what is right about them was not learned by
#: heart.
HELD_OUT = frozenset(zip(SHAPES, COLOURS[3:] + COLOURS[:3], strict=True))

MAX_COUNT = 5
MAX_PRICE = 9999
MIN_SIDE_PX, MAX_SIDE_PX = 112, 448
MAX_ASPECT_RATIO = 2.0

# Radii, in units. A container is larger than any other large thing, so that what is inside stands clear of its rim.
_RADII: dict[Size, tuple[float, float]] = {"small": (0.08, 0.095), "large": (0.15, 0.175)}
_CONTAINER_RADII = (0.22, 0.25)
_GAP = 0.02  # between two things, and between a thing and the edge
TAG_HEIGHT = 0.16
DIGIT_WIDTH = 0.088
TAG_PADDING = 0.05
# A third of the picture ends here; no centre comes closer to the border between two thirds than this.
BORDER_MARGIN = 0.045
_MIN_ORDER_GAP = 0.07


@dataclass(frozen=True)
class Thing:
    """One shape. `x` and `y` of its centre and `radius` are in units, from the upper left corner."""

    shape: str
    colour: str
    size: Size
    x: float = 0.0
    y: float = 0.0
    radius: float = 0.0


@dataclass(frozen=True)
class Tag:
    """A price tag; `x` and `y` of its upper left corner in units."""

    price: int
    x: float
    y: float

    @property
    def width(self) -> float:
        return tag_width(self.price)


@dataclass(frozen=True)
class Scene:
    """What is on a picture.

    :param width: in pixels, as is `height`.
    :param layout: `apart`: one to three things of different shapes and colours, ordered from left to right;
        `group`: two to five equal things; `inside`: the first thing lies inside the second.
    """

    width: int
    height: int
    layout: Layout
    things: tuple[Thing, ...]
    tag: Tag | None = None

    @property
    def unit_px(self) -> float:
        return math.sqrt(self.width * self.height)

    def third(self, thing: Thing) -> tuple[int, int]:
        """(column, row) of the thing's centre, each 0, 1 or 2."""
        return (
            min(2, int(3 * thing.x * self.unit_px / self.width)),
            min(2, int(3 * thing.y * self.unit_px / self.height)),
        )


@dataclass(frozen=True)
class Stage:
    """How much of the world is drawn. Training widens it step by step.

    :param layouts: which layouts, drawn equally often.
    :param max_things: of an `apart` scene.
    :param tag_share: share of scenes with a price tag.
    """

    layouts: tuple[Layout, ...] = ("apart", "apart", "group", "inside")
    max_things: int = 3
    tag_share: float = 0.6


STAGES = {
    "one": Stage(layouts=("apart",), max_things=1, tag_share=0.5),
    "whole": Stage(),
}


class _DoesNotFit(Exception):
    """No free place was found; the same is tried on another picture."""


def tag_width(price: int) -> float:
    return 2 * TAG_PADDING + DIGIT_WIDTH * len(str(price))


def sample_scene(random: Random, stage: Stage = STAGES["whole"], *, held_out: bool = False) -> Scene:
    """:param held_out: make the scene of the pairs in `HELD_OUT`, which otherwise never occur."""
    layout = random.choice(stage.layouts)
    number = random.randint(2, MAX_COUNT) if layout == "group" else random.randint(1, stage.max_things)
    has_tag = random.random() < stage.tag_share
    while True:
        try:
            scene = _place(random, layout, number, held_out)
            return replace(scene, tag=_tag(random, scene)) if has_tag else scene
        except _DoesNotFit:
            continue


def sample_size(random: Random) -> tuple[int, int]:
    """(width, height) in pixels; the logarithms of area and ratio are uniform, so that small and large, wide and tall
    pictures are equally common."""
    area = math.exp(random.uniform(2 * math.log(MIN_SIDE_PX), 2 * math.log(MAX_SIDE_PX)))
    ratio = math.exp(random.uniform(-1, 1) * math.log(MAX_ASPECT_RATIO))
    sides = math.sqrt(area * ratio), math.sqrt(area / ratio)
    width, height = (min(MAX_SIDE_PX, max(MIN_SIDE_PX, round(side))) for side in sides)
    return width, height


def sample_price(random: Random) -> int:
    """As many prices of one digit as of two, three and four."""
    digits = random.randint(1, len(str(MAX_PRICE)))
    return random.randint(10 ** (digits - 1), 10**digits - 1)


def _pick_pair(random: Random, held_out: bool, taken: tuple[Thing, ...] = ()) -> tuple[str, str]:
    """A shape and a colour that no thing so far has."""
    while True:
        pair = random.choice(sorted(HELD_OUT)) if held_out else (random.choice(SHAPES), random.choice(COLOURS))
        is_free = all(pair[0] != other.shape and pair[1] != other.colour for other in taken)
        if is_free and (pair in HELD_OUT) == held_out:
            return pair


def _place(random: Random, layout: Layout, number: int, held_out: bool) -> Scene:
    width, height = sample_size(random)
    scene = Scene(width, height, layout, ())
    if layout == "inside":
        return replace(scene, things=_inside(random, scene, held_out))
    if layout == "group":
        shape, colour = _pick_pair(random, held_out)
        size: Size = random.choice(SIZES)
        for _ in range(number):
            scene = _add(random, scene, shape, colour, size)
        return scene
    for _ in range(number):
        shape, colour = _pick_pair(random, held_out, scene.things)
        scene = _add(random, scene, shape, colour, random.choice(SIZES))
    return replace(scene, things=tuple(sorted(scene.things, key=lambda thing: thing.x)))


def _inside(random: Random, scene: Scene, held_out: bool) -> tuple[Thing, ...]:
    unit = scene.unit_px
    while True:
        outer_shape, outer_colour = _pick_pair(random, held_out)
        if outer_shape in CONTAINERS:
            break
    radius = random.uniform(*_CONTAINER_RADII)
    x = random.uniform(radius + _GAP, scene.width / unit - radius - _GAP)
    y = random.uniform(radius + _GAP, scene.height / unit - radius - _GAP)
    outer = Thing(outer_shape, outer_colour, "large", x, y, radius)
    shape, colour = _pick_pair(random, held_out, (outer,))
    inner_radius = random.uniform(*_RADII["small"])
    slack = 0.6 * radius - inner_radius
    x, y = x + random.uniform(-slack, slack), y + random.uniform(-slack, slack)
    return (Thing(shape, colour, "small", x, y, inner_radius), outer)


def _add(random: Random, scene: Scene, shape: str, colour: str, size: Size) -> Scene:
    width, height = scene.width / scene.unit_px, scene.height / scene.unit_px
    for _ in range(30):
        radius = random.uniform(*_RADII[size])
        x = random.uniform(radius + _GAP, width - radius - _GAP)
        y = random.uniform(radius + _GAP, height - radius - _GAP)
        if scene.layout == "apart":
            if (
                min(abs(share - border) for share in (x / width, y / height) for border in (1 / 3, 2 / 3))
                < BORDER_MARGIN
            ):
                continue
            if any(abs(x - other.x) < _MIN_ORDER_GAP * width for other in scene.things):
                continue
        if all(math.hypot(x - other.x, y - other.y) > radius + other.radius + _GAP for other in scene.things):
            return replace(scene, things=(*scene.things, Thing(shape, colour, size, x, y, radius)))
    raise _DoesNotFit


def _tag(random: Random, scene: Scene) -> Tag:
    width, height = scene.width / scene.unit_px, scene.height / scene.unit_px
    price = sample_price(random)
    tag_w = tag_width(price)
    for _ in range(60):
        x = random.uniform(_GAP, width - tag_w - _GAP)
        y = random.uniform(_GAP, height - TAG_HEIGHT - _GAP)
        if all(_is_clear(x, y, tag_w, thing) for thing in scene.things):
            return Tag(price, x, y)
    raise _DoesNotFit


def _is_clear(x: float, y: float, tag_w: float, thing: Thing) -> bool:
    nearest_x = min(max(thing.x, x), x + tag_w)
    nearest_y = min(max(thing.y, y), y + TAG_HEIGHT)
    return math.hypot(thing.x - nearest_x, thing.y - nearest_y) > thing.radius + _GAP
