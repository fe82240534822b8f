"""The same questions to teacher and student: who is right, and where do they part?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from workbench.data import Dataset, Sample, Texts, load_data
from workbench.errors import WorkbenchError
from workbench.models.teacher import VLM
from workbench.steps.quality.evaluation import Evaluation, evaluate
from workbench.steps.quality.fidelity import Fidelity, token_fidelity
from workbench.steps.training.batches import checked_data


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
    """Two models on the same questions, or on the same texts."""

    teacher: Evaluation | None  # None for texts, which ask nothing
    student: Evaluation | None
    pairs: tuple[Pair, ...]
    names: tuple[str, str]
    fidelity: Fidelity

    @property
    def agreement(self) -> float | None:
        """Share of questions on which both reply the same words, 0..1; None for texts."""
        if not self.pairs:
            return None
        return sum(pair.agree for pair in self.pairs) / len(self.pairs)

    @property
    def kl(self) -> float:
        """KL(teacher || student), nats per answer token, each told the right answer so far."""
        return self.fidelity.kl

    @property
    def token_agreement(self) -> float:
        """Share of answer tokens at which both would say the same, 0..1."""
        return self.fidelity.token_agreement

    @property
    def perplexity(self) -> tuple[float, float]:
        """Of teacher and student on the right answers, or on the texts."""
        return self.fidelity.perplexity

    @property
    def partings(self) -> tuple[Pair, ...]:
        """The questions on which they differ."""
        return tuple(pair for pair in self.pairs if not pair.agree)

    def to_dict(self) -> dict:
        """Plain data for JSON."""
        return {
            "names": list(self.names),
            "teacher": self.teacher and self.teacher.to_dict(),
            "student": self.student and self.student.to_dict(),
            "agreement": self.agreement,
            "fidelity": self.fidelity.to_dict(),
            "partings": [asdict(pair) for pair in self.partings],
        }

    def __str__(self) -> str:
        rows = [f"{' and '.join(self.names)}: {self.fidelity}"]
        if self.pairs:
            rows.append(
                f"{self.teacher.model} {self.teacher.score:.1%},"
                f" {self.student.model} {self.student.score:.1%},"
                f" same words on {self.agreement:.1%} of {len(self.pairs)} questions"
            )
        for pair in self.partings[:5]:
            rows.append(
                f"  [{pair.family}] {pair.question} ({pair.answer})"
                f"  {pair.teacher_reply!r} / {pair.student_reply!r}"
            )
        return "\n".join(rows)


def compare(
    teacher: VLM,
    student: VLM,
    data: str | Path | Dataset | Texts | Sequence[Sample | str] = "pocket",
    *,
    split: str = "test",
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
) -> Comparison:
    """Ask both models the same questions, greedily, and compare what they foretell, token by token.

    Args:
        teacher: one model.
        student: the other.
        data: what `load_data` takes; samples of your own; or texts or strings, for which no reply
            is asked.
        split: which part of a named data set.
        limit: at most this many samples; of texts, sequences of their `context` tokens.
        seed: the world of generated samples.
        batch_size: questions answered at once.

    Returns:
        A `Comparison`: `.agreement` in 0..1, both `Evaluation`s and the `.pairs`; `.kl`,
        `.token_agreement` and `.perplexity` on the reference answers.

    Raises:
        WorkbenchError: as in `evaluate`, or the same model twice.
    """
    if teacher is student:
        raise WorkbenchError(
            "Comparing a model with itself says nothing: give teacher and student."
        )
    if isinstance(data, str | Path):
        data = load_data(data, split=split, limit=limit, seed=seed)
    data = checked_data(data)
    names, evaluations, pairs = (teacher.name, student.name), (None, None), []
    if not isinstance(data, Texts):
        options = {"limit": limit, "batch_size": batch_size}
        evaluations = tuple(evaluate(vlm, data, **options) for vlm in (teacher, student))
        pairs = [
            Pair(a.family, a.question, a.answer, a.reply, b.reply, a.score, b.score)
            for a, b in zip(*(e.records for e in evaluations), strict=True)
        ]
    fidelity = token_fidelity(teacher, student, data, limit=limit, batch_size=batch_size)
    return Comparison(*evaluations, tuple(pairs), names, fidelity)
