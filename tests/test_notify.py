"""What systemd hears, over a real datagram socket: of a service with fake models, and of the real server."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from config import PROJECT_ROOT, Supervisor, take_supervisor
from models.errors import EngineDead, LoadError
from notify import REPLACE_S, Notifier, send, silence_s
from tests.fakes import Clock, EchoRunner, FakeLoad, FakeLoaded
from tests.test_server import GENEROUS_S, Server, read_answer
from tests.test_service import submit

NAMES = ("avibe", "avision")
Said = dict[str, str]


class Systemd:
    """The other end of NOTIFY_SOCKET."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.history: list[Said] = []

    def hear(self, timeout_s: float = GENEROUS_S) -> Said | None:
        """The next message; None if there is none in time."""
        self.socket.settimeout(timeout_s)
        try:
            message = self.socket.recv(4096).decode()
        except (TimeoutError, BlockingIOError):
            return None
        said = dict(line.split("=", 1) for line in message.split("\n"))
        self.history.append(said)
        return said

    def wait(self, name: str, value: str | None = None) -> Said:
        """The next message that assigns `name` (this value), within a generous time; others are in `history`."""
        deadline = time.monotonic() + GENEROUS_S
        while time.monotonic() < deadline:
            said = self.hear()
            if said is not None and name in said and value in (None, said[name]):
                return said
        pytest.fail(f"no {name} came: {self.history}")

    def count(self, name: str) -> int:
        return sum(name in said for said in self.history)


@pytest.fixture(params=["/", "@"], ids=["file", "abstract"])
def any_systemd(request: pytest.FixtureRequest) -> Iterator[Systemd]:
    yield from _listen(request.param)


@pytest.fixture
def systemd() -> Iterator[Systemd]:
    yield from _listen("/")


def _listen(kind: str) -> Iterator[Systemd]:
    # Not pytest's folder: an address has 107 characters at most.
    with tempfile.TemporaryDirectory() as folder:
        listener = Systemd(kind.replace("/", "") + folder + "/notify")
        yield listener
        listener.socket.close()


class Told:
    """A notifier that speaks when asked to, on a clock of its own."""

    def __init__(self, service: Any, clock: Clock, systemd: Systemd, watchdog_s: float | None, is_first: bool) -> None:
        self._notifier = Notifier(service, Supervisor(systemd.address, watchdog_s), is_first=is_first)
        self._clock = clock
        self._systemd = systemd

    def __call__(self, after_s: float = 0.0) -> Said:
        """What it says after so many seconds; nothing is {}."""
        self._clock.now += after_s
        self._notifier.tell()
        return self._systemd.hear(0) or {}


@pytest.fixture
def make_told(make_service: Any, systemd: Systemd) -> Callable[..., Told]:
    def make(
        runner: EchoRunner | None = None,
        *,
        load: FakeLoad | None = None,
        watchdog_s: float | None = 180.0,
        is_first: bool = True,
        **limits: Any,
    ) -> Told:
        clock = Clock()
        models = {name: FakeLoaded(runner or EchoRunner()) for name in NAMES}
        service = make_service(models, load=load, wait=load is None or load.gate.is_set(), clock=clock, **limits)
        told = Told(service, clock, systemd, watchdog_s, is_first)
        told.service = service  # type: ignore[attr-defined]
        return told

    return make


def held_load(**failures: Exception) -> FakeLoad:
    load = FakeLoad({name: FakeLoaded() for name in NAMES}, failures)
    load.gate.clear()
    return load


# What is said, and when.


def test_loading_extends_the_start_and_ready_comes_once_after_it(make_told: Any, wait_until: Any) -> None:
    load = held_load()
    told = make_told(load=load, load_timeout_s=600.0, stall_limit_s=60.0)
    wait_until(lambda: told.service.snapshot().models["avibe"].phase == "weights")
    first = told()
    assert first["STATUS"] == "avibe loading (weights), avision loading"
    assert float(first["EXTEND_TIMEOUT_USEC"]) == (60 + REPLACE_S) * 1e6
    assert told(1) == {}, "neither news nor due"
    assert told(5).keys() == {"EXTEND_TIMEOUT_USEC"}
    load.gate.set()
    assert told.service.wait_loaded(GENEROUS_S)
    assert told(1)["READY"] == "1"
    assert told(5) == {"WATCHDOG": "1"}
    assert told(1000) == {"WATCHDOG": "1"}, "an idle engine makes progress"


def test_start_is_extended_no_longer_than_all_models_may_load(make_told: Any) -> None:
    told = make_told(load=held_load(), load_timeout_s=30.0)
    assert "EXTEND_TIMEOUT_USEC" in told(59)
    assert "EXTEND_TIMEOUT_USEC" not in told(5)


