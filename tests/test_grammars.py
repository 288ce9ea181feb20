"""Answers held to a schema: whatever a model writes is valid, and no schema harms the service.

The "model" draws from what the mask allows, with a liking for what ends things, so that answers get complete.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import date, datetime
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from jsonschema import Draft202012Validator, FormatChecker

from config import PROJECT_ROOT, Limits
from models.engine.loop import EngineLoop
from models.engine.scheduler import SchedulerLimits
from models.engine.sequence import TokenConstraint
from models.errors import InternalError, InvalidSchema, QueueFull, RequestCancelled, ServiceError
from models.grammars import GrammarCompiler
from models.json_schema import _KNOWN, FORMATS, simplify
from models.schemas import JsonGrammar, SamplingParams, ToolFunction, ToolGrammar
from tests.fakes import GENEROUS_S
from tests.hostile_schemas import SCHEMAS as HOSTILE
from tests.random_schemas import random_schema
from tests.test_runner import Served, make_sequence, qwen3
from tests.tiny_models import make_tokenizer

__all__ = ["qwen3"]  # a fixture

SEEDS = range(8)
MAX_TOKENS = 400
NUM_RANDOM_SCHEMAS = 400
# More than the tokenizer has words, and no multiple of 32.
NUM_SPARE_WORDS = 37
SLOWEST_SCHEMA_S = 20.0
MAX_PEAK_BYTES = 2 * 1024**3

SCHEMAS: dict[str, Any] = {
    "nested objects": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 6},
            "address": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 6}, "zip": {"type": "integer", "maximum": 99}},
                "required": ["city"],
            },
        },
        "required": ["name", "address"],
    },
    "Russian names and values": {
        "type": "object",
        "properties": {"имя": {"type": "string", "maxLength": 8}, "цвет": {"enum": ["красный", "синий", "ёж"]}},
        "required": ["имя", "цвет"],
    },
    "constants of all types": {"enum": ["да", 'a"b\\c\n', 3, -2.5, True, None, [1, "x"], {"a": {"b": []}}]},
    "constant object": {"const": {"kind": "a", "value": [1, 2.5, None]}},
    "list of numbers": {"type": "array", "items": {"type": "number", "minimum": -1.5, "maximum": 12.25}, "maxItems": 4},
    "list with both bounds": {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 3},
    "tuple": {"type": "array", "prefixItems": [{"type": "boolean"}, {"enum": ["x"]}], "items": False, "minItems": 2},
    "integers within bounds": {"type": "integer", "minimum": -7, "exclusiveMaximum": 105},
    "exclusive bounds": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.5},
    "multiples": {"type": "integer", "multipleOf": 5, "minimum": -100, "maximum": 100},
    "length of a string": {"type": "string", "minLength": 2, "maxLength": 5},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-\\d{3}(/[a-z]+)?$", "maxLength": 12},
    "Russian pattern": {"type": "string", "pattern": "^[А-ЯЁ][а-яё]{1,6}$"},
    "pattern anywhere": {"type": "string", "pattern": "ab|cd", "maxLength": 8},
    "optional properties": {
        "type": "object",
        "properties": {name: {"type": "boolean"} for name in "abcde"},
        "required": ["c"],
        "additionalProperties": False,
    },
    "map": {"type": "object", "additionalProperties": {"type": "integer", "minimum": 0, "maximum": 9}},
    "named and others": {
        "type": "object",
        "properties": {"a": {"type": "integer", "maximum": 5}},
        "additionalProperties": {"type": "string", "maxLength": 3},
    },
    "names by pattern": {
        "type": "object",
        "patternProperties": {"^x[0-9]$": {"type": "boolean"}},
        "additionalProperties": False,
    },
    "at least one": {"type": "object", "minProperties": 1, "additionalProperties": {"const": 1}},
    "anyOf": {
        "anyOf": [
            {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]},
            {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
            {"const": "нет"},
        ]
    },
    "anyOf beside properties": {
        "type": "object",
        "properties": {"kind": {"enum": ["a", "b"]}, "n": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["kind"],
        "anyOf": [{"required": ["n"]}, {"properties": {"kind": {"const": "a"}}}],
        "additionalProperties": {"type": "null"},
    },
    "oneOf by a constant": {
        "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}],
        "discriminator": {"propertyName": "kind"},
        "$defs": {
            "cat": {
                "type": "object",
                "properties": {"kind": {"const": "cat"}, "lives": {"type": "integer", "minimum": 1, "maximum": 9}},
                "required": ["kind", "lives"],
                "additionalProperties": False,
            },
            "dog": {
                "type": "object",
                "properties": {"kind": {"const": "dog"}, "is_good": {"type": "boolean"}},
                "required": ["kind"],
                "additionalProperties": False,
            },
        },
    },
    "allOf": {
        "allOf": [
            {"$ref": "#/$defs/base"},
            {"type": "object", "properties": {"extra": {"type": "boolean"}}, "required": ["extra"]},
        ],
        "$defs": {"base": {"type": "object", "properties": {"id": {"type": "integer", "maximum": 9}}}},
    },
    "tree": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "integer", "minimum": 0, "maximum": 9},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
                },
                "required": ["value"],
            }
        },
    },
    "linked list through the root": {
        "type": "object",
        "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
        "required": ["next"],
    },
    "reference by an escaped pointer": {
        "$ref": "#/$defs/a~1b%20c~0",
        "$defs": {"a/b c~": {"type": "array", "items": {"$ref": "#/$defs/д"}, "maxItems": 2}, "д": {"const": 1}},
    },
    "several types": {"type": ["integer", "null", "boolean"], "minimum": 3, "maximum": 30},
    **{f"format {name}": {"type": "string", "format": name, "maxLength": 300} for name in sorted(FORMATS)},
}

formats = FormatChecker(("email", "ipv4", "ipv6", "date"))


def is_duration(text: str) -> bool:
    parts = re.fullmatch(r"P(\d+W|(\d+Y)?(\d+M)?(\d+D)?(T(\d+H)?(\d+M)?(\d+S)?)?)", text, re.ASCII)
    return parts is not None and text[-1] not in "PT"


def is_hostname(text: str) -> bool:
    return all(re.fullmatch(r"[a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?", label) for label in text.split("."))


def is_uri(text: str) -> bool:
    return bool(urlsplit(text).scheme) and not set(text) & set(' <>"{}|\\^`')


# Those that jsonschema leaves to packages of their own.
FORMAT_CHECKS: dict[str, Callable[[str], bool]] = {
    "date-time": lambda text: datetime.fromisoformat(text).tzinfo is not None,
    "time": lambda text: datetime.fromisoformat(f"2000-01-01T{text}").tzinfo is not None,
    "uuid": lambda text: str(uuid.UUID(text)) == text.lower(),
    "duration": is_duration,
    "hostname": is_hostname,
    "uri": is_uri,
}
for name, check in FORMAT_CHECKS.items():
    formats.checks(name, raises=ValueError)(check)


class Model:
    """A tokenizer, its grammar compiler, and who answers."""

    def __init__(self, tokenizer: Any, **options: Any) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = len(tokenizer) + NUM_SPARE_WORDS
        self.stop_ids = frozenset(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
        options = {"limits": Limits(), **options}
        # One that the model does not have is no stop id of its answers.
        self.compiler = GrammarCompiler(tokenizer, self.vocab_size, self.stop_ids | {self.vocab_size + 5}, **options)
        words = [tokenizer.decode([token_id]) for token_id in range(len(tokenizer))]
        self.closing = {token_id for token_id, word in enumerate(words) if set(word) & set('"]}')}

    def compile(self, schema: Any, **options: Any) -> Any:
        return self.compiler.compile(JsonGrammar(json.dumps(schema), **options), lambda: None)

    def allowed(self, constraint: TokenConstraint) -> set[int]:
        mask = wait_for_mask(constraint)
        assert mask.shape == (-(-self.vocab_size // 32),) and mask.dtype == np.int32
        return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())

    def answer(self, constraint: TokenConstraint, seed: int, is_complete: Callable[[str], bool]) -> str | None:
        """A drawn answer, or None if it got too long. On the way: stop ids are allowed all or none, and only where the
        text is complete; of the added vocabulary nothing else, and no id without a word."""
        draw, ids = random.Random(seed), list[int]()
        tags = set(self.tokenizer.convert_tokens_to_ids(["<tool_call>", "</tool_call>"]))
        added = set(self.tokenizer.added_tokens_decoder) - tags
        for _ in range(MAX_TOKENS):
            allowed = self.allowed(constraint)
            assert max(allowed) < len(self.tokenizer)
            assert allowed & added in (self.stop_ids, set())
            text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
            if allowed >= self.stop_ids:
                assert is_complete(text), text
            liked = allowed & self.stop_ids or allowed & self.closing
            chosen = draw.choice(sorted(liked if liked and draw.random() < 0.4 else allowed))
            constraint.advance(chosen)
            if chosen in self.stop_ids:
                assert self.allowed(constraint) == self.stop_ids, "after the end only the end"
                return text
            ids.append(chosen)
        return None


def wait_for_mask(constraint: TokenConstraint) -> Any:
    deadline = time.monotonic() + GENEROUS_S
    while (mask := constraint.allowed_mask()) is None:
        assert time.monotonic() < deadline
        time.sleep(0)
    return mask


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(make_tokenizer())


@pytest.fixture(scope="module")
def plain_model() -> Model:
    """Without tokens of its own for tool calls."""
    return Model(make_tokenizer(()))


def validity(schema: Any) -> Callable[[str], bool]:
    validator = Draft202012Validator(schema, format_checker=formats)

    def is_complete(text: str) -> bool:
        try:
            return bool(validator.is_valid(json.loads(text)))
        except ValueError:
            return False

    return is_complete


# What is promised.


@pytest.mark.parametrize("name", SCHEMAS)
def test_finished_answers_are_valid(model: Model, name: str) -> None:
    schema = SCHEMAS[name]
    Draft202012Validator.check_schema(schema)
    compiled = model.compile(schema)
    answers = [model.answer(compiled.start(), seed, validity(schema)) for seed in SEEDS]
    assert any(answer is not None for answer in answers)
    assert len(set(answers)) > 1 or "const" in schema


def test_answers_to_random_schemas_are_valid(model: Model) -> None:
    """Refused or enforced, whatever stands beside what."""
    num_answers = num_refused = 0
    for seed in range(NUM_RANDOM_SCHEMAS):
        schema = random_schema(random.Random(seed))
        try:
            compiled = model.compile(schema)
            for draw in range(2):
                num_answers += model.answer(compiled.start(), draw, validity(schema)) is not None
        except InvalidSchema:
            num_refused += 1
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {json.dumps(schema, ensure_ascii=False)}") from error
        except RecursionError:  # jsonschema's, where a schema refers to itself and to nothing else
            continue
    assert num_answers > num_refused > 0


def test_any_object_will_do_where_no_schema_is_given(model: Model) -> None:
    compiled = model.compiler.compile(JsonGrammar(), lambda: None)
    answers = [model.answer(compiled.start(), seed, validity({"type": "object"})) for seed in range(30)]
    assert any(answer is not None and json.loads(answer) for answer in answers)


@pytest.mark.parametrize("year", [1900, 1904, 2000, 2023, 2024, 2100])
def test_dates_are_those_of_the_calendar(year: int) -> None:
    pattern = simplify('{"format": "date"}', Limits(), field="f")["pattern"]
    for month in range(14):
        for day in range(33):
            text = f"{year}-{month:02}-{day:02}"
            with suppress(ValueError):
                assert date.fromisoformat(text) and re.search(pattern, text)
                continue
            assert not re.search(pattern, text), text
    assert not re.search(pattern, "0000-01-01")


def can_write(model: Model, schema: Any, text: str) -> bool:
    """Whether the grammar allows this text, letter by letter."""
    constraint = model.compile(schema).start()
    for byte in text.encode():
        token_id = model.tokenizer.convert_tokens_to_ids(byte_letter(byte))
        if token_id not in model.allowed(constraint):
            return False
        constraint.advance(token_id)
    return model.allowed(constraint) >= model.stop_ids


def byte_letter(byte: int) -> str:
    """How a byte-level vocabulary writes a byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [each for each in range(256) if each not in shown]
    return chr(byte) if byte in shown else chr(256 + hidden.index(byte))


