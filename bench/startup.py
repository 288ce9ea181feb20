"""From process start to the first answer, by phase: our server as deploy.sh starts it, on a port of its own.

The settings are those of the environment and .env; where they name no model, the embedded Avibe. Only the first run
can meet model files that are not in the page cache.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from bench import report
from bench.client import Client
from bench.dialects import AvitoTarget, Demand, failure_of, get_json
from bench.report import Column, Panel, Unable
from config import PROJECT_ROOT, ConfigError, load_settings
from models.snapshots import DEMO_MARKER

SERVER = (sys.executable, "-m", "gunicorn", "-c", "gunicorn_config.py")
DEMO_AVIBE = "vibe/demo"
# Polling takes CPU time from the loading that it watches.
_POLL_S = 0.05
_STOP_S = 20.0
_ANSWER_TIMEOUT_S = 300.0
_PICTURE_PX = (224, 224)


@dataclass(frozen=True)
class StartupRow:
    """One start. All but `phases_s` count from the start of the process; phases are the service's own readings."""

    run: int
    live_s: float
    phases_s: dict[str, dict[str, float]]  # model -> phase -> seconds
    ready_s: float
    first_answer_s: dict[str, float]  # model -> seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="starts, one after the other (default 3)")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="for one start (default 600)")
    report.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """:raise Unable: the settings are wrong, or the server does not become ready."""
    report.check_files(arguments.json, arguments.plot)
    environ = environment(os.environ)
    rows = []
    with report.progress() as bar:
        bar.start("starting the service", arguments.runs)
        for number in range(1, arguments.runs + 1):
            rows.append(measure(SERVER, environ, number, arguments.timeout))
            bar.advance()
    print(report.describe(report.read_machine()))
    print(f"\nSeconds from process start; phases by themselves\n{render(rows)}")
    if arguments.json:
        report.write_json(arguments.json, arguments, rows, [])
    if arguments.plot:
        bars = {f"run {row.run}": [(name, seconds) for name, seconds in lines(row).items()] for row in rows}
        report.write_plot(arguments.plot, "From process start", [Panel("", "", "seconds", bars)])
    return 0


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """For the server: this one, but for the port, the log file, and the embedded model where no model is configured.

    :raise Unable: the settings have mistakes, or the embedded model is needed and missing.
    """
    try:
        settings = load_settings(environ)
    except ConfigError as error:
        raise Unable("configuration: " + "; ".join(error.mistakes)) from None
    changes = {"AVITO_HOST": "127.0.0.1", "AVITO_PORT": str(_free_port()), "AVITO_LOG_FILE": "", "AVITO_RATE_LIMIT": ""}
    if not settings.avibe_model_path and not settings.avision_model_path:
        if not (PROJECT_ROOT / DEMO_AVIBE / DEMO_MARKER).is_file():
            raise Unable(f"no model is configured, and {DEMO_AVIBE} is missing: tools/prepare_demo_avibe.py makes it")
        changes["AVIBE_MODEL_PATH"] = DEMO_AVIBE
    return {**environ, **changes}


def measure(command: Sequence[str], environ: Mapping[str, str], number: int, timeout_s: float) -> StartupRow:
    """Start, wait for the first answer of each model, stop. :raise Unable: that fails; with the end of the log."""
    with tempfile.TemporaryFile() as log:
        started_s = time.perf_counter()
        # A session of its own, so that its worker can be ended with it.
        process = subprocess.Popen(
            command, cwd=PROJECT_ROOT, env=dict(environ), stdout=log, stderr=log, start_new_session=True
        )
        try:
            with Client(f"http://127.0.0.1:{environ['AVITO_PORT']}", _ANSWER_TIMEOUT_S) as client:
                return _follow(client, process, started_s, number, timeout_s)
        except Unable as error:
            raise Unable(f"{error}\nThe end of its log:\n{_end_of(log)}") from None
        finally:
            _stop(process)


def _follow(
    client: Client, process: subprocess.Popen[bytes], started_s: float, number: int, timeout_s: float
) -> StartupRow:
    def wait(what: str, is_there: Callable[[dict[str, Any]], bool], path: str) -> tuple[float, dict[str, Any]]:
        while True:
            try:
                body = get_json(client, path)
            except Unable:
                body = {}  # the port is not bound yet
            now_s = time.perf_counter() - started_s
            if is_there(body):
                return now_s, body
            if process.poll() is not None:
                raise Unable(f"the server ended before it was {what}, with exit code {process.returncode}")
            if any(model.get("state") == "failed" for model in body.get("models", {}).values()):
                raise Unable(f"a model failed to load: {'; '.join(body.get('why_not_ready', []))}")
            if now_s > timeout_s:
                raise Unable(f"the server was not {what} within {timeout_s:g} s")
            time.sleep(_POLL_S)

    live_s, _ = wait("live", lambda body: body.get("status") == "alive", "/api/health/live")
    ready_s, body = wait("ready", lambda body: body.get("status") == "ready", "/api/health/ready")
    models = {name: model for name, model in body["models"].items() if model["state"] == "ready"}
    first_answer_s = {}
    for name in models:
        _ask(client, _PICTURE_PX if name == "avision" else None)
        first_answer_s[name] = time.perf_counter() - started_s
    return StartupRow(
        run=number,
        live_s=live_s,
        phases_s={name: dict(model.get("phases", {})) for name, model in models.items()},
        ready_s=ready_s,
        first_answer_s=first_answer_s,
    )


def _ask(client: Client, picture_px: tuple[int, int] | None) -> None:
    """One token."""
    target = AvitoTarget(client, "the service", None, "", is_streamed=False)
    target.leave_out("ignore_eos")
    failure = failure_of(client.ask(target.job(random.Random(0), Demand(1, picture_px=picture_px), "Hello")))
    if failure is not None:
        raise Unable(f"the first request failed: {failure}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _end_of(log: IO[bytes]) -> str:
    log.seek(0)
    return "\n".join(f"  {line}" for line in log.read().decode(errors="replace").splitlines()[-20:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def lines(row: StartupRow) -> dict[str, float]:
    """What the table tells of one start: name -> seconds."""
    phases = {
        f"{model}: {phase}": seconds for model, phases in row.phases_s.items() for phase, seconds in phases.items()
    }
    answers = {f"{model}: first answer": seconds for model, seconds in row.first_answer_s.items()}
    return {"port answers": row.live_s, **phases, "ready": row.ready_s, **answers}


def render(rows: Sequence[StartupRow]) -> str:
    """A line for each event, a column for each run, and the median where there are several."""
    runs = [lines(row) for row in rows]
    names = list(dict.fromkeys(name for run_lines in runs for name in run_lines))

    def of_run(index: int) -> Callable[[str], float | None]:
        return lambda name: runs[index].get(name)

    columns = [Column[str]("", lambda name: name, is_left=True)]
    columns += [Column(f"run {row.run}", of_run(index)) for index, row in enumerate(rows)]
    if len(rows) > 1:
        columns.append(Column("median", lambda name: statistics.median(r[name] for r in runs if name in r)))
    return report.render_table(columns, names)
