"""Loader, ledger and service on a card, from snapshot folders to answers."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from config import EngineOptions, Limits
from models.engine.memory import plan_memory
from models.engine.scheduler import SchedulerLimits
from models.loader import load_model
from models.schemas import Completion, ImageRequest, Message, SamplingParams, TextRequest
from models.service import ModelService
from models.snapshots import Snapshot
from models.streaming import Channel, Delta, Done
from tests.test_runner import image_request, make_sequence, picture, run

# A card of 80 GB leaves 24 GB, far more than tiny models need; a cache of all of it would be zeroed for nothing.
FRACTION = 0.3
START_S, ANSWER_S = 300.0, 60.0


def engine(device: torch.device) -> EngineOptions:
    return EngineOptions(device=str(device), gpu_memory_fraction=FRACTION)


def snapshots(text: Path, vision: Path) -> dict[Any, Snapshot]:
    return {
        "avibe": Snapshot("avibe", text, text, "auto", "", False),
        "avision": Snapshot("avision", vision, vision, "auto", "", False),
    }


def test_what_is_allocated_stays_within_the_ledger(card: torch.device, qwen3_folder: Path, vision_folder: Path) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(card)
    limits = Limits(max_running=16)
    loaded = {
        name: load_model(snapshot, engine=engine(card), limits=limits, phase=lambda _: nullcontext())
        for name, snapshot in snapshots(qwen3_folder, vision_folder).items()
    }
    needs = {name: model.needs for name, model in loaded.items()}
    weights_bytes = sum(need.weights_bytes for need in needs.values())
    # The library keeps small buffers beside weights: rotary frequencies.
    assert weights_bytes <= torch.cuda.memory_allocated(card) - before <= weights_bytes + 2**20
    budget = min(model.budget_bytes(weights_bytes) for model in loaded.values())
    assert budget <= FRACTION * torch.cuda.mem_get_info(card)[1]
    ledger = plan_memory(budget, needs, {"avibe": 0.7, "avision": 0.3})
    torch.cuda.reset_peak_memory_stats(card)
    runners = {name: model.make_runner(ledger.shares[name], lambda _: nullcontext()) for name, model in loaded.items()}
    for name, runner in runners.items():
        share = ledger.shares[name]
        assert (runner.cache_bytes, runner.num_pages) == (share.cache_bytes, share.num_pages)
        assert runner.has_graphs
        sequences = [make_sequence(tuple(range(5, 5 + 50 * num)), max_tokens=8) for num in range(1, 7)]
        sequences.append(make_sequence((7, 8) * 700, temperature=0.8, top_p=0.9, max_tokens=8))
        run(runner, *sequences, limits=SchedulerLimits(max_running=16))
        allocated, reserved = runner.memory_bytes
        assert 0 < allocated <= reserved
    room = sum(share.workspace_bytes for share in ledger.shares.values())
    fixed = weights_bytes + sum(share.cache_bytes for share in ledger.shares.values())
    taken = torch.cuda.max_memory_allocated(card) - before
    print(f"beside weights and pages {taken - fixed} bytes were allocated at most, {room} are planned")
    assert fixed <= taken <= ledger.budget_bytes
    assert torch.cuda.memory_reserved(card) - before <= ledger.budget_bytes


@pytest.fixture(scope="module")
def service(device: torch.device, qwen3_folder: Path, vision_folder: Path) -> Iterator[ModelService]:
    service = ModelService(snapshots(qwen3_folder, vision_folder), Limits(max_running=8), engine(device))
    service.start()
    assert service.wait_loaded(START_S)
    yield service
    service.stop(ANSWER_S)


def ask(service: ModelService, request: TextRequest | ImageRequest) -> Channel:
    return service.submit(request, request_id="t", received_at=service.clock())


def answer(channel: Channel) -> Completion:
    end = channel.wait_end(ANSWER_S)
    assert isinstance(end, Done), end
    return end.completion


def text_request(text: str, **sampling: Any) -> TextRequest:
    values: dict[str, Any] = {"max_tokens": 32, "temperature": 0.0, "ignore_eos": True, **sampling}
    return TextRequest((Message("user", text),), SamplingParams(**values))


def test_service_is_ready_on_the_device(service: ModelService, device: torch.device) -> None:
    snapshot = service.snapshot()
    assert snapshot.why_not_ready == () and snapshot.is_alive
    is_cuda = device.type == "cuda"
    for model in (snapshot.models["avibe"], snapshot.models["avision"]):
        assert (model.device, model.dtype) == (str(device), "float16" if is_cuda else "float32")
        assert ("graphs" in model.phases, "compile" in model.phases) == (is_cuda, is_cuda)
    assert (service.gpu_uuid or "").startswith("GPU-" if is_cuda else "")


def test_service_answers_text_and_pictures_at_the_same_time(service: ModelService, wait_until: Any) -> None:
    texts = [f"{'слово ' * (20 * index)}конец" for index in range(8)]
    channels = [ask(service, text_request(text, temperature=0.7 * (index % 2))) for index, text in enumerate(texts)]
    pictures = [image_request("что это", picture(84 + 28 * index, 56, index)) for index in range(4)]
    channels += [ask(service, request) for request in pictures]
    answers = [answer(channel) for channel in channels]
    assert [each.generated_tokens for each in answers[:8]] == [32] * 8
    assert {each.finish_reason for each in answers[:8]} == {"length"}
    assert all(1 <= each.generated_tokens <= 8 for each in answers[8:])
    assert [each.input_tokens for each in answers[:8]] == sorted(each.input_tokens for each in answers[:8])
    wait_until(lambda: not any(m.num_running + m.num_waiting for m in service.snapshot().models.values()))
    assert service.snapshot().is_ready


def test_same_request_to_an_idle_service_gives_the_same_text(service: ModelService) -> None:
    """From its second time on: the first reads the prompt, the others find most of it in the cache."""
    request = text_request("Съешь ещё этих мягких французских булок " * 20, temperature=0.9, seed=4)
    texts = [answer(ask(service, request)).text for _ in range(3)]
    assert texts[1] == texts[2]


def test_stream_comes_in_pieces_that_make_the_answer(service: ModelService) -> None:
    channel = ask(service, text_request("раз два", max_tokens=200))
    pieces = []
    while not isinstance(event := channel.get(ANSWER_S), Done):
        assert isinstance(event, Delta), event
        pieces.append(event.text)
    assert "".join(pieces) == event.completion.text and event.completion.generated_tokens == 200