OPEN = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": True}


@pytest.mark.parametrize(
    ("schema", "text", "expected"),
    [
        (OPEN, '{"a": 1, "b": "x"}', True),
        (OPEN, '{"a":1,"b":[1,2, {}]}', True),
        (OPEN, '{"a":  1}', False),
        (OPEN, '{ "a": 1}', False),
        (OPEN, '{"a": 1\n}', False),
        (OPEN, '{"b": 1, "a": "no integer"}', False),
        (OPEN, r'{"\u0061": "no integer"}', False),
        ({"type": "object", "properties": {"a": {}}}, '{"b": 1}', False),
        ({"type": "object", "properties": {"a": {}}}, "{}", True),
        ({"type": "object"}, '{"b": 1}', True),
        ({"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}, '{"a": 1, "b": 1}', True),
        ({"type": "object", "anyOf": [{"properties": {"a": {}}}]}, '{"b": 1}', False),
        ({"type": "object", "properties": {"a": {}}, "required": ["b"]}, '{"b": 1}', True),
        ({"type": "string"}, '"Съешь ещё 🎉"', True),
        ({"type": "string"}, r'"\u0421"', False),
        ({"type": "string"}, '"<tool_call><|im_end|>"', True),
        ({"type": "integer"}, "1.0", False),
        ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.5}, "0", False),
        ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.5}, "0.001", True),
        ({"type": "number", "minimum": -105.3, "exclusiveMaximum": -105}, "-105", False),
        ({"type": "integer", "minimum": -105, "exclusiveMaximum": 1}, "0", True),
        ({"$schema": "http://json-schema.org/draft-04/schema#", "const": 1}, "2", False),
        ({"x-guidance": {"lenient": True, "whitespace_flexible": True}, "type": "array"}, "[ ]", False),
        (True, '{"a": [null, "x"]}', True),
    ],
)
def test_what_may_be_written(model: Model, schema: Any, text: str, expected: bool) -> None:
    assert can_write(model, schema, text) is expected


