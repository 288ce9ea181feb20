"""`./deploy.sh production` and its family: releases side by side on a host, one of them current, and back again.

A release is a folder that never changes, named by version and content; `current` is a link to one, swapped in one
step. All state is on disk and each step may be repeated, so a run that was killed is mended by the next one. Nothing
touches the running service before the new release and the host have been looked at; from then on whatever fails
brings back the release that was proved last, with the settings that it was proved with.

Standard library only: it runs before anything is installed. Paths lie under DEPLOY_PREFIX, which tests set.

    python3 -m tools.deploy_production production | rollback | releases | uninstall
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import grp
import hashlib
import json
import os
import platform
import pwd
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from tools import preflight

PROJECT_ROOT = Path(__file__).resolve().parent.parent
NAME = "avito-ai"  # of the unit, the user and the folders
LOGROTATE_SOURCE = "ops/logrotate/avito-ai"
# What a copy of the project holds besides the project.
NOT_COPIED = {".git", ".venv", ".env", "run", "__pycache__", ".hypothesis", ".schemathesis", "node_modules", "htmlcov"}
MODEL_FOLDERS = {"vibe": set[str](), "vision": {"demo"}}  # and what of them comes with the project
START_LIMIT_S = 60.0  # from `systemctl start` to a process, and from ready to systemd's having heard of it
DRAIN_MARGIN_S = 30.0
POLL_S = 0.1
UNPACKING = "unpacking (minutes, on a slow disk)"

# What the first settings file has instead of the values in .env.example.
FIRST_SETTINGS = {
    "AVITO_ENV": "production",
    "AVIBE_MODEL_PATH": "/mnt/data/avito/vibe/models",
    "AVIBE_TOKENIZER_PATH": "/mnt/data/avito/vibe/tokenizers",
    "AVISION_MODEL_PATH": "/mnt/data/avito/vision/models",
    "AVITO_DRAIN_S": "5",
}
FIRST_SETTINGS_HEADER = """\
# Settings of the production service. systemd reads this file, so a value takes the whole rest of its line.
# `./deploy.sh production` checks what was changed here and takes it over. It never writes to this file.
"""

# The empty assignment takes away what the unit itself names.
SETTINGS_DROP_IN = """\
# Written by a roll-back; the next ./deploy.sh production removes it.
[Service]
EnvironmentFile=
EnvironmentFile={file}
"""


class Refused(Exception):
    """The host or the release is not fit, and the running service was not touched. `problems`: a sentence each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = list(problems)


class Failed(Exception):
    """A release did not prove itself; one sentence."""


class Interrupted(Exception):
    """SIGINT or SIGTERM came."""


def say(line: str) -> None:
    with contextlib.suppress(OSError):  # a terminal that is gone must not stop a roll-back
        print(line, flush=True)


# What is remembered.


@dataclass(frozen=True)
class State:
    """What outlives a run, in `state.json`.

    :param good: the release that was proved last. :param previous: the one before it, for `rollback`.
    :param good_mark: hash of the unit and settings that `good` was proved with.
    :param switching_to: a release that is being made current; left behind by a run that was killed meanwhile.
    :param failed: why releases were not taken.
    """

    good: str | None = None
    previous: str | None = None
    good_mark: str = ""
    switching_to: str | None = None
    failed: dict[str, str] = field(default_factory=dict)


def read_state(file: Path) -> State:
    """Fields that this version does not know, which a later one wrote, are left out."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return State()
    return State(**{known.name: values[known.name] for known in fields(State) if known.name in values})


def write_atomically(file: Path, data: bytes, mode: int = 0o644) -> None:
    """The old content or the new one, also after a power cut."""
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f".{file.name}.new")
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as opened:
        os.fchmod(descriptor, mode)
        opened.write(data)
        opened.flush()
        os.fsync(descriptor)
    fresh.replace(file)


def point_link(link: Path, target: str) -> None:
    """Make `link` lead to `target` in one step."""
    fresh = link.with_name(f".{link.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.replace(link)


# What a release is made of.


def source_files(root: Path) -> list[Path]:
    """The project's files, relative and sorted; without settings, models and what was made there."""
    found = []
    for folder, folders, files in os.walk(root):
        here = Path(folder).relative_to(root)
        kept = MODEL_FOLDERS.get(here.as_posix())
        folders[:] = [
            name
            for name in folders
            if name not in NOT_COPIED and not name.endswith("_cache") and (kept is None or name in kept)
        ]
        found += [here / name for name in files if name not in NOT_COPIED]
    return sorted(found)


