"""Health and metrics: renders what the service, the ledger and the machine say; decides nothing about the engine.

`/api/health` for people, `/api/health/ready` for balancers, `/api/health/live` for supervisors, `/api/metrics` as JSON
and `/metrics` for Prometheus, `/api/metrics/reset` and `/api/drain` for the operator.
"""

from __future__ import annotations

import hmac
import ipaddress
import time
from typing import Any

from flask import Blueprint, Response, g, jsonify, request
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, ProcessCollector, generate_latest

from access import Access, bearer
from accounting import Ledger
from config import VERSION, Settings
from models.service import ModelService, ModelSnapshot, ServiceSnapshot
from responses import WebError
from system import GpuReader, SystemReader

_FORWARDING_HEADERS = ("X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Real-IP", "Forwarded", "Via")


def make_blueprint(
    service: ModelService,
    ledger: Ledger,
    settings: Settings,
    registry: CollectorRegistry,
    gpu: GpuReader,
    access: Access | None = None,
) -> Blueprint:
    """:param access: None: keys are off."""
    bp = Blueprint("health", __name__)
    started = time.monotonic()
    machine = SystemReader()

    @bp.get("/api/health")
    def show_health() -> Response:
        """How the service is; 200 whatever the answer."""
        snapshot = service.snapshot()
        return jsonify(
            {
                "status": _status(snapshot, settings, machine, access),
                "version": VERSION,
                "uptime_seconds": round(time.monotonic() - started, 3),
                "models": _models(snapshot),
                "checks": _checks(snapshot, settings, machine, gpu, service, access),
                "why_not_ready": list(snapshot.why_not_ready),
                "demo": snapshot.is_demo,
            }
        )

    @bp.get("/api/health/ready")
    def show_ready() -> tuple[Response, int]:
        """200 once every configured model serves, else 503 and why not."""
        snapshot = service.snapshot()
        body: dict[str, Any] = {
            "status": "ready" if snapshot.is_ready else "not_ready",
            "models": _models(snapshot),
            "checks": _checks(snapshot, settings, machine, gpu, service, access),
            "demo": snapshot.is_demo,
        }
        if not snapshot.is_ready:
            body["why_not_ready"] = list(snapshot.why_not_ready)
        return jsonify(body), 200 if snapshot.is_ready else 503

    @bp.get("/api/health/live")
    def show_live() -> tuple[Response, int]:
        """503 only when a restart would help: the engine's loop is dead or hangs. Touches neither disk nor device."""
        snapshot = service.snapshot()
        body = {
            "status": "alive" if snapshot.is_alive else "dead",
            "engine": "dead" if snapshot.is_engine_dead else "hung" if not snapshot.is_alive else "ok",
            "seconds_since_last_step": round(snapshot.stalled_s, 3),
        }
        return jsonify(body), 200 if snapshot.is_alive else 503

    @bp.get("/api/metrics")
    def show_metrics() -> Response:
        """System, card and application as JSON."""
        return jsonify(
            {
                "system": _system(machine),
                "gpu": _gpu(service, gpu),
                "application": _application(service, ledger),
            }
        )

    @bp.get("/metrics")
    def show_prometheus() -> Response:
        """The same counters for Prometheus."""
        return Response(generate_latest(registry), content_type=CONTENT_TYPE_LATEST)

    @bp.post("/api/metrics/reset")
    def reset_metrics() -> Response:
        """Start the sums of `/api/metrics` anew. Prometheus counters never go back."""
        require_operator(settings, access)
        ledger.reset()
        service.metrics.mark()
        return jsonify({"status": "reset"})

    @bp.post("/api/drain")
    def drain() -> Response:
        """Before a stop: ready answers 503 from now on, while requests are still answered. There is no way back."""
        require_token(settings, access)
        service.drain()
        return jsonify({"status": "draining"})

    _export_machine(registry, service, machine, gpu, access)
    return bp


