"""What only a release's own packages can say about a host: the whole configuration, models, CUDA as torch sees it.

Run by deploy.sh with the release's .venv, in its folder, as the service's user, in the service's environment, while
the release before it still answers. Prints one JSON object: `problems`, a list of sentences, and what torch is.

    python -m tools.release_check
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import keys
import logs
from config import ConfigError, Settings, load_settings
from models.errors import SnapshotError
from models.snapshots import find_snapshots


def check(settings: Settings) -> list[str]:
    """The problems with what the settings point to."""
    problems: list[str] = []
    for look in (logs.check_file, keys.open_store, check_models):
        try:
            look(settings)
        except ConfigError as error:
            problems += error.mistakes
        except SnapshotError as error:
            problems.append(str(error))
    return problems


def check_models(settings: Settings) -> None:
    """:raise SnapshotError: a model path cannot be used, or a file in it cannot be read by this user."""
    for snapshot in find_snapshots(settings).values():
        for folder in {snapshot.folder, snapshot.tokenizer_folder}:
            check_readable(folder, f"{snapshot.model.upper()}_MODEL_PATH")


def check_readable(folder: Path, setting: str) -> None:
    for file in sorted(folder.iterdir()):
        if file.is_file():
            try:
                with file.open("rb") as opened:
                    opened.read(1)
            except OSError as error:
                raise SnapshotError(f"{setting}: {file} cannot be read by the service: {error.strerror}") from None


def describe_torch(settings: Settings) -> dict[str, Any]:
    """Empty on a CPU, where there is nothing that could not fit."""
    if settings.device == "cpu":
        return {}
    import torch  # takes seconds, so only where it is needed

    return {"version": torch.__version__, "cuda": torch.version.cuda, "sees_cuda": torch.cuda.is_available()}


def main() -> int:
    report: dict[str, Any]
    try:
        settings = load_settings(env_file=None)
    except ConfigError as error:
        report = {"problems": error.mistakes, "torch": {}}
    else:
        report = {"problems": check(settings), "torch": describe_torch(settings)}
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