def release_name(root: Path, venv: str) -> str:
    """VERSION-HASH: the same content with the same packages is the same release, whatever its commit."""
    version = re.search(r'^VERSION = "([^"]+)"', (root / "config.py").read_text(encoding="utf-8"), re.MULTILINE)
    digest = hashlib.sha256(venv.encode())
    for file in source_files(root):
        is_program = os.access(root / file, os.X_OK)
        content = hashlib.sha256((root / file).read_bytes()).hexdigest()
        digest.update(f"{file}\0{is_program}\0{content}\n".encode())
    return f"{version[1] if version else 'unknown'}-{digest.hexdigest()[:12]}"


def venv_name(root: Path, index_url: str) -> str:
    """The same Python, requirements and index of torch make the same packages, so releases share them."""
    what = [sys.base_prefix, platform.python_version(), platform.machine(), index_url]
    what.append((root / "requirements.txt").read_text(encoding="utf-8"))
    return hashlib.sha256("\0".join(what).encode()).hexdigest()[:16]  # hashed, for the URL may hold a password


def first_settings(example: str, values: Mapping[str, str]) -> str:
    """The settings file of a new host: .env.example with other values and another header."""
    _, _, body = example.partition("\n\n")

    def line(match: re.Match[str]) -> str:
        return f"{match[1]}={values.get(match[1], match[2])}"

    return FIRST_SETTINGS_HEADER + "\n" + re.sub(r"^([A-Z_]+)=(.*)$", line, body, flags=re.MULTILINE)


# The host.


@dataclass(frozen=True)
class Options:
    """What the environment of the run says about it."""

    prefix: Path
    systemctl: tuple[str, ...]
    journalctl: tuple[str, ...]
    ready_timeout_s: float
    keep_releases: int
    api_key: str
    settings: Mapping[str, str]  # AVITO_ and so on: values for a settings file that is made in this run
    uid: int

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Options:
        """:raise Refused: a value is no number."""
        numbers = {"DEPLOY_READY_TIMEOUT_S": "900", "DEPLOY_KEEP_RELEASES": "5"}
        values = {name: environ.get(name) or default for name, default in numbers.items()}
        wrong = [f"{name}={value}: must be a whole number" for name, value in values.items() if not value.isdecimal()]
        if wrong:
            raise Refused(wrong)
        return cls(
            prefix=Path(environ.get("DEPLOY_PREFIX") or "/").absolute(),
            systemctl=tuple(shlex.split(environ.get("DEPLOY_SYSTEMCTL") or "systemctl")),
            journalctl=tuple(shlex.split(environ.get("DEPLOY_JOURNALCTL") or "journalctl")),
            ready_timeout_s=float(values["DEPLOY_READY_TIMEOUT_S"]),
            keep_releases=int(values["DEPLOY_KEEP_RELEASES"]),
            api_key=environ.get("DEPLOY_API_KEY", ""),
            settings={k: v for k, v in environ.items() if k.startswith(preflight.PREFIXES)},
            uid=os.geteuid(),
        )

    @property
    def is_whole_host(self) -> bool:
        """Not under a prefix: users and owners are ours to set, and root is needed."""
        return self.prefix == Path("/")


