"""Who may use which door: finds the key of a request, refuses, holds keys to their rate and token budget.

Everything here is only there if keys are on. The order is that of `middleware.py`: `identify` before the rate limit,
so that this counts by key; `admit` after it, so that refused requests are limited too, by address.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from flask import Flask, g, request
from werkzeug.exceptions import HTTPException

import bodies
from accounting import Exchange
from budgets import open_usage, seconds_to_midnight
from config import Settings
from keys import EXTENSION, Key, KeyStore, Scope, unauthorized
from responses import WebError

log = logging.getLogger("avito.keys")

FORM_FIELD = "api_key"
_FORMS = ("/avibe", "/avision")
# Below these every address needs a key, also one that a door has only got since.
_GUARDED = ("/v1", "/api/v1")
_BEARER = "bearer "


class Access:
    """The keys of one application. Any thread.

    :param now: Unix seconds: expiry and the days of budgets.
    """

    def __init__(
        self, app: Flask, store: KeyStore, settings: Settings, clock: Callable[[], float], now: Callable[[], float]
    ) -> None:
        self.store = store
        self._now = now
        self._usage = open_usage(settings, clock, now)
        app.extensions[EXTENSION] = store

    def identify(self) -> None:
        """Find out whose the request is: `g.api_key`, or `g.refusal` for `admit`."""
        if not _needs_key():
            return
        try:
            g.api_key = key = self.authenticate("generate")
            g.exchange.key_id = key.id
        except (WebError, HTTPException) as refusal:
            g.refusal = refusal

    def admit(self) -> None:
        """Refuse what `identify` found no good key for, or a key whose tokens of today are used up.

        :raise WebError: `unauthorized`, `forbidden`, `token_budget_exhausted`, or why the form could not be read.
        :raise HTTPException: that too.
        """
        if g.refusal is not None:
            raise g.refusal
        key: Key | None = g.api_key
        if key is None or key.tokens_per_day is None or g.exchange.door is None:
            return
        used = self._usage.used(key.id)
        if used >= key.tokens_per_day:
            raise WebError(
                "token_budget_exhausted",
                f"at most {key.tokens_per_day} tokens a day (UTC) for this key, {used} are used",
                headers={"Retry-After": str(seconds_to_midnight(self._now()))},
            )

    def authenticate(self, scope: Scope) -> Key:
        """The key that the request carries, if it is valid and has this scope.

        :raise WebError: `unauthorized` without one, with an unknown or expired one; `forbidden` without the scope.
        :raise HTTPException: the form that has it could not be read.
        """
        field = None
        given = bearer()
        if request.method == "POST" and request.path in _FORMS:
            # Taken out in any case, so that it never gets to the fields of a request.
            typed = _take_from_form()
            if not given:
                given, field = typed, FORM_FIELD
        prefix = f"{field}: " if field else ""
        if not given:
            raise unauthorized(f"{prefix}a key is needed", field)
        key = self.store.find(given)
        if key is None:
            raise unauthorized(f"{prefix}there is no such key", field)
        exchange: Exchange = g.exchange
        exchange.key = key.name
        if key.is_expired(self._now()):
            raise unauthorized(f"{prefix}this key has expired", field)
        if scope not in key.scopes:
            raise WebError("forbidden", f"{prefix}this key has no scope {scope}", field=field)
        return key

    def settle(self, exchange: Exchange) -> None:
        """The exchange has ended, however it did: its tokens are used."""
        tokens = exchange.input_tokens + exchange.generated_tokens
        if exchange.key_id is not None and tokens:
            self._usage.add(exchange.key_id, tokens)

    def stop(self) -> None:
        """Put away what keys have used, when the worker stops."""
        self._usage.flush()


def bearer() -> str:
    """What the request carries as `Authorization: Bearer`; empty if it carries none."""
    header = request.headers.get("Authorization", "")
    return header[len(_BEARER) :].strip() if header[: len(_BEARER)].lower() == _BEARER else ""


def _needs_key() -> bool:
    if request.method == "OPTIONS":
        return False  # a browser asks before it sends its key
    is_guarded = any(request.path == root or request.path.startswith(f"{root}/") for root in _GUARDED)
    return is_guarded or g.exchange.door is not None


def _take_from_form() -> str:
    """The form's key, out of its fields.

    :raise WebError, HTTPException: as `bodies.read_form`; `invalid_request` if there are two.
    """
    fields, _ = bodies.read_form()
    keys = [value for name, value in fields if name == FORM_FIELD]
    # In place: the parser and the pages read this very list.
    fields[:] = [(name, value) for name, value in fields if name != FORM_FIELD]
    if len(keys) > 1:
        raise WebError("invalid_request", f"{FORM_FIELD}: is given more than once", field=FORM_FIELD)
    return keys[0].strip() if keys else ""
