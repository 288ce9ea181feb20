"""The real logrotate with the file of `ops/`, while processes write as the service does."""

from __future__ import annotations

import grp
import gzip
import os
import pwd
import subprocess
import sys
from collections import Counter
from pathlib import Path

from config import PROJECT_ROOT
from tests.proxies import OPS, need, rewritten, tool

NUM_PROCESSES, NUM_THREADS, NUM_LINES = 2, 3, 4000
# As the server's processes do: each has its own handler on the one file.
WRITER = """
import logging, sys, threading
import logs
from config import Settings

logs.configure(Settings.model_validate({"AVITO_LOG_FILE": sys.argv[1]}))
log = logging.getLogger("avito.test")

def write(thread):
    for number in range(int(sys.argv[4])):
        log.info("line %s %d %d", sys.argv[2], thread, number)

threads = [threading.Thread(target=write, args=(thread,)) for thread in range(int(sys.argv[3]))]
for each in threads:
    each.start()
for each in threads:
    each.join()
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
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(log), str(process), str(NUM_THREADS), str(NUM_LINES)],
            cwd=PROJECT_ROOT,
            stdout=subprocess.DEVNULL,
        )
        for process in range(NUM_PROCESSES)
    ]
    num_rotations = 0
    while any(writer.poll() is None for writer in writers):
        command = [tool("logrotate"), "--force", "--state", str(tmp_path / "state"), str(rules)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        num_rotations += 1
    assert [writer.returncode for writer in writers] == [0] * NUM_PROCESSES
    files = sorted(tmp_path.glob("app.log*"))
    assert len(files) > 5 and any(file.suffix == ".gz" for file in files), f"{num_rotations} rotations"
    lines = Counter(line.partition(" line ")[2] for file in files for line in read(file))
    expected = {
        f"{process} {thread} {number}\n"
        for process in range(NUM_PROCESSES)
        for thread in range(NUM_THREADS)
        for number in range(NUM_LINES)
    }
    assert lines.keys() == expected
    assert set(lines.values()) == {1}


def read(file: Path) -> list[str]:
    data = file.read_bytes()
    return (gzip.decompress(data) if file.suffix == ".gz" else data).decode().splitlines(keepends=True)
