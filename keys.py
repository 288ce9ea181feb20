"""Callers' keys: the file that holds them, the store that follows it, and the command that makes, lists and revokes.

    python -m keys make NAME | list | revoke NAME_OR_ID

What a key opens is decided in `access.py`; here is what a key is. The file holds hashes: a key is shown once, when it
is made, and nobody can read it out again.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import hmac
import logging
import os
import re
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal, get_args

from flask import current_app, g
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from config import PROJECT_ROOT, ConfigError, Limits, Settings, load_settings
from models.errors import InvalidRequest
from models.parsing import load_json_object
from models.schemas import MODEL_NAMES, ModelName
from responses import WebError

log = logging.getLogger("avito.keys")

Scope = Literal["generate", "ops"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
KEY_FORM = re.compile(r"avito_[A-Za-z0-9_-]{43}")
_NAME = r"^[A-Za-z0-9._-]{1,64}$"
_RANDOM_BYTES = 32
_MAX_NUMBER = 10**12
# An entry with every field is a third of this.
_MAX_ENTRY_BYTES = 2048
# Where the current application keeps its store, if keys are on.
EXTENSION = "avito_keys"


class Key(BaseModel):
    """One caller. The name stands in metrics and log lines, so it is plain.

    :param sha256: of the whole key. A plain hash, neither salted nor slow: those protect what people choose, which can
        be guessed. Nobody guesses 256 random bits, and this hash is taken at every request.
    :param requests_per_minute: None: AVITO_RATE_LIMIT, counted for this key alone.
    :param tokens_per_day: prompt and generated tokens of a UTC day; None: as many as it likes.
    :param models: None: all.
    :param expires: from then on it opens nothing; None: never.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)

    id: str = Field(pattern=r"^[0-9a-f]{8}$")
    name: str = Field(pattern=_NAME)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    scopes: Annotated[tuple[Scope, ...], Field(min_length=1, max_length=len(SCOPES))]
    requests_per_minute: Annotated[int, Field(ge=1, le=_MAX_NUMBER)] | None = None
    tokens_per_day: Annotated[int, Field(ge=1, le=_MAX_NUMBER)] | None = None
    models: Annotated[tuple[ModelName, ...], Field(min_length=1, max_length=len(MODEL_NAMES))] | None = None
    created: AwareDatetime
    expires: AwareDatetime | None = None

    def is_expired(self, now: float) -> bool:
        """:param now: Unix seconds."""
        return self.expires is not None and now >= self.expires.timestamp()


class KeyFile(BaseModel):
    """The whole file. Names, ids and hashes are each there once."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)

    keys: tuple[Key, ...]

    @model_validator(mode="after")
    def _are_different(self) -> KeyFile:
        for attribute in ("id", "name", "sha256"):
            seen = set()
            for key in self.keys:
                value = getattr(key, attribute)
                if value in seen:
                    raise ValueError(
                        f"two keys have the same {attribute}{'' if attribute == 'sha256' else ' ' + value}"
                    )
                seen.add(value)
        return self


class KeysError(Exception):
    """The keys file cannot be used, or not be changed like that; the message is one sentence for the operator."""


class KeyStore:
    """The keys that are valid now. Any thread.

    The file is looked at when somebody asks, at most once in `interval_s`. If it cannot be used any more, the keys of
    its last good state stay, and `error` says why.

    :param clock: monotonic seconds.
    :raise KeysError: the file cannot be used at all.
    """

    def __init__(self, path: Path, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._max_keys = limits.max_keys
        self._interval_s = limits.keys_check_interval_s
        self._clock = clock
        self._lock = threading.Lock()
        self._error: str | None = None
        self._checked_at = clock()
        self._seen, keys = _read(path, limits.max_keys)
        self._keys = _with_digests(keys)

    def find(self, text: str) -> Key | None:
        """The key that `text` is, expired or not."""
        if not KEY_FORM.fullmatch(text):
            return None
        given = hashlib.sha256(text.encode()).digest()
        found = None
        # To the end and each in constant time: how long it takes tells nothing about how near a guess was.
        for digest, key in self._current():
            if hmac.compare_digest(digest, given):
                found = key
        return found

    def count(self) -> int:
        return len(self._current())

    def error(self) -> str | None:
        """Why the file cannot be used at present; None if it can."""
        self._current()
        return self._error

    def _current(self) -> tuple[tuple[bytes, Key], ...]:
        with self._lock:
            now = self._clock()
            if now - self._checked_at >= self._interval_s:
                self._checked_at = now
                self._follow()
            return self._keys

    def _follow(self) -> None:
        try:
            # After a fault it is read in any case: it may be back just as it was, with its folder for example.
            if self._error is None and _signature(self._path.stat()) == self._seen:
                return
            seen, keys = _read(self._path, self._max_keys)
        except (KeysError, OSError) as problem:
            reason = str(problem) if isinstance(problem, KeysError) else _os_reason(problem)
            if reason != self._error:
                log.error("the keys file cannot be used, the keys from before stay: %s", reason)
            self._error = reason
            return
        self._seen, self._keys, self._error = seen, _with_digests(keys), None
        log.info("keys read again: %d", len(keys))


def _with_digests(keys: Sequence[Key]) -> tuple[tuple[bytes, Key], ...]:
    return tuple((bytes.fromhex(key.sha256), key) for key in keys)


def _signature(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _read(path: Path, max_keys: int) -> tuple[tuple[int, ...], tuple[Key, ...]]:
    """What the file looked like when it was opened, and its keys.

    :raise KeysError: there is none, or it is not as it must be.
    """
    limit = max_keys * _MAX_ENTRY_BYTES
    try:
        # Without waiting: opening a pipe would last until somebody writes to it.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            signature = _signature(os.fstat(file.fileno()))
            data = file.read(limit + 1) or b""
    except OSError as error:
        raise KeysError(_os_reason(error)) from None
    if len(data) > limit:
        raise KeysError(f"it must have at most {limit} bytes, which is more than enough for {max_keys} keys")
    try:
        load_json_object(data)  # strict about what JSON leaves open, such as a field that is there twice
        keys = KeyFile.model_validate_json(data).keys
    except InvalidRequest as error:
        raise KeysError(error.message) from None
    except ValidationError as error:
        detail = error.errors()[0]
        place = ".".join(str(part) for part in detail["loc"])
        rule = detail["msg"].removeprefix("Value error, ")
        raise KeysError(f"{place}: {rule[:1].lower()}{rule[1:]}" if place else rule) from None
    if len(keys) > max_keys:
        raise KeysError(f"keys: at most {max_keys}, got {len(keys)}")
    return signature, keys


def _os_reason(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file; `python -m keys make NAME` makes it"
    return f"it cannot be read: {error.strerror}"


def keys_path(settings: Settings) -> Path:
    """Where the file is; relative paths count from the project's folder."""
    return PROJECT_ROOT / settings.keys_file


