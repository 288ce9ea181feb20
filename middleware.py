"""Hooks around every request: id, clock, client, limits, key, rate, CORS, security headers, accounting, errors.

`init_app` registers them in the order of a request's walk; the views see only requests that passed. Error shapes and
the status table are in `responses.py`, outcomes in `accounting.py`, keys in `access.py`.
"""

from __future__ import annotations

import ipaddress
import logging
import re
import time
import uuid
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

from flask import Flask, Response, g, request
from flask_cors import CORS
from flask_limiter import Limiter
from werkzeug.exceptions import HTTPException
from werkzeug.middleware.proxy_fix import ProxyFix

import bodies
import logs
from access import Access
from accounting import DOOR_BY_PATH, Exchange, Ledger
from budgets import storage_options
from config import Settings
from keys import Key
from models.errors import RequestCancelled, ServiceError
from responses import STATUS_CLIENT_LEFT, WebError, as_web_error, error_response

log = logging.getLogger("avito.http")

CLIENT_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_EXCHANGE = "avito.exchange"
PAGE_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; font-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
API_CSP = "default-src 'none'; frame-ancestors 'none'"
EXPOSED_HEADERS = [
    "X-Request-ID",
    "X-Response-Time",
    "X-Avito-Demo",
    "Retry-After",
    "X-RateLimit-Limit",
    "X-RateLimit-Remaining",
    "X-RateLimit-Reset",
]


def init_app(
    app: Flask,
    settings: Settings,
    ledger: Ledger,
    clock: Callable[[], float] = time.monotonic,
    access: Access | None = None,
) -> None:
    """Register everything. Call before the blueprints are registered.

    :param access: None: keys are off.
    """
    limits = settings.limits
    app.config["MAX_CONTENT_LENGTH"] = limits.max_body_bytes
    # Werkzeug's own limits of form fields (500 kB in memory) would refuse a long prompt within our limit.
    app.config["MAX_FORM_MEMORY_SIZE"] = limits.max_body_bytes
    app.config["MAX_FORM_PARTS"] = limits.max_form_parts
    if settings.trusted_proxies:
        app.wsgi_app = ProxyFix(  # type: ignore[method-assign]
            app.wsgi_app, x_for=settings.trusted_proxies, x_proto=settings.trusted_proxies, x_host=0
        )

    def close(exchange: Exchange) -> None:
        if access is not None:
            access.settle(exchange)
        _close_exchange(exchange, ledger, clock)

    app.wsgi_app = _account_for_everything(app.wsgi_app, close)  # type: ignore[method-assign]

    @app.before_request
    def stamp() -> None:
        # The worker knows when the first byte came; elsewhere it is now.
        g.exchange = _open_exchange(request.environ.get(bodies.RECEIVED_AT) or clock())
        request.environ[_EXCHANGE] = g.exchange
        logs.request_id.set(g.exchange.request_id)
        if g.exchange.door:
            ledger.open(g.exchange.door)
            log.info("Request received: %s %s", request.method, g.exchange.path)
        bodies.bound_input(limits.max_body_bytes)

    @app.before_request
    def identify() -> None:
        g.api_key = g.refusal = None
        if access is not None:
            access.identify()

    limiter = _make_limiter(app, settings, has_keys=access is not None)

    @app.before_request
    def read_rate() -> None:
        # Now and not at the end: the storage may be gone by then, and a finished answer must not be lost for it.
        g.rate = _read_rate(limiter)

    @app.before_request
    def admit() -> None:
        if access is not None:
            access.admit()

    # after_request hooks run in reverse: this one, registered first, sees the finished response.
    @app.after_request
    def finish(response: Response) -> Response:
        exchange: Exchange = g.exchange
        exchange.status = response.status_code
        elapsed = clock() - exchange.started
        response.headers["X-Request-ID"] = exchange.request_id
        response.headers["X-Response-Time"] = f"{elapsed:.3f}s"
        # Accounting waits until the response is closed: a stream has not even begun now.
        exchange.is_followed = True
        response.call_on_close(lambda: close(exchange))
        return response

    @app.after_request
    def secure(response: Response) -> Response:
        headers = response.headers
        headers.setdefault("X-Content-Type-Options", "nosniff")
        headers.setdefault("Referrer-Policy", "same-origin")
        headers.setdefault("X-Frame-Options", "DENY")
        headers.setdefault("Cross-Origin-Opener-Policy", "same-origin")
        headers.setdefault("Permissions-Policy", "camera=(), geolocation=(), microphone=()")
        headers.setdefault("Content-Security-Policy", PAGE_CSP if response.mimetype == "text/html" else API_CSP)
        if request.endpoint != "static":
            headers.setdefault("Cache-Control", "no-store")
        return response

    @app.after_request
    def tell_rate(response: Response) -> Response:
        # A request that was refused for its rate ended before `read_rate`.
        response.headers.update(g.rate if "rate" in g else _read_rate(limiter))
        return response

    @app.errorhandler(Exception)
    def show(error: Exception) -> Response | HTTPException:
        if isinstance(error, RequestCancelled):
            return Response(status=STATUS_CLIENT_LEFT)
        if isinstance(error, HTTPException) and error.code is not None and error.code < 400:
            return error
        return _show_error(error)

    if settings.cors_origins:
        CORS(
            app,
            resources={r"/(api|v1)/.*": {}},
            origins=list(settings.cors_origins),
            allow_headers=["Authorization", "Content-Type", "X-Request-ID"],
            methods=["GET", "POST", "OPTIONS"],
            expose_headers=EXPOSED_HEADERS,
            max_age=600,
            always_send=False,
        )


