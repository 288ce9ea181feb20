"""From a parsed request to its answer, whole or as it is made, while watching whether the client is still there.

Shared by every generating door. Reading the body in and framing the answer are the doors' own work.
"""

from __future__ import annotations

import logging
import select
import socket
from collections.abc import Iterator

from flask import g, request

from accounting import Exchange
from keys import check_model
from models.errors import DeadlineExceeded, InternalError, RequestCancelled
from models.schemas import Completion, ImageRequest, TextRequest
from models.service import ModelService
from models.streaming import Channel, Delta, Done, Failed

log = logging.getLogger("avito.http")

# The engine expires requests itself; only if it hangs does the waiting thread step in, so much later.
_BACKSTOP_S = 5.0
_LAST_STEP_S = 1.0


def complete(service: ModelService, parsed: TextRequest | ImageRequest) -> Completion:
    """Submit and wait for the whole answer.

    :raise ServiceError: as `ModelService.submit`, or what the request ended with.
    :raise RequestCancelled: the client left; the work was given up and its place is given back.
    """
    generation = _Generation(service, parsed)
    try:
        return generation.wait()
    finally:
        generation.close()


def stream(service: ModelService, parsed: TextRequest | ImageRequest) -> EventStream:
    """Submit; the answer is read from what comes back, and outlives the request's hooks.

    :raise ServiceError: as `ModelService.submit`: refusals come before the stream.
    :raise RequestCancelled: the client left before the stream began.
    """
    return EventStream(service, _Generation(service, parsed))


class _Generation:
    """The current HTTP request's way through the service, and what its exchange must know of it.

    :raise WebError: its key is not for this model; see `keys.check_model`.
    :raise ServiceError, RequestCancelled: as `ModelService.submit`.
    """

    def __init__(self, service: ModelService, parsed: TextRequest | ImageRequest) -> None:
        self.model = parsed.model
        self._service = service
        self._exchange: Exchange = g.exchange
        self._exchange.facts = _facts(parsed)
        check_model(parsed.model)
        self._client = _Client()
        self._deadline = self._exchange.started + service.limits.request_deadline_s + _BACKSTOP_S
        log.info("Input validated: model %s, max_tokens %d", parsed.model, parsed.sampling.max_tokens)
        try:
            self.channel: Channel = service.submit(
                parsed,
                request_id=self._exchange.request_id,
                received_at=self._exchange.started,
                is_abandoned=self._client.is_gone,
            )
        except RequestCancelled:
            self._exchange.is_cancelled = True
            raise
        self._exchange.input_tokens = self.channel.input_tokens
        log.info("Tokenized: %d tokens", self.channel.input_tokens)

    def wait(self) -> Completion:
        """The whole answer.

        :raise ServiceError: what the request ended with.
        :raise RequestCancelled: the client left.
        """
        while (end := self.channel.wait_end(self._service.limits.client_check_interval_s)) is None:
            self.check()
        if isinstance(end, Failed):
            raise end.error
        return self.note(end)

    def check(self) -> None:
        """:raise RequestCancelled: the client left.
        :raise DeadlineExceeded: the engine should have said so and did not.
        """
        if self._client.is_gone():
            self.give_up()
            raise RequestCancelled
        if self._service.clock() >= self._deadline:
            limit = self._service.limits.request_deadline_s
            raise DeadlineExceeded(f"the answer was not complete within {limit:g} s")

    def give_up(self) -> None:
        """The client left."""
        self._exchange.is_cancelled = True
        self.channel.cancel()
        # The step under way is let end: the audit line has its times then, and the place is back when it counts.
        self.channel.wait_end(_LAST_STEP_S)

    def note(self, end: Done) -> Completion:
        self._exchange.completion = completion = end.completion
        log.info("Generated: %d tokens in %.3fs", completion.generated_tokens, completion.timing.generation_s)
        return completion

    def note_failure(self, end: Failed) -> None:
        """For an error that is told in a stream; others are noted where they are shown."""
        self._exchange.error_code = end.error.code
        log.warning("the stream ended with %s: %s", end.error.code, end.error)

    def close(self) -> None:
        """The work ends, if it has not, and the exchange has its sums."""
        self.channel.cancel()
        self._exchange.generated_tokens, self._exchange.timing = self.channel.generated_tokens, self.channel.timing


class EventStream:
    """The events of one answer, for one reader: deltas, then exactly one end; None where there was nothing to say.

    `close` must be called in any case, also if nothing was ever read: it ends the work and does the accounting.
    """

    def __init__(self, service: ModelService, generation: _Generation) -> None:
        self.is_demo = service.snapshot().models[generation.model].is_demo
        self._limits = service.limits
        self._clock = service.clock
        self._generation = generation
        self._is_over = False

    def __iter__(self) -> Iterator[Delta | Done | Failed | None]:
        """Ends without an end if the client has left."""
        try:
            yield from self._read()
        except RequestCancelled:
            self._is_over = True
        except DeadlineExceeded as error:
            yield self._end(Failed(error))
        except Exception as failure:  # the headers are out: only the stream itself can still tell
            log.exception("the stream could not be read: %r", failure)
            yield self._end(Failed(InternalError("the answer could not be completed")))

    def _read(self) -> Iterator[Delta | Done | Failed | None]:
        # At once, so that the headers go out: the client learns that it is admitted.
        yield None
        spoke_at = checked_at = self._clock()
        while True:
            event = self._generation.channel.get(self._limits.client_check_interval_s)
            now = self._clock()
            if isinstance(event, (Done, Failed)):
                yield self._end(event)
                return
            # Writing shows sooner or later that the client has left; looking shows it now.
            if event is None or now - checked_at >= self._limits.client_check_interval_s:
                self._generation.check()
                checked_at = now
            if event is not None or now - spoke_at >= self._limits.keep_alive_interval_s:
                yield event
                spoke_at = now

    def _end(self, event: Done | Failed) -> Done | Failed:
        self._is_over = True
        if isinstance(event, Done):
            self._generation.note(event)
        else:
            self._generation.note_failure(event)
        return event

    def close(self) -> None:
        if not self._is_over:
            self._generation.give_up()
        self._generation.close()


def _facts(parsed: TextRequest | ImageRequest) -> dict[str, object]:
    """What the audit line may tell of the input: lengths and hashes."""
    facts: dict[str, object] = {"prompt_chars": sum(len(message.content) for message in parsed.messages)}
    if isinstance(parsed, ImageRequest):
        headers = [image.header for image in parsed.images]
        facts["images"] = ",".join(f"{h.format}:{h.width}x{h.height}:{h.num_bytes}:{h.sha256[:12]}" for h in headers)
    return facts


class _Client:
    """The other side of the current request, as far as it can be seen."""

    def __init__(self) -> None:
        can_see = g.get("can_see_client", True)
        self._connection: socket.socket | None = request.environ.get("gunicorn.socket") if can_see else None

    def is_gone(self) -> bool:
        return self._connection is not None and is_gone(self._connection)


def is_gone(connection: socket.socket) -> bool:
    """Whether the client closed its side. One that only half-closed counts as gone too (documented).

    Judged by the hang-up and not by reading: bytes that wait, such as a pipelined request, are left where they are,
    and neither count as gone nor hide that the client has left behind them.
    """
    try:
        # poll and not select: descriptors above 1023 are usual with many clients.
        poller = select.poll()
        poller.register(connection, select.POLLRDHUP)
        return bool(poller.poll(0))
    except (OSError, ValueError):
        return True
