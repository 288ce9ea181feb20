"""Reading request bodies: JSON bytes and form parts, in memory, with the content type checked first."""

from __future__ import annotations

import io
from typing import IO

import flask
from flask import g, request
from werkzeug.http import parse_options_header

from models.parsing import UploadedFile
from responses import WebError

# The worker ends connections that take too long to send a request; this key holds the call that says "it is all here".
READ_MARK = "avito.request_read"


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
