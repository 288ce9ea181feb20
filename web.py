"""The pages: `GET /`, the forms `POST /avibe` and `POST /avision`, and the viewer at `/docs`."""

from __future__ import annotations

from flask import Blueprint, Response, g, make_response, redirect, request
from werkzeug.wrappers import Response as WerkzeugResponse

import bodies
import pages
from generation import complete
from models.errors import UnknownField
from models.parsing import RequestParser
from models.schemas import ImageRequest, TextRequest
from models.service import ModelService
from translations import LANGUAGES

_ONE_YEAR_S = 365 * 24 * 3600


def make_blueprint(service: ModelService, parser: RequestParser) -> Blueprint:
    bp = Blueprint("web", __name__)

    @bp.get("/")
    def show_index() -> Response:
        return _keep_language(make_response(pages.render_index()))

    @bp.post("/avibe")
    def ask_avibe() -> Response:
        fields, files = bodies.read_form()
        if files:
            raise UnknownField("image: this form takes no files", field="image")
        return _answer(parser.parse_text_form(fields))

    @bp.post("/avision")
    def ask_avision() -> Response:
        return _answer(parser.parse_image_form(*bodies.read_form()))

    @bp.get("/avibe")
    @bp.get("/avision")
    def back_to_the_forms() -> WerkzeugResponse:
        """Who reloads the address of an answer gets the forms again."""
        return redirect("/", 303)

    @bp.get("/docs")
    def show_docs() -> Response:
        return _keep_language(make_response(pages.render_docs()))

    @bp.get("/favicon.ico")
    def show_icon() -> WerkzeugResponse:
        return redirect("/static/favicon.svg", 301)

    def _answer(parsed: TextRequest | ImageRequest) -> Response:
        completion = complete(service, parsed)
        form = pages.completion_form(completion, g.exchange.request_id)
        response = make_response(pages.render_index(completion.model, form))
        if completion.is_demo:
            response.headers["X-Avito-Demo"] = "1"
        return response

    return bp


def _keep_language(response: Response) -> Response:
    """Remember a language that was chosen by the switch."""
    chosen = request.args.get("lang")
    if chosen in [code for code, _ in LANGUAGES]:
        response.set_cookie(pages.LANGUAGE_COOKIE, chosen, max_age=_ONE_YEAR_S, samesite="Lax", httponly=True)
    return response
