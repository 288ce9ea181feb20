"""The real runner on tiny random models of the true classes, against `generate`."""

from __future__ import annotations

import io
import json
import random
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from config import Limits
from models.engine.runner import TransformersRunner
from models.engine.sequence import SamplingOptions, Sequence
from models.errors import LoadError, NumericError
from models.images import read_header
from models.loader import LoadedModel, load_model
from models.schemas import ImageInput, ImageRequest, Message, SamplingParams, TextRequest
from models.snapshots import Snapshot

NUM_TOKENS = 24


def load(folder: Path, model: Any, **limits: Any) -> LoadedModel:
    snapshot = Snapshot(model, folder, folder, "auto", "", False)
    return load_model(
        snapshot,
        device_setting="cpu",
        gpu_memory_fraction=0.9,
        limits=Limits(**limits),
        phase=lambda _: nullcontext(),
    )


def make_sequence(ids: tuple[int, ...], vision: object = None, **sampling: Any) -> Sequence:
    options: dict[str, Any] = dict(
        max_tokens=NUM_TOKENS,
        temperature=0.0,
        top_p=1.0,
        top_k=0,
        repetition_penalty=1.0,
        seed=0,
        stop_ids=frozenset(),
    )
    options.update(sampling)
    return Sequence("t", ids, SamplingOptions(**options), 1e18, lambda _: False, lambda *_: None, vision)


def run(runner: Any, *sequences: Sequence, num_tokens: int = NUM_TOKENS) -> list[list[int]]:
    """Step all sequences together until each has its tokens."""
    while any(len(s.output_ids) < num_tokens for s in sequences):
        for output in runner.step([s for s in sequences if len(s.output_ids) < num_tokens]):
            assert output.error is None
            if output.token_id is not None:
                output.sequence.output_ids.append(output.token_id)
    return [s.output_ids for s in sequences]


def generate(model: Any, ids: tuple[int, ...], **inputs: Any) -> list[int]:
    model.generation_config.eos_token_id = None
    with torch.inference_mode():
        output = model.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            **inputs,
        )
    return list(output[0, len(ids) :].tolist())


def text_ids(loaded: LoadedModel, text: str) -> tuple[int, ...]:
    return loaded.encoder.encode(TextRequest((Message("user", text),), SamplingParams(8, 0.0)), lambda: None).ids


def picture(width: int, height: int, seed: int = 0) -> ImageInput:
    image = Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(width * height * 3))
    file = io.BytesIO()
    image.save(file, "PNG")
    data = file.getvalue()
    return ImageInput(data, read_header(data, declared_type="", field="image", limits=Limits()))


def image_request(text: str, *images: ImageInput) -> ImageRequest:
    return ImageRequest((Message("user", text),), images, SamplingParams(8, 0.0))


@pytest.mark.parametrize("kind", ["qwen3_folder", "llama_folder"])
def test_greedy_text_equals_generate(kind: str, request: pytest.FixtureRequest) -> None:
    loaded = load(request.getfixturevalue(kind), "avibe")
    for text in ("Привет, как дела?", "The quick brown fox", "x"):
        ids = text_ids(loaded, text)
        assert run(loaded.runner, make_sequence(ids))[0] == generate(loaded.runner._model, ids)  # type: ignore[attr-defined]


def test_prompt_read_in_chunks_equals_generate(qwen3_folder: Path) -> None:
    loaded = load(qwen3_folder, "avibe", prefill_chunk_tokens=5)
    ids = text_ids(loaded, "Съешь ещё этих мягких французских булок")
    assert len(ids) > 15
    assert run(loaded.runner, make_sequence(ids))[0] == generate(loaded.runner._model, ids)  # type: ignore[attr-defined]


def test_sequences_stepped_together_equal_single_ones(qwen3_folder: Path) -> None:
    loaded = load(qwen3_folder, "avibe", prefill_chunk_tokens=7)
    prompts = [text_ids(loaded, text) for text in ("one", "two and a half", "трижды три " * 5)]
    alone = [run(loaded.runner, make_sequence(ids, temperature=0.9, seed=5))[0] for ids in prompts]
    together = run(loaded.runner, *(make_sequence(ids, temperature=0.9, seed=5) for ids in prompts))
    assert together == alone


