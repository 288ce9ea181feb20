"""The world of the embedded Avision: scenes, what can be asked about them, and how examples are made of them."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from tools.demo_avision import foreign
from tools.demo_avision.dialogue import REFUSAL, Turn, change_scene, describe, difference, turns
from tools.demo_avision.drawing import PAINTS, draw_scene
from tools.demo_avision.examples import (
    IGNORED,
    PATCH_LABELS,
    PICTURE_PATCHES,
    Mix,
    Stream,
    Wording,
    collate,
    cut,
    make_row,
    sample_row,
)
from tools.demo_avision.samples import SAMPLES, draw_samples
from tools.demo_avision.snapshot import IMAGE_MEAN, IMAGE_STD, MAX_PIXELS, MIN_PIXELS, make_model, train_tokenizer
from tools.demo_avision.training import Learner, Plan, Trainer, answer_loss
from tools.demo_avision.words import LANGUAGES, Language
from tools.demo_avision.world import (
    BORDER_MARGIN,
    COLOURS,
    HELD_OUT,
    MAX_SIDE_PX,
    MIN_SIDE_PX,
    SHAPES,
    TAG_HEIGHT,
    Scene,
    Tag,
    Thing,
    sample_scene,
)


def scenes(number: int, seed: str = "test", **options: Any) -> list[Scene]:
    random = Random(seed)
    return [sample_scene(random, **options) for _ in range(number)]


# Scenes.


def test_everything_lies_inside_the_picture_and_nothing_overlaps() -> None:
    for scene in scenes(400):
        width, height = scene.width / scene.unit_px, scene.height / scene.unit_px
        assert MIN_SIDE_PX <= min(scene.width, scene.height) <= max(scene.width, scene.height) <= MAX_SIDE_PX
        for thing in scene.things:
            assert thing.radius <= thing.x <= width - thing.radius and thing.radius <= thing.y <= height - thing.radius
        if scene.layout == "inside":
            inner, outer = scene.things
            assert math.hypot(inner.x - outer.x, inner.y - outer.y) + inner.radius < outer.radius * 1.05
        else:
            for index, one in enumerate(scene.things):
                for other in scene.things[index + 1 :]:
                    assert math.hypot(one.x - other.x, one.y - other.y) > one.radius + other.radius
        if scene.tag is not None:
            assert scene.tag.x >= 0 and scene.tag.x + scene.tag.width <= width
            assert scene.tag.y >= 0 and scene.tag.y + TAG_HEIGHT <= height


def test_held_out_pairs_are_one_of_each_shape_and_colour_and_never_drawn_for_training() -> None:
    assert sorted(shape for shape, _ in HELD_OUT) == sorted(SHAPES)
    assert sorted(colour for _, colour in HELD_OUT) == sorted(COLOURS)
    for scene in scenes(600):
        assert not HELD_OUT & {(thing.shape, thing.colour) for thing in scene.things}
    for scene in scenes(200, held_out=True):
        assert {(thing.shape, thing.colour) for thing in scene.things} <= HELD_OUT


def test_changed_scenes_hold_no_held_out_pair_either() -> None:
    random = Random("changes")
    for scene in scenes(400):
        if scene.layout == "group" or len(scene.things) == 1:
            changed = change_scene(scene, random)
            assert not HELD_OUT & {(thing.shape, thing.colour) for thing in changed.things}


def test_every_shape_colour_count_and_price_length_occurs() -> None:
    drawn = scenes(600)
    things = [thing for scene in drawn for thing in scene.things]
    assert {thing.shape for thing in things} == set(SHAPES)
    assert {thing.colour for thing in things} == set(COLOURS)
    assert {len(scene.things) for scene in drawn} == {1, 2, 3, 4, 5}
    lengths = Counter(len(str(scene.tag.price)) for scene in drawn if scene.tag)
    assert set(lengths) == {1, 2, 3, 4} and min(lengths.values()) > 40


# Questions and answers.


def test_same_question_about_a_scene_has_one_answer_whatever_else_is_drawn_by_lot() -> None:
    for scene in scenes(60):
        answers: dict[str, str] = {}
        for seed in range(20):
            for language in LANGUAGES:
                for turn in turns(scene, Random(seed), language):
                    assert answers.setdefault(turn.question, turn.answer) == turn.answer, turn


SCENE = Scene(
    200,
    200,
    "apart",
    (
        Thing("star", "green", "small", 0.2, 0.2, 0.08),
        Thing("heart", "blue", "large", 0.5, 0.5, 0.16),
        Thing("circle", "yellow", "large", 0.8, 0.8, 0.16),
    ),
    Tag(905, 0.1, 0.8),
)


def answers(scene: Scene, language: Language) -> dict[str, set[tuple[str, str]]]:
    """Kind -> all its questions, in lower case and without the last mark, with their answers."""
    found: dict[str, set[tuple[str, str]]] = {}
    for seed in range(300):
        for turn in turns(scene, Random(seed), language):
            question = turn.question.lower().rstrip("?.").replace("ё", "е")
            found.setdefault(turn.kind, set()).add((question, turn.answer))
    return found


@pytest.mark.parametrize(
    ("language", "kind", "question", "answer"),
    [
        ("en", "count", "count the shapes", "3"),
        ("en", "count_shape", "how many stars are there", "1"),
        ("en", "count_shape", "count the moons", "0"),
        ("en", "count_colour", "how many yellow shapes are there", "1"),
        ("en", "colour", "what colour is the heart", "Blue."),
        ("en", "shape", "what is the yellow thing", "A circle."),
        ("en", "size", "how large is the star", "Small."),
        ("en", "price", "read the price tag", "905"),
        ("en", "position", "where is the heart", "In the centre."),
        ("en", "exists", "is there a star", "Yes."),
        ("en", "exists", "is there a moon", "No."),
        ("en", "exists_coloured", "is there an orange star", "No."),
        ("en", "exists_coloured", "is there a green star", "Yes."),
        ("en", "left", "is the star left of the heart", "The star is at the top left, the heart in the centre: yes."),
        ("en", "left", "is the heart left of the star", "The heart is in the centre, the star at the top left: no."),
        ("en", "right", "is the star right of the heart", "The star is at the top left, the heart in the centre: no."),
        ("en", "above", "is the star above the heart", "The star is at the top left, the heart in the centre: yes."),
        ("en", "below", "is the star below the heart", "The star is at the top left, the heart in the centre: no."),
        ("en", "absent", "what colour is the moon", "There is no moon."),
        ("en", "absent", "what is inside the star", "Nothing."),
        ("en", "absent", "which shape is black", "There is none."),
        ("en", "absent", "what differs", "There is only one picture."),
        ("ru", "colour", "какого цвета сердце", "Синего."),
        ("ru", "colour", "какой цвет у сердца", "Синий."),
        ("ru", "colour", "назови цвет звезды", "Зелёный."),
        ("ru", "size", "какого размера звезда", "Маленького."),
        ("ru", "size", "какой размер у круга", "Большой."),
        ("ru", "shape", "что здесь желтого цвета", "Круг."),
        ("ru", "position", "где находится звезда", "Слева вверху."),
        ("ru", "above", "круг выше звезды", "Круг справа внизу, звезда слева вверху: нет."),
        ("ru", "right", "круг справа от звезды", "Круг справа внизу, звезда слева вверху: да."),
        ("ru", "absent", "где дом", "Дома нет."),
    ],
)
def test_each_kind_of_question_has_its_answer(language: Language, kind: str, question: str, answer: str) -> None:
    assert (question, answer) in answers(SCENE, language)[kind]
    assert [given for asked, given in answers(SCENE, language)[kind] if asked == question] == [answer]


def test_two_things_alone_are_asked_for_by_their_neighbour() -> None:
    pair = replace(SCENE, things=SCENE.things[:2])
    assert ("what is left of the heart", "A star.") in answers(pair, "en")["what_left"]
    assert ("что находится справа от звезды", "Сердце.") in answers(pair, "ru")["what_right"]
    assert all(answer == "A star." for _, answer in answers(pair, "en")["what_left"])


def test_groups_and_containers_are_asked_for_in_their_own_way() -> None:
    stars = tuple(Thing("star", "red", "large", 0.2 + 0.3 * index, 0.5, 0.1) for index in range(3))
    group = answers(Scene(200, 200, "group", stars), "ru")
    assert ("какого цвета звезды", "Красного.") in group["colour_of_them"]
    assert ("какие это фигуры", "Звёзды.") in group["shape_of_them"]
    assert ("какой размер у звезд", "Большой.") in group["size_of_them"]
    inner, outer = Thing("star", "red", "small", 0.5, 0.5, 0.08), Thing("circle", "blue", "large", 0.5, 0.5, 0.24)
    inside = answers(Scene(200, 200, "inside", (inner, outer)), "en")
    assert {answer for _, answer in inside["what_inside"]} == {"A small red star."}
    assert ("is the star inside the circle", "Yes.") in inside["inside"]
    assert ("is the circle inside the star", "No.") in inside["inside"]


def test_description_is_grammatical_in_both_languages() -> None:
    assert describe(SCENE, "en") == (
        "A small green star at the top left, a large blue heart in the centre, a large yellow circle at the bottom "
        "right. The price is 905."
    )
    assert describe(SCENE, "ru") == (
        "Маленькая зелёная звезда слева вверху, большое синее сердце в центре, большой жёлтый круг справа внизу. "
        "Цена 905."
    )


@pytest.mark.parametrize(
    ("shape", "count", "russian"),
    [
        ("star", 2, "Две маленькие чёрные звезды."),
        ("star", 5, "Пять маленьких чёрных звёзд."),
        ("circle", 3, "Три маленьких чёрных круга."),
        ("heart", 2, "Два маленьких чёрных сердца."),
        ("house", 5, "Пять маленьких чёрных домов."),
    ],
)
def test_russian_counts_take_their_own_forms(shape: str, count: int, russian: str) -> None:
    things = tuple(Thing(shape, "black", "small", 0.1 + 0.18 * index, 0.5, 0.08) for index in range(count))
    assert describe(Scene(200, 200, "group", things), "ru") == russian


def test_inside_is_told_with_the_right_cases() -> None:
    things = (Thing("star", "red", "small", 0.5, 0.5, 0.08), Thing("circle", "blue", "large", 0.5, 0.5, 0.24))
    scene = Scene(200, 200, "inside", things)
    assert describe(scene, "ru") == "Маленькая красная звезда внутри большого синего круга."
    assert describe(scene, "en") == "A small red star inside a large blue circle."


def test_difference_tells_what_either_shows_and_whether_that_is_the_same() -> None:
    random = Random("difference")
    same_by_quality: dict[str, set[bool]] = {}
    for scene in scenes(300):
        if scene.layout != "group" and len(scene.things) > 1:
            continue
        changed = change_scene(scene, random)
        clauses = difference(scene, changed, "en").removesuffix(".").lower().split("; ")
        assert len(clauses) == (4 if scene.tag is None else 5)
        for clause in clauses:
            quality, shown = clause.split(" ", 1)
            both, verdict = shown.split(": ")
            first, second = both.split(" and ")
            assert verdict == ("the same" if first == second else "different")
            same_by_quality.setdefault(quality, set()).add(first == second)
        assert (changed == scene) == (": different" not in "; ".join(clauses))
    assert same_by_quality == {quality: {True, False} for quality in ("number", "size", "colour", "shape", "price")}


def test_difference_is_grammatical_in_both_languages() -> None:
    two = tuple(Thing("star", "red", "small", 0.2 + 0.3 * index, 0.5, 0.1) for index in range(2))
    first = Scene(200, 200, "group", two, Tag(45, 0.1, 0.8))
    second = replace(first, things=tuple(replace(each, colour="blue") for each in two), tag=Tag(54, 0.1, 0.8))
    assert difference(first, second, "en") == (
        "Number 2 and 2: the same; size small and small: the same; colour red and blue: different; "
        "shape star and star: the same; price 45 and 54: different."
    )
    assert difference(first, second, "ru") == (
        "Количество 2 и 2: то же; размер маленький и маленький: тот же; цвет красный и синий: разный; "
        "форма звезда и звезда: та же; цена 45 и 54: разная."
    )


def test_foreign_questions_for_measuring_are_none_of_those_for_training() -> None:
    random = Random("foreign")
    for language in LANGUAGES:
        trained = {foreign.sample_question(random, language).lower().rstrip("?.") for _ in range(5000)}
        assert not trained & {question.lower().rstrip("?.") for question in foreign.HELD_OUT_QUESTIONS[language]}
        assert len(set(foreign.HELD_OUT_QUESTIONS[language])) == 50


# Pictures.


def test_things_are_drawn_in_their_colour_where_the_scene_has_them() -> None:
    for scene in scenes(60):
        picture = draw_scene(scene, Random(1))
        assert picture.size == (scene.width, scene.height) and picture.mode == "RGB"
        for thing in scene.things:
            if scene.layout == "inside" and thing.size == "large":
                continue  # its centre may be covered
            if thing.shape in ("moon", "house"):
                continue  # hollow at the centre
            found = np.asarray(picture)[int(thing.y * scene.unit_px), int(thing.x * scene.unit_px)].astype(int)
            assert np.abs(found - PAINTS[thing.colour]).max() <= 14, thing


def test_samples_in_static_are_those_that_the_tool_draws(tmp_path: Path) -> None:
    draw_samples(tmp_path)
    folder = Path(__file__).resolve().parent.parent / "static" / "samples"
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{name}.png" for name in SAMPLES)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes()


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_keep_to_the_rules_of_the_world(name: str) -> None:
    scene = SAMPLES[name]
    assert not HELD_OUT & {(thing.shape, thing.colour) for thing in scene.things}
    if scene.layout == "apart":
        for thing in scene.things:
            for share in (thing.x * scene.unit_px / scene.width, thing.y * scene.unit_px / scene.height):
                assert min(abs(share - 1 / 3), abs(share - 2 / 3)) >= BORDER_MARGIN


def test_smoke_test_expects_what_the_drawing_shows() -> None:
    from tools.service_client import DRAWING, DRAWING_SHOWS

    assert describe(SAMPLES[DRAWING.stem], "en") == DRAWING_SHOWS


# Examples. The model is the true one, untrained.


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(
        turn.question + turn.answer for scene in scenes(300) for turn in turns(scene, Random(1), "ru")
    )


def test_patches_are_those_of_the_library_processor() -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
    for scene in scenes(6):
        image = draw_scene(scene, Random(1))
        picture = cut(image, scene)
        expected = processor(images=[image], return_tensors="pt")
        assert expected["image_grid_thw"].tolist() == [[1, 2 * picture.grid[0], 2 * picture.grid[1]]]
        ours = torch.from_numpy(picture.patches).view(-1, 3, 14 * 14) / 255
        ours = (ours - torch.tensor(IMAGE_MEAN)[:, None]) / torch.tensor(IMAGE_STD)[:, None]
        theirs = expected["pixel_values"].view(-1, 3, 2, 14 * 14)
        assert torch.allclose(ours, theirs[:, :, 0], atol=1e-5) and torch.equal(theirs[:, :, 0], theirs[:, :, 1])


def test_every_patch_label_stands_where_the_scene_has_the_thing() -> None:
    names = list(PATCH_LABELS)
    for scene in scenes(80):
        labels = dict(zip(names, cut(draw_scene(scene, Random(1)), scene).labels, strict=True))
        centres = (labels["centre"] == 1).sum()
        # A thing inside another may have its centre in the very patch of the other's.
        assert centres == len(scene.things) or (scene.layout == "inside" and centres == 1)
        shown = set(np.unique(labels["shape"])) - {0, IGNORED}
        assert shown == {1 + SHAPES.index(thing.shape) for thing in scene.things}
        digits = labels["digit"][labels["place"] > 0][np.argsort(labels["place"][labels["place"] > 0])]
        assert "".join(str(digit - 1) for digit in digits) == (str(scene.tag.price) if scene.tag else "")


def test_forward_of_training_is_the_forward_of_the_library(tokenizer: Tokenizer) -> None:
    """Windows and questions as masks, patches with one kernel, positions by hand: all as if asked one by one."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
    model = make_model(tokenizer, seed=1).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # or mistakes would drown in weights of 0.02
            parameter.mul_(3).add_(torch.randn_like(parameter), alpha=0.05)
    learner, words = Learner(model), Wording(tokenizer)
    drawn = scenes(3, "forward")
    pictures = [draw_scene(scene, Random(2)) for scene in drawn]
    rows = [
        make_row((cut(pictures[0], None),), turns(drawn[0], Random(1), "en")[:3], words),
        make_row((cut(pictures[1], None), cut(pictures[2], None)), turns(drawn[1], Random(1), "ru")[:2], words),
    ]
    batch = collate(rows)
    with torch.no_grad():
        seen = learner.see(batch["patches"], batch["grids"])
        hidden = learner.read(learner.embed(batch, seen), batch["positions"], batch["segments"])
        logits = model.lm_head(hidden)
        for row, shown, ours in zip(rows, (pictures[:1], pictures[1:]), logits, strict=True):
            inputs = processor(images=shown, return_tensors="pt")
            for segment in range(1, len(row.kinds) + 1):
                chosen = torch.from_numpy((row.segments == 0) | (row.segments == segment))
                ids = batch["ids"].new_tensor(row.ids)[chosen][None]
                types = torch.eq(ids, words.picture).int()
                theirs = model(input_ids=ids, mm_token_type_ids=types, attention_mask=torch.ones_like(ids), **inputs)
                assert torch.allclose(ours[chosen], theirs.logits[0], atol=0.01)  # of values up to 20


