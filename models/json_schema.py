"""A user's JSON Schema, refused or rewritten so that the grammar library enforces all of it.

The library takes most of JSON Schema and says so where it does not, but not always: unknown keywords are ignored,
`$schema` switches others off, `x-guidance` turns its checks off, and some schemas cost it minutes or the whole process
(its own stack). So a schema is read here keyword by keyword. What comes out has only keywords that are enforced
exactly, in an order that fixes how deep the library nests, and within limits that it bears. Knows no tokens.

docs/structured-output.md is the table of what is taken and what is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

from config import Limits
from models.errors import InvalidSchema

Schema = bool | dict[str, Any]

# The order in which the library takes types, which is also that of its recursion.
_TYPES = ("null", "boolean", "number", "integer", "string", "array", "object")
# Say nothing about which values are valid. `x-` keywords are of this kind too, `x-guidance` among them.
_ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly", "discriminator"}
    | {"contentMediaType", "contentEncoding", "contentSchema", "$schema", "$comment", "$anchor", "$vocabulary"}
    | {"$defs", "definitions"}
)
# Real keywords that cannot be enforced token by token, or not by this library.
_UNSUPPORTED = frozenset(
    {"not", "if", "then", "else", "contains", "minContains", "maxContains", "propertyNames", "nullable"}
    | {"dependentSchemas", "dependentRequired", "dependencies", "additionalItems"}
    | {"unevaluatedItems", "unevaluatedProperties", "$dynamicRef", "$dynamicAnchor", "$recursiveRef"}
    | {"$recursiveAnchor"}
)
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_SIZES = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_APPLICATORS = ("const", "enum", "$ref", "allOf", "anyOf", "oneOf")
# Whole numbers beyond it have no exact double, and the library counts in doubles.
_MAX_EXACT = 2**53
# Between an exclusive bound and the first number that is written.
_LEAST_STEP = 1e-9

_DATE = (
    r"((?:[0-9]{3}[1-9]|[0-9]{2}[1-9][0-9]|[0-9][1-9][0-9]{2}|[1-9][0-9]{3})-"
    r"(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    r"|(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)-02-29)"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?(Z|[+\-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
# The library's own take the 29th of February in any year, the year 0 and leap seconds, which many parsers refuse.
_FORMAT_PATTERNS: Mapping[str, str] = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
}
FORMATS = frozenset({*_FORMAT_PATTERNS, "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"})


class Refusal(Exception):
    """What is wrong with a schema, in words that follow the name of the field."""


@dataclass(frozen=True)
class _Place:
    """Where a schema stands.

    :param is_merged: the library intersects it with others.
    :param is_open: what it allows must not be narrowed, because others are compared or intersected with it.
    """

    depth: int = 0
    is_merged: bool = False
    is_open: bool = False

    def below(self, *, is_merged: bool = False) -> _Place:
        return replace(self.marked(is_merged=is_merged), depth=self.depth + 1)

    def marked(self, *, is_merged: bool = False, is_open: bool = False) -> _Place:
        return replace(self, is_merged=self.is_merged or is_merged, is_open=self.is_open or is_open or is_merged)


@dataclass
class Spent:
    """What the schemas of one request have in them that is bounded, those that oneOf refers to counted each time."""

    num_schemas: int = 0
    num_merged_patterns: int = 0
    num_merged_multiples: int = 0
    sum_of_multiples: int = 0


def simplify(
    text: str, limits: Limits, *, field: str, is_object: bool = False, spent: Spent | None = None
) -> dict[str, Any]:
    """The schema as the library is to get it.

    :param field: the user's name of it, for errors.
    :param is_object: only objects are wanted, whatever the schema allows besides.
    :param spent: one for all schemas of a request.
    :raise InvalidSchema: it is malformed, too large, impossible, or has a keyword that cannot be enforced.
    """
    try:
        return _Simplifier(_parse(text, limits), limits, spent or Spent()).run(is_object)
    except Refusal as refusal:
        raise InvalidSchema(f"{field}: {refusal}", field=field) from None


def _parse(text: str, limits: Limits) -> Any:
    if len(text) > limits.max_schema_chars:
        raise Refusal(f"a schema must be at most {limits.max_schema_chars} characters long, got {len(text)}")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(made := dict(items)) < len(items):
            raise Refusal("the schema has a key twice in one object")
        return made

    def constant(name: str) -> None:
        raise Refusal(f"the schema is not valid JSON: {name} is no number")

    try:
        schema = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
        json.dumps(schema, ensure_ascii=False).encode()  # a half of a surrogate pair is no character
        return schema
    except RecursionError:
        raise _too_deep(limits) from None
    except ValueError:  # also a number of thousands of digits
        raise Refusal("the schema is not valid JSON") from None


def _too_deep(limits: Limits) -> Refusal:
    return Refusal(f"a schema must nest at most {limits.max_schema_depth} deep, references followed")


def _shown(name: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in name[:64])


class _Simplifier:
    """Follows references as the library does, each at its first sight: so `max_schema_depth` bounds its stack too."""

    def __init__(self, root: Any, limits: Limits, spent: Spent) -> None:
        self._root = root
        self._limits = limits
        self._definitions: dict[str, Schema] = {}
        self._names: dict[tuple[str, bool, bool], str] = {}
        self._inlined: list[str] = []
        self._spent = spent

    def run(self, is_object: bool) -> dict[str, Any]:
        root = self._root
        if is_object:
            root = _only_objects(root)
        made = self._visit(root, _Place(), is_root=True)
        if made is False or not _find_finite(made, self._definitions):
            raise Refusal("no finite value is valid against the schema")
        schema = {} if made is True else made
        return {**schema, "$defs": self._definitions} if self._definitions else schema

    def _visit(self, node: Any, place: _Place, *, is_root: bool = False) -> Schema:
        self._spent.num_schemas += 1
        if place.depth > self._limits.max_schema_depth:
            raise _too_deep(self._limits)
        if self._spent.num_schemas > self._limits.max_schema_nodes:
            raise Refusal(
                f"a schema must have at most {self._limits.max_schema_nodes} schemas in it, with those that oneOf "
                "refers to counted each time"
            )
        if isinstance(node, bool):
            return node
        if not isinstance(node, dict):
            raise Refusal("each schema must be an object, true or false")
        for name in node:
            self._check_keyword(name, node[name], is_root)
        own = self._own_keywords(node)
        applicators = [name for name in node if name in _APPLICATORS]
        num_parts = len(applicators) + bool(own.keys() - {"type"})
        inner = place.below(is_merged=num_parts > 1)
        self._visit_array(node, own, inner)
        self._visit_object(node, own, place, inner)
        self._check_multiple(own, inner)
        self._check_patterns(own, inner)
        return own | {name: self._visit_applicator(name, node[name], inner) for name in applicators}

    def _check_keyword(self, name: str, value: Any, is_root: bool) -> None:
        if name in _ANNOTATIONS or name.startswith("x-") or name in _KNOWN:
            return
        if name in ("$id", "id"):
            if is_root:
                return
            raise Refusal(f"{name} is supported at the top of the schema only")
        if name == "uniqueItems":
            if value is False:
                return
            raise Refusal("uniqueItems is not supported")
        if name in _UNSUPPORTED:
            raise Refusal(f"the JSON Schema keyword {name} is not supported")
        raise Refusal(f"{_shown(name)} is no keyword of JSON Schema")

    def _own_keywords(self, node: dict[str, Any]) -> dict[str, Any]:
        """Those without schemas below, checked."""
        own: dict[str, Any] = {}
        if "type" in node:
            own["type"] = _read_type(node["type"])
        for name in _NUMBERS:
            if name in node:
                own[name] = _read_number(name, node[name])
        if own.get("type") != "integer":
            _move_bounds(own)
        for name in _SIZES:
            if name in node:
                own[name] = _read_size(name, node[name])
        if "pattern" in node:
            own["pattern"] = self._read_pattern(node["pattern"])
        if "format" in node:
            self._read_format(node["format"], own)
        return own

    def _read_pattern(self, value: Any) -> str:
        if not isinstance(value, str):
            raise Refusal("pattern must be a string")
        _check_length("pattern", value, self._limits)
        return value

    def _read_format(self, value: Any, own: dict[str, Any]) -> None:
        if not isinstance(value, str) or value not in FORMATS:
            name = _shown(value) if isinstance(value, str) else "this"
            raise Refusal(f"format must be one of {', '.join(sorted(FORMATS))}; {name} is not supported")
        if value in _FORMAT_PATTERNS:
            if "pattern" in own:
                raise Refusal(f"pattern beside format {value} is not supported")
            own["pattern"] = _FORMAT_PATTERNS[value]
        else:
            own["format"] = value

    def _check_multiple(self, own: dict[str, Any], inner: _Place) -> None:
        """The library makes a state of each remainder, and of each combination of those that it intersects."""
        if "multipleOf" not in own:
            return
        if own["multipleOf"] <= 0:
            raise Refusal("multipleOf must be above 0")
        _, digits, _ = Decimal(str(own["multipleOf"])).as_tuple()
        self._spent.sum_of_multiples += int("".join(map(str, digits)))
        if self._spent.sum_of_multiples > self._limits.max_schema_multiples:
            raise Refusal(
                f"multipleOf: all of them together, without their decimal points, must be at most "
                f"{self._limits.max_schema_multiples}, got {self._spent.sum_of_multiples}"
            )
        self._spent.num_merged_multiples += inner.is_merged
        if self._spent.num_merged_multiples > 1:
            raise Refusal("only one multipleOf may stand in allOf, or beside $ref, anyOf or oneOf")

    def _check_patterns(self, own: dict[str, Any], inner: _Place) -> None:
        """The time to intersect expressions grows without bound in their number."""
        if inner.is_merged:
            self._spent.num_merged_patterns += ("pattern" in own) + ("format" in own)
            most = self._limits.max_schema_merged_patterns
            if self._spent.num_merged_patterns > most:
                raise Refusal(f"at most {most} pattern and format may stand in allOf, or beside $ref, anyOf or oneOf")

    def _visit_array(self, node: dict[str, Any], own: dict[str, Any], inner: _Place) -> None:
        if "prefixItems" in node:
            items = _read_list("prefixItems", node["prefixItems"])
            own["prefixItems"] = [self._visit(item, inner) for item in items]
        if "items" in node:
            if isinstance(node["items"], list):
                raise Refusal("items must be one schema; for a list of them there is prefixItems")
            own["items"] = self._visit(node["items"], inner)

    def _visit_object(self, node: dict[str, Any], own: dict[str, Any], place: _Place, inner: _Place) -> None:
        if "properties" in node:
            named = _read_object("properties", node["properties"])
            for name in named:
                _check_length("the name of a property", name, self._limits)
            own["properties"] = {name: self._visit(schema, inner) for name, schema in named.items()}
        if "patternProperties" in node:
            patterns = _read_object("patternProperties", node["patternProperties"])
            if len(patterns) > 1 or inner.is_merged:
                raise Refusal(
                    "patternProperties is supported with one expression, and neither in allOf nor beside $ref, anyOf "
                    "or oneOf"
                )
            own["patternProperties"] = {self._read_pattern(p): self._visit(s, inner) for p, s in patterns.items()}
        required = _read_names(node.get("required", []))
        for name in required:
            _check_length("the name of a property", name, self._limits)
        if "required" in node:
            own["required"] = required
        named = own.get("properties", {})
        is_narrow = not (inner.is_open or own.keys() & {"patternProperties", "minProperties", "maxProperties"})
        if "additionalProperties" in node:
            own["additionalProperties"] = self._visit(node["additionalProperties"], inner)
        elif "properties" in node and is_narrow and set(required) <= named.keys():
            # Nobody asked for others, and small models would go on inventing them: what remains is still valid.
            own["additionalProperties"] = False
        self._check_property_counts(own, set(required), inner)

    def _check_property_counts(self, own: dict[str, Any], required: set[str], inner: _Place) -> None:
        if not own.keys() & {"minProperties", "maxProperties"}:
            return
        if inner.is_merged or own.get("properties", {}).keys() - required:
            raise Refusal(
                "minProperties and maxProperties are supported where all properties are required, and neither in "
                "allOf nor beside $ref, anyOf or oneOf"
            )
        # A name that only a pattern describes may come twice, and counts once.
        if own.get("minProperties", 0) > len(required) + 1:
            raise Refusal(f"minProperties must be at most one more than what is required, {len(required) + 1}")

    def _visit_applicator(self, name: str, value: Any, inner: _Place) -> Any:
        if name == "const":
            _check_value(value, self._limits)
            return value
        if name == "$ref":
            return f"#/$defs/{self._define(_read_reference(value), inner)}"
        options = _read_list(name, value)
        if not options:
            raise Refusal(f"{name} must not be empty")
        if name == "enum":
            for option in options:
                _check_value(option, self._limits)
            return options
        if name == "allOf":
            merged = inner.marked(is_merged=len(options) > 1)
            return [self._visit(option, merged) for option in options]
        if name == "anyOf":
            return [self._visit(option, inner) for option in options]
        return [self._visit_one_of(option, inner.marked(is_open=True)) for option in options]

    def _visit_one_of(self, option: Any, place: _Place) -> Schema:
        """The library does not look behind references when it asks whether options exclude each other."""
        if isinstance(option, dict) and "$ref" in option and not option.keys() - _ANNOTATIONS - {"$ref"}:
            pointer = _read_reference(option["$ref"])
            if pointer not in self._inlined:
                self._inlined.append(pointer)
                try:
                    return self._visit_one_of(self._find(pointer), place)
                finally:
                    self._inlined.pop()
        return self._visit(option, place)

    def _define(self, pointer: str, place: _Place) -> str:
        key = pointer, place.is_merged, place.is_open
        if key not in self._names:
            name = self._names[key] = f"d{len(self._names)}"
            self._definitions[name] = True  # it may refer to itself
            self._definitions[name] = self._visit(self._find(pointer), place.below(), is_root=not pointer)
        return self._names[key]

    def _find(self, pointer: str) -> Any:
        node = self._root
        for part in pointer.split("/")[1:]:
            name = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(node, dict) and name in node:
                node = node[name]
            elif isinstance(node, list) and name.isdecimal() and len(name) < 6 and int(name) < len(node):
                node = node[int(name)]
            else:
                raise Refusal("a $ref leads nowhere")
        return node


_KNOWN = frozenset(
    {*_NUMBERS, *_SIZES, *_APPLICATORS, "type", "pattern", "format", "required", "properties", "patternProperties"}
    | {"additionalProperties", "items", "prefixItems"}
)


def _only_objects(root: Any) -> Any:
    """A schema of a tool's arguments may leave out that they are an object."""
    if root is True:
        return {"type": "object"}
    if not isinstance(root, dict):
        return root
    types = root.get("type", "object")
    if types != "object" and not (isinstance(types, list) and "object" in types):
        raise Refusal("the schema must be of type object")
    return {**root, "type": "object"}


