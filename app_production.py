"""The factory: a plain list of steps. Importing this file does nothing; `create_app()` starts the work."""

from __future__ import annotations

import time
from collections.abc import Callable

from flask import Flask
from prometheus_client import CollectorRegistry

import api
import health
import middleware
import openai_api
import openapi
import pages
import web
from access import Access
from accounting import Ledger
from bodies import InMemoryRequest
from config import Settings, load_settings, set_torch_environment
from keys import open_store
from models.openai_parsing import OpenAIParser
from models.parsing import RequestParser
from models.service import ModelService
from models.snapshots import find_snapshots
from system import GpuReader

_STATIC_MAX_AGE_S = 24 * 3600


def create_app(
    settings: Settings | None = None, service: ModelService | None = None, *, now: Callable[[], float] = time.time
) -> Flask:
    """Build the application and start loading the models in the background.

    :param settings: default: from the environment and `.env`.
    :param service: default: the real one for `settings`; it is started here unless it is passed in.
    :param now: Unix seconds: when keys expire, and the days of their budgets.
    :raise ConfigError: the settings have mistakes, or the keys file has.
    :raise SnapshotError: a model path cannot be used.
    """
    settings = settings or load_settings()
    if service is None:
        service = make_service(settings)
        service.start()

    app = Flask(__name__)
    app.request_class = InMemoryRequest
    app.config["SEND_FILE_MAX_AGE_DEFAULT"] = _STATIC_MAX_AGE_S
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.json.ensure_ascii = False  # type: ignore[attr-defined]
    app.extensions["avito_service"] = service

    registry = service.metrics.registry
    ledger = Ledger(registry)
    parser = RequestParser(settings.limits)
    openai_parser = OpenAIParser(settings.limits)
    store = open_store(settings, service.clock)
    access = None if store is None else Access(app, store, settings, service.clock, now)
    app.extensions["avito_access"] = access
    middleware.init_app(app, settings, ledger, service.clock, access)
    pages.init_app(app, service, settings.limits)
    app.register_blueprint(web.make_blueprint(service, parser))
    app.register_blueprint(api.make_blueprint(service, parser))
    app.register_blueprint(openai_api.make_blueprint(service, openai_parser))
    app.register_blueprint(health.make_blueprint(service, ledger, settings, registry, GpuReader(), access))
    app.register_blueprint(openapi.make_blueprint(parser, openai_parser))
    return app


def make_service(settings: Settings) -> ModelService:
    """The real service for these settings, not yet started.

    :raise SnapshotError: a model path cannot be used.
    """
    set_torch_environment(settings)
    return ModelService(
        find_snapshots(settings),
        settings.limits,
        settings.engine,
        registry=CollectorRegistry(),
    )