def test_a_row_asks_only_what_fits_and_learns_answers_only(tokenizer: Tokenizer) -> None:
    words = Wording(tokenizer)
    random = Random("rows")
    for _ in range(60):
        row = sample_row(random, Mix(), words)
        assert row.kinds and row.segments.max() == len(row.kinds)
        for segment in range(1, len(row.kinds) + 1):
            learned = row.targets[(row.segments == segment) & (row.targets != IGNORED)]
            assert learned[-1] == words.end[0]
            text = tokenizer.decode(learned[:-1].tolist())
            if row.kinds[segment - 1] == "refusal":
                assert text in REFUSAL.values()
            assert text and "<|" not in text


def test_verdicts_weigh_more_and_follow_from_words_as_they_were_said(tokenizer: Tokenizer) -> None:
    words = Wording(tokenizer)
    turn = Turn("left", "en", "Is it left?", "The star is on the left, the heart on the right: yes.")
    plain = Turn("count", "en", "How many?", "3")
    row = make_row((cut(draw_scene(SCENE, Random(1)), SCENE),), [turn, plain], words)
    heavy = tokenizer.decode(row.targets[row.weights > 1].tolist(), skip_special_tokens=False)
    assert heavy and "yes".startswith(heavy.strip())  # where the verdict starts: the rest of the word is certain
    assert not row.is_open[row.segments == 1].any() and row.is_open[row.segments == 2].sum() == 2


