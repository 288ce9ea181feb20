"""ModelService: all that the web side sees of the models. `start`, `submit`, `snapshot`, `stop`.

It loads the configured models in a background thread, keeps the bounded number of places per model, turns requests
into sequences and the engine's ids into text, and sees to it that every admitted request ends exactly once and gives
its place back. It knows no HTTP. How a model is loaded is passed in, so that tests run all of this with a fake runner.
"""

from __future__ import annotations

import importlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Sequences
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol

from prometheus_client import CollectorRegistry

from config import Limits
from models.engine.loop import EngineLoop, Runner
from models.engine.sequence import EndReason, SamplingOptions, Sequence
from models.errors import (
    DeadlineExceeded,
    EngineDead,
    InternalError,
    LoadError,
    ModelNotConfigured,
    NotReady,
    NumericError,
    QueueFull,
    RequestCancelled,
    ServiceError,
)
from models.metrics import ModelMetrics
from models.schemas import MODEL_NAMES, Completion, ImageRequest, ModelName, SamplingParams, TextRequest, Timing
from models.snapshots import Snapshot
from models.streaming import Channel, Detokenizer, StopStrings

log = logging.getLogger("avito.service")

ModelState = Literal["not_configured", "loading", "ready", "failed"]
# What a refused client is told before anything was measured.
_DEFAULT_RETRY_S = 5


class Encoder(Protocol):
    """What the service needs of `prompts.PromptEncoder`."""

    def encode(self, request: TextRequest | ImageRequest, check: Callable[[], None]) -> Encoded: ...
    def sampling_options(self, params: SamplingParams) -> SamplingOptions: ...
    @property
    def tokenizer(self) -> Decoder: ...


class Encoded(Protocol):
    @property
    def ids(self) -> tuple[int, ...]: ...
    @property
    def vision(self) -> object | None: ...


class Decoder(Protocol):
    def decode(self, ids: Sequences[int]) -> str: ...


