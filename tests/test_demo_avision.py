"""The embedded Avision for real: it sees what is drawn, through the API and the form, and says so of everything else.

A short version of `tools/evaluate_demo_avision.py`, with its bars; the long one is run when the model is trained.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from flask.testing import FlaskClient
from PIL import Image

from app_production import create_app, make_service
from config import PROJECT_ROOT, Limits, Settings
from models.errors import LoadError
from models.images import read_header
from models.schemas import ImageInput
from models.snapshots import DEMO_MARKER, check_demo_files, find_snapshots
from tests.conftest import BufferedClient
from tests.test_error_shape import IMAGE, post_form, post_json
from tools.demo_avision.dialogue import REFUSAL, describe
from tools.demo_avision.drawing import draw_scene
from tools.demo_avision.exam import Mark, Question, about_foreign, about_pairs, about_pictures, scores
from tools.demo_avision.samples import SAMPLES
from tools.demo_avision.world import sample_scene
from tools.evaluate_demo_avision import BARS, MAX_TOKENS

FOLDER = PROJECT_ROOT / "vision" / "demo"
NUM_CLIENTS = 12


def start_service(folder: Path) -> tuple[Settings, Any]:
    values = {"AVISION_MODEL_PATH": str(folder), "AVITO_DEVICE": "cpu", "AVITO_RATE_LIMIT": ""}
    settings = Settings.model_validate(values)
    service = make_service(settings)
    service.start()
    assert service.wait_loaded(120)
    return settings, service


@pytest.fixture(scope="module")
def demo() -> Iterator[FlaskClient]:
    settings, service = start_service(FOLDER)
    assert service.snapshot().is_ready, service.snapshot().why_not_ready
    app = create_app(settings, service)
    app.test_client_class = BufferedClient
    yield app.test_client()
    service.stop(30)


def body_of(prompt: str, *pictures: bytes) -> dict[str, Any]:
    encoded = [base64.b64encode(picture).decode() for picture in pictures]
    return {"prompt": prompt, "images": encoded, "temperature": 0, "max_tokens": MAX_TOKENS}


def ask(client: FlaskClient, prompt: str, *pictures: bytes) -> str:
    response = post_json(client, IMAGE, body_of(prompt, *pictures))
    assert response.status_code == 200, response.get_json()
    return str(response.get_json()["data"]["text"])


def examine(client: FlaskClient, questions: Iterator[Question]) -> dict[str, tuple[int, int]]:
    """Many at once, as users come."""
    asked = list(questions)

    def answer(question: Question) -> Mark:
        own = client.application.test_client()
        return Mark(question, ask(own, question.prompt, *question.pictures))

    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        return scores(pool.map(answer, asked))


def assert_bars(found: dict[str, tuple[int, int]], bars: dict[str, float]) -> None:
    missed = {s: found[s] for s, bar in bars.items() if found[s][0] < bar * found[s][1]}
    assert not missed, f"of {found}"


def png_of(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def test_it_answers_about_pictures_never_seen(demo: FlaskClient) -> None:
    assert_bars(examine(demo, about_pictures(50, "short")), BARS["pictures never seen"])


def test_it_answers_about_pairs_of_shape_and_colour_never_seen(demo: FlaskClient) -> None:
    found = examine(demo, about_pictures(20, "short held out", held_out=True))
    assert_bars(found, BARS["pairs of shape and colour never seen"])


def test_it_tells_two_pictures_apart(demo: FlaskClient) -> None:
    assert_bars(examine(demo, about_pairs(20, "short pairs")), BARS["two pictures"])


def test_it_says_that_it_is_a_demo_to_what_it_does_not_know(demo: FlaskClient) -> None:
    assert_bars(examine(demo, about_foreign(100, "short foreign")), BARS["outside its world"])


def test_refusal_comes_from_the_model_and_not_from_a_table() -> None:
    """Nowhere in what serves requests does the sentence stand."""
    served = [*PROJECT_ROOT.glob("*.py"), *PROJECT_ROOT.glob("models/**/*.py")]
    for path in served:
        text = path.read_text(encoding="utf-8")
        assert not [sentence for sentence in REFUSAL.values() if sentence[:30] in text], path


def turned(picture: Image.Image) -> bytes:
    """Stored lying on its side, with the EXIF note to turn it upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return png_of(picture.transpose(Image.Transpose.ROTATE_90), exif=exif)


def with_alpha(picture: Image.Image) -> bytes:
    """White becomes transparent black: only who heeds alpha sees white again."""
    white = (np.asarray(picture) == 255).all(-1, keepdims=True)
    assert white.mean() > 0.3
    return png_of(Image.fromarray(np.where(white, 0, np.dstack([np.asarray(picture), ~white[..., 0] * np.uint8(255)]))))


FORMS = {
    "turned by EXIF": turned,
    "CMYK": lambda picture: png_of(picture.convert("CMYK"), "JPEG", quality=92),
    "palette": lambda picture: png_of(picture.quantize(128)),
    "alpha": with_alpha,
    "WebP": lambda picture: png_of(picture, "WEBP", quality=90),
    "JPEG": lambda picture: png_of(picture, "JPEG", quality=90),
}


