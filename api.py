"""The owner's JSON API: `/api/v1/text/generate` and `/api/v1/image/analyze`."""

from __future__ import annotations

from flask import Blueprint, Response, g

import bodies
from generation import complete
from models.parsing import RequestParser
from models.schemas import ImageRequest, TextRequest
from models.service import ModelService
from responses import success_response


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
        return _answer(parser.parse_image_form(*bodies.read_form()))

    def _answer(parsed: TextRequest | ImageRequest) -> Response:
        return success_response(complete(service, parsed), g.exchange.request_id)

    return bp
