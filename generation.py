"""From a parsed request to its answer, whole or as it is made, while watching whether the client is still there.

Shared by every generating door. Reading the body in and framing the answer are the doors' own work.
"""

from __future__ import annotations

import logging
import select
import socket
from collections.abc import Iterator, Sequence
from dataclasses import replace

from flask import g, request

from accounting import Exchange
from keys import check_model
from models.errors import DeadlineExceeded, InternalError, RequestCancelled
from models.schemas import Completion, ImageRequest, RawRequest, Request
from models.service import ModelService
from models.streaming import Channel, Delta, Done, Event, Failed

log = logging.getLogger("avito.http")

# The engine expires requests itself; only if it hangs does the waiting thread step in, so much later.
_BACKSTOP_S = 5.0
_LAST_STEP_S = 1.0


def complete(service: ModelService, parsed: Request) -> Completion:
    """Submit and wait for the whole answer.

    :raise ServiceError: as `ModelService.submit`, or what the request ended with.
    :raise RequestCancelled: the client left; the work was given up and its place is given back.
    """
    return complete_all(service, [parsed])[0]


def complete_all(service: ModelService, prompts: Sequence[Request], num_choices: int = 1) -> list[Completion]:
    """The same for several prompts with several answers to each: those to the first prompt come first.

    All are admitted or none; the first that fails ends the others.
    """
    generation = _Generation(service, prompts, num_choices)
    try:
        return generation.wait()
    finally:
        generation.close()


def stream(service: ModelService, prompts: Sequence[Request], num_choices: int = 1) -> EventStream:
    """Submit; the answers are read from what comes back, and outlive the request's hooks.

    :raise ServiceError: as `ModelService.submit`: refusals come before the stream.
    :raise RequestCancelled: the client left before the stream began.
    """
    return EventStream(service, _Generation(service, prompts, num_choices))


class _Generation:
    """The current HTTP request's way through the service, and what its exchange must know of it. Each answer has a
    place and a channel of its own.

    :raise WebError: its key is not for this model; see `keys.check_model`.
    :raise ServiceError, RequestCancelled: as `ModelService.submit`.
    """

    def __init__(self, service: ModelService, prompts: Sequence[Request], num_choices: int) -> None:
        self.model = prompts[0].model
        self.num_choices = num_choices
        self._service = service
        self._exchange: Exchange = g.exchange
        self._exchange.model = self.model
        self._exchange.facts = _facts(prompts)
        check_model(self.model)
        self._client = _Client()
        self._deadline = self._exchange.started + service.limits.request_deadline_s + _BACKSTOP_S
        log.info("Input validated: model %s, max_tokens %s", self.model, prompts[0].sampling.max_tokens)
        self.channels: list[Channel] = []
        try:
            for prompt in prompts:
                for choice in range(num_choices):
                    self.channels.append(self._submit(_choice_of(prompt, choice)))
        except BaseException:
            self.close()  # what those that were admitted have cost counts
            raise
        self._exchange.input_tokens = self.input_tokens
        log.info("Tokenized: %d tokens", self._exchange.input_tokens)

    def _submit(self, request: Request) -> Channel:
        try:
            return self._service.submit(
                request,
                request_id=self._exchange.request_id,
                received_at=self._exchange.started,
                is_abandoned=self._client.is_gone,
            )
        except RequestCancelled:
            self._exchange.is_cancelled = True
            raise

    @property
    def input_tokens(self) -> int:
        """Of each prompt once, however many answers it has."""
        return sum(channel.input_tokens for channel in self.channels[:: self.num_choices])

    def wait(self) -> list[Completion]:
        """The whole answers.

        :raise ServiceError: what a request ended with.
        :raise RequestCancelled: the client left.
        """
        return [self._wait_for(channel) for channel in self.channels]

    def _wait_for(self, channel: Channel) -> Completion:
        while (end := channel.wait_end(self._service.limits.client_check_interval_s)) is None:
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
        self.cancel()
        # The step under way is let end: the audit line has its times then, and the place is back when it counts.
        until = self._service.clock() + _LAST_STEP_S
        for channel in self.channels:
            channel.wait_end(max(0.0, until - self._service.clock()))

    def cancel(self) -> None:
        for channel in self.channels:
            channel.cancel()

    def note(self, end: Done) -> Completion:
        self._exchange.completion = completion = end.completion
        log.info("Generated: %d tokens in %.3fs", completion.generated_tokens, completion.timing.generation_s)
        return completion

    def note_failure(self, end: Failed) -> None:
        """For an error that is told in a stream; others are noted where they are shown."""
        self._exchange.error_code = end.error.code
        self._exchange.completion = None  # of another answer to the same request
        log.warning("the stream ended with %s: %s", end.error.code, end.error)

    def close(self) -> None:
        """The work ends, if it has not, and the exchange has its sums."""
        self.cancel()
        timings = [channel.timing for channel in self.channels if channel.timing is not None]
        self._exchange.generated_tokens = sum(channel.generated_tokens for channel in self.channels)
        self._exchange.timing = max(timings, key=lambda timing: timing.total_s, default=None)


