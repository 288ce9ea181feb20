"""Reading request bodies: JSON bytes and form parts, in memory, with the content type checked first."""

from __future__ import annotations

import io
from typing import IO, Any

import flask
from flask import g, request
from werkzeug.exceptions import BadRequest, ClientDisconnected, RequestEntityTooLarge
from werkzeug.formparser import FormDataParser
from werkzeug.http import parse_options_header

from models.parsing import UploadedFile
from responses import BodyTooLarge, WebError

# The worker ends connections that take too long to send a request; this key holds the call that says "it is all here".
READ_MARK = "avito.request_read"
# When the worker saw the request's first byte, in monotonic seconds.
RECEIVED_AT = "avito.received_at"


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
        """:raise BodyTooLarge, ClientDisconnected: see the class.
        :raise BadRequest: the chunks are malformed.
        """
        data = self._read(min(len(buffer), self._limit - self._num_read) or 1)
        self._num_read += len(data)
        is_full = self._num_read == self._limit and self._announced is None
        if self._num_read > self._limit or (is_full and self._read(1)):
            raise BodyTooLarge
        if not data and self._announced is not None and self._num_read < self._announced:
            raise ClientDisconnected
        buffer[: len(data)] = data
        return len(data)

    def _read(self, size: int) -> bytes:
        try:
            return self._raw.read(size)
        except Exception as error:  # the server has an exception class for each way to malform a chunk
            raise BadRequest from error


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

    def make_form_data_parser(self) -> FormDataParser:
        parser = super().make_form_data_parser()
        parser.silent = False  # a malformed form is an error, not an empty form
        return parser


def bound_input(limit: int) -> None:
    """Let nobody read more of the current request's body than `limit` bytes, or take half of one for the whole.

    :raise BodyTooLarge: it announces more; nothing was read.
    """
    announced = request.content_length
    if announced is not None and announced > limit:
        raise BodyTooLarge
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
    """Fields and files of a form, in order, repeated ones too. Read once; the fields are `g.form_fields` for pages.

    :raise WebError: `unsupported_media_type`.
    """
    if "form" in g:
        read: tuple[list[tuple[str, str]], list[UploadedFile]] = g.form
        return read
    expect_media_type("multipart/form-data", "application/x-www-form-urlencoded")
    is_urlencoded = media_type() == "application/x-www-form-urlencoded"
    # Werkzeug counts the parts of multipart forms only; millions of fields here would cost gigabytes.
    if is_urlencoded and request.get_data(cache=True).count(b"&") >= (request.max_form_parts or 0):
        raise RequestEntityTooLarge
    try:
        fields = list(request.form.items(multi=True))
        files = [
            UploadedFile(name, part.mimetype, part.stream.read()) for name, part in request.files.items(multi=True)
        ]
    except ValueError:
        raise WebError("invalid_request", "body: is not a well-formed form") from None
    mark_read()
    g.form_fields = fields
    g.form = fields, files
    return fields, files


def expect_media_type(*allowed: str) -> None:
    """:raise WebError: `unsupported_media_type`, unless the content type is one of `allowed`."""
    given = media_type()
    if given not in allowed:
        shown = "".join(c if c.isprintable() else "?" for c in given[:64]) or "none"
        raise WebError("unsupported_media_type", f"Content-Type: must be {' or '.join(allowed)}, got {shown}")


def mark_read() -> None:
    """The whole request has arrived: its read time-out ends.

    If that had struck just before, our own side of the connection is shut, and its end says nothing of the client.
    """
    mark = request.environ.get(READ_MARK)
    g.can_see_client = mark is None or mark()