def _read_type(value: Any) -> str | list[str]:
    given = value if isinstance(value, list) else [value]
    if not given or not all(isinstance(each, str) and each in _TYPES for each in given):
        raise Refusal(f"type must be one or several of {', '.join(_TYPES)}")
    if "number" in given:
        given = [each for each in given if each != "integer"]
    return [each for each in _TYPES if each in given] if isinstance(value, list) else str(value)


def _read_number(name: str, value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Refusal(f"{name} must be a number")
    return _check_exact(value)


def _move_bounds(own: dict[str, Any]) -> None:
    """Exclusive bounds as others a little further in: the library takes some for inclusive ({"exclusiveMinimum": 0,
    "exclusiveMaximum": 0.5} allows 0)."""
    for exclusive, inclusive, sign, pick in (
        ("exclusiveMinimum", "minimum", 1, max),
        ("exclusiveMaximum", "maximum", -1, min),
    ):
        if exclusive in own:
            bound = own.pop(exclusive)
            moved = bound + sign * max(_LEAST_STEP, 4 * math.ulp(bound))
            own[inclusive] = pick(moved, own.get(inclusive, moved))


def _check_exact(value: int | float) -> int | float:
    if isinstance(value, int) and abs(value) > _MAX_EXACT:
        raise Refusal(f"whole numbers in a schema must be between -{_MAX_EXACT} and {_MAX_EXACT}")
    if isinstance(value, float) and not math.isfinite(value):
        raise Refusal("a number in the schema is too large")
    return value


def _check_length(what: str, value: str, limits: Limits) -> None:
    """The library compares as many letters again for each one that is written."""
    most = limits.max_schema_string_chars
    if len(value) > most:
        raise Refusal(f"{what} must be at most {most} characters long, got {len(value)}")


def _read_size(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise Refusal(f"{name} must be a whole number from 0")
    if value > 2**31 - 1:
        raise Refusal(f"{name} must be at most {2**31 - 1}")
    return value


def _read_list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise Refusal(f"{name} must be a list")
    return value


def _read_object(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Refusal(f"{name} must be an object")
    return value


def _read_names(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise Refusal("required must be a list of strings")
    return list(dict.fromkeys(value))


def _read_reference(value: Any) -> str:
    """The JSON pointer: empty for the whole document."""
    if not isinstance(value, str) or not re.match(r"#(/|$)", value):
        raise Refusal("$ref must be # or begin with #/: only references within the schema are supported")
    return value[1:]


def _check_value(value: Any, limits: Limits, depth: int = 0) -> None:
    """A value of const or enum."""
    if depth > limits.max_schema_depth:
        raise _too_deep(limits)
    if isinstance(value, int | float):
        _check_exact(value)
    elif isinstance(value, str):
        _check_length("a string in const or enum", value, limits)
    elif isinstance(value, list | dict):
        for each in value.values() if isinstance(value, dict) else value:
            _check_value(each, limits, depth + 1)


def _find_finite(root: Schema, definitions: Mapping[str, Schema]) -> bool:
    """Whether some value ends, as far as references decide it: a list that must hold such a list never does.

    The library does not look for that; a model would write on to `max_tokens`.
    """
    finite: set[str] = set()
    while True:
        found = {name for name, schema in definitions.items() if _is_finite(schema, finite)}
        if found == finite:
            return _is_finite(root, finite)
        finite = found


def _is_finite(schema: Schema, finite: set[str]) -> bool:
    if isinstance(schema, bool):
        return schema
    checks: dict[str, Callable[[Any], bool]] = {
        "$ref": lambda value: value.removeprefix("#/$defs/") in finite,
        "allOf": lambda value: all(_is_finite(each, finite) for each in value),
        "anyOf": lambda value: any(_is_finite(each, finite) for each in value),
        "oneOf": lambda value: any(_is_finite(each, finite) for each in value),
    }
    if not all(check(schema[name]) for name, check in checks.items() if name in schema):
        return False
    kind = schema.get("type")
    if kind == "object":
        named = schema.get("properties", {})
        return all(_is_finite(named[name], finite) for name in schema.get("required", []) if name in named)
    if kind == "array":
        num, first = schema.get("minItems", 0), schema.get("prefixItems", [])
        rest = schema.get("items", True)
        return all(_is_finite(each, finite) for each in first[:num]) and (num <= len(first) or _is_finite(rest, finite))
    return True