def test_token_that_is_not_allowed_is_an_error(model: Model) -> None:
    for wrong in (*model.stop_ids, model.tokenizer.convert_tokens_to_ids("x"), model.vocab_size + 100):
        constraint = model.compile({"type": "object"}).start()
        with pytest.raises(InternalError, match="does not allow"):
            constraint.advance(wrong)


def test_sequences_of_one_grammar_do_not_share_their_place(model: Model) -> None:
    compiled = model.compile({"enum": ["x", "у"]})
    first, second = compiled.start(), compiled.start()
    before = model.allowed(second)
    first.advance(model.tokenizer.convert_tokens_to_ids('"'))
    assert model.allowed(first) != before == model.allowed(second)


# Tool calls.

WEATHER = ToolFunction(
    "get_weather",
    json.dumps({"type": "object", "properties": {"город": {"enum": ["Москва", "Тверь"]}}, "required": ["город"]}),
)
CLOCK = ToolFunction("clock", '{"properties": {}}')


def are_calls(functions: tuple[ToolFunction, ...], is_single: bool) -> Callable[[str], bool]:
    def is_complete(text: str) -> bool:
        found = re.findall(r"<tool_call>\n(.*)\n</tool_call>", text)
        if not found or text != "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in found):
            return False
        known = {function.name: json.loads(function.parameters) for function in functions}
        calls = [json.loads(call) for call in found]
        return (len(calls) == 1 or not is_single) and all(
            set(call) == {"name", "arguments"}
            and Draft202012Validator(known[call["name"]]).is_valid(call["arguments"])
            and isinstance(call["arguments"], dict)
            for call in calls
        )

    return is_complete