@pytest.mark.parametrize("sizes", [[(84, 56)], [(1, 1)], [(140, 84), (56, 112)]])
def test_greedy_pictures_equal_generate(vision_folder: Path, sizes: list[tuple[int, int]]) -> None:
    loaded = load(vision_folder, "avision")
    prompt = loaded.encoder.encode(image_request("What is it?", *(picture(*size) for size in sizes)), lambda: None)
    ours = run(loaded.runner, make_sequence(prompt.ids, prompt.vision))[0]
    assert prompt.vision is not None
    ids = torch.tensor([prompt.ids])
    theirs = generate(
        loaded.runner._model,  # type: ignore[attr-defined]
        prompt.ids,
        pixel_values=torch.cat(prompt.vision.pixel_values),
        image_grid_thw=prompt.vision.grids,
        mm_token_type_ids=(ids == loaded.runner._model.config.image_token_id).int(),  # type: ignore[attr-defined]
    )
    assert ours == theirs


def test_interleaved_pictures_equal_single_ones(vision_folder: Path) -> None:
    """The library keeps rotary offsets on the model; ours must not mix those of several requests."""
    loaded = load(vision_folder, "avision")
    prompts = [
        loaded.encoder.encode(image_request("a", picture(56, 56, 1)), lambda: None),
        loaded.encoder.encode(image_request("bb", picture(280, 168, 2), picture(84, 84, 3)), lambda: None),
    ]
    alone = [run(loaded.runner, make_sequence(p.ids, p.vision))[0] for p in prompts]
    assert run(loaded.runner, *(make_sequence(p.ids, p.vision) for p in prompts)) == alone


def test_different_pictures_give_different_answers(vision_folder: Path) -> None:
    loaded = load(vision_folder, "avision")
    prompts = [loaded.encoder.encode(image_request("a", picture(56, 56, seed)), lambda: None) for seed in (1, 2)]
    first, second = (run(loaded.runner, make_sequence(p.ids, p.vision))[0] for p in prompts)
    assert first != second


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_logits_end_only_their_request(qwen3_folder: Path, value: float) -> None:
    loaded = load(qwen3_folder, "avibe")
    runner: Any = loaded.runner
    good, bad = make_sequence((5, 6, 7)), make_sequence((8, 9, 10))
    embedding = runner._model.get_input_embeddings()

    def poison(_: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + value if 9 in args[0] else output

    hook = embedding.register_forward_hook(poison)
    try:
        outputs = list(runner.step([good, bad]))
    finally:
        hook.remove()
    assert outputs[0].error is None and outputs[0].token_id is not None
    assert isinstance(outputs[1].error, NumericError)


def test_released_sequence_holds_no_cache(qwen3_folder: Path) -> None:
    loaded = load(qwen3_folder, "avibe")
    runner = loaded.runner
    assert isinstance(runner, TransformersRunner)
    sequence = make_sequence((5, 6, 7))
    list(runner.step([sequence]))
    assert len(runner._running) == 1
    runner.release(sequence)
    assert not runner._running


def test_generation_config_counts_where_request_is_silent(qwen3_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "snapshot"
    shutil.copytree(qwen3_folder, folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "top_k": 7, "top_p": 0.5, "temperature": 0.1}))
    encoder = load(folder, "avibe").encoder
    silent = encoder.sampling_options(SamplingParams(8, 0.7))
    assert (silent.top_k, silent.top_p, silent.temperature, silent.repetition_penalty) == (7, 0.5, 0.7, 1.0)
    spoken = encoder.sampling_options(SamplingParams(8, 0.7, top_k=3, top_p=0.9))
    assert (spoken.top_k, spoken.top_p) == (3, 0.9)
    assert len(silent.stop_ids) == 2


def test_weights_other_than_safetensors_are_refused(qwen3_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(qwen3_folder, tmp_path / "snapshot")
    file = tmp_path / "snapshot" / "model.safetensors"
    torch.save({}, tmp_path / "snapshot" / "pytorch_model.bin")
    file.unlink()
    with pytest.raises(OSError, match="safetensors"):
        load(tmp_path / "snapshot", "avibe")


@pytest.mark.parametrize(("layers", "what"), [(3, "are missing"), (2, None)])
def test_incomplete_weights_are_not_filled_with_random_numbers(
    qwen3_folder: Path, tmp_path: Path, layers: int, what: str | None
) -> None:
    folder = tmp_path / "snapshot"
    shutil.copytree(qwen3_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": layers, "layer_types": ["full_attention"] * layers}
    (folder / "config.json").write_text(json.dumps(config))
    if what is None:
        load(folder, "avibe")
    else:
        with pytest.raises(LoadError, match=what):
            load(folder, "avibe")


def test_weights_of_another_shape_are_refused(qwen3_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "snapshot"
    shutil.copytree(qwen3_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 80}))
    with pytest.raises(LoadError, match="6 weights have another shape than"):
        load(folder, "avibe")
