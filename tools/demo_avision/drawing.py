"""Draws scenes, fast enough to feed training: shapes are masks made once, digits glyphs made once for each size.

A picture is drawn at its own size, as a user would upload it; what the model's processor makes of it is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from tools.demo_avision.world import DIGIT_WIDTH, SHAPES, TAG_HEIGHT, TAG_PADDING, Scene, Tag, Thing

FONT = Path(__file__).resolve().parent / "fonts" / "DejaVuSans-Bold-digits.ttf"

Colour = tuple[int, int, int]
PAINTS: dict[str, Colour] = {
    "red": (214, 32, 36),
    "orange": (248, 138, 20),
    "yellow": (245, 215, 30),
    "green": (40, 158, 66),
    "blue": (36, 92, 216),
    "purple": (122, 44, 168),
    "pink": (248, 130, 190),
    "black": (24, 24, 28),
}
#: Colours outside the world. Training shows shapes in them too, without a word about the colour, so that a shape is
#: known whatever its colour.
ODD_PAINTS: dict[str, Colour] = {
    "grey": (140, 140, 142),
    "brown": (120, 78, 40),
    "cyan": (80, 205, 215),
    "teal": (20, 120, 125),
    "lime": (165, 220, 60),
    "beige": (205, 175, 130),
    "magenta": (205, 30, 150),
}
_PAINT_JITTER = 12
_MASK_PX = 192
_FILL = 0.88  # of its square, by a shape that stands upright
_TILTS = (-12, -8, -4, 0, 4, 8, 12)  # degrees
_NOISE_PX = 512
_NUM_NOISES = 12


def draw_scene(scene: Scene, random: Random) -> Image.Image:
    """RGB, `scene.width` x `scene.height`. Background, tints and tilts are drawn from `random`."""
    picture = background(scene.width, scene.height, random)
    for thing in reversed(scene.things):  # of a scene "inside" the outer thing is the second
        _draw_thing(picture, thing, scene.unit_px, random)
    if scene.tag is not None:
        _draw_tag(picture, scene.tag, scene.unit_px, random)
    return picture


def encode(picture: Image.Image, random: Random) -> bytes:
    """As PNG or, as often, as JPEG of quality 70 to 95."""
    stream = BytesIO()
    if random.random() < 0.5:
        picture.save(stream, "PNG", compress_level=1)
    else:
        picture.save(stream, "JPEG", quality=random.randint(70, 95))
    return stream.getvalue()


def background(width: int, height: int, random: Random) -> Image.Image:
    """Light: plain, shaded from one side to another, or noisy."""
    tint = _light(random)
    kind = random.random()
    if kind < 0.4:
        return Image.new("RGB", (width, height), tint)
    if kind < 0.55:
        ends = np.array([tint, _light(random)], dtype=np.float32)
        across = random.random() < 0.5
        ramp = np.linspace(0, 1, width if across else height, dtype=np.float32)[:, None]
        line = (ends[0] * (1 - ramp) + ends[1] * ramp).astype(np.uint8)
        shape = (height, width, 3)
        return Image.fromarray(np.broadcast_to(line[None] if across else line[:, None], shape).copy())
    noise = _noises()[random.randrange(_NUM_NOISES)]
    top, left = random.randint(0, _NOISE_PX - height), random.randint(0, _NOISE_PX - width)
    patch = noise[top : top + height, left : left + width]
    strength = random.randint(5, 22)
    grains = (patch.astype(np.int16) * strength) >> 5
    return Image.fromarray(np.clip(grains + np.array(tint, dtype=np.int16), 0, 255).astype(np.uint8))


def _light(random: Random) -> Colour:
    grey = random.randint(205, 255)
    red, green, blue = (max(195, min(255, grey + random.randint(-14, 14))) for _ in range(3))
    return red, green, blue


@lru_cache(maxsize=1)
def _noises() -> list[NDArray[np.int8]]:
    """Noise of deviation 32, grey or coloured, fine or coarse."""
    generator = np.random.default_rng(20)
    noises = []
    for index in range(_NUM_NOISES):
        grain = 1 + index % 3
        side = -(-_NOISE_PX // grain)
        values = generator.normal(0, 32, (side, side, 3 if index % 2 else 1))
        values = values.repeat(grain, 0).repeat(grain, 1)[:_NOISE_PX, :_NOISE_PX]
        full = np.broadcast_to(values, (_NOISE_PX, _NOISE_PX, 3))
        noises.append(np.clip(full, -127, 127).astype(np.int8))
    return noises


def _draw_thing(picture: Image.Image, thing: Thing, unit_px: float, random: Random) -> None:
    side = max(6, round(2 * thing.radius * unit_px / _FILL))
    mask = _mask(thing.shape, random.choice(_TILTS)).resize((side, side), Image.Resampling.BILINEAR, reducing_gap=1.5)
    paint = tuple(
        min(255, max(0, channel + random.randint(-_PAINT_JITTER, _PAINT_JITTER)))
        for channel in (PAINTS | ODD_PAINTS)[thing.colour]
    )
    corner = (round(thing.x * unit_px - side / 2), round(thing.y * unit_px - side / 2))
    picture.paste(paint, (*corner, corner[0] + side, corner[1] + side), mask)


def _draw_tag(picture: Image.Image, tag: Tag, unit_px: float, random: Random) -> None:
    left, top = tag.x * unit_px, tag.y * unit_px
    width, height = tag.width * unit_px, TAG_HEIGHT * unit_px
    draw = ImageDraw.Draw(picture)
    paper = random.choice([(255, 255, 255), (255, 246, 200), (235, 245, 255)])
    ink = random.choice([(20, 20, 20), (30, 30, 60), (60, 20, 20)])
    box = (round(left), round(top), round(left + width), round(top + height))
    draw.rounded_rectangle(
        box, radius=max(2, round(height * 0.18)), fill=paper, outline=ink, width=max(1, box[3] - box[1] >> 4)
    )
    digit_height = max(7, round(0.105 * unit_px))
    for index, digit in enumerate(str(tag.price)):
        glyph = _glyph(digit, digit_height)
        centre_x, centre_y = digit_centre(tag, index)
        corner = (round(centre_x * unit_px - glyph.width / 2), round(centre_y * unit_px - glyph.height / 2))
        picture.paste(ink, (*corner, corner[0] + glyph.width, corner[1] + glyph.height), glyph)


def digit_centre(tag: Tag, index: int) -> tuple[float, float]:
    """Where the tag's digit of this index stands, in units."""
    return tag.x + TAG_PADDING + DIGIT_WIDTH * (index + 0.5), tag.y + TAG_HEIGHT / 2


