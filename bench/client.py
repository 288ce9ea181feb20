"""A small HTTP/1.1 client for load: many connections, one thread, one selector, and a clock reading for each arrival.

A thread for each connection would cost more than the work itself where client and server share a few cores: at 128
streams a delta comes every tenth of a millisecond. Plain http only, keep-alive, no redirects, no proxies.
It knows nothing of what is asked or answered: see `bench/dialects.py`.
"""

from __future__ import annotations

import heapq
import selectors
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import urlsplit

from bench.report import Unable

_READ_BYTES = 1 << 18
_TICK_S = 0.25  # how often time-outs are looked for
# A server that refuses at once is not asked again at once: this is no flood.
_PAUSE_AFTER_FAILURE_S = 0.1


class Malformed(Exception):
    """What came is not HTTP as it should be; the message says in two or three words why."""


@dataclass(frozen=True)
class Event:
    """One server-sent event; `name` is `message` where the server gave none."""

    name: str
    data: bytes


class SseParser:
    """Bytes of an event stream in, however they were cut; events out (WHATWG HTML, "Server-sent events").

    `id` and `retry` are of no use here and ignored, as are comments. An event that the stream's end cuts off is none.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._is_first_line = True
        self._is_after_cr = False  # the bytes before ended in CR: a LF that comes next belongs to it
        self._name = ""
        self._data: list[bytes] = []

    def feed(self, data: bytes) -> list[Event]:
        if self._is_after_cr and data:
            data = data.removeprefix(b"\n")
            self._is_after_cr = False
        if b"\r" in data:
            self._is_after_cr = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, self._rest = (self._rest + data).split(b"\n")
        events = []
        for line in lines:
            if self._is_first_line:
                line = line.removeprefix(b"\xef\xbb\xbf")
                self._is_first_line = False
            if line:
                self._take(line)
            else:
                if self._data:
                    events.append(Event(self._name or "message", b"\n".join(self._data)))
                self._name, self._data = "", []
        return events

    def _take(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
        elif name == b"event":
            self._name = value.decode(errors="replace")


class ResponseParser:
    """One response, however it was cut: status, headers in lower case, and the body as it comes."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.is_complete = False
        self._is_http_1_0 = False
        self._rest = b""
        self._is_chunked = False
        self._left: int | None = None  # bytes of the body, or of the chunk, still to come; None: until the end
        self._state = self._read_head

    def feed(self, data: bytes) -> bytes:
        """The part of the body that these bytes bring. :raise Malformed:"""
        self._rest += data
        body: list[bytes] = []
        while not self.is_complete and self._state(body):
            pass
        return b"".join(body)

    def end(self) -> None:
        """The server closed the connection. :raise Malformed: before the response was complete."""
        if not self.is_complete and (self._state != self._read_body or self._left is not None):
            raise Malformed("closed before the answer" if not self.status else "answer cut off")
        self.is_complete = True

    @property
    def is_kept_alive(self) -> bool:
        wish = self.headers.get("connection", "").lower()
        return self._left is not None and (wish == "keep-alive" if self._is_http_1_0 else wish != "close")

    # Each state takes what it can of `_rest`, and says whether something is left for the next to look at.

    def _read_head(self, body: list[bytes]) -> bool:
        head, end, rest = self._rest.partition(b"\r\n\r\n")
        if not end:
            if len(self._rest) > 1 << 16:
                raise Malformed("endless header")
            return False
        first, *lines = head.decode("latin-1").split("\r\n")
        parts = first.split(" ", 2)
        if len(parts) < 2 or not parts[0].startswith("HTTP/1.") or not parts[1].isdecimal():
            raise Malformed("not an HTTP answer")
        self._rest = rest
        if parts[1].startswith("1"):
            return True  # 100 Continue and its like: the real answer follows
        self.status = int(parts[1])
        self._is_http_1_0 = parts[0] == "HTTP/1.0"
        for line in lines:
            name, _, value = line.partition(":")
            self.headers[name.strip().lower()] = value.strip()
        length = self.headers.get("content-length", "")
        self._is_chunked = "chunked" in self.headers.get("transfer-encoding", "").lower()
        if self._is_chunked:
            self._left, self._state = 0, self._read_chunk_size
        else:
            self._left = int(length) if length.isdecimal() else 0 if self.status in (204, 304) else None
            self.is_complete = self._left == 0
            self._state = self._read_body
        return True

    def _read_body(self, body: list[bytes]) -> bool:
        if self._left is None:
            body.append(self._rest)
            self._rest = b""
            return False
        part, self._rest = self._rest[: self._left], self._rest[self._left :]
        body.append(part)
        self._left -= len(part)
        if self._left:
            return False
        if self._is_chunked:
            self._state = self._read_chunk_end
        else:
            self.is_complete = True
        return True

    def _read_chunk_size(self, body: list[bytes]) -> bool:
        line, end, rest = self._rest.partition(b"\r\n")
        if not end:
            return False
        try:
            self._left = int(line.partition(b";")[0], 16)
        except ValueError:
            raise Malformed("bad chunk") from None
        self._rest = rest
        self._state = self._read_body if self._left else self._read_trailer
        return True

    def _read_chunk_end(self, body: list[bytes]) -> bool:
        if len(self._rest) < 2:
            return False
        if not self._rest.startswith(b"\r\n"):
            raise Malformed("bad chunk")
        self._rest = self._rest[2:]
        self._state = self._read_chunk_size
        return True

    def _read_trailer(self, body: list[bytes]) -> bool:
        line, end, rest = self._rest.partition(b"\r\n")
        if not end:
            return False
        self._rest = rest
        self.is_complete = not line
        return True


