"""Run by tests/test_grammars.py in a process of its own with bounded memory: compiles and starts to answer schemas that
were made to cost time, memory or the process. Prints one JSON line for each: name, outcome, seconds, peak bytes."""

from __future__ import annotations

import json
import random
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from config import Limits
from models.errors import ServiceError
from models.grammars import GrammarCompiler
from models.schemas import JsonGrammar
from tests.tiny_models import make_tokenizer

MAX_MEMORY_BYTES = 8 * 1024**3


def nested(around: Callable[[Any], Any], times: int, innermost: Any) -> Any:
    for _ in range(times):
        innermost = around(innermost)
    return innermost


def chained(num: int, link: Callable[[str], Any], last: Any) -> Any:
    """Definitions a0, a1, ..., each made of a reference to the next."""
    links = {f"a{index}": link(f"#/$defs/a{index + 1}") for index in range(num)}
    return {"$ref": "#/$defs/a0", "$defs": {**links, f"a{num}": last}}


SCHEMAS: dict[str, Any] = {
    "chain of references": chained(900, lambda ref: {"properties": {"x": {"$ref": ref}}}, {}),
    "chain seen from its end": {
        "additionalProperties": {"anyOf": [{"$ref": f"#/$defs/a{index}"} for index in range(500, -1, -1)]},
        "properties": {"x": {"$ref": "#/$defs/a0"}},
        "$defs": chained(500, lambda ref: {"properties": {"x": {"$ref": ref}}}, {})["$defs"],
    },
    "doubling allOf": chained(40, lambda ref: {"allOf": [{"$ref": ref}, {"$ref": ref}]}, {"properties": {"a": {}}}),
    "doubling anyOf": chained(40, lambda ref: {"anyOf": [{"$ref": ref}, {"$ref": ref}]}, {"type": "string"}),
    "doubling oneOf": chained(40, lambda ref: {"oneOf": [{"$ref": ref}, {"$ref": ref}]}, {"type": "string"}),
    "product of anyOf": {"allOf": [{"anyOf": [{"properties": {f"p{i}": {}}} for i in range(2)]}] * 30},
    "itself": {"$ref": "#"},
    "itself twice": {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]},
    "nested lists": nested(lambda schema: {"type": "array", "items": schema}, 1500, {}),
    "nested constant": {"const": nested(lambda value: [value], 400, 1)},
    "many optional properties": {"type": "object", "properties": {f"p{i}": {} for i in range(1900)}},
    "one of many properties": {
        "type": "object",
        "properties": {f"p{i}": {} for i in range(1900)},
        "additionalProperties": False,
        "minProperties": 1,
    },
    "many patternProperties": {"type": "object", "patternProperties": {f"^(a{i}.*b){{20}}$": {} for i in range(900)}},
    "patternProperties again and again": {
        "allOf": [{"$ref": "#/$defs/a"}] * 1000,
        "$defs": {"a": {"type": "object", "patternProperties": {"^a(b|c)*d.{20}$": {}}}},
    },
    "many patterns at once": {"allOf": [{"type": "string", "pattern": f".*a.{{{i}}}b"} for i in range(40)]},
    "many patterns to choose from": {"anyOf": [{"type": "string", "pattern": f".*a.{{{i}}}b"} for i in range(40)]},
    "exponential pattern": {"type": "string", "pattern": "(a|b)*a(a|b){200}c"},
    "ambiguous pattern": {"type": "string", "pattern": "^(a|a)*{1000}$"},
    "pattern of repetitions": {"type": "string", "pattern": "^(((((a{0,99}b?){0,99}c?){0,99}d?){0,99}){0,99}){0,99}$"},
    "pattern of many options": {"type": "string", "pattern": "(a|b)?" * 90 + "a" * 300},
    "nested pattern": {"type": "string", "pattern": "(" * 300 + "a" + ")?" * 300},
    "pattern of letters": {"type": "string", "pattern": "^[\\p{L}]{1,1000}.*[\\p{L}\\p{N}]{1000}$"},
    "long pattern": {"type": "string", "pattern": "a?" * 20_000},
    "pattern and length": {"type": "string", "pattern": "a.*b", "minLength": 100_000},
    "huge lengths": {"type": "string", "minLength": 10**9, "maxLength": 2 * 10**9},
    "huge maxItems": {"type": "array", "items": {"type": "string"}, "maxItems": 10**9},
    "huge minItems": {"type": "array", "prefixItems": [{"type": "string"}] * 900, "minItems": 10**9},
    "too huge": {"type": "array", "maxItems": 10**19},
    "many constants": {"enum": [f"k{i}" for i in range(100_000)]},
    "constants as many as fit": {"enum": [f"k{i}" for i in range(7000)]},
    "objects as constants": {"enum": [{"a": i} for i in range(4000)]},
    "long constant": {"const": "a" * 60_000},
    "many multiples": {"allOf": [{"type": "integer", "multipleOf": p} for p in (10007, 10009, 10037, 10039, 10061)]},
    "huge multiple": {"type": "integer", "multipleOf": 2**52 - 1},
    "multiple of gigabytes": {"type": "integer", "multipleOf": 9_999_991},
    "largest multiple": {"type": "number", "multipleOf": 99.73},
    "many multiples to choose from": {"anyOf": [{"type": "integer", "multipleOf": 9000 + i} for i in range(900)]},
    "many small multiples": {"type": "array", "items": {"anyOf": [{"multipleOf": i + 1} for i in range(140)]}},
    "ambiguous lists": {"type": "array", "items": {"anyOf": [{"type": "array", "items": {"type": "array"}}] * 400}},
    "recursive with many ways": {
        "$ref": "#/$defs/a",
        "$defs": {"a": {"type": "object", "properties": {f"p{i}": {"$ref": "#/$defs/a"} for i in range(900)}}},
    },
    "long Russian value where a number belongs": {"minimum": "р" * 200},
    "half a character": {"const": "\ud800"},
    "number without end": {"const": 10**4000},
}


def as_text(schema: Any) -> str:
    sys.set_int_max_str_digits(0)
    sys.setrecursionlimit(50_000)
    try:
        return json.dumps(schema)
    finally:
        sys.setrecursionlimit(1000)
        sys.set_int_max_str_digits(4300)


def outcome(compiler: GrammarCompiler, text: str, num_tokens: int) -> str:
    chosen = random.Random(1)
    try:
        constraint = compiler.compile(JsonGrammar(text), lambda: None).start()
        for _ in range(num_tokens):
            while (mask := constraint.allowed_mask()) is None:
                time.sleep(0)  # lets the other thread have the interpreter
            if (mask == compiler.stops).all():
                return "complete"
            allowed = np.flatnonzero(np.unpackbits((mask & ~compiler.stops).view(np.uint8), bitorder="little"))
            constraint.advance(int(chosen.choice(allowed)))
    except ServiceError as error:
        return error.code
    return "goes on"


def read_peak_bytes() -> int:
    """Not `getrusage`, whose peak a new process takes over from the one that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    tokenizer = make_tokenizer()
    compiler = GrammarCompiler(tokenizer, len(tokenizer), frozenset({tokenizer.eos_token_id}), Limits())
    for name, schema in SCHEMAS.items():
        text = as_text(schema)
        start = time.monotonic()
        result = outcome(compiler, text, 60)
        print(json.dumps([name, result, time.monotonic() - start, read_peak_bytes()]), flush=True)


if __name__ == "__main__":
    main()
