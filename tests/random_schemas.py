"""Schemas that nobody would write: every keyword that is taken, in any combination, valid or impossible."""

from __future__ import annotations

from random import Random
from typing import Any

NAMES = ("a", "b", "имя", 'n"q')
VALUES = (1, 2.5, "a", "да", True, None, [1], {"a": 1}, {"a": 1, "b": 2}, -3)
PATTERNS = ("^a", "b$", "[a-z]{2}", "^\\d*$", "^(x|y)+$", "^[^a]*$", "[а-я]", "^.{2,4}$", "^\\S+$", "^a?b?c?$")
TYPES = ("string", "integer", "null", "boolean", "object", "array", "number")
MAX_DEPTH = 3


def random_schema(random: Random) -> dict[str, Any]:
    schema = _schema(random, 0)
    schema["$defs"] = {"p": _schema(random, 1), "q": _schema(random, 2)}
    return schema


def _schema(random: Random, depth: int) -> dict[str, Any]:
    if depth > MAX_DEPTH:
        return random.choice([{"type": "boolean"}, {"const": random.choice(VALUES)}, {"enum": ["a", 2]}])
    make = random.choice(
        [_string, _integer, _number, _array, _object, _object, _combined, _combined, _several, _beside]
    )
    return make(random, depth + 1)


def _schemas(random: Random, depth: int, most: int) -> list[dict[str, Any]]:
    return [_schema(random, depth) for _ in range(random.randint(1, most))]


def _some(random: Random, **keywords: Any) -> dict[str, Any]:
    return {name: value for name, value in keywords.items() if random.random() < 0.4}


def _string(random: Random, _: int) -> dict[str, Any]:
    some = _some(random, minLength=random.randint(0, 3), pattern=random.choice(PATTERNS))
    return {"type": "string", "maxLength": random.randint(2, 6), **some}


def _integer(random: Random, _: int) -> dict[str, Any]:
    upper = random.choice(["maximum", "exclusiveMaximum"])
    some = _some(random, minimum=random.randint(-20, 20), multipleOf=random.choice([2, 3, 5]))
    return {"type": random.choice(["integer", ["integer", "null"]]), upper: random.randint(0, 50), **some}


def _number(random: Random, _: int) -> dict[str, Any]:
    names = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
    bounds = {name: round(random.uniform(-3, 3), random.randint(0, 2)) for name in names}
    return {"type": "number", **_some(random, **bounds)}


def _array(random: Random, depth: int) -> dict[str, Any]:
    some = _some(random, items=_schema(random, depth), prefixItems=_schemas(random, depth, 2), minItems=1)
    return {"type": "array", "maxItems": random.randint(1, 3), **some}


def _object(random: Random, depth: int) -> dict[str, Any]:
    named = {name: _schema(random, depth) for name in random.sample(NAMES, random.randint(1, 3))}
    others = random.choice([False, True, {"type": "integer", "maximum": 5}, {"type": "boolean"}])
    required = random.sample([*NAMES, "z"], random.randint(1, 2))
    some = _some(random, properties=named, required=required, additionalProperties=others)
    if random.random() < 0.2:
        some["patternProperties"] = {random.choice(["^a", "x$", "^[a-c]+$"]): _schema(random, depth)}
    return {"type": "object", **some, **(_some(random, minProperties=1) if "properties" not in some else {})}


def _combined(random: Random, depth: int) -> dict[str, Any]:
    name = random.choice(["anyOf", "oneOf", "allOf", "$ref", "enum", "const"])
    if name == "$ref":
        return {name: random.choice(["#/$defs/p", "#/$defs/q", "#"])}
    if name == "const":
        return {name: random.choice(VALUES)}
    return {name: random.sample(VALUES, 3) if name == "enum" else _schemas(random, depth, 3)}


def _several(random: Random, _: int) -> dict[str, Any]:
    return {"type": random.sample(TYPES, 2), "maxLength": 3, "maxItems": 1, "maximum": 9}


def _beside(random: Random, depth: int) -> dict[str, Any]:
    beside = {random.choice(["anyOf", "allOf"]): _schemas(random, depth, 2)} if random.random() < 0.5 else {}
    return {**_schema(random, depth), **_schema(random, depth), **beside}
