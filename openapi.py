"""`GET /openapi.json`: OpenAPI 3.1, generated from the same Pydantic models that validate requests."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response, jsonify

import openapi_v1
from config import VERSION
from models.openai_parsing import OpenAIParser
from models.parsing import RequestParser
from openapi_parts import (
    BOOLEAN,
    COUNT,
    EVENTS,
    HEADERS,
    JSON,
    NUMBER,
    OPTIONAL_KEY,
    STRING,
    Schema,
    answer,
    array,
    errors,
    nullable,
    object_of,
    operation,
    ref,
)
from responses import STATUS_BY_CODE

_APPLICATION_METRICS = (
    "total_requests",
    "success_rate_percent",
    "average_response_time_seconds",
    "total_tokens_generated",
    "avibe_requests",
    "avision_requests",
)


def make_blueprint(parser: RequestParser, openai_parser: OpenAIParser) -> Blueprint:
    bp = Blueprint("openapi", __name__)
    document = build_document(parser, openai_parser)

    @bp.get("/openapi.json")
    def show_openapi() -> Response:
        return jsonify(document)

    return bp


def build_document(parser: RequestParser, openai_parser: OpenAIParser) -> dict[str, Any]:
    """The whole document. Limits stand in it because they stand in the models of the parsers."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Avito AI API",
            "version": VERSION,
            "description": "A text model (Avibe) and a vision model (Avision) served from one GPU.",
        },
        "tags": [
            {"name": "generate", "description": "Text and pictures in, text out. Limited per client, or per key."},
            {
                "name": "openai",
                "description": "What OpenAI's clients expect, see docs/openai.md. `null` counts as absent.",
            },
            {"name": "health", "description": "How the service is. Not limited."},
            {
                "name": "operator",
                "description": "Need the operator's token or a key with the scope ops; "
                "without a token, metrics may be reset from the same machine.",
            },
        ],
        "paths": {
            "/api/v1/text/generate": {
                "post": _generating(
                    "generateText",
                    "Answer a prompt with Avibe",
                    {JSON: {"schema": ref("TextGenerateRequest"), "example": _TEXT_EXAMPLE}},
                )
            },
            "/api/v1/image/analyze": {
                "post": _generating(
                    "analyzeImage",
                    "Answer a prompt about one or more pictures with Avision",
                    {
                        JSON: {"schema": ref("ImageAnalyzeRequest")},
                        "multipart/form-data": {"schema": _form_schema(parser)},
                    },
                )
            },
            **openapi_v1.paths(),
            "/api/health": {"get": _reading("getHealth", "How the service is", ref("Health"))},
            "/api/health/ready": {
                "get": _reading(
                    "getReady", "Whether every configured model serves", ref("Ready"), {"503": ref("Ready")}
                )
            },
            "/api/health/live": {
                "get": _reading("getLive", "Whether the engine is alive", ref("Live"), {"503": ref("Live")})
            },
            "/api/metrics": {"get": _reading("getMetrics", "Metrics as JSON", ref("Metrics"))},
            "/api/metrics/reset": {
                "post": _operating("resetMetrics", "Start the sums of /api/metrics anew")
                | {"security": [{"operator": []}, {}]}
            },
            "/api/drain": {
                "post": _operating("drain", "Let readiness answer 503 before a stop") | {"security": [{"operator": []}]}
            },
        },
        "components": {
            "securitySchemes": {
                "key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "A key, where the server asks for keys.",
                },
                "operator": {"type": "http", "scheme": "bearer"},
            },
            "headers": HEADERS,
            "schemas": _schemas(parser) | openapi_v1.schemas(openai_parser),
        },
    }


_TEXT_EXAMPLE = {"prompt": "What is the capital of France?", "max_tokens": 64, "temperature": 0}


def _generating(name: str, summary: str, content: dict[str, Any]) -> dict[str, Any]:
    success = answer("Success", ref("Answer"), "X-Avito-Demo")
    success["content"][EVENTS] = {"schema": ref("Event")}
    refusals = errors(("400", "401", "403", "413", "415", "429", "500", "503", "504"), ref("Error"))
    return operation(name, "generate", summary, {"200": success} | refusals, content) | OPTIONAL_KEY


def _reading(name: str, summary: str, success: Schema, others: dict[str, Schema] | None = None) -> dict[str, Any]:
    responses = {"200": answer("Success", success)}
    for status, schema in (others or {}).items():
        responses[status] = answer("Not now", schema)
    return operation(name, "health", summary, responses)


