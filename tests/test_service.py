"""ModelService with fake models: admission, places, deadlines, cancellation, loading."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from models.engine.sequence import PictureSpan, Sequence
from models.errors import (
    DeadlineExceeded,
    EngineDead,
    InternalError,
    ModelNotConfigured,
    NotReady,
    NumericError,
    PromptTooLong,
    QueueFull,
    ServiceError,
)
from models.metrics import total
from models.schemas import Completion, Message, SamplingParams, TextRequest
from models.service import ModelService
from models.streaming import Channel, Done, Failed
from tests.fakes import GENEROUS_S, Clock, EchoRunner, EndlessRunner, FakeEncoder, FakeLoad, FakeLoaded, FakePrompt
from tests.test_runner import image_request, picture

MakeService = Callable[..., ModelService]


def request(prompt: str = "hello", **sampling: Any) -> TextRequest:
    return TextRequest(
        (Message("user", prompt),), SamplingParams(**{"max_tokens": 100, "temperature": 0.0, **sampling})
    )


def submit(service: ModelService, prompt: str = "hello", **sampling: Any) -> Channel:
    return service.submit(request(prompt, **sampling), request_id="t", received_at=service.clock())


def completion(channel: Channel) -> Completion:
    end = channel.wait_end(GENEROUS_S)
    assert isinstance(end, Done), end
    return end.completion


def failure(channel: Channel) -> ServiceError:
    end = channel.wait_end(GENEROUS_S)
    assert isinstance(end, Failed), end
    return end.error


def places(service: ModelService) -> int:
    model = service.snapshot().models["avibe"]
    return model.num_running + model.num_waiting


def test_answer_is_text_with_counts_and_times(make_service: MakeService) -> None:
    service = make_service()
    answer = completion(submit(service, "привет 🎉"))
    assert answer.text == "привет 🎉"
    assert answer.input_tokens == answer.generated_tokens == len("привет 🎉".encode())
    assert answer.finish_reason == "stop"
    timing = answer.timing
    assert 0 <= timing.queue_s <= timing.total_s and timing.time_to_first_token_s is not None
    assert timing.generation_s <= timing.total_s


def test_sequence_gets_all_that_the_encoder_made_of_the_pictures(make_service: MakeService) -> None:
    prompt = FakePrompt(
        (1, 7, 7, 2), vision=object(), pictures=(PictureSpan(1, 2, 8, b"key"),), prefix_ids=(1, -5, -5, 2)
    )

    class PictureEncoder(FakeEncoder):
        def encode(self, request: Any, check: Callable[[], None]) -> FakePrompt:
            return prompt

    seen: list[Sequence] = []
    runner = EchoRunner(before_step=seen.extend)
    completion(submit(make_service({"avibe": FakeLoaded(runner, PictureEncoder())})))
    sequence = seen[0]
    made = (sequence.prompt_ids, sequence.vision, sequence.pictures, sequence.prefix_ids)
    assert made == (prompt.ids, prompt.vision, prompt.pictures, prompt.prefix_ids)


def test_max_tokens_in_the_middle_of_a_character_ends_with_length(make_service: MakeService) -> None:
    answer = completion(submit(make_service(), "яя", max_tokens=3))
    assert (answer.text, answer.finish_reason, answer.generated_tokens) == ("я\ufffd", "length", 3)


def test_stop_string_ends_the_answer_before_itself(make_service: MakeService) -> None:
    answer = completion(submit(make_service(), "one STOP two", stop=("STOP",)))
    assert (answer.text, answer.finish_reason) == ("one ", "stop")


def test_held_back_text_comes_out_at_the_end(make_service: MakeService) -> None:
    assert completion(submit(make_service(), "one STO", stop=("STOP",))).text == "one STO"


def test_text_is_made_by_the_reader_unless_a_stop_string_must_be_found(make_service: MakeService) -> None:
    loaded = FakeLoaded()
    names: set[str] = set()
    decode = loaded.encoder.tokenizer.decode

    def watched(ids: Any, skip_special_tokens: bool = True) -> str:
        names.add(threading.current_thread().name)
        return decode(ids, skip_special_tokens)

    loaded.encoder.tokenizer.decode = watched  # type: ignore[method-assign]
    service = make_service({"avibe": loaded})
    assert completion(submit(service, "abc")).text == "abc"
    assert names == {threading.current_thread().name}
    names.clear()
    assert completion(submit(service, "abc", stop=("STOP",))).text == "abc"
    assert names == {"engine"}


def test_tokens_that_are_no_text_end_one_request_and_leave_no_place_taken(
    make_service: MakeService, wait_until: Any
) -> None:
    def fail(ids: Any, skip_special_tokens: bool = True) -> str:
        raise ValueError("/secret/path")

    loaded = FakeLoaded(EndlessRunner())
    service = make_service({"avibe": loaded})
    loaded.encoder.tokenizer.decode = fail  # type: ignore[method-assign]
    channel = submit(service, max_tokens=10**9)
    end = channel.get(GENEROUS_S)
    assert isinstance(end, Failed) and isinstance(end.error, InternalError) and "secret" not in end.error.message
    wait_until(lambda: places(service) == 0)
    assert service.snapshot().is_ready


@pytest.mark.parametrize("stop", [(), ("STOP",)])
def test_answer_that_nobody_reads_leaves_no_place_taken(
    make_service: MakeService, wait_until: Any, stop: tuple[str, ...]
) -> None:
    service = make_service()
    channel = submit(service, "abc", stop=stop)
    wait_until(lambda: channel.is_ended)
    assert places(service) == 0
    assert channel.generated_tokens == 3 and channel.timing is not None


def full_service(make_service: MakeService, **limits: Any) -> tuple[ModelService, EndlessRunner, list[Channel]]:
    """One running and two waiting requests: no place left."""
    runner = EndlessRunner()
    runner.gate.clear()
    service = make_service({"avibe": FakeLoaded(runner)}, max_running=1, max_waiting=2, **limits)
    channels = [submit(service, max_tokens=10**9) for _ in range(3)]
    return service, runner, channels


def test_full_queue_refuses_and_tells_when_to_come_back(make_service: MakeService) -> None:
    service, _, _ = full_service(make_service)
    with pytest.raises(QueueFull) as caught:
        submit(service)
    assert caught.value.retry_after_s is not None and caught.value.retry_after_s >= 1
    assert "at most 3 requests" in caught.value.message


def test_pictures_beyond_the_memory_limit_are_refused_until_others_are_done(make_service: MakeService) -> None:
    runner = EchoRunner()
    runner.gate.clear()
    one = image_request("a", picture(100, 100))
    cost = one.host_bytes(10**6)
    service = make_service({"avision": FakeLoaded(runner)}, max_running=1, max_picture_bytes=2 * cost)

    def ask() -> Channel:
        return service.submit(one, request_id="t", received_at=service.clock())

    channels = [ask(), ask()]
    with pytest.raises(QueueFull, match=f"at most {2 * cost} bytes, {2 * cost} are taken and this one needs {cost}"):
        ask()
    runner.gate.set()
    for channel in channels:
        completion(channel)
    completion(ask())
    assert service._slots["avision"].picture_bytes == 0


def test_retry_after_follows_the_measured_drain_rate(make_service: MakeService) -> None:
    clock = Clock()

    def advance(_: Any) -> None:
        clock.now += 4.0

    runner = EchoRunner(advance)
    service = make_service({"avibe": FakeLoaded(runner)}, max_running=1, max_waiting=2, clock=clock)
    completion(submit(service, "x"))  # two steps of 4 s: 8 s a request
    runner.gate.clear()
    for _ in range(3):
        submit(service)
    with pytest.raises(QueueFull) as caught:
        submit(service)
    assert caught.value.retry_after_s == 24


def test_cancelled_requests_give_their_places_back(make_service: MakeService, wait_until: Any) -> None:
    service, runner, channels = full_service(make_service)
    for channel in channels[1:]:
        channel.cancel()
    assert places(service) == 1, "those that wait leave at once"
    channels[0].cancel()
    runner.gate.set()
    wait_until(lambda: places(service) == 0)
    completion(submit(service, "x", max_tokens=1))


def test_cancelled_running_request_makes_at_most_one_more_token(make_service: MakeService, wait_until: Any) -> None:
    runner = EndlessRunner()
    service = make_service({"avibe": FakeLoaded(runner)})
    channel = submit(service, max_tokens=10**9)
    assert runner.steps.acquire(timeout=GENEROUS_S)
    runner.gate.clear()
    channel.cancel()
    before = channel.generated_tokens
    runner.gate.set()
    wait_until(lambda: channel.is_ended)
    assert channel.generated_tokens <= before + 1


def test_encoding_error_gives_the_place_back(make_service: MakeService) -> None:
    service = make_service({"avibe": FakeLoaded(encoder=FakeEncoder(context_tokens=10))}, max_running=1, max_waiting=1)
    for _ in range(5):
        with pytest.raises(PromptTooLong):
            submit(service, "x" * 11, max_tokens=1)
    assert places(service) == 0
    assert completion(submit(service, "x", max_tokens=1)).text == "x"


def test_expired_request_fails_with_the_limit_and_gives_its_place_back(make_service: MakeService) -> None:
    clock = Clock()

    def advance(_: Any) -> None:
        clock.now += 1.0

    service = make_service({"avibe": FakeLoaded(EndlessRunner(advance))}, clock=clock, request_deadline_s=5.0)
    channel = submit(service, max_tokens=10**9)
    error = failure(channel)
    assert isinstance(error, DeadlineExceeded) and "5 s" in error.message
    assert channel.generated_tokens == 5
    assert places(service) == 0


def test_deadline_counts_from_the_first_byte(make_service: MakeService) -> None:
    clock = Clock()
    service = make_service(clock=clock, request_deadline_s=5.0)
    with pytest.raises(DeadlineExceeded):
        service.submit(request(), request_id="t", received_at=clock.now - 5.0)
    assert places(service) == 0


def test_numeric_error_ends_one_request_and_is_counted(make_service: MakeService) -> None:
    def poison(batch: Any) -> None:
        raise NumericError("the model gave NaN or Inf; the request was ended")

    service = make_service({"avibe": FakeLoaded(EchoRunner(poison))})
    assert isinstance(failure(submit(service)), NumericError)
    assert total(service.metrics.numeric_errors) == 1
    assert service.snapshot().is_ready


def test_unknown_fault_is_an_internal_error_without_details(make_service: MakeService) -> None:
    def fail(batch: Any) -> None:
        raise RuntimeError("/secret/path")

    error = failure(submit(make_service({"avibe": FakeLoaded(EchoRunner(fail))})))
    assert isinstance(error, InternalError) and "secret" not in error.message


def test_unconfigured_model_is_refused_while_the_other_serves(make_service: MakeService) -> None:
    service = make_service({"avision": FakeLoaded()})
    with pytest.raises(ModelNotConfigured, match="avibe"):
        submit(service)
    snapshot = service.snapshot()
    assert snapshot.is_ready
    assert (snapshot.models["avibe"].state, snapshot.models["avision"].state) == ("not_configured", "ready")


def test_loading_model_is_not_ready_and_says_the_phase(make_service: MakeService, wait_until: Any) -> None:
    models = {"avibe": FakeLoaded()}
    load = FakeLoad(models)
    load.gate.clear()
    service = make_service(models, load=load, wait=False)
    wait_until(lambda: service.snapshot().models["avibe"].phase == "weights")
    with pytest.raises(NotReady) as caught:
        submit(service)
    assert caught.value.retry_after_s is not None
    assert any("avibe: loading, phase weights" in why for why in service.snapshot().why_not_ready)
    assert service.snapshot().is_alive
    load.gate.set()
    assert service.wait_loaded(GENEROUS_S)
    assert service.snapshot().is_ready
    assert list(service.snapshot().models["avibe"].phases) == ["weights", "cache"]


def test_failed_load_is_told_without_details_and_the_other_model_serves(make_service: MakeService) -> None:
    models = {"avibe": FakeLoaded(), "avision": FakeLoaded()}
    service = make_service(models, load=FakeLoad(models, {"avision": OSError("/secret/path")}))
    snapshot = service.snapshot()
    assert snapshot.models["avision"].state == "failed"
    (why,) = snapshot.why_not_ready
    assert "avision: loading failed in phase weights: OSError" in why and "secret" not in why
    assert completion(submit(service, "x")).text == "x"


def test_load_beyond_its_limit_is_told(make_service: MakeService, wait_until: Any) -> None:
    models = {"avibe": FakeLoaded()}
    load = FakeLoad(models)
    load.gate.clear()
    service = make_service(models, load=load, wait=False, load_timeout_s=0.01)
    wait_until(lambda: service.snapshot().models["avibe"].state == "failed")
    assert "longer than 0.01 s" in service.snapshot().why_not_ready[0]
    load.gate.set()


def test_weights_and_warm_up_share_the_time_to_load(make_service: MakeService, wait_until: Any) -> None:
    clock, gate = Clock(), threading.Event()

    class SlowStart(FakeLoaded):
        def make_runner(self, *arguments: Any) -> EchoRunner:
            assert gate.wait(GENEROUS_S)
            return super().make_runner(*arguments)

    def load(_: Any, *, phase: Any, **__: Any) -> FakeLoaded:
        with phase("weights"):
            clock.now += 599.99
        return SlowStart()

    service = make_service({"avibe": FakeLoaded()}, load=load, wait=False, clock=clock, load_timeout_s=600.0)
    wait_until(lambda: service.snapshot().models["avibe"].state == "failed")
    gate.set()


def test_dead_engine_fails_everybody_and_is_neither_ready_nor_alive(make_service: MakeService, wait_until: Any) -> None:
    def die(batch: Any) -> None:
        raise EngineDead("sticky")

    service = make_service({"avibe": FakeLoaded(EchoRunner(die))})
    assert isinstance(failure(submit(service)), InternalError)
    wait_until(lambda: not service.snapshot().is_alive)
    assert "engine: its loop has ended" in service.snapshot().why_not_ready
    with pytest.raises(NotReady):
        submit(service)
    assert places(service) == 0


def test_hung_engine_is_first_not_ready_then_not_alive(make_service: MakeService) -> None:
    clock = Clock()
    runner = EchoRunner()
    runner.gate.clear()
    service = make_service({"avibe": FakeLoaded(runner)}, clock=clock, stall_limit_s=60.0)
    submit(service)
    clock.now += 29
    assert service.snapshot().is_ready
    clock.now += 2
    snapshot = service.snapshot()
    assert not snapshot.is_ready and snapshot.is_alive
    assert snapshot.why_not_ready == ("engine: no step for 31.0 s while requests are pending",)
    clock.now += 30
    assert not service.snapshot().is_alive


def test_idle_engine_is_ready_however_long_nothing_comes(make_service: MakeService) -> None:
    clock = Clock()
    service = make_service(clock=clock)
    clock.now += 10**6
    assert service.snapshot().is_ready


def test_busy_engine_is_alive_however_long_it_is_busy(make_service: MakeService) -> None:
    """Steps of half the limit: progress, so neither hung nor restarted (SGLang 22511)."""
    clock = Clock()
    seen = []

    def advance(_: Any) -> None:
        clock.now += 25.0
        seen.append(service.snapshot().is_alive)

    service = make_service({"avibe": FakeLoaded(EchoRunner(advance))}, clock=clock, request_deadline_s=10**6)
    completion(submit(service, "x" * 50))
    assert len(seen) > 50 and all(seen)


def test_draining_is_not_ready_but_still_answers(make_service: MakeService) -> None:
    service = make_service()
    service.drain()
    assert service.snapshot().why_not_ready == ("service: draining before a stop",)
    assert completion(submit(service, "x")).text == "x"


def test_open_requests_are_answered_when_the_service_gives_up(make_service: MakeService) -> None:
    service, _, channels = full_service(make_service)
    service.fail_open_requests("the engine was lost")
    for channel in channels:
        assert "lost" in failure(channel).message


def test_stop_answers_everybody(make_service: MakeService) -> None:
    runner = EndlessRunner()
    service = make_service({"avibe": FakeLoaded(runner)})
    channels = [submit(service, max_tokens=10**9) for _ in range(8)]
    service.stop(GENEROUS_S)
    for channel in channels:
        assert failure(channel).code == "internal_error"


def test_many_threads_lose_no_place_and_no_answer(make_service: MakeService, wait_until: Any) -> None:
    service = make_service({"avibe": FakeLoaded()}, max_running=3, max_waiting=5)
    outcomes: list[str] = []

    def ask(number: int) -> None:
        for i in range(20):
            try:
                channel = submit(service, f"{number}-{i}")
            except QueueFull:
                outcomes.append("full")
                continue
            if i % 3 == 0:
                channel.cancel()
                outcomes.append(type(channel.wait_end(GENEROUS_S)).__name__)
            else:
                assert completion(channel).text == f"{number}-{i}"
                outcomes.append("Done")

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(GENEROUS_S)
    assert len(outcomes) == 240 and "Done" in outcomes
    wait_until(lambda: places(service) == 0)


def test_memory_is_divided_once_and_shown(make_service: MakeService) -> None:
    service = make_service({"avibe": FakeLoaded(), "avision": FakeLoaded()})
    planned = {
        (sample.labels["model"], sample.labels["purpose"]): sample.value
        for family in service.metrics.memory.collect()
        for sample in family.samples
    }
    assert planned["avibe", "weights"] == planned["avision", "weights"] == 1000
    # a million bytes without weights, less working room, 7 to 3
    assert planned["avibe", "kv_cache"] == pytest.approx(0.7 * 999_800, abs=16)
    assert planned["avision", "kv_cache"] == pytest.approx(0.3 * 999_800, abs=16)


def test_models_that_do_not_fit_say_so_with_the_numbers(make_service: MakeService) -> None:
    service = make_service({"avibe": FakeLoaded(memory_bytes=10)})
    (why,) = service.snapshot().why_not_ready
    assert why.startswith("avibe: loading failed") and "of memory may be taken" in why


def test_cache_metrics_are_those_of_the_loop(make_service: MakeService) -> None:
    service = make_service({"avibe": FakeLoaded()})
    prompt = "a" * 45
    for _ in range(2):
        submit(service, prompt).wait_end(GENEROUS_S)
    read = service.metrics.registry.get_sample_value
    assert read("avito_prefix_cache_queries_total", {"model": "avibe"}) == 90
    assert read("avito_prefix_cache_hits_total", {"model": "avibe"}) == 44
    assert read("avito_kv_cache_usage_perc", {"model": "avibe"}) == 0
    assert read("avito_kv_cache_capacity_tokens", {"model": "avision"}) == 0
