"""The keys file, the store that follows it, and the command that changes it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import re
import stat
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from config import PROJECT_ROOT, ConfigError, Limits, Settings
from keys import KEY_FORM, KeysError, KeyStore, main, open_store
from tests.fakes import GENEROUS_S, Clock

NOON = datetime(2026, 11, 24, 12, 0, tzinfo=UTC).timestamp()
ENTRY: dict[str, Any] = {
    "id": "0123abcd",
    "name": "shop",
    "sha256": "0" * 64,
    "scopes": ["generate"],
    "created": "2026-11-24T12:00:00Z",
}


def run(path: Path, *arguments: str) -> tuple[int, str, str]:
    """The command on this file at NOON: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(["--file", str(path), *arguments], now=lambda: NOON)
        except SystemExit as error:  # argparse's way to refuse
            code = int(error.code or 0)
    return code, out.getvalue(), err.getvalue()


def make(path: Path, name: str, *options: str) -> str:
    """A new key in this file."""
    code, out, err = run(path, "make", name, *options)
    assert code == 0, err
    return out.strip()


def write(path: Path, *entries: dict[str, Any]) -> None:
    path.write_text(json.dumps({"keys": entries}))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


# The command.


def test_make_shows_the_key_once_and_stores_its_hash_for_the_owner_only(path: Path) -> None:
    code, out, err = run(path, "make", "shop")
    secret = out.strip()
    assert code == 0 and KEY_FORM.fullmatch(secret) and len(secret) == 49
    assert secret not in err and secret not in path.read_text()
    (entry,) = json.loads(path.read_text())["keys"]
    assert entry["sha256"] == hashlib.sha256(secret.encode()).hexdigest()
    assert entry["scopes"] == ["generate"] and entry["created"] == "2026-11-24T12:00:00Z"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sorted(file.name for file in path.parent.iterdir()) == ["keys.json", "keys.json.lock"]


def test_every_option_of_make_stands_in_the_file_and_in_the_list(path: Path) -> None:
    options = ["--scope", "ops", "--scope", "generate", "--rate", "120", "--tokens-per-day", "5000", "--model", "avibe"]
    secret = make(path, "batch.job_1-a", *options, "--expires", "2026-12-31")
    key = KeyStore(path, Limits()).find(secret)
    assert key is not None
    assert (key.name, key.scopes) == ("batch.job_1-a", ("ops", "generate"))
    assert (key.requests_per_minute, key.tokens_per_day, key.models) == (120, 5000, ("avibe",))
    assert key.expires == datetime(2027, 1, 1, tzinfo=UTC), "the last day counts to its end"
    code, out, _ = run(path, "list")
    assert code == 0
    assert re.search(
        rf"{key.id} +batch.job_1-a +ops,generate +120/min +5000 +avibe +2026-11-24 +2027-01-01T00:00Z\n", out
    )
    assert secret not in out and key.sha256 not in out


def test_list_tells_what_has_expired(path: Path) -> None:
    write(path, ENTRY | {"expires": "2026-11-24T11:59:59Z"})
    assert "(expired)" in run(path, "list")[1]


@pytest.mark.parametrize("name", ["", "a b", "a" * 65, "ключ", "a\n", 'a"b', "a/b", "-a\x00"])
def test_names_that_could_not_stand_in_a_metric_are_refused(path: Path, name: str) -> None:
    code, out, err = run(path, "make", "--", name)
    assert (code, out) == (1, "") and "1 to 64 of the characters" in err
    assert not path.exists()


def test_a_name_of_64_characters_is_taken(path: Path) -> None:
    make(path, "a" * 64)


@pytest.mark.parametrize(
    ("option", "rule"),
    [
        (("--rate", "0"), "must be a whole number from 1"),
        (("--rate", "1.5"), "must be a whole number from 1"),
        (("--rate", "١"), "must be a whole number from 1"),
        (("--tokens-per-day", "-1"), "must be a whole number from 1"),
        (("--tokens-per-day", "1" * 5000), "must be a whole number from 1"),
        (("--scope", "admin"), "invalid choice"),
        (("--model", "gpt"), "invalid choice"),
        (("--expires", "tomorrow"), "must be like 2027-01-31"),
        (("--expires", "2027-02-30"), "must be like 2027-01-31"),
        (("--expires", "2027-01-31T12:00"), "must be like 2027-01-31"),
    ],
)
def test_wrong_options_are_refused_with_the_rule(path: Path, option: tuple[str, str], rule: str) -> None:
    code, out, err = run(path, "make", "shop", *option)
    assert (code, out) == (2, "") and rule in err
    assert not path.exists()


def test_a_key_that_would_be_expired_at_once_is_refused(path: Path) -> None:
    code, _, err = run(path, "make", "shop", "--expires", "2026-11-23")
    assert code == 1 and "must be in the future, and 2026-11-24 00:00 UTC is not" in err
    make(path, "shop", "--expires", "2026-11-24T13:00:00+00:30")