@pytest.mark.parametrize("is_single", [True, False])
@pytest.mark.parametrize("name", ["model", "plain_model"])
def test_tool_calls_are_calls_of_the_tools(name: str, is_single: bool, request: pytest.FixtureRequest) -> None:
    model: Model = request.getfixturevalue(name)
    grammar = ToolGrammar((WEATHER, CLOCK), is_single)
    compiled = model.compiler.compile(grammar, lambda: None)
    is_complete = are_calls(grammar.functions, is_single)
    answers = [model.answer(compiled.start(), seed, is_complete) for seed in range(30)]
    texts = "".join(answer for answer in answers if answer)
    assert "get_weather" in texts and "clock" in texts
    assert any(answer and answer.count("<tool_call>") > 1 for answer in answers) is not is_single


def test_tags_of_a_call_are_the_tokenizers_own_tokens_where_it_has_them(model: Model, plain_model: Model) -> None:
    grammar = ToolGrammar((CLOCK,))
    (tag,) = model.allowed(model.compiler.compile(grammar, lambda: None).start())
    assert tag == model.tokenizer.convert_tokens_to_ids("<tool_call>")
    first = plain_model.allowed(plain_model.compiler.compile(grammar, lambda: None).start())
    assert {plain_model.tokenizer.decode([token_id])[0] for token_id in first} == {"<"}


def test_calls_come_to_an_end(model: Model) -> None:
    few = Model(model.tokenizer, limits=Limits(max_tool_calls=2))
    constraint = few.compiler.compile(ToolGrammar((CLOCK,)), lambda: None).start()
    num_calls = 0
    while (going_on := few.allowed(constraint) - few.stop_ids) and num_calls < 5:
        chosen = min(going_on)
        num_calls += chosen == few.tokenizer.convert_tokens_to_ids("<tool_call>")
        constraint.advance(chosen)
    assert num_calls == 2


@pytest.mark.parametrize("parameters", ['{"type": "string"}', "[]", "false", '{"type": ["string", "null"]}'])
def test_parameters_that_are_no_object_are_refused(model: Model, parameters: str) -> None:
    with pytest.raises(InvalidSchema, match=r"^tools: ") as caught:
        model.compiler.compile(ToolGrammar((ToolFunction("f", parameters),)), lambda: None)
    assert caught.value.field == "tools"


