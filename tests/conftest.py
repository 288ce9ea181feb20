"""Fixtures: a fresh application per test, with the real service over fake models."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient

from app_production import create_app
from config import Limits, Settings
from models.schemas import ModelName
from models.service import ModelService
from tests.fakes import GENEROUS_S, FakeLoad, FakeLoaded, fake_snapshot

pytest_plugins = ["tests.tiny_models"]


class BufferedClient(FlaskClient):
    """Reads every answer to its end and closes it, as a server does; accounting happens at the close."""

    def open(self, *args: Any, **kwargs: Any) -> Any:
        kwargs.setdefault("buffered", True)
        return super().open(*args, **kwargs)


@pytest.fixture
def make_service() -> Iterator[Callable[..., ModelService]]:
    """Makes started services over fake models and stops them afterwards."""
    services: list[ModelService] = []

    def make(
        models: dict[ModelName, FakeLoaded] | None = None,
        *,
        load: FakeLoad | None = None,
        is_demo: bool = False,
        wait: bool = True,
        clock: Callable[[], float] = time.monotonic,
        limits: Limits | None = None,
        **limit_values: Any,
    ) -> ModelService:
        models = {"avibe": FakeLoaded(), "avision": FakeLoaded()} if models is None else models
        service = ModelService(
            {name: fake_snapshot(name, is_demo) for name in models},
            replace(limits or Limits(), **limit_values),
            load=load or FakeLoad(models),
            clock=clock,
        )
        services.append(service)
        service.start()
        if wait:
            assert service.wait_loaded(GENEROUS_S)
        return service

    yield make
    for service in services:
        for slot in service._slots.values():
            if slot.serving is not None:
                slot.serving.runner.gate.set()  # type: ignore[attr-defined]
        service.stop(GENEROUS_S)


@pytest.fixture
def make_app(make_service: Callable[..., ModelService]) -> Callable[..., Flask]:
    """Makes applications: settings by their variable names, the rate limit off unless given."""

    def make(service: ModelService | None = None, *, now: Callable[[], float] = time.time, **settings: Any) -> Flask:
        values = {"AVITO_RATE_LIMIT": "", **settings}
        parsed = Settings.model_validate(values)
        app = create_app(parsed, service or make_service(limits=parsed.limits), now=now)
        app.test_client_class = BufferedClient
        return app

    return make


@pytest.fixture
def app(make_app: Callable[..., Flask]) -> Flask:
    return make_app()


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return app.test_client()


@pytest.fixture
def wait_until() -> Callable[..., None]:
    """Waits for a condition that another thread brings about; fails after a generous time."""

    def wait(condition: Callable[[], bool], what: str = "the condition") -> None:
        deadline = time.monotonic() + GENEROUS_S
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not come about"
            time.sleep(0.002)

    return wait
