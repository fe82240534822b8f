"""Let two models read the same text, and say at each token how far their expectations part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from workbench.data import Sample
from workbench.data.conversations import IGNORE
from workbench.errors import WorkbenchError
from workbench.models.teacher import VLM
from workbench.steps.quality.fidelity import hidden_states, token_fidelity
from workbench.steps.training.batches import collate
from workbench.steps.training.losses import divergence, head_logits


@dataclass(frozen=True)
class Token:
    """One token of an answer, and what both models expected in its place."""

    text: str
    kl_nats: float  # KL(teacher || student)
    teacher: str  # the likeliest token
    student: str
    teacher_p: float  # probability of the token that stands there
    student_p: float

    @property
    def agree(self) -> bool:
        """Whether both would have said the same."""
        return self.teacher == self.student

    def to_dict(self) -> dict:
        """Plain data for JSON."""
        return asdict(self)


def read_together(
    teacher: VLM, student: VLM, samples: Sequence[Sample]
) -> tuple[tuple[Token, ...], ...]:
    """Compare two models token by token on the answers of `samples`, which both are made to read.

    Args:
        teacher: one model.
        student: the other, with the same tokenizer.
        samples: their `answer` is what is read: a reference, or what one of the models said.

    Returns:
        The tokens of each sample's answer, the one that ends it included.

    Raises:
        WorkbenchError: there is no sample.
    """
    if not samples:
        raise WorkbenchError("There is nothing to read together: give at least one sample.")
    batch = collate(teacher, samples)
    labels, decode = batch["labels"], teacher.tokenizer.decode
    wanted = labels[:, 1:] != IGNORE
    theirs, ours = (_logits(vlm, batch, wanted) for vlm in (teacher, student))
    ids = labels[:, 1:][wanted]
    nats = divergence(ours, theirs, "forward", 1.0)
    words = [[decode([i]) for i in row.argmax(-1).tolist()] for row in (theirs, ours)]
    chances = [row.softmax(-1).gather(1, ids[:, None])[:, 0].tolist() for row in (theirs, ours)]
    said = [decode([i]) for i in ids.tolist()]
    tokens = [Token(*row) for row in zip(said, nats.tolist(), *words, *chances, strict=True)]
    answers, start = [], 0
    for count in wanted.sum(1).tolist():
        answers.append(tuple(tokens[start : start + count]))
        start += count
    return tuple(answers)


def mean_kl(teacher: VLM, student: VLM, samples: Sequence[Sample]) -> float:
    """Return the mean KL(teacher || student) over all tokens of the answers, in nats."""
    return token_fidelity(teacher, student, samples).kl


@torch.no_grad()
def _logits(vlm: VLM, batch: dict, wanted: Tensor) -> Tensor:
    """(tokens, vocab) in float32 on the CPU, where a wanted token is predicted."""
    hidden = hidden_states(vlm, batch)
    return head_logits(vlm.model, hidden[:, :-1][wanted.to(hidden.device)]).float().cpu()
