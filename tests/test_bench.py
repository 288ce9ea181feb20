"""The benchmarks over HTTP: event streams cut anywhere, both dialects against real sockets, failures, what is told."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import random
import re
import socketserver
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bench import report, startup
from bench.__main__ import COMMANDS, main
from bench.client import Client, Event, Malformed, ResponseParser, SseParser
from bench.dialects import get_json
from bench.inputs import make_picture, make_prompt
from bench.load import Sample
from bench.mixed import part_in
from bench.report import Column, Unable, percentile, render_table, spread
from config import PROJECT_ROOT
from tests.fake_app import make_folder
from tests.test_server import GENEROUS_S, Server

ANSWER_TOKENS = 20  # more than a warm-up asks for, so that the server can tell them apart
TOKENS_PER_WORD, TEMPLATE_TOKENS = 3, 7


# A server on a real socket that speaks both dialects and does what it is told to do.


class FakeServer(socketserver.ThreadingTCPServer):
    """:param refused: fields it answers 400 to. :param faults: what befalls its next measured requests, in order.
    :param segment_bytes: streams are sent in pieces of this many bytes.
    """

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(
        self,
        api: str = "avito",
        *,
        refused: Sequence[str] = (),
        faults: Sequence[str] = (),
        segment_bytes: int = 7,
        is_streaming: bool = True,
        chat_refusal: tuple[int, str] | None = None,
        has_usage: bool = True,
        has_done: bool = True,
    ) -> None:
        super().__init__(("127.0.0.1", 0), FakeHandler)
        self.api, self.refused, self.segment_bytes = api, refused, segment_bytes
        self.is_streaming, self.chat_refusal, self.has_usage = is_streaming, chat_refusal, has_usage
        self.has_done = has_done
        self.faults = list(faults)
        self.lock = threading.Lock()
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.num_connections = 0
        self.closing = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def measured(self) -> list[dict[str, Any]]:
        return [body for _, body in self.asked if body["max_tokens"] == ANSWER_TOKENS]

    def stop(self) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: Any) -> None:
        """A client that leaves is part of some tests."""


class FakeHandler(socketserver.StreamRequestHandler):
    server: FakeServer
    disable_nagle_algorithm = True

    def handle(self) -> None:
        with self.server.lock:
            self.server.num_connections += 1
        while line := self.rfile.readline():
            path = line.decode().split()[1]
            headers = {}
            while header := self.rfile.readline().decode().strip():
                name, _, value = header.partition(":")
                headers[name.lower()] = value.strip()
            body = self.rfile.read(int(headers.get("content-length", 0)))
            if not self.answer(path, json.loads(body) if body else None):
                return

    def answer(self, path: str, fields: dict[str, Any] | None) -> bool:
        """Whether the connection stays open."""
        server = self.server
        if fields is None:
            known = {"avito": ("/api/health/live", {"engine": "ok"}), "openai": ("/v1/models", {"data": [{"id": "m"}]})}
            there, content = known[server.api]
            return self.send_json(200, content) if path == there else self.send_error(404, "not_found")
        with server.lock:
            server.asked.append((path, fields))
            is_measured = fields["max_tokens"] == ANSWER_TOKENS
            fault = server.faults.pop(0) if is_measured and server.faults else ""
        if path == "/v1/chat/completions" and server.chat_refusal:
            return self.send_error(*server.chat_refusal)
        for field in server.refused:
            if field in fields:
                return self.send_error(400, "unknown_field", field)
        if fault == "refuse":
            return self.send_error(503, "queue_full")
        if fault == "vanish":
            return False
        if fault == "hang":
            server.closing.wait(GENEROUS_S)
            return False
        if fields.get("stream") and server.is_streaming:
            return self.send_stream(self.events(fields, fault), is_cut=fault == "cut")
        return self.send_json(200, self.whole(fields))

    def usage(self, fields: dict[str, Any]) -> tuple[int, int]:
        prompt = fields["prompt"] if "prompt" in fields else fields["messages"][0]["content"]
        if not isinstance(prompt, str):
            prompt = prompt[1]["text"]
        return TOKENS_PER_WORD * len(prompt.split()) + TEMPLATE_TOKENS, fields["max_tokens"]

    def whole(self, fields: dict[str, Any]) -> dict[str, Any]:
        num_in, num_out = self.usage(fields)
        if self.server.api == "openai":
            return {"choices": [{}], "usage": {"prompt_tokens": num_in, "completion_tokens": num_out}}
        metrics = {"time_to_first_token": 0.25, "total_time": 0.25 + 0.5 * (num_out - 1)}
        return {"success": True, "data": {"input_tokens": num_in, "generated_tokens": num_out}, "metrics": metrics}

    def events(self, fields: dict[str, Any], fault: str) -> list[tuple[str, Any]]:
        num_out = fields["max_tokens"]
        if self.server.api == "avito":
            deltas: list[tuple[str, Any]] = [("delta", {"text": "слово "})] * (num_out // 2)
            ends = {"error": ("error", {"success": False, "error": {"code": "numeric_error"}}), "unfinished": None}
            end = ends.get(fault, ("done", self.whole(fields)))
            return [*deltas, *([end] if end else [])]
        is_chat = "messages" in fields
        pieces: list[dict[str, Any]] = [{"delta": {"role": "assistant", "content": ""}}] if is_chat else []
        pieces += [{"delta": {"content": "слово"}} if is_chat else {"text": "слово"} for _ in range(num_out)]
        chunks: list[tuple[str, Any]] = [("", {"choices": [piece]}) for piece in pieces]
        chunks.append(("", {"choices": [{"delta": {}, "finish_reason": "length"}] if is_chat else []}))
        if self.server.has_usage and "stream_options" in fields:
            chunks.append(("", {"choices": [], "usage": self.whole(fields)["usage"]}))
        return [*chunks, ("", "[DONE]")] if self.server.has_done else chunks

    def send_stream(self, events: list[tuple[str, Any]], is_cut: bool) -> bool:
        """In odd chunks and segments; with comments, CRLF ends and data of several lines."""
        stream = ": hello\r\n\r\n"
        for name, content in events:
            text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, indent=0)
            stream += f"event: {name}\r\n" if name else ""
            stream += "".join(f"data: {line}\r\n" for line in text.split("\n")) + "\r\n: ping\r\n"
        data = stream.encode()
        chunks = [data[i : i + 11] for i in range(0, len(data), 11)]
        if is_cut:
            chunks = chunks[: len(chunks) // 2]
        body = b"".join(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n" for chunk in chunks)
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        answer = head + body + (b"" if is_cut else b"0\r\n\r\n")
        for start in range(0, len(answer), self.server.segment_bytes):
            self.request.sendall(answer[start : start + self.server.segment_bytes])
        return not is_cut

    def send_error(self, status: int, code: str, field: str | None = None) -> bool:
        return self.send_json(status, {"success": False, "error": {"code": code, "field": field, "message": code}})

    def send_json(self, status: int, content: Any) -> bool:
        body = json.dumps(content).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self.request.sendall(head.encode() + body)
        return True


@pytest.fixture
def serve() -> Iterator[Callable[..., FakeServer]]:
    servers: list[FakeServer] = []

    def make(*args: Any, **kwargs: Any) -> FakeServer:
        servers.append(FakeServer(*args, **kwargs))
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


@pytest.fixture
def load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """`python -m bench load` against a server: exit code, what the JSON file holds, and what was printed."""

    def run(server: FakeServer | str, *options: str) -> tuple[int, dict[str, Any], str]:
        url = server if isinstance(server, str) else server.url
        file = tmp_path / "load.json"
        lengths = ["--prompt-tokens", "100", "--answer-tokens", str(ANSWER_TOKENS)]
        code = main(["load", "--url", url, *lengths, "--json", str(file), *options])
        return code, json.loads(file.read_text(encoding="utf-8")), capsys.readouterr().out

    return run


def notes_on_server(told: dict[str, Any]) -> list[str]:
    """Not those on the client, which may well be the limit where both are one process."""
    return [note for note in told["notes"] if "of a core" not in note]


# Reading what comes.

STREAM = (
    "\ufeff: a comment\n\n"
    'event: delta\ndata: {"text": "одно"}\n\n'
    "data: first\ndata:second\ndata\nid: 7\nretry: 10\n\n"
    "event: nothing\n\n"
    "event: done\ndata: {}\n\n"
    "data: cut off"
)
EVENTS = [
    Event("delta", '{"text": "одно"}'.encode()),
    Event("message", b"first\nsecond\n"),
    Event("done", b"{}"),
]


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
def test_events_are_the_same_wherever_the_stream_is_cut(line_end: str) -> None:
    data = STREAM.replace("\n", line_end).encode()
    for split in range(len(data) + 1):
        parser = SseParser()
        assert [*parser.feed(data[:split]), *parser.feed(data[split:])] == EVENTS, split
    parser = SseParser()
    assert [event for i in range(len(data)) for event in parser.feed(data[i : i + 1])] == EVENTS


CHUNKED = (
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-A: b\r\n\r\n"
    b"5;x=y\r\nhello\r\n1\r\n \r\n05\r\nworld\r\n0\r\nTrailer: t\r\n\r\n"
)
MEASURED = b"HTTP/1.1 503 Busy\r\nContent-Length: 11\r\nX-A: b\r\n\r\nhello world"


@pytest.mark.parametrize(("data", "status"), [(CHUNKED, 200), (MEASURED, 503)], ids=["chunked", "length"])
def test_answers_are_the_same_wherever_they_are_cut(data: bytes, status: int) -> None:
    for split in range(len(data)):
        parser = ResponseParser()
        body = parser.feed(data[:split])
        assert not parser.is_complete
        body += parser.feed(data[split:])
        assert (parser.is_complete, parser.status, body) == (True, status, b"hello world")
        assert parser.headers["x-a"] == "b" and parser.is_kept_alive


@pytest.mark.parametrize("data", [b"", b"HTTP/1.1 200", MEASURED[:-1], CHUNKED[:-2]])
def test_an_answer_that_is_cut_off_is_none(data: bytes) -> None:
    parser = ResponseParser()
    parser.feed(data)
    with pytest.raises(Malformed):
        parser.end()


def test_an_answer_without_a_length_ends_with_its_connection() -> None:
    parser = ResponseParser()
    assert parser.feed(b"HTTP/1.0 200 OK\r\n\r\nhello") == b"hello"
    completeness = [parser.is_complete]
    parser.end()
    completeness.append(parser.is_complete)
    assert completeness == [False, True] and not parser.is_kept_alive


@pytest.mark.parametrize("data", [b"SSH-2.0-x\r\n\r\n", CHUNKED.replace(b"05\r\n", b"zz\r\n")])
def test_what_is_not_http_is_refused(data: bytes) -> None:
    with pytest.raises(Malformed):
        ResponseParser().feed(data)


# What is asked.


def test_prompts_and_pictures_come_from_the_dice_alone() -> None:
    assert make_prompt(random.Random(1), 50) == make_prompt(random.Random(1), 50) != make_prompt(random.Random(2), 50)
    prompt = make_prompt(random.Random(1), 50)
    assert len(prompt.split()) == 50
    assert re.search("[a-z]", prompt) and re.search("[а-я]", prompt)
    assert make_picture(random.Random(1), 40, 30) == make_picture(random.Random(1), 40, 30)


@pytest.mark.parametrize("size", [(1, 1), (17, 33), (64, 48)])
def test_pictures_are_pngs_of_the_size_asked_for(size: tuple[int, int]) -> None:
    with Image.open(io.BytesIO(make_picture(random.Random(0), *size))) as picture:
        picture.load()
        assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", size)
        colours = picture.getcolors(10**6)
        assert colours is not None and len(colours) == -(-size[0] // 16) * -(-size[1] // 16)


# The load.


def test_streamed_load_on_our_api_counts_tokens_and_times(serve: Any, load: Any) -> None:
    server = serve("avito")
    code, told, printed = load(server, "--concurrency", "1,4", "--requests", "12")
    assert code == 0 and notes_on_server(told) == []
    assert {(fields["stream"], fields["ignore_eos"]) for fields in server.measured()} == {(True, True)}
    assert [(row["concurrency"], row["num_requests"], row["failures"]) for row in told["rows"]] == [
        (1, 12, {}),
        (4, 12, {}),
    ]
    for row in told["rows"]:
        assert (row["api"], row["mean_input_tokens"], row["mean_output_tokens"]) == ("avito", 100, ANSWER_TOKENS)
        assert row["output_tokens_per_s"] == pytest.approx(12 * ANSWER_TOKENS / row["duration_s"])
        first, total = row["time_to_first_token_s"], row["total_s"]
        assert first["num"] == total["num"] == row["time_per_output_token_s"]["num"] == 12
        assert 0 < first["p50"] <= first["p90"] <= first["p99"] <= first["max"] <= total["max"]
        # Deltas that came in one read are one arrival; the first has no gap before it.
        assert 0 < row["gap_s"]["num"] <= 12 * (ANSWER_TOKENS // 2 - 1)
    assert "clients" in printed and "torch" in printed


def test_connections_are_kept_open(serve: Any, load: Any) -> None:
    server = serve("avito")
    load(server, "--concurrency", "3", "--requests", "30")
    assert server.num_connections == 3


def test_no_two_requests_have_one_prompt(serve: Any, load: Any) -> None:
    server = serve("avito")
    load(server, "--concurrency", "1,2", "--requests", "8", "--rounds", "2")
    prompts = [fields["prompt"] for fields in server.measured()]
    assert len(prompts) == len(set(prompts)) == 32


def test_a_seed_repeats_the_prompts_and_without_one_they_are_new(serve: Any, load: Any) -> None:
    def prompts(*options: str) -> set[str]:
        server = serve("avito")
        load(server, "--concurrency", "1", *options)
        return {fields["prompt"] for fields in server.measured()}

    assert prompts("--seed", "5") == prompts("--seed", "5")
    assert not prompts() & prompts()


def test_streamed_load_on_an_openai_server_takes_its_counts(serve: Any, load: Any) -> None:
    server = serve("openai")
    code, told, _ = load(server, "--concurrency", "2", "--requests", "6")
    (row,) = told["rows"]
    assert (code, row["api"], notes_on_server(told)) == (0, "openai", [])
    assert (row["mean_input_tokens"], row["mean_output_tokens"]) == (100, ANSWER_TOKENS)
    assert {fields["model"] for fields in server.measured()} == {"m"}


def test_deltas_are_counted_where_there_is_no_usage_and_that_is_said(serve: Any, load: Any) -> None:
    code, told, printed = load(serve("openai", has_usage=False), "--concurrency", "2", "--requests", "6")
    assert code == 0
    assert told["rows"][0]["mean_output_tokens"] == ANSWER_TOKENS and told["rows"][0]["mean_input_tokens"] is None
    assert "deltas are counted" in printed and "two for each word" in printed


def test_an_answer_is_complete_with_its_reason_to_finish_even_if_nobody_says_done(serve: Any, load: Any) -> None:
    """`transformers serve` ends its streams so."""
    code, told, _ = load(serve("openai", has_done=False), "--concurrency", "2", "--requests", "6")
    assert code == 0 and told["rows"][0]["failures"] == {}
    assert told["rows"][0]["mean_output_tokens"] == ANSWER_TOKENS


@pytest.mark.parametrize("refusal", [(404, "not_found"), (400, "a chat template is needed")], ids=["door", "template"])
def test_a_server_without_chat_is_asked_for_text_completions(serve: Any, load: Any, refusal: Any) -> None:
    server = serve("openai", chat_refusal=refusal)
    code, told, printed = load(server, "--concurrency", "2", "--requests", "6")
    assert len(notes_on_server(told)) == 1
    assert code == 0 and told["rows"][0]["mean_output_tokens"] == ANSWER_TOKENS
    assert "/v1/completions is asked" in printed
    assert Counter(path for path, _ in server.asked)["/v1/chat/completions"] == 1


@pytest.mark.parametrize("api", ["avito", "openai"])
def test_a_field_that_is_refused_is_left_out_and_that_is_said(serve: Any, load: Any, api: str) -> None:
    server = serve(api, refused=["ignore_eos"])
    code, told, printed = load(server, "--concurrency", "2", "--requests", "6")
    assert code == 0 and told["rows"][0]["failures"] == {}
    assert "it refuses ignore_eos" in printed
    assert [("ignore_eos" in fields) for _, fields in server.asked].count(True) == 1


@pytest.mark.parametrize("how", [{"is_streaming": False}, {"refused": ["stream"]}], ids=["ignored", "refused"])
def test_a_server_that_does_not_stream_is_measured_by_its_own_clock(serve: Any, load: Any, how: Any) -> None:
    code, told, printed = load(serve("avito", **how), "--concurrency", "2", "--requests", "6")
    (row,) = told["rows"]
    assert code == 0 and "it does not stream" in printed
    assert row["time_to_first_token_s"]["p50"] == 0.25 and row["time_per_output_token_s"]["p50"] == 0.5
    assert row["gap_s"] is None


def test_whole_answers_of_an_openai_server_tell_no_first_token(serve: Any, load: Any) -> None:
    server = serve("openai")
    code, told, _ = load(server, "--concurrency", "2", "--requests", "6", "--no-stream")
    (row,) = told["rows"]
    assert code == 0 and not any("stream" in fields for fields in server.measured())
    assert row["mean_output_tokens"] == ANSWER_TOKENS
    assert (row["time_to_first_token_s"], row["time_per_output_token_s"], row["gap_s"]) == (None, None, None)


def test_failures_are_counted_by_kind_and_end_with_exit_code_1(serve: Any, load: Any) -> None:
    faults = ["refuse", "error", "", "vanish", "refuse", "cut", "unfinished", "hang"]
    options = ("--concurrency", "4", "--requests", "20", "--timeout", "3")
    code, told, printed = load(serve("avito", faults=faults), *options)
    (row,) = told["rows"]
    assert code == 1
    assert row["num_requests"] == 20 and row["total_s"]["num"] == 13
    assert row["failures"] == {
        "503 queue_full": 2,
        "stream: numeric_error": 1,
        "connection: closed before the answer": 1,
        "connection: answer cut off": 1,
        "stream: ended before it was complete": 1,
        "timeout": 1,
    }
    assert row["output_tokens_per_s"] == pytest.approx(13 * ANSWER_TOKENS / row["duration_s"])
    assert "2 failed: 503 queue_full (AVITO_MAX_RUNNING" in printed


def test_pictures_are_sent_as_each_api_wants_them(serve: Any, load: Any) -> None:
    pictures = set()
    for api, path in (("avito", "/api/v1/image/analyze"), ("openai", "/v1/chat/completions")):
        server = serve(api)
        code, _, _ = load(server, "--concurrency", "2", "--requests", "4", "--pictures", "40x30")
        assert code == 0 and {asked for asked, _ in server.asked} == {path}
        for fields in server.measured():
            source = fields["image"] if api == "avito" else fields["messages"][0]["content"][0]["image_url"]["url"]
            data = base64.b64decode(source.removeprefix("data:image/png;base64,"))
            with Image.open(io.BytesIO(data)) as picture:
                assert picture.size == (40, 30)
            pictures.add(data)
    assert len(pictures) == 8


def test_a_duration_bounds_the_beginning_of_requests(serve: Any, load: Any) -> None:
    server = serve("avito")
    code, told, _ = load(server, "--concurrency", "2", "--duration", "0.2")
    (row,) = told["rows"]
    assert code == 0 and row["num_requests"] == len(server.measured()) >= 2
    assert row["duration_s"] >= 0.2


def test_two_servers_are_asked_in_turns_and_compared(serve: Any, load: Any) -> None:
    first, second = serve("avito"), serve("openai")
    both: list[str] = []
    first.asked, second.asked = Recorder(both, "first"), Recorder(both, "second")
    code, told, printed = load(first, "--concurrency", "2", "--requests", "4", "--rounds", "2", "--compare", second.url)
    assert code == 0
    assert both == ["first"] * 4 + ["second"] * 4 + ["first"] * 4 + ["second"] * 4
    assert [(row["url"], row["round"]) for row in told["rows"]] == [
        *((first.url, number) for number in (None, 1, 2)),
        *((second.url, number) for number in (None, 1, 2)),
    ]
    rates = {(row["url"], row["round"]): row["output_tokens_per_s"] for row in told["rows"]}
    ratio = report.show(rates[first.url, None] / rates[second.url, None])
    assert re.search(rf"output tokens/s +{re.escape(ratio)} ", printed)


class Recorder(list[tuple[str, dict[str, Any]]]):
    """Notes in one list for several servers who was asked; measured requests only."""

    def __init__(self, shared: list[str], name: str) -> None:
        super().__init__()
        self.shared, self.name = shared, name

    def append(self, item: tuple[str, dict[str, Any]]) -> None:
        super().append(item)
        if item[1]["max_tokens"] == ANSWER_TOKENS:
            self.shared.append(self.name)


def test_nobody_at_the_address_is_said_in_one_sentence(serve: Any, capsys: pytest.CaptureFixture[str]) -> None:
    server = serve("avito")
    server.stop()
    assert main(["load", "--url", server.url]) == 2
    assert capsys.readouterr().err == f"Error: {server.url}/api/health/live does not answer: connection: refused\n"


@pytest.mark.parametrize("url", ["https://localhost", "localhost:80", "http://", "http://localhost:x"])
def test_addresses_that_cannot_be_asked_are_refused(url: str) -> None:
    with pytest.raises(Unable, match="--url"):
        Client(url, 1.0)


def test_a_server_that_refuses_plain_requests_is_not_measured(serve: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["load", "--url", serve("avito", refused=["prompt"]).url]) == 2
    assert "does not answer a plain request: 400 unknown_field" in capsys.readouterr().err


def test_load_measures_the_real_server(tmp_path: Path, load: Any) -> None:
    """Gunicorn and the whole application over a fake model that echoes bytes."""
    server = Server(tmp_path, "create()", {})
    try:
        server.wait_ready()
        code, told, _ = load(f"http://127.0.0.1:{server.port}", "--concurrency", "1,4", "--requests", "8")
    finally:
        server.process.kill()
        server.process.wait(GENEROUS_S)
    assert code == 0
    for row in told["rows"]:
        assert (row["num_requests"], row["failures"], row["mean_output_tokens"]) == (8, {}, ANSWER_TOKENS)
        # A byte is a token there and words differ in length: the calibration meets the mean.
        assert row["mean_input_tokens"] == pytest.approx(100, rel=0.2)
        assert row["time_to_first_token_s"]["num"] == 8


# Text and pictures together.


def sample(started_s: float, ended_s: float) -> Sample:
    return Sample(started_s, ended_s, None, 1, 1, None, None, (), False)


def test_an_answer_counts_with_its_part_in_the_window() -> None:
    window = (10.0, 20.0)
    times = [(11.0, 12.0), (8.0, 12.0), (19.0, 21.0), (5.0, 25.0), (1.0, 9.0), (20.0, 22.0), (15.0, 15.0)]
    assert [part_in(window, sample(*time)) for time in times] == [1.0, 0.5, 0.5, 0.5, 0.0, 0.0, 1.0]


def test_mixed_measures_each_load_alone_and_then_both(
    serve: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server, file = serve("avito", segment_bytes=500), tmp_path / "mixed.json"
    clients = ["--text-streams", "3", "--image-streams", "2", "--pictures", "32x32"]
    lengths = ["--prompt-tokens", "40", "--answer-tokens", str(ANSWER_TOKENS), "--duration", "0.5"]
    assert main(["mixed", "--url", server.url, *clients, *lengths, "--json", str(file)]) == 0
    told = json.loads(file.read_text(encoding="utf-8"))
    rows = {(row["kind"], row["is_alone"]): row for row in told["rows"]}
    assert list(rows) == [("text", True), ("pictures", True), ("text", False), ("pictures", False)]
    shares = []
    for kind in ("text", "pictures"):
        assert rows[kind, True]["share"] is None
        shares.append(rows[kind, False]["requests_per_s"] / rows[kind, True]["requests_per_s"])
        assert rows[kind, False]["share"] == pytest.approx(shares[-1])
    assert told["options"]["share_sum"] == pytest.approx(sum(shares))
    assert f"add up to {report.show(sum(shares))}" in capsys.readouterr().out
    bodies = [json.dumps(fields) for fields in server.measured()]
    assert len(bodies) == len(set(bodies)) == sum(row["num_requests"] for row in told["rows"])


# From process start to the first answer.


def startup_environ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for name in ("AVISION_MODEL_PATH", "AVITO_LOG_FILE"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("AVITO_ENV", "development")
    monkeypatch.setenv("AVIBE_MODEL_PATH", str(make_folder(tmp_path)))
    return startup.environment(os.environ)


def test_startup_tells_each_phase_and_stops_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environ = startup_environ(tmp_path, monkeypatch)
    row = startup.measure([*startup.SERVER, "tests.fake_app:create()"], environ, 1, GENEROUS_S)
    assert 0 < row.live_s <= row.ready_s <= row.first_answer_s["avibe"]
    assert list(row.phases_s["avibe"]) == ["weights", "cache"]
    assert [line.split("  ")[0] for line in startup.render([row]).splitlines()[1:]] == [
        "port answers",
        "avibe: weights",
        "avibe: cache",
        "ready",
        "avibe: first answer",
    ]
    with Client(f"http://127.0.0.1:{environ['AVITO_PORT']}", 1.0) as client, pytest.raises(Unable, match="refused"):
        get_json(client, "/api/health/live")


def test_startup_shows_the_log_of_a_server_that_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environ = startup_environ(tmp_path, monkeypatch)
    with pytest.raises(Unable, match=r"(?s)ended before it was live.*no_such_factory"):
        startup.measure([*startup.SERVER, "tests.fake_app:no_such_factory()"], environ, 1, GENEROUS_S)


# What is told.


def test_percentiles_are_those_of_numpy() -> None:
    dice = random.Random(0)
    for size in (1, 2, 3, 10, 101):
        values = sorted(dice.random() for _ in range(size))
        for percent in (0, 50, 90, 99, 100):
            assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)))
    assert spread([]) is None


def test_tables_line_up_under_their_headings() -> None:
    columns = [
        Column[tuple[str, float | None]]("name", lambda row: row[0], is_left=True),
        Column[tuple[str, float | None]]("p50", lambda row: row[1], "a long heading, ms"),
        Column[tuple[str, float | None]](
            "p99", lambda row: None if row[1] is None else 100 * row[1], "a long heading, ms"
        ),
    ]
    assert render_table(columns, [("one", 1.234), ("three", None)]) == (
        "       a long heading, ms\nname             p50  p99\none             1.23  123\nthree              -    -"
    )


def test_the_json_file_holds_machine_command_and_options_but_no_token(serve: Any, load: Any) -> None:
    _, told, _ = load(serve("avito"), "--concurrency", "1", "--requests", "2", "--key", "a-secret-token")
    assert "a-secret-token" not in json.dumps(told)
    assert told["benchmark"] == "load" and told["options"]["key"] == "***"
    assert told["command"].startswith("python -m bench load --url http://127.0.0.1:")
    assert told["machine"]["num_cores"] >= 1 and told["machine"]["cpu"]
    assert report.command_line(["load", "--key=secret", "--json", "x"]) == "python -m bench load '--key=***' --json x"


def test_plot_without_matplotlib_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["load", "--plot", "x.png"]) == 2
    assert "matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--json", "/nowhere/x.json"], ["--plot", "x.pdf"]])
def test_files_that_cannot_be_written_are_refused_before_anything_is_measured(options: list[str]) -> None:
    assert main(["load", *options]) == 2


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is missing")
def test_plots_are_png_files(serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve("avito")
    lines, bars = tmp_path / "load.png", tmp_path / "mixed.png"
    small = ["--url", server.url, "--prompt-tokens", "30", "--answer-tokens", "4"]
    assert main(["load", *small, "--concurrency", "1,2", "--requests", "4", "--plot", str(lines)]) == 0
    assert main(["mixed", *small, "--duration", "0.1", "--pictures", "32x32", "--plot", str(bars)]) == 0
    for file in (lines, bars):
        with Image.open(file) as picture:
            assert picture.format == "PNG" and picture.width > picture.height / 2


def test_help_lists_every_benchmark_and_a_client_of_load_loads_no_torch() -> None:
    def run(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=PROJECT_ROOT, check=True, capture_output=True, text=True, timeout=60).stdout

    listed = run("-m", "bench", "--help")
    for name in COMMANDS:
        assert re.search(rf"^ +{name}\s", listed, re.MULTILINE)
    code = (
        "import sys; from bench.__main__ import main\n"
        "assert main(['load', '--url', 'http://127.0.0.1:1']) == 2\n"
        "assert not {'torch', 'PIL', 'flask', 'matplotlib'} & set(sys.modules)\n"
    )
    run("-c", code)
