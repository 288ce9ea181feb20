"""Gunicorn's configuration: `gunicorn -c gunicorn_config.py`, nothing else on the command line.

One worker: the models live in its memory and on its card; a second worker would load them again. Threads, because a
waiting request costs a thread and nothing else. No preload: CUDA does not survive a fork. No max_requests: a worker
is replaced when its engine is lost (watchdog.py), not after a number of requests.
"""

import sys
from typing import Any

import connections
import keys
import logs
from config import ConfigError, load_settings, take_supervisor
from models.errors import SnapshotError
from models.snapshots import find_snapshots
from notify import Notifier, tell_stops
from watchdog import Watchdog

try:
    _settings = load_settings()
    logs.check_file(_settings)
    keys.open_store(_settings)
    # Paths, config.json and tokenizer files are checked now, before the port is bound.
    find_snapshots(_settings)
except ConfigError as error:
    sys.exit("configuration: " + "\nconfiguration: ".join(error.mistakes))
except SnapshotError as error:
    sys.exit(f"configuration: {error}")

connections.Worker.settings = _settings
connections.ServerLogger.settings = _settings

wsgi_app = "app_production:create_app()"
bind = f"{_settings.host}:{_settings.port}" if ":" not in _settings.host else f"[{_settings.host}]:{_settings.port}"
worker_class = connections.Worker
logger_class = connections.ServerLogger
workers = 1
threads = _settings.threads
worker_connections = 4 * _settings.threads
preload_app = False
max_requests = 0
keepalive = 75
# `timeout` only sees whether the worker's main thread turns over; requests and loading have deadlines of their own.
timeout = 120
graceful_timeout = int(_settings.grace_s)
proc_name = "avito-ai"
# It would be a file in the user's home folder; signals and our own doors do what is needed.
control_socket_disable = True
# Addresses and schemes that proxies report are the application's business (AVITO_TRUSTED_PROXIES).
forwarded_allow_ips = ""


def on_starting(server: Any) -> None:
    """Before the master tells systemd that it is ready: it is, but the models are not."""
    # Kept there because a reload runs this file again.
    connections.Worker.supervisor = take_supervisor()


def when_ready(server: Any) -> None:
    """The master has its port and its signal handlers."""
    if connections.Worker.supervisor is not None:
        tell_stops(server, connections.Worker.supervisor, _settings)


def post_worker_init(worker: Any) -> None:
    """The worker is up and loads its models: from here its engine is watched."""
    extensions = worker.app.callable.extensions
    extensions["avito_watchdog"] = Watchdog(extensions["avito_service"])
    extensions["avito_watchdog"].start()
    extensions["avito_notifier"] = None
    if worker.supervisor is not None:
        extensions["avito_notifier"] = Notifier(
            extensions["avito_service"], worker.supervisor, is_first=worker.age == 1
        )
        extensions["avito_notifier"].start()


def worker_exit(server: Any, worker: Any) -> None:
    """Every accepted request has been answered, or the grace time is over."""
    application = worker.app.callable
    if application is not None:
        # First, or it would take the stopped engine for a lost one.
        application.extensions["avito_watchdog"].stop()
        if application.extensions["avito_notifier"] is not None:
            application.extensions["avito_notifier"].stop()
        application.extensions["avito_service"].stop(timeout_s=5.0)
        if application.extensions["avito_access"] is not None:
            application.extensions["avito_access"].stop()
