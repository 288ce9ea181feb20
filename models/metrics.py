"""Every metric of the model layer, declared once: name, unit, meaning.

Names follow Prometheus and, where vLLM has one for the same thing, vLLM's with our prefix. The only label is the
model's name, which is ours. `/api/metrics` reads the same objects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from models.schemas import MODEL_NAMES

if TYPE_CHECKING:
    from models.engine.loop import CacheSnapshot
    from models.engine.memory import Ledger as MemoryLedger

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_SECONDS = (0.0025, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)


class ModelMetrics:
    """The objects, registered in `registry`; one instance per service, so that tests share nothing."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        model = ("model",)
        self.prompt_tokens = Counter(
            "avito_prompt_tokens", "Prompt tokens of requests that entered the engine.", model, registry=registry
        )
        self.generation_tokens = Counter(
            "avito_generation_tokens", "Tokens generated, those of unfinished answers too.", model, registry=registry
        )
        self.time_to_first_token = Histogram(
            "avito_time_to_first_token_seconds",
            "From a request's first byte to its first token.",
            model,
            buckets=_SECONDS,
            registry=registry,
        )
        self.time_per_output_token = Histogram(
            "avito_request_time_per_output_token_seconds",
            "Mean time between the tokens of one answer, the first left out.",
            model,
            buckets=_TOKEN_SECONDS,
            registry=registry,
        )
        self.queue_time = Histogram(
            "avito_request_queue_time_seconds",
            "From entering the queue to the first step.",
            model,
            buckets=_SECONDS,
            registry=registry,
        )
        self.total_time = Histogram(
            "avito_e2e_request_latency_seconds",
            "From a request's first byte to its complete answer.",
            model,
            buckets=_SECONDS,
            registry=registry,
        )
        self.running = Gauge("avito_requests_running", "Requests being generated now.", model, registry=registry)
        self.waiting = Gauge(
            "avito_requests_waiting", "Requests admitted and not yet running.", model, registry=registry
        )
        self.numeric_errors = Counter(
            "avito_numeric_errors", "Requests ended because of NaN or Inf logits.", model, registry=registry
        )
        self.load_phase = Gauge(
            "avito_model_load_phase_seconds", "Time of each phase of loading.", ("model", "phase"), registry=registry
        )
        self.model_ready = Gauge("avito_model_ready", "1 if the model can serve.", model, registry=registry)

        self.memory = Gauge(
            "avito_memory_planned_bytes",
            "Device memory as the ledger at start divides it.",
            ("model", "purpose"),
            registry=registry,
        )
        self._marks: dict[Counter, float] = {}

        # Every series is there from the start, so that an alert on a rate sees the first event too.
        for name in MODEL_NAMES:
            for counter in (self.prompt_tokens, self.generation_tokens, self.numeric_errors):
                counter.labels(name)
            for histogram in (self.time_to_first_token, self.time_per_output_token, self.queue_time, self.total_time):
                histogram.labels(name)

    def show_ledger(self, ledger: MemoryLedger) -> None:
        for name, share in ledger.shares.items():
            self.memory.labels(name, "weights").set(share.weights_bytes)
            self.memory.labels(name, "workspace").set(share.workspace_bytes)
            self.memory.labels(name, "kv_cache").set(share.cache_bytes)

    def mark(self) -> None:
        """Let `since_mark` count from now on. The counters themselves never go back."""
        self._marks = {counter: total(counter) for counter in (self.generation_tokens, self.prompt_tokens)}

    def since_mark(self, counter: Counter) -> int:
        return round(total(counter) - self._marks.get(counter, 0.0))


class CacheCollector:
    """The KV caches' books as metrics, read when somebody asks.

    :param read: the books of each model that serves.
    """

    def __init__(self, read: Callable[[], Mapping[str, CacheSnapshot]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        books: dict[str, CacheSnapshot | None] = {**dict.fromkeys(MODEL_NAMES), **self._read()}
        for kind, name, meaning, value in _CACHE_METRICS:
            family = kind(name, meaning, labels=("model",))
            for model, book in books.items():
                family.add_metric((model,), value(book) if book is not None else 0.0)
            yield family


_CACHE_METRICS: tuple[tuple[type[GaugeMetricFamily | CounterMetricFamily], str, str, Any], ...] = (
    (
        GaugeMetricFamily,
        "avito_kv_cache_usage_perc",
        "Share of the KV cache's pages that running requests hold, 1 is all of them.",
        lambda book: book.num_used_pages / book.num_pages,
    ),
    (
        GaugeMetricFamily,
        "avito_kv_cache_capacity_tokens",
        "Tokens that the KV cache has room for.",
        lambda book: book.num_pages * book.page_tokens,
    ),
    (
        CounterMetricFamily,
        "avito_prefix_cache_queries",
        "Prompt tokens looked up in the KV cache.",
        lambda book: book.queried_tokens,
    ),
    (
        CounterMetricFamily,
        "avito_prefix_cache_hits",
        "Prompt tokens found in the KV cache and not computed again.",
        lambda book: book.reused_tokens,
    ),
    (
        CounterMetricFamily,
        "avito_num_preemptions",
        "Times that a request lost its pages to older ones, to be computed again.",
        lambda book: book.num_preemptions,
    ),
)


def total(counter: Counter) -> float:
    """The sum of a counter over its labels."""
    return sum(s.value for family in counter.collect() for s in family.samples if s.name.endswith("_total"))
