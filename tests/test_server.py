"""The real Gunicorn with our worker: slow clients, clients that leave, stops, lost engines, bodies on the wire."""

from __future__ import annotations

import http.client
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from config import PROJECT_ROOT
from tests.fake_app import make_folder

GENEROUS_S = 60.0
TEXT = "/api/v1/text/generate"
MAX_BODY = 16 * 1024 * 1024


class Server:
    """One Gunicorn on a free port of the loopback.

    :param factory: a call of `tests.fake_app`; empty: the application itself, with the models of `settings`.
    :param project: the folder that it is run from.
    """

    def __init__(
        self,
        folder: Path,
        factory: str,
        settings: dict[str, str],
        limit: Callable[[], None] | None = None,
        project: Path = PROJECT_ROOT,
    ) -> None:
        with closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("AVITO_", "AVI"))}
        environ |= {"AVIBE_MODEL_PATH": str(make_folder(folder)), "AVISION_MODEL_PATH": "", "AVITO_ENV": "development"}
        environ |= {"AVITO_PORT": str(self.port), "AVITO_RATE_LIMIT": "", "AVITO_LOG_FILE": ""} | settings
        self.environ = environ
        self.log = folder / "log"
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gunicorn", "-c", "gunicorn_config.py"]
                + ([f"tests.fake_app:{factory}"] if factory else []),
                cwd=project,
                env=environ,
                stdout=out,
                stderr=out,
                preexec_fn=limit,
            )

    def get(self, path: str) -> tuple[int, Any]:
        return self._open(urllib.request.Request(f"http://127.0.0.1:{self.port}{path}"))

    def ask(self, prompt: str, **fields: Any) -> tuple[int, Any]:
        body = json.dumps({"prompt": prompt, "max_tokens": 2000, **fields}).encode()
        headers = {"Content-Type": "application/json"}
        return self._open(urllib.request.Request(f"http://127.0.0.1:{self.port}{TEXT}", body, headers))

    @staticmethod
    def _open(request: urllib.request.Request) -> tuple[int, Any]:
        try:
            with urllib.request.urlopen(request, timeout=GENEROUS_S) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=GENEROUS_S)

    def send_request(self, prompt: str, **fields: Any) -> socket.socket:
        connection = self.connect()
        connection.sendall(raw_request(prompt, **fields))
        return connection

    def stream(self, prompt: str, **fields: Any) -> Stream:
        return Stream(self.send_request(prompt, stream=True, **fields))

    def refuses(self) -> bool:
        try:
            self.connect().close()
        except ConnectionRefusedError:
            return True
        return False

    def application(self) -> dict[str, Any]:
        return dict(self.get("/api/metrics")[1]["application"])

    def wait_ready(self) -> Server:
        self.wait(lambda: self.get("/api/health/ready")[0] == 200, "ready")
        return self

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + GENEROUS_S
        while True:
            try:
                if condition():
                    return
            except OSError:
                assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, f"no {what}:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.02)


class Stream:
    """The client's side of a streamed answer, read line by line as it comes."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.response = http.client.HTTPResponse(connection)
        self.num_comments = 0
        try:
            self.response.begin()
        except BaseException:
            self.close()
            raise

    def next(self) -> tuple[str, dict[str, Any]] | None:
        """The next event; comments before it are counted. None at the end of the stream."""
        name = ""
        while line := self.response.readline().decode():
            if line.startswith(":"):
                self.num_comments += 1
            elif line.startswith("event: "):
                name = line.removeprefix("event: ").strip()
            elif line.startswith("data: "):
                return name, json.loads(line.removeprefix("data: "))
        return None

    def rest(self) -> list[tuple[str, dict[str, Any]]]:
        with closing(self):
            return list(iter(self.next, None))

    def close(self) -> None:
        self.response.close()
        self._connection.close()


def text_of(events: list[tuple[str, dict[str, Any]]]) -> str:
    return "".join(data["text"] for name, data in events if name == "delta")


def raw_request(prompt: str, extra: str = "", **fields: Any) -> bytes:
    body = json.dumps({"prompt": prompt, "max_tokens": 2000, **fields}).encode()
    head = (
        f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"{extra}Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def read_answer(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Status, headers (lower case) and body of one answer."""
    with connection.makefile("rb") as file:
        status = int(file.readline().split()[1])
        headers = {}
        while line := file.readline().strip():
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        return status, headers, file.read(int(headers["content-length"]))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def make(factory: str = "create()", limit: Callable[[], None] | None = None, **settings: Any) -> Server:
        folder = tmp_path / str(len(servers))
        folder.mkdir()
        servers.append(Server(folder, factory, {name: str(value) for name, value in settings.items()}, limit))
        return servers[-1]

    yield make
    for server in servers:
        server.process.kill()
        server.process.wait(GENEROUS_S)