def open_store(settings: Settings, clock: Callable[[], float] = time.monotonic) -> KeyStore | None:
    """The store of these settings; None if keys are off.

    :raise ConfigError: the file cannot be used.
    """
    if not settings.keys_file:
        return None
    try:
        return KeyStore(keys_path(settings), settings.limits, clock)
    except KeysError as error:
        raise ConfigError([f"AVITO_KEYS_FILE={settings.keys_file}: {error}"]) from None


# What the doors ask.


def are_on() -> bool:
    return EXTENSION in current_app.extensions


def unauthorized(message: str, field: str | None = None) -> WebError:
    return WebError("unauthorized", message, field=field, headers={"WWW-Authenticate": 'Bearer realm="api"'})


def check_model(model: ModelName) -> None:
    """Whether the current request may use this model. Anybody may, if keys are off.

    `generation.py` asks for every door; a door asks itself only if it wants to know earlier.

    :raise WebError: `forbidden`; `unauthorized` if the request came past the check of keys, which no door should.
    """
    key: Key | None = g.get("api_key")
    if key is None:
        if are_on():
            raise unauthorized("a key is needed")
        return
    if key.models is not None and model not in key.models:
        raise WebError("forbidden", f"this key is not for {model}, only for {', '.join(key.models)}")


# The file's other side: the command.