def test_a_name_is_there_once(path: Path) -> None:
    make(path, "shop")
    before = path.read_text()
    code, out, err = run(path, "make", "shop")
    assert (code, out) == (1, "") and "there is a key of this name" in err
    assert path.read_text() == before


def test_revoke_takes_a_name_or_an_id_and_leaves_the_others(path: Path) -> None:
    for name in ("a", "b", "c"):
        make(path, name)
    ids = {entry["name"]: entry["id"] for entry in json.loads(path.read_text())["keys"]}
    assert run(path, "revoke", "a")[0] == 0
    assert run(path, "revoke", ids["b"])[0] == 0
    assert [entry["name"] for entry in json.loads(path.read_text())["keys"]] == ["c"]
    code, _, err = run(path, "revoke", "a")
    assert code == 1 and "there is no key of this name or id" in err


def test_revoke_does_not_guess_between_a_name_and_an_id(path: Path) -> None:
    write(path, ENTRY, ENTRY | {"id": "aaaaaaaa", "name": ENTRY["id"], "sha256": "1" * 64})
    code, _, err = run(path, "revoke", ENTRY["id"])
    assert code == 1 and "the name of one key and the id of another" in err


def test_list_and_revoke_without_a_file_say_so_and_make_none(path: Path) -> None:
    assert run(path, "list") == (0, "", f"no keys in {path}\n")
    assert run(path, "revoke", "a")[0] == 1
    assert not path.exists()


def test_a_broken_file_is_told_and_left_alone(path: Path) -> None:
    path.write_text("{")
    for command in (["make", "a"], ["list"], ["revoke", "a"]):
        code, out, err = run(path, *command)
        assert (code, out) == (1, "") and str(path) in err and "must be valid JSON" in err
    assert path.read_text() == "{"


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    code, _, err = run(tmp_path / "none" / "keys.json", "make", "a")
    assert code == 1 and "No such file or directory" in err


def test_commands_at_the_same_time_lose_no_key(path: Path) -> None:
    names = [f"k{number}" for number in range(8)]
    command = [sys.executable, "-m", "keys", "--file", str(path), "make"]
    # Processes and threads: the lock must hold between both. Output is not redirected here, that is not for threads.
    processes = [
        subprocess.Popen([*command, name], cwd=PROJECT_ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for name in names[:2]
    ]
    threads = [threading.Thread(target=main, args=(["--file", str(path), "make", name],)) for name in names[2:]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(GENEROUS_S)
    assert [process.wait(3 * GENEROUS_S) for process in processes] == [0, 0]
    assert sorted(entry["name"] for entry in json.loads(path.read_text())["keys"]) == names


def test_a_link_stays_a_link(path: Path) -> None:
    real = path.with_name("real.json")
    path.symlink_to(real)
    make(path, "a")
    assert path.is_symlink() and KeyStore(real, Limits()).count() == 1


def test_the_number_of_keys_has_a_limit(path: Path) -> None:
    limit = Limits().max_keys
    entries = [ENTRY | {"id": f"{n:08x}", "name": f"k{n}", "sha256": f"{n:064x}"} for n in range(limit + 1)]
    write(path, *entries[:limit])
    assert KeyStore(path, Limits()).count() == limit
    assert f"there are {limit} keys" in run(path, "make", "more")[2]
    write(path, *entries)
    with pytest.raises(KeysError, match=rf"keys: at most {limit}, got {limit + 1}"):
        KeyStore(path, Limits())


# The store.


def test_find_knows_whole_keys_only(path: Path) -> None:
    secret, other = make(path, "a"), make(path, "b")
    store = KeyStore(path, Limits())
    assert [getattr(store.find(text), "name", None) for text in (secret, other)] == ["a", "b"]
    wrong = ["", secret[:-1], f"{secret}x", secret.lower(), secret.removeprefix("avito_"), f"{secret}\n", "é", "\x00"]
    assert [store.find(text) for text in [*wrong, f"avito_{'A' * 43}"]] == [None] * (len(wrong) + 1)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (b"", "body: must be valid JSON"),
        (b"\xff", "must be UTF-8"),
        (b"[]", "must be a JSON object"),
        (b"{}", "keys: field required"),
        (b'{"keys": [], "keys": []}', "keys: is given more than once"),
        (b'{"keys": {}}', "keys: "),
        (b'{"keys": [], "more": 1}', "more: extra inputs are not permitted"),
        (b'{"keys": [NaN]}', "NaN is not JSON"),
        (b'{"keys": ' + b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_file_that_is_no_keys_file_is_refused_with_the_reason(path: Path, text: bytes, rule: str) -> None:
    path.write_bytes(text)
    with pytest.raises(KeysError, match=rule):
        KeyStore(path, Limits())


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"id": "XYZ"}, "keys.0.id"),
        ({"id": 1}, "keys.0.id"),
        ({"name": "a b"}, "keys.0.name"),
        ({"name": "a\n"}, "keys.0.name"),
        ({"name": "é"}, "keys.0.name"),
        ({"sha256": "0" * 63}, "keys.0.sha256"),
        ({"sha256": "avito_secret"}, "keys.0.sha256"),
        ({"scopes": []}, "keys.0.scopes"),
        ({"scopes": ["admin"]}, "keys.0.scopes.0"),
        ({"scopes": "generate"}, "keys.0.scopes"),
        ({"requests_per_minute": 0}, "keys.0.requests_per_minute"),
        ({"requests_per_minute": True}, "keys.0.requests_per_minute"),
        ({"requests_per_minute": "10"}, "keys.0.requests_per_minute"),
        ({"tokens_per_day": -1}, "keys.0.tokens_per_day"),
        ({"models": []}, "keys.0.models"),
        ({"models": ["gpt"]}, "keys.0.models.0"),
        ({"created": "2026-11-24T12:00:00"}, "keys.0.created"),
        ({"created": None}, "keys.0.created"),
        ({"expires": "soon"}, "keys.0.expires"),
        ({"secret": "x"}, "keys.0.secret"),
    ],
)
def test_a_wrong_field_is_named_and_its_value_is_not(path: Path, change: dict[str, Any], place: str) -> None:
    write(path, ENTRY)
    KeyStore(path, Limits())
    write(path, ENTRY | change)
    with pytest.raises(KeysError, match=rf"^{re.escape(place)}: ") as caught:
        KeyStore(path, Limits())
    assert "avito_secret" not in str(caught.value)


