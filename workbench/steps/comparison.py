"""The same questions to teacher and student: who is right, and where do they part?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from workbench.data import Dataset, Sample
from workbench.errors import WorkbenchError
from workbench.models.teacher import VLM
from workbench.steps.evaluation import Evaluation, evaluate


@dataclass(frozen=True)
class Pair:
    """One question and both replies, each with its score in 0..1."""

    family: str
    question: str
    answer: str
    teacher_reply: str
    student_reply: str
    teacher_score: float
    student_score: float

    @property
    def agree(self) -> bool:
        """Whether both replied the same words."""
        return self.teacher_reply.strip() == self.student_reply.strip()


@dataclass(frozen=True)
class Comparison:
    """Two models on the same questions."""

    teacher: Evaluation
    student: Evaluation
    pairs: tuple[Pair, ...]

    @property
    def agreement(self) -> float:
        """Share of questions on which both reply the same words, 0..1."""
        return sum(pair.agree for pair in self.pairs) / len(self.pairs)

    @property
    def partings(self) -> tuple[Pair, ...]:
        """The questions on which they differ."""
        return tuple(pair for pair in self.pairs if not pair.agree)

    def to_dict(self) -> dict:
        """Plain data for JSON."""
        return {
            "teacher": self.teacher.to_dict(),
            "student": self.student.to_dict(),
            "agreement": self.agreement,
            "partings": [asdict(pair) for pair in self.partings],
        }

    def __str__(self) -> str:
        rows = [
            f"{self.teacher.model} {self.teacher.score:.1%},"
            f" {self.student.model} {self.student.score:.1%},"
            f" same words on {self.agreement:.1%} of {len(self.pairs)} questions"
        ]
        for pair in self.partings[:5]:
            rows.append(
                f"  [{pair.family}] {pair.question} ({pair.answer})"
                f"  {pair.teacher_reply!r} / {pair.student_reply!r}"
            )
        return "\n".join(rows)


def compare(
    teacher: VLM,
    student: VLM,
    data: str | Dataset | Sequence[Sample] = "pocket",
    *,
    split: str = "test",
    limit: int | None = None,
    batch_size: int = 16,
) -> Comparison:
    """Ask both models the same questions, greedily.

    Args:
        teacher: one model.
        student: the other.
        data: "pocket", "easy-vqa", or samples of your own.
        split: which part of a named data set.
        limit: at most this many samples.
        batch_size: questions answered at once.

    Returns:
        A `Comparison`: `.agreement` in 0..1, both `Evaluation`s, and the `.pairs`.

    Raises:
        WorkbenchError: as in `evaluate`, or the same model twice.
    """
    if teacher is student:
        raise WorkbenchError(
            "Comparing a model with itself says nothing: give teacher and student."
        )
    options = {"split": split, "limit": limit, "batch_size": batch_size}
    ours, theirs = (evaluate(vlm, data, **options) for vlm in (teacher, student))
    pairs = [
        Pair(a.family, a.question, a.answer, a.reply, b.reply, a.score, b.score)
        for a, b in zip(ours.records, theirs.records, strict=True)
    ]
    return Comparison(ours, theirs, tuple(pairs))