def test_one_model_of_two_that_failed_leaves_the_service_ready_and_says_so(make_told: Any) -> None:
    load = FakeLoad({name: FakeLoaded() for name in NAMES}, {"avision": LoadError("no such weights")})
    told = make_told(load=load)
    said = told()
    assert (said["READY"], said["STATUS"]) == ("1", "avibe ready, avision failed")
    assert told(5) == {"WATCHDOG": "1"}


@pytest.mark.parametrize("is_first", [True, False])
def test_service_without_a_model_is_never_ready_and_makes_no_progress(make_told: Any, is_first: bool) -> None:
    load = FakeLoad({}, {name: LoadError("no such weights\nREADY=1") for name in NAMES})
    told = make_told(load=load, is_first=is_first)
    assert told() == {"STATUS": "avibe failed, avision failed"}
    assert told(5) == told(100) == {}


def test_worker_that_replaces_a_lost_one_feeds_the_watchdog_while_it_loads(make_told: Any) -> None:
    told = make_told(load=held_load(), is_first=False, load_timeout_s=30.0)
    said = told()
    assert said["WATCHDOG"] == "1" and "EXTEND_TIMEOUT_USEC" not in said
    assert told(5)["WATCHDOG"] == "1"
    assert "WATCHDOG" not in told(60), "its time to load is over"


def test_stalled_engine_does_not_feed_and_one_that_makes_steps_does(make_told: Any, wait_until: Any) -> None:
    runner = EchoRunner()
    runner.gate.clear()
    told = make_told(runner, stall_limit_s=60.0)
    assert told()["WATCHDOG"] == "1"
    channel = submit(told.service)
    assert told(4.9) == {}
    assert told(0.2) == told(54) == {}
    assert told(1) == {"STATUS": "the engine is lost, avibe ready, avision ready"}
    runner.gate.set()
    channel.wait_end(GENEROUS_S)
    wait_until(lambda: told.service.snapshot().stalled_s == 0)
    assert told()["WATCHDOG"] == "1"


def test_dead_engine_does_not_feed(make_told: Any, wait_until: Any) -> None:
    def die(_: Any) -> None:
        raise EngineDead("sticky")

    told = make_told(EchoRunner(die))
    assert told()["READY"] == "1"
    submit(told.service)
    wait_until(lambda: not told.service.snapshot().is_alive)
    assert told(5) == {"STATUS": "the engine is lost, avibe ready, avision ready"}


def test_drain_is_told_and_goes_on_making_progress(make_told: Any) -> None:
    told = make_told()
    told()
    told.service.drain()
    assert told(5) == {"STATUS": "draining, avibe ready, avision ready", "WATCHDOG": "1"}


def test_without_a_watchdog_nothing_feeds_one(make_told: Any) -> None:
    told = make_told(watchdog_s=None)
    assert told().keys() == {"STATUS", "READY"}
    assert told(5) == {}


def test_watchdog_is_made_longer_than_a_raised_stall_limit(make_told: Any) -> None:
    assert "WATCHDOG_USEC" not in make_told(watchdog_s=120.0, stall_limit_s=60.0)()
    told = make_told(watchdog_s=120.0, stall_limit_s=300.0)
    assert float(told()["WATCHDOG_USEC"]) == silence_s(told.service.limits) * 1e6 == (300 + REPLACE_S) * 1e6


def test_what_could_not_be_sent_is_said_again(make_told: Any, systemd: Systemd) -> None:
    told = make_told()
    Path(systemd.address).rename(systemd.address + ".away")
    assert told() == {}
    Path(systemd.address + ".away").rename(systemd.address)
    said = told(1)
    assert (said["READY"], said["WATCHDOG"]) == ("1", "1") and "STATUS" in said


@pytest.mark.parametrize("address", ["/nowhere/notify", "@nobody", "/" + "x" * 200, "/nul\0", "@"])
def test_supervisor_that_is_away_harms_nobody(address: str) -> None:
    assert send(Supervisor(address, None), "READY=1") is False


# Whom to tell.


def test_variables_of_the_supervisor_are_taken_out_of_the_environment() -> None:
    environ = {"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "180000000", "WATCHDOG_PID": "7", "PATH": "/bin"}
    assert take_supervisor(environ, pid=7) == Supervisor("@x", 180.0)
    assert environ == {"PATH": "/bin"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"NOTIFY_SOCKET": ""}, None),
        ({"NOTIFY_SOCKET": "relative"}, None),
        ({"NOTIFY_SOCKET": "vsock:2:1234"}, None),
        ({"WATCHDOG_USEC": "1000000"}, None),
        ({"NOTIFY_SOCKET": "/x"}, Supervisor("/x", None)),
        ({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "0"}, Supervisor("/x", None)),
        ({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "soon"}, Supervisor("/x", None)),
        ({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "500000"}, Supervisor("/x", 0.5)),
        ({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "500000", "WATCHDOG_PID": "8"}, Supervisor("/x", None)),
    ],
    ids=str,
)
def test_supervisor_is_who_systemd_says(variables: dict[str, str], expected: Supervisor | None) -> None:
    assert take_supervisor(variables, pid=7) == expected


