"""The description is the validation: same limits, valid as OpenAPI, and the service behaves as it says."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest
import schemathesis
from flask.testing import FlaskClient
from hypothesis import HealthCheck, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from config import Limits
from models.openai_parsing import NEUTRAL_VALUES, OpenAIParser
from models.parsing import RequestParser
from openapi import build_document
from responses import STATUS_BY_CODE
from tests.test_error_shape import IMAGE, TEXT, post_json
from tests.test_openai_api import CHAT

DOCUMENT = json.loads(json.dumps(build_document(RequestParser(Limits()), OpenAIParser(Limits()))))
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)
# What no schema can say of a valid request, by what it is answered: rules between fields, what depends on the model,
# and what is inside of a text. A refusal of well-formed data that none of these is, is a mistake of the description.
BEYOND_SCHEMAS = (
    # Rules between fields.
    r"max_completion_tokens: differs from max_tokens, .*",
    r"n: at most 8 answers in all, got .*",
    r"tools\[\d+\]\.function\.name: is given more than once",
    r"tool_choice: there are no tools to choose from",
    r"tool_choice\.function\.name: is not among the tools",
    r"parallel_tool_calls: false needs a tool_choice that forces a call",
    r"response_format: cannot go with tools, unless tool_choice is none",
    r"(stop|stop_token_ids|min_tokens|ignore_eos): cannot go with (response_format|tools)",
    r"skip_special_tokens: false cannot go with stop",
    r"messages\[\d+\]\.content\[\d+\]\.image_url: (only avision takes|at most 4) pictures, .*",
    # Of the model.
    r"(prompt|stop_token_ids|tokens)(\[\d+\])+: a token id must be .*",
    # Inside of a text.
    r"messages\[\d+\]\.content\[\d+\]\.image_url: .*(data URL|Base64|picture|bytes).*",
    r"messages\[\d+\]\.tool_calls\[\d+\]\.function\.arguments: must be .*",
)


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema of the document, for a validator that knows nothing else of it."""
    return schema | {"components": DOCUMENT["components"]}


def test_document_is_served_and_is_the_one_that_is_built(client: FlaskClient) -> None:
    response = client.get("/openapi.json")
    assert response.status_code == 200
    assert response.get_json() == DOCUMENT
    assert response.get_json()["openapi"].startswith("3.1")


def test_limits_in_the_document_are_those_that_validate(make_app: Any) -> None:
    client = make_app(AVITO_MAX_PROMPT_CHARS=7, AVITO_MAX_TOKENS=9).test_client()
    schemas = client.get("/openapi.json").get_json()["components"]["schemas"]
    limit = schemas["TextGenerateRequest"]["properties"]["prompt"]["maxLength"]
    assert limit == 7
    assert schemas["TextGenerateRequest"]["additionalProperties"] is False
    assert schemas["TextGenerateRequest"]["required"] == ["prompt"]
    assert post_json(client, TEXT, {"prompt": "x" * limit}).status_code == 200
    assert post_json(client, TEXT, {"prompt": "x" * (limit + 1)}).status_code == 400
    assert schemas["ChatCompletionRequest"]["additionalProperties"] == {"type": "null"}
    assert schemas["ChatCompletionRequest"]["properties"]["max_tokens"]["anyOf"][0]["maximum"] == 9


def test_every_route_of_the_api_is_described(app: Any) -> None:
    routes = {
        re.sub(r"<(\w+)>", r"{\1}", rule.rule)
        for rule in app.url_map.iter_rules()
        if rule.rule.startswith(("/api/", "/v1/"))
    }
    assert routes == set(DOCUMENT["paths"])


def test_every_status_that_generating_doors_give_is_described() -> None:
    for path, not_here in ((TEXT, {"401", "403", "404", "405"}), (CHAT, {"405"})):
        operation = DOCUMENT["paths"][path]["post"]
        assert {str(status) for status in STATUS_BY_CODE.values()} - not_here <= set(operation["responses"])


def test_parts_of_the_description_are_all_there_and_all_used() -> None:
    used = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(DOCUMENT)))
    assert used == set(DOCUMENT["components"]["schemas"])
    for schema in DOCUMENT["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


def contents() -> list[Any]:
    """Every media type of every request and answer that has an example."""
    found = []
    for path, item in DOCUMENT["paths"].items():
        for method in item.keys() & {"get", "post"}:
            for which, part in {"request": item[method].get("requestBody", {}), **item[method]["responses"]}.items():
                media = part.get("content", {}).get("application/json", {})
                if "example" in media:
                    found.append(pytest.param(media, id=f"{method} {path} {which}"))
    return found


@pytest.mark.parametrize("media", contents())
def test_example_is_valid(media: dict[str, Any]) -> None:
    jsonschema.validate(media["example"], resolved(media["schema"]), jsonschema.Draft202012Validator)


def test_every_operation_of_v1_has_examples() -> None:
    assert len(contents()) == 1 + 2 + 2 * 4  # a text request; the models; requests and answers of the other doors


def test_defaults_and_nulls_of_v1_are_valid_and_neutral_values_are_told() -> None:
    """`null` counts as absent, so it may stand wherever a field may be absent."""
    needed: dict[str, dict[str, Any]] = {
        "ChatCompletionRequest": {"messages": [{"role": "user", "content": "a"}]},
        "CompletionRequest": {"prompt": "a"},
    }
    for name, fields in needed.items():
        schema = DOCUMENT["components"]["schemas"][name]
        optional = schema["properties"].keys() - set(schema["required"])
        defaults = {key: field["default"] for key, field in schema["properties"].items() if "default" in field}
        each: dict[str, Any]
        for each in (defaults, dict.fromkeys(optional), {k: v for k, v in NEUTRAL_VALUES.items() if k in optional}):
            body = each | fields | {"model": "avibe"}
            jsonschema.validate(body, resolved(schema), jsonschema.Draft202012Validator)
        assert NEUTRAL_VALUES.keys() <= optional


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
    if not case.path.startswith("/v1/"):
        case.call_and_validate(app=described_app, excluded_checks=excluded)
        return
    response = case.call_and_validate(app=described_app, excluded_checks=[positive_data_acceptance])
    if case.meta.generation.mode is GenerationMode.POSITIVE and response.status_code == 400:
        message = response.json()["error"]["message"]
        assert any(re.fullmatch(known, message) for known in BEYOND_SCHEMAS), message
