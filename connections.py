"""The Gunicorn worker: threads are for requests that are here, not for clients that are slow.

Gunicorn's `gthread` worker lets a thread read a half-sent header or body for ever, gives each new connection a thread
before it has sent a byte, and lingers over closing connections in its main thread. This subclass

- gives a connection a thread only once it has sent something,
- counts the time for header and body from then on, also while it waits for a thread, and ends the reading when it is
  up: the view sees a body that ended early, and a half-sent header is closed silently. A request that is complete when
  its thread comes is served however long that took,
- counts the time for reading the answer from its first byte, and closes the connection when it is up,
- closes connections in the thread that served them,
- closes the port when a stop begins, after taking along who had already connected,
- survives running out of file descriptors,
- stops properly when its master is gone.

Written against Gunicorn 27.0 (`gunicorn/workers/gthread.py`), which requirements.txt pins.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import resource
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
from bodies import READ_MARK, RECEIVED_AT
from config import Settings, Supervisor

log = logging.getLogger("avito.connections")

_TICK_S = 0.25
_LINGER_S = 1.0
_LAST_CHANCE_S = 0.5
_MAX_DESCRIPTORS = 65_536
# For logs, libraries, model files and sockets to Redis.
_SPARE_DESCRIPTORS = 128


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

    def forget(self, connection: socket.socket) -> bool:
        """Stop watching. False if the connection had been shut down, or was not watched."""
        with self._lock:
            return self._deadlines.pop(connection, None) is not None

    def reap(self) -> int:
        """Shut down what is overdue; how many that were."""
        # Under the lock, so that who called `forget` in time is never hit.
        with self._lock:
            now = self._clock()
            overdue = [(c, how) for c, (deadline, how) in self._deadlines.items() if now >= deadline]
            for connection, how in overdue:
                del self._deadlines[connection]
                with contextlib.suppress(OSError):  # it was gone already
                    connection.shutdown(how)
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
    received_at = 0.0  # monotonic seconds at which the first byte of the current request was seen

    def linger_and_close(self) -> None:
        self.is_closed = True
        # The other side gets a moment to read the answer: a close with unread bytes would reset the connection.
        util.close_graceful(self.sock, timeout=_LINGER_S, max_drain=1 << 24)

    def close(self, graceful: bool = False) -> None:
        if not self.is_closed:
            super().close(graceful=graceful)


class Worker(ThreadWorker):  # type: ignore[misc]
    """`settings` and `supervisor` are set by gunicorn_config.py before the worker is made."""

    settings: Settings
    supervisor: Supervisor | None = None

    def init_process(self) -> None:
        self.reaper = Reaper()
        self.reaper.start()
        self._serving = threading.local()
        self.worker_connections: int = min(self.cfg.worker_connections, _raise_descriptor_limit() - _SPARE_DESCRIPTORS)
        super().init_process()

    def load_wsgi(self) -> None:
        super().load_wsgi()
        self.wsgi: Any = self._with_clock(self.wsgi)

    def accept(self, listener: socket.socket) -> None:
        try:
            client, address = listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                # Gunicorn's loop accepts again once a connection has gone.
                self.worker_connections = max(1, self.nr_conns)
                log.warning("no file descriptors left; from now on at most %d connections", self.worker_connections)
            return  # otherwise the client has gone, or another wake-up took it
        conn = Connection(self.cfg, client, address, listener.getsockname())
        conn.timeout = time.monotonic() + self.settings.read_timeout_s
        self.poller.register(client, selectors.EVENT_READ, partial(self.on_pending_socket_readable, conn))
        self.pending_conns.append(conn)
        self.nr_conns += 1

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
            # Who has not sent a byte by now (a browser's spare connection) does not hold the stop up.
            for conn in self.pending_conns:
                conn.timeout = min(conn.timeout, time.monotonic() + _LINGER_S)

    def is_parent_alive(self) -> bool:
        """A worker whose master is gone stops as if it had been told to: Gunicorn leaves its loop, but as if alive,
        which would keep the port open and the connections, with nobody to serve them."""
        self.alive: bool = self.alive and super().is_parent_alive()
        return self.alive

    def enqueue_req(self, conn: Connection) -> None:
        conn.received_at = time.monotonic()
        super().enqueue_req(conn)

    def handle(self, conn: Connection) -> Any:
        keep = False
        try:
            left_s = conn.received_at + self.settings.read_timeout_s - time.monotonic()
            # At least a moment: what lies complete in the buffer is read, though its time ran out in the queue.
            self.reaper.watch(conn.sock, max(left_s, _LAST_CHANCE_S), socket.SHUT_RD)
            self._serving.connection = conn
            keep = super().handle(conn)
            return keep
        finally:
            self.reaper.forget(conn.sock)
            if not keep:
                conn.linger_and_close()

    def _with_clock(self, wsgi: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
        """The application, with its connection's clock: reading until the body is in, then none, then writing."""
        settings, reaper = self.settings, self.reaper

        def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            conn: Connection = self._serving.connection
            environ[RECEIVED_AT] = conn.received_at
            environ[READ_MARK] = partial(reaper.forget, conn.sock)

            def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
                is_stream = not any(name.lower() == "content-length" for name, _ in headers)
                # A stream may take as long as its request may; the time to read is what comes on top.
                seconds = settings.answer_timeout_s + (settings.request_deadline_s if is_stream else 0)
                reaper.watch(conn.sock, seconds, socket.SHUT_RDWR)
                return start_response(status, headers, exc_info)

            return wsgi(environ, start)

        return application


def _raise_descriptor_limit() -> int:
    """Ask for as many file descriptors as the system lets us have; how many that are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(wanted, 2 * _SPARE_DESCRIPTORS)


class ServerLogger(glogging.Logger):  # type: ignore[misc]
    """Gunicorn's messages through our own logging, and no access log: the audit line is ours."""

    settings: Settings

    def setup(self, cfg: Any) -> None:
        logs.configure(self.settings)

    def access(self, resp: Any, req: Any, environ: Any, request_time: Any) -> None:
        return

    def reopen_files(self) -> None:
        return  # logs.LogFile notices by itself
