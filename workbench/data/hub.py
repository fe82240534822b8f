"""Data sets of the Hugging Face hub as samples, where the package `datasets` is installed."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from PIL import Image

from workbench.data.samples import Dataset, Sample
from workbench.data.turns import read_turns
from workbench.errors import WorkbenchError


def load_hub(
    name: str, *, split: str = "train", limit: int | None = None, seed: int | None = None
) -> Dataset:
    """A data set of the hub, or of a folder that `datasets` reads.

    Its columns are read by name: `image` or `images`; and `conversations` or `messages`, or else
    `question` with `answer`, `answers` or `multiple_choice_answer`.

    Args:
        name: such as "HuggingFaceM4/ChartQA".
        split: such as "train" or "validation".
        limit: at most this many; None for all.
        seed: shuffles them before that; None keeps their order.

    Raises:
        WorkbenchError: `datasets` is not installed, there is no such data set, or its columns are
            others.
    """
    try:
        library = importlib.import_module("datasets")
    except ImportError as error:
        raise WorkbenchError(
            f"To read {name!r} from the hub, the package datasets is needed: pip install datasets."
        ) from error
    try:
        rows = library.load_dataset(name, split=split)
    except Exception as error:  # whatever the library, the hub or the network raises
        reason = " ".join(str(error).split())[:300]
        raise WorkbenchError(f"The data set {name!r} ({split}) cannot be read: {reason}") from error
    if seed is not None:
        rows = rows.shuffle(seed=seed)
    n = len(rows) if limit is None else min(limit, len(rows))
    if n:
        _sample(rows[0], name)  # tells wrong columns at once
    return Dataset(f"{name}/{split}", (name,), lambda index: _sample(rows[index], name), n)


def _sample(row: Mapping, name: str) -> Sample:
    images = row.get("images", row.get("image"))
    images = images if isinstance(images, list) else [] if images is None else [images]
    if not all(isinstance(image, Image.Image) for image in images):
        raise WorkbenchError(f"The pictures of {name!r} are no pictures but {type(images[0])}.")
    talk = row.get("conversations", row.get("messages"))
    answer = next((row[k] for k in ("answer", "multiple_choice_answer", "answers") if k in row), "")
    answer = answer[0] if isinstance(answer, list) and answer else answer
    if talk is not None:
        (question, answer), *more = read_turns(talk)
    elif row.get("question") and answer:
        question, more = str(row["question"]), ()
    else:
        raise WorkbenchError(
            f"The columns of {name!r} are {', '.join(row)}: there are no conversations, "
            "and no question with an answer."
        )
    pictures = tuple(image.convert("RGB") for image in images)
    return Sample(pictures, question, str(answer), name, more=tuple(more))
