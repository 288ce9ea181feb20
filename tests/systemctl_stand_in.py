"""Stands in for systemctl and journalctl where there is no systemd: starts and stops the installed unit for real.

What it takes from the unit and its drop-ins: ExecStart, WorkingDirectory, Environment, EnvironmentFile, Type=notify
(its own NOTIFY_SOCKET), TimeoutStopSec, and with the prefix / the user. What it leaves out: hardening, restarts, the
start limit, the watchdog. DEPLOY_PREFIX says where the unit folder lies. `journal` prints the end of what the service
wrote.

    DEPLOY_SYSTEMCTL="python tests/systemctl_stand_in.py" DEPLOY_JOURNALCTL="$DEPLOY_SYSTEMCTL journal"
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

NAME = "avito-ai"
PREFIX = Path(os.environ["DEPLOY_PREFIX"])
UNITS = PREFIX / "etc/systemd/system"
RUN = PREFIX / "run/systemctl-stand-in"
STATUS = RUN / "status.json"
JOURNAL = RUN / "journal"
DEFAULT_STOP_S = "90"


def read_unit() -> list[tuple[str, str]]:
    """Assignments of the unit, then of its drop-ins."""
    files = [UNITS / f"{NAME}.service", *sorted((UNITS / f"{NAME}.service.d").glob("*.conf"))]
    pairs = []
    for file in files:
        for line in file.read_text().splitlines():
            name, equals, value = line.strip().partition("=")
            if equals and name[0] not in "#;":
                pairs.append((name, value))
    return pairs


def values_of(unit: list[tuple[str, str]], name: str) -> list[str]:
    """All values of a list setting; an empty assignment begins anew."""
    values: list[str] = []
    for key, value in unit:
        if key == name:
            values = [*values, value] if value else []
    return values


def service_environment(unit: list[tuple[str, str]]) -> dict[str, str]:
    environment = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
    for assignments in values_of(unit, "Environment"):
        environment.update(part.partition("=")[::2] for part in shlex.split(assignments))
    for file in values_of(unit, "EnvironmentFile"):
        for line in Path(file).read_text().splitlines():
            name, equals, value = line.partition("=")
            if equals and name[:1] not in "#;":
                environment[name] = value
    return environment


def write_status(**values: Any) -> None:
    fresh = STATUS.with_suffix(".new")
    fresh.write_text(json.dumps(values))
    fresh.replace(STATUS)


def read_status() -> dict[str, Any]:
    status: dict[str, Any] = {"ActiveState": "inactive", "MainPID": 0, "supervisor": 0}
    if STATUS.exists():
        status |= json.loads(STATUS.read_text())
    return status


def take_lock(*, wait: bool) -> int | None:
    """Held by the supervisor of the running service."""
    descriptor = os.open(RUN / "lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def supervise(lock: int) -> None:
    """Run the service until it ends or SIGTERM comes, and tell how it stands in the status file."""
    unit = read_unit()
    environment = service_environment(unit)
    is_notify = ("Type", "notify") in unit
    stop_s = float((values_of(unit, "TimeoutStopSec") or [DEFAULT_STOP_S])[-1])
    notices = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    if is_notify:
        notices.bind(f"\0{NAME}-{os.getpid()}")
        environment["NOTIFY_SOCKET"] = f"@{NAME}-{os.getpid()}"
    is_asked_to_stop: list[int] = []
    waker, wakened = os.pipe()
    os.set_blocking(wakened, False)
    signal.set_wakeup_fd(wakened, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.signal(signal.SIGTERM, lambda number, frame: is_asked_to_stop.append(number))
    user = values_of(unit, "User")[-1] if Path("/") == PREFIX else None
    with JOURNAL.open("ab") as journal:
        process = subprocess.Popen(
            shlex.split(values_of(unit, "ExecStart")[-1]),
            cwd=values_of(unit, "WorkingDirectory")[-1],
            env=environment,
            stdout=journal,
            stderr=journal,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            user=user,
            group=user,
            extra_groups=None if user is None else [],
        )
    state = "activating" if is_notify else "active"
    deadline: float | None = None
    while process.poll() is None:
        if is_asked_to_stop and deadline is None:
            state, deadline = "deactivating", time.monotonic() + stop_s
            process.terminate()
        if deadline is not None and time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
        write_status(ActiveState=state, MainPID=process.pid, supervisor=os.getpid())
        ready, _, _ = select.select([waker, *([notices.fileno()] if is_notify else [])], [], [], 1.0)
        if notices.fileno() in ready and b"READY=1" in notices.recv(65536) and state == "activating":
            state = "active"
        if waker in ready:
            os.read(waker, 4096)
    state = "inactive" if is_asked_to_stop or process.returncode == 0 else "failed"
    write_status(ActiveState=state, MainPID=0, supervisor=0)
    os.close(lock)


def start(*, wait: bool) -> int:
    lock = take_lock(wait=False)
    if lock is None:
        return 0  # it runs
    write_status(ActiveState="activating", MainPID=0, supervisor=0)
    if os.fork() == 0:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        supervise(lock)
        os._exit(0)
    os.close(lock)
    waiting = ("activating",) if wait else ()
    while (status := read_status())["ActiveState"] in waiting or (not status["supervisor"] and is_starting(status)):
        time.sleep(0.01)
    return 1 if status["ActiveState"] == "failed" else 0


def is_starting(status: dict[str, Any]) -> bool:
    return bool(status["ActiveState"] == "activating")


def stop() -> int:
    while (lock := take_lock(wait=False)) is None:
        if supervisor := read_status()["supervisor"]:
            os.kill(supervisor, signal.SIGTERM)
            lock = take_lock(wait=True)
            break
        time.sleep(0.01)
    write_status(ActiveState="inactive", MainPID=0, supervisor=0)
    assert lock is not None
    os.close(lock)
    return 0


def main(arguments: list[str]) -> int:
    RUN.mkdir(parents=True, exist_ok=True)
    command, *rest = arguments
    with (RUN / "calls").open("a") as calls:
        calls.write(f"{command}\n")
    if command == "start":
        return start(wait="--no-block" not in rest)
    if command == "stop":
        return stop()
    if command == "show":
        for name, value in read_status().items():
            print(f"{name}={value}")
    elif command == "journal":
        lines = JOURNAL.read_text(errors="replace").splitlines() if JOURNAL.exists() else []
        print("\n".join(lines[-30:]))
    elif command == "reset-failed":
        if read_status()["ActiveState"] == "failed":
            write_status(ActiveState="inactive", MainPID=0, supervisor=0)
    elif command not in ("daemon-reload", "enable", "disable"):
        print(f"unknown command {command}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
