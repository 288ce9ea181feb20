"""`deploy.sh production` under a prefix: the real Gunicorn under a stand-in for systemctl, over fake models.

Releases share this project's .venv. What pip does is shown by ops/try_deploy.sh, with the embedded models.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from config import PROJECT_ROOT, VERSION, load_settings
from tests.test_snapshots import make_snapshot
from tools import deploy_production, preflight

GENEROUS_S = 60.0
STAND_IN = f"{sys.executable} {PROJECT_ROOT / 'tests' / 'systemctl_stand_in.py'}"
# Until the project has its unit, the least that one needs.
UNIT = """\
[Service]
Type=exec
User=avito-ai
WorkingDirectory=/opt/avito-ai/current
ExecStart=/opt/avito-ai/current/.venv/bin/python -m gunicorn -c gunicorn_config.py
EnvironmentFile=/etc/avito-ai/avito-ai.env
TimeoutStopSec=150
"""
# What a release is made of here: what the fake application needs, to be quick.
SHIPPED = ("models", "tools", "templates", "static", "requirements.txt", ".env.example")
SHIPPED_TESTS = ("fake_app.py", "fakes.py", "test_snapshots.py")


def make_project(root: Path, version: str, app: str = "create()") -> Path:
    """A copy of the project of this version whose unit serves `tests.fake_app:APP`."""
    root.mkdir()
    for name in (*SHIPPED, *(file.name for file in PROJECT_ROOT.glob("*.py"))):
        source = PROJECT_ROOT / name
        if source.is_dir():
            shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__", "demo_avision"))
        else:
            shutil.copy(source, root / name)
    (root / "tests").mkdir()
    for name in SHIPPED_TESTS:
        shutil.copy(PROJECT_ROOT / "tests" / name, root / "tests" / name)
    shutil.copy(PROJECT_ROOT / "deploy.sh", root)
    config = (root / "config.py").read_text()
    (root / "config.py").write_text(config.replace(f'VERSION = "{VERSION}"', f'VERSION = "{version}"'))
    unit = PROJECT_ROOT / "avito-ai.service"
    text = unit.read_text() if unit.is_file() else UNIT
    command = "-m gunicorn -c gunicorn_config.py"
    assert text.count(f"{command}\n") == 1
    (root / "avito-ai.service").write_text(text.replace(command, f'{command} "tests.fake_app:{app}"'))
    rotation = root / "ops/logrotate/avito-ai"
    rotation.parent.mkdir(parents=True)
    rotation.write_text("/var/log/avito-ai/app.log {\n    weekly\n}\n")
    return root


class Place:
    """A host under a prefix, with a service of our own."""

    def __init__(self, root: Path) -> None:
        self.root, self.prefix = root, root / "host"
        with closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        avibe = make_snapshot(root / "avibe")
        avision = make_snapshot(root / "avision", "Qwen2_5_VLForConditionalGeneration")
        (avision / "preprocessor_config.json").write_text("{}")
        self.environ = {
            "PATH": os.environ["PATH"],
            "DEPLOY_PREFIX": str(self.prefix),
            "DEPLOY_SYSTEMCTL": STAND_IN,
            "DEPLOY_JOURNALCTL": f"{STAND_IN} journal",
            "DEPLOY_READY_TIMEOUT_S": "60",
            "AVITO_ALLOW_DEMO": "true",
            "AVITO_DEVICE": "cpu",
            "AVITO_PORT": str(self.port),
            "AVITO_RATE_LIMIT": "",
            "AVITO_DRAIN_S": "0.2",
            "AVIBE_MODEL_PATH": str(avibe),
            "AVIBE_TOKENIZER_PATH": "",
            "AVISION_MODEL_PATH": str(avision),
        }
        self.base = self.prefix / "opt/avito-ai"
        self.settings = self.prefix / "etc/avito-ai/avito-ai.env"

    def project(self, version: str, app: str = "create()") -> Path:
        root = self.root / version
        if not root.exists():
            make_project(root, version, app)
            venv = self.base / "venvs" / deploy_production.venv_name(root, "")
            venv.parent.mkdir(parents=True, exist_ok=True)
            if not venv.is_symlink():
                venv.symlink_to((PROJECT_ROOT / ".venv").resolve())
        return root

    def start(self, project: Path, *arguments: str, **environ: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "tools.deploy_production", *arguments],
            cwd=project,
            env=self.environ | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
        )

    def run(self, project: Path, *arguments: str, **environ: str) -> tuple[int, str]:
        process = self.start(project, *arguments, **environ)
        output, _ = process.communicate(timeout=3 * GENEROUS_S)
        return process.returncode, output

    def deploy(self, project: Path, **environ: str) -> tuple[int, str]:
        return self.run(project, "production", **environ)

    def get(self, path: str) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=GENEROUS_S) as response:
            return dict(json.load(response))

    def version(self) -> str:
        """Of the service that answers, which is ready."""
        assert self.get("/api/health/ready")["status"] == "ready"
        return str(self.get("/api/health")["version"])

    def state(self) -> deploy_production.State:
        return deploy_production.read_state(self.base / "state.json")

    def stop(self) -> None:
        subprocess.run([*STAND_IN.split(), "stop"], env=self.environ, check=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    place = Place(tmp_path_factory.mktemp("production"))
    yield place
    place.stop()


@pytest.fixture
def v2(place: Place) -> Path:
    """Version 2 answers."""
    project = place.project("2.0.0")
    code, output = place.deploy(project)
    assert code == 0, output
    assert place.version() == "2.0.0"
    return project


class Traffic:
    """One client that asks again and again, each time over a new connection."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.has_asked = threading.Semaphore(0)
        self.outcomes: list[tuple[float, float, str]] = []  # begun, ended, what came

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_over.wait(0.01):
            begun = time.monotonic()
            outcome = self._ask()
            self.outcomes.append((begun, time.monotonic(), outcome))
            self.has_asked.release()

    def _ask(self) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=GENEROUS_S)
        try:
            body = json.dumps({"prompt": "abc", "max_tokens": 8})
            connection.request("POST", "/api/v1/text/generate", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            data = json.load(answer)
            return "ok" if data.get("success") else str(data["error"]["code"])
        except OSError as error:
            return type(error).__name__
        finally:
            connection.close()


# Releases.


def test_under_traffic_an_upgrade_refuses_only_between_stop_and_ready(place: Place) -> None:
    code, output = place.deploy(place.project("1.0.0"))
    assert code == 0, output
    assert "driver, CUDA and card are not looked at" in output
    with Traffic(place.port) as traffic:
        for _ in range(5):
            assert traffic.has_asked.acquire(timeout=GENEROUS_S)
        code, output = place.deploy(place.project("2.0.0"))
        assert code == 0, output
        seen = len(traffic.outcomes)
        while len(traffic.outcomes) < seen + 5:
            assert traffic.has_asked.acquire(timeout=GENEROUS_S)
    assert place.version() == "2.0.0"
    what = [outcome for _, _, outcome in traffic.outcomes]
    bad = [index for index, outcome in enumerate(what) if outcome != "ok"]
    # The port is closed, or the new process is still loading; nothing that was accepted was lost.
    assert {what[index] for index in bad} <= {"ConnectionRefusedError", "not_ready"}
    assert bad == list(range(bad[0], bad[-1] + 1)), "there was one window"
    window_s = traffic.outcomes[bad[-1]][1] - traffic.outcomes[bad[0]][0]
    print(f"{len(bad)} of {len(what)} requests fell in the restart window of {window_s:.1f} s")


def test_a_second_run_changes_nothing_and_tries_the_service_out(place: Place, v2: Path) -> None:
    calls = place.prefix / "run/systemctl-stand-in/calls"
    before, state = calls.read_text(), place.state()
    code, output = place.deploy(v2)
    assert code == 0, output
    assert "It runs already" in output and "Streamed: " in output and "Avision: " in output
    assert set(calls.read_text().removeprefix(before).split()) == {"show"}
    assert place.state() == state


BROKEN = {
    "crash": ("absent()", "ended while it was starting"),
    "mute": ("create(is_mute=True)", "answered with an empty text"),
    "slow": ("create(load_s=100000)", "not ready after 3 s"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_release_that_does_not_prove_itself_gives_way_to_the_one_before(place: Place, v2: Path, kind: str) -> None:
    app, reason = BROKEN[kind]
    timeout = {"DEPLOY_READY_TIMEOUT_S": "3"} if kind == "slow" else {}
    code, output = place.deploy(place.project(f"3.0.0-{kind}", app), **timeout)
    assert code == 1
    assert reason in output and "answers again" in output
    assert place.version() == "2.0.0"
    _, listing = place.run(v2, "releases")
    assert any("not taken: " in line and reason in line for line in listing.splitlines())


def test_a_bad_model_path_is_refused_while_the_old_release_answers_undisturbed(place: Place, v2: Path) -> None:
    pid, good = place.state(), place.settings.read_text()
    try:
        place.settings.write_text(good.replace(f"AVIBE_MODEL_PATH={place.root}/avibe", "AVIBE_MODEL_PATH=/nowhere"))
        code, output = place.deploy(place.project("3.0.0"))
    finally:
        place.settings.write_text(good)
    assert code == 1
    assert "Error: AVIBE_MODEL_PATH=/nowhere: there is no such folder" in output
    assert (place.version(), place.state()) == ("2.0.0", pid)


def test_every_wrong_setting_is_told_before_the_old_release_is_stopped(place: Place, v2: Path) -> None:
    state, good = place.state(), place.settings.read_text()
    try:
        place.settings.write_text(good + "AVITO_NO_SUCH=1\nAVITO_LOG_LEVEL=LOUD\n")
        code, output = place.deploy(v2)
    finally:
        place.settings.write_text(good)
    assert code == 1
    assert "Error: AVITO_NO_SUCH: no such setting" in output and "Error: AVITO_LOG_LEVEL=LOUD" in output
    assert (place.version(), place.state()) == ("2.0.0", state)


def test_settings_that_fail_the_trial_are_rolled_back_too_and_the_file_stays_as_it_was(place: Place, v2: Path) -> None:
    """They pass every check before: prompts so short are a setting like others, but the trial's is longer."""
    good = place.settings.read_text()
    bad = good.replace("AVITO_MAX_PROMPT_CHARS=100000", "AVITO_MAX_PROMPT_CHARS=5")
    assert bad != good
    try:
        place.settings.write_text(bad)
        code, output = place.deploy(v2)
        assert code == 1
        assert "prompt" in output and "answers again" in output
        assert (place.version(), place.settings.read_text()) == ("2.0.0", bad)
    finally:
        place.settings.write_text(good)
    code, output = place.deploy(v2)
    assert code == 0, output
    assert not list(place.prefix.glob("etc/systemd/system/avito-ai.service.d/*"))


def test_a_run_that_is_refused_still_mends_what_a_killed_one_left(place: Place, v2: Path) -> None:
    state = place.state()
    cut_off = replace(state, switching_to=state.good)
    deploy_production.write_atomically(place.base / "state.json", json.dumps(asdict(cut_off)).encode())
    good = place.settings.read_text()
    place.stop()
    try:
        place.settings.write_text(good + "AVITO_NO_SUCH=1\n")
        code, output = place.deploy(v2)
    finally:
        place.settings.write_text(good)
    assert code == 1
    assert "AVITO_NO_SUCH: no such setting" in output and "answers again" in output
    assert (place.version(), place.state().switching_to) == ("2.0.0", None)


def test_sigterm_in_the_middle_of_a_switch_goes_back_before_it_ends(
    place: Place, v2: Path, wait_until: Callable[..., None]
) -> None:
    process = place.start(place.project("3.0.0-late", "create(load_s=100000)"), "production")
    wait_until(lambda: place.state().switching_to is not None, "the switch")
    process.terminate()
    output, _ = process.communicate(timeout=3 * GENEROUS_S)
    assert process.returncode == 1
    assert "was not taken: interrupted" in output and "answers again" in output
    assert place.version() == "2.0.0"


def test_rollback_goes_to_the_previous_release_and_back(place: Place, v2: Path) -> None:
    project = place.project("4.0.0")
    assert place.deploy(project)[0] == 0
    for expected in ("2.0.0", "4.0.0"):
        code, output = place.run(project, "rollback")
        assert code == 0, output
        assert place.version() == expected
    assert place.run(project, "rollback", "9.9.9")[1].startswith("Error: there is no release 9.9.9")


def test_killed_at_ten_random_points_the_next_run_ends_in_a_good_state(place: Place, v2: Path) -> None:
    chance = random.Random(6)
    projects = [place.project("5.0.0"), place.project("6.0.0")]
    begun = time.monotonic()
    assert place.deploy(projects[1])[0] == 0
    whole_s = time.monotonic() - begun
    points = []
    for number in range(10):
        project = projects[number % 2]
        process = place.start(project, "production")
        timer = threading.Timer(delay := chance.uniform(0.0, whole_s), process.send_signal, (signal.SIGKILL,))
        timer.start()
        output, _ = process.communicate(timeout=GENEROUS_S)
        timer.cancel()
        points.append((round(delay, 1), output.splitlines()[-1:]))
        code, output = place.deploy(project)
        assert code == 0, (points, output)
        assert place.version() == project.name
        assert place.state().switching_to is None
        assert not [*place.base.glob("*/.building-*"), *place.base.glob("*/.removing-*")]


def test_two_runs_at_once_wait_for_each_other(tmp_path: Path) -> None:
    place = Place(tmp_path)
    project = make_project(tmp_path / "1.0.0", "1.0.0")
    host = deploy_production.Host(deploy_production.Options.read(place.environ), project)
    with host.locked():
        process = place.start(project, "rollback")
        assert process.stdout is not None
        assert process.stdout.readline() == "Another deploy.sh is at work on this host; waiting for it\n"
    output, _ = process.communicate(timeout=GENEROUS_S)
    assert (process.returncode, output) == (1, "Error: there is no previous release to go back to\n")


def test_deploy_sh_passes_its_words_on(tmp_path: Path) -> None:
    place = Place(tmp_path)
    project = make_project(tmp_path / "1.0.0", "1.0.0")
    for arguments, expected in ((["releases"], (0, "No release\n", "")), (["production", "--fast"], (2, "", "--fast"))):
        command = ["bash", str(project / "deploy.sh"), *arguments]
        result = subprocess.run(command, env=place.environ, capture_output=True, text=True, check=False)
        assert (result.returncode, result.stdout) == expected[:2]
        assert expected[2] in result.stderr


def test_a_dry_run_says_every_step_and_changes_nothing(tmp_path: Path) -> None:
    place = Place(tmp_path)
    project = make_project(tmp_path / "1.0.0", "1.0.0")
    code, output = place.run(project, "production", "--dry-run")
    assert code == 0, output
    assert output.count("Would: ") == 7
    assert not [file for file in place.prefix.rglob("*") if "avito-ai" in file.name]


def test_packages_are_installed_whole_or_not_at_all_and_work_where_they_are_moved_to(tmp_path: Path) -> None:
    place = Place(tmp_path)
    project = make_project(tmp_path / "1.0.0", "1.0.0")
    (project / "requirements.txt").write_text("# none\n")
    host = deploy_production.Host(deploy_production.Options.read(place.environ), project)
    half = host.venvs / ".building-abc" / "bin"
    half.mkdir(parents=True)
    (half / "python").write_text("cut off")
    host.make_venv("abc", "")
    assert [entry.name for entry in host.venvs.iterdir()] == ["abc"]
    result = subprocess.run([host.venvs / "abc/bin/pip", "--version"], capture_output=True, text=True, check=True)
    assert str(host.venvs / "abc") in result.stdout


def test_packages_that_cannot_be_installed_are_a_refusal_with_pips_words(tmp_path: Path) -> None:
    host = deploy_production.Host(deploy_production.Options.read(Place(tmp_path).environ), tmp_path)
    failing = "print('No matching distribution'); raise SystemExit(1)"
    with pytest.raises(deploy_production.Refused, match="could not be installed: No matching distribution"):
        host.build([sys.executable, "-c", failing])


def test_a_release_is_named_by_its_content_and_packages_and_holds_no_settings_or_models(tmp_path: Path) -> None:
    project = make_project(tmp_path / "1.0.0", "1.0.0")
    name = deploy_production.release_name(project, "packages")
    assert name.startswith("1.0.0-")
    for stray in (".env", ".venv/x", "run/log", "vibe/demo/config.json", "vision/big/x", "models/__pycache__/x.pyc"):
        (project / stray).parent.mkdir(parents=True, exist_ok=True)
        (project / stray).write_text("x")
    assert deploy_production.release_name(project, "packages") == name
    (project / "vision/demo").mkdir()
    (project / "vision/demo/config.json").write_text("{}")
    with_demo = deploy_production.release_name(project, "packages")
    (project / "deploy.sh").chmod(0o644)
    names = {name, with_demo, deploy_production.release_name(project, "packages")}
    assert len(names | {deploy_production.release_name(project, "others")}) == 4


def test_old_releases_go_but_never_the_good_the_previous_or_the_coming_one(tmp_path: Path) -> None:
    place = Place(tmp_path)
    environ = place.environ | {"DEPLOY_KEEP_RELEASES": "2"}
    host = deploy_production.Host(deploy_production.Options.read(environ), tmp_path)
    for number in range(6):
        release = host.releases / f"r{number}"
        release.mkdir(parents=True)
        (release / ".venv").symlink_to(f"../../venvs/v{number}")
        (host.venvs / f"v{number}").mkdir(parents=True)
        os.utime(release, (number, number))
    host.state = deploy_production.State(good="r1", previous="r0", failed={"r2": "why", "r5": "why"})
    (host.releases / ".building-x").mkdir()
    assert host.superfluous(coming="r4") == ["r3", "r2"]
    host.prune()
    assert host.release_names() == ["r5", "r4", "r1", "r0"]
    assert sorted(entry.name for entry in host.venvs.iterdir()) == ["v0", "v1", "v4", "v5"]
    assert host.state.failed == {"r5": "why"}
    assert not list(host.releases.glob(".*"))


def test_the_first_settings_file_is_the_example_for_production_with_a_token_and_stays_private(tmp_path: Path) -> None:
    place = Place(tmp_path)
    options = deploy_production.Options.read(place.environ | {"AVITO_PORT": "8086"})
    host = deploy_production.Host(options, PROJECT_ROOT)
    host.write_first_settings()
    assert place.settings.stat().st_mode & 0o777 == 0o640
    text = place.settings.read_text()
    host.write_first_settings()
    assert place.settings.read_text() == text
    settings = load_settings(preflight.read_environment_file(text), env_file=None)
    assert (settings.env, settings.port, settings.drain_s) == ("production", 8086, 0.2)
    assert settings.log_file == str(place.prefix / "var/log/avito-ai/app.log")
    assert len(settings.ops_token.get_secret_value()) > 30


def test_numbers_that_are_none_are_refused_together() -> None:
    with pytest.raises(deploy_production.Refused) as caught:
        deploy_production.Options.read({"DEPLOY_READY_TIMEOUT_S": "soon", "DEPLOY_KEEP_RELEASES": "-1"})
    assert len(caught.value.problems) == 2


def test_a_first_release_that_does_not_prove_itself_leaves_nothing_running_and_the_next_is_taken(
    tmp_path: Path,
) -> None:
    place = Place(tmp_path)
    try:
        code, output = place.deploy(place.project("1.0.0", "absent()"))
        assert code == 1
        assert "There is none to go back to, so the service is stopped" in output
        assert (place.state().good, place.state().switching_to) == (None, None)
        assert not (place.base / "current").is_symlink()
        code, output = place.deploy(place.project("1.0.1"))
        assert code == 0, output
        assert place.version() == "1.0.1"
    finally:
        place.stop()


def test_uninstall_asks_keeps_settings_and_logs_and_purge_takes_them_too(tmp_path: Path) -> None:
    place = Place(tmp_path)
    project = place.project("1.0.0")
    code, output = place.deploy(project)
    assert code == 0, output
    try:
        code, output = place.run(project, "uninstall")
        assert (code, place.version()) == (1, "1.0.0")
        assert "nothing was removed" in output
        code, output = place.run(project, "uninstall", "--yes")
        assert code == 0, output
        assert not preflight.is_port_taken("127.0.0.1", place.port)
        left = {file.relative_to(place.prefix).as_posix() for file in place.prefix.rglob("*") if file.is_file()}
        left = {name for name in left if not name.startswith("run/")}
        proved = {name for name in left if name.startswith("etc/avito-ai/proved/1.0.0-")}
        assert left - proved == {"etc/avito-ai/avito-ai.env", "var/log/avito-ai/app.log"}
        code, output = place.run(project, "uninstall", "--yes", "--purge")
        assert code == 0, output
        assert not [file for file in place.prefix.rglob("*") if "avito-ai" in file.name]
    finally:
        place.stop()