def in_threads(number: int, work: Callable[[int], Any]) -> tuple[list[threading.Thread], list[Any]]:
    results: list[Any] = [None] * number

    def run(index: int) -> None:
        try:
            results[index] = work(index)
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(number)]
    for thread in threads:
        thread.start()
    return threads, results


def test_live_answers_at_once_while_a_model_loads(start: Any) -> None:
    server = start("create(load_s=3600)")
    server.wait(lambda: server.get("/api/health/live")[0] == 200, "live")
    status, body = server.get("/api/health/ready")
    assert status == 503 and "avibe: loading" in body["why_not_ready"][0]
    assert server.ask("a")[0] == 503


def test_stop_under_load_answers_every_client_and_exits_with_zero(start: Any) -> None:
    server = start("create(step_s=0.005)", AVITO_MAX_RUNNING=4).wait_ready()
    prompt = "x" * 60
    idle = server.send_request("x")
    assert read_answer(idle)[0] == 200
    threads, results = in_threads(24, lambda _: server.ask(prompt))
    server.wait(lambda: server.application()["requests_running"] > 0, "running")
    server.process.send_signal(signal.SIGTERM)
    server.wait(server.refuses, "a closed port")
    idle.sendall(raw_request("late"))
    status, headers, body = read_answer(idle)
    assert (status, headers["connection"]) == (200, "close")
    assert json.loads(body)["data"]["text"] == "late"
    for thread in threads:
        thread.join(GENEROUS_S)
    assert [result[0] for result in results] == [200] * 24, results
    assert {result[1]["data"]["text"] for result in results} == {prompt}
    assert server.process.wait(GENEROUS_S) == 0, server.log.read_text()
    idle.close()


def test_clients_that_leave_in_mid_answer_give_their_places_back(start: Any) -> None:
    server = start("create(step_s=0.005)", AVITO_MAX_RUNNING=4).wait_ready()
    clients = [server.send_request("x" * 2000) for _ in range(20)]
    server.wait(lambda: server.application()["requests_waiting"] == 16, "a queue")
    assert server.application()["requests_running"] == 4
    for client in clients:
        client.close()

    def is_over() -> bool:
        now = server.application()
        return now["cancelled_requests"] == 20 and not now["requests_running"] + now["requests_waiting"]

    server.wait(is_over, "end of all 20")
    assert server.application()["open_requests"] == 0
    assert server.application()["total_requests"] == 20
    assert server.ask("x")[0] == 200


def test_client_that_leaves_behind_an_unread_byte_is_seen_to_leave(start: Any) -> None:
    server = start("create(step_s=0.01)").wait_ready()
    client = server.send_request("x" * 2000)
    client.sendall(b"\r\n")
    server.wait(lambda: server.application()["requests_running"] == 1, "a running request")
    client.close()
    server.wait(lambda: server.application()["cancelled_requests"] == 1, "a cancelled request")


def test_worker_without_its_master_closes_the_port_and_ends(start: Any) -> None:
    server = start("create(step_s=0.01)").wait_ready()
    client = server.send_request("x" * 300)
    server.wait(lambda: server.application()["requests_running"] == 1, "a running request")
    server.process.kill()
    server.process.wait(GENEROUS_S)
    status, headers, _ = read_answer(client)
    assert status == 200, "what was accepted is answered"
    client.close()
    deadline = time.monotonic() + GENEROUS_S
    while not server.refuses():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert headers["content-type"] == "application/json"


