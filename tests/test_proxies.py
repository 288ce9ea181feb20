"""Real nginx and HAProxy with the files of `ops/` before real Gunicorns: TLS, limits, streams, addresses, drains."""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from config import Limits, Settings
from tests.proxies import OPS, Certificate, Proxy, need, start_haproxy, start_nginx
from tests.test_server import GENEROUS_S, TEXT, Server, Stream, in_threads, raw_request, text_of

MAX_BODY = Limits().max_body_bytes
TOKEN = "0123456789abcdef"
STARTS = {"nginx": start_nginx, "haproxy": start_haproxy}
each_proxy = pytest.mark.parametrize("kind", list(STARTS))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    need("openssl")
    return Certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One host behind all proxies of this file that need no more."""
    settings = {"AVITO_TRUSTED_PROXIES": "1", "AVITO_RATE_LIMIT": "1000/minute"}
    server = Server(tmp_path_factory.mktemp("server"), "create(step_s=0.02)", settings)
    yield server.wait_ready()
    server.process.kill()
    server.process.wait(GENEROUS_S)


@pytest.fixture
def start(tmp_path: Path, certificate: Certificate) -> Iterator[Callable[..., Proxy]]:
    """Starts a proxy before servers; all of them end with the test."""
    made: list[Proxy] = []

    def make(kind: str, *servers: Server) -> Proxy:
        need(kind)
        folder = tmp_path / f"{kind}{len(made)}"
        folder.mkdir()
        made.append(STARTS[kind](folder, [server.port for server in servers], certificate))
        return made[-1]

    yield make
    for proxy in made:
        proxy.stop()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def make(factory: str) -> Server:
        folder = tmp_path / f"server{len(servers)}"
        folder.mkdir()
        servers.append(Server(folder, factory, {"AVITO_TRUSTED_PROXIES": "1", "AVITO_OPS_TOKEN": TOKEN}))
        return servers[-1]

    yield make
    for server in servers:
        server.process.kill()
        server.process.wait(GENEROUS_S)


def connect(proxy: Proxy, source: str = "127.0.0.1") -> http.client.HTTPSConnection:
    context = proxy.certificate.context()
    return http.client.HTTPSConnection(
        "127.0.0.1", proxy.port, timeout=GENEROUS_S, context=context, source_address=(source, 0)
    )


def ask(
    proxy: Proxy, method: str, path: str, body: bytes | None = None, source: str = "127.0.0.1", **headers: str
) -> tuple[int, http.client.HTTPMessage, bytes]:
    with closing(connect(proxy, source)) as connection:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, response.headers, response.read()


def generate(proxy: Proxy, prompt: str, source: str = "127.0.0.1", **headers: str) -> tuple[int, Any]:
    body = json.dumps({"prompt": prompt}).encode()
    status, _, answer = ask(proxy, "POST", TEXT, body, source, Content_Type="application/json", **headers)
    return status, json.loads(answer)


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + GENEROUS_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@each_proxy
def test_form_and_api_answer_over_tls(kind: str, start: Any, server: Server) -> None:
    proxy = start(kind, server)
    status, headers, page = ask(proxy, "GET", "/")
    assert status == 200 and b"<form" in page
    assert headers["Strict-Transport-Security"] == "max-age=31536000"
    form = b"prompt=through+the+form"
    status, _, page = ask(proxy, "POST", "/avibe", form, Content_Type="application/x-www-form-urlencoded")
    assert status == 200 and page.count(b"through the form") >= 2, "what was typed, and the echo"
    status, answer = generate(proxy, "through the API")
    assert status == 200 and answer["data"]["text"] == "through the API"


@each_proxy
def test_clients_may_speak_http_2(kind: str, start: Any, server: Server) -> None:
    need("curl")
    proxy = start(kind, server)
    command = ["curl", "--http2", "-sS", "--cacert", str(proxy.certificate.chain), "-w", " %{http_version}"]
    command += ["-H", "Content-Type: application/json", "-d", '{"prompt": "over h2"}']
    shown = subprocess.run([*command, f"https://127.0.0.1:{proxy.port}{TEXT}"], capture_output=True, text=True)
    answer, _, version = shown.stdout.rpartition(" ")
    assert version == "2", shown.stderr
    assert json.loads(answer)["data"]["text"] == "over h2"


@each_proxy
def test_plain_http_is_sent_to_https_with_its_method(kind: str, start: Any, server: Server) -> None:
    proxy = start(kind, server)
    with closing(http.client.HTTPConnection("127.0.0.1", proxy.plain_port, timeout=GENEROUS_S)) as connection:
        connection.request("POST", f"{TEXT}?a=1", b"{}", {"Host": "ai.example.org"})
        response = connection.getresponse()
        assert response.status == 308
        assert response.headers["Location"] == f"https://ai.example.org{TEXT}?a=1"


@each_proxy
def test_body_above_the_limit_is_refused(kind: str, start: Any, server: Server) -> None:
    proxy = start(kind, server)
    before = server.application()["total_requests"]
    status, _, answer = ask(proxy, "POST", TEXT, b"x" * (17 * 1000**2), Content_Type="application/json")
    error = json.loads(answer)["error"]
    assert (status, error["code"]) == (413, "payload_too_large")
    assert str(MAX_BODY) in error["message"]
    num_seen = server.application()["total_requests"] - before
    assert num_seen == {"nginx": 0, "haproxy": 1}[kind], "nginx refuses by itself"
    status, _, answer = ask(proxy, "POST", TEXT, b"x" * MAX_BODY, Content_Type="application/json")
    assert (status, json.loads(answer)["error"]["code"]) == (400, "invalid_request"), "at the limit it is read"
    assert server.application()["total_requests"] == before + num_seen + 1


@each_proxy
def test_streams_arrive_piece_by_piece(kind: str, start: Any, server: Server) -> None:
    proxy = start(kind, server)
    connection = connect(proxy)
    connection.connect()
    assert connection.sock is not None
    connection.sock.sendall(raw_request("a stream that takes some time, one byte a step" * 2, stream=True))
    stream = Stream(connection.sock)
    assert stream.next() is not None
    assert server.application()["requests_running"] == 1, "the first piece is here while the rest is being made"
    events = stream.rest()
    assert sum(name == "delta" for name, _ in events) > 5
    assert events[-1][0] == "done" and events[-1][1]["data"]["text"].endswith(text_of(events))


@each_proxy
def test_request_of_a_client_that_leaves_is_cancelled(kind: str, start: Any, server: Server) -> None:
    proxy = start(kind, server)
    before = server.application()["cancelled_requests"]
    connection = connect(proxy)
    connection.request("POST", TEXT, json.dumps({"prompt": "x" * 2000}), {"Content-Type": "application/json"})
    wait_for(lambda: server.application()["requests_running"] == 1, "the request does not run")
    connection.close()
    wait_for(lambda: server.application()["cancelled_requests"] == before + 1, "it was not cancelled")


@each_proxy
def test_rate_limit_and_audit_line_know_the_client_and_not_whom_it_claims_to_be(
    kind: str, start: Any, server: Server
) -> None:
    proxy = start(kind, server)
    body = json.dumps({"prompt": "who"}).encode()
    octet = 10 * (1 + list(STARTS).index(kind))

    def left(last: int, **headers: str) -> str:
        headers |= {"Content_Type": "application/json", "X_Request_ID": f"{kind}-{last}"}
        status, told, _ = ask(proxy, "POST", TEXT, body, f"127.0.0.{last}", **headers)
        assert status == 200
        return str(told["X-RateLimit-Remaining"])

    assert left(octet, X_Forwarded_For="6.6.6.6") == "999"
    assert left(octet, X_Forwarded_For="7.7.7.7") == "998"
    assert left(octet + 1) == "999", "another client has a count of its own"
    wait_for(lambda: f"[{kind}-{octet + 1}] audit" in server.log.read_text(), "no audit line")
    audits = re.findall(rf"\[{kind}-\d+\] audit .* client=(\S+)", server.log.read_text())
    assert audits == [f"127.0.0.{octet}"] * 2 + [f"127.0.0.{octet + 1}"]


@each_proxy
def test_operators_doors_and_metrics_are_closed_to_the_world(kind: str, start: Any, server: Server) -> None:
    proxy = start(kind, server)
    stranger = "127.0.0.77"
    for path in ("/metrics", "/%6detrics", "/metrics?a", "/api/metrics"):
        assert ask(proxy, "GET", path, source=stranger)[0] == 403, path
    for path in ("/api/metrics/reset", "/api/drain", "/api/dr%61in"):
        assert ask(proxy, "POST", path, b"", source=stranger)[0] == 403, path
    # What the proxy does not take for the door must not be one for the service either.
    for path in (
        "//metrics",
        "///metrics",
        "/./metrics",
        "/metrics/",
        "/METRICS",
        "/metrics;a",
        "/metrics%3Fa",
        "/metrics#a",
    ):
        assert b"avito_ready" not in ask(proxy, "GET", path, source=stranger)[2], path
    for path in ("//api/metrics", "/api//metrics", "/api/../api/metrics"):
        assert b"process_memory_bytes" not in ask(proxy, "GET", path, source=stranger)[2], path
    assert b"avito_ready 1.0" in ask(proxy, "GET", "/metrics")[2]
    for path in ("/api/health/ready", "/api/health/live"):
        assert ask(proxy, "GET", path, source=stranger)[0] == 200, path
    assert server.get("/api/health/ready")[0] == 200, "nothing drained it"


@each_proxy
def test_host_that_still_loads_is_nobodys_error(kind: str, start: Any, serve: Any) -> None:
    ready, loading = serve("create()").wait_ready(), serve("create(load_s=1000)")
    loading.wait(lambda: loading.get("/api/health/live")[0] == 200, "server")
    proxy = start(kind, loading, ready)
    for number in range(12):
        status, answer = generate(proxy, f"answer {number}")
        assert status == 200 and answer["data"]["text"] == f"answer {number}"


@each_proxy
def test_host_goes_down_under_traffic_and_no_client_sees_an_error(kind: str, start: Any, serve: Any) -> None:
    """Without a drain: SIGTERM while both are busy."""
    hosts = [serve("create(step_s=0.01)"), serve("create(step_s=0.01)")]
    for host in hosts:
        host.wait_ready()
    proxy = start(kind, *hosts)
    is_over, counts, num_clients = threading.Event(), [0] * 8, 8

    def client(index: int) -> list[Any]:
        wrong = []
        while not is_over.is_set():
            prompt = f"client {index}, request {counts[index]}"
            answer = generate(proxy, prompt)
            if answer[0] != 200 or answer[1]["data"]["text"] != prompt:
                wrong.append(answer)
            counts[index] += 1
        return wrong

    def wait_answers(more: int) -> None:
        goals = [count + more for count in counts]
        wait_for(lambda: all(map(int.__ge__, counts, goals)), "no answers")

    threads, results = in_threads(num_clients, client)
    try:
        wait_answers(3)
        assert all(host.application()["ok_requests"] for host in hosts), "both take part"
        hosts[0].process.send_signal(signal.SIGTERM)
        assert hosts[0].process.wait(GENEROUS_S) == 0
        wait_answers(5)
    finally:
        is_over.set()
        for thread in threads:
            thread.join(GENEROUS_S)
    assert results == [[]] * num_clients
    assert sum(counts) >= 8 * num_clients


def test_haproxy_sends_nothing_new_to_a_draining_host(start: Any, serve: Any) -> None:
    hosts = [serve("create()").wait_ready(), serve("create()").wait_ready()]
    proxy = start("haproxy", *hosts)
    body = f"POST /api/drain HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 0\r\n\r\n"
    with closing(hosts[0].connect()) as connection:
        connection.sendall(body.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    wait_for(lambda: "Server avito_ai/host1 is DOWN" in proxy.log.read_text(), proxy.log.read_text())
    before = hosts[0].application()["total_requests"]
    assert [generate(proxy, "a")[0] for _ in range(6)] == [200] * 6
    assert hosts[0].application()["total_requests"] == before


@each_proxy
def test_programs_are_told_as_json_when_no_host_is_there(kind: str, start: Any, serve: Any) -> None:
    host = serve("create()").wait_ready()
    proxy = start(kind, host)
    host.process.send_signal(signal.SIGTERM)
    assert host.process.wait(GENEROUS_S) == 0
    status, headers, answer = ask(proxy, "POST", TEXT, b"{}", Content_Type="application/json")
    assert (status, json.loads(answer)["error"]["code"]) == (503, "not_ready")
    assert headers["Retry-After"] == "3" and headers["Strict-Transport-Security"]


def test_clocks_of_the_proxies_fit_ours() -> None:
    settings = Settings.model_validate({})
    # Of the whole server: those of single locations stand further in.
    nginx = dict(re.findall(r"^ {4}(\w+_timeout) (\d+)s;", read("nginx/avito-ai.conf"), re.M))
    haproxy = dict(re.findall(r"^ +timeout ([\w-]+) +(\d+)s$", read("haproxy/haproxy.cfg"), re.M))
    longest_s = settings.request_deadline_s + 5
    for name, seconds in {
        "nginx": nginx["proxy_read_timeout"],
        **{n: haproxy[n] for n in ("server", "client")},
    }.items():
        assert int(seconds) > longest_s, name
    assert {int(nginx["client_header_timeout"]), int(nginx["client_body_timeout"]), int(haproxy["http-request"])} == {
        settings.read_timeout_s
    }
    assert int(nginx["send_timeout"]) == settings.answer_timeout_s


def test_size_limit_of_nginx_is_ours() -> None:
    assert "client_max_body_size 16m;" in read("nginx/avito-ai.conf") and MAX_BODY == 16 * 1024**2


def read(name: str) -> str:
    return (OPS / name).read_text(encoding="utf-8")