# The real server.


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(systemd: Systemd, factory: str, *, watchdog_s: float = 180.0, **settings: str) -> Server:
        settings |= {"NOTIFY_SOCKET": systemd.address, "WATCHDOG_USEC": str(round(watchdog_s * 1e6))}
        servers.append(Server(tmp_path, factory, settings))
        return servers[-1]

    yield start
    for server in servers:
        server.process.kill()
        server.process.wait(GENEROUS_S)


def test_server_is_ready_after_loading_and_stopping_at_sigterm(serve: Any, any_systemd: Systemd) -> None:
    systemd = any_systemd
    server = serve(systemd, "create(step_s=0.01, load_s=3)")
    while "READY" not in (said := systemd.wait("STATUS")):
        assert said["STATUS"] == "avibe loading (weights)"
    assert server.get("/api/health/ready")[0] == 200
    assert said["STATUS"] == "avibe ready"
    assert systemd.count("READY") == 1 and systemd.count("EXTEND_TIMEOUT_USEC") >= 1
    running = server.send_request("x" * 200)
    server.wait(lambda: server.application()["requests_running"] == 1, "a running request")
    server.process.send_signal(signal.SIGTERM)
    stopping = systemd.wait("STOPPING")
    assert float(stopping["EXTEND_TIMEOUT_USEC"]) > 135e6
    assert server.process.poll() is None, "it is told when it begins"
    assert read_answer(running)[0] == 200
    running.close()
    assert server.process.wait(GENEROUS_S) == 0
    while systemd.hear(0):
        pass
    assert systemd.count("STOPPING") == systemd.count("READY") == 1


def test_hung_engine_is_given_up_within_the_watchdogs_limit(serve: Any, systemd: Systemd) -> None:
    """Our own watchdog would have acted long before: here it is as good as absent."""
    watchdog_s = 4.0
    server = serve(systemd, "create(step_s=0.01)", watchdog_s=watchdog_s, AVITO_STALL_LIMIT_S="3600")
    systemd.wait("READY")
    systemd.wait("WATCHDOG")
    with server.send_request("hang"):
        server.wait(lambda: server.application()["requests_running"] == 1, "a running request")
        hung_at = last_fed_at = time.monotonic()
        # As systemd does it: the time runs from each word.
        while (left_s := last_fed_at + watchdog_s - time.monotonic()) > 0:
            said = systemd.hear(left_s)
            if said is not None and "WATCHDOG" in said:
                last_fed_at = time.monotonic()
            assert last_fed_at - hung_at < watchdog_s, "still fed"
        assert server.process.poll() is None, "it is systemd that must end this"


def test_watchdog_stays_content_while_a_lost_worker_is_replaced(serve: Any, systemd: Systemd) -> None:
    server = serve(systemd, "create(step_s=0.01, load_s=2)", watchdog_s=20.0, AVITO_STALL_LIMIT_S="1")
    systemd.wait("READY")
    systemd.wait("WATCHDOG")
    with server.send_request("hang"):
        fed_at = [time.monotonic()]
        num_heard = len(systemd.history)
        while "READY" not in (said := systemd.hear() or pytest.fail("silence")):
            if "WATCHDOG" in said:
                fed_at.append(time.monotonic())
        fed_at.append(time.monotonic())
    since = systemd.history[num_heard:]
    reload = next(i for i, said in enumerate(since) if said.get("STATUS", "").startswith("avibe loading"))
    assert since[reload].get("WATCHDOG") == "1", "it feeds from its first word on"
    assert max(b - a for a, b in pairwise(fed_at)) < 20.0
    assert not any("STOPPING" in said or "EXTEND_TIMEOUT_USEC" in said for said in since)
    server.wait_ready()
    assert "exited with code 70" in server.log.read_text()


def test_reload_of_the_master_is_no_stop(serve: Any, systemd: Systemd) -> None:
    server = serve(systemd, "create(step_s=0.01)")
    systemd.wait("READY")
    server.process.send_signal(signal.SIGHUP)
    systemd.wait("READY")
    server.wait(lambda: "Worker exiting" in server.log.read_text(), "the end of the old worker")
    while systemd.hear(0):
        pass
    assert systemd.count("STOPPING") == 0
    server.process.send_signal(signal.SIGTERM)
    systemd.wait("STOPPING")


def test_nobody_the_worker_starts_inherits_the_address(systemd: Systemd) -> None:
    code = "import os, gunicorn_config as g; g.on_starting(None); print(sorted(os.environ))"
    environ = {**os.environ, "NOTIFY_SOCKET": systemd.address, "WATCHDOG_USEC": "1"}
    environ |= {"AVIBE_MODEL_PATH": "", "AVISION_MODEL_PATH": "vision/demo"}
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT_ROOT, env=environ, capture_output=True, check=True)
    assert b"NOTIFY_SOCKET" not in done.stdout and b"WATCHDOG" not in done.stdout
    assert b"PATH" in done.stdout
