"""Memory over many different pictures: a tiny random Avision, the whole application, every picture new.

Host memory must stay flat (peers grew with every new picture). Prints resident memory as it goes.
"""

from __future__ import annotations

import argparse
import io
import random
import tempfile
from pathlib import Path

import psutil
from PIL import Image

from app_production import create_app, make_service
from config import Settings
from tests.tiny_models import make_vision_snapshot


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pictures", type=int, default=10_000, help="how many different pictures (default 10000)")


def run(arguments: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = str(make_vision_snapshot(Path(folder)))
        settings = Settings.model_validate({"AVISION_MODEL_PATH": path, "AVITO_RATE_LIMIT": "", "AVITO_DEVICE": "cpu"})
        service = make_service(settings)
        service.start()
        service.wait_loaded(120)
        client = create_app(settings, service).test_client()
        dice = random.Random(0)
        readings: list[float] = []
        for number in range(arguments.pictures):
            data = {
                "prompt": "what?",
                "max_tokens": "1",
                "image": (io.BytesIO(_picture(dice)), "x.png", "image/png"),
            }
            response = client.post(
                "/api/v1/image/analyze", data=data, content_type="multipart/form-data", buffered=True
            )
            if response.status_code != 200:
                raise RuntimeError(response.get_data(as_text=True))
            if (number + 1) % max(1, arguments.pictures // 10) == 0:
                readings.append(psutil.Process().memory_info().rss / 1e6)
                print(f"{number + 1:>6} pictures  {readings[-1]:>8.1f} MB resident", flush=True)
        print(f"growth from the second to the last tenth: {readings[-1] - readings[1]:+.1f} MB")
        service.stop(30)
    return 0


def _picture(dice: random.Random) -> bytes:
    width, height = dice.randrange(28, 160), dice.randrange(28, 160)
    file = io.BytesIO()
    Image.frombytes("RGB", (width, height), dice.randbytes(width * height * 3)).save(file, "PNG", compress_level=1)
    return file.getvalue()
