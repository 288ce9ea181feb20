"""How a running service divided its memory: the ledger it made at start, and the KV room against what was left for it.

What is left: AVITO_GPU_MEMORY_FRACTION of the card (AVITO_CPU_CACHE_BYTES where there is none) less the weights. The
difference to the KV room is working room: activations, sampling, graphs, the picture cache. The settings are read here,
so run this in the service's own environment.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from bench import report
from bench.client import Client
from bench.dialects import get_json, get_text
from bench.report import Column, Panel, Unable
from config import ConfigError, load_settings

_GIB = 1024**3


@dataclass(frozen=True)
class MemoryRow:
    """One model, as planned."""

    model: str
    weights_bytes: int
    workspace_bytes: int
    kv_cache_bytes: int
    kv_cache_tokens: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default="http://127.0.0.1:8085", help="the service (default %(default)s)")
    parser.add_argument("--key", default="", metavar="TOKEN", help="sent as a bearer token")
    report.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """:raise Unable: the service does not answer, or has no model yet."""
    report.check_files(arguments.json, arguments.plot)
    try:
        settings = load_settings(os.environ)
    except ConfigError as error:
        raise Unable("configuration: " + "; ".join(error.mistakes)) from None
    with Client(arguments.url, 30.0) as client:
        rows = read_rows(get_text(client, "/metrics", arguments.key))
        gpu = get_json(client, "/api/metrics", arguments.key).get("gpu", {})
    if not rows:
        raise Unable(f"{arguments.url}: has no model with memory yet")
    weights = sum(row.weights_bytes for row in rows)
    card = gpu.get("memory_total_bytes")
    left = settings.cpu_cache_bytes if card is None else int(card * settings.gpu_memory_fraction) - weights
    share = sum(row.kv_cache_bytes for row in rows) / left
    notes = [
        f"left for KV caches after weights: {left / _GIB:.2f} GiB; they are {100 * share:.1f} % of it",
        f"torch's allocator holds {(gpu.get('memory_reserved_bytes') or 0) / _GIB:.2f} GiB, "
        f"all processes {(gpu.get('memory_used_bytes') or 0) / _GIB:.2f} of the card's {(card or 0) / _GIB:.2f} GiB",
    ]
    print(report.describe(report.read_machine()))
    print(f"\n{report.render_table(TABLE, rows)}\n")
    for note in notes:
        print(f"- {note}")
    if arguments.json:
        report.write_json(arguments.json, arguments, rows, notes, left_bytes=left, cache_share=share)
    if arguments.plot:
        parts = {
            name: [(row.model, getattr(row, f"{name}_bytes") / _GIB) for row in rows]
            for name in ("weights", "workspace", "kv_cache")
        }
        report.write_plot(arguments.plot, "Memory", [Panel("As planned", "", "GiB", parts)])
    return 0


def read_rows(text: str) -> list[MemoryRow]:
    """From what Prometheus is told: each model to which the ledger gave something."""
    planned: dict[str, dict[str, int]] = {}
    tokens: dict[str, int] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "avito_memory_planned_bytes":
                planned.setdefault(sample.labels["model"], {})[sample.labels["purpose"]] = int(sample.value)
            elif sample.name == "avito_kv_cache_capacity_tokens":
                tokens[sample.labels["model"]] = int(sample.value)
    return [_make_row(model, purposes, tokens) for model, purposes in planned.items()]


def _make_row(model: str, purposes: Mapping[str, int], tokens: Mapping[str, int]) -> MemoryRow:
    return MemoryRow(model, purposes["weights"], purposes["workspace"], purposes["kv_cache"], tokens.get(model, 0))


TABLE: Sequence[Column[MemoryRow]] = (
    Column("model", lambda row: row.model, is_left=True),
    Column("weights", lambda row: row.weights_bytes / _GIB, "GiB"),
    Column("working room", lambda row: row.workspace_bytes / _GIB, "GiB"),
    Column("KV cache", lambda row: row.kv_cache_bytes / _GIB, "GiB"),
    Column("KV cache, tokens", lambda row: row.kv_cache_tokens),
)