def _operating(name: str, summary: str) -> dict[str, Any]:
    done = {"200": answer("Success", ref("Done"))}
    return operation(name, "operator", summary, done | errors(("401", "403"), ref("Error")))


def _form_schema(parser: RequestParser) -> dict[str, Any]:
    """The form of a picture request: the fields of the model, and the files."""
    schema = parser.image_fields.model_json_schema()
    picture = {"type": "string", "contentMediaType": "application/octet-stream"}
    schema["properties"]["image"] = {
        "type": "array",
        "items": picture,
        "minItems": 1,
        "maxItems": parser.limits.max_images,
        "description": "PNG, JPEG, WebP, GIF (first frame) or BMP.",
    }
    schema["required"] = [*schema.get("required", []), "image"]
    return schema


def _event(name: str, body: dict[str, Any]) -> dict[str, Any]:
    data = {**STRING, "contentMediaType": JSON, "contentSchema": body}
    return object_of({"event": {"const": name}, "data": data})


def _schemas(parser: RequestParser) -> dict[str, Any]:
    image_body = parser.image_body.model_json_schema()
    image_body["oneOf"] = [{"required": ["image"]}, {"required": ["images"]}]
    state = {"enum": ["not_configured", "loading", "ready", "failed"]}
    model = object_of(
        {"state": state},
        demo=BOOLEAN,
        device=nullable(STRING),
        dtype=nullable(STRING),
        phase=nullable(STRING),
        phase_seconds=NUMBER,
        phases={"type": "object", "additionalProperties": NUMBER},
        running=COUNT,
        waiting=COUNT,
    )
    models = object_of({"avibe": model, "avision": model})
    checks = {"type": "object", "additionalProperties": object_of({"ok": BOOLEAN})}
    reasons = array(STRING)
    return {
        "TextGenerateRequest": parser.text_body.model_json_schema(),
        "ImageAnalyzeRequest": image_body,
        "Answer": object_of(
            {
                "success": {"const": True},
                "data": object_of(
                    {
                        "model": {"enum": ["avibe", "avision"]},
                        "text": STRING,
                        "generated_tokens": COUNT,
                        "input_tokens": COUNT,
                        "finish_reason": {"enum": ["stop", "length"]},
                        "demo": BOOLEAN,
                    }
                ),
                "metrics": object_of(
                    {
                        "queue_time": NUMBER,
                        "time_to_first_token": nullable(NUMBER),
                        "generation_time": NUMBER,
                        "total_time": NUMBER,
                        "tokens_per_second": NUMBER,
                    }
                ),
                "request_id": STRING,
            }
        ),
        "Error": object_of(
            {
                "success": {"const": False},
                "error": object_of(
                    {"code": {"enum": list(STATUS_BY_CODE)}, "message": STRING, "field": nullable(STRING)}
                ),
                "request_id": STRING,
            }
        ),
        # The schema of one event describes the stream; OpenAPI has a word of its own for that from 3.2 on.
        "Event": {
            "description": 'With `"stream": true`: one of the Server-Sent Events; `data` is JSON. Deltas carry the '
            "text as it comes; last is either `done` with the whole answer or `error`. Comments may come in between.",
            "oneOf": [
                _event("delta", object_of({"text": STRING})),
                _event("done", ref("Answer")),
                _event("error", ref("Error")),
            ],
        },
        "Health": object_of(
            {
                "status": {"enum": ["healthy", "degraded", "unhealthy"]},
                "version": STRING,
                "uptime_seconds": NUMBER,
                "models": models,
                "checks": checks,
                "why_not_ready": reasons,
                "demo": BOOLEAN,
            }
        ),
        "Ready": object_of(
            {"status": {"enum": ["ready", "not_ready"]}, "models": models, "checks": checks, "demo": BOOLEAN},
            why_not_ready=reasons,
        ),
        "Live": object_of(
            {
                "status": {"enum": ["alive", "dead"]},
                "engine": {"enum": ["ok", "hung", "dead"]},
                "seconds_since_last_step": NUMBER,
            }
        ),
        "Metrics": object_of(
            {
                "system": object_of(dict.fromkeys(("cpu_percent", "memory_percent", "disk_percent"), NUMBER)),
                "gpu": object_of({"available": BOOLEAN}),
                "application": object_of(dict.fromkeys(_APPLICATION_METRICS, NUMBER)),
            }
        ),
        "Done": object_of({"status": STRING}),
    }
