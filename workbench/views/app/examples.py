"""The examples under the door: one question of each family, and one about several pictures."""

import tempfile
from functools import lru_cache
from pathlib import Path

from PIL import Image

from workbench.data import Sample, load_data


@lru_cache(maxsize=1)
def examples() -> tuple[Sample, ...]:
    """Return the first test sample of each family, a description first, several pictures last."""
    samples = load_data("pocket", split="test")
    one_each = samples[: len(samples.families)]  # the families take turns
    return tuple(sorted(one_each, key=_place))


def _place(sample: Sample) -> tuple[bool, bool]:
    return len(sample.images) > 1, sample.family != "describe"


@lru_cache(maxsize=1)
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="workbench-examples-")


def thumbnail(sample: Sample) -> Path:
    """Write a sample's first picture, 96 pixels wide, to a folder that goes when the app ends."""
    path = Path(_folder().name) / f"{sample.family}.png"
    sample.images[0].convert("RGB").resize((96, 96)).save(path)
    return path


def is_example(picture: Image.Image) -> bool:
    """Tell whether a picture is one of an example's, by its pixels."""
    return picture.tobytes() in _pixels()


@lru_cache(maxsize=1)
def _pixels() -> frozenset[bytes]:
    return frozenset(
        image.convert("RGB").tobytes() for sample in examples() for image in sample.images
    )