def require_token(settings: Settings, access: Access | None) -> None:
    """The operator's token, or a key with the scope `ops`.

    :raise WebError: `unauthorized` without either or with a wrong one; `forbidden` for a key that has not the scope,
        or if no token is set and keys are off.
    """
    token = settings.ops_token.get_secret_value()
    given = request.headers.get("Authorization", "")
    if token and hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
        return
    if access is not None and bearer():
        g.api_key = access.authenticate("ops")
        return
    if given and not token:
        raise WebError("forbidden", "AVITO_OPS_TOKEN is not set on this server, so no token opens this")
    raise WebError("unauthorized", "the operator's token is needed", headers={"WWW-Authenticate": 'Bearer realm="ops"'})


def require_operator(settings: Settings, access: Access | None) -> None:
    """As `require_token`; if no token is set and none was sent, a peer on this very machine with nobody in between.

    :raise WebError: `unauthorized` for a missing or wrong token; `forbidden` for anybody else without one.
    """
    if settings.ops_token.get_secret_value() or (access is not None and bearer()):
        require_token(settings, access)
        return
    is_direct = not settings.trusted_proxies and not any(name in request.headers for name in _FORWARDING_HEADERS)
    if not (is_direct and _is_loopback(request.remote_addr) and "Origin" not in request.headers):
        raise WebError("forbidden", "without AVITO_OPS_TOKEN this is for a direct peer on the same machine only")


def _is_loopback(address: str | None) -> bool:
    try:
        parsed = ipaddress.ip_address(address or "")
        # A server that listens on :: sees IPv4 peers like this.
        mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
        return (mapped or parsed).is_loopback
    except ValueError:
        return False


def _status(snapshot: ServiceSnapshot, settings: Settings, machine: SystemReader, access: Access | None) -> str:
    configured = [model for model in snapshot.models.values() if model.state != "not_configured"]
    if not snapshot.is_alive or all(model.state == "failed" for model in configured):
        return "unhealthy"
    is_disk_low = machine.read().disk_free_percent < settings.limits.min_disk_free_percent
    is_keys_file_bad = access is not None and access.store.error() is not None
    return "degraded" if is_disk_low or is_keys_file_bad or not snapshot.is_ready else "healthy"


def _models(snapshot: ServiceSnapshot) -> dict[str, Any]:
    return {name: _model(model) for name, model in snapshot.models.items()}


def _model(model: ModelSnapshot) -> dict[str, Any]:
    if model.state == "not_configured":
        return {"state": model.state}
    return {
        "state": model.state,
        "demo": model.is_demo,
        "device": model.device,
        "dtype": model.dtype,
        "phase": model.phase,
        "phase_seconds": round(model.phase_s, 3),
        "phases": {name: round(seconds, 3) for name, seconds in model.phases.items()},
        "running": model.num_running,
        "waiting": model.num_waiting,
    }


def _checks(
    snapshot: ServiceSnapshot,
    settings: Settings,
    machine: SystemReader,
    gpu: GpuReader,
    service: ModelService,
    access: Access | None,
) -> dict[str, dict[str, Any]]:
    """Named checks. Only the engine and the models make the service not ready; the others are for the operator."""
    system = machine.read()
    minimum = settings.limits.min_disk_free_percent
    card = gpu.read(service.gpu_uuid)
    checks: dict[str, dict[str, Any]] = {
        "engine": {
            "ok": snapshot.is_alive,
            "seconds_since_last_step": round(snapshot.stalled_s, 3),
            "limit_seconds": settings.limits.stall_limit_s,
        },
        "queue": {
            "ok": all(m.num_waiting < settings.limits.max_waiting for m in snapshot.models.values()),
            "waiting": sum(m.num_waiting for m in snapshot.models.values()),
            "limit_per_model": settings.limits.max_waiting,
        },
        "disk": {
            "ok": system.disk_free_percent >= minimum,
            "free_percent": round(system.disk_free_percent, 1),
            "minimum_percent": minimum,
        },
        "gpu": {
            "ok": service.gpu_uuid is None or card is not None,
            "device": next((m.device for m in snapshot.models.values() if m.device), None),
            "name": card.name if card else None,
        },
        "draining": {"ok": not snapshot.is_draining},
    }
    if access is not None:
        checks["keys"] = {"ok": access.store.error() is None, "keys": access.store.count()}
    return checks


