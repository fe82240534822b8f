"""easy-VQA, somebody else's benchmark: 5,000 pictures of one shape and 48,248 questions.

Source: PyPI `easy-vqa` 1.0 (MIT, Victor Zhou). Answering from the question alone scores 67.8 % on
its test split, so a model below about 70 % is not looking at the picture.
"""

from __future__ import annotations

from functools import lru_cache
from random import Random

import easy_vqa
from PIL import Image, ImageOps

from workbench.data.scenes.scene import Scene, Turn
from workbench.errors import WorkbenchError

_READERS = {
    "train": (easy_vqa.get_train_questions, easy_vqa.get_train_image_paths),
    "test": (easy_vqa.get_test_questions, easy_vqa.get_test_image_paths),
}


@lru_cache
def questions(split: str) -> tuple[tuple[str, str, str], ...]:
    """(question, answer, picture path) rows in the package's own order.

    Raises:
        WorkbenchError: a split other than "train" and "test".
    """
    if split not in _READERS:
        raise WorkbenchError(f"'easy-vqa' has no split {split!r}. Choose 'train' or 'test'.")
    read_questions, read_paths = _READERS[split]
    paths = read_paths()
    return tuple((q, a, paths[i]) for q, a, i in zip(*read_questions(), strict=True))


def picture(path: str) -> Image.Image:
    """One picture as shipped: (64, 64) RGB."""
    with Image.open(path) as image:
        return image.convert("RGB")


@lru_cache
def _by_picture() -> tuple[tuple[str, tuple[Turn, ...]], ...]:
    turns: dict[str, list[Turn]] = {}
    for question, answer, path in questions("train"):
        turns.setdefault(path, []).append(Turn(question, answer))
    return tuple((path, tuple(asked)) for path, asked in turns.items())


def training_scene(rng: Random) -> Scene:
    """A training picture with all its questions in random order, mirrored at random."""
    path, turns = rng.choice(_by_picture())
    image = picture(path)
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    if rng.random() < 0.5:
        image = ImageOps.flip(image)
    return Scene((image,), tuple(rng.sample(turns, len(turns))))
