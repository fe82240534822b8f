"""Samples, and the data sets that ship with the workbench."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from PIL import Image

from workbench.data import easy_vqa
from workbench.data.scenes import FAMILIES, SPLITS, UNSEEN_FAMILIES, Scene, make_scene, share_right
from workbench.data.scenes.scene import Fact
from workbench.data.text import SUFFIXES, Texts, load_texts
from workbench.errors import WorkbenchError

HUB = "hub:"
SAMPLES_PER_FAMILY = {"train": 10_000, "test": 250, "unseen": 250}


@dataclass(frozen=True)
class Sample:
    """A question about some pictures, and the answer that counts as right.

    `more` are the turns of the conversation that follow, (question, answer): training reads them.
    """

    images: tuple[Image.Image, ...]
    question: str
    answer: str
    family: str
    facts: tuple[Fact, ...] | None = None
    more: tuple[tuple[str, str], ...] = ()

    def score(self, reply: str) -> float:
        """How right `reply` is, in 0..1: exact match, or the share of facts where there are facts.

        Case, outer spaces and a final full stop do not count.
        """
        if self.facts is not None:
            return share_right(reply.lower(), self.facts)
        return float(_plain(reply) == _plain(self.answer))


class Dataset(Sequence[Sample]):
    """A sequence of samples, made when they are asked for, the same at every call.

    The families take turns, so that any `limit` holds a fair share of each.
    """

    def __init__(self, name: str, families: Sequence[str], make: Callable[[int], Sample], n: int):
        self.name, self.families, self._make, self._n = name, tuple(families), make, n

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._n))]
        if not -self._n <= index < self._n:
            raise IndexError(index)
        return self._make(index % self._n)

    def __str__(self) -> str:
        return f"{self.name}: {self._n:,} samples of {', '.join(self.families)}"


def first_of(data: Sequence[Sample], limit: int | None = None) -> list[Sample]:
    """The first `limit` samples, or all; a slice may be shorter where some cannot be read."""
    wanted, found, at = len(data) if limit is None else limit, [], 0
    while len(found) < wanted and at < len(data):
        end = at + wanted - len(found)
        found += data[at:end]
        at = end
    return found


def load_data(
    name: str | Path = "pocket",
    *,
    split: str = "test",
    limit: int | None = None,
    seed: int = 0,
    images: str | Path | None = None,
    length: int | Sequence[int] | None = None,
) -> Dataset | Texts:
    """A data set by name, or from a file.

    Args:
        name: "pocket" (generated graphics, eight families); "easy-vqa" (the PyPI package);
            "recall" (for language models: a number that was told a while ago); the path of a .json
            file of LLaVA-style conversations; the path of a .txt or .jsonl file of texts
            or of a folder with such files, which have no splits; or "hub:NAME", a data set of the
            Hugging Face hub, which needs the package `datasets`.
        split: "train", "test", or for "pocket" also "unseen": drawings, flags and words that no
            model of the workbench was ever trained on.
        limit: at most this many samples; None for all.
        seed: another world of generated scenes; what is not generated is shuffled by it.
        images: the folder of a .json file's pictures; None is where the file is.
        length: of the prompts of "recall", in tokens, roughly; one or several.

    Returns:
        A `Dataset`, whose samples are made lazily, or `Texts`.

    Raises:
        WorkbenchError: an unknown name or split, or a limit below 1.
    """
    if limit is not None and limit < 1:
        raise WorkbenchError(
            f"limit={limit} leaves no sample: ask for at least 1, or None for all."
        )
    if name == "pocket":
        return _pocket(split, limit, seed)
    if name == "easy-vqa":
        return _easy_vqa(split, limit, seed)
    if name == "recall":
        from workbench.data.recall import LENGTHS, load_recall

        lengths = (length,) if isinstance(length, int) else tuple(length or LENGTHS)
        return load_recall(lengths=lengths, limit=limit or 100, seed=seed)
    if str(name).startswith(HUB):
        from workbench.data.hub import load_hub

        return load_hub(str(name).removeprefix(HUB), split=split, limit=limit, seed=seed)
    path = Path(name).expanduser()
    if path.suffix == ".json":
        from workbench.data.conversations_json import load_conversations

        return load_conversations(name, images=images, limit=limit, seed=seed)
    if path.is_dir() or path.suffix in SUFFIXES:
        return load_texts(path, limit=limit)
    raise WorkbenchError(
        f"There is no data set named {str(name)!r}. Choose 'pocket', 'easy-vqa' or 'recall', or "
        f"give a .json file of conversations, a .txt or .jsonl file, or {HUB}NAME for one of the "
        "hub."
    )


def sample_from(scene: Scene, turn: int, family: str) -> Sample:
    """The sample that asks `scene` its question number `turn`."""
    chosen = scene.turns[turn]
    return Sample(scene.images, chosen.question, chosen.answer, family, chosen.facts)


def _pocket(split: str, limit: int | None, seed: int) -> Dataset:
    if split not in SPLITS:
        raise WorkbenchError(f"'pocket' has no split {split!r}. Choose one of {', '.join(SPLITS)}.")
    families = UNSEEN_FAMILIES if split == "unseen" else tuple(FAMILIES)

    def make(index: int) -> Sample:
        number, which = divmod(index, len(families))
        family = families[which]
        scene = make_scene(family, split, number, seed)
        turn = 0 if family == "describe" else _asked(family, scene, split, number, seed)
        return sample_from(scene, turn, family)

    n = SAMPLES_PER_FAMILY[split] * len(families)
    return Dataset(f"pocket/{split}", families, make, n if limit is None else min(limit, n))


def _asked(family: str, scene: Scene, split: str, number: int, seed: int) -> int:
    """Which question of the scene: the word itself for `word`, any of them elsewhere."""
    if family == "word":
        return 0
    return Random(f"{seed}/{split}/{family}/{number}/turn").randrange(len(scene.turns))


def _easy_vqa(split: str, limit: int | None, seed: int) -> Dataset:
    rows = list(easy_vqa.questions(split))
    Random(seed).shuffle(rows)

    def make(index: int) -> Sample:
        question, answer, path = rows[index]
        return Sample((easy_vqa.picture(path),), question, answer, "easy-vqa")

    n = len(rows) if limit is None else min(limit, len(rows))
    return Dataset(f"easy-vqa/{split}", ("easy-vqa",), make, n)


def _plain(text: str) -> str:
    return text.strip().rstrip(".").strip().lower()