def _system(machine: SystemReader) -> dict[str, Any]:
    reading = machine.read()
    return {
        "cpu_percent": reading.cpu_percent,
        "memory_percent": reading.memory_percent,
        "memory_used_bytes": reading.memory_used_bytes,
        "memory_total_bytes": reading.memory_total_bytes,
        "process_memory_bytes": reading.process_memory_bytes,
        "disk_percent": reading.disk_percent,
        "disk_free_bytes": reading.disk_free_bytes,
        "load_average_1m": round(reading.load_average_1m, 2),
    }


def _gpu(service: ModelService, gpu: GpuReader) -> dict[str, Any]:
    card = gpu.read(service.gpu_uuid)
    allocated, reserved = service.device_memory()
    return {
        "available": service.gpu_uuid is not None,
        "name": card.name if card else None,
        "memory_allocated_bytes": allocated,
        "memory_reserved_bytes": reserved,
        "memory_used_bytes": card.memory_used_bytes if card else None,
        "memory_total_bytes": card.memory_total_bytes if card else None,
        "utilization_percent": card.utilization_percent if card else None,
        "temperature_celsius": card.temperature_celsius if card else None,
        "power_watts": card.power_watts if card else None,
    }


def _application(service: ModelService, ledger: Ledger) -> dict[str, Any]:
    totals = ledger.totals()
    outcomes = totals.by_outcome
    ended = sum(outcomes.values())
    snapshot = service.snapshot()
    return {
        "total_requests": totals.received,
        "open_requests": totals.open,
        **{f"{outcome}_requests": count for outcome, count in outcomes.items()},
        "success_rate_percent": round(100 * outcomes["ok"] / ended, 2) if ended else 100.0,
        "average_response_time_seconds": round(totals.ok_seconds / outcomes["ok"], 6) if outcomes["ok"] else 0.0,
        "total_tokens_generated": service.metrics.since_mark(service.metrics.generation_tokens),
        "total_prompt_tokens": service.metrics.since_mark(service.metrics.prompt_tokens),
        "avibe_requests": totals.by_model["avibe"],
        "avision_requests": totals.by_model["avision"],
        "requests_running": sum(m.num_running for m in snapshot.models.values()),
        "requests_waiting": sum(m.num_waiting for m in snapshot.models.values()),
    }


def _export_machine(
    registry: CollectorRegistry, service: ModelService, machine: SystemReader, gpu: GpuReader, access: Access | None
) -> None:
    """Gauges that are read when Prometheus asks."""

    def gauge(name: str, text: str, read: Any) -> None:
        Gauge(name, text, registry=registry).set_function(read)

    def of_card(attribute: str) -> Any:
        def read() -> float:
            value = getattr(gpu.read(service.gpu_uuid), attribute, None)
            return float("nan") if value is None else float(value)

        return read

    # The usual process_... names: when the worker started, its CPU time, its file descriptors.
    ProcessCollector(registry=registry)
    gauge("avito_ready", "1 if every configured model serves.", lambda: float(service.snapshot().is_ready))
    gauge(
        "avito_keys_file_ok",
        "0 while the keys file cannot be used and the keys from before stay.",
        lambda: float(access is None or access.store.error() is None),
    )
    gauge(
        "avito_engine_stalled_seconds",
        "Seconds without a step while work is pending.",
        lambda: service.snapshot().stalled_s,
    )
    gauge("avito_cpu_percent", "CPU use of the machine.", lambda: machine.read().cpu_percent)
    gauge("avito_memory_percent", "Memory use of the machine.", lambda: machine.read().memory_percent)
    gauge("avito_disk_percent", "Use of the disk that holds the service.", lambda: machine.read().disk_percent)
    gauge("avito_process_memory_bytes", "Resident memory.", lambda: machine.read().process_memory_bytes)
    gauge("avito_gpu_memory_allocated_bytes", "Held by tensors.", lambda: service.device_memory()[0])
    gauge("avito_gpu_memory_reserved_bytes", "Held by torch's allocator.", lambda: service.device_memory()[1])
    for name, text in (
        ("utilization_percent", "Use of the card."),
        ("memory_used_bytes", "Memory of the card in use, by anybody."),
        ("memory_total_bytes", "Memory of the card."),
        ("temperature_celsius", "Temperature of the card."),
        ("power_watts", "Power the card draws."),
    ):
        gauge(f"avito_gpu_{name}", text, of_card(name))