def test_batches_of_a_stream_differ_and_depend_on_the_seed_alone(tokenizer: Tokenizer) -> None:
    def two(seed: str) -> list[torch.Tensor]:
        stream = iter(Stream(tokenizer, Mix(), batch_rows=2, seed=seed))
        return [next(stream)["ids"] for _ in range(2)]

    first, again, other = two("a"), two("a"), two("b")
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], other[0])


def test_training_learns_and_goes_on_from_its_checkpoint(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def trainer() -> Trainer:
        return Trainer(Learner(make_model(tokenizer, seed=3)), tokenizer, tmp_path, prepare=lambda function: function)

    words, random = Wording(tokenizer), Random("learning")
    batch = collate([sample_row(random, Mix(), words) for _ in range(2)])
    assert batch["patches"].shape[1] == PICTURE_PATCHES
    targets = batch["targets"][batch["targets"] != IGNORED]

    def loss(of: Trainer) -> float:
        with torch.no_grad():
            return answer_loss(of.forward(batch)[0], targets, torch.ones(len(targets))).item()

    first = trainer()
    assert not first.load()
    before = loss(first)
    for _ in range(8):
        first.step(batch, Plan(Mix(), minutes=1), share=1.0)
    first.save()
    after = loss(first)
    assert after < before - 0.5
    second = trainer()
    assert second.load() and second.num_steps == 8
    assert loss(second) == pytest.approx(after)
