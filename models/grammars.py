"""Structured answers: grammars over token ids, compiled from JSON Schemas, and what they allow at each step.

The only module that knows the library, llguidance. A schema is refused or rewritten first (`models/json_schema.py`),
then compiled in a few threads of its own, once for all who ask for the same, and kept. Masks are computed in other
threads, started as soon as a token is known: the loop of the engine only asks whether they are ready. The library
cannot be interrupted; it counts its own steps instead and gives up (`LLParserLimits`), which ends that sequence alone.

Form of JSON: no white space but at most one space after `,` and `:`, as `json.dumps` writes it. Where more is allowed,
small models indent for ever, and line breaks cost tokens of the answer; the single space is free to take or leave,
because training data has both, and each cuts words into other tokens.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from typing import Any, Protocol

import llguidance
import numpy as np
from numpy.typing import NDArray

from config import Limits
from models.engine.sequence import TokenConstraint
from models.errors import InternalError, InvalidSchema, LoadError, QueueFull, ServiceError
from models.json_schema import Spent, simplify
from models.schemas import Grammar, JsonGrammar, ToolGrammar

log = logging.getLogger("avito.grammars")

Mask = NDArray[np.int32]

TOOL_CALL_TAGS = ("<tool_call>", "</tool_call>")

# How the library writes JSON. Without `u` each name of a property can be written in one way only: with it,
# `{"\u0061": ...}` would be another name than "a" to the grammar, and the same to whoever reads the answer.
_FORM = {
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    "json_allowed_escapes": 'nrbtf\\"',
}
# What the library says, as we say it. Its own words may have the user's in them.
_REASONS = (
    ("oneOf", "oneOf is supported where its options exclude each other, by type or by a required const property"),
    ("Unsatisfiable", "nothing can be valid against the schema"),
    ("NoExtension", "nothing can be valid against the schema"),
    ("Unable to determine if regex", "pattern: the expression, with what else is asked of the string, is too complex"),
    ("disjoint", "patternProperties: the expression is too complex"),
    (
        "regex",
        "pattern: the expression is not supported; it must be one of ECMA-262 without look-around, word boundaries and "
        "back references",
    ),
    ("circular references", "a $ref that leads back to itself must have no other keywords beside it"),
)
_TOO_COMPLEX = "the schema is too complex"


class Matcher(Protocol):
    """What we need of `llguidance.LLMatcher`. One thread at a time may use it, but for `deep_copy`."""

    def deep_copy(self) -> Matcher: ...
    def compute_bitmask(self) -> bytes: ...
    def consume_token(self, token_id: int, /) -> bool: ...
    def is_accepting(self) -> bool: ...
    def is_stopped(self) -> bool: ...
    def is_error(self) -> bool: ...
    def get_error(self) -> str: ...


class GrammarCompiler:
    """Grammars for one model. Any thread may call it.

    :param tokenizer: a fast tokenizer of transformers, byte-level BPE.
    :param vocab_size: width of the model's logits.
    :param stop_ids: all of them may end a complete answer, and no other.
    :param make_matcher: from the library's own form of a grammar (Lark); for tests.
    :raise LoadError: the library cannot use this tokenizer.
    """

    def __init__(
        self,
        tokenizer: Any,
        vocab_size: int,
        stop_ids: frozenset[int],
        limits: Limits,
        *,
        clock: Callable[[], float] = time.monotonic,
        make_matcher: Callable[[str], Matcher] | None = None,
    ) -> None:
        self.limits = limits
        self.clock = clock
        added = {token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items()}
        opening = added.get(TOOL_CALL_TAGS[0])
        self._opening_id = opening if opening is not None and opening < vocab_size else None
        self._tags = tuple(
            f"<[{added[tag]}]>" if added.get(tag, vocab_size) < vocab_size else json.dumps(tag)
            for tag in TOOL_CALL_TAGS
        )
        usable = np.zeros(vocab_size, dtype=bool)
        usable[: len(tokenizer)] = True
        unwanted = {*added.values(), *stop_ids} - {added.get(tag) for tag in TOOL_CALL_TAGS}
        usable[[token_id for token_id in unwanted if token_id < vocab_size]] = False
        stops = np.zeros(vocab_size, dtype=bool)
        stops[[token_id for token_id in stop_ids if token_id < vocab_size]] = True
        self.usable, self.stops = _pack(usable), _pack(stops)
        self.everything = _pack(np.ones(vocab_size, dtype=bool))
        self._make_matcher = make_matcher or _matcher_factory(tokenizer, vocab_size, stop_ids, limits)
        self._compilers = ThreadPoolExecutor(limits.max_concurrent_compiles, thread_name_prefix="grammar")
        self.mask_threads = ThreadPoolExecutor(limits.max_concurrent_masks, thread_name_prefix="mask")
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, _Compiled | str] = OrderedDict()
        self._jobs: dict[str, _Job] = {}

    def compile(self, grammar: Grammar, check: Callable[[], None]) -> CompiledGrammar:
        """Called in a request's thread; waits for a thread that compiles, `schema_timeout_s` at most.

        :param check: called while waiting; raises if the request has ended.
        :raise InvalidSchema: the schema is malformed, too large, too slow to compile, impossible, or has a keyword
            that cannot be enforced.
        :raise QueueFull: others' schemas are being compiled.
        """
        source = self._source(grammar)
        with self._lock:
            found = self._kept.get(source)
            if found is not None:
                self._kept.move_to_end(source)
            else:
                job = self._join(source)
        if found is None:
            found = self._wait(source, job, grammar.field, check)
        if isinstance(found, str):
            raise InvalidSchema(f"{grammar.field}: {found}", field=grammar.field)
        trigger_id = self._opening_id if isinstance(grammar, ToolGrammar) and grammar.is_optional else None
        return CompiledGrammar(self, source, found, grammar.field, trigger_id)

    def _source(self, grammar: Grammar) -> str:
        """The grammar in the library's form, from schemas that are safe to compile."""
        if isinstance(grammar, JsonGrammar):
            text = '{"type": "object"}' if grammar.schema is None else grammar.schema
            return f"start: {_json_rule(simplify(text, self.limits, field=grammar.field))}"
        return self._tool_source(grammar)

    def _tool_source(self, grammar: ToolGrammar) -> str:
        field, most = grammar.field, self.limits.max_schema_chars
        if grammar.is_optional and self._opening_id is None:
            raise InvalidSchema(
                f"{field}: strict needs a tool_choice that forces a call: this model has no token that begins one",
                field=field,
            )
        num_chars = sum(len(function.parameters) for function in grammar.functions)
        if num_chars > most:
            message = f"{field}: all parameters together must be at most {most} characters long, got {num_chars}"
            raise InvalidSchema(message, field=field)
        opening, closing = self._tags
        more = "" if grammar.is_single else f' ("\\n" call){{0,{self.limits.max_tool_calls - 1}}}'
        spent = Spent()
        names = [f"f{index}" for index in range(len(grammar.functions))]
        lines = [f"start: call{more}", f'call: {opening} "\\n" ({" | ".join(names)}) "\\n" {closing}']
        for name, function in zip(names, grammar.functions, strict=True):
            begin = f'{{"name": {json.dumps(function.name, ensure_ascii=False)}, "arguments": '
            schema = simplify(function.parameters, self.limits, field=field, is_object=True, spent=spent)
            lines.append(f'{name}: {json.dumps(begin, ensure_ascii=False)} {name}_arguments "}}"')
            lines.append(f"{name}_arguments: {_json_rule(schema)}")
        return "\n".join(lines)

    def _join(self, source: str) -> _Job:
        """Wait with those who wait for the same, or begin. Under the lock."""
        if source not in self._jobs:
            if len(self._jobs) >= self.limits.max_waiting_compiles:
                raise self._busy()
            self._jobs[source] = _Job(self._compilers.submit(self._build, source))
        job = self._jobs[source]
        job.num_waiting += 1
        return job

    def _wait(self, source: str, job: _Job, field: str, check: Callable[[], None]) -> _Compiled | str:
        deadline = self.clock() + self.limits.schema_timeout_s
        try:
            while True:
                check()
                try:
                    return job.future.result(self.limits.client_check_interval_s)
                except NotYet:
                    if self.clock() < deadline:
                        continue
                    if not job.future.running():
                        raise self._busy() from None
                    message = f"{field}: the schema took longer than {self.limits.schema_timeout_s:g} s to compile"
                    raise InvalidSchema(message, field=field) from None
        finally:
            with self._lock:
                job.num_waiting -= 1
                # What has begun goes on to its end, and is kept: whoever asks again waits for the same.
                if not job.num_waiting and job.future.cancel():
                    del self._jobs[source]

    def _busy(self) -> QueueFull:
        return QueueFull(
            "too many other schemas are being compiled", retry_after_s=int(-(-self.limits.schema_timeout_s // 1))
        )

    def _build(self, source: str) -> _Compiled | str:
        """In a thread of `_compilers`. A refusal is kept too."""
        made: _Compiled | str = _TOO_COMPLEX
        try:
            made = self._try(source)
        except BaseException as error:  # a panic of the library is no Exception
            log.error("a grammar of %d characters could not be compiled: %s", len(source), type(error).__name__)
        with self._lock:
            self._kept[source] = made
            del self._jobs[source]
            self._trim()
        return made

    def _try(self, source: str) -> _Compiled | str:
        matcher = self._make_matcher(source)
        first = None
        if not matcher.is_error():
            first = self.read_mask(matcher)
        if matcher.is_error():
            return reason_of(matcher.get_error())
        assert first is not None
        return _Compiled(matcher, first) if first.any() else "nothing can be valid against the schema"

    def _trim(self) -> None:
        limits = self.limits
        while len(self._kept) > limits.max_cached_grammars or (
            len(self._kept) > 1 and sum(map(len, self._kept)) > limits.max_cached_grammar_chars
        ):
            self._kept.popitem(last=False)

    def forget(self, source: str) -> None:
        """A sequence of this grammar failed, and its matchers share what they know: the next one starts afresh."""
        with self._lock:
            self._kept.pop(source, None)

    def read_mask(self, matcher: Matcher) -> Mask:
        """What may follow; of no worth if the matcher is then in error."""
        if matcher.is_stopped():
            return self.stops
        words = np.frombuffer(matcher.compute_bitmask(), dtype="<i4")[: len(self.usable)] & self.usable
        return words | self.stops if matcher.is_accepting() else words


class CompiledGrammar:
    """Ready for any number of sequences at a time. Any thread may call it.

    :param trigger_id: the token with which the grammar begins; before it anything goes. None: it holds from the start.
    """

    def __init__(
        self,
        compiler: GrammarCompiler,
        source: str,
        compiled: _Compiled,
        field: str,
        trigger_id: int | None = None,
    ) -> None:
        self._compiler, self._source, self._compiled, self.field = compiler, source, compiled, field
        self._trigger_id = trigger_id

    def start(self) -> TokenConstraint:
        """A fresh one for a sequence; cheap, its first mask is ready."""
        constraint = GrammarConstraint(self._compiler, self, self._compiled)
        if self._trigger_id is None:
            return constraint
        return TriggeredConstraint(self._trigger_id, self._compiler.everything, constraint)

    def fail(self) -> None:
        self._compiler.forget(self._source)


class GrammarConstraint:
    """A `TokenConstraint`, whose `advance` and `allowed_mask` are called in the loop's thread and return at once.

    Both raise `InvalidSchema` if the grammar turns out to be too complex or to lead nowhere, and `InternalError` if
    the mask takes too long, or a token was chosen that it did not allow.
    """

    def __init__(self, compiler: GrammarCompiler, grammar: CompiledGrammar, compiled: _Compiled) -> None:
        self._compiler, self._grammar, self._compiled = compiler, grammar, compiled
        self._matcher: Matcher | None = None
        self._mask: Mask | None = compiled.first_mask
        self._job: Future[Mask] | None = None
        self._asked_at = 0.0

    def advance(self, token_id: int) -> None:
        mask = self.allowed_mask()
        if mask is None or not _has_bit(mask, token_id):
            raise InternalError("a token was chosen that the grammar does not allow")
        if _has_bit(self._compiler.stops, token_id):
            self._mask = self._compiler.stops
            return
        self._mask = None
        self._asked_at = self._compiler.clock()
        self._job = self._compiler.mask_threads.submit(self._step, token_id)

    def allowed_mask(self) -> Mask | None:
        if self._mask is None:
            assert self._job is not None
            if self._job.done():
                self._mask = self._job.result()
            elif self._compiler.clock() - self._asked_at > self._compiler.limits.mask_timeout_s:
                most, field = self._compiler.limits.mask_timeout_s, self._grammar.field
                raise InternalError(f"{field}: how the answer may go on was not known within {most:g} s")
        return self._mask

    def _step(self, token_id: int) -> Mask:
        """In a thread of `mask_threads`."""
        try:
            if self._matcher is None:
                self._matcher = self._compiled.matcher.deep_copy()
            matcher = self._matcher
            mask = self._compiler.read_mask(matcher) if matcher.consume_token(token_id) else None
            if matcher.is_error():
                raise self._error(matcher.get_error())
            if mask is None or not mask.any():
                raise self._error("NoExtension")
            return mask
        except ServiceError:
            self._grammar.fail()
            raise
        except BaseException as error:  # a panic of the library is no Exception, and would end the loop
            self._grammar.fail()
            raise InternalError(f"the grammar failed ({type(error).__name__})") from None

    def _error(self, words: str) -> ServiceError:
        field = self._grammar.field
        return InvalidSchema(f"{field}: {reason_of(words)}; the answer could not go on", field=field)


class TriggeredConstraint:
    """A `TokenConstraint` that begins with a certain token, and until then allows everything.

    :param trigger_id: the first token of the grammar.
    :param everything: a mask that allows every id.
    """

    def __init__(self, trigger_id: int, everything: Mask, constraint: GrammarConstraint) -> None:
        self._trigger_id, self._everything, self._constraint = trigger_id, everything, constraint
        self._has_begun = False

    def advance(self, token_id: int) -> None:
        self._has_begun = self._has_begun or token_id == self._trigger_id
        if self._has_begun:
            self._constraint.advance(token_id)

    def allowed_mask(self) -> Mask | None:
        return self._constraint.allowed_mask() if self._has_begun else self._everything


class _Compiled:
    """`matcher` is only ever copied; copies share the automaton that they build."""

    def __init__(self, matcher: Matcher, first_mask: Mask) -> None:
        self.matcher, self.first_mask = matcher, first_mask


class _Job:
    def __init__(self, future: Future[_Compiled | str]) -> None:
        self.future = future
        self.num_waiting = 0


def _matcher_factory(
    tokenizer: Any, vocab_size: int, stop_ids: frozenset[int], limits: Limits
) -> Callable[[str], Matcher]:
    """Takes about 0.4 s for 50 thousand words, 0.65 s and 100 MB for 150 thousand."""
    backend = tokenizer.backend_tokenizer
    num_words = max(vocab_size, backend.get_vocab_size(with_added_tokens=True))
    stops = sorted(token_id for token_id in stop_ids if token_id < vocab_size)
    try:
        words = llguidance.LLTokenizer(backend.to_str(), n_vocab=num_words, eos_token=stops)
    except Exception as error:
        raise LoadError(f"structured answers: the tokenizer cannot be used ({type(error).__name__})") from error
    parser_limits = llguidance.LLParserLimits(max_lexer_states=limits.max_grammar_states, verbose_errors=False)
    return lambda source: llguidance.LLMatcher(words, source, log_level=0, limits=parser_limits)


def _json_rule(schema: dict[str, Any]) -> str:
    return "%json " + json.dumps({"x-guidance": _FORM, **schema})


def reason_of(words: str) -> str:
    """Our words for the library's."""
    return next((ours for theirs, ours in _REASONS if theirs in words), _TOO_COMPLEX)


def _pack(allowed: NDArray[np.bool_]) -> Mask:
    """One bit for each id, as `TokenConstraint.allowed_mask` has them."""
    padded = np.zeros(-(-len(allowed) // 32) * 32, dtype=bool)
    padded[: len(allowed)] = allowed
    return np.packbits(padded, bitorder="little").view("<i4")


def _has_bit(mask: Mask, token_id: int) -> bool:
    return token_id >> 5 < len(mask) and bool(int(mask[token_id >> 5]) >> (token_id & 31) & 1)
