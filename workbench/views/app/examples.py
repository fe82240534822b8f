"""The examples under the door: a question of each family, or for a language model plain ones."""

import tempfile
from functools import lru_cache
from pathlib import Path

from PIL import Image

from workbench.data import Sample, load_data

# What a small language model can be asked, under the word on its button.
TEXT_QUESTIONS = {
    "explain": "Explain in two sentences why the sky is blue.",
    "fact": "What is the capital of France?",
    "story": "Write a short story about a robot who learns to paint.",
    "tips": "Give me three tips for sleeping better.",
    "recipe": "How do I make pancakes?",
    "letter": "Write a short letter to a friend who has moved to another city.",
    "compare": "What is the difference between a river and a lake?",
    "code": "Write a Python function that adds two numbers.",
}


@lru_cache(maxsize=2)
def examples(pictures: bool = True) -> tuple[Sample, ...]:
    """Return one sample of each family, a description first, several pictures last.

    Args:
        pictures: False gives questions without pictures, which have no right answer.
    """
    if not pictures:
        return tuple(Sample((), asked, "", name) for name, asked in TEXT_QUESTIONS.items())
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
