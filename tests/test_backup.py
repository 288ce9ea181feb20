"""Backups of `ops/`: what is saved comes back, whole or not at all, while the service writes beside it."""

from __future__ import annotations

import json
import os
import subprocess
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from config import Limits
from keys import KeyStore, write_atomically
from tests.proxies import GENEROUS_S, OPS, need, rewritten, tool
from tests.test_keys import make as make_key

SCRIPT = OPS / "backup" / "avito-ai-backup"
Host = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A host with settings, a key and what it used, a drop-in of the unit, and things that are not to be saved."""
    root = tmp_path / "host"
    state, settings = root / "var/lib/avito-ai", root / "etc/avito-ai"
    drop_ins = root / "etc/systemd/system/avito-ai.service.d"
    for folder in (state, settings, drop_ins, root / "var/log/avito-ai"):
        folder.mkdir(parents=True)
    (settings / "avito-ai.env").write_text("AVITO_KEYS_FILE=/var/lib/avito-ai/keys.json\n")
    (settings / "avito-ai.env").chmod(0o640)
    make_key(state / "keys.json", "shop")
    write_atomically(state / "keys.json.usage", '{"day": "2027-01-01", "tokens": {"a": 5}}')
    (state / ".keys.json.half-written").write_text("{")
    (drop_ins / "card.conf").write_text("[Service]\nEnvironment=CUDA_VISIBLE_DEVICES=0\n")
    (root / "var/log/avito-ai/app.log").write_text("a line\n")
    return root


@pytest.fixture
def run(root: Path, tmp_path: Path) -> Host:
    def run(*arguments: str, state: str = "inactive", **environment: str) -> subprocess.CompletedProcess[str]:
        systemctl = tmp_path / "systemctl"
        systemctl.write_text(f"#!/bin/sh\necho {state}\n[ {state} = active ]\n")
        systemctl.chmod(0o755)
        given = {"BACKUP_ROOT": str(root), "BACKUP_DIR": str(tmp_path / "backups"), "BACKUP_SYSTEMCTL": str(systemctl)}
        return subprocess.run(
            ["bash", str(SCRIPT), *arguments],
            env={"PATH": os.environ["PATH"], **given, **environment},
            capture_output=True,
            text=True,
            timeout=GENEROUS_S,
        )

    return run


def create(run: Host, **environment: str) -> Path:
    done = run("create", **environment)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def contents(root: Path) -> dict[str, tuple[int, bytes]]:
    files = (file for file in root.rglob("*") if file.is_file())
    return {str(file.relative_to(root)): (file.stat().st_mode, file.read_bytes()) for file in files}


def test_what_was_lost_comes_back_with_its_modes(run: Host, root: Path) -> None:
    before = contents(root)
    backup = create(run)
    assert (backup.stat().st_mode & 0o777, backup.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert run("check", str(backup)).returncode == 0
    (root / "var/lib/avito-ai/keys.json").unlink()
    (root / "etc/avito-ai/avito-ai.env").write_text("AVITO_PORT=broken\n")
    (root / "var/lib/avito-ai/keys.json.usage").write_text("{")
    done = run("restore", str(backup))
    assert done.returncode == 0, done.stderr
    assert contents(root) == before
    assert KeyStore(root / "var/lib/avito-ai/keys.json", Limits()).count() == 1


def test_new_host_gets_all_but_logs_and_half_written_files(run: Host, root: Path, tmp_path: Path) -> None:
    backup = create(run)
    new = tmp_path / "new"
    new.mkdir()
    done = run("restore", str(backup), BACKUP_ROOT=str(new))
    assert done.returncode == 0, done.stderr
    left_out = {
        "var/log/avito-ai/app.log",
        "var/lib/avito-ai/.keys.json.half-written",
        "var/lib/avito-ai/keys.json.lock",
    }
    assert contents(new) == {name: held for name, held in contents(root).items() if name not in left_out}
    assert [entry.name for entry in new.iterdir() if entry.name.startswith(".")] == []


def test_keys_file_that_settings_place_elsewhere_is_saved(run: Host, root: Path) -> None:
    (root / "srv").mkdir()
    for name in ("keys.json", "keys.json.usage"):
        (root / "var/lib/avito-ai" / name).rename(root / "srv" / name)
    (root / "etc/avito-ai/avito-ai.env").write_text('AVITO_PORT=1\nAVITO_KEYS_FILE="/srv/keys.json"\n')
    with tarfile.open(create(run)) as archive:
        assert {"srv/keys.json", "srv/keys.json.usage"} <= set(archive.getnames())


def test_restore_leaves_a_backup_of_what_was_there(run: Host, root: Path) -> None:
    backup = create(run)
    (root / "etc/avito-ai/avito-ai.env").write_text("AVITO_PORT=9000\n")
    run("restore", str(backup))
    newest = run("list").stdout.splitlines()[0]
    assert newest != str(backup)
    assert run("restore", newest).returncode == 0
    assert (root / "etc/avito-ai/avito-ai.env").read_text() == "AVITO_PORT=9000\n"


@pytest.mark.parametrize("state", ["active", "activating", "deactivating"])
def test_restore_is_refused_while_the_service_runs(run: Host, root: Path, state: str) -> None:
    backup = create(run)
    (root / "var/lib/avito-ai/keys.json").write_text("present")
    done = run("restore", str(backup), state=state)
    assert done.returncode == 1 and "stop it first" in done.stderr
    assert (root / "var/lib/avito-ai/keys.json").read_text() == "present"


def test_damaged_backup_is_told_and_not_restored(run: Host, root: Path) -> None:
    backup = create(run)
    data = bytearray(backup.read_bytes())
    data[len(data) // 2] ^= 1
    backup.write_bytes(data)
    before = contents(root)
    for command in ("check", "show", "restore"):
        done = run(command, str(backup))
        assert done.returncode == 1 and "is not what was written" in done.stderr
    assert contents(root) == before


def test_oldest_backups_are_removed(run: Host) -> None:
    made = [create(run, BACKUP_KEEP="3") for _ in range(5)]
    assert run("list").stdout.splitlines() == [str(backup) for backup in reversed(made[2:])]
    assert sorted(made[0].parent.iterdir()) == sorted(
        file for backup in made[2:] for file in (backup, backup.with_name(f"{backup.name}.sha256"))
    )


def test_run_that_fails_leaves_nothing_and_says_so(run: Host, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    tar = tmp_path / "bin" / "tar"
    tar.write_text("#!/bin/sh\necho half > \"$2\"\necho 'No space left on device' >&2\nexit 2\n")
    tar.chmod(0o755)
    done = run("create", PATH=f"{tmp_path}/bin:{os.environ['PATH']}")
    assert done.returncode == 1 and "No space left" in done.stderr and "tar failed" in done.stderr
    assert list((tmp_path / "backups").iterdir()) == []


def test_files_that_are_replaced_meanwhile_are_saved_whole(run: Host, root: Path) -> None:
    keys, is_over = root / "var/lib/avito-ai/keys.json", threading.Event()
    text = keys.read_text()

    def rewrite() -> None:
        while not is_over.is_set():
            write_atomically(keys, text + " " * 100_000, is_durable=False)

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        backups = [create(run) for _ in range(5)]
    finally:
        is_over.set()
        writer.join()
    for backup in backups:
        with tarfile.open(backup) as archive:
            member = archive.extractfile("var/lib/avito-ai/keys.json")
            assert member is not None and json.load(member)["keys"][0]["name"] == "shop"


def test_unit_and_timer_are_clean(tmp_path: Path) -> None:
    need("systemd-analyze")
    place = {"/opt/avito-ai/current/ops/backup/avito-ai-backup": (str(SCRIPT), 1)}
    (tmp_path / "avito-ai-backup.service").write_text(rewritten(OPS / "backup" / "avito-ai-backup.service", place))
    (tmp_path / "avito-ai-backup.timer").write_text((OPS / "backup" / "avito-ai-backup.timer").read_text())
    units = [str(tmp_path / f"avito-ai-backup.{kind}") for kind in ("service", "timer")]
    done = subprocess.run([tool("systemd-analyze"), "verify", "--man=no", *units], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_script_is_clean_for_shellcheck() -> None:
    need("shellcheck")
    done = subprocess.run([tool("shellcheck"), str(SCRIPT)], capture_output=True, text=True)
    assert done.stdout == ""
