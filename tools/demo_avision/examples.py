"""Training examples: pictures cut into patches, questions and answers as token ids, what each patch shows.

Everything that needs Pillow, tokens or randomness happens here, in processes beside the one that trains; what comes
out are arrays. A row is one conversation opening: one picture or two, and after them as many questions as fit. They do
not see each other, so one reading of the picture serves them all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer
from torch.utils.data import IterableDataset
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from tools.demo_avision import foreign
from tools.demo_avision.dialogue import (
    COLOURLESS,
    REFUSAL,
    SHAPELESS,
    Turn,
    ask,
    change_scene,
    describe,
    difference,
    turns,
    verdicts,
)
from tools.demo_avision.drawing import ODD_FORMS, ODD_PAINTS, digit_centre, draw_scene, encode
from tools.demo_avision.snapshot import (
    MAX_PICTURE_TOKENS,
    MAX_PIXELS,
    MERGE,
    MIN_PIXELS,
    PADDING,
    PATCH_PX,
    TOKEN_PX,
    special_ids,
)
from tools.demo_avision.words import LANGUAGES
from tools.demo_avision.world import COLOURS, SHAPES, SIZES, STAGES, Scene, Stage, sample_scene

ROW_TOKENS = 256
PICTURE_PATCHES = MAX_PICTURE_TOKENS * MERGE**2
PATCH_VALUES = 3 * PATCH_PX**2
IGNORED = -100
_VERDICT_WEIGHT = 8.0

#: What each patch is labelled with, and how many values each label has. 0: nothing of the kind is there.
PATCH_LABELS = {
    "shape": 1 + len(SHAPES),
    "colour": 1 + len(COLOURS),
    "size": 1 + len(SIZES),
    "centre": 2,
    "digit": 11,
    "place": 5,  # of the digit in its price
}


# Less than 1: likelier to be among the first, and so among those that fit.
_PATIENCE = {
    "describe": 0.4,
    "price": 0.5,
    "position": 0.4,
    "colour": 0.5,
    "shape": 0.5,
    "size": 0.6,
    "difference": 0.1,
    "exists_coloured": 0.5,
    "count_colour": 0.6,
    "inside": 0.5,
    "what_inside": 0.3,
    "absent": 2.0,
    "no_price": 2.0,
} | dict.fromkeys(("left", "right", "above", "below", "what_left", "what_right"), 0.15)


@dataclass(frozen=True)
class Mix:
    """How often what is drawn.

    :param pair_share: rows with two pictures.
    :param foreign_picture_share: rows whose picture is none of ours.
    :param odd_paint_share: rows with shapes in colours outside the world and no question about colours.
    :param odd_shape_share: rows with shapes outside the world and no question about shapes.
    :param held_out: only pairs that training never shows; for measuring.
    """

    stage: Stage = STAGES["whole"]
    pair_share: float = 0.3
    foreign_picture_share: float = 0.06
    odd_paint_share: float = 0.2
    odd_shape_share: float = 0.2
    held_out: bool = False


@dataclass(frozen=True)
class Picture:
    """:param patches: (patches, 3 * 14 * 14) uint8, ordered as the library's processor does: four of a merge unit
        after each other.
    :param labels: (labels, patches) int8.
    :param grid: height and width in merged tokens.
    """

    patches: NDArray[np.uint8]
    labels: NDArray[np.int8]
    grid: tuple[int, int]


def cut(image: Image.Image, scene: Scene | None) -> Picture:
    """Scale as the library's processor does, cut into patches, and label them by the scene (None: nothing is known)."""
    height, width = smart_resize(image.height, image.width, TOKEN_PX, MIN_PIXELS, MAX_PIXELS)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    rows, columns = height // TOKEN_PX, width // TOKEN_PX
    pixels = np.asarray(image).reshape(rows, MERGE, PATCH_PX, columns, MERGE, PATCH_PX, 3)
    # -> rows, columns, row in unit, column in unit, channel, y, x
    patches = pixels.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, PATCH_VALUES)
    labels = _label(scene, height, width)
    units = labels.reshape(len(PATCH_LABELS), rows, MERGE, columns, MERGE).transpose(0, 1, 3, 2, 4)
    return Picture(patches, units.reshape(len(PATCH_LABELS), -1), (rows, columns))


