"""How many answers are right: exact match, family by family, with every answer kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from workbench.data import Dataset, Sample, Texts, load_data
from workbench.data.samples import first_of
from workbench.errors import WorkbenchError
from workbench.models.generation import answer_batch
from workbench.models.teacher import VLM


@dataclass(frozen=True)
class Record:
    """One question, the right answer, the model's reply and how right it is (0..1)."""

    family: str
    question: str
    answer: str
    reply: str
    score: float


@dataclass(frozen=True)
class Evaluation:
    """Scores of one model on one data set."""

    model: str
    data: str
    records: tuple[Record, ...]

    @property
    def by_family(self) -> dict[str, float]:
        """Mean score of each family, 0..1."""
        return {family: _mean(scores) for family, scores in self._scores().items()}

    @property
    def score(self) -> float:
        """The mean over families, each counting alike, 0..1."""
        return _mean(list(self.by_family.values()))

    @property
    def stderr(self) -> float:
        """Standard error of `score` from the spread inside the families."""
        parts = [_variance(s) / len(s) for s in self._scores().values()]
        return math.sqrt(sum(parts)) / len(parts)

    def _scores(self) -> dict[str, list[float]]:
        scores: dict[str, list[float]] = {}
        for record in self.records:
            scores.setdefault(record.family, []).append(record.score)
        return scores

    def to_dict(self) -> dict:
        """Plain data for JSON: the scores, not the records."""
        return {
            "model": self.model,
            "data": self.data,
            "n": len(self.records),
            "score": self.score,
            "stderr": self.stderr,
            "by_family": self.by_family,
        }

    def __str__(self) -> str:
        lines = [
            f"{self.model} on {self.data}: {self.score:.1%} ± {self.stderr:.1%}"
            f" (n = {len(self.records)})"
        ]
        for family, scores in self._scores().items():
            lines.append(f"  {family:<10} {_mean(scores):7.1%}  n = {len(scores)}")
        return "\n".join(lines)


def evaluate(
    vlm: VLM,
    data: str | Path | Dataset | Sequence[Sample] = "pocket",
    *,
    split: str = "test",
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    max_new_tokens: int = 96,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Ask `vlm` every question of `data`, greedily, and score the replies.

    Args:
        vlm: teacher or hybrid.
        data: what `load_data` takes ("pocket", "easy-vqa", a file), or samples of your own.
        split: which part of a named data set.
        limit: at most this many samples.
        seed: the world of generated samples.
        batch_size: questions answered at once.
        max_new_tokens: a reply ends here at the latest.
        on_progress: called with (answered, all) after each batch.

    Returns:
        An `Evaluation`: `.score` in 0..1, `.by_family`, `.records`.

    Raises:
        WorkbenchError: an unknown data set, or one without samples.
    """
    if isinstance(data, str | Path):
        data = load_data(data, split=split, limit=limit, seed=seed)
    if isinstance(data, Texts):
        raise WorkbenchError(f"{data.name} is plain text, which asks nothing: use wb.perplexity.")
    name = getattr(data, "name", "your samples")
    samples = first_of(data, limit)
    if len(samples) == 0:
        raise WorkbenchError("There is no sample to ask: the data set is empty.")
    ready = sorted(enumerate(samples), key=lambda pair: _cost(pair[1]))  # alike ones share a batch
    replies = answer_batch(
        vlm,
        [sample for _, sample in ready],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        on_progress=on_progress,
    )
    records: dict[int, Record] = {}
    for (index, s), reply in zip(ready, replies, strict=True):
        records[index] = Record(s.family, s.question, s.answer, reply, s.score(reply))
    return Evaluation(vlm.name, name, tuple(records[i] for i in range(len(samples))))


def _cost(sample: Sample) -> tuple[int, int, int]:
    """How long a prompt and its answer are: a batch takes as long as its longest.

    Questions of a sentence or two count as equally long, so that answers of one length meet.
    """
    return len(sample.images), len(sample.question) // 256, len(sample.answer)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _variance(values: Sequence[float]) -> float:
    middle = _mean(values)
    return sum((v - middle) ** 2 for v in values) / max(1, len(values) - 1)
