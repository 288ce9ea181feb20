"""avito-ai.service: its times against ours, its folders, and what systemd's own tools say of it."""

from __future__ import annotations

import base64
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from config import PROJECT_ROOT, Limits, Settings, load_settings, setting_names
from models.schemas import MODEL_NAMES
from notify import REPLACE_S, STOP_MARGIN_S, silence_s
from tests.test_server import GENEROUS_S, Server

UNIT = PROJECT_ROOT / "avito-ai.service"
HARDENING = PROJECT_ROOT / "ops/systemd/hardening.conf"
RELAXED = PROJECT_ROOT / "ops/systemd/relaxed.conf"
MAX_EXPOSURE = 2.5
ALLOW, REFUSE_WITH_EPERM = 0x7FFF0000, 0x00050001

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
needs_seccomp = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None or not Path("/proc/sys/kernel/seccomp").is_dir(),
    reason="systemd-analyze or seccomp is missing",
)


def values(name: str, text: str | None = None) -> list[str]:
    """All values of a directive, in their order."""
    found = re.findall(rf"^{name}=(.*)$", UNIT.read_text() if text is None else text, re.MULTILINE)
    assert found, f"there is no {name}="
    return found


def value(name: str) -> str:
    (only,) = values(name)
    return only


def seconds(name: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(s|min)?", value(name)).groups()  # type: ignore[union-attr]
    return float(number) * (60 if unit == "min" else 1)


def environment() -> dict[str, str]:
    return dict(assignment.split("=", 1) for assignment in values("Environment"))


# Times.


def test_systemd_stops_after_the_grace_time_and_after_gunicorn() -> None:
    code = "import gunicorn_config as g; print(g.graceful_timeout)"
    environ = {name: text for name, text in os.environ.items() if not name.startswith("AV")}
    environ |= {"AVIBE_MODEL_PATH": "", "AVISION_MODEL_PATH": "vision/demo", "AVITO_ENV": "development"}
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT_ROOT, env=environ, capture_output=True, check=True)
    grace_s = Settings.model_validate({}).grace_s
    assert int(done.stdout) == grace_s
    assert seconds("TimeoutStopSec") >= grace_s + STOP_MARGIN_S
    assert value("KillMode") == "mixed"


def test_watchdog_of_systemd_is_slower_than_our_own_and_a_new_worker() -> None:
    assert seconds("WatchdogSec") >= silence_s(Limits()) > Limits().stall_limit_s + REPLACE_S / 2


def test_start_has_time_for_the_first_word() -> None:
    assert seconds("TimeoutStartSec") >= REPLACE_S


def test_as_many_starts_as_are_allowed_fit_into_the_interval_that_counts_them() -> None:
    """Or a service that never gets ready would be started for ever."""
    limits = Limits()
    loading_s = limits.load_timeout_s * len(MODEL_NAMES)
    giving_up_s = max(seconds("TimeoutStartSec"), silence_s(limits)) + seconds("TimeoutStopSec")
    start_s = loading_s + giving_up_s + seconds("RestartSec")
    assert int(value("StartLimitBurst")) * start_s <= seconds("StartLimitIntervalSec")
    assert value("Restart") == "on-failure"


# Settings and folders.


def test_settings_of_the_unit_are_sound_and_the_file_wins() -> None:
    ours = {name: text for name, text in environment().items() if name.startswith("AV")}
    assert ours.keys() <= setting_names().keys()
    settings = load_settings({**ours, "AVITO_ENV": "development"}, env_file=None)
    assert settings.env == "development"
    assert ours["AVITO_ENV"] == "production"
    assert environment()["CUDA_VISIBLE_DEVICES"] == "1"
    assert value("EnvironmentFile") == "/etc/avito-ai/avito-ai.env", "without a '-': it must be there"


def test_everything_it_writes_is_in_its_own_folders() -> None:
    for kind in ("State", "Cache", "Logs", "Runtime"):
        assert value(f"{kind}Directory") == "avito-ai"
    written = [environment()[name] for name in ("AVITO_COMPILE_CACHE", "XDG_CACHE_HOME", "CUDA_CACHE_PATH")]
    assert all(f"{path}/".startswith("/var/cache/avito-ai/") for path in written)
    assert environment()["AVITO_LOG_FILE"].startswith("/var/log/avito-ai/")


def test_it_runs_what_deploy_runs() -> None:
    command = "-m gunicorn -c gunicorn_config.py"
    assert value("ExecStart") == f"{value('WorkingDirectory')}/.venv/bin/python {command}"
    assert f'"$PYTHON" {command}' in (PROJECT_ROOT / "deploy.sh").read_text()


# What systemd says.


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A host with systemd's own units and a release."""
    shutil.copytree("/lib/systemd/system", tmp_path / "lib/systemd/system", symlinks=True)
    python = tmp_path / "opt/avito-ai/current/.venv/bin/python"
    python.parent.mkdir(parents=True)
    python.touch(0o755)
    units = tmp_path / "etc/systemd/system"
    units.mkdir(parents=True)
    shutil.copy(UNIT, units)
    return tmp_path


def verify(root: Path) -> subprocess.CompletedProcess[str]:
    command = ["systemd-analyze", "verify", "--man=no", f"--root={root}", UNIT.name]
    return subprocess.run(command, capture_output=True, text=True, timeout=GENEROUS_S)