def test_parameters_of_all_tools_together_have_a_limit(model: Model) -> None:
    grammar = ToolGrammar((ToolFunction("f", '{"type": "object"}'),) * 4)
    Model(model.tokenizer, limits=Limits(max_schema_chars=72)).compiler.compile(grammar, lambda: None)
    with pytest.raises(InvalidSchema, match=r"at most 71 .*got 72"):
        Model(model.tokenizer, limits=Limits(max_schema_chars=71)).compiler.compile(grammar, lambda: None)


@pytest.mark.parametrize(
    "limits", [{"max_schema_nodes": 5}, {"max_schema_multiples": 11}, {"max_schema_merged_patterns": 1}]
)
def test_tools_of_one_request_share_its_limits(model: Model, limits: dict[str, int]) -> None:
    schema = {"properties": {"a": {"multipleOf": 6}, "b": {"allOf": [{"pattern": "a"}, True]}}}
    tools = (ToolFunction("f", json.dumps(schema)),)
    few = Model(model.tokenizer, limits=replace(Limits(), **limits))
    few.compiler.compile(ToolGrammar(tools), lambda: None)
    with pytest.raises(InvalidSchema, match=str(*limits.values())):
        few.compiler.compile(ToolGrammar(tools * 2), lambda: None)


# What is taken, and what is refused.


def documented() -> list[tuple[str, str, str]]:
    text = (PROJECT_ROOT / "docs" / "structured-output.md").read_text(encoding="utf-8")
    rows = [re.fullmatch(r"\| `([^`]+)` \| `(\{.*?\})` \| (yes|no)\b.*\|", line) for line in text.split("\n")]
    return [(row[1], row[2], row[3]) for row in rows if row]


def test_the_table_has_every_keyword_that_is_taken(model: Model) -> None:
    assert len(documented()) > 40
    assert {keyword for keyword, _, taken in documented() if taken == "yes"} - {"title"} == _KNOWN


@pytest.mark.parametrize(("keyword", "schema", "taken"), documented())
def test_each_line_of_the_table_is_true(model: Model, keyword: str, schema: str, taken: str) -> None:
    assert f'"{keyword}":' in schema
    if taken == "yes":
        model.compiler.compile(JsonGrammar(schema), lambda: None)
        return
    with pytest.raises(InvalidSchema) as caught:
        model.compiler.compile(JsonGrammar(schema, field="text.format"), lambda: None)
    assert caught.value.field == "text.format" and caught.value.message.startswith("text.format: ")
    assert keyword in caught.value.message


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ("{", "not valid JSON"),
        ('"object"', "must be an object"),
        ('{"type": "object", "type": "array"}', "twice"),
        ('{"minimum": NaN}', "NaN"),
        ('{"minimum": 1e999}', "too large"),
        ('{"const": 9007199254740993}', "9007199254740992"),
        ('{"minimum": true}', "minimum must be a number"),
        ('{"minLength": 1.5}', "minLength must be a whole number"),
        ('{"maxItems": -1}', "maxItems must be a whole number"),
        ('{"maxItems": 4294967296}', "maxItems must be at most 2147483647"),
        ('{"type": "text"}', "type must be one"),
        ('{"type": []}', "type must be one"),
        ('{"properties": []}', "properties must be an object"),
        ('{"properties": {"a": 1}}', "must be an object, true or false"),
        ('{"required": ["a", 1]}', "required must be a list of strings"),
        ('{"anyOf": []}', "anyOf must not be empty"),
        ('{"anyOf": {}}', "anyOf must be a list"),
        ('{"enum": []}', "enum must not be empty"),
        ('{"$ref": "#/$defs/none"}', "leads nowhere"),
        ('{"$ref": "#/enum/5", "enum": [1]}', "leads nowhere"),
        ('{"properties": {"a": {"$id": "x"}}}', r"\$id is supported at the top"),
        ('{"multipleOf": 0}', "multipleOf must be above 0"),
        ('{"type": "string", "format": "date", "pattern": "^2"}', "pattern beside format date"),
        # Nothing can be valid.
        ("false", "no finite value"),
        ('{"type": "integer", "minimum": 5, "maximum": 4}', "nothing can be valid"),
        ('{"type": "string", "minLength": 3, "maxLength": 2}', "nothing can be valid"),
        ('{"type": "string", "enum": [1, 2]}', "nothing can be valid"),
        ('{"type": "string", "pattern": "^a$", "minLength": 2}', "nothing can be valid"),
        ('{"type": "object", "properties": {"a": false}, "required": ["a"]}', "no finite value"),
        ('{"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}', "no finite value"),
        ('{"type": "array", "items": {"$ref": "#"}, "minItems": 1}', "no finite value"),
    ],
)
def test_mistake_in_a_schema_is_told(model: Model, schema: str, words: str) -> None:
    with pytest.raises(InvalidSchema, match=f"^response_format: .*{words}"):
        model.compiler.compile(JsonGrammar(schema), lambda: None)


