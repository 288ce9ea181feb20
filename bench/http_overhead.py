"""What HTTP costs: `POST /api/v1/text/generate` on the real server with an instant fake runner, over loopback.

Everything but the model is real: Gunicorn, middleware, parsing, queue, engine thread, delivery, audit line. Client and
server share the machine's cores, so the figures are an upper bound.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from config import PROJECT_ROOT
from tests.fake_app import make_folder

PATH = "/api/v1/text/generate"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", type=int, default=2000, help="requests per round (default 2000)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16], help="numbers of clients (default 1 16)")


def run(arguments: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as folder:
        port = _free_port()
        process = _start(Path(folder), port)
        try:
            _wait_ready(port)
            worker = psutil.Process(process.pid).children()[0]
            _measure(port, 1, 200, worker)  # warm-up
            print(f"{'clients':>8} {'p50 ms':>8} {'p99 ms':>8} {'req/s':>8} {'server CPU ms/req':>18}")
            for clients in arguments.clients:
                p50, p99, rate, cpu = _measure(port, clients, arguments.requests, worker)
                print(f"{clients:>8} {p50:>8.2f} {p99:>8.2f} {rate:>8.0f} {cpu:>18.2f}")
        finally:
            process.terminate()
            process.wait(60)
    return 0


def _start(folder: Path, port: int) -> subprocess.Popen[bytes]:
    environ = {
        name: value for name, value in os.environ.items() if not name.startswith(("AVITO_", "AVIBE_", "AVISION_"))
    }
    environ |= {"AVITO_PORT": str(port), "AVITO_RATE_LIMIT": "", "AVITO_ENV": "development", "AVITO_LOG_FILE": ""}
    environ |= {"AVIBE_MODEL_PATH": str(make_folder(folder)), "AVISION_MODEL_PATH": ""}
    command = [sys.executable, "-m", "gunicorn", "-c", "gunicorn_config.py", "tests.fake_app:create()"]
    return subprocess.Popen(command, cwd=PROJECT_ROOT, env=environ, stdout=subprocess.DEVNULL)


def _measure(port: int, clients: int, num_requests: int, worker: psutil.Process) -> tuple[float, float, float, float]:
    """(p50 ms, p99 ms, requests/s, CPU ms of the worker per request)."""
    latencies: list[float] = []
    lock = threading.Lock()

    def client() -> None:
        mine = []
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(num_requests // clients):
                started = time.perf_counter()
                _ask(connection)
                mine.append(time.perf_counter() - started)
        with lock:
            latencies.extend(mine)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    cpu_before, started = sum(worker.cpu_times()[:2]), time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed, cpu = time.perf_counter() - started, sum(worker.cpu_times()[:2]) - cpu_before
    cuts = statistics.quantiles(latencies, n=100)
    return 1e3 * cuts[49], 1e3 * cuts[98], len(latencies) / elapsed, 1e3 * cpu / len(latencies)


def _ask(connection: socket.socket) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 8, "temperature": 0}).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += connection.recv(65536)
    head_end = answer.index(b"\r\n\r\n") + 4
    length = int(answer.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    while len(answer) < head_end + length:
        answer += connection.recv(65536)
    if not answer.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"unexpected answer: {answer[:200]!r}")


def _wait_ready(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(b"GET /api/health/ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                if connection.recv(64).startswith(b"HTTP/1.1 200"):
                    return
        except ConnectionRefusedError:
            pass
        time.sleep(0.05)
    raise RuntimeError("the server did not become ready")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
