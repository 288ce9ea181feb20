"""Ends a worker whose engine hangs or is dead, so that the server starts a new one.

Judged by the engine's progress, never by a timer of the web side: a busy but sound engine makes steps. Before the end
the stacks of all threads go to the log and everybody who still waits gets an error.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable

from models.service import ModelService

log = logging.getLogger("avito.watchdog")

EXIT_CODE = 70  # EX_SOFTWARE; not 3 or 4, which Gunicorn takes for "do not start another one"
# Time for the request threads to write the errors out.
_FAREWELL_S = 1.0


class Watchdog:
    """:param end: ends the process; passed in by tests.
    :param interval_s: how often the engine is looked at.
    """

    def __init__(
        self,
        service: ModelService,
        *,
        end: Callable[[int], None] = os._exit,
        interval_s: float = 1.0,
        farewell_s: float = _FAREWELL_S,
    ) -> None:
        self._service = service
        self._end = end
        self._interval_s = interval_s
        self._farewell_s = farewell_s
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._is_stopped.set()

    def _run(self) -> None:
        while not self._is_stopped.wait(self._interval_s):
            snapshot = self._service.snapshot()
            if snapshot.is_alive:
                continue
            if snapshot.is_engine_dead:
                why = "its loop has ended"
            else:
                why = f"no step for {snapshot.stalled_s:.1f} s while requests are pending"
            log.critical("the engine is lost: %s; ending this worker. Threads:", why)
            for line in dump_threads().splitlines():  # a record each, because the log escapes line ends
                log.critical("%s", line)
            self._service.fail_open_requests("the engine was lost; a new one is on its way")
            time.sleep(self._farewell_s)
            self._end(EXIT_CODE)
            return


def dump_threads() -> str:
    """The stack of every thread, by name."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        stack = "".join(traceback.format_stack(frame))
        parts.append(f"--- {names.get(ident, '?')} ({ident})\n{stack}")
    return "\n".join(parts)
