"""The pieces that the API's description is made of: references, objects, answers, operations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from responses import STATUS_BY_CODE

Schema = dict[str, Any]

JSON = "application/json"
EVENTS = "text/event-stream"
NUMBER: Schema = {"type": "number"}
STRING: Schema = {"type": "string"}
BOOLEAN: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
HEADERS: dict[str, Any] = {
    "X-Request-ID": {"schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,64}$"}},
    "X-Response-Time": {"schema": {"type": "string", "pattern": r"^\d+\.\d{3}s$"}},
    "X-Avito-Demo": {"description": "1 if an embedded demo model answered.", "schema": {"const": "1"}},
    "Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}},
}
#: Whether this server asks for keys is its operator's choice, and may change without a new description.
OPTIONAL_KEY: dict[str, Any] = {"security": [{"key": []}, {}]}


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def nullable(schema: Mapping[str, Any]) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def array(items: Mapping[str, Any]) -> Schema:
    return {"type": "array", "items": items}


def object_of(required: Mapping[str, Any], **optional: Any) -> Schema:
    """An object with these fields; others may come with a later version."""
    return {"type": "object", "properties": {**required, **optional}, "required": list(required)}


def answer(description: str, schema: Schema, *headers: str, example: object = None) -> dict[str, Any]:
    """A JSON answer. :param headers: beside those that every answer has."""
    names = ("X-Request-ID", "X-Response-Time", *headers)
    content = {"schema": schema} if example is None else {"schema": schema, "example": example}
    return {
        "description": description,
        "headers": {name: {"$ref": f"#/components/headers/{name}"} for name in names},
        "content": {JSON: content},
    }


def errors(statuses: tuple[str, ...], schema: Schema, *, without: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Status -> answer, described by the codes that have it. :param without: codes that do not come there."""
    found = {}
    for status in statuses:
        codes = [code for code, number in STATUS_BY_CODE.items() if str(number) == status and code not in without]
        found[status] = answer(", ".join(codes), schema, *(["Retry-After"] if status == "429" else []))
    return found


def operation(
    name: str,
    tag: str,
    summary: str,
    responses: Mapping[str, Any],
    content: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """:param content: of the request: media type -> what it is."""
    described: dict[str, Any] = {"operationId": name, "tags": [tag], "summary": summary, "responses": responses}
    if content is not None:
        described["requestBody"] = {"required": True, "content": content}
    return described