def _label(scene: Scene | None, height: int, width: int) -> NDArray[np.int8]:
    """(labels, patch rows, patch columns)."""
    rows, columns = height // PATCH_PX, width // PATCH_PX
    labels = np.zeros((len(PATCH_LABELS), rows, columns), dtype=np.int8)
    if scene is None:
        return labels
    shape, colour, size, centre, digit, place = labels
    scale_x = scene.unit_px * width / scene.width / PATCH_PX
    scale_y = scene.unit_px * height / scene.height / PATCH_PX
    y, x = np.mgrid[0:rows, 0:columns] + 0.5
    for thing in reversed(scene.things):
        away = np.hypot((x / scale_x - thing.x), (y / scale_y - thing.y)) / thing.radius
        unsure = (away > 0.6) & (away < 1.25)
        for label in (shape, colour, size):
            label[unsure] = IGNORED
        sure = away <= 0.6
        row, column = int(thing.y * scale_y), int(thing.x * scale_x)
        sure[row, column] = True
        shape[sure] = 1 + SHAPES.index(thing.shape) if thing.shape in SHAPES else IGNORED
        colour[sure] = 1 + COLOURS.index(thing.colour) if thing.colour in COLOURS else IGNORED
        size[sure] = 1 + SIZES.index(thing.size)
        centre[row, column] = 1
    if scene.tag is not None:
        for index, char in enumerate(str(scene.tag.price)):
            at_x, at_y = digit_centre(scene.tag, index)
            row, column = int(at_y * scale_y), int(at_x * scale_x)
            digit[row, column] = 1 + int(char)
            place[row, column] = 1 + index
    return labels


def draw(scene: Scene, random: Random) -> Picture:
    """As the service would see an upload: one in four through a file."""
    image = draw_scene(scene, random)
    if random.random() < 0.25:
        image = Image.open(BytesIO(encode(image, random))).convert("RGB")
    return cut(image, scene)