def test_client_that_waits_with_more_bytes_sent_is_not_taken_for_gone(start: Any) -> None:
    server = start("create(step_s=0.01)").wait_ready()
    with closing(server.send_request("x" * 80)) as client:
        client.sendall(raw_request("second"))
        assert json.loads(read_answer(client)[2])["data"]["text"] == "x" * 80


SLOW = [
    b"",
    b"POST /api/v1/text/generate HTTP/1.1\r\nHost: x\r\nX-Slow: ",
    raw_request("x" * 200)[:-150],
]


@pytest.mark.parametrize("beginning", SLOW, ids=["silent", "half a header", "half a body"])
@pytest.mark.parametrize("is_dripping", [False, True], ids=["stalled", "dripping"])
def test_twice_as_many_slow_clients_as_threads_do_not_shut_others_out(
    start: Any, beginning: bytes, is_dripping: bool
) -> None:
    server = start(AVITO_THREADS=4, AVITO_READ_TIMEOUT_S=1).wait_ready()
    slow = [server.connect() for _ in range(8)]
    for client in slow:
        client.sendall(beginning)
    stop = threading.Event()

    def drip() -> None:
        while not stop.wait(0.1):
            for client in slow:
                try:
                    client.sendall(b"a")
                except OSError:
                    continue

    dripper = threading.Thread(target=drip)
    if is_dripping and beginning:
        dripper.start()
    try:
        threads, results = in_threads(4, lambda _: server.ask("hello"))
        for thread in threads:
            thread.join(15)
        assert [result and result[0] for result in results] == [200] * 4, results
    finally:
        stop.set()
        if dripper.is_alive():
            dripper.join()
        for client in slow:
            client.close()


def test_sound_client_behind_slow_ones_gets_its_answer_however_long_that_takes(start: Any) -> None:
    """Its request lies complete in the queue while the slow ones' time runs out, and its answer takes a while."""
    server = start("create(step_s=0.01)", AVITO_THREADS=4, AVITO_READ_TIMEOUT_S=1).wait_ready()
    slow = [server.connect() for _ in range(8)]
    for client in slow:
        client.sendall(SLOW[2])
    threads, results = in_threads(4, lambda _: server.ask("x" * 60))
    for thread in threads:
        thread.join(GENEROUS_S)
    assert [result and result[0] for result in results] == [200] * 4, results
    for client in slow:
        client.close()


def test_time_in_the_servers_queue_counts_as_the_requests(start: Any) -> None:
    """A request that waits for a thread is on its way already: its deadline and its times count from its first byte."""
    server = start("create(step_s=0.01)", AVITO_THREADS=2).wait_ready()
    started = time.monotonic()
    busy, _ = in_threads(2, lambda _: server.ask("x" * 100))
    late = server.ask("x" * 2)[1]
    waited = time.monotonic() - started
    for thread in busy:
        thread.join(GENEROUS_S)
    assert late["metrics"]["total_time"] > 0.7 * waited


def test_server_without_file_descriptors_survives(start: Any) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))

    server = start(limit=limit, AVITO_THREADS=4).wait_ready()
    silent = [server.connect() for _ in range(400)]
    for client in silent:
        client.close()
    server.wait(lambda: server.ask("hello")[0] == 200, "an answer")
    assert server.process.poll() is None
    assert "Worker exiting" not in server.log.read_text()


def test_silent_connection_does_not_hold_a_stop_up(start: Any) -> None:
    server = start(AVITO_READ_TIMEOUT_S=600).wait_ready()
    with closing(server.connect()):
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0