def _choice_of(prompt: Request, choice: int) -> Request:
    """The request of one of several answers to a prompt: seeds follow each other, so that answers differ."""
    seed = prompt.sampling.seed
    if choice == 0 or seed is None:
        return prompt
    return replace(prompt, sampling=replace(prompt.sampling, seed=(seed + choice) % 2**63))


class EventStream:
    """The events of the answers, for one reader: (index of the answer, event), None where there was nothing to say. Of
    each answer deltas, then exactly one end; the first that fails ends the stream.

    `close` must be called in any case, also if nothing was ever read: it ends the work and does the accounting.
    """

    def __init__(self, service: ModelService, generation: _Generation) -> None:
        self.is_demo = service.snapshot().models[generation.model].is_demo
        self._limits = service.limits
        self._clock = service.clock
        self._generation = generation
        self._is_over = False

    @property
    def input_tokens(self) -> int:
        return self._generation.input_tokens

    def __iter__(self) -> Iterator[tuple[int, Event] | None]:
        """Ends without an end if the client has left."""
        try:
            yield from self._read()
        except RequestCancelled:
            self._is_over = True
        except DeadlineExceeded as error:
            yield self._end_with(Failed(error))
        except Exception as failure:  # the headers are out: only the stream itself can still tell
            yield self.fail(failure)

    def _read(self) -> Iterator[tuple[int, Event] | None]:
        # At once, so that the headers go out: the client learns that it is admitted.
        yield None
        spoke_at = checked_at = self._clock()
        unfinished = dict(enumerate(self._generation.channels))
        while unfinished:
            found = self._next_event(unfinished)
            now = self._clock()
            # Writing shows sooner or later that the client has left; looking shows it now.
            if found is None or now - checked_at >= self._limits.client_check_interval_s:
                if found is None or isinstance(found[1], Delta):
                    self._generation.check()
                checked_at = now
            if found is not None and isinstance(found[1], Failed):
                yield self._end_with(found[1], found[0])
                return
            if found is not None and isinstance(found[1], Done):
                del unfinished[found[0]]
                self._generation.note(found[1])
                self._is_over = not unfinished
            if found is not None or now - spoke_at >= self._limits.keep_alive_interval_s:
                yield found
                spoke_at = now

    def _next_event(self, unfinished: dict[int, Channel]) -> tuple[int, Event] | None:
        if len(unfinished) > 1:
            for index, channel in unfinished.items():
                event = channel.get(0)
                if event is not None:
                    # To the end of the line, so that none of them has to wait for the others' pauses.
                    unfinished[index] = unfinished.pop(index)
                    return index, event
        index, channel = next(iter(unfinished.items()))
        # Who waits for one of several does not see the others: no longer than deltas lie apart anyway.
        several = len(unfinished) > 1
        event = channel.get(self._limits.delta_interval_s if several else self._limits.client_check_interval_s)
        return None if event is None else (index, event)

    def fail(self, failure: Exception) -> tuple[int, Failed]:
        """The answers cannot be told to their end, by a fault of ours; the event that says so."""
        log.error("the stream could not be told: %r", failure, exc_info=failure)
        return self._end_with(Failed(InternalError("the answer could not be completed")))

    def _end_with(self, end: Failed, index: int = 0) -> tuple[int, Failed]:
        self._is_over = True
        self._generation.note_failure(end)
        return index, end

    def close(self) -> None:
        if not self._is_over:
            self._generation.give_up()
        self._generation.close()


def _facts(prompts: Sequence[Request]) -> dict[str, object]:
    """What the audit line may tell of the input: lengths and hashes."""
    facts: dict[str, object] = {"prompt_chars": sum(_num_chars(prompt) for prompt in prompts)}
    headers = [image.header for prompt in prompts if isinstance(prompt, ImageRequest) for image in prompt.images]
    if headers:
        facts["images"] = ",".join(f"{h.format}:{h.width}x{h.height}:{h.num_bytes}:{h.sha256[:12]}" for h in headers)
    return facts


def _num_chars(prompt: Request) -> int:
    if isinstance(prompt, RawRequest):
        return len(prompt.prompt) if isinstance(prompt.prompt, str) else 0
    return sum(message.num_chars for message in prompt.messages)


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
