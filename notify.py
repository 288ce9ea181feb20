"""Tells systemd how the service stands: what loads, ready, progress, a stop (sd_notify(3)). The unit is `Type=notify`.

Ready means: every configured model has been loaded or has failed, and one at least serves. If one of two failed, the
other serves: a restart would take that one away too, and /api/health/ready keeps balancers informed. If none serves
nothing more is said, and systemd's own time limits end the start, or the service, and start it anew within limits.

Gunicorn's master would say READY at boot, so gunicorn_config.py takes the address out of its environment, and says only
that a stop begins. All else is said by the worker, where the models are.
"""

from __future__ import annotations

import logging
import signal
import socket
import threading
from typing import Any

from config import Limits, Settings, Supervisor
from models.service import ModelService, ServiceSnapshot

log = logging.getLogger("avito.notify")

# In which our own watchdog notices a lost engine, the worker ends, and a new one comes to its first word.
REPLACE_S = 60.0
# What Gunicorn's master takes from the end of the grace time to its own.
STOP_MARGIN_S = 15.0
_INTERVAL_S = 1.0
_MAX_FEED_INTERVAL_S = 5.0
_SEND_TIMEOUT_S = 1.0


def send(supervisor: Supervisor, *assignments: str) -> bool:
    """One datagram. Any thread. Never raises; False if it could not be sent."""
    address = "\0" + supervisor.address[1:] if supervisor.address.startswith("@") else supervisor.address
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.settimeout(_SEND_TIMEOUT_S)
            sender.sendto("\n".join(assignments).encode(), address)
    except OSError as error:
        log.debug("the supervisor could not be told: %s", error)
        return False
    return True


def silence_s(limits: Limits) -> float:
    """The longest time without progress or a word of ours that ends well: our own watchdog waits for a stalled engine,
    ends the worker, and a new one begins."""
    return limits.stall_limit_s + REPLACE_S


class Notifier:
    """Looks at the service once a second, in a thread of its own.

    Progress is the engine's: since the last WATCHDOG=1 it made a step or had nothing to do. A worker that loads makes
    progress too, for at most the time that its models may take together.

    :param is_first: this is the first worker of its master. Only that one extends the start: if it is lost, the one
        that replaces it has what is left, or a worker that never gets ready would be replaced for ever.
    """

    def __init__(
        self, service: ModelService, supervisor: Supervisor, *, is_first: bool, interval_s: float = _INTERVAL_S
    ) -> None:
        self._service = service
        self._supervisor = supervisor
        self._is_starting = is_first
        self._silence_s = silence_s(service.limits)
        self._feed_interval_s = min(_MAX_FEED_INTERVAL_S, (supervisor.watchdog_s or float("inf")) / 4)
        self._interval_s = min(interval_s, self._feed_interval_s)
        self._load_until = service.clock() + service.limits.load_timeout_s * len(service.configured_models)
        self._fed_at = float("-inf")
        self._status = ""
        self._is_ready = False
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="notify", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._is_stopped.set()

    def _run(self) -> None:
        while True:
            self.tell()
            if self._is_stopped.wait(self._interval_s):
                return

    def tell(self) -> None:
        """Say what is new or due. What could not be sent is said again the next time."""
        snapshot, now = self._service.snapshot(), self._service.clock()
        states = {model.state for model in snapshot.models.values()}
        status = describe(snapshot)
        assignments = [] if status == self._status else [f"STATUS={status}"]
        is_ready = self._is_ready or ("ready" in states and "loading" not in states)
        if is_ready and not self._is_ready:
            assignments += self._ready()
        is_fed = now - self._fed_at >= self._feed_interval_s and self._has_progress(snapshot, states, now)
        if is_fed:
            assignments += self._feed(is_ready)
        if assignments and send(self._supervisor, *assignments):
            self._status, self._is_ready = status, is_ready
            if is_fed:
                self._fed_at = now

    def _has_progress(self, snapshot: ServiceSnapshot, states: set[Any], now: float) -> bool:
        if snapshot.is_engine_dead or snapshot.stalled_s >= self._feed_interval_s:
            return False
        return "ready" in states or ("loading" in states and now < self._load_until)

    def _ready(self) -> list[str]:
        given_s = self._supervisor.watchdog_s
        if given_s is None or given_s >= self._silence_s:
            return ["READY=1"]
        # AVITO_STALL_LIMIT_S was raised, the unit was not: it must not be faster than our own watchdog.
        return ["READY=1", f"WATCHDOG_USEC={_usec(self._silence_s)}"]

    def _feed(self, is_ready: bool) -> list[str]:
        if self._is_starting and not is_ready:
            return [f"EXTEND_TIMEOUT_USEC={_usec(self._silence_s)}"]
        return [] if self._supervisor.watchdog_s is None else ["WATCHDOG=1"]


def describe(snapshot: ServiceSnapshot) -> str:
    """One line for `systemctl status`: no seconds, so that it is new only when something is."""
    parts = []
    if snapshot.is_draining:
        parts.append("draining")
    if not snapshot.is_alive:
        parts.append("the engine is lost")
    for name, model in snapshot.models.items():
        if model.state != "not_configured":
            parts.append(f"{name} {model.state}" + (f" ({model.phase})" if model.phase else ""))
    return ", ".join(parts)


def tell_stops(server: Any, supervisor: Supervisor, settings: Settings) -> None:
    """In Gunicorn's master, once its signal handlers are in place: say so when a stop begins. The worker does not know
    whether it is only being replaced."""

    def stop(number: int, frame: Any) -> None:
        # The unit's TimeoutStopSec may be shorter than a grace time that was raised.
        extension = f"EXTEND_TIMEOUT_USEC={_usec(settings.grace_s + STOP_MARGIN_S)}"
        send(supervisor, "STOPPING=1", "STATUS=stopping, accepted requests are answered", extension)
        server.signal(number, frame)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, stop)


def _usec(seconds: float) -> int:
    return round(seconds * 1_000_000)