class Host:
    """Paths, and small steps that each may be repeated. One run at a time, see `locked`."""

    def __init__(self, options: Options, source: Path = PROJECT_ROOT) -> None:
        self.options = options
        self.source = source
        self.base = self.at("/opt/avito-ai")
        self.releases = self.base / "releases"
        self.venvs = self.base / "venvs"
        self.current = self.base / "current"
        self.state_file = self.base / "state.json"
        self.settings_file = self.at("/etc/avito-ai/avito-ai.env")
        self.proved_settings = self.at("/etc/avito-ai/proved")
        self.unit_file = self.at(f"/etc/systemd/system/{NAME}.service")
        # Stands only while a release runs with settings that are not those of the settings file.
        self.settings_drop_in = self.unit_file.with_name(f"{NAME}.service.d") / "50-settings-of-release.conf"
        self.logrotate_file = self.at(f"/etc/logrotate.d/{NAME}")
        self.service_folders = {self.at(f"/var/{kind}/{NAME}"): 0o750 for kind in ("log", "lib", "cache")}
        self._lock: int | None = None

    def at(self, path: str) -> Path:
        return self.options.prefix / path.lstrip("/")

    def placed(self, text: str) -> str:
        """A unit or a log rotation with its paths under the prefix."""
        if self.options.is_whole_host:
            return text
        return re.sub(rf"/(?:opt|etc|var/(?:log|lib|cache))/{NAME}\b", lambda m: str(self.at(m[0])), text)

    # State.

    @property
    def state(self) -> State:
        return read_state(self.state_file)

    @state.setter
    def state(self, state: State) -> None:
        write_atomically(self.state_file, json.dumps(asdict(state), indent=2).encode())

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One run at a time. What builds in the background of a killed run holds the lock too, until it has ended."""
        self.base.mkdir(parents=True, exist_ok=True)
        with (self.base / ".lock").open("w") as opened:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("Another deploy.sh is at work on this host; waiting for it")
                fcntl.flock(opened, fcntl.LOCK_EX)
            self._lock = opened.fileno()
            yield
            self._lock = None

    def release_names(self) -> list[str]:
        """Complete releases, the newest first."""
        folders = [entry for entry in self.releases.glob("[!.]*") if entry.is_dir()] if self.releases.is_dir() else []
        return [entry.name for entry in sorted(folders, key=lambda entry: entry.stat().st_mtime, reverse=True)]

    def current_name(self) -> str | None:
        return self.current.readlink().name if self.current.is_symlink() else None

    # Settings and files.

    def settings_text(self, release: str | None = None) -> str:
        """Of the settings file; with `release`: those that it was proved with, if it was."""
        file = self.proved_settings / f"{release}.env"
        if release is None or not file.is_file():
            file = self.settings_file
        return file.read_text(encoding="utf-8") if file.is_file() else ""

    def first_settings_text(self) -> str:
        values = FIRST_SETTINGS | {
            "AVITO_LOG_FILE": str(self.at(f"/var/log/{NAME}/app.log")),
            "AVITO_COMPILE_CACHE": str(self.at(f"/var/cache/{NAME}/compile")),
            "AVITO_OPS_TOKEN": secrets.token_urlsafe(32),  # a drain needs one
        }
        example = (self.source / ".env.example").read_text(encoding="utf-8")
        return first_settings(example, values | dict(self.options.settings))

    def write_first_settings(self) -> None:
        if not self.settings_file.exists():
            write_atomically(self.settings_file, self.first_settings_text().encode(), 0o640)
            say(f"Wrote {self.settings_file}; look through it")

    def settings_in_force(self) -> str:
        """What the running service was started with, as far as that is known."""
        name = self.current_name()
        return self.settings_text(name if name == self.state.good else None)

    def unit_text(self, release: Path) -> str:
        return self.placed((release / f"{NAME}.service").read_text(encoding="utf-8"))

    def mark(self, release: Path, settings: str) -> str:
        return hashlib.sha256(f"{self.unit_text(release)}\0{settings}".encode()).hexdigest()

    def service_environment(self, release: Path, settings: str) -> dict[str, str]:
        """What systemd would give the service, and nothing of ours but the path."""
        environment = {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}
        environment |= preflight.read_unit_environment(self.unit_text(release))
        return environment | preflight.read_environment_file(settings)

    # The service.

    def systemctl(self, *arguments: str) -> str:
        """:raise Failed: it did not succeed."""
        result = subprocess.run([*self.options.systemctl, *arguments], capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise Failed(f"systemctl {' '.join(arguments)} failed: {result.stderr.strip() or result.stdout.strip()}")
        return result.stdout

    def show_unit(self) -> dict[str, str]:
        properties = "ActiveState,SubState,MainPID,NRestarts"
        try:
            lines = self.systemctl("show", NAME, f"--property={properties}").splitlines()
        except (Failed, OSError):
            return {}
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def main_pid(self) -> int:
        """0: the service does not run."""
        return int(self.show_unit().get("MainPID") or 0)

    def client(self, release: Path, settings: str, *arguments: str, timeout_s: float | None = None) -> None:
        """A command of the release's own tools/service_client.py.

        :raise Failed: with what it said.
        """
        command = [str(release / ".venv/bin/python"), "-m", "tools.service_client", *arguments]
        environment = self.service_environment(release, settings) | {"DEPLOY_API_KEY": self.options.api_key}
        try:
            result = subprocess.run(
                command, cwd=release, env=environment, stderr=subprocess.PIPE, text=True, timeout=timeout_s, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Failed(f"service_client {arguments[0]} did not work: {error}") from error
        if result.returncode != 0:
            lines = result.stderr.strip().splitlines() or [f"service_client {arguments[0]} failed without a word"]
            raise Failed(lines[-1].removeprefix("Error: "))

    def stop_service(self) -> None:
        """Drain, then stop; accepted requests are answered."""
        if self.main_pid():
            try:
                release = self.current.resolve(strict=True)
                settings = self.settings_in_force()
                drain_s = float(preflight.read_environment_file(settings).get("AVITO_DRAIN_S") or 0)
                self.client(release, settings, "drain", timeout_s=drain_s + DRAIN_MARGIN_S)
            except (Failed, OSError, ValueError) as error:
                say(f"Stopping without a drain: {error}")
        if self.unit_file.exists():
            self.systemctl("stop", NAME)

    def start_service(self, release: Path, settings: str) -> None:
        """Start what `current` names, wait until it is ready, try it out.

        :raise Failed: it did not prove itself.
        """
        with contextlib.suppress(Failed):  # it complains where there is nothing to reset
            self.systemctl("reset-failed", NAME)
        self.systemctl("start", "--no-block", NAME)
        pid = self._wait_for(lambda unit: int(unit.get("MainPID") or 0), "has no process")
        self.client(release, settings, "wait", "--pid", str(pid), "--timeout-s", f"{self.options.ready_timeout_s:g}")
        self.client(release, settings, "try")
        self._wait_for(lambda unit: unit.get("ActiveState") == "active", "answers, but systemd was not told so")
        if self.main_pid() != pid:
            raise Failed("the service ended and was started again while it was tried out")

    def _wait_for(self, condition: Callable[[dict[str, str]], int], otherwise: str) -> int:
        """:raise Failed: the unit gave up, was restarted, or the time is over."""
        deadline = time.monotonic() + START_LIMIT_S
        while True:
            unit = self.show_unit()
            if (
                unit.get("ActiveState") == "failed"
                or int(unit.get("NRestarts") or 0)
                or "auto" in unit.get("SubState", "")
            ):
                raise Failed("the service ended while it was starting")
            if found := condition(unit):
                return found
            if time.monotonic() > deadline:
                raise Failed(f"the service {otherwise} after {START_LIMIT_S:g} s")
            time.sleep(POLL_S)

    def log_tail(self) -> list[str]:
        command = [*self.options.journalctl, "-u", NAME, "-n", "30", "-o", "cat", "--no-pager"]
        return preflight.run_quietly(command).splitlines()

    def install_unit(self, release: Path, settings: str) -> None:
        write_atomically(self.unit_file, self.unit_text(release).encode())
        if settings == self.settings_text():
            self.settings_drop_in.unlink(missing_ok=True)
        else:
            file = self.proved_settings / f"{release.name}.env"
            write_atomically(self.settings_drop_in, SETTINGS_DROP_IN.format(file=file).encode())
            say(f"It runs with the settings that it was proved with, {file}; {self.settings_file} is as you left it")
        if (release / LOGROTATE_SOURCE).is_file():
            rotation = (release / LOGROTATE_SOURCE).read_text(encoding="utf-8")
            write_atomically(self.logrotate_file, self.placed(rotation).encode())
        self.systemctl("daemon-reload")
        self.systemctl("enable", NAME)

    # Switching.

    def switch(self, name: str, settings: str) -> None:
        """Make a release current and prove it.

        :param settings: those of the settings file, or those that this release was proved with.
        :raise Failed: it did not prove itself; it is current all the same.
        """
        release = self.releases / name
        self.state = replace(self.state, switching_to=name)
        begun = time.monotonic()
        # Stopped first: a process looks for its modules through `current`, also when it is already stopping.
        self.stop_service()
        stopped = time.monotonic()
        point_link(self.current, f"releases/{name}")
        self.install_unit(release, settings)
        self.start_service(release, settings)
        say(f"Drained and stopped in {stopped - begun:.1f} s, proved {time.monotonic() - stopped:.1f} s later")
        os.utime(release)
        self.own(self.proved_settings, 0o750)
        write_atomically(self.proved_settings / f"{name}.env", settings.encode(), 0o640)
        self.own(self.proved_settings / f"{name}.env", 0o640)
        state = self.state
        self.state = State(
            good=name,
            previous=state.previous if state.good == name else state.good,
            good_mark=self.mark(release, settings),
            failed={other: why for other, why in state.failed.items() if other != name},
        )

    def switch_or_fall_back(self, name: str, settings: str) -> None:
        """:raise Failed: it was not taken; the message says why, and what answers now."""
        try:
            self.switch(name, settings)
        except (Failed, Interrupted, OSError) as error:
            self.fall_back(name, str(error) or "interrupted")

    def fall_back(self, name: str, reason: str) -> NoReturn:
        """Back to the release that was proved last.

        :raise Failed: always, with the reason and what answers now.
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        say(f"Release {name} did not prove itself: {reason}")
        for line in self.log_tail():
            say(f"  {line}")
        state = self.state
        if name != state.good:  # else it was the settings
            self.state = state = replace(state, failed=state.failed | {name: reason})
        begun = time.monotonic()
        if state.good is None or not (self.releases / state.good).is_dir():
            self.stop_service()
            self.current.unlink(missing_ok=True)
            self.state = replace(state, good=None, switching_to=None)
            raise Failed(
                f"Release {name} was not taken: {reason}. There is none to go back to, so the service is stopped"
            )
        say(f"Going back to release {state.good}")
        try:
            self.switch(state.good, self.settings_text(state.good))
        except (Failed, OSError) as error:
            raise Failed(
                f"Release {name} was not taken: {reason}. Going back to {state.good} failed as well: {error}. "
                f"Look at journalctl -u {NAME}, then run this again"
            ) from None
        self.state = replace(self.state, failed=state.failed)
        raise Failed(
            f"Release {name} was not taken: {reason}. Release {state.good} answers again, "
            f"{time.monotonic() - begun:.1f} s later"
        )

    # Making things.

    def own(self, path: Path, mode: int, *, by_service: bool = False) -> None:
        """Root's, readable by the service; or the service's own. A folder is made if it is not there."""
        if not path.exists():
            path.mkdir(parents=True)
        path.chmod(mode)
        if self.options.is_whole_host:
            shutil.chown(path, NAME if by_service else "root", NAME)

    def has_user(self) -> bool:
        with contextlib.suppress(KeyError):
            return bool(pwd.getpwnam(NAME) and grp.getgrnam(NAME))
        return not self.options.is_whole_host  # users know no prefix

    def make_user(self) -> None:
        """:raise Refused: useradd did not."""
        command = ["useradd", "--system", "--user-group", "--no-create-home", "--home-dir", f"/var/lib/{NAME}"]
        command += ["--shell", "/usr/sbin/nologin", NAME]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise Refused([f"the user {NAME} could not be made: {result.stderr.strip()}"])

    def make_folders(self) -> None:
        for folder, mode in self.service_folders.items():
            self.own(folder, mode, by_service=True)
        self.own(self.settings_file.parent, 0o750)
        self.own(self.settings_file, 0o640)

    def build(self, command: Sequence[str | Path], line_of_interest: str = "$^") -> None:
        """Run it, saying those of its lines that match.

        :raise Refused: it failed; its last lines are the problem.
        """
        environment = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
        last: list[str] = []
        with subprocess.Popen(
            [str(part) for part in command],
            cwd=self.source,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            pass_fds=[] if self._lock is None else [self._lock],
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                last = [*last[-9:], line.rstrip()]
                if re.search(line_of_interest, line):
                    say(f"  {UNPACKING if line.startswith('Installing collected') else line.strip()}")
        if process.returncode != 0:
            raise Refused([f"the packages could not be installed: {' / '.join(last)}"])

    def make_venv(self, name: str, index_url: str) -> None:
        """Install the pinned packages beside the releases, whole or not at all."""
        target, unfinished = self.venvs / name, self.venvs / f".building-{name}"
        if target.exists():
            return
        remove_tree(unfinished)
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        self.build([sys.executable, "-m", "venv", unfinished])
        python, shown = str(unfinished / "bin/python"), r"^ *Downloading .*[MG]B\)|^Installing collected"
        pip = [python, "-m", "pip", "install"]
        if index_url:
            say("torch comes from AVITO_TORCH_INDEX_URL")
            requirements = (self.source / "requirements.txt").read_text(encoding="utf-8")
            pins = re.findall(r"^torch==\S+", requirements, re.MULTILINE)
            # Without its dependencies: they are pinned, and such an index rarely has those versions.
            self.build([*pip, "--index-url", index_url, "--no-deps", *pins], shown)
        self.build([python, "tools/download_size.py", "-r", "requirements.txt"], "")
        self.build([*pip, "-r", "requirements.txt"], shown)
        move_venv(unfinished, target)

    def make_release(self, name: str, venv: str) -> None:
        """Copy the project, whole or not at all."""
        target, unfinished = self.releases / name, self.releases / f".building-{name}"
        if target.is_dir():
            return
        remove_tree(unfinished)
        for file in source_files(self.source):
            copy = unfinished / file
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.source / file, copy)
            copy.chmod(0o755 if os.access(self.source / file, os.X_OK) else 0o644)
        point_link(unfinished / ".venv", f"../../venvs/{venv}")
        commit = preflight.run_quietly(
            ["git", "-c", f"safe.directory={self.source}", "-C", str(self.source), "rev-parse", "--short", "HEAD"]
        )
        write_atomically(unfinished / "release.json", json.dumps({"commit": commit.strip()}).encode())
        # The service cannot write here, so what it imports is compiled now.
        self.build([unfinished / ".venv/bin/python", "-m", "compileall", "-q", "-j", "0", unfinished])
        for folder, _, _ in os.walk(unfinished):
            Path(folder).chmod(0o755)
        os.sync()
        unfinished.rename(target)

    def check_release(self, name: str) -> None:
        """What only the release's packages can say: configuration, models, CUDA.

        :raise Refused: with every problem.
        """
        release, settings = self.releases / name, self.settings_text()
        environment = self.service_environment(release, settings)
        result = subprocess.run(
            [str(release / ".venv/bin/python"), "-m", "tools.release_check"],
            cwd=release,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            user=NAME if self.options.is_whole_host else None,
            group=NAME if self.options.is_whole_host else None,
            extra_groups=[] if self.options.is_whole_host else None,
        )
        if result.returncode != 0:
            raise Refused([f"the release cannot even look at its settings: {result.stderr.strip()[-600:]}"])
        report: dict[str, Any] = json.loads(result.stdout)
        problems: list[str] = report["problems"]
        torch = report["torch"]
        if preflight.is_cpu(environment):
            say("  AVITO_DEVICE=cpu: driver and CUDA are not looked at")
        elif torch and isinstance(gpu := preflight.pick_gpu(preflight.read_gpus() or [], environment), preflight.Gpu):
            problems += preflight.check_torch(
                torch["version"], torch["cuda"], torch["sees_cuda"], gpu.driver, self.settings_file
            )
        if problems:
            raise Refused(problems)

    def superfluous(self, coming: str | None = None) -> list[str]:
        """Releases beyond those to keep. The good, the previous and the current one always stay."""
        state = self.state
        names = [name for name in self.release_names() if name != coming]
        kept = {coming, state.good, state.previous, self.current_name()}
        kept |= set(names[: max(0, self.options.keep_releases - (coming is not None))])
        return [name for name in names if name not in kept]

    def prune(self) -> None:
        """Remove old releases, packages that no release uses, and what killed runs left behind."""
        for name in self.superfluous():
            # Out of the list first, so that half a release is never taken for one.
            (self.releases / name).rename(self.releases / f".removing-{name}")
            (self.proved_settings / f"{name}.env").unlink(missing_ok=True)
        names = self.release_names()
        used = {(self.releases / name / ".venv").readlink().name for name in names}
        for venv in self.venvs.iterdir():
            if venv.name not in used and not venv.name.startswith("."):
                venv.rename(venv.with_name(f".removing-{venv.name}"))
        for folder in (self.releases, self.venvs):
            for entry in [*folder.glob(".building-*"), *folder.glob(".removing-*")]:
                remove_tree(entry)
        self.state = replace(self.state, failed={n: why for n, why in self.state.failed.items() if n in names})


