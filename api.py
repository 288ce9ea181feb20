"""The owner's JSON API: `/api/v1/text/generate` and `/api/v1/image/analyze`."""

from __future__ import annotations

from flask import Blueprint, Response, g

import bodies
from generation import complete, stream
from models.parsing import ApiRequest, RequestParser
from models.service import ModelService
from responses import stream_response, success_response


def make_blueprint(service: ModelService, parser: RequestParser) -> Blueprint:
    bp = Blueprint("api", __name__, url_prefix="/api/v1")

    @bp.post("/text/generate")
    def generate_text() -> Response:
        """Answer a prompt."""
        service.check_configured("avibe")
        return _answer(parser.parse_text_json(bodies.read_json()))

    @bp.post("/image/analyze")
    def analyze_image() -> Response:
        """Answer a prompt about one or more pictures, sent as a form or as JSON."""
        service.check_configured("avision")
        if bodies.media_type() == "application/json":
            return _answer(parser.parse_image_json(bodies.read_json()))
        bodies.expect_media_type("multipart/form-data", "application/json")
        return _answer(parser.parse_image_upload(*bodies.read_form()))

    def _answer(parsed: ApiRequest) -> Response:
        request_id = g.exchange.request_id
        if not parsed.is_streamed:
            return success_response(complete(service, parsed.request), request_id)
        events = stream(service, [parsed.request])
        response = stream_response(events, request_id, is_demo=events.is_demo)
        response.call_on_close(events.close)
        return response

    return bp