def on_white(picture: Image.Image) -> Image.Image:
    """The same drawing on a white ground."""
    light = (np.asarray(picture).min(-1, keepdims=True) > 170) & np.ones(3, dtype=bool)
    return Image.fromarray(np.where(light, np.uint8(255), np.asarray(picture)))


@pytest.mark.parametrize("form", FORMS)
def test_answer_does_not_depend_on_the_form_of_the_file(demo: FlaskClient, form: str) -> None:
    random = Random("forms")
    scenes = [*SAMPLES.values(), *(sample_scene(random) for _ in range(5))]
    for scene in scenes:
        picture = draw_scene(scene, random)
        if form == "alpha":
            picture = on_white(picture)
        plain = ask(demo, "Describe the picture.", png_of(picture))
        assert ask(demo, "Describe the picture.", FORMS[form](picture)) == plain


@pytest.mark.parametrize("name", SAMPLES)
def test_form_of_the_page_describes_its_own_samples(demo: FlaskClient, name: str) -> None:
    page = demo.get("/", headers={"Accept-Language": "en"}).get_data(as_text=True)
    assert f"samples/{name}.png" in page and "drawings of coloured shapes" in page
    file = (PROJECT_ROOT / "static" / "samples" / f"{name}.png").read_bytes()
    upload = (file, f"{name}.png", "image/png")
    answered = post_form(demo, "/avision", upload, prompt="Describe the picture.", temperature="0")
    assert answered.headers["X-Avito-Demo"] == "1"
    assert describe(SAMPLES[name], "en") in answered.get_data(as_text=True)
    russian = post_form(demo, "/avision", upload, prompt="Опиши картинку.", temperature="0")
    assert describe(SAMPLES[name], "ru") in russian.get_data(as_text=True)


def test_default_temperature_gives_the_same_answers(demo: FlaskClient) -> None:
    """0.7, which is what the page sends: the snapshot's own top_p keeps to what it is sure of."""
    file = (PROJECT_ROOT / "static" / "samples" / "shapes.png").read_bytes()
    for seed in range(5):
        body = body_of("Describe the picture.", file) | {"temperature": 0.7, "seed": seed}
        text = post_json(demo, IMAGE, body).get_json()["data"]["text"]
        assert text == describe(SAMPLES["shapes"], "en")


def test_batched_answers_equal_generate_token_for_token() -> None:
    """The true architecture in the real engine: windows, merged patches, rotary positions in three dimensions."""
    from tests.test_runner import encode_pictures, generate_pictures, load, make_sequence, run

    def given(picture: Image.Image) -> ImageInput:
        data = png_of(picture)
        return ImageInput(data, read_header(data, declared_type="", field="image", limits=Limits()), "image")

    served = load(FOLDER, "avision")
    random = Random("token for token")
    pictures = [given(draw_scene(sample_scene(random), random)) for _ in range(5)]
    prompts = [encode_pictures(served, "Опиши картинку.", picture) for picture in pictures[:4]]
    prompts.append(encode_pictures(served, "Which differs?", *pictures[3:]))
    runner = served.runner(page_tokens=16, num_pages=120)
    ours = run(runner, *(make_sequence(prompt.ids, prompt) for prompt in prompts))
    assert ours == [generate_pictures(served, prompt) for prompt in prompts]


# The files.


def test_snapshot_is_small_and_its_marker_has_the_hash_of_every_file() -> None:
    files = {path.name: path for path in FOLDER.iterdir()}
    assert sum(path.stat().st_size for path in files.values()) <= 16 * 1024**2
    marker = json.loads(files.pop(DEMO_MARKER).read_text(encoding="utf-8"))
    assert marker["demo"] is True
    assert marker["sha256"] == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    assert find_snapshots(Settings.model_validate({"AVISION_MODEL_PATH": "vision/demo"}))["avision"].is_demo


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "chat_template.jinja"])
def test_damaged_file_is_not_served(tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(FOLDER, tmp_path / "damaged")
    with (folder / name).open("ab") as file:
        file.write(b" ")  # still readable as what it is
    with pytest.raises(LoadError, match=f"{name} of the embedded model is not the file that {DEMO_MARKER} names"):
        check_demo_files(find_snapshots(Settings.model_validate({"AVISION_MODEL_PATH": str(folder)}))["avision"])


@pytest.mark.parametrize(
    "marker", ["no JSON", "{}", '{"sha256": {}}', '{"sha256": {"model.safetensors": 1, "gone": 2}}']
)
def test_marker_that_names_no_weights_or_cannot_be_read_is_not_served(tmp_path: Path, marker: str) -> None:
    folder = shutil.copytree(FOLDER, tmp_path / "marked")
    (folder / DEMO_MARKER).write_text(marker)
    _, service = start_service(folder)
    try:
        (why,) = service.snapshot().why_not_ready
        assert "avision" in why and DEMO_MARKER in why
    finally:
        service.stop(30)


def test_model_card_tells_every_score_that_has_a_bar() -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for group, bars in BARS.items():
        assert f"| {group} |" in card
        rows = card.partition(f"| {group} |")[2].partition("\n\n")[0]
        for subject, bar in bars.items():
            (share,) = (line.split("|")[4] for line in rows.split("\n") if line.startswith(f"| {subject} |"))
            is_met = float(share.strip().rstrip("%")) / 100 >= bar
            assert is_met, (group, subject)