def remove_tree(path: Path) -> None:
    """A folder, or only the link that leads to one."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def move_venv(unfinished: Path, target: Path) -> None:
    """Its scripts name their Python by its full path, so they are rewritten for the new one."""
    for script in (unfinished / "bin").iterdir():
        if script.is_file() and not script.is_symlink():
            content = script.read_bytes()
            script.write_bytes(content.replace(str(unfinished).encode(), str(target).encode()))
    os.sync()  # the name must not reach the disk before the files
    unfinished.rename(target)


# Commands.


class Step(NamedTuple):
    """One line of the plan, and how it is done."""

    text: str
    do: Callable[[], None]


def check_host(host: Host, settings: Mapping[str, str], unit: str, needed_bytes: int) -> list[str]:
    """Every problem that can be seen before anything is installed."""
    options, environment = host.options, preflight.read_unit_environment(unit) | dict(settings)
    pid = host.main_pid()
    port = preflight.read_environment_file(host.settings_in_force()).get("AVITO_PORT", "8085")
    our_port = int(port) if pid and port.isdecimal() else None
    problems = []
    if options.is_whole_host:
        release_file = Path("/etc/os-release")
        problems += preflight.check_root(options.uid)
        problems += preflight.check_system(
            release_file.read_text(encoding="utf-8") if release_file.is_file() else "", preflight.has_systemd()
        )
        problems += preflight.check_python(sys.version_info[:3], str(Path(sys.executable).resolve()))
    problems += preflight.check_disk(host.base, preflight.free_bytes_at(host.base), needed_bytes)
    problems += preflight.check_port(settings, our_port)
    problems += preflight.check_model_paths(settings, host.source)
    if not preflight.is_cpu(environment):
        held = preflight.read_gpu_bytes_of(preflight.process_tree(pid)) if pid else {}
        problems += preflight.check_gpu(preflight.read_gpus(), environment, held)
    if not unit:
        problems.append(f"{NAME}.service is missing: this copy of the project is not complete")
    return problems


def is_unchanged(host: Host, name: str) -> bool:
    """This very release runs already, with these settings and this unit."""
    state, release = host.state, host.releases / name
    return (
        state.good == name == host.current_name()
        and state.switching_to is None
        and not host.settings_drop_in.exists()
        and state.good_mark == host.mark(release, host.settings_text())
        and host.show_unit().get("ActiveState") == "active"
    )


def run_production(host: Host, *, is_dry: bool) -> None:
    """Install or upgrade. See the module's docstring for what happens when something fails.

    :raise Refused: the host or the release is not fit. :raise Failed: it was not taken.
    """
    options = host.options
    has_settings = host.settings_file.exists()
    settings_text = host.settings_text() if has_settings else host.first_settings_text()
    settings = preflight.read_environment_file(settings_text)
    unused = sorted(k for k, v in options.settings.items() if settings.get(k) != v)
    if has_settings and unused:
        say(f"{', '.join(unused)} in the environment: not used, production's settings are in {host.settings_file}")
    index_url = settings.get("AVITO_TORCH_INDEX_URL", "")
    venv = venv_name(host.source, index_url)
    name = release_name(host.source, venv)
    is_installed = (host.venvs / venv).exists()
    is_small = preflight.is_cpu(settings) and bool(index_url)
    venv_bytes = preflight.VENV_BYTES_CPU if is_small else preflight.VENV_BYTES_CUDA
    unit_source = host.source / f"{NAME}.service"
    unit = host.placed(unit_source.read_text(encoding="utf-8")) if unit_source.is_file() else ""
    state = host.state

    say(f"Release {name}; now: {state.good or 'none'}")
    if preflight.is_cpu(settings):
        say("AVITO_DEVICE=cpu: driver, CUDA and card are not looked at")
    needed_bytes = preflight.RELEASE_BYTES + (0 if is_installed else venv_bytes)
    problems = check_host(host, settings, unit, needed_bytes)
    if not is_dry and (options.uid == 0 or not options.is_whole_host):
        host.write_first_settings()  # also where something is wrong with it, so that it can be mended
    if problems and not is_dry:
        raise Refused(problems)

    def take() -> None:
        if is_unchanged(host, name):
            say("It runs already, with these settings; only trying it out")
            try:
                host.client(host.releases / name, host.settings_text(), "try")
                return
            except Failed as error:
                say(f"It does not prove itself, so it is started anew: {error}")
        host.switch_or_fall_back(name, host.settings_text())

    drain_s = in_force_drain(host)
    back = f"back to {state.good}" if state.good else "the service is stopped"
    old = host.superfluous(coming=name)
    steps = [
        Step("Folders, owners" + ("" if host.has_user() else f", and the user {NAME}"), lambda: prepare(host)),
        Step(
            f"Packages {venv}: " + ("as they are" if is_installed else f"install them in {host.venvs}"),
            lambda: host.make_venv(venv, index_url),
        ),
        Step(f"Copy the project to {host.releases / name}", lambda: host.make_release(name, venv)),
        Step("Look at configuration, models and CUDA with its packages", lambda: host.check_release(name)),
        Step(
            f"Drain ({drain_s:g} s) and stop what runs, point {host.current} at it, install {host.unit_file}, start, "
            f"wait {options.ready_timeout_s:g} s at most until ready, try it out; if any of it fails {back}",
            take,
        ),
        Step(f"Remove old releases: {', '.join(old) or 'none'}", host.prune),
    ]
    if is_dry:
        if not has_settings:
            say(f"Would: Write {host.settings_file} from .env.example")
        for step in steps:
            say(f"Would: {step.text}")
        if problems:
            raise Refused(problems)
        return
    for step in steps:
        say(step.text)
        step.do()
    say(f"Release {name} answers at port {settings.get('AVITO_PORT', '8085')}")


def prepare(host: Host) -> None:
    if not host.has_user():
        host.make_user()
    host.make_folders()


def in_force_drain(host: Host) -> float:
    with contextlib.suppress(ValueError):
        return float(preflight.read_environment_file(host.settings_in_force()).get("AVITO_DRAIN_S") or 0)
    return 0.0


def run_rollback(host: Host, name: str | None, *, is_dry: bool) -> None:
    """Back to the previous release, or to a named one, with the settings that it was proved with.

    :raise Refused: there is no such release. :raise Failed: it was not taken.
    """
    state = host.state
    target = name or state.previous
    if target is None:
        raise Refused(["there is no previous release to go back to"])
    if target not in host.release_names():
        raise Refused([f"there is no release {target}; ./deploy.sh releases lists them"])
    say(f"Going back from {state.good or 'none'} to {target}")
    if is_dry:
        say(f"Would: Drain and stop what runs, point {host.current} at {target}, start it, try it out")
        return
    host.switch_or_fall_back(target, host.settings_text(target))
    say(f"Release {target} answers")


def run_releases(host: Host) -> None:
    state = host.state
    if not host.release_names():
        say("No release")
    for name in host.release_names():
        about = host.releases / name / "release.json"
        commit = json.loads(about.read_text(encoding="utf-8")).get("commit") if about.is_file() else ""
        marks = [
            "current" if name == host.current_name() else "",
            "previous" if name == state.previous else "",
            f"commit {commit}" if commit else "",
            f"not taken: {state.failed[name]}" if name in state.failed else "",
        ]
        say(f"{name}  {', '.join(filter(None, marks))}".rstrip())
    if state.switching_to:
        say(f"A run was cut off while it switched to {state.switching_to}: ./deploy.sh production mends that")


def run_uninstall(host: Host, *, is_purge: bool, is_sure: bool, is_dry: bool) -> None:
    """Take the service off the host.

    :raise Refused: the operator did not agree.
    """
    gone = [host.unit_file, host.settings_drop_in, host.logrotate_file, host.at(f"/var/cache/{NAME}"), host.base]
    kept = [host.settings_file.parent, host.at(f"/var/log/{NAME}"), host.at(f"/var/lib/{NAME}")]
    if is_purge:
        gone, kept = [*kept, *gone], []  # the releases last: they say what a run that was killed still has to do
    say("Remove: " + ", ".join(str(path) for path in gone))
    say("Keep: " + (", ".join(str(path) for path in kept) or "nothing"))
    if is_dry:
        return
    if not is_sure:
        try:
            answer = input("Drain and stop the service and remove this? (yes/no) ")
        except EOFError:
            answer = ""
        if answer.strip().lower() != "yes":
            raise Refused(["nothing was removed; --yes answers the question"])
    host.stop_service()
    if host.unit_file.exists():
        host.systemctl("disable", NAME)
    for path in gone:
        path.unlink() if path.is_file() else remove_tree(path)
    with contextlib.suppress(OSError):  # an operator's own drop-ins stay
        host.settings_drop_in.parent.rmdir()
    host.systemctl("daemon-reload")
    if is_purge and host.options.is_whole_host:
        subprocess.run(["userdel", NAME], check=False)
    say("The service is gone")


def mend_or_raise(host: Host, error: Exception) -> NoReturn:
    """A run was refused; if the one before it was killed in the middle, the host is put right all the same."""
    if (name := host.state.switching_to) is None:
        raise error
    if isinstance(error, Refused):
        for problem in error.problems:
            say(f"Error: {problem}")
    host.fall_back(name, "its run was cut off, and this one was refused")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"Error: {message}; './deploy.sh help' lists what there is\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: done. 1: refused, or the release was not taken. 2: bad arguments."""
    parser = Parser(prog="./deploy.sh")
    commands = parser.add_subparsers(dest="command", required=True)
    production = commands.add_parser("production")
    rollback = commands.add_parser("rollback")
    rollback.add_argument("release", nargs="?")
    commands.add_parser("releases")
    uninstall = commands.add_parser("uninstall")
    uninstall.add_argument("--purge", action="store_true", help="also settings, logs, state and the user")
    uninstall.add_argument("--yes", action="store_true", help="do not ask")
    for command in (production, rollback, uninstall):
        command.add_argument("--dry-run", action="store_true", help="say what would be done, change nothing")
    arguments = parser.parse_args(argv)

    def interrupt(number: int, frame: object) -> NoReturn:
        raise Interrupted("interrupted")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    os.umask(0o022)  # the service reads what root makes; where it must not, the mode is said
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a terminal that closes is no reason to stop half-way
    try:
        host = Host(Options.read(os.environ))
        run_command(host, arguments)
    except Refused as error:
        for problem in error.problems:
            print(f"Error: {problem}", file=sys.stderr)
        return 1
    except (Failed, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except Interrupted:
        return 130
    return 0


def run_command(host: Host, arguments: argparse.Namespace) -> None:
    if arguments.command == "releases":
        run_releases(host)
    elif arguments.dry_run and arguments.command == "production":
        run_production(host, is_dry=True)
    elif arguments.dry_run and arguments.command == "rollback":
        run_rollback(host, arguments.release, is_dry=True)
    elif arguments.command == "uninstall" and arguments.dry_run:
        run_uninstall(host, is_purge=arguments.purge, is_sure=False, is_dry=True)
    else:
        # Alone, for without it the rest cannot even be looked at.
        if host.options.is_whole_host and (problems := preflight.check_root(host.options.uid)):
            raise Refused(problems)
        with host.locked():
            try:
                if arguments.command == "uninstall":
                    run_uninstall(host, is_purge=arguments.purge, is_sure=arguments.yes, is_dry=False)
                elif arguments.command == "production":
                    run_production(host, is_dry=False)
                else:
                    run_rollback(host, arguments.release, is_dry=False)
            except (Refused, Interrupted) as error:
                if arguments.command == "uninstall":
                    raise
                mend_or_raise(host, error)


if __name__ == "__main__":
    sys.exit(main())