@pytest.mark.parametrize("path", ["/", "/avibe", "/nothing"])
@pytest.mark.parametrize("host", ["..", "x" * 300, "a b", "[::1", ""])
def test_nonsense_host_is_answered_and_accounted_for(nonsense_server: Server, path: str, host: str) -> None:
    with closing(nonsense_server.connect()) as client:
        body = b"prompt=a"
        head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
        client.sendall(head.encode() + b"Content-Type: application/x-www-form-urlencoded\r\n\r\n" + body)
        status, headers, _ = read_answer(client)
    assert status < 500 and headers["x-request-id"], status
    nonsense_server.wait(lambda: nonsense_server.application()["open_requests"] == 0, "accounted for")


@pytest.fixture(scope="module")
def nonsense_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("nonsense"), "create()", {}).wait_ready()
    yield server
    server.process.kill()
    server.process.wait(GENEROUS_S)


def test_malformed_chunk_is_a_bad_request(nonsense_server: Server) -> None:
    head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    with closing(nonsense_server.connect()) as client:
        client.sendall(head.encode() + b"zz\r\nabc\r\n0\r\n\r\n")
        status, _, body = read_answer(client)
    assert status == 400 and json.loads(body)["error"]["code"] == "invalid_request"


def test_body_that_ends_early_is_told_and_counted(start: Any) -> None:
    server = start(AVITO_READ_TIMEOUT_S=1).wait_ready()
    with closing(server.connect()) as client:
        client.sendall(raw_request("x" * 200)[:-150])
        status, _, body = read_answer(client)
    assert status == 400
    assert "body: ended before its" in json.loads(body)["error"]["message"]
    server.wait(lambda: server.application()["rejected_requests"] == 1, "an outcome")


def test_clients_that_never_read_their_answer_do_not_hold_threads(start: Any) -> None:
    server = start(AVITO_THREADS=4, AVITO_ANSWER_TIMEOUT_S=1).wait_ready()
    lazy = []
    for _ in range(8):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        client.sendall(b"GET /static/vendor/swagger-ui/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n" * 4)
        lazy.append(client)
    assert server.ask("hello")[0] == 200
    for client in lazy:
        client.close()


def chunked(size: int) -> Iterator[bytes]:
    frame = b'{"prompt": "a"}'
    yield b"%x\r\n%s\r\n" % (len(frame), frame)
    left = size - len(frame)
    while left:
        part = min(left, 1 << 20)
        yield b"%x\r\n%s\r\n" % (part, b" " * part)
        left -= part
    yield b"0\r\n\r\n"


@pytest.mark.parametrize(("extra", "expected"), [(0, 200), (1, 413)])
def test_chunked_body_passes_up_to_the_limit(start: Any, extra: int, expected: int) -> None:
    server = start().wait_ready()
    head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    with closing(server.connect()) as client:
        client.sendall(head.encode())
        for part in chunked(MAX_BODY + extra):
            client.sendall(part)
        status, _, body = read_answer(client)
    assert status == expected, body
    if expected == 413:
        assert json.loads(body)["error"]["code"] == "payload_too_large"


def test_announced_body_beyond_the_limit_is_answered_while_it_is_still_being_sent(start: Any) -> None:
    """The client reads the 413 and no reset, though it sends everything first."""
    server = start().wait_ready()
    size = 2 * MAX_BODY
    head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {size}\r\n\r\n"
    with closing(server.connect()) as client:
        client.sendall(head.encode())
        sent = threading.Thread(target=send_quietly, args=(client, size))
        sent.start()
        status, _, body = read_answer(client)
        assert (status, json.loads(body)["error"]["code"]) == (413, "payload_too_large")
        client.close()
        sent.join(GENEROUS_S)


def send_quietly(client: socket.socket, size: int) -> None:
    try:
        for _ in range(size >> 16):
            client.sendall(b" " * (1 << 16))
    except OSError:
        return