@lru_cache(maxsize=1024)
def _glyph(digit: str, height_px: int) -> Image.Image:
    """A digit as a mask whose height is that of its ink."""
    font = ImageFont.truetype(str(FONT), 160)
    box = font.getbbox(digit)
    mask = Image.new("L", (round(box[2] - box[0]), round(box[3] - box[1])))
    ImageDraw.Draw(mask).text((-box[0], -box[1]), digit, fill=255, font=font)
    width = max(2, round(mask.width * height_px / mask.height))
    return mask.resize((width, height_px), Image.Resampling.LANCZOS)


@lru_cache(maxsize=512)
def _mask(shape: str, tilt: int) -> Image.Image:
    """White shape on black; around it room for the tilt."""
    big = 3 * _MASK_PX
    form = Image.new("L", (big, big))
    (_FORMS | ODD_FORMS)[shape](ImageDraw.Draw(form), big)
    mask = Image.new("L", (round(big / _FILL), round(big / _FILL)))
    mask.paste(form, ((mask.width - big) // 2, (mask.height - big) // 2))
    return mask.rotate(tilt, Image.Resampling.BICUBIC).resize((_MASK_PX, _MASK_PX), Image.Resampling.LANCZOS)


def _polygon(*corners: tuple[float, float]) -> Callable[[ImageDraw.ImageDraw, int], None]:
    def form(draw: ImageDraw.ImageDraw, side: int) -> None:
        draw.polygon([(x * side, y * side) for x, y in corners], fill=255)

    return form


def _circle(draw: ImageDraw.ImageDraw, side: int) -> None:
    draw.ellipse((0.03 * side, 0.03 * side, 0.97 * side, 0.97 * side), fill=255)


def _moon(draw: ImageDraw.ImageDraw, side: int) -> None:
    draw.ellipse((0.05 * side, 0.03 * side, 0.99 * side, 0.97 * side), fill=255)
    draw.ellipse((0.38 * side, 0.0, 1.22 * side, 0.84 * side), fill=0)


def _heart(draw: ImageDraw.ImageDraw, side: int) -> None:
    steps = [index * math.tau / 120 for index in range(120)]
    points = [
        (16 * math.sin(t) ** 3, 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))
        for t in steps
    ]
    draw.polygon([((x / 34 + 0.5) * side, (0.46 - y / 34) * side) for x, y in points], fill=255)


def _cross(draw: ImageDraw.ImageDraw, side: int) -> None:
    draw.rectangle((0.34 * side, 0.04 * side, 0.66 * side, 0.96 * side), fill=255)
    draw.rectangle((0.04 * side, 0.34 * side, 0.96 * side, 0.66 * side), fill=255)


def _star_corners() -> list[tuple[float, float]]:
    corners = []
    for index in range(10):
        radius, angle = (0.2, 0.5)[index % 2 == 0], index * math.pi / 5
        corners.append((0.5 + radius * math.sin(angle), 0.52 - radius * math.cos(angle)))
    return corners


_FORMS: dict[str, Callable[[ImageDraw.ImageDraw, int], None]] = {
    "circle": _circle,
    "square": _polygon((0.1, 0.1), (0.9, 0.1), (0.9, 0.9), (0.1, 0.9)),
    "triangle": _polygon((0.5, 0.04), (0.97, 0.9), (0.03, 0.9)),
    "star": _polygon(*_star_corners()),
    "heart": _heart,
    "cross": _cross,
    "moon": _moon,
    "house": _polygon(
        (0.5, 0.02),
        (0.98, 0.46),
        (0.84, 0.46),
        (0.84, 0.95),
        (0.62, 0.95),
        (0.62, 0.62),
        (0.38, 0.62),
        (0.38, 0.95),
        (0.16, 0.95),
        (0.16, 0.46),
        (0.02, 0.46),
    ),
}
assert tuple(_FORMS) == SHAPES
#: Shapes outside the world, shown in training without a word about the shape, so that a colour is known whatever its
#: shape.
ODD_FORMS: dict[str, Callable[[ImageDraw.ImageDraw, int], None]] = {
    "ellipse": lambda draw, side: draw.ellipse((0.02 * side, 0.25 * side, 0.98 * side, 0.75 * side), fill=255),
    "bar": _polygon((0.02, 0.32), (0.98, 0.32), (0.98, 0.68), (0.02, 0.68)),
    "hexagon": _polygon((0.25, 0.07), (0.75, 0.07), (1, 0.5), (0.75, 0.93), (0.25, 0.93), (0, 0.5)),
    "arrow": _polygon((0, 0.36), (0.5, 0.36), (0.5, 0.1), (1, 0.5), (0.5, 0.9), (0.5, 0.64), (0, 0.64)),
    "trapezoid": _polygon((0.3, 0.15), (0.7, 0.15), (1, 0.85), (0, 0.85)),
    "slab": _polygon((0.3, 0.2), (1, 0.2), (0.7, 0.8), (0, 0.8)),
    "bolt": _polygon((0.55, 0), (0.2, 0.55), (0.47, 0.55), (0.38, 1), (0.8, 0.4), (0.52, 0.4)),
}
