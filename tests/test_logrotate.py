"""The real logrotate with the file of `ops/`, while processes write as the service does."""

from __future__ import annotations

import grp
import gzip
import json
import os
import pwd
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from config import PROJECT_ROOT
from tests.proxies import GENEROUS_S, OPS, need, rewritten, tool

NUM_PROCESSES, NUM_FILES = 2, 10
# As the server's processes do: each has its own handler on the one file. Three threads write until stdin is closed, and
# how many lines each has written goes to a file.
WRITER = """
import json, logging, pathlib, sys, threading
import logs
from config import Settings

logs.configure(Settings.model_validate({"AVITO_LOG_FILE": sys.argv[1]}))
log, is_over, counts = logging.getLogger("avito.test"), threading.Event(), [0, 0, 0]

def write(thread):
    while not is_over.is_set():
        log.info("line %s %d %d", sys.argv[2], thread, counts[thread])
        counts[thread] += 1

threads = [threading.Thread(target=write, args=(thread,)) for thread in range(3)]
for each in threads:
    each.start()
sys.stdin.read()
is_over.set()
for each in threads:
    each.join()
pathlib.Path(sys.argv[3]).write_text(json.dumps(counts))
"""


def test_no_line_is_lost_or_doubled_while_files_rotate(tmp_path: Path) -> None:
    need("logrotate")
    log = tmp_path / "app.log"
    user, group = pwd.getpwuid(os.getuid()).pw_name, grp.getgrgid(os.getgid()).gr_name
    places = {
        "/var/log/avito-ai/app.log": (str(log), 1),
        "su avito-ai avito-ai": (f"su {user} {group}", 1),
        "rotate 30": ("rotate 10000", 1),
    }
    rules = tmp_path / "rules"
    rules.write_text(rewritten(OPS / "logrotate" / "avito-ai", places))
    rules.chmod(0o644)
    tmp_path.chmod(0o750)
    counts = [tmp_path / f"counts{process}" for process in range(NUM_PROCESSES)]
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(log), str(process), str(counts[process])],
            cwd=PROJECT_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )
        for process in range(NUM_PROCESSES)
    ]
    try:
        deadline = time.monotonic() + GENEROUS_S
        while len(list(tmp_path.glob("app.log.*"))) < NUM_FILES:
            # A line that was on its way goes to the renamed file, which the next turn compresses: a day later. Here the
            # next turn waits until each process has written to the new file, and so has no other line on its way.
            while not (
                log.exists() and all(f" line {process} " in log.read_text() for process in range(NUM_PROCESSES))
            ):
                assert time.monotonic() < deadline
                time.sleep(0.001)
            command = [tool("logrotate"), "--force", "--state", str(tmp_path / "state"), str(rules)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
    finally:
        for writer in writers:
            writer.communicate(timeout=GENEROUS_S)
    assert [writer.returncode for writer in writers] == [0] * NUM_PROCESSES
    files = sorted(tmp_path.glob("app.log*"))
    assert any(file.suffix == ".gz" for file in files)
    lines = Counter(line.partition(" line ")[2] for file in files for line in read(file))
    expected = {
        f"{process} {thread} {number}\n"
        for process in range(NUM_PROCESSES)
        for thread, count in enumerate(json.loads(counts[process].read_text()))
        for number in range(count)
    }
    assert lines.keys() == expected
    assert set(lines.values()) == {1}


def read(file: Path) -> list[str]:
    data = file.read_bytes()
    return (gzip.decompress(data) if file.suffix == ".gz" else data).decode().splitlines(keepends=True)