def test_hung_engine_is_replaced_after_everybody_is_answered(start: Any) -> None:
    server = start("create(step_s=0.001)", AVITO_STALL_LIMIT_S=1).wait_ready()
    uptime = server.get("/api/health")[1]["uptime_seconds"]
    status, body = server.ask("hang")
    assert (status, body["error"]["code"]) == (500, "internal_error")
    server.wait(lambda: server.get("/api/health")[1]["uptime_seconds"] < uptime + 1, "a new worker")
    server.wait_ready()
    assert server.ask("hello")[1]["data"]["text"] == "hello"
    log = server.log.read_text()
    assert "the engine is lost" in log and "--- engine" in log


# Streams.


def test_stream_comes_in_order_and_longer_than_the_answer_timeout(start: Any) -> None:
    """The time-out is for clients that do not read, and not for answers that take their time."""
    prompt = "привет 🎉 " * 8
    server = start("create(step_s=0.02)", AVITO_ANSWER_TIMEOUT_S=1).wait_ready()
    stream = server.stream(prompt)
    headers = {name.lower(): value for name, value in stream.response.getheaders()}
    assert stream.response.status == 200
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    *deltas, (name, done) = stream.rest()
    assert len(deltas) > 10 and {name for name, _ in deltas} == {"delta"} and name == "done"
    assert text_of(deltas) == done["data"]["text"] == prompt
    assert done["metrics"]["total_time"] > 2
    assert float(headers["x-response-time"].rstrip("s")) < done["metrics"]["total_time"], "the time to the headers"
    assert done["request_id"] == headers["x-request-id"]
    server.wait(lambda: server.application()["ok_requests"] == 1, "an outcome")
    assert server.application()["total_requests"] == 1


def test_kept_connection_serves_the_next_request_after_a_stream(start: Any) -> None:
    server = start().wait_ready()
    with closing(server.connect()) as connection:
        for prompt in ("one", "two"):
            connection.sendall(raw_request(prompt, stream=True))
            response = http.client.HTTPResponse(connection)
            response.begin()
            assert f'"text":"{prompt}"' in response.read().decode()
        connection.sendall(raw_request("three"))
        assert json.loads(read_answer(connection)[2])["data"]["text"] == "three"


@pytest.mark.parametrize("running", [True, False], ids=["in mid-stream", "in the queue"])
def test_client_that_leaves_a_stream_gives_its_place_back(start: Any, running: bool) -> None:
    server = start("create(step_s=0.01)", AVITO_MAX_RUNNING=1).wait_ready()
    first = server.stream("x" * 2000)
    assert first.next()[0] == "delta"
    second = server.stream("y" * 2000)
    (first if running else second).close()
    server.wait(lambda: server.application()["cancelled_requests"] == 1, "a cancelled request")
    if running:
        assert second.next()[0] == "delta", "the place went to who waited"
        second.close()
    else:
        assert server.application()["requests_running"] == 1 and server.application()["requests_waiting"] == 0
        first.close()
    server.wait(lambda: server.application()["cancelled_requests"] == 2, "both cancelled")
    now = server.application()
    assert (now["total_requests"], now["open_requests"], now["requests_running"]) == (2, 0, 0)
    server.wait(lambda: server.log.read_text().count("outcome=cancelled reason=- status=499") == 2, "audit lines")


def test_queued_stream_is_kept_alive_by_comments(start: Any) -> None:
    server = start("create(step_s=0.01, keep_alive_s=0.02)", AVITO_MAX_RUNNING=1).wait_ready()
    busy = server.send_request("x" * 60)
    server.wait(lambda: server.application()["requests_running"] == 1, "a running request")
    stream = server.stream("hello")
    assert stream.next()[0] == "delta"
    assert stream.num_comments > 3
    assert stream.rest()[-1][1]["data"]["text"] == "hello"
    busy.close()


def test_stop_in_mid_stream_lets_every_stream_come_to_its_end(start: Any) -> None:
    prompt = "x" * 100
    server = start("create(step_s=0.01)", AVITO_MAX_RUNNING=2).wait_ready()
    streams = [server.stream(prompt) for _ in range(4)]
    beginning = streams[0].next()
    server.process.send_signal(signal.SIGTERM)
    server.wait(server.refuses, "a closed port")
    for stream, before in zip(streams, ([beginning], [], [], []), strict=True):
        *deltas, (name, done) = before + stream.rest()
        assert name == "done" and text_of(deltas) == done["data"]["text"] == prompt
    assert server.process.wait(GENEROUS_S) == 0, server.log.read_text()