def _open_exchange(now: float) -> Exchange:
    given = request.headers.get("X-Request-ID", "")
    return Exchange(
        request_id=given if CLIENT_REQUEST_ID.fullmatch(given) else str(uuid.uuid4()),
        started=now,
        method=request.method,
        path=quote(request.path[:200]),
        client=request.remote_addr or "-",
        door=None if _only_looks() else DOOR_BY_PATH.get(request.path),
    )


def _only_looks() -> bool:
    """A CORS preflight asks about a door, and GET on a form's address leads back to the forms: neither generates."""
    is_form = request.path in ("/avibe", "/avision")
    return request.method == "OPTIONS" or (is_form and request.method in ("GET", "HEAD"))


def _close_exchange(exchange: Exchange, ledger: Ledger, clock: Callable[[], float]) -> None:
    if exchange.door is None:
        logs.request_id.set("-")
        return
    total_s = clock() - exchange.started
    if exchange.is_cancelled:
        exchange.status = STATUS_CLIENT_LEFT  # also if it left in the middle of a stream that began with 200
    ledger.close(exchange.door, exchange, total_s)
    logs.request_id.set(exchange.request_id)
    if exchange.is_cancelled:
        log.info("Client left (%.3fs total)", total_s)
    else:
        reason = _reason_phrase(exchange.status)
        log.info("Response sent: %d %s (%.3fs total)", exchange.status, reason, total_s)
    exchange.audit(total_s)
    logs.request_id.set("-")


def _reason_phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""


def _account_for_everything(
    wsgi: Callable[..., Iterable[bytes]], close: Callable[[Exchange], None]
) -> Callable[..., Iterable[bytes]]:
    """Count a request even if the framework itself failed and no hook saw its response."""

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        try:
            return wsgi(environ, start_response)
        finally:
            exchange: Exchange | None = environ.get(_EXCHANGE)
            if exchange is not None and not exchange.is_followed:
                exchange.status = exchange.status or 500
                close(exchange)

    return application


def _read_rate(limiter: Limiter) -> dict[str, str]:
    """The headers that tell a client its rate; none if no limit applies, or its storage does not answer."""
    window = limiter.current_limit
    if window is None:
        return {}
    try:
        remaining, reset_at = max(0, window.remaining), window.reset_at
    except Exception as error:  # each storage has errors of its own; a header is not worth an answer
        log.warning("the rate limit's storage does not answer: %r", error)
        return {}
    headers = {
        "X-RateLimit-Limit": str(window.limit.amount),
        "X-RateLimit-Remaining": str(remaining),
        "X-RateLimit-Reset": str(reset_at),
    }
    if window.breached:
        wait_s = round(reset_at - time.time())  # the library rounds up, past the window at times
        headers["Retry-After"] = str(min(max(1, wait_s), window.limit.get_expiry()))
    return headers


def _show_error(error: Exception) -> Response:
    web_error = as_web_error(error)
    exchange: Exchange = g.exchange
    exchange.error_code = web_error.code
    if web_error.status >= 500 and web_error.code in ("internal_error", "numeric_error"):
        # %r: a user's text inside an exception must not write lines into the log (the formatter escapes too).
        # What the service raises it has logged itself; anything else is a fault of ours and comes with its traceback.
        cause = None if isinstance(error, ServiceError) else error
        log.error("%s %s failed: %r", exchange.method, exchange.path, error, exc_info=cause)
    if request.method == "POST" and request.path in ("/avibe", "/avision") and "form_fields" not in g:
        _keep_what_was_typed(web_error)
    try:
        return error_response(web_error, exchange.request_id)
    except Exception:
        log.exception("the error itself could not be shown")
        return Response(f"{web_error.code}: {web_error.message}", status=web_error.status, mimetype="text/plain")


def _keep_what_was_typed(error: WebError) -> None:
    """A form that was refused before it was read, for its rate, is read now, so that the page can show it again."""
    if error.status in (413, 415):
        return
    try:
        bodies.read_form()
    except (HTTPException, WebError) as unreadable:
        log.info("the refused form could not be read: %r", unreadable)


def client_key() -> str:
    """Whom the rate limit counts: a key; without a good one the peer's address, for IPv6 its /64, which is what one
    subscriber gets."""
    if g.api_key is not None:
        return f"key:{g.api_key.id}"
    address = request.remote_addr or "-"
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return address


def _make_limiter(app: Flask, settings: Settings, *, has_keys: bool) -> Limiter:
    """One count per client over all generating doors; everything else is exempt."""

    def rate() -> str:
        key: Key | None = g.api_key
        if key is None or key.requests_per_minute is None:
            return settings.rate_limit
        return f"{key.requests_per_minute}/minute"

    is_on = bool(settings.rate_limit) or has_keys
    limiter = Limiter(
        client_key,
        application_limits=[rate] if is_on else [],
        storage_uri=settings.rate_limit_storage_uri,
        storage_options=dict(storage_options(settings.rate_limit_storage_uri)),
        strategy="moving-window",
        # If Redis is away, this process counts for itself: still limited, and nobody gets a 500 for it.
        in_memory_fallback=[rate] if is_on else [],  # type: ignore[list-item] # callables too, as its docstring says
        in_memory_fallback_enabled=is_on,
        # The fallback would count each endpoint by itself; with one name for all it is one count too.
        request_identifier=lambda: "generate",
        enabled=is_on,
    )
    # A method that the door does not have (405) generates nothing either. Who tries keys out is counted everywhere.
    limiter.request_filter(lambda: g.refusal is None and (g.exchange.door is None or request.endpoint is None))
    limiter.init_app(app)
    return limiter
