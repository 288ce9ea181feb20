"""What the templates get: language, texts, the state of the models, and the forms with what was typed and answered.

Rendering only: which request is answered how is decided in `web.py` and `middleware.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from flask import Flask, current_app, g, render_template, request

from config import VERSION, Limits
from models.schemas import DEFAULT_MAX_TOKENS, DEFAULT_TEMPERATURE, MODEL_NAMES, Completion, ModelName
from models.service import ModelService, ServiceSnapshot
from translations import ERROR_CODES, LANGUAGES, choose_language, translate

LANGUAGE_COOKIE = "avito_lang"
FORM_FIELDS = ("prompt", "max_tokens", "temperature")


class ShownError(Protocol):
    """An error as pages show it; `responses.WebError` is one."""

    @property
    def code(self) -> str: ...
    @property
    def message(self) -> str: ...
    @property
    def field(self) -> str | None: ...
    @property
    def status(self) -> int: ...


@dataclass(frozen=True)
class Result:
    """An answer as the page shows it; times in seconds."""

    text: str
    generated_tokens: int
    input_tokens: int
    total_time: float
    time_to_first_token: float | None
    tokens_per_second: float
    finish_reason: str
    is_demo: bool
    request_id: str


@dataclass(frozen=True)
class Form:
    """One form: what was typed, and what came of it."""

    values: Mapping[str, str] = field(default_factory=lambda: dict.fromkeys(FORM_FIELDS, ""))
    result: Result | None = None
    error: ShownError | None = None


@dataclass(frozen=True)
class ModelCard:
    state: str
    is_demo: bool
    max_tokens_default: int
    temperature_default: float


def init_app(app: Flask, service: ModelService, limits: Limits) -> None:
    app.extensions["avito_pages"] = _Pages(service, limits, _fingerprints(Path(app.static_folder or "")))


@dataclass(frozen=True)
class _Pages:
    service: ModelService
    limits: Limits
    fingerprints: Mapping[str, str]


def render_index(active: ModelName = "avibe", form: Form | None = None) -> str:
    """The page with both forms; `form` is what became of the `active` one."""
    extension: _Pages = current_app.extensions["avito_pages"]
    forms = {name: Form() for name in MODEL_NAMES}
    if form is not None:
        forms[active] = form
    return render_template(
        "index.html",
        models=_cards(extension.service.snapshot()),
        limits=extension.limits,
        forms=forms,
        active=active,
        error_codes=ERROR_CODES,
        # Not through keys.py, which is above this file.
        has_keys="avito_keys" in current_app.extensions,
        **_context(),
    )


def render_error(error: ShownError) -> str:
    """An error as a page; on a form's own address as that form, with the input kept."""
    form_of: dict[str, ModelName] = {"/avibe": "avibe", "/avision": "avision"}
    if request.method == "POST" and request.path in form_of:
        return render_index(form_of[request.path], Form(values=typed_values(), error=error))
    return render_template("error.html", status=error.status, error=error, **_context())


def render_docs() -> str:
    return render_template("docs.html", **_context())


def completion_form(completion: Completion, request_id: str) -> Form:
    """The form with the answer to what was typed."""
    timing = completion.timing
    return Form(
        values=typed_values(),
        result=Result(
            text=completion.text,
            generated_tokens=completion.generated_tokens,
            input_tokens=completion.input_tokens,
            total_time=timing.total_s,
            time_to_first_token=timing.time_to_first_token_s,
            tokens_per_second=timing.tokens_per_second(completion.generated_tokens),
            finish_reason=completion.finish_reason,
            is_demo=completion.is_demo,
            request_id=request_id,
        ),
    )


def typed_values() -> dict[str, str]:
    """What the user typed, to show it again. Empty if the form itself could not be read."""
    readable = getattr(g, "form_fields", None) or []
    return dict.fromkeys(FORM_FIELDS, "") | {name: value for name, value in readable if name in FORM_FIELDS}


def _cards(snapshot: ServiceSnapshot) -> dict[str, ModelCard]:
    return {
        name: ModelCard(model.state, model.is_demo, DEFAULT_MAX_TOKENS[name], DEFAULT_TEMPERATURE)
        for name, model in snapshot.models.items()
    }


def _context() -> dict[str, Any]:
    lang = choose_language(
        request.args.get("lang"), request.cookies.get(LANGUAGE_COOKIE), request.headers.get("Accept-Language")
    )
    return {
        "t": partial(translate, lang),
        "lang": lang,
        "languages": LANGUAGES,
        "version": VERSION,
        "request_id": g.exchange.request_id,
        "static_url": _static_url,
    }


def _static_url(path: str) -> str:
    """With a fingerprint, so that browsers may keep the file and still get the next version.

    Not by `url_for`, which fails for requests whose Host header is nonsense; error pages must not.
    """
    extension: _Pages = current_app.extensions["avito_pages"]
    return f"{current_app.static_url_path}/{path}?v={extension.fingerprints[path]}"


def _fingerprints(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()[:12] for file in files}
