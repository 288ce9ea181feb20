"""The description is the validation: same limits, valid as OpenAPI, and the service behaves as it says."""

from __future__ import annotations

import json
from typing import Any

import pytest
import schemathesis
from flask.testing import FlaskClient
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from config import Limits
from models.parsing import RequestParser
from openapi import build_document
from responses import STATUS_BY_CODE
from tests.test_error_shape import IMAGE, TEXT, post_json

SCHEMA = schemathesis.openapi.from_dict(build_document(RequestParser(Limits())))


def test_document_is_served_and_is_the_one_that_is_built(client: FlaskClient) -> None:
    response = client.get("/openapi.json")
    assert response.status_code == 200
    assert response.get_json() == json.loads(json.dumps(build_document(RequestParser(Limits()))))
    assert response.get_json()["openapi"].startswith("3.1")


def test_limits_in_the_document_are_those_that_validate(make_app: Any) -> None:
    client = make_app(AVITO_MAX_PROMPT_CHARS=7).test_client()
    schema = client.get("/openapi.json").get_json()["components"]["schemas"]["TextGenerateRequest"]
    limit = schema["properties"]["prompt"]["maxLength"]
    assert limit == 7
    assert schema["additionalProperties"] is False and schema["required"] == ["prompt"]
    assert post_json(client, TEXT, {"prompt": "x" * limit}).status_code == 200
    assert post_json(client, TEXT, {"prompt": "x" * (limit + 1)}).status_code == 400


def test_every_route_of_the_api_is_described(app: Any) -> None:
    described = build_document(RequestParser(Limits()))["paths"]
    routes = {rule.rule for rule in app.url_map.iter_rules() if rule.rule.startswith("/api/")}
    assert routes == set(described)


def test_every_status_that_generating_doors_give_is_described() -> None:
    operation = build_document(RequestParser(Limits()))["paths"][TEXT]["post"]
    not_here = {"401", "403", "404", "405"}
    assert {str(status) for status in STATUS_BY_CODE.values()} - not_here <= set(operation["responses"])


@pytest.fixture(scope="module")
def described_app() -> Any:
    from app_production import create_app
    from config import Settings
    from models.service import ModelService
    from tests.fakes import FakeLoad, FakeLoaded, fake_snapshot

    models = {"avibe": FakeLoaded(), "avision": FakeLoaded()}
    service = ModelService({n: fake_snapshot(n) for n in ("avibe", "avision")}, Limits(), load=FakeLoad(models))
    service.start()
    assert service.wait_loaded(20)
    yield create_app(Settings.model_validate({"AVITO_RATE_LIMIT": ""}), service)
    service.stop(20)


@SCHEMA.parametrize()
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_service_behaves_as_described(case: Any, described_app: Any) -> None:
    """Schemathesis: no 500, statuses, content types, headers and bodies as described, bad input refused."""
    # No description can say what makes bytes a picture, so well-formed nonsense is refused there, and rightly.
    excluded = [positive_data_acceptance] if case.path == IMAGE else []
    case.call_and_validate(app=described_app, excluded_checks=excluded)
