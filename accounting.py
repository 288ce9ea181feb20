"""What became of every request: `Exchange`, one request and its outcome; `Ledger`, the sums.

A request to a generating door that reached the application ends as exactly one outcome:
ok (complete), rejected (any 4xx, or 503 before admission), expired (504), cancelled (the client left), error (5xx
after admission). The ledger counts it when its response is closed, under one lock, so that received = open + the sum
of the outcomes in every reading, and received = the sum whenever nothing is under way.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from models.schemas import MODEL_NAMES, Completion, ModelName, Timing

Door = Literal[
    "web_avibe", "web_avision", "api_text_generate", "api_image_analyze", "v1_chat_completions", "v1_completions"
]
Outcome = Literal["ok", "rejected", "expired", "cancelled", "error"]
OUTCOMES: tuple[Outcome, ...] = ("ok", "rejected", "expired", "cancelled", "error")
DOOR_BY_PATH: Mapping[str, Door] = {
    "/avibe": "web_avibe",
    "/avision": "web_avision",
    "/api/v1/text/generate": "api_text_generate",
    "/api/v1/image/analyze": "api_image_analyze",
    "/v1/chat/completions": "v1_chat_completions",
    "/v1/completions": "v1_completions",
}
# What these doors are for; of the others the body says it.
_MODEL_BY_DOOR: Mapping[Door, ModelName] = {
    "web_avibe": "avibe",
    "web_avision": "avision",
    "api_text_generate": "avibe",
    "api_image_analyze": "avision",
}
# Codes of refusals that are 503 and happen before admission.
_REFUSALS = frozenset({"not_ready", "queue_full", "model_not_configured"})

audit_log = logging.getLogger("avito.audit")


@dataclass
class Exchange:
    """One HTTP request from its first hook to the close of its response. One thread at a time.

    :param started: monotonic seconds of the request's first hook.
    :param door: the generating door it came to; None for health, pages and the like.
    :param key: the name of the caller's key, as soon as it is known, though it may be refused.
    :param key_id: the id of the key that pays for the tokens; None unless it was let in.
    """

    request_id: str
    started: float
    method: str
    path: str
    client: str
    door: Door | None
    model: ModelName | None = None
    completion: Completion | None = None
    error_code: str | None = None
    is_cancelled: bool = False
    status: int = 0
    input_tokens: int = 0
    generated_tokens: int = 0
    timing: Timing | None = None
    is_followed: bool = False  # a response will report the end
    facts: dict[str, object] = field(default_factory=dict)
    key: str | None = None
    key_id: str | None = None

    def outcome(self) -> Outcome:
        if self.is_cancelled:
            return "cancelled"
        if self.error_code == "deadline_exceeded":
            return "expired"
        if self.error_code in _REFUSALS or 400 <= self.status < 500:
            return "rejected"
        if self.status >= 500 or self.completion is None:
            return "error"
        return "ok"

    def audit(self, total_s: float) -> None:
        """Write the one audit line: what happened and how large it was, never what was said."""
        timing = self.timing
        fields: dict[str, object] = {
            "door": self.door,
            "model": self.model,
            "outcome": self.outcome(),
            "reason": self.error_code,
            "status": self.status,
            "client": self.client,
            "key": self.key,
            "input_tokens": self.input_tokens,
            "generated_tokens": self.generated_tokens,
            "queue_s": None if timing is None else round(timing.queue_s, 4),
            "first_s": None
            if timing is None or timing.time_to_first_token_s is None
            else round(timing.time_to_first_token_s, 4),
            "total_s": round(total_s, 4),
            **self.facts,
        }
        line = " ".join(f"{name}={'-' if value is None else value}" for name, value in fields.items())
        audit_log.info("audit %s", line, extra={"fields": fields})


@dataclass(frozen=True)
class Totals:
    """Sums over all doors since the last reset."""

    received: int
    open: int
    by_outcome: Mapping[Outcome, int]
    by_door: Mapping[Door, int]
    by_model: Mapping[ModelName, int]
    ok_seconds: float


class Ledger(Collector):
    """Counts exchanges. Any thread. Also a Prometheus collector, so that a scrape is one consistent reading.

    `reset` sets back what `totals` tells; the Prometheus counters never go back.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._lock = threading.Lock()
        self._received: Counter[Door] = Counter()
        self._outcomes: Counter[tuple[Door, Outcome]] = Counter()
        self._rejections: Counter[tuple[Door, str]] = Counter()
        self._key_outcomes: Counter[tuple[str, Outcome]] = Counter()
        self._key_tokens: Counter[tuple[str, str]] = Counter()
        self._models: Counter[ModelName] = Counter()  # by the doors that are for all of them, once ended
        self._ok_seconds = 0.0
        self._reset_at = (Counter[Door](), Counter[tuple[Door, Outcome]](), Counter[ModelName](), 0.0)
        registry.register(self)

    def open(self, door: Door) -> None:
        with self._lock:
            self._received[door] += 1

    def close(self, door: Door, exchange: Exchange, total_s: float) -> None:
        outcome = exchange.outcome()
        with self._lock:
            self._outcomes[door, outcome] += 1
            if outcome == "rejected":
                self._rejections[door, exchange.error_code or "invalid_request"] += 1
            if exchange.model is not None and door not in _MODEL_BY_DOOR:
                self._models[exchange.model] += 1
            if outcome == "ok":
                self._ok_seconds += total_s
            if exchange.key is not None:
                self._key_outcomes[exchange.key, outcome] += 1
                self._key_tokens[exchange.key, "prompt"] += exchange.input_tokens
                self._key_tokens[exchange.key, "generation"] += exchange.generated_tokens

    def totals(self) -> Totals:
        with self._lock:
            num_open = sum(self._received.values()) - sum(self._outcomes.values())
            received, outcomes, models, ok_seconds = self._reset_at
            by_door = {door: self._received[door] - received[door] for door in DOOR_BY_PATH.values()}
            by_model = {name: self._models[name] - models[name] for name in MODEL_NAMES}
            for door, name in _MODEL_BY_DOOR.items():
                by_model[name] += by_door[door]
            ended = {key: count - outcomes[key] for key, count in self._outcomes.items()}
            return Totals(
                received=sum(self._received.values()) - sum(received.values()),
                open=num_open,
                by_outcome={o: sum(n for (_, outcome), n in ended.items() if outcome == o) for o in OUTCOMES},
                by_door=by_door,
                by_model=by_model,
                ok_seconds=self._ok_seconds - ok_seconds,
            )

    def reset(self) -> None:
        """Start `totals` anew. Requests under way count as received after the reset."""
        with self._lock:
            still_open = Counter(self._received)
            for (door, _), count in self._outcomes.items():
                still_open[door] -= count
            received = self._received - +still_open
            self._reset_at = (received, Counter(self._outcomes), Counter(self._models), self._ok_seconds)

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            received, outcomes = Counter(self._received), Counter(self._outcomes)
            rejections = Counter(self._rejections)
            key_outcomes, key_tokens = Counter(self._key_outcomes), Counter(self._key_tokens)
        requests = CounterMetricFamily(
            "avito_requests", "Requests that ended, by door and outcome.", labels=("door", "outcome")
        )
        arrivals = CounterMetricFamily("avito_requests_received", "Requests that reached a door.", labels=("door",))
        under_way = GaugeMetricFamily("avito_requests_open", "Requests received and not yet ended.", labels=("door",))
        refused = CounterMetricFamily(
            "avito_requests_rejected", "Rejected requests, by the error's code.", labels=("door", "reason")
        )
        for door in DOOR_BY_PATH.values():
            ended = 0
            for outcome in OUTCOMES:
                requests.add_metric((door, outcome), outcomes[door, outcome])
                ended += outcomes[door, outcome]
            arrivals.add_metric((door,), received[door])
            under_way.add_metric((door,), received[door] - ended)
        for (door, reason), count in sorted(rejections.items()):
            refused.add_metric((door, reason), count)
        of_keys = CounterMetricFamily(
            "avito_key_requests", "Requests that ended, by key and outcome.", labels=("key", "outcome")
        )
        for (key, outcome), count in sorted(key_outcomes.items()):
            of_keys.add_metric((key, outcome), count)
        spent = CounterMetricFamily("avito_key_tokens", "Tokens of a key's requests.", labels=("key", "kind"))
        for (key, kind), count in sorted(key_tokens.items()):
            spent.add_metric((key, kind), count)
        yield from (requests, arrivals, under_way, refused, of_keys, spent)
