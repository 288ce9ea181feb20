"""The application over fake models, for the real server: `gunicorn -c gunicorn_config.py "tests.fake_app:create()"`.

The runners echo the prompt, one token a step. A prompt that begins with `hang` stops the engine for good, one that
begins with `fail` fails after two tokens. Only Avibe is there unless `AVISION_MODEL_PATH` is set.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence as Sequences
from dataclasses import replace
from pathlib import Path

from flask import Flask

from app_production import create_app
from config import load_settings
from models.engine.scheduler import Row
from models.engine.sequence import Sequence
from models.errors import NumericError
from models.schemas import ModelName
from models.service import ModelService
from tests.fakes import END_ID, EchoRunner, FakeLoad, FakeLoaded, fake_snapshot
from tests.test_snapshots import make_snapshot


class LongRunner(EchoRunner):
    """Keeps no record of what it released: it serves measurements of memory too."""

    def release(self, sequence: Sequence) -> None:
        return


class MuteRunner(LongRunner):
    """Ends every answer before its first token."""

    @staticmethod
    def _next(row: Row) -> int:
        return END_ID


def make_folder(root: Path) -> Path:
    """A snapshot that passes the checks at start; nothing of it is loaded."""
    return make_snapshot(root / "snapshot")


def create(step_s: float = 0.0, load_s: float = 0.0, keep_alive_s: float | None = None, is_mute: bool = False) -> Flask:
    """:param step_s: how long a step takes. :param load_s: how long loading takes.
    :param is_mute: every answer is empty.
    :param keep_alive_s: how often a silent stream sends a comment; None: as in production.
    """

    def before_step(batch: Sequences[Sequence]) -> None:
        if bytes(batch[0].prompt_ids[:4]) == b"hang":
            threading.Event().wait()
        if any(bytes(each.prompt_ids[:4]) == b"fail" and len(each.output_ids) == 2 for each in batch):
            raise NumericError("the model gave NaN")
        time.sleep(step_s)

    settings = load_settings()
    kind = MuteRunner if is_mute else LongRunner
    names: list[ModelName] = ["avibe", "avision"] if settings.avision_model_path else ["avibe"]
    models = {name: FakeLoaded(kind(before_step if step_s else None)) for name in names}
    load = FakeLoad(models)
    if load_s:
        load.gate.clear()
        timer = threading.Timer(load_s, load.gate.set)
        timer.daemon = True
        timer.start()
    limits = settings.limits
    if keep_alive_s is not None:
        limits = replace(limits, keep_alive_interval_s=keep_alive_s, client_check_interval_s=keep_alive_s)
    service = ModelService({name: fake_snapshot(name) for name in names}, limits, load=load)
    service.start()
    return create_app(settings, service)


def create_held(pipe: str) -> Flask:
    """As `create`, but loading until somebody has written to this named pipe."""
    app = create(load_s=3600)
    gate: threading.Event = app.extensions["avito_service"]._load.gate

    def wait() -> None:
        Path(pipe).read_bytes()
        gate.set()

    threading.Thread(target=wait, daemon=True).start()
    return app
