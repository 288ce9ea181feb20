"""How log lines look and where they go: one configuration for our loggers and Gunicorn's, in every process.

Text: `2026-11-22 10:00:00,123 [INFO] [request-id] message`; or one JSON object a line. Control characters are escaped,
so that nobody writes lines of his own into the log. Prompts, answers and pictures never reach a logger: lengths and
hashes do.
"""

from __future__ import annotations

import json
import logging
import logging.config
import logging.handlers
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from config import ConfigError, Settings

# "-" outside a request. A ContextVar, so that no function has to pass the id along.
request_id: ContextVar[str] = ContextVar("request_id", default="-")

_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(0x20), 0x7F, *range(0x80, 0xA0))} | {
    0x2028: "\\u2028",
    0x2029: "\\u2029",
}


class RequestIdFilter(logging.Filter):
    """Stamps every record with the id of the request whose thread logs it."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = request_id.get()
        return True


class TextFormatter(logging.Formatter):
    """One record, one line; a traceback follows indented, its own control characters escaped as well."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s [%(levelname)s] [%(request_id)s] %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        return super().formatMessage(record).translate(_ESCAPES)

    def formatException(self, ei: Any) -> str:
        lines = super().formatException(ei).split("\n")
        return "\n".join("    " + line.translate(_ESCAPES) for line in lines)


class JsonFormatter(logging.Formatter):
    """One JSON object a line; `fields` of a record (the audit line has them) become members of their own."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname,
            "logger": record.name,
            "request_id": getattr(record, "request_id", "-"),
            "message": record.getMessage(),
        }
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False).translate(_ESCAPES)


class LogFile(logging.handlers.WatchedFileHandler):
    """Opens its file anew when logrotate has moved it away.

    A file that cannot be opened any more costs its own lines, which stdout has as well, and never the request that
    logs: the class above would raise into it.
    """

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:
            self.handleError(record)


def logging_config(settings: Settings) -> dict[str, Any]:
    """A configuration for `logging.config.dictConfig`: stdout, and `AVITO_LOG_FILE` if it is set.

    :return: plain data, but for the classes of our own.
    """
    handlers: dict[str, Any] = {
        "stdout": {"class": "logging.StreamHandler", "stream": "ext://sys.stdout"},
    }
    if settings.log_file:
        handlers["file"] = {
            "()": LogFile,
            "filename": settings.log_file,
            "encoding": "utf-8",
        }
    for handler in handlers.values():
        handler.update(formatter="line", filters=["request_id"])
    formatter = TextFormatter if settings.log_format == "text" else JsonFormatter
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "filters": {"request_id": {"()": RequestIdFilter}},
        "formatters": {"line": {"()": formatter}},
        "handlers": handlers,
        "root": {"level": settings.log_level, "handlers": list(handlers)},
        "loggers": {
            "gunicorn.error": {"level": settings.log_level, "handlers": [], "propagate": True},
            # Other people's chatter, URLs and file names among it.
            **{name: {"level": "WARNING"} for name in ("urllib3", "httpx", "PIL", "filelock", "transformers")},
        },
    }


def check_file(settings: Settings) -> None:
    """:raise ConfigError: `AVITO_LOG_FILE` cannot be written."""
    if settings.log_file:
        try:
            with Path(settings.log_file).open("a", encoding="utf-8"):
                return
        except OSError as error:
            raise ConfigError([f"AVITO_LOG_FILE={settings.log_file}: cannot be written: {error.strerror}"]) from None


def configure(settings: Settings) -> None:
    """Apply `logging_config`. Called once per process, by the server and never by an import."""
    logging.config.dictConfig(logging_config(settings))
