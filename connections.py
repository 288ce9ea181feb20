"""The Gunicorn worker: threads are for requests that are here, not for clients that are slow.

Gunicorn's `gthread` worker lets a thread read a half-sent header or body for ever, gives each new connection a thread
before it has sent a byte, and lingers over closing connections in its main thread. This subclass

- gives a connection a thread only once it has sent something,
- counts the time for header and body from then on, also while it waits for a thread, and ends the reading when it is
  up: the view sees a body that ended early, and a half-sent header is closed silently,
- counts the time for reading the answer from its first byte, and closes the connection when it is up,
- closes connections in the thread that served them,
- closes the port when a stop begins, after taking along who had already connected.

Written against Gunicorn 27.0 (`gunicorn/workers/gthread.py`), which requirements.txt pins.
"""

from __future__ import annotations

import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from gunicorn import glogging, util
from gunicorn.workers.gthread import TConn, ThreadWorker

import logs
from bodies import READ_MARK
from config import Settings

log = logging.getLogger("avito.connections")

_TICK_S = 0.25
_LINGER_S = 1.0


class Reaper:
    """Shuts down sockets whose time is up. Any thread.

    A shutdown and not a close: the descriptor stays with the thread that uses it, which sees the end of the stream.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._deadlines: dict[socket.socket, tuple[float, int]] = {}

    def start(self) -> None:
        threading.Thread(target=self._run, name="reaper", daemon=True).start()

    def watch(self, connection: socket.socket, seconds: float, how: int) -> None:
        """End `connection` in so many seconds, in the direction `how` (SHUT_RD or SHUT_RDWR)."""
        with self._lock:
            self._deadlines[connection] = (self._clock() + seconds, how)

    def forget(self, connection: socket.socket) -> None:
        with self._lock:
            self._deadlines.pop(connection, None)

    def reap(self) -> int:
        """Shut down what is overdue; how many that were."""
        now = self._clock()
        with self._lock:
            overdue = [(c, how) for c, (deadline, how) in self._deadlines.items() if now >= deadline]
            for connection, _ in overdue:
                del self._deadlines[connection]
        for connection, how in overdue:
            try:
                connection.shutdown(how)
            except OSError:
                continue  # it was gone already
        if overdue:
            log.info("ended %d connections that were too slow", len(overdue))
        return len(overdue)

    def _run(self) -> None:
        while True:
            time.sleep(_TICK_S)
            self.reap()


class Connection(TConn):  # type: ignore[misc]
    """A connection that may be closed in its own thread, after which the main thread's close does nothing."""

    is_closed = False

    def linger_and_close(self) -> None:
        self.is_closed = True
        # The other side gets a moment to read the answer: a close with unread bytes would reset the connection.
        util.close_graceful(self.sock, timeout=_LINGER_S, max_drain=1 << 24)

    def close(self, graceful: bool = False) -> None:
        if not self.is_closed:
            super().close(graceful=graceful)


class Worker(ThreadWorker):  # type: ignore[misc]
    """`settings` is set by gunicorn_config.py before the worker is made."""

    settings: Settings

    def init_process(self) -> None:
        self.reaper = Reaper()
        self.reaper.start()
        super().init_process()

    def load_wsgi(self) -> None:
        super().load_wsgi()
        self.wsgi: Any = _timed(self.wsgi, self.reaper, self.settings)

    def accept(self, listener: socket.socket) -> None:
        try:
            client, address = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        self.nr_conns += 1
        # The answer's last piece must not wait for the client's acknowledgement of the one before.
        if client.family in (socket.AF_INET, socket.AF_INET6):
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        conn = Connection(self.cfg, client, address, listener.getsockname())
        conn.timeout = time.monotonic() + self.settings.read_timeout_s
        self.pending_conns.append(conn)
        self.poller.register(client, selectors.EVENT_READ, partial(self.on_pending_socket_readable, conn))

    def set_accept_enabled(self, enabled: bool) -> None:
        super().set_accept_enabled(enabled)
        if not enabled and not self.alive:
            # A stop has begun. Who is in the backlog is taken along; after that nobody may join a queue that is
            # never served again, so the port refuses at once.
            for listener in self.sockets:
                before = -1
                while before != self.nr_conns:
                    before = self.nr_conns
                    self.accept(listener)
                listener.close()

    def enqueue_req(self, conn: Connection) -> None:
        self.reaper.watch(conn.sock, self.settings.read_timeout_s, socket.SHUT_RD)
        super().enqueue_req(conn)

    def handle(self, conn: Connection) -> Any:
        keep = False
        try:
            keep = super().handle(conn)
            return keep
        finally:
            self.reaper.forget(conn.sock)
            if not keep:
                conn.linger_and_close()


def _timed(wsgi: Callable[..., Iterable[bytes]], reaper: Reaper, settings: Settings) -> Callable[..., Iterable[bytes]]:
    """The application, with its connection's clock: reading until the body is in, then none, then writing."""

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        connection: socket.socket = environ["gunicorn.socket"]
        environ[READ_MARK] = partial(reaper.forget, connection)

        def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
            is_stream = not any(name.lower() == "content-length" for name, _ in headers)
            # A stream may take as long as its request may; the time to read is what comes on top.
            seconds = settings.answer_timeout_s + (settings.request_deadline_s if is_stream else 0)
            reaper.watch(connection, seconds, socket.SHUT_RDWR)
            return start_response(status, headers, exc_info)

        return wsgi(environ, start)

    return application


class ServerLogger(glogging.Logger):  # type: ignore[misc]
    """Gunicorn's messages through our own logging, and no access log: the audit line is ours."""

    settings: Settings

    def setup(self, cfg: Any) -> None:
        logs.configure(self.settings)

    def access(self, resp: Any, req: Any, environ: Any, request_time: Any) -> None:
        return

    def reopen_files(self) -> None:
        return  # WatchedFileHandler notices by itself
