"""The three drawings that the page offers for trying out, and that the smoke test of `deploy.sh` asks about.

`python -m tools.train_demo_avision samples` draws them into `static/samples/`; they are no part of training.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

from tools.demo_avision.drawing import draw_scene
from tools.demo_avision.world import Scene, Tag, Thing

SAMPLES = {
    "shapes": Scene(
        336,
        240,
        "apart",
        (
            Thing("house", "red", "large", 0.24, 0.52, 0.17),
            Thing("star", "blue", "small", 0.58, 0.68, 0.09),
            Thing("heart", "pink", "large", 0.97, 0.42, 0.16),
        ),
        Tag(1250, 0.4, 0.03),
    ),
    "group": Scene(
        280,
        280,
        "group",
        (
            Thing("moon", "purple", "small", 0.2, 0.2, 0.09),
            Thing("moon", "purple", "small", 0.55, 0.3, 0.09),
            Thing("moon", "purple", "small", 0.8, 0.6, 0.09),
            Thing("moon", "purple", "small", 0.3, 0.62, 0.09),
        ),
        Tag(75, 0.06, 0.78),
    ),
    "inside": Scene(
        240,
        300,
        "inside",
        (Thing("cross", "yellow", "small", 0.45, 0.45, 0.09), Thing("circle", "blue", "large", 0.43, 0.47, 0.24)),
        Tag(399, 0.3, 0.88),
    ),
}


def draw_samples(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, scene in SAMPLES.items():
        draw_scene(scene, Random(f"sample {name}")).save(folder / f"{name}.png", optimize=True)
