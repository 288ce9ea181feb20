"""Reading request bodies: JSON bytes and form parts, in memory, with the content type checked first."""

from __future__ import annotations

import io
from typing import IO, Any

import flask
from flask import g, request
from werkzeug.exceptions import ClientDisconnected, RequestEntityTooLarge
from werkzeug.http import parse_options_header

from models.parsing import UploadedFile
from responses import WebError

# The worker ends connections that take too long to send a request; this key holds the call that says "it is all here".
READ_MARK = "avito.request_read"


class BoundedInput(io.RawIOBase):
    """A request body that is neither longer than allowed nor shorter than announced.

    Werkzeug cuts a chunked body at the limit without a word, and a body that ends early reads like a complete one.

    :param raw: the server's input stream.
    :param limit: most bytes.
    :param announced: the Content-Length; None for a chunked body.
    """

    def __init__(self, raw: IO[bytes], limit: int, announced: int | None) -> None:
        self._raw = raw
        self._limit = limit
        self._announced = announced
        self._num_read = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """:raise RequestEntityTooLarge, ClientDisconnected: see the class."""
        data = self._raw.read(min(len(buffer), self._limit - self._num_read) or 1)
        self._num_read += len(data)
        if self._num_read > self._limit or (
            self._num_read == self._limit and self._announced is None and self._raw.read(1)
        ):
            raise RequestEntityTooLarge
        if not data and self._announced is not None and self._num_read < self._announced:
            raise ClientDisconnected
        buffer[: len(data)] = data
        return len(data)


class InMemoryRequest(flask.Request):
    """Keeps uploaded files in memory: bodies are bounded, and pictures have no business on a disk."""

    def _get_file_stream(
        self,
        total_content_length: int | None,
        content_type: str | None,
        filename: str | None = None,
        content_length: int | None = None,
    ) -> IO[bytes]:
        return io.BytesIO()


def bound_input(limit: int) -> None:
    """Let nobody read more of the current request's body than `limit` bytes, or take half of one for the whole.

    :raise RequestEntityTooLarge: it announces more; nothing was read.
    """
    announced = request.content_length
    if announced is not None and announced > limit:
        raise RequestEntityTooLarge
    environ = request.environ
    is_chunked = environ.get("HTTP_TRANSFER_ENCODING") is not None
    if announced is not None or is_chunked:
        environ["wsgi.input"] = BoundedInput(environ["wsgi.input"], limit, None if is_chunked else announced)


def media_type() -> str:
    """The request's content type without parameters, in lower case."""
    return parse_options_header(request.headers.get("Content-Type"))[0].lower()


def read_json() -> bytes:
    """The body of a JSON request.

    :raise WebError: `unsupported_media_type`.
    :raise RequestEntityTooLarge, ClientDisconnected: from Werkzeug.
    """
    expect_media_type("application/json")
    body = request.get_data(cache=False)
    mark_read()
    return body


def read_form() -> tuple[list[tuple[str, str]], list[UploadedFile]]:
    """Fields and files of a form, in order, repeated ones too. Also kept in `g.form_fields` for pages.

    :raise WebError: `unsupported_media_type`.
    """
    expect_media_type("multipart/form-data", "application/x-www-form-urlencoded")
    fields = list(request.form.items(multi=True))
    files = [UploadedFile(name, part.mimetype, part.stream.read()) for name, part in request.files.items(multi=True)]
    mark_read()
    g.form_fields = fields
    return fields, files


def expect_media_type(*allowed: str) -> None:
    """:raise WebError: `unsupported_media_type`, unless the content type is one of `allowed`."""
    given = media_type()
    if given not in allowed:
        shown = "".join(c if c.isprintable() else "?" for c in given[:64]) or "none"
        raise WebError("unsupported_media_type", f"Content-Type: must be {' or '.join(allowed)}, got {shown}")


def mark_read() -> None:
    """The whole request has arrived: its read time-out ends."""
    mark = request.environ.get(READ_MARK)
    if mark is not None:
        mark()
