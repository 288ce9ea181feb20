"""From a parsed request to its complete answer, while watching whether the client is still there.

Shared by every generating door. Reading the body in and framing the answer are the doors' own work.
"""

from __future__ import annotations

import logging
import select
import socket

from flask import g, request

from accounting import Exchange
from models.errors import DeadlineExceeded, RequestCancelled
from models.schemas import Completion, ImageRequest, TextRequest
from models.service import ModelService
from models.streaming import Channel, Done

log = logging.getLogger("avito.http")

# The engine expires requests itself; only if it hangs does the waiting thread step in, so much later.
_BACKSTOP_S = 5.0
_LAST_STEP_S = 1.0


def complete(service: ModelService, parsed: TextRequest | ImageRequest) -> Completion:
    """Submit and wait for the whole answer.

    :raise ServiceError: as `ModelService.submit`, or what the request ended with.
    :raise RequestCancelled: the client left; the work was given up and its place is given back.
    """
    exchange: Exchange = g.exchange
    exchange.facts = _facts(parsed)
    log.info("Input validated: model %s, max_tokens %d", parsed.model, parsed.sampling.max_tokens)
    client = _Client()
    try:
        channel = service.submit(
            parsed, request_id=exchange.request_id, received_at=exchange.started, is_abandoned=client.is_gone
        )
        exchange.input_tokens = channel.input_tokens
        log.info("Tokenized: %d tokens", channel.input_tokens)
        try:
            completion = _wait(service, channel, exchange, client)
        finally:
            channel.cancel()
            exchange.generated_tokens, exchange.timing = channel.generated_tokens, channel.timing
    except RequestCancelled:
        exchange.is_cancelled = True
        raise
    exchange.completion = completion
    log.info("Generated: %d tokens in %.3fs", completion.generated_tokens, completion.timing.generation_s)
    return completion


def _facts(parsed: TextRequest | ImageRequest) -> dict[str, object]:
    """What the audit line may tell of the input: lengths and hashes."""
    facts: dict[str, object] = {"prompt_chars": sum(len(message.content) for message in parsed.messages)}
    if isinstance(parsed, ImageRequest):
        headers = [image.header for image in parsed.images]
        facts["images"] = ",".join(f"{h.format}:{h.width}x{h.height}:{h.num_bytes}:{h.sha256[:12]}" for h in headers)
    return facts


def _wait(service: ModelService, channel: Channel, exchange: Exchange, client: _Client) -> Completion:
    deadline = exchange.started + service.limits.request_deadline_s + _BACKSTOP_S
    while True:
        end = channel.wait_end(service.limits.client_check_interval_s)
        if isinstance(end, Done):
            return end.completion
        if end is not None:
            raise end.error
        if client.is_gone():
            channel.cancel()
            # The step under way is let end: the audit line has its times then, and the place is back when it counts.
            channel.wait_end(_LAST_STEP_S)
            raise RequestCancelled
        if service.clock() >= deadline:
            raise DeadlineExceeded(f"the answer was not complete within {service.limits.request_deadline_s:g} s")


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