@pytest.mark.parametrize("same", ["id", "name", "sha256"])
def test_two_keys_with_the_same_id_name_or_hash_are_refused(path: Path, same: str) -> None:
    other = {"id": "ffffffff", "name": "other", "sha256": "f" * 64} | {same: ENTRY[same]}
    write(path, ENTRY, ENTRY | other)
    with pytest.raises(KeysError, match=f"two keys have the same {same}"):
        KeyStore(path, Limits())


def test_a_huge_file_a_pipe_and_a_folder_are_refused_at_once(tmp_path: Path) -> None:
    huge = tmp_path / "huge"
    with huge.open("wb") as file:
        file.truncate(1 << 40)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, rule in ((huge, "at most 2048000 bytes"), (pipe, "must be valid JSON"), (tmp_path, "cannot be read")):
        with pytest.raises(KeysError, match=rule):
            KeyStore(path, Limits())


def test_a_wrong_file_stops_the_start_with_a_sentence(path: Path) -> None:
    settings = Settings.model_validate({"AVITO_KEYS_FILE": str(path)})
    with pytest.raises(ConfigError, match=rf"AVITO_KEYS_FILE={path}: there is no such file; `python -m keys make"):
        open_store(settings)
    path.write_text('{"keys": 1}')
    with pytest.raises(ConfigError, match=rf"AVITO_KEYS_FILE={path}: keys: "):
        open_store(settings)
    assert open_store(Settings.model_validate({})) is None


# Reload.


def test_changes_are_seen_a_second_later_and_not_before(path: Path) -> None:
    clock = Clock()
    first = make(path, "first")
    store = KeyStore(path, Limits(), clock)
    second = make(path, "second")
    run(path, "revoke", "first")
    clock.now += 0.99
    assert store.find(first) and not store.find(second), "the file is not looked at before its time"
    clock.now += 0.01
    assert not store.find(first) and store.find(second)


@pytest.mark.parametrize("fault", ["broken", "gone", "folder"])
def test_a_file_that_goes_bad_keeps_the_last_good_keys_and_is_told_once(
    path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    secret = make(path, "a")
    store = KeyStore(path, Limits(), clock)
    good = path.read_text()
    assert store.error() is None
    path.unlink()
    if fault == "broken":
        path.write_text(good[:-20])
    elif fault == "folder":
        path.mkdir()
    with caplog.at_level(logging.INFO, "avito.keys"):
        for _ in range(5):
            clock.now += 1
            assert store.find(secret)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR and "the keys from before stay" in record.getMessage()
    error = store.error()
    assert error is not None and error in record.getMessage()
    if fault == "folder":
        path.rmdir()
    path.write_text(good.replace('"name": "a"', '"name": "b"'))
    clock.now += 1
    assert getattr(store.find(secret), "name", None) == "b"
    assert store.error() is None


def test_a_file_that_comes_back_as_it_was_is_good_again(tmp_path: Path) -> None:
    clock = Clock()
    folder, away = tmp_path / "here", tmp_path / "away"
    folder.mkdir()
    make(folder / "keys.json", "a")
    store = KeyStore(folder / "keys.json", Limits(), clock)
    for source, target, is_good in ((folder, away, False), (away, folder, True)):
        source.rename(target)
        clock.now += 1
        assert (store.error() is None) is is_good


def test_another_fault_is_told_again(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    make(path, "a")
    store = KeyStore(path, Limits(), clock)
    for text in ("{", "[]"):
        path.write_text(text)
        clock.now += 1
        assert store.count() == 1
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]


def test_an_empty_list_of_keys_is_a_good_file_that_lets_nobody_in(path: Path) -> None:
    secret = make(path, "a")
    run(path, "revoke", "a")
    store = KeyStore(path, Limits())
    assert store.count() == 0 and store.error() is None and store.find(secret) is None