@pytest.mark.parametrize(
    ("limit", "most", "taken", "refused"),
    [
        ("max_schema_chars", 20, '{"const": "aaaaaaa"}', '{"const": "aaaaaaaa"}'),
        ("max_schema_depth", 2, '{"items": {"items": {}}}', '{"items": {"items": {"items": {}}}}'),
        ("max_schema_depth", 1, '{"const": [1]}', '{"const": [[1]]}'),
        ("max_schema_nodes", 3, '{"anyOf": [{}, {"type": "null"}]}', '{"anyOf": [{}, {}, {"type": "null"}]}'),
        ("max_schema_multiples", 30, '{"items": {"multipleOf": 2.5}, "multipleOf": 5}', '{"multipleOf": 31}'),
        ("max_schema_string_chars", 3, '{"pattern": "abc"}', '{"pattern": "abcd"}'),
        ("max_schema_string_chars", 3, '{"enum": ["abc"]}', '{"enum": ["abcd"]}'),
        ("max_schema_string_chars", 3, '{"properties": {"abc": {}}}', '{"properties": {"abcd": {}}}'),
        ("max_schema_string_chars", 3, '{"required": ["abc"]}', '{"required": ["abcd"]}'),
        (
            "max_schema_merged_patterns",
            1,
            '{"allOf": [{"pattern": "a"}, {}]}',
            '{"allOf": [{"pattern": "a"}, {"pattern": "b"}]}',
        ),
        (
            "max_schema_merged_patterns",
            1,
            '{"allOf": [{"format": "email"}, {}]}',
            '{"allOf": [{"format": "email", "pattern": "b"}, {}]}',
        ),
    ],
)
def test_limit_is_the_last_value_that_passes(limit: str, most: int, taken: str, refused: str) -> None:
    bounds = replace(Limits(), **{limit: most})
    simplify(taken, bounds, field="f")
    with pytest.raises(InvalidSchema, match=rf"^f: .*\b{most}\b"):
        simplify(refused, bounds, field="f")


def test_no_hostile_schema_costs_the_process_much_time_or_memory() -> None:
    """In a process of its own: some of these would end it without the limits."""
    command = [sys.executable, "-m", "tests.hostile_schemas"]
    run = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=300, check=False)
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert run.returncode == 0, f"ended in {list(HOSTILE)[len(lines)]}: {run.stderr[-500:]}"
    assert [name for name, *_ in lines] == list(HOSTILE)
    for name, outcome, seconds, peak_bytes in lines:
        assert outcome in ("complete", "goes on", "invalid_schema"), name
        assert seconds < SLOWEST_SCHEMA_S, name
        assert peak_bytes < MAX_PEAK_BYTES, name


# Compiling: once, apart from requests, bounded. The matcher is a fake.


@dataclass
class FakeMatcher:
    """Allows everything but stop ids. `gate` holds masks back, `fault` makes them fail."""

    num_words: int
    gate: threading.Event | None = None
    fault: str = ""
    raises: BaseException | None = None
    words: str = ""
    num_masks: list[int] = field(default_factory=lambda: [0])

    def deep_copy(self) -> FakeMatcher:
        return replace(self)

    def compute_bitmask(self) -> bytes:
        self.num_masks[0] += 1
        return b"\xff" * (4 * self.num_words)

    def consume_token(self, token_id: int, /) -> bool:
        if self.gate is not None:
            assert self.gate.wait(GENEROUS_S)
        if self.raises is not None:
            raise self.raises
        self.words = self.fault
        return not self.words

    def is_accepting(self) -> bool:
        return True

    def is_stopped(self) -> bool:
        return False

    def is_error(self) -> bool:
        return bool(self.words)

    def get_error(self) -> str:
        return self.words