def test_hung_engine_ends_a_stream_with_an_error_event(start: Any) -> None:
    server = start("create(step_s=0.001)", AVITO_STALL_LIMIT_S=1).wait_ready()
    ((name, error),) = server.stream("hang").rest()
    assert (name, error["error"]["code"]) == ("error", "internal_error")
    server.wait(lambda: "outcome=error" in server.log.read_text(), "an audit line")


def test_streams_and_whole_answers_together_are_each_accounted_for_once(start: Any) -> None:
    server = start("create(step_s=0.002)", AVITO_MAX_RUNNING=8).wait_ready()

    def ask(index: int) -> Any:
        prompt = f"number {index} " * 5
        if index % 4 == 0:
            stream = server.stream(prompt * 20)
            stream.next()
            stream.close()
            return None
        if index % 4 == 1:
            return server.ask(prompt)[1]["data"]["text"] == prompt
        if index % 4 == 2:
            with closing(server.stream(prompt, max_tokens=-1)) as refusal:
                return refusal.response.status == 400
        *deltas, (_, done) = server.stream(prompt).rest()
        return text_of(deltas) == done["data"]["text"] == prompt

    threads, results = in_threads(32, ask)
    for thread in threads:
        thread.join(GENEROUS_S)
    assert results == [None, True, True, True] * 8
    server.wait(lambda: server.application()["open_requests"] == 0, "the end of all")
    now = server.application()
    outcomes = [now[f"{name}_requests"] for name in ("ok", "rejected", "cancelled", "expired", "error")]
    assert outcomes == [16, 8, 8, 0, 0] and now["total_requests"] == 32
    assert now["requests_running"] == now["requests_waiting"] == 0


def test_timeouts_of_server_and_requests_fit_together(start: Any) -> None:
    """The server's grace is above the longest request."""
    code = "import gunicorn_config as g; print(g.graceful_timeout)"
    environ = {**os.environ, "AVIBE_MODEL_PATH": str(start().log.parent / "snapshot"), "AVISION_MODEL_PATH": ""}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT_ROOT, env=environ, capture_output=True, text=True, check=True
    )
    from config import Settings

    assert int(result.stdout) > Settings().request_deadline_s


def test_revoked_key_is_refused_on_a_kept_connection_and_usage_is_kept_at_the_stop(start: Any, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"

    def command(*arguments: str) -> str:
        result = subprocess.run(
            [sys.executable, "-m", "keys", "--file", str(keys), *arguments],
            cwd=PROJECT_ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        return result.stdout.strip()

    secret, _ = command("make", "first"), command("make", "second")
    server = start(AVITO_KEYS_FILE=keys).wait_ready()
    request = raw_request("abc", extra=f"Authorization: Bearer {secret}\r\n")
    with closing(server.connect()) as connection:

        def ask() -> int:
            connection.sendall(request)
            return read_answer(connection)[0]

        assert [ask(), ask()] == [200, 200]
        command("revoke", "first")
        server.wait(lambda: ask() == 401, "refusal")
    assert secret not in server.log.read_text() and " key=first " in server.log.read_text()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(GENEROUS_S) == 0
    (used,) = json.loads(keys.with_name("keys.json.usage").read_text())["tokens"].values()
    num_answered = server.log.read_text().count("outcome=ok")
    assert used == num_answered * 6 >= 12


def test_a_wrong_keys_file_ends_the_start_with_a_sentence(start: Any, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    keys.write_text('{"keys": [{"id": "x"}]}')
    server = start(AVITO_KEYS_FILE=keys)
    assert server.process.wait(GENEROUS_S) == 1
    assert server.log.read_text().startswith(f"configuration: AVITO_KEYS_FILE={keys}: keys.0.id: ")