class Loaded(Protocol):
    """What the service needs of `loader.LoadedModel`."""

    @property
    def encoder(self) -> Encoder: ...
    @property
    def runner(self) -> Runner: ...
    @property
    def device(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def gpu_uuid(self) -> str | None: ...


Load = Callable[..., Loaded]


@dataclass(frozen=True)
class ModelSnapshot:
    """How one model stands. `phases`: finished load phases in seconds; `phase`: the one under way."""

    state: ModelState
    is_demo: bool
    phases: Mapping[str, float]
    phase: str | None
    phase_s: float
    device: str | None
    dtype: str | None
    num_running: int
    num_waiting: int


@dataclass(frozen=True)
class ServiceSnapshot:
    """How the service stands at one moment. `why_not_ready` is empty exactly if every configured model serves."""

    models: Mapping[ModelName, ModelSnapshot]
    is_draining: bool
    is_engine_dead: bool
    stalled_s: float
    is_alive: bool
    why_not_ready: tuple[str, ...]

    @property
    def is_ready(self) -> bool:
        return not self.why_not_ready

    @property
    def is_demo(self) -> bool:
        return any(model.is_demo for model in self.models.values())


@dataclass
class _Slot:
    """One configured model: how far it is, and its places. Guarded by the service's lock."""

    snapshot: Snapshot
    state: ModelState = "loading"
    loaded: Loaded | None = None
    phases: dict[str, float] = field(default_factory=dict)
    phase: str | None = None
    phase_started: float = 0.0
    failure: str | None = None
    num_places: int = 0


class ModelService:
    """May be called from any thread.

    :param snapshots: the configured models, from `snapshots.find_snapshots`.
    :param load: `loader.load_model` or a fake; None imports the real one in the loading thread, because torch takes
        seconds to import and live must answer at once.
    :param clock: monotonic seconds.
    """

    def __init__(
        self,
        snapshots: Mapping[ModelName, Snapshot],
        limits: Limits,
        *,
        device: str = "auto",
        gpu_memory_fraction: float = 0.9,
        load: Load | None = None,
        clock: Callable[[], float] = time.monotonic,
        registry: CollectorRegistry | None = None,
    ) -> None:
        self.limits = limits
        self.metrics = ModelMetrics(registry or CollectorRegistry())
        self._load = load
        self._device = device
        self._gpu_memory_fraction = gpu_memory_fraction
        self.clock = clock
        self._lock = threading.Lock()
        self._slots = {name: _Slot(snapshot) for name, snapshot in snapshots.items()}
        self._open: set[_Request] = set()
        self._is_draining = False
        self._loop = EngineLoop(clock)
        self._loading = threading.Thread(target=self._load_all, name="loading", daemon=True)
        self._has_settled = threading.Event()
        for name in MODEL_NAMES:
            self.metrics.model_ready.labels(name).set(0)
            self.metrics.running.labels(name).set_function(lambda n=name: self._count(n)[0])  # type: ignore[misc]
            self.metrics.waiting.labels(name).set_function(lambda n=name: self._count(n)[1])  # type: ignore[misc]

    def start(self) -> None:
        """Start the engine's thread and load the models in the background. Returns at once."""
        for slot in self._slots.values():
            if slot.snapshot.is_demo:
                log.warning(
                    "%s is an embedded demo model: its answers are not those of the real one", slot.snapshot.model
                )
        self._loop.start()
        self._loading.start()

    def wait_loaded(self, timeout_s: float) -> bool:
        """Wait until each model is ready or failed. False if that took longer."""
        return self._has_settled.wait(timeout_s)

    def drain(self) -> None:
        """Let readiness say no, so that balancers look away; requests are still answered."""
        self._is_draining = True
        log.info("draining: ready answers 503 from now on, requests are still answered")

    def stop(self, timeout_s: float) -> None:
        """End the engine after the current step. Requests that are still open are answered `internal_error`."""
        self._loop.stop(timeout_s)
        self.fail_open_requests("the service was stopped")

    def fail_open_requests(self, why: str) -> None:
        """Answer everybody who still waits with `internal_error`, whatever state the engine is in."""
        with self._lock:
            requests = list(self._open)
        for request in requests:
            request.abandon(InternalError(why))

    def check_configured(self, model: ModelName) -> None:
        """Before a door reads a body: nothing in it could make this model answer.

        :raise ModelNotConfigured: the operator did not set this model up.
        """
        if model not in self._slots:
            raise ModelNotConfigured(f"model {model}: is not configured on this server")

    def submit(
        self,
        request: TextRequest | ImageRequest,
        *,
        request_id: str,
        received_at: float,
        is_abandoned: Callable[[], bool] = lambda: False,
    ) -> Channel:
        """Admit a request; its channel gets deltas and exactly one end.

        :param received_at: monotonic time of the request's first byte, from which the deadline counts.
        :param is_abandoned: whether nobody waits any more; asked now and then while the prompt is encoded.
        :raise ModelNotConfigured: the operator did not set this model up.
        :raise NotReady: it is loading or failed, or the engine has ended.
        :raise QueueFull: all places are taken; `retry_after_s` is computed from the measured drain rate.
        :raise PromptTooLong, InvalidImage: see `PromptEncoder.encode`; the place is given back.
        :raise DeadlineExceeded, RequestCancelled: while it was encoded; the place is given back.
        """
        with self._lock:
            slot = self._admit(request.model)
            slot.num_places += 1
        assert slot.loaded is not None
        entry = _Request(self, request, slot, request_id=request_id, received_at=received_at)
        try:
            entry.start(slot.loaded.encoder, is_abandoned)
        except BaseException:
            self._give_back(entry)
            raise
        return entry.channel

    def _admit(self, model: ModelName) -> _Slot:
        self.check_configured(model)
        slot = self._slots[model]
        if slot.state != "ready" or slot.loaded is None:
            raise NotReady(f"model {model}: {self._describe(model, slot)}", retry_after_s=_DEFAULT_RETRY_S)
        loop = self._loop.snapshot()
        if loop.is_dead or loop.stalled_s > self.limits.stall_limit_s:
            raise NotReady("the engine has ended; a new one is on its way", retry_after_s=_DEFAULT_RETRY_S)
        num_places = self.limits.max_waiting + self.limits.max_running
        if slot.num_places >= num_places:
            raise QueueFull(
                f"model {model}: at most {num_places} requests at a time, got one more",
                retry_after_s=self._retry_after(model),
            )
        return slot

    def _retry_after(self, model: ModelName) -> int:
        seconds = self._loop.seconds_to_drain(model)
        if seconds is None:
            return _DEFAULT_RETRY_S
        return max(1, min(math.ceil(seconds), math.ceil(self.limits.request_deadline_s)))

    def snapshot(self) -> ServiceSnapshot:
        """A consistent picture for health and pages; cheap, touches no device."""
        loop = self._loop.snapshot()
        now = self.clock()
        models: dict[ModelName, ModelSnapshot] = {}
        why: list[str] = []
        with self._lock:
            for name in MODEL_NAMES:
                slot = self._slots.get(name)
                if slot is None:
                    models[name] = ModelSnapshot("not_configured", False, {}, None, 0.0, None, None, 0, 0)
                    continue
                running = loop.num_running.get(name, 0)
                models[name] = ModelSnapshot(
                    state=slot.state,
                    is_demo=slot.snapshot.is_demo,
                    phases=dict(slot.phases),
                    phase=slot.phase,
                    phase_s=now - slot.phase_started if slot.phase else 0.0,
                    device=slot.loaded.device if slot.loaded else None,
                    dtype=slot.loaded.dtype if slot.loaded else None,
                    num_running=running,
                    num_waiting=max(0, slot.num_places - running),
                )
                if slot.state != "ready":
                    why.append(f"{name}: {self._describe(name, slot)}")
        is_hung = loop.stalled_s > self.limits.stall_limit_s
        if loop.is_dead:
            why.append("engine: its loop has ended")
        elif loop.stalled_s > self.limits.stall_limit_s / 2:
            why.append(f"engine: no step for {loop.stalled_s:.1f} s while requests are pending")
        if self._is_draining:
            why.append("service: draining before a stop")
        return ServiceSnapshot(
            models=models,
            is_draining=self._is_draining,
            is_engine_dead=loop.is_dead,
            stalled_s=loop.stalled_s,
            is_alive=not (loop.is_dead or is_hung),
            why_not_ready=tuple(why),
        )

    @property
    def gpu_uuid(self) -> str | None:
        """UUID of the card in use, as NVML writes it; None on a CPU or before a model is loaded."""
        with self._lock:
            return next((s.loaded.gpu_uuid for s in self._slots.values() if s.loaded and s.loaded.gpu_uuid), None)

    def device_memory(self) -> tuple[int, int]:
        """(allocated, reserved) bytes of the card as its allocator stood after the newest step; 0 on a CPU."""
        readings = [slot.loaded.runner.memory_bytes for slot in self._slots.values() if slot.loaded]
        return max(readings, default=(0, 0))

    def _describe(self, name: ModelName, slot: _Slot) -> str:
        if slot.failure:
            return slot.failure
        if slot.phase is None:
            return "waiting to be loaded"
        seconds = self.clock() - slot.phase_started
        return f"loading, phase {slot.phase} ({seconds:.1f} s)"

    def _count(self, name: ModelName) -> tuple[int, int]:
        """(running, waiting) of one model."""
        running = self._loop.snapshot().num_running.get(name, 0)
        with self._lock:
            slot = self._slots.get(name)
            return running, max(0, slot.num_places - running) if slot else 0

    # Loading, in its own thread.

    def _load_all(self) -> None:
        load = self._load
        for name, slot in self._slots.items():
            timer = threading.Timer(self.limits.load_timeout_s, self._fail_slow_load, (name, slot))
            timer.daemon = True
            timer.start()
            try:
                if load is None:
                    with self._phase(name, slot, "libraries"):
                        load = importlib.import_module("models.loader").load_model
                loaded = load(
                    slot.snapshot,
                    device_setting=self._device,
                    gpu_memory_fraction=self._gpu_memory_fraction,
                    limits=self.limits,
                    phase=lambda phase, n=name, s=slot: self._phase(n, s, phase),
                )
            except Exception as error:  # the libraries raise anything; the other model still gets its chance
                log.exception("%s: loading failed", name)
                what = str(error) if isinstance(error, LoadError) else f"{type(error).__name__}; the log has the rest"
                with self._lock:
                    slot.state = "failed"
                    slot.failure = f"loading failed in phase {slot.phase}: {what}"
                    slot.phase = None
                continue
            finally:
                timer.cancel()
            self._loop.add_model(name, loaded.runner, self.limits.max_running)
            with self._lock:
                slot.loaded, slot.state, slot.phase, slot.failure = loaded, "ready", None, None
            self.metrics.model_ready.labels(name).set(1)
            log.info("%s: ready in %.1f s on %s, %s", name, sum(slot.phases.values()), loaded.device, loaded.dtype)
        self._has_settled.set()

    def _fail_slow_load(self, name: ModelName, slot: _Slot) -> None:
        with self._lock:
            if slot.state == "loading":
                slot.state = "failed"
                slot.failure = f"loading took longer than {self.limits.load_timeout_s:g} s, in phase {slot.phase}"
        log.error("%s: %s", name, slot.failure)

    @contextmanager
    def _phase(self, name: ModelName, slot: _Slot, phase: str) -> Iterator[None]:
        started = self.clock()
        with self._lock:
            slot.phase, slot.phase_started = phase, started
        yield
        seconds = self.clock() - started
        with self._lock:
            slot.phases[phase] = seconds
        self.metrics.load_phase.labels(name, phase).set(seconds)
        log.info("%s: %s took %.2f s", name, phase, seconds)

    # Called by _Request.

    def _opened(self, request: _Request) -> None:
        with self._lock:
            self._open.add(request)

    def _give_back(self, request: _Request) -> None:
        with self._lock:
            if not request.has_place:
                return
            request.has_place = False
            request.slot.num_places -= 1
            self._open.discard(request)


class _Request:
    """One admitted request: text on one side, the engine's sequence on the other. Holds a place until it ends."""

    def __init__(
        self,
        service: ModelService,
        request: TextRequest | ImageRequest,
        slot: _Slot,
        *,
        request_id: str,
        received_at: float,
    ) -> None:
        self.slot = slot
        self.has_place = True
        self.channel = Channel(self._cancel)
        self._service = service
        self._request = request
        self._request_id = request_id
        self._received_at = received_at
        self._deadline = received_at + service.limits.request_deadline_s
        self._text: list[str] = []
        self._stops = StopStrings(request.sampling.stop)
        self._sequence: Sequence | None = None

    def start(self, encoder: Encoder, is_abandoned: Callable[[], bool]) -> None:
        service, request = self._service, self._request

        def check() -> None:
            if is_abandoned():
                raise RequestCancelled
            if service.clock() >= self._deadline:
                raise self._expired()

        prompt = encoder.encode(request, check)
        check()
        self._detokenizer = Detokenizer(encoder.tokenizer.decode)
        self.channel.input_tokens = len(prompt.ids)
        self._sequence = Sequence(
            request_id=self._request_id,
            prompt_ids=prompt.ids,
            sampling=encoder.sampling_options(request.sampling),
            deadline=self._deadline,
            on_token=self._on_token,
            on_end=self._on_end,
            vision=prompt.vision,
        )
        service._opened(self)
        try:
            service._loop.add(request.model, self._sequence)
        except EngineDead:
            raise NotReady("the engine has ended; a new one is on its way", retry_after_s=_DEFAULT_RETRY_S) from None
        service.metrics.prompt_tokens.labels(request.model).inc(len(prompt.ids))

    def abandon(self, error: ServiceError) -> None:
        """End without waiting for the engine."""
        if self.channel.fail(error):
            self._cancel()
        self._service._give_back(self)

    def _cancel(self) -> None:
        if self._sequence is not None:
            self._service._loop.cancel(self._request.model, self._sequence)

    def _on_token(self, token_id: int) -> bool:
        self.channel.generated_tokens += 1
        shown, is_stopped = self._stops.add(self._detokenizer.add(token_id))
        self._put(shown)
        return is_stopped

    def _put(self, text: str) -> None:
        if text:
            self._text.append(text)
            self.channel.put(text)

    def _on_end(self, sequence: Sequence, reason: EndReason, error: Exception | None) -> None:
        service, model = self._service, self._request.model
        timing = self._timing(sequence)
        self.channel.timing = timing
        num_generated = len(sequence.output_ids)
        service.metrics.generation_tokens.labels(model).inc(num_generated)
        # The place is given back before the answer goes out: who reads the answer may rely on the room.
        service._give_back(self)
        if reason in ("stop", "length"):
            try:
                self._finish(reason, num_generated, timing)
            except Exception as failure:  # it must not end the loop for everybody
                log.error("[%s] the answer could not be completed: %r", self._request_id, failure, exc_info=failure)
                self.channel.fail(InternalError("the answer could not be completed"))
        elif reason == "expired":
            self.channel.fail(self._expired())
        elif reason == "cancelled":
            self.channel.fail(InternalError("the request was cancelled"))
        elif isinstance(error, ServiceError):
            if isinstance(error, NumericError):
                service.metrics.numeric_errors.labels(model).inc()
            self.channel.fail(error)
        else:
            log.error("[%s] the engine failed this request: %r", self._request_id, error, exc_info=error)
            self.channel.fail(InternalError("the engine failed this request"))

    def _finish(self, reason: Literal["stop", "length"], num_generated: int, timing: Timing) -> None:
        shown, is_stopped = self._stops.add(self._detokenizer.flush())
        self._put(shown + self._stops.flush())
        model = self._request.model
        metrics = self._service.metrics
        metrics.queue_time.labels(model).observe(timing.queue_s)
        metrics.total_time.labels(model).observe(timing.total_s)
        if timing.time_to_first_token_s is not None:
            metrics.time_to_first_token.labels(model).observe(timing.time_to_first_token_s)
        if num_generated > 1 and timing.decode_s > 0:
            metrics.time_per_output_token.labels(model).observe(timing.decode_s / (num_generated - 1))
        self.channel.finish(
            Completion(
                model=model,
                text="".join(self._text),
                input_tokens=self.channel.input_tokens,
                generated_tokens=num_generated,
                finish_reason="stop" if is_stopped else reason,
                is_demo=self.slot.snapshot.is_demo,
                timing=timing,
            )
        )

    def _timing(self, sequence: Sequence) -> Timing:
        ended = sequence.ended_at if sequence.ended_at is not None else self._service.clock()
        started = sequence.started_at if sequence.started_at is not None else ended
        first = sequence.first_token_at
        return Timing(
            queue_s=started - sequence.added_at,
            time_to_first_token_s=None if first is None else first - self._received_at,
            decode_s=0.0 if first is None else ended - first,
            generation_s=ended - started,
            total_s=ended - self._received_at,
        )

    def _expired(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"the answer was not complete within {self._service.limits.request_deadline_s:g} s")