def write_atomically(path: Path, text: str, *, is_durable: bool = True) -> None:
    """Put `text` into the file, for its owner only, so that a reader sees all of it or none.

    :param is_durable: also against a loss of power.
    :raise OSError: it cannot be written; the file is as it was.
    """
    path = path.resolve()  # what a link leads to is replaced, not the link
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            with contextlib.suppress(FileNotFoundError, PermissionError):
                # root's command must not take the file away from the service's user.
                os.chown(temporary, (before := path.stat()).st_uid, before.st_gid)
            file.write(text)
            file.flush()
            if is_durable:
                os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One command at a time. The lock is a file of its own: that of the keys is replaced by each change."""
    descriptor = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _read_or_none(path: Path, max_keys: int) -> tuple[Key, ...]:
    """The keys of the file; none if there is no file."""
    if not path.exists():
        return ()
    try:
        return _read(path, max_keys)[1]
    except KeysError as error:
        raise KeysError(f"{path}: {error}") from None


def _write(path: Path, keys: Sequence[Key]) -> None:
    # Read once more before it is written, so that no command leaves a file that stops the service.
    text = KeyFile(keys=tuple(keys)).model_dump_json(indent=2) + "\n"
    KeyFile.model_validate_json(text)
    write_atomically(path, text)


def _make(path: Path, arguments: argparse.Namespace, now: datetime, max_keys: int) -> None:
    if not re.fullmatch(_NAME, arguments.name):
        raise KeysError("NAME: must be 1 to 64 of the characters A-Z a-z 0-9 . _ -")
    if arguments.expires is not None and arguments.expires <= now:
        raise KeysError(f"--expires: must be in the future, and {arguments.expires:%Y-%m-%d %H:%M} UTC is not")
    with _locked(path):
        keys = _read_or_none(path, max_keys)
        if any(key.name == arguments.name for key in keys):
            raise KeysError(f"{arguments.name}: there is a key of this name; revoke it first, or choose another")
        if len(keys) >= max_keys:
            raise KeysError(f"there are {len(keys)} keys, and more than {max_keys} are not possible")
        secret = f"avito_{secrets.token_urlsafe(_RANDOM_BYTES)}"
        key = Key(
            id=secrets.token_hex(4),
            name=arguments.name,
            sha256=hashlib.sha256(secret.encode()).hexdigest(),
            scopes=tuple(dict.fromkeys(arguments.scope or ["generate"])),
            requests_per_minute=arguments.rate,
            tokens_per_day=arguments.tokens_per_day,
            models=tuple(dict.fromkeys(arguments.model)) if arguments.model else None,
            created=now.replace(microsecond=0),
            expires=arguments.expires,
        )
        _write(path, [*keys, key])
    print(f"Made the key {key.name} ({key.id}) in {path}. This is the only time that it is shown:", file=sys.stderr)
    print(secret)


def _list(path: Path, now: datetime, max_keys: int) -> None:
    keys = _read_or_none(path, max_keys)
    if not keys:
        print(f"no keys in {path}", file=sys.stderr)
        return
    rows = [("ID", "NAME", "SCOPES", "RATE", "TOKENS/DAY", "MODELS", "CREATED", "EXPIRES")]
    for key in keys:
        expires = "-" if key.expires is None else f"{key.expires:%Y-%m-%dT%H:%MZ}"
        rows.append(
            (
                key.id,
                key.name,
                ",".join(key.scopes),
                "-" if key.requests_per_minute is None else f"{key.requests_per_minute}/min",
                "-" if key.tokens_per_day is None else str(key.tokens_per_day),
                "all" if key.models is None else ",".join(key.models),
                f"{key.created:%Y-%m-%d}",
                f"{expires} (expired)" if key.is_expired(now.timestamp()) else expires,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _revoke(path: Path, name_or_id: str, max_keys: int) -> None:
    with _locked(path):
        keys = _read_or_none(path, max_keys)
        meant = [key for key in keys if name_or_id in (key.name, key.id)]
        if not meant:
            raise KeysError(f"{name_or_id}: there is no key of this name or id; `python -m keys list` shows them")
        if len(meant) > 1:
            raise KeysError(f"{name_or_id}: is the name of one key and the id of another; say it the other way round")
        _write(path, [key for key in keys if key is not meant[0]])
    print(f"Revoked the key {meant[0].name} ({meant[0].id}); a running service refuses it within a second or two.")


def _number(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,12}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {_MAX_NUMBER - 1}, got {text!r}")
    return int(text)


def _date(text: str) -> datetime:
    """A day, which counts to its end, or a moment with its time zone."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is not None and re.fullmatch(r"\d{4}-\d\d-\d\d", text):
        return moment.replace(tzinfo=UTC) + timedelta(days=1)
    if moment is None or moment.tzinfo is None:
        raise argparse.ArgumentTypeError(
            f"must be like 2027-01-31 (the last day, in UTC) or 2027-01-31T12:00Z, got {text!r}"
        )
    return moment.astimezone(UTC)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m keys", description="Make, list and revoke the keys of callers; a running service follows."
    )
    parser.add_argument("--file", type=Path, metavar="PATH", help="the keys file (default: AVITO_KEYS_FILE)")
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="make a key and show it, once")
    make.add_argument("name", metavar="NAME", help="who it is for: letters, digits, '.', '_', '-'")
    make.add_argument("--scope", action="append", choices=SCOPES, help="may be repeated (default: generate)")
    make.add_argument("--rate", type=_number, metavar="N", help="requests per minute (default: AVITO_RATE_LIMIT)")
    make.add_argument("--tokens-per-day", type=_number, metavar="N", help="prompt and answers (default: no limit)")
    make.add_argument("--model", action="append", choices=MODEL_NAMES, help="may be repeated (default: all)")
    make.add_argument("--expires", type=_date, metavar="DATE", help="2027-01-31 is its last day, in UTC")
    commands.add_parser("list", help="all keys, without what makes them keys")
    revoke = commands.add_parser("revoke", help="take a key away")
    revoke.add_argument("name", metavar="NAME_OR_ID")
    return parser


def main(argv: Sequence[str] | None = None, now: Callable[[], float] = time.time) -> int:
    """The command. Exit code 0: done, 1: it cannot be done, and why; 2: it was called wrongly."""
    arguments = _parser().parse_args(argv)
    limits = Limits()
    try:
        path = arguments.file
        if path is None:
            settings = load_settings()
            if not settings.keys_file:
                raise ConfigError(["AVITO_KEYS_FILE is not set, and no --file says where the keys are"])
            path = keys_path(settings)
        today = datetime.fromtimestamp(now(), UTC)
        if arguments.command == "make":
            _make(path, arguments, today, limits.max_keys)
        elif arguments.command == "list":
            _list(path, today, limits.max_keys)
        else:
            _revoke(path, arguments.name, limits.max_keys)
    except ConfigError as error:
        print("\n".join(error.mistakes), file=sys.stderr)
        return 2
    except KeysError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{error.filename or path}: cannot be used: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