class Workshop:
    """A compiler with fake matchers: counts what was made, and holds it back while `gate` is closed."""

    def __init__(self, tokenizer: Any, **limits: Any) -> None:
        self.now = 0.0
        self.sources: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Semaphore(0)
        self.options: dict[str, Any] = {}
        limits = {"client_check_interval_s": 0.001, **limits}
        self.letter = tokenizer.convert_tokens_to_ids("x")
        self.model = Model(
            tokenizer,
            limits=replace(Limits(), **limits),
            clock=lambda: self.now,
            make_matcher=self._make,
        )

    def _make(self, source: str) -> FakeMatcher:
        self.sources.append(source)
        self.begun.release()
        assert self.gate.wait(GENEROUS_S)
        if isinstance(self.options.get("panic"), BaseException):
            raise self.options["panic"]
        options = {name: value for name, value in self.options.items() if name != "panic"}
        return FakeMatcher(-(-self.model.vocab_size // 32), **options)

    def compile(self, schema: Any, check: Callable[[], None] = lambda: None) -> Any:
        return self.model.compiler.compile(JsonGrammar(json.dumps(schema)), check)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def test_equal_schemas_are_compiled_once(tokenizer: Any) -> None:
    shop = Workshop(tokenizer)
    for schema in ({"const": 1}, {"const": 2}, {"const": 1, "title": "T"}, {"const": 1}):
        shop.compile(schema)
    assert len(shop.sources) == 2


def test_requests_at_the_same_time_share_one_compilation(tokenizer: Any) -> None:
    shop = Workshop(tokenizer)
    shop.gate.clear()
    waiting = threading.Semaphore(0)
    with ThreadPoolExecutor(8) as pool:
        made = [pool.submit(shop.compile, {"const": 1}, waiting.release) for _ in range(8)]
        for _ in made:
            assert waiting.acquire(timeout=GENEROUS_S)
        shop.gate.set()
        assert len({id(each.result(GENEROUS_S)._compiled) for each in made}) == 1
    assert len(shop.sources) == 1


def test_least_recently_used_grammar_goes_first(tokenizer: Any) -> None:
    shop = Workshop(tokenizer, max_cached_grammars=2)
    for value in (1, 2, 1, 3, 1, 2):
        shop.compile({"const": value})
    assert [re.findall(r'"const": (\d)', source)[0] for source in shop.sources] == list("1232")


def test_long_grammars_leave_less_room_for_others(tokenizer: Any) -> None:
    shop = Workshop(tokenizer, max_cached_grammar_chars=400)
    for value in ("a" * 250, "b", "a" * 250, "c", "c"):
        shop.compile({"const": value})
    assert len(shop.sources) == 4


def test_refusal_of_the_library_is_kept_and_told_in_our_words(tokenizer: Any) -> None:
    shop = Workshop(tokenizer)
    shop.options = {"words": "regex parse error: SECRET"}
    for field_name in ("response_format", "text.format"):
        with pytest.raises(InvalidSchema, match=f"^{re.escape(field_name)}: pattern: ") as caught:
            shop.model.compiler.compile(JsonGrammar('{"const": 1}', field=field_name), lambda: None)
        assert "SECRET" not in caught.value.message
    assert len(shop.sources) == 1


class Panic(BaseException):
    """As the library's: no Exception."""


def test_panic_of_the_library_while_compiling_is_a_refusal(tokenizer: Any) -> None:
    shop = Workshop(tokenizer)
    shop.options = {"panic": Panic("SECRET")}
    with pytest.raises(InvalidSchema, match="too complex"):
        shop.compile({"const": 1})


def test_request_that_ended_does_not_wait_for_its_schema(tokenizer: Any) -> None:
    shop = Workshop(tokenizer, max_concurrent_compiles=1)
    shop.gate.clear()

    def leave_when_begun() -> None:
        if shop.begun.acquire(blocking=False):
            raise RequestCancelled

    with pytest.raises(RequestCancelled):
        shop.compile({"const": 1}, leave_when_begun)

    calls = []

    def leave_at_second_look() -> None:
        calls.append(1)
        if len(calls) > 1:
            raise RequestCancelled

    with pytest.raises(RequestCancelled):
        shop.compile({"const": 2}, leave_at_second_look)
    shop.gate.set()
    shop.compile({"const": 3})
    assert len(shop.sources) == 2, "what nobody waits for is not begun"
    shop.compile({"const": 1})
    assert len(shop.sources) == 2, "what was begun is finished and kept"


def test_schema_that_takes_too_long_and_those_behind_it_get_different_errors(tokenizer: Any) -> None:
    shop = Workshop(tokenizer, max_concurrent_compiles=1, schema_timeout_s=7.0)
    shop.gate.clear()

    def let_time_pass() -> None:
        shop.now += 3.0

    with pytest.raises(InvalidSchema, match="longer than 7 s"):
        shop.compile({"const": 1}, let_time_pass)
    with pytest.raises(QueueFull) as caught:
        shop.compile({"const": 2}, let_time_pass)
    assert caught.value.retry_after_s == 7
    shop.gate.set()
    shop.compile({"const": 3})
    assert len(shop.sources) == 2


def test_only_so_many_schemas_wait(tokenizer: Any) -> None:
    shop = Workshop(tokenizer, max_concurrent_compiles=1, max_waiting_compiles=2)
    shop.gate.clear()
    waiting = threading.Semaphore(0)
    with ThreadPoolExecutor(2) as pool:
        made = [pool.submit(shop.compile, {"const": value}, waiting.release) for value in (1, 2)]
        for _ in made:
            assert waiting.acquire(timeout=GENEROUS_S)
        with pytest.raises(QueueFull):
            shop.compile({"const": 3})
        shop.gate.set()
        for each in made:
            each.result(GENEROUS_S)
    shop.compile({"const": 3})


# Masks: apart from the loop, bounded.


def test_mask_is_none_until_it_is_computed(tokenizer: Any) -> None:
    shop = Workshop(tokenizer)
    shop.options = {"gate": threading.Event()}
    constraint = shop.compile({}).start()
    assert constraint.allowed_mask() is not None, "the first is known"
    constraint.advance(shop.letter)
    assert constraint.allowed_mask() is None and constraint.allowed_mask() is None
    with pytest.raises(InternalError, match="does not allow"):
        constraint.advance(shop.letter)
    shop.options["gate"].set()
    assert wait_for_mask(constraint) is not None


def test_mask_that_takes_too_long_is_an_error_of_its_own_sequence(tokenizer: Any) -> None:
    shop = Workshop(tokenizer, mask_timeout_s=3.0)
    shop.options = {"gate": threading.Event()}
    compiled = shop.compile({})
    slow, other = compiled.start(), compiled.start()
    slow.advance(shop.letter)
    shop.now = 3.0
    assert slow.allowed_mask() is None
    shop.now = 3.5
    with pytest.raises(InternalError, match="within 3 s"):
        slow.allowed_mask()
    assert other.allowed_mask() is not None
    shop.options["gate"].set()


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"fault": "lexer error: too many states SECRET"}, InvalidSchema, "too complex"),
        ({"fault": "NoExtensionBias"}, InvalidSchema, "nothing can be valid"),
        ({"raises": Panic("SECRET")}, InternalError, "Panic"),
        ({"raises": ValueError("SECRET")}, InternalError, "ValueError"),
    ],
)
def test_grammar_that_fails_at_a_token_ends_its_sequence_and_is_made_anew(
    tokenizer: Any, options: dict[str, Any], kind: type[ServiceError], words: str
) -> None:
    shop = Workshop(tokenizer)
    shop.options = options
    constraint = shop.compile({}).start()
    constraint.advance(shop.letter)
    for _ in range(2):
        with pytest.raises(kind, match=words) as caught:
            wait_for_mask(constraint)
        assert "SECRET" not in caught.value.message
    shop.compile({})
    assert len(shop.sources) == 2