class Wording:
    """Text to ids as the service has it: the template's parts by the whole tokenizer, contents apart."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.opening = self.ids("<|im_start|>user\n")
        self.before_picture = self.ids("<|vision_start|>")
        self.after_picture = self.ids("<|vision_end|>")
        self.to_answer = self.ids("<|im_end|>\n<|im_start|>assistant\n")
        self.end = self.ids("<|im_end|>")
        special = special_ids(tokenizer)
        self.picture, self.padding = special["<|image_pad|>"], special[PADDING]

    def ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def is_verdict(self, answer: str) -> list[bool]:
        """For each token of an answer: whether a verdict starts there; what goes on in it is certain."""
        begins = {begin for begin, _ in verdicts(answer)}
        offsets = self._tokenizer.encode(answer, add_special_tokens=False).offsets
        # A token may start with the space before the word.
        return [begin in begins or (begin + 1 in begins and begin + 1 < end) for begin, end in offsets]


@dataclass(frozen=True)
class Row:
    """Arrays of ROW_TOKENS each.

    :param positions: (3, tokens): in time, height and width.
    :param segments: 0 for what all questions see, then one number for each question; -1 is padding.
    :param targets: the token to come, where an answer is to be learned, else IGNORED.
    :param weights: of the targets: a verdict counts more than the words that lead to it.
    :param is_open: where the words read so far may be exchanged for others; not where a verdict follows from them.
    :param slots: where the visual tokens of all pictures stand.
    :param kinds: the kind of question of each segment after the first.
    """

    pictures: tuple[Picture, ...]
    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    segments: NDArray[np.int64]
    targets: NDArray[np.int64]
    weights: NDArray[np.float32]
    is_open: NDArray[np.bool_]
    slots: NDArray[np.int64]
    kinds: tuple[str, ...]


def make_row(pictures: tuple[Picture, ...], questions: list[Turn], words: Wording) -> Row:
    """As many of the questions as fit, in their order."""
    ids = list(words.opening)
    positions = [np.arange(len(ids))[None].repeat(3, 0)]
    next_position = len(ids)
    slots: list[int] = []
    for picture in pictures:
        rows, columns = picture.grid
        y, x = np.mgrid[0:rows, 0:columns]
        start = next_position + 1
        time = np.full(rows * columns, start)
        positions.append(np.full((3, 1), next_position))
        positions.append(np.stack([time, y.ravel() + start, x.ravel() + start]))
        next_position = start + max(rows, columns)
        positions.append(np.full((3, 1), next_position))
        next_position += 1
        begin = len(ids) + len(words.before_picture)
        slots += range(begin, begin + rows * columns)
        ids += words.before_picture + [words.picture] * (rows * columns) + words.after_picture
    segments = [0] * len(ids)
    targets = [IGNORED] * len(ids)
    weights = [1.0] * len(ids)
    is_open = [False] * len(ids)
    kinds = []
    for turn in questions:
        asked = words.ids(turn.question) + words.to_answer
        answer = words.ids(turn.answer) + words.end
        if len(ids) + len(asked) + len(answer) > ROW_TOKENS:
            continue
        kinds.append(turn.kind)
        ids += asked + answer
        segments += [len(kinds)] * (len(asked) + len(answer))
        targets += [IGNORED] * (len(asked) - 1) + answer + [IGNORED]
        is_verdict = words.is_verdict(turn.answer)
        weights += [1.0] * (len(asked) - 1) + [_VERDICT_WEIGHT if each else 1.0 for each in is_verdict] + [1.0, 1.0]
        is_open += [False] * len(asked) + [not any(is_verdict)] * len(answer)
        positions.append(np.arange(next_position, next_position + len(asked) + len(answer))[None].repeat(3, 0))
    missing = ROW_TOKENS - len(ids)
    positions.append(np.zeros((3, missing), dtype=np.int64))
    return Row(
        pictures,
        np.array(ids + [words.padding] * missing),
        np.concatenate(positions, axis=1),
        np.array(segments + [-1] * missing),
        np.array(targets + [IGNORED] * missing),
        np.array(weights + [1.0] * missing, dtype=np.float32),
        np.array(is_open + [False] * missing),
        np.array(slots),
        tuple(kinds),
    )


def sample_row(random: Random, mix: Mix, words: Wording) -> Row:
    kind = random.random()
    if kind < mix.foreign_picture_share:
        image = foreign.sample_picture(random)
        return make_row((cut(image, None),), _refused(random, 6), words)
    if kind < mix.foreign_picture_share + mix.pair_share:
        return _pair_row(random, mix, words)
    scene = sample_scene(random, mix.stage, held_out=mix.held_out)
    questions = [turn for language in LANGUAGES for turn in turns(scene, random, language)]
    oddity = random.random()
    if oddity < mix.odd_paint_share:
        scene = _paint_oddly(scene, random)
        questions = [turn for turn in questions if turn.kind in COLOURLESS]
    elif oddity < mix.odd_paint_share + mix.odd_shape_share:
        scene = _shape_oddly(scene, random)
        questions = [turn for turn in questions if turn.kind in SHAPELESS]
    questions += _foreign_turns(random, 1)
    # What is harder to learn is asked more often.
    questions.sort(key=lambda turn: random.random() * _PATIENCE.get(turn.kind, 1.0))
    return make_row((draw(scene, random),), questions, words)


def _paint_oddly(scene: Scene, random: Random) -> Scene:
    """The same scene, each of its colours replaced by one that is not of this world."""
    colours = sorted({thing.colour for thing in scene.things})
    replaced = dict(zip(colours, random.sample(sorted(ODD_PAINTS), len(colours)), strict=True))
    return replace(scene, things=tuple(replace(thing, colour=replaced[thing.colour]) for thing in scene.things))


def _shape_oddly(scene: Scene, random: Random) -> Scene:
    """The same scene, each of its shapes replaced by one that is not of this world."""
    shapes = sorted({thing.shape for thing in scene.things})
    replaced = dict(zip(shapes, random.sample(sorted(ODD_FORMS), len(shapes)), strict=True))
    return replace(scene, things=tuple(replace(thing, shape=replaced[thing.shape]) for thing in scene.things))


def _foreign_turns(random: Random, number: int) -> list[Turn]:
    made = []
    for _ in range(number):
        language = random.choice(LANGUAGES)
        made.append(Turn("refusal", language, foreign.sample_question(random, language), REFUSAL[language]))
    return made


def _refused(random: Random, number: int) -> list[Turn]:
    """Sensible questions, but there is nothing to see that could answer them."""
    made = _foreign_turns(random, 1)
    scene = sample_scene(random)
    for language in LANGUAGES:
        made += [Turn("refusal", language, turn.question, REFUSAL[language]) for turn in turns(scene, random, language)]
    return random.sample(made, number)


def _pair_row(random: Random, mix: Mix, words: Wording) -> Row:
    while True:
        first = sample_scene(random, mix.stage, held_out=mix.held_out)
        if first.layout == "group" or len(first.things) == 1:
            break
    second = change_scene(first, random)
    if random.random() < 0.5:
        first, second = second, first
    questions = []
    for language in LANGUAGES:
        for kind, answer in (
            ("difference", difference(first, second, language)),
            ("describe_first", describe(first, language)),
            ("describe_second", describe(second, language)),
        ):
            questions.append(Turn(kind, language, ask(kind, language, random), answer))
    questions += _foreign_turns(random, 1)
    questions.sort(key=lambda turn: random.random() * _PATIENCE.get(turn.kind, 1.0))
    return make_row((draw(first, random), draw(second, random)), questions, words)


def collate(rows: list[Row]) -> dict[str, torch.Tensor]:
    """A batch as tensors; pictures are padded to PICTURE_PATCHES.

    :return: `patches` (pictures, PICTURE_PATCHES, values) uint8; `labels` (pictures, labels, PICTURE_PATCHES) int8;
        `grids` (pictures, 2); `ids`, `segments`, `targets`, `weights`, `is_open` (rows, ROW_TOKENS); `positions`
        (3, rows, ROW_TOKENS); `slots` (visual tokens): where in `ids`, flattened, each stands; `sources`: which of the
        pictures' tokens, flattened with padding, it is.
    """
    pictures = [picture for row in rows for picture in row.pictures]
    patches = np.zeros((len(pictures), PICTURE_PATCHES, PATCH_VALUES), dtype=np.uint8)
    labels = np.full((len(pictures), len(PATCH_LABELS), PICTURE_PATCHES), IGNORED, dtype=np.int8)
    slots, sources = [], []
    index = 0
    for number, row in enumerate(rows):
        slots.append(row.slots + number * ROW_TOKENS)
        for picture in row.pictures:
            count = len(picture.patches)
            patches[index, :count] = picture.patches
            labels[index, :, :count] = picture.labels
            sources.append(np.arange(count // MERGE**2) + index * MAX_PICTURE_TOKENS)
            index += 1
    arrays: dict[str, Any] = {
        "patches": patches,
        "labels": labels,
        "grids": np.array([picture.grid for picture in pictures]),
        "ids": np.stack([row.ids for row in rows]),
        "segments": np.stack([row.segments for row in rows]),
        "targets": np.stack([row.targets for row in rows]),
        "weights": np.stack([row.weights for row in rows]),
        "is_open": np.stack([row.is_open for row in rows]),
        "positions": np.stack([row.positions for row in rows], axis=1),
        "slots": np.concatenate(slots),
        "sources": np.concatenate(sources),
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


class Stream(IterableDataset[dict[str, torch.Tensor]]):
    """Batches without end. Each process that draws has its own numbers: `seed`, and the number of the process."""

    def __init__(self, tokenizer: Tokenizer, mix: Mix, *, batch_rows: int, seed: str) -> None:
        self._tokenizer_text = tokenizer.to_str()
        self._mix = mix
        self._batch_rows = batch_rows
        self._seed = seed

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = torch.utils.data.get_worker_info()
        random = Random(f"{self._seed}-{worker.id if worker else 0}")
        words = Wording(Tokenizer.from_str(self._tokenizer_text))
        while True:
            yield collate([sample_row(random, self._mix, words) for _ in range(self._batch_rows)])
