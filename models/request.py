"""One admitted request, from its text to the engine's ids and back: `OpenRequest`.

Made by `ModelService.submit`, which has reserved its place. Sees to it that the channel ends exactly once, with what
the engine did, and that the place is given back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as Sequences
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

from models.engine.loop import EngineLoop
from models.engine.sequence import EndReason, PictureSpan, SamplingOptions, Sequence, TokenConstraint, TokenLogprobs
from models.errors import DeadlineExceeded, InternalError, NumericError, RequestCancelled, ServiceError
from models.metrics import ModelMetrics
from models.schemas import Completion, Request, SamplingParams, Timing, TokenLogprob
from models.streaming import Channel, LazyText, WatchedText

log = logging.getLogger("avito.service")


class Encoder(Protocol):
    """What the service needs of `prompts.PromptEncoder`."""

    def encode(self, request: Request, check: Callable[[], None]) -> Encoded: ...
    def encode_text(self, request: Request) -> list[int]: ...
    def check_id(self, token_id: int, field: str, place: str) -> None: ...
    def sampling_options(self, params: SamplingParams, num_prompt: int) -> SamplingOptions: ...
    def constraint(self, params: SamplingParams, check: Callable[[], None]) -> TokenConstraint | None: ...
    @property
    def context_tokens(self) -> int: ...
    @property
    def tokenizer(self) -> Decoder: ...


class Encoded(Protocol):
    @property
    def ids(self) -> tuple[int, ...]: ...
    @property
    def vision(self) -> object | None: ...
    @property
    def pictures(self) -> tuple[PictureSpan, ...]: ...
    @property
    def prefix_ids(self) -> tuple[int, ...] | None: ...


class Decoder(Protocol):
    """Called by requests' threads and the engine's at the same time."""

    def decode(self, ids: Sequences[int], skip_special_tokens: bool = True) -> str: ...
    def token_bytes(self, token_id: int) -> bytes: ...


@dataclass(frozen=True)
class Surroundings:
    """What every open request of a service shares. `give_back` may be called more than once for a request."""

    loop: EngineLoop
    metrics: ModelMetrics
    clock: Callable[[], float]
    deadline_s: float
    delta_interval_s: float
    give_back: Callable[[OpenRequest], None]


class OpenRequest:
    """One admitted request: text on one side, the engine's sequence on the other. Holds a place until it ends.

    `start` and `abandon` may be called from any thread, once each; the callbacks run in the loop's. What needs no text
    does not wait for it: the place is given back and the end is told, though nobody may ever read the answer.

    :param encoder: the model's.
    :param received_at: monotonic time of the first byte, from which the deadline counts.
    :param picture_bytes: what the service reserved for its pictures.
    """

    def __init__(
        self,
        request: Request,
        surroundings: Surroundings,
        encoder: Encoder,
        *,
        request_id: str,
        received_at: float,
        is_demo: bool,
        picture_bytes: int,
    ) -> None:
        self.model = request.model
        self.picture_bytes = picture_bytes
        sampling, stops = request.sampling, request.sampling.stop
        decode = partial(encoder.tokenizer.decode, skip_special_tokens=sampling.skip_special_tokens)
        self.channel = Channel(
            self._cancel,
            WatchedText(decode, stops) if stops else LazyText(decode),
            delta_interval_s=surroundings.delta_interval_s,
            clock=surroundings.clock,
            read_logprobs=None if sampling.num_logprobs is None else self._read_logprobs,
        )
        self._request = request
        self._around = surroundings
        self._encoder = encoder
        self._request_id = request_id
        self._received_at = received_at
        self._is_demo = is_demo
        self._deadline = received_at + surroundings.deadline_s
        self._sequence: Sequence | None = None
        self._abandoned: ServiceError | None = None

    def start(self, is_abandoned: Callable[[], bool]) -> None:
        """Encode and hand over to the engine, after which the channel is certain to end.

        :param is_abandoned: whether nobody waits any more.
        :raise ServiceError: from the encoder, or because the time was up.
        :raise RequestCancelled: nobody waits any more.
        :raise EngineDead: the loop has ended.
        """
        request, around, encoder = self._request, self._around, self._encoder

        def check() -> None:
            if is_abandoned():
                raise RequestCancelled
            if self._abandoned is not None:
                raise self._abandoned
            if around.clock() >= self._deadline:
                raise self._expired()

        prompt = encoder.encode(request, check)
        check()
        self.channel.input_tokens = len(prompt.ids)
        self._sequence = Sequence(
            request_id=self._request_id,
            prompt_ids=prompt.ids,
            sampling=encoder.sampling_options(request.sampling, len(prompt.ids)),
            deadline=self._deadline,
            on_token=self.channel.put,
            on_end=self._on_end,
            vision=prompt.vision,
            pictures=prompt.pictures,
            prefix_ids=prompt.prefix_ids,
            constraint=encoder.constraint(request.sampling, check),
        )
        around.loop.add(self.model, self._sequence)
        around.metrics.prompt_tokens.labels(self.model).inc(len(prompt.ids))

    def abandon(self, error: ServiceError) -> None:
        """End without waiting for the engine, whatever state it is in."""
        self._abandoned = error
        if self.channel.fail(error):
            self._cancel()
        self._around.give_back(self)

    def _cancel(self) -> None:
        if self._sequence is not None:
            self._around.loop.cancel(self.model, self._sequence)

    def _read_logprobs(self, num_known: int) -> tuple[TokenLogprob, ...]:
        """In the reader's thread: the engine's only appends."""
        sequence = self._sequence
        if sequence is None:
            return ()
        found = sequence.logprobs[num_known:]
        ids = sequence.output_ids[num_known : num_known + len(found)]
        return tuple(self._describe(*each) for each in zip(ids, found, strict=True))

    def _describe(self, token_id: int, found: TokenLogprobs) -> TokenLogprob:
        token_bytes = self._encoder.tokenizer.token_bytes
        top = tuple((token_bytes(each), logprob) for each, logprob in found.top)
        return TokenLogprob(token_bytes(token_id), found.chosen, top)

    def _on_end(self, sequence: Sequence, reason: EndReason, error: Exception | None) -> None:
        metrics = self._around.metrics
        timing = self._timing(sequence)
        self.channel.timing = timing
        num_generated = len(sequence.output_ids)
        self.channel.cached_tokens = sequence.num_cached
        metrics.generation_tokens.labels(self.model).inc(num_generated)
        # The place is given back before the answer goes out: who reads the answer may rely on the room.
        self._around.give_back(self)
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
                metrics.numeric_errors.labels(self.model).inc()
            self.channel.fail(error)
        else:
            log.error("[%s] the engine failed this request: %r", self._request_id, error, exc_info=error)
            self.channel.fail(InternalError("the engine failed this request"))

    def _finish(self, reason: Literal["stop", "length"], num_generated: int, timing: Timing) -> None:
        is_stopped = self.channel.end_text()
        model, metrics = self.model, self._around.metrics
        metrics.queue_time.labels(model).observe(timing.queue_s)
        metrics.total_time.labels(model).observe(timing.total_s)
        if timing.time_to_first_token_s is not None:
            metrics.time_to_first_token.labels(model).observe(timing.time_to_first_token_s)
        if num_generated > 1 and timing.decode_s > 0:
            metrics.time_per_output_token.labels(model).observe(timing.decode_s / (num_generated - 1))
        self.channel.finish(
            Completion(
                model=model,
                text="",  # the reader's part
                input_tokens=self.channel.input_tokens,
                generated_tokens=num_generated,
                finish_reason="stop" if is_stopped else reason,
                is_demo=self._is_demo,
                timing=timing,
                cached_tokens=self.channel.cached_tokens,
            )
        )

    def _timing(self, sequence: Sequence) -> Timing:
        ended = sequence.ended_at if sequence.ended_at is not None else self._around.clock()
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
        return DeadlineExceeded(f"the answer was not complete within {self._around.deadline_s:g} s")