@needs_systemd
@pytest.mark.parametrize("drop_in", [None, HARDENING, RELAXED], ids=["alone", "hardened", "relaxed"])
def test_systemd_finds_nothing_wrong(root: Path, drop_in: Path | None) -> None:
    if drop_in is not None:
        folder = root / f"etc/systemd/system/{UNIT.name}.d"
        folder.mkdir()
        (folder / drop_in.name).write_text(switched_on(drop_in.read_text()))
    done = verify(root)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_systemd
def test_that_check_would_find_a_mistake(root: Path) -> None:
    unit = root / "etc/systemd/system" / UNIT.name
    unit.write_text(UNIT.read_text().replace("NoNewPrivileges=", "NoPrivileges="))
    assert "NoPrivileges" in verify(root).stderr


def switched_on(drop_in: str) -> str:
    """Directives that are commented out; a sentence does not look like one."""
    return re.sub(r"^#(?=[A-Z]\w+=)", "", drop_in, flags=re.MULTILINE)


def exposures(folder: Path, more: str = "", *options: str) -> dict[str, float]:
    """What `systemd-analyze security` counts, by its name; nothing that is well."""
    unit = folder / UNIT.name
    unit.write_text(UNIT.read_text().replace("[Install]", f"{more}\n[Install]"))
    command = ["systemd-analyze", "security", "--offline=true", *options, str(unit)]
    done = subprocess.run([*command, "--json=short"], capture_output=True, text=True, timeout=GENEROUS_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return {each["name"]: float(each["exposure"]) for each in json.loads(done.stdout) if each["exposure"]}


@needs_systemd
def test_exposure_is_low_and_every_point_left_is_explained(tmp_path: Path) -> None:
    counted = exposures(tmp_path, "", f"--threshold={MAX_EXPOSURE * 10:.0f}")
    explained = set(re.findall(r"^#   (\S+=\S*)  +\S", UNIT.read_text(), re.MULTILINE))
    assert counted.keys() == explained


@needs_systemd
def test_threshold_of_that_check_is_one(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        exposures(tmp_path, "", "--threshold=10")


@needs_systemd
def test_directives_not_tried_with_cuda_are_off_and_gain_what_they_say(tmp_path: Path) -> None:
    text = HARDENING.read_text()
    assert not re.findall(r"^[A-Z]", text, re.MULTILINE), "nothing in it is on"
    paragraphs = re.findall(r"^# Gain (\d\.\d)\. (?:.*\n)*?((?:#\w+=.*\n)+)", text, re.MULTILINE)
    assert len(paragraphs) == text.count("# Gain ") == 5
    before = exposures(tmp_path)
    for gain, directives in paragraphs:
        after = exposures(tmp_path, switched_on(directives))
        changed = {name for name in before if before[name] != after.get(name)}
        (name,) = changed
        assert directives.startswith("#" + name.removesuffix("~@resources")), "the one that it is about"
        assert before[name] - after.get(name, 0.0) == pytest.approx(float(gain))


# Its filter of system calls, for real. CUDA's calls no test can tell.


def allowed_calls() -> set[str]:
    """Names, from systemd's own sets; it allows execve besides, or nothing could be started."""

    def expand(name: str) -> set[str]:
        command = ["systemd-analyze", "syscall-filter", name]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[1:]
        names = {line.strip() for line in lines if line.strip() and not line.strip().startswith("#")}
        return set().union(*(expand(each) if each.startswith("@") else {each} for each in names))

    calls = expand("@default") | {"execve"}
    for entry in values("SystemCallFilter"):
        if entry.startswith("~"):
            calls -= expand(entry.removeprefix("~"))
        else:
            calls |= expand(entry)
    return calls


@pytest.fixture
def under_filter() -> Callable[[], None]:
    """To be called in a process about to be executed."""
    library = ctypes.CDLL("libseccomp.so.2")
    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(REFUSE_WITH_EPERM)))
    for name in sorted(allowed_calls()):
        number = library.seccomp_syscall_resolve_name(name.encode())
        library.seccomp_rule_add(context, ctypes.c_uint32(ALLOW), number, 0)

    def load() -> None:
        if library.seccomp_load(context):
            os._exit(99)

    return load


@pytest.fixture
def filtered_server(tmp_path: Path, under_filter: Callable[[], None]) -> Iterator[Server]:
    settings = {"AVIBE_MODEL_PATH": "", "AVISION_MODEL_PATH": "vision/demo", "AVITO_DEVICE": "cpu"}
    server = Server(tmp_path, "", settings, under_filter)
    yield server
    server.process.kill()
    server.process.wait(GENEROUS_S)


@needs_seccomp
def test_service_serves_under_the_units_filter_of_system_calls(filtered_server: Server) -> None:
    status = Path(f"/proc/{filtered_server.process.pid}/status")
    filtered_server.wait(lambda: "\nSeccomp:\t2\n" in status.read_text(), "the filter")
    filtered_server.wait_ready()
    assert filtered_server.get("/api/metrics")[1]["system"]["memory_total_bytes"] > 0
    picture = base64.b64encode((PROJECT_ROOT / "static/samples/shapes.png").read_bytes()).decode()
    body = json.dumps({"prompt": "Describe the picture.", "image": picture}).encode()
    url = f"http://127.0.0.1:{filtered_server.port}/api/v1/image/analyze"
    with urlopen(Request(url, body, {"Content-Type": "application/json"}), timeout=GENEROUS_S) as answer:
        assert json.load(answer)["data"]["generated_tokens"] > 0
    filtered_server.process.terminate()
    assert filtered_server.process.wait(GENEROUS_S) == 0
