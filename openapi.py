"""`GET /openapi.json`: OpenAPI 3.1, generated from the same Pydantic models that validate requests."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response, jsonify

from config import VERSION
from models.parsing import RequestParser
from responses import STATUS_BY_CODE

_JSON = "application/json"
_EVENTS = "text/event-stream"
_APPLICATION_METRICS = (
    "total_requests",
    "success_rate_percent",
    "average_response_time_seconds",
    "total_tokens_generated",
    "avibe_requests",
    "avision_requests",
)
_NUMBER = {"type": "number"}
_STRING = {"type": "string"}
_BOOLEAN = {"type": "boolean"}
_COUNT = {"type": "integer", "minimum": 0}


def make_blueprint(parser: RequestParser) -> Blueprint:
    bp = Blueprint("openapi", __name__)
    document = build_document(parser)

    @bp.get("/openapi.json")
    def show_openapi() -> Response:
        return jsonify(document)

    return bp


def build_document(parser: RequestParser) -> dict[str, Any]:
    """The whole document. Limits stand in it because they stand in the models of `parser`."""
    generating = ("400", "401", "403", "413", "415", "429", "500", "503", "504")
    # Whether this server asks for keys is its operator's choice, and may change without a new description.
    optional_key: dict[str, Any] = {"security": [{"key": []}, {}]}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Avito AI API",
            "version": VERSION,
            "description": "A text model (Avibe) and a vision model (Avision) served from one GPU.",
        },
        "tags": [
            {"name": "generate", "description": "Text and pictures in, text out. Limited per client, or per key."},
            {"name": "health", "description": "How the service is. Not limited."},
            {
                "name": "operator",
                "description": "Need the operator's token or a key with the scope ops; "
                "without a token, metrics may be reset from the same machine.",
            },
        ],
        "paths": {
            "/api/v1/text/generate": {
                "post": _operation(
                    "generateText",
                    "generate",
                    "Answer a prompt with Avibe",
                    {_JSON: {"schema": _ref("TextGenerateRequest"), "example": _TEXT_EXAMPLE}},
                    _ref("Answer"),
                    generating,
                )
                | optional_key
            },
            "/api/v1/image/analyze": {
                "post": _operation(
                    "analyzeImage",
                    "generate",
                    "Answer a prompt about one or more pictures with Avision",
                    {
                        _JSON: {"schema": _ref("ImageAnalyzeRequest")},
                        "multipart/form-data": {"schema": _form_schema(parser)},
                    },
                    _ref("Answer"),
                    generating,
                )
                | optional_key
            },
            "/api/health": {"get": _reading("getHealth", "health", "How the service is", _ref("Health"))},
            "/api/health/ready": {
                "get": _reading(
                    "getReady", "health", "Whether every configured model serves", _ref("Ready"), {"503": _ref("Ready")}
                )
            },
            "/api/health/live": {
                "get": _reading("getLive", "health", "Whether the engine is alive", _ref("Live"), {"503": _ref("Live")})
            },
            "/api/metrics": {"get": _reading("getMetrics", "health", "Metrics as JSON", _ref("Metrics"))},
            "/api/metrics/reset": {
                "post": _operation(
                    "resetMetrics",
                    "operator",
                    "Start the sums of /api/metrics anew",
                    None,
                    _ref("Done"),
                    ("401", "403"),
                )
                | {"security": [{"operator": []}, {}]}
            },
            "/api/drain": {
                "post": _operation(
                    "drain", "operator", "Let readiness answer 503 before a stop", None, _ref("Done"), ("401", "403")
                )
                | {"security": [{"operator": []}]}
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
            "headers": _HEADERS,
            "schemas": _schemas(parser),
        },
    }


_TEXT_EXAMPLE = {"prompt": "What is the capital of France?", "max_tokens": 64, "temperature": 0}
_HEADERS: dict[str, Any] = {
    "X-Request-ID": {"schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,64}$"}},
    "X-Response-Time": {"schema": {"type": "string", "pattern": r"^\d+\.\d{3}s$"}},
    "X-Avito-Demo": {"description": "1 if an embedded demo model answered.", "schema": {"const": "1"}},
    "Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}},
}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _header_refs(*names: str) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _answer(description: str, schema: dict[str, Any], *headers: str) -> dict[str, Any]:
    return {
        "description": description,
        "headers": _header_refs("X-Request-ID", "X-Response-Time", *headers),
        "content": {_JSON: {"schema": schema}},
    }


def _operation(
    name: str,
    tag: str,
    summary: str,
    content: dict[str, Any] | None,
    success: dict[str, Any],
    errors: tuple[str, ...],
) -> dict[str, Any]:
    responses = {"200": _answer("Success", success, *(["X-Avito-Demo"] if tag == "generate" else []))}
    for status in errors:
        codes = ", ".join(code for code, number in STATUS_BY_CODE.items() if str(number) == status)
        extra = ("Retry-After",) if status == "429" else ()
        responses[status] = _answer(codes, _ref("Error"), *extra)
    if tag == "generate":
        responses["200"]["content"][_EVENTS] = {"schema": _ref("Event")}
    operation: dict[str, Any] = {"operationId": name, "tags": [tag], "summary": summary, "responses": responses}
    if content is not None:
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _reading(
    name: str, tag: str, summary: str, success: dict[str, Any], others: dict[str, dict[str, Any]] | None = None
) -> dict[str, Any]:
    responses = {"200": _answer("Success", success)}
    for status, schema in (others or {}).items():
        responses[status] = _answer("Not now", schema)
    return {"operationId": name, "tags": [tag], "summary": summary, "responses": responses}


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


def _object(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    return {"type": "object", "properties": required | optional, "required": list(required)}


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def _event(name: str, body: dict[str, Any]) -> dict[str, Any]:
    data = _STRING | {"contentMediaType": _JSON, "contentSchema": body}
    return _object({"event": {"const": name}, "data": data})


def _schemas(parser: RequestParser) -> dict[str, Any]:
    image_body = parser.image_body.model_json_schema()
    image_body["oneOf"] = [{"required": ["image"]}, {"required": ["images"]}]
    state = {"enum": ["not_configured", "loading", "ready", "failed"]}
    model = _object(
        {"state": state},
        demo=_BOOLEAN,
        device=_nullable(_STRING),
        dtype=_nullable(_STRING),
        phase=_nullable(_STRING),
        phase_seconds=_NUMBER,
        phases={"type": "object", "additionalProperties": _NUMBER},
        running=_COUNT,
        waiting=_COUNT,
    )
    models = _object({"avibe": model, "avision": model})
    checks = {"type": "object", "additionalProperties": _object({"ok": _BOOLEAN})}
    reasons = {"type": "array", "items": _STRING}
    return {
        "TextGenerateRequest": parser.text_body.model_json_schema(),
        "ImageAnalyzeRequest": image_body,
        "Answer": _object(
            {
                "success": {"const": True},
                "data": _object(
                    {
                        "model": {"enum": ["avibe", "avision"]},
                        "text": _STRING,
                        "generated_tokens": _COUNT,
                        "input_tokens": _COUNT,
                        "finish_reason": {"enum": ["stop", "length"]},
                        "demo": _BOOLEAN,
                    }
                ),
                "metrics": _object(
                    {
                        "queue_time": _NUMBER,
                        "time_to_first_token": _nullable(_NUMBER),
                        "generation_time": _NUMBER,
                        "total_time": _NUMBER,
                        "tokens_per_second": _NUMBER,
                    }
                ),
                "request_id": _STRING,
            }
        ),
        "Error": _object(
            {
                "success": {"const": False},
                "error": _object(
                    {"code": {"enum": list(STATUS_BY_CODE)}, "message": _STRING, "field": _nullable(_STRING)}
                ),
                "request_id": _STRING,
            }
        ),
        # The schema of one event describes the stream; OpenAPI has a word of its own for that from 3.2 on.
        "Event": {
            "description": 'With `"stream": true`: one of the Server-Sent Events; `data` is JSON. Deltas carry the '
            "text as it comes; last is either `done` with the whole answer or `error`. Comments may come in between.",
            "oneOf": [
                _event("delta", _object({"text": _STRING})),
                _event("done", _ref("Answer")),
                _event("error", _ref("Error")),
            ],
        },
        "Health": _object(
            {
                "status": {"enum": ["healthy", "degraded", "unhealthy"]},
                "version": _STRING,
                "uptime_seconds": _NUMBER,
                "models": models,
                "checks": checks,
                "why_not_ready": reasons,
                "demo": _BOOLEAN,
            }
        ),
        "Ready": _object(
            {"status": {"enum": ["ready", "not_ready"]}, "models": models, "checks": checks, "demo": _BOOLEAN},
            why_not_ready=reasons,
        ),
        "Live": _object(
            {
                "status": {"enum": ["alive", "dead"]},
                "engine": {"enum": ["ok", "hung", "dead"]},
                "seconds_since_last_step": _NUMBER,
            }
        ),
        "Metrics": _object(
            {
                "system": _object(dict.fromkeys(("cpu_percent", "memory_percent", "disk_percent"), _NUMBER)),
                "gpu": _object({"available": _BOOLEAN}),
                "application": _object(dict.fromkeys(_APPLICATION_METRICS, _NUMBER)),
            }
        ),
        "Done": _object({"status": _STRING}),
    }
