"""Log lines: form, escaping, request id, file that logrotate moved away."""

from __future__ import annotations

import json
import logging
import logging.config
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import logs
from config import Settings


@pytest.fixture
def configured(tmp_path: Path) -> Iterator[Any]:
    root = logging.getLogger()
    before = (root.level, root.handlers[:])

    def configure(log_format: str) -> Path:
        file = tmp_path / "app.log"
        logs.configure(Settings.model_validate({"AVITO_LOG_FILE": str(file), "AVITO_LOG_FORMAT": log_format}))
        return file

    yield configure
    for handler in root.handlers:
        handler.close()
    root.handlers[:] = before[1]
    root.setLevel(before[0])


def test_text_line_has_time_level_id_and_message(configured: Any) -> None:
    file = configured("text")
    token = logs.request_id.set("abc-1")
    logging.getLogger("avito.test").info("Tokenized: %d tokens", 5)
    logs.request_id.reset(token)
    logging.getLogger("avito.test").warning("outside")
    first, second = file.read_text().splitlines()
    assert first.endswith("[INFO] [abc-1] Tokenized: 5 tokens") and first[:2] == "20"
    assert second.endswith("[WARNING] [-] outside")


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_nobody_writes_lines_of_his_own(configured: Any, log_format: str) -> None:
    file = configured(log_format)
    logging.getLogger("avito.test").info("user said %s", "a\nb\r\x1b[31mc\u2028d\x85e")
    (line,) = file.read_text().split("\n")[:-1]
    assert not any(ord(c) < 32 or ord(c) in (0x7F, 0x85, 0x2028) for c in line)


def test_json_line_has_its_fields(configured: Any) -> None:
    file = configured("json")
    logging.getLogger("avito.audit").info("audit", extra={"fields": {"outcome": "ok", "total_s": 1.5}})
    line = json.loads(file.read_text())
    assert line["level"] == "INFO" and line["outcome"] == "ok" and line["total_s"] == 1.5
    assert line["request_id"] == "-" and line["message"] == "audit"


def test_traceback_is_kept_and_escaped(configured: Any) -> None:
    file = configured("text")
    try:
        raise ValueError("evil\x1b[0m")
    except ValueError:
        logging.getLogger("avito.test").exception("failed")
    text = file.read_text()
    assert "Traceback" in text and "\x1b" not in text and "\\x1b" in text


def test_rotated_file_is_reopened(configured: Any, tmp_path: Path) -> None:
    file = configured("text")
    log = logging.getLogger("avito.test")
    log.info("one")
    file.rename(tmp_path / "app.log.1")
    log.info("two")
    assert "one" in (tmp_path / "app.log.1").read_text()
    assert "two" in file.read_text()


def test_file_that_cannot_be_opened_again_costs_no_request(configured: Any, tmp_path: Path, capfd: Any) -> None:
    file = configured("text")
    log = logging.getLogger("avito.test")
    file.unlink()
    file.mkdir()
    log.info("for stdout alone")
    file.rmdir()
    log.info("for both")
    assert file.read_text().splitlines()[0].endswith("for both")
    shown = capfd.readouterr()
    assert "for stdout alone" in shown.out and "Logging error" in shown.err
