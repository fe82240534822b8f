"""The generator: one function a question family, each `(rng, unseen) -> Scene`."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from workbench.data.scenes.charts import chart_scene
from workbench.data.scenes.flags import flag_scene
from workbench.data.scenes.objects import count_scene, grid_scene, name_scene
from workbench.data.scenes.reading import letters_scene, word_scene
from workbench.data.scenes.scene import SPLITS, Scene, Turn
from workbench.data.scenes.several import several_scene
from workbench.data.scenes.shapes import describe_scene, share_right

FAMILIES: dict[str, Callable[[Random, bool], Scene]] = {
    "name": name_scene,
    "grid": grid_scene,
    "count": count_scene,
    "flag": flag_scene,
    "word": word_scene,
    "chart": chart_scene,
    "describe": describe_scene,
    "several": several_scene,
}
TRAIN_ONLY = {"letters": letters_scene}
UNSEEN_FAMILIES = ("name", "grid", "count", "flag", "word", "several")


def make_scene(family: str, split: str, index: int, seed: int = 0) -> Scene:
    """The scene that (family, split, index, seed) names, always the same one.

    Args:
        family: a key of `FAMILIES` or `TRAIN_ONLY`.
        split: "train", "test" (same drawings, other scenes) or "unseen" (held-out drawings).
        index: which scene, >= 0.
        seed: which world of scenes.
    """
    rng = Random(f"{seed}/{split}/{family}/{index}")
    return (FAMILIES | TRAIN_ONLY)[family](rng, split == "unseen")


__all__ = [
    "FAMILIES", "SPLITS", "TRAIN_ONLY", "UNSEEN_FAMILIES", "Scene", "Turn", "make_scene",
    "share_right",
]  # fmt: skip
