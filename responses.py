"""The shapes of answers: the success envelope, the error body of each door, and the one table from code to status."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from flask import Response, jsonify, request
from werkzeug.exceptions import ClientDisconnected, HTTPException, RequestEntityTooLarge

import pages
from models.errors import ServiceError
from models.schemas import Completion
from models.streaming import Delta, Done, Event

STATUS_BY_CODE: Mapping[str, int] = {
    "invalid_request": 400,
    "prompt_too_long": 400,
    "tools_unsupported": 400,
    "unknown_field": 400,
    "invalid_image": 400,
    "invalid_schema": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "model_not_found": 404,
    "method_not_allowed": 405,
    "payload_too_large": 413,
    "image_too_large": 413,
    "unsupported_media_type": 415,
    "unsupported_image": 415,
    "rate_limited": 429,
    "token_budget_exhausted": 429,
    "numeric_error": 500,
    "internal_error": 500,
    "queue_full": 503,
    "not_ready": 503,
    "model_not_configured": 503,
    "deadline_exceeded": 504,
}
_FRAMEWORK_CODES: Mapping[int, str] = {
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    413: "payload_too_large",
    415: "unsupported_media_type",
    429: "rate_limited",
}
_OPENAI_TYPES: Mapping[int, str] = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
OPENAI_ERROR_TYPES = ("invalid_request_error", *_OPENAI_TYPES.values(), "server_error")
# The client left before its answer: nobody reads this. nginx logs such requests with the same number.
STATUS_CLIENT_LEFT = 499


class WebError(Exception):
    """An error on its way to the client: a stable code, a safe message, the field at fault, extra headers."""

    def __init__(
        self, code: str, message: str, *, field: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.field = field
        self.headers = dict(headers or {})
        self.status = STATUS_BY_CODE[code]


class BodyTooLarge(RequestEntityTooLarge):
    """More bytes than allowed, which is not the same as more form parts than allowed."""


def as_web_error(error: Exception) -> WebError:
    """Any exception as something that may be shown. What is not ours becomes `internal_error` without details."""
    if isinstance(error, WebError):
        return error
    if isinstance(error, ServiceError):
        headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
        return WebError(error.code, error.message, field=error.field, headers=headers)
    if isinstance(error, HTTPException) and error.code is not None and error.code < 500:
        return _from_http_exception(error, error.code)
    return WebError("internal_error", "something went wrong on our side; the request id finds it in the log")


def _from_http_exception(error: HTTPException, status: int) -> WebError:
    code = _FRAMEWORK_CODES.get(status, "invalid_request")
    headers = {name: value for name, value in error.get_headers() if name in ("Allow", "Retry-After")}
    if code == "not_found":
        return WebError(code, "there is nothing at this address")
    if code == "method_not_allowed":
        return WebError(code, f"{request.method} is not allowed here, only {headers.get('Allow')}", headers=headers)
    if code == "payload_too_large":
        if not isinstance(error, BodyTooLarge):
            return WebError(code, f"form: at most {request.max_form_parts} parts, got more")
        limit, length = request.max_content_length or 0, request.content_length
        return WebError(code, f"body: at most {limit} bytes, got {'more' if length is None else f'{length} bytes'}")
    if code == "rate_limited":
        return WebError(code, f"at most {error.description} for one client", headers=headers)
    if code == "unsupported_media_type":
        return WebError(code, error.description or "this content type is not taken here")
    if isinstance(error, ClientDisconnected):
        return WebError(code, f"body: ended before its {request.content_length} bytes")
    return WebError(code, "the request could not be read as HTTP form or JSON", headers=headers)


def success_body(completion: Completion, request_id: str) -> dict[str, Any]:
    """The success envelope of `/api/v1`; times in seconds."""
    timing = completion.timing
    first = timing.time_to_first_token_s
    return {
        "success": True,
        "data": {
            "model": completion.model,
            "text": completion.text,
            "generated_tokens": completion.generated_tokens,
            "input_tokens": completion.input_tokens,
            "finish_reason": completion.finish_reason,
            "demo": completion.is_demo,
        },
        "metrics": {
            "queue_time": round(timing.queue_s, 6),
            "time_to_first_token": None if first is None else round(first, 6),
            "generation_time": round(timing.generation_s, 6),
            "total_time": round(timing.total_s, 6),
            "tokens_per_second": round(timing.tokens_per_second(completion.generated_tokens), 3),
        },
        "request_id": request_id,
    }


def success_response(completion: Completion, request_id: str) -> Response:
    response = jsonify(success_body(completion, request_id))
    if completion.is_demo:
        response.headers["X-Avito-Demo"] = "1"
    return response


def stream_response(events: Iterable[tuple[int, Event] | None], request_id: str, *, is_demo: bool) -> Response:
    """The events of one answer as Server-Sent Events of `/api/v1`: `delta`, then one `done` or `error`; a comment for
    each None."""
    return sse_response(_frames(events, request_id), is_demo=is_demo)


def sse_response(frames: Iterable[bytes], *, is_demo: bool) -> Response:
    """:param frames: whole events of a `text/event-stream`."""
    response = Response(frames, content_type="text/event-stream; charset=utf-8")
    response.headers["Cache-Control"] = "no-store"
    response.headers["X-Accel-Buffering"] = "no"  # nginx passes each event on as it comes
    if is_demo:
        response.headers["X-Avito-Demo"] = "1"
    return response


#: A comment line: nothing to say yet.
KEEP_ALIVE = b": waiting\n\n"


def _frames(events: Iterable[tuple[int, Event] | None], request_id: str) -> Iterator[bytes]:
    for each in events:
        if each is None:
            yield KEEP_ALIVE
            continue
        _, event = each
        if isinstance(event, Delta):
            yield sse_event("delta", {"text": event.text})
        elif isinstance(event, Done):
            yield sse_event("done", success_body(event.completion, request_id))
        else:
            yield sse_event("error", error_body(as_web_error(event.error), request_id))


def sse_event(name: str, body: Mapping[str, Any]) -> bytes:
    """One event of a `text/event-stream`; JSON has no line ends, so the data is one line."""
    return f"event: {name}\ndata: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


def error_body(error: WebError, request_id: str) -> dict[str, Any]:
    """The error body of `/api`."""
    return {
        "success": False,
        "error": {"code": error.code, "message": error.message, "field": error.field},
        "request_id": request_id,
    }


def openai_error_body(error: WebError) -> dict[str, Any]:
    """The error body of `/v1`, in OpenAI's shape."""
    kind = _OPENAI_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": error.message, "type": kind, "param": error.field, "code": error.code}}


def error_response(error: WebError, request_id: str) -> Response:
    """The error in the shape of the door it happened at: `/api`, `/v1`, or a page."""
    if request.path.startswith("/api/") or request.path == "/api":
        response = jsonify(error_body(error, request_id))
    elif request.path.startswith("/v1/") or request.path == "/v1":
        response = jsonify(openai_error_body(error))
    else:
        response = Response(pages.render_error(error), mimetype="text/html")
    response.status_code = error.status
    response.headers.update(error.headers)
    return response