def test_what_follows_a_stop_costs_nothing(tokenizer: Any) -> None:
    shop = Workshop(tokenizer)
    counts = [0]
    shop.options = {"num_masks": counts}
    constraint = shop.compile({}).start()
    num_masks = counts[0]
    for stop in sorted(shop.model.stop_ids) * 3:
        constraint.advance(stop)
        assert shop.model.allowed(constraint) == shop.model.stop_ids
    assert counts[0] == num_masks


# With a model.


def test_model_that_knows_nothing_of_json_answers_in_json(qwen3: Served) -> None:
    """A tiny random model through loader, engine and sampling; two answers beside one without a grammar."""
    grammars = qwen3.encoder.grammars
    assert grammars is not None
    schema = {"type": "object", "properties": {"имя": {"enum": ["да", "нет"]}, "n": {"enum": [1, 2, 3]}}}
    schema["required"] = ["имя", "n"]
    stop_ids = qwen3.encoder.sampling_options(SamplingParams(8, 0.0), 3).stop_ids
    compiled = grammars.compile(JsonGrammar(json.dumps(schema)), lambda: None)
    ends: dict[str, tuple[str, Exception | None]] = {}
    done = threading.Semaphore(0)
    sequences = []
    for index in range(3):
        sequence = make_sequence((5, 6, 7), temperature=1.0, seed=index, max_tokens=60, stop_ids=stop_ids)
        sequence.request_id = str(index)
        sequence.constraint = compiled.start() if index else None

        def on_end(ended: Any, reason: str, error: Exception | None) -> None:
            ends[ended.request_id] = (reason, error)
            done.release()

        sequence.on_end = on_end
        sequences.append(sequence)
    loop = EngineLoop(time.monotonic)
    loop.add_model("m", qwen3.runner(), SchedulerLimits(max_running=8))
    for sequence in sequences:
        loop.add("m", sequence)
    loop.start()
    for _ in sequences:
        assert done.acquire(timeout=GENEROUS_S)
    loop.stop(GENEROUS_S)
    assert ends["1"] == ends["2"] == ("stop", None)
    for sequence in sequences[1:]:
        answer = json.loads(qwen3.encoder.tokenizer.decode(sequence.output_ids))
        Draft202012Validator(schema).validate(answer)
