"""ModelService: all that the web side sees of the models. `start`, `submit`, `snapshot`, `stop`.

It loads the configured models in a background thread, keeps the bounded number of places per model, and tells how all
of it stands. What happens to one admitted request is in `models/request.py`. It knows no HTTP. How a model is loaded
is passed in, so that tests run all of this with a fake runner.
"""

from __future__ import annotations

import importlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol

from prometheus_client import CollectorRegistry

from config import EngineOptions, Limits
from models.engine.loop import EngineLoop, Runner
from models.engine.memory import Ledger, ModelNeeds, ModelShare, plan_memory
from models.engine.scheduler import SchedulerLimits
from models.errors import EngineDead, InternalError, LoadError, ModelNotConfigured, NotReady, QueueFull
from models.metrics import CacheCollector, ModelMetrics
from models.request import Encoder, OpenRequest, Surroundings
from models.schemas import MODEL_NAMES, ImageRequest, ModelName, Request
from models.snapshots import Snapshot
from models.streaming import Channel

log = logging.getLogger("avito.service")

ModelState = Literal["not_configured", "loading", "ready", "failed"]
# What a refused client is told before anything was measured.
_DEFAULT_RETRY_S = 5


class Loaded(Protocol):
    """What the service needs of `loader.LoadedModel`: weights on their device, not yet running."""

    @property
    def device(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def gpu_uuid(self) -> str | None: ...
    @property
    def max_running(self) -> int: ...
    def budget_bytes(self, all_weights_bytes: int) -> int:
        """What all models together may take of the device, weights included."""

    @property
    def needs(self) -> ModelNeeds: ...
    def make_encoder(self, capacity_tokens: int) -> Encoder: ...
    def make_runner(self, share: ModelShare, phase: Phase) -> Runner: ...


Phase = Callable[[str], AbstractContextManager[None]]


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


@dataclass(frozen=True)
class _Serving:
    """A model that serves."""

    encoder: Encoder
    runner: Runner
    max_running: int


@dataclass
class _Slot:
    """One configured model: how far it is, and its places. Guarded by the service's lock."""

    snapshot: Snapshot
    state: ModelState = "loading"
    loaded: Loaded | None = None
    serving: _Serving | None = None
    phases: dict[str, float] = field(default_factory=dict)
    phase: str | None = None
    phase_started: float = 0.0
    failure: str | None = None
    num_places: int = 0
    picture_bytes: int = 0


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
        engine: EngineOptions | None = None,
        *,
        load: Load | None = None,
        clock: Callable[[], float] = time.monotonic,
        registry: CollectorRegistry | None = None,
    ) -> None:
        self.limits = limits
        self.metrics = ModelMetrics(registry or CollectorRegistry())
        self._load = load
        self._engine = engine or EngineOptions()
        self._ledger: Ledger | None = None
        self.clock = clock
        self._lock = threading.Lock()
        self._slots = {name: _Slot(snapshot) for name, snapshot in snapshots.items()}
        self._open: set[OpenRequest] = set()
        self._is_draining = False
        self._loop = EngineLoop(clock)
        self._surroundings = Surroundings(
            self._loop, self.metrics, clock, limits.request_deadline_s, limits.delta_interval_s, self._give_back
        )
        self._loading = threading.Thread(target=self._load_all, name="loading", daemon=True)
        self._has_settled = threading.Event()
        for name in MODEL_NAMES:
            self.metrics.model_ready.labels(name).set(0)
            self.metrics.running.labels(name).set_function(lambda n=name: self._count(n)[0])  # type: ignore[misc]
            self.metrics.waiting.labels(name).set_function(lambda n=name: self._count(n)[1])  # type: ignore[misc]

        self.metrics.registry.register(CacheCollector(lambda: self._loop.snapshot().caches))

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

    @property
    def configured_models(self) -> tuple[ModelName, ...]:
        return tuple(self._slots)

    def tokenize(self, request: Request) -> list[int]:
        """Token ids of a prompt, as the engine would get them.

        :raise ModelNotConfigured, NotReady: see `submit`.
        :raise ServiceError: the prompt cannot be encoded.
        """
        encoder = self._encoder(request.model)
        if isinstance(request, ImageRequest):
            return list(encoder.encode(request, lambda: None).ids)
        return encoder.encode_text(request)

    def detokenize(self, model: ModelName, ids: Sequence[int]) -> str:
        """The text of token ids, special ones too.

        :raise ModelNotConfigured, NotReady: see `submit`.
        :raise InvalidRequest: the model has no such id.
        """
        encoder = self._encoder(model)
        for index, token_id in enumerate(ids):
            encoder.check_id(token_id, "tokens", f"tokens[{index}]")
        return encoder.tokenizer.decode(ids, skip_special_tokens=False)

    def token_texts(self, model: ModelName, ids: Sequence[int]) -> list[str]:
        """Each token by itself; a part of a character shows as U+FFFD."""
        token_bytes = self._encoder(model).tokenizer.token_bytes
        return [token_bytes(token_id).decode(errors="replace") for token_id in ids]

    def context_tokens(self, model: ModelName) -> int:
        """Most tokens of prompt and answer together."""
        return self._encoder(model).context_tokens

    def _encoder(self, model: ModelName) -> Encoder:
        self.check_configured(model)
        with self._lock:
            slot = self._slots[model]
            if slot.serving is None:
                raise NotReady(f"model {model}: {self._describe(model, slot)}", retry_after_s=_DEFAULT_RETRY_S)
            return slot.serving.encoder

    def submit(
        self,
        request: Request,
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
            slot, picture_bytes = self._admit(request)
            assert slot.serving is not None
            opened = OpenRequest(
                request,
                self._surroundings,
                slot.serving.encoder,
                request_id=request_id,
                received_at=received_at,
                is_demo=slot.snapshot.is_demo,
                picture_bytes=picture_bytes,
            )
            slot.num_places += 1
            slot.picture_bytes += picture_bytes
            self._open.add(opened)
        try:
            opened.start(is_abandoned)
        except EngineDead:
            self._give_back(opened)
            raise NotReady("the engine has ended; a new one is on its way", retry_after_s=_DEFAULT_RETRY_S) from None
        except BaseException:
            self._give_back(opened)
            raise
        return opened.channel

    def _admit(self, request: Request) -> tuple[_Slot, int]:
        """The model's slot, and the host memory that the request's pictures will take; reserves nothing."""
        model = request.model
        self.check_configured(model)
        slot = self._slots[model]
        if slot.state != "ready" or slot.serving is None:
            raise NotReady(f"model {model}: {self._describe(model, slot)}", retry_after_s=_DEFAULT_RETRY_S)
        loop = self._loop.snapshot()
        if loop.is_dead or loop.stalled_s > self.limits.stall_limit_s:
            raise NotReady("the engine has ended; a new one is on its way", retry_after_s=_DEFAULT_RETRY_S)
        num_places = self.limits.max_waiting + slot.serving.max_running
        if slot.num_places >= num_places:
            raise QueueFull(
                f"model {model}: at most {num_places} requests at a time, got one more",
                retry_after_s=self._retry_after(model),
            )
        if not isinstance(request, ImageRequest):
            return slot, 0
        picture_bytes = request.host_bytes(self.limits.max_visual_px)
        # A request by itself is always let in: it was within the limits of a request.
        if slot.picture_bytes and slot.picture_bytes + picture_bytes > self.limits.max_picture_bytes:
            raise QueueFull(
                f"model {model}: pictures of all requests may take at most {self.limits.max_picture_bytes} bytes, "
                f"{slot.picture_bytes} are taken and this one needs {picture_bytes}",
                retry_after_s=self._retry_after(model),
            )
        return slot, picture_bytes

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
        readings = [slot.serving.runner.memory_bytes for slot in self._slots.values() if slot.serving]
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
        """Weights of all models first: only then is it known what is left for their caches."""
        load = self._load
        for name, slot in self._slots.items():
            with self._failing(name, slot):
                if load is None:
                    with self._phase(name, slot, "libraries"):
                        load = importlib.import_module("models.loader").load_model
                loaded = load(
                    slot.snapshot,
                    engine=self._engine,
                    limits=self.limits,
                    phase=lambda phase, n=name, s=slot: self._phase(n, s, phase),
                )
                with self._lock:
                    slot.loaded, slot.phase = loaded, None
        loaded_slots = {name: slot for name, slot in self._slots.items() if slot.loaded and slot.state == "loading"}
        for name, slot in loaded_slots.items():
            with self._failing(name, slot):
                self._start_model(name, slot, self._plan(loaded_slots).shares[name])
        self._has_settled.set()

    def _plan(self, slots: Mapping[ModelName, _Slot]) -> Ledger:
        """:raise LoadError: the models do not fit."""
        if self._ledger is None:
            loaded = {name: slot.loaded for name, slot in slots.items() if slot.loaded is not None}
            needs: dict[str, ModelNeeds] = {name: model.needs for name, model in loaded.items()}
            weights_bytes = sum(need.weights_bytes for need in needs.values())
            budget = min(model.budget_bytes(weights_bytes) for model in loaded.values())
            share = self._engine.avibe_cache_share
            ledger = plan_memory(budget, needs, {"avibe": share, "avision": 1 - share})
            for line in ledger.lines():
                log.info("%s", line)
            self.metrics.show_ledger(ledger)
            self._ledger = ledger
        return self._ledger

    def _start_model(self, name: ModelName, slot: _Slot, share: ModelShare) -> None:
        loaded, limits = slot.loaded, self.limits
        assert loaded is not None
        runner = loaded.make_runner(share, lambda phase: self._phase(name, slot, phase))
        serving = _Serving(loaded.make_encoder(share.capacity_tokens), runner, loaded.max_running)
        self._loop.add_model(
            name,
            runner,
            SchedulerLimits(
                max_running=loaded.max_running,
                max_step_tokens=limits.max_step_tokens,
                max_step_patches=limits.max_step_patches,
                max_prefill_delay_s=limits.max_prefill_delay_s,
            ),
        )
        with self._lock:
            slot.serving, slot.state, slot.phase, slot.failure = serving, "ready", None, None
        self.metrics.model_ready.labels(name).set(1)
        log.info("%s: ready in %.1f s on %s, %s", name, sum(slot.phases.values()), loaded.device, loaded.dtype)

    @contextmanager
    def _failing(self, name: ModelName, slot: _Slot) -> Iterator[None]:
        """What goes wrong in here fails this model: the other one still gets its chance."""
        left_s = self.limits.load_timeout_s - sum(slot.phases.values())
        timer = threading.Timer(max(0.0, left_s), self._fail_slow_load, (name, slot))
        timer.daemon = True
        timer.start()
        try:
            yield
        except Exception as error:  # the libraries raise anything
            log.exception("%s: loading failed", name)
            what = str(error) if isinstance(error, LoadError) else f"{type(error).__name__}; the log has the rest"
            with self._lock:
                slot.state = "failed"
                where = f" in phase {slot.phase}" if slot.phase else ""
                slot.failure = f"loading failed{where}: {what}"
                slot.phase = None
        finally:
            timer.cancel()

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

    def _give_back(self, request: OpenRequest) -> None:
        """Called by `OpenRequest` when it has ended, perhaps more than once."""
        with self._lock:
            if request in self._open:
                self._open.remove(request)
                slot = self._slots[request.model]
                slot.num_places -= 1
                slot.picture_bytes -= request.picture_bytes