class Reader(Protocol):
    """What takes in the body of a successful answer while it comes."""

    def feed(self, data: bytes, now_s: float) -> None: ...


@dataclass(frozen=True)
class Job:
    """One request as it goes onto the wire, and what reads its answer."""

    request: bytes
    reader: Reader


@dataclass
class Finished:
    """A request that came to its end. Times are readings of `time.perf_counter`.

    `error` says in a few words why there is no complete answer; `body` is that of an answer other than 200.
    """

    job: Job
    started_s: float
    ended_s: float = 0.0
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    error: str | None = None

    @property
    def is_ok(self) -> bool:
        return self.error is None and self.status == 200


Take = Callable[[], Job | None]


@dataclass
class _Lane:
    """One client in the closed loop: it takes its next request when the last one has ended."""

    take: Take
    connection: socket.socket | None = None
    unsent: memoryview = field(default_factory=lambda: memoryview(b""))
    parser: ResponseParser = field(default_factory=ResponseParser)
    finished: Finished | None = None  # the request under way


class Client:
    """Connections to one server, kept open between runs. One thread.

    :param url: its root, such as http://127.0.0.1:8085.
    :param timeout_s: longest time from a request's first byte to the end of its answer.
    :raise Unable: for another scheme than http, or an unknown host.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        parts = urlsplit(url)
        try:
            port = parts.port or 80
        except ValueError:
            raise Unable(f"--url {url}: has no valid port") from None
        if parts.scheme != "http" or not parts.hostname:
            raise Unable(f"--url {url}: must be like http://127.0.0.1:8085 (https is not spoken here)")
        self.host = parts.netloc.rpartition("@")[2]
        self.prefix = parts.path.rstrip("/")
        try:
            found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)[0]
        except OSError as error:
            raise Unable(f"--url {url}: {error.strerror or error}") from None
        self._family, self._address = found[0], found[4]
        self._timeout_s = timeout_s
        self._idle: list[socket.socket] = []
        self._selector = selectors.DefaultSelector()
        self._ended: list[tuple[_Lane, Finished]] = []

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in [*self._idle, *(key.fileobj for key in self._selector.get_map().values())]:
            connection.close()  # type: ignore[union-attr]  # the selector holds sockets only
        self._selector.close()

    def run(self, takes: Sequence[Take], deliver: Callable[[Finished], None]) -> None:
        """Serve all lanes until each of them has nothing more to take and every answer has ended.

        :param takes: one for each lane: its next request, or None when it is done.
        :param deliver: called with each request that ended, failed ones too.
        """
        ready = [_Lane(take) for take in takes]
        pausing: list[tuple[float, int, _Lane]] = []  # (until, to tell equal times apart, lane): a heap
        busy: dict[int, _Lane] = {}  # by id
        next_tick = time.perf_counter() + _TICK_S
        while ready or busy or pausing:
            for lane in ready:
                job = lane.take()
                if job is not None:
                    busy[id(lane)] = lane
                    self._begin(lane, job)
            ready.clear()
            now = time.perf_counter()
            wake_at = min(next_tick, pausing[0][0]) if pausing else next_tick
            if busy and not self._ended:
                for key, mask in self._selector.select(max(0.0, wake_at - now)):
                    self._serve(key.data, mask)
            elif pausing and not busy:
                time.sleep(max(0.0, wake_at - now))
            now = time.perf_counter()
            if now >= next_tick:
                next_tick = now + _TICK_S
                self._end_overdue(busy.values(), now)
            for lane, finished in self._ended:
                del busy[id(lane)]
                deliver(finished)
                if finished.is_ok:
                    ready.append(lane)
                else:
                    heapq.heappush(pausing, (now + _PAUSE_AFTER_FAILURE_S, id(lane), lane))
            self._ended.clear()
            while pausing and pausing[0][0] <= now:
                ready.append(heapq.heappop(pausing)[2])

    def ask(self, job: Job) -> Finished:
        """One request by itself."""
        jobs = [job]
        answers: list[Finished] = []
        self.run([lambda: jobs.pop() if jobs else None], answers.append)
        return answers[0]

    def _begin(self, lane: _Lane, job: Job) -> None:
        lane.finished = Finished(job, time.perf_counter())
        lane.unsent = memoryview(job.request)
        lane.parser = ResponseParser()
        try:
            lane.connection = self._idle_connection() or self._connect()
            self._selector.register(lane.connection, selectors.EVENT_READ | selectors.EVENT_WRITE, lane)
        except OSError as error:
            self._fail(lane, _name(error))

    def _idle_connection(self) -> socket.socket | None:
        """A kept connection that the server has not closed in the meantime."""
        while self._idle:
            connection = self._idle.pop()
            try:
                connection.recv(1, socket.MSG_PEEK)
            except BlockingIOError:
                return connection
            except OSError:
                pass
            connection.close()  # closed by the server, or it sent what nobody asked for
        return None

    def _connect(self) -> socket.socket:
        connection = socket.socket(self._family, socket.SOCK_STREAM)
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.connect_ex(self._address)  # a refusal shows at the first send
        return connection

    def _serve(self, lane: _Lane, mask: int) -> None:
        assert lane.connection is not None and lane.finished is not None
        try:
            if mask & selectors.EVENT_WRITE:
                self._write(lane, lane.connection)
            if mask & selectors.EVENT_READ:
                self._read(lane, lane.connection, lane.finished)
        except BlockingIOError:
            pass
        except OSError as error:
            self._fail(lane, _name(error))
        except Malformed as error:
            self._fail(lane, f"connection: {error}")

    def _write(self, lane: _Lane, connection: socket.socket) -> None:
        try:
            lane.unsent = lane.unsent[connection.send(lane.unsent) :]
        except (BrokenPipeError, ConnectionResetError):
            lane.unsent = lane.unsent[:0]  # it may have answered, such as 413, before it closed
        if not lane.unsent:
            self._selector.modify(connection, selectors.EVENT_READ, lane)

    def _read(self, lane: _Lane, connection: socket.socket, finished: Finished) -> None:
        data = connection.recv(_READ_BYTES)
        now_s = time.perf_counter()
        parser = lane.parser
        if data:
            body = parser.feed(data)
            if body and parser.status == 200:
                finished.job.reader.feed(body, now_s)
            elif body:
                finished.body += body
        else:
            parser.end()
        if parser.is_complete:
            self._selector.unregister(connection)
            if parser.is_kept_alive and data and not lane.unsent:
                self._idle.append(connection)
            else:
                connection.close()
            self._end(lane, now_s)

    def _fail(self, lane: _Lane, why: str) -> None:
        assert lane.finished is not None
        lane.finished.error = why
        if lane.connection is not None:
            if lane.connection in self._selector.get_map():
                self._selector.unregister(lane.connection)
            lane.connection.close()
        self._end(lane, time.perf_counter())

    def _end(self, lane: _Lane, now_s: float) -> None:
        assert lane.finished is not None
        finished, lane.finished, lane.connection = lane.finished, None, None
        finished.status, finished.headers, finished.ended_s = lane.parser.status, lane.parser.headers, now_s
        self._ended.append((lane, finished))

    def _end_overdue(self, lanes: Iterable[_Lane], now_s: float) -> None:
        for lane in lanes:
            if lane.finished is not None and now_s - lane.finished.started_s > self._timeout_s:
                self._fail(lane, "timeout")


def _name(error: OSError) -> str:
    """In words that a report can count."""
    if isinstance(error, ConnectionRefusedError):
        return "connection: refused"
    if isinstance(error, ConnectionResetError | BrokenPipeError):
        return "connection: reset"
    return f"connection: {error.strerror or type(error).__name__}"
