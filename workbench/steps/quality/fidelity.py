"""How far a student is from its teacher before anybody trains it: by layer, and by token."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.data import Texts
from workbench.data.samples import first_of
from workbench.errors import WorkbenchError
from workbench.models.cache import CACHE
from workbench.models.families import decoder_layers, text_config
from workbench.models.hybrid import mixers
from workbench.models.prompts import position_limit
from workbench.models.teacher import VLM
from workbench.steps.training.batches import Batch, checked_data, collate, ready_batch
from workbench.steps.training.losses import LOGITS_AT_ONCE, divergence, head_logits
from workbench.steps.training.objective import NO_INPUTS, places


@dataclass(frozen=True)
class LayerRow:
    """One mixer, fed what its teacher's attention is fed, against what that gives."""

    layer: int
    relative_error: float  # ||mixer - attention|| / ||attention||, over all real tokens
    cosine: float  # between the two, over all real tokens


@dataclass(frozen=True)
class LayerFit:
    """How well each mixer stands in for the attention that it replaced."""

    teacher: str
    student: str
    n_tokens: int
    rows: tuple[LayerRow, ...]

    def to_dict(self) -> dict:
        """Plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.student}'s mixers on {self.teacher}'s own inputs ({self.n_tokens:,} tokens)",
            "  layer  relative error  cosine",
        ]
        lines += [f"  {r.layer:5d}  {r.relative_error:14.3f}  {r.cosine:6.3f}" for r in self.rows]
        return "\n".join(lines)


@dataclass(frozen=True)
class Fidelity:
    """Two models' next tokens where answers stand, each told the right answer so far."""

    kl: float  # KL(teacher || student), nats per answer token
    token_agreement: float  # share of answer tokens at which both would say the same, 0..1
    teacher_nats: float  # -ln p of an answer token, the mean
    student_nats: float
    n_tokens: int

    @property
    def perplexity(self) -> tuple[float, float]:
        """Of teacher and student on the answers."""
        return math.exp(self.teacher_nats), math.exp(self.student_nats)

    def to_dict(self) -> dict:
        """Plain data for JSON."""
        return asdict(self) | {"perplexity": list(self.perplexity)}

    def __str__(self) -> str:
        theirs, ours = self.perplexity
        return (
            f"KL {self.kl:.4f} nats per answer token, same next token on "
            f"{self.token_agreement:.1%}, perplexity {theirs:.3g} and {ours:.3g} "
            f"({self.n_tokens:,} tokens)"
        )


def layer_fit(
    student: VLM,
    teacher: VLM,
    data: Iterable,
    *,
    limit: int | None = 32,
    batch_size: int = 8,
) -> LayerFit:
    """Compare each mixer with the attention that it replaced, on the teacher's own inputs.

    Args:
        student: a hybrid.
        teacher: the model that it came from.
        data: what `distill` takes.
        limit: at most this many sequences.
        batch_size: sequences read at once.

    Returns:
        A `LayerFit`; `print(fit)` is a table.

    Raises:
        WorkbenchError: a student without Mamba layers, or no data.
    """
    if not mixers(student.model):
        raise WorkbenchError(f"{student.name} has no Mamba-2 layer to look at.")
    ears = {i: _Ear(mixer) for i, mixer in mixers(student.model).items()}
    layers, n_tokens = decoder_layers(teacher.model), 0
    with ExitStack() as undo, torch.no_grad():
        for index, ear in ears.items():
            hook = layers[index].self_attn.register_forward_hook(ear, with_kwargs=True)
            undo.callback(hook.remove)
        for batch in finite_batches(teacher, data, limit=limit, batch_size=batch_size):
            real = real_tokens(batch).to(teacher.model.device)
            n_tokens += int(real.sum())
            for ear in ears.values():
                ear.real = real
            hidden_states(teacher, batch)
    return LayerFit(
        teacher.name, student.name, n_tokens, tuple(ear.row(i) for i, ear in ears.items())
    )


class _Ear:
    """Hears one attention of the teacher, has its mixer say the same, and keeps four sums."""

    def __init__(self, mixer: nn.Module) -> None:
        self.mixer, self.real, self.sums = mixer, None, torch.zeros(4, dtype=torch.float64)

    def __call__(self, attention: nn.Module, args: tuple, kwargs: dict, output: tuple) -> None:
        said, _ = self.mixer(*args, **kwargs | {CACHE: None})
        ours, theirs = said[self.real].double(), output[0][self.real].double()
        products = ((ours - theirs, ours - theirs), (ours, ours), (theirs, theirs), (ours, theirs))
        self.sums += torch.stack([(a * b).sum() for a, b in products]).cpu()

    def row(self, layer: int) -> LayerRow:
        error, ours, theirs, both = self.sums.tolist()
        return LayerRow(
            layer, math.sqrt(error / theirs), both / max(1e-30, math.sqrt(ours * theirs))
        )


def token_fidelity(
    teacher: VLM,
    student: VLM,
    data: Iterable,
    *,
    limit: int | None = None,
    batch_size: int = 8,
) -> Fidelity:
    """Compare both models' next-token distributions at the tokens of the reference answers.

    Args:
        teacher: one model.
        student: the other, which reads the same tokens.
        data: what `distill` takes; of texts, every token counts as an answer's.
        limit: at most this many sequences.
        batch_size: sequences read at once.

    Raises:
        WorkbenchError: no data, or none with an answer in it.
    """
    sums, n = torch.zeros(4, dtype=torch.float64), 0
    with torch.no_grad():
        for batch in finite_batches(teacher, data, limit=limit, batch_size=batch_size):
            where = places(batch, "answers")
            n += len(where.at)
            hidden = (hidden_states(vlm, batch) for vlm in (teacher, student))
            theirs, ours = (h.flatten(0, 1)[where.at.to(h.device)] for h in hidden)
            sums += apart(teacher, student, theirs, ours, where.labels)
    if n == 0:
        raise WorkbenchError("There is no token of an answer in this data: nothing to compare.")
    kl, same, teacher_nats, student_nats = (sums / n).tolist()
    return Fidelity(kl, same, teacher_nats, student_nats, n)


def apart(teacher: VLM, student: VLM, theirs: Tensor, ours: Tensor, labels: Tensor) -> Tensor:
    """Sums over tokens of KL, agreement, and both surprises: (4,), a chunk of tokens at a time.

    Args:
        teacher: whose head reads `theirs`.
        student: whose head reads `ours`.
        theirs: final hidden states (tokens, d_model).
        ours: of the same shape.
        labels: (tokens,), the ids that follow.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    chunk = max(64, LOGITS_AT_ONCE // text_config(student.model).vocab_size)
    for start in range(0, len(ours), chunk):
        at = slice(start, start + chunk)
        p = head_logits(teacher.model, theirs[at]).float()
        q = head_logits(student.model, ours[at]).float().to(p.device)
        following = labels[at].to(p.device)
        parts = (
            divergence(q, p, "forward", 1.0).sum(),
            (p.argmax(-1) == q.argmax(-1)).sum(),
            *(F.cross_entropy(t, following, reduction="sum") for t in (p, q)),
        )
        sums += torch.stack([part.double() for part in parts]).cpu()
    return sums


def hidden_states(vlm: VLM, batch: Batch) -> Tensor:
    """Final hidden states of a batch, (batch, seqlen, d_model)."""
    return vlm.model.base_model(**model_inputs(vlm, batch), use_cache=False).last_hidden_state


def model_inputs(vlm: VLM, batch: Batch) -> dict[str, Tensor]:
    """What of a batch a model reads, on its device."""
    return {
        name: value.to(vlm.model.device)
        for name, value in batch.items()
        if name not in NO_INPUTS and isinstance(value, Tensor)
    }


def real_tokens(batch: Batch) -> Tensor:
    """(batch, seqlen) bool, False on padding."""
    real = batch.get("real", batch.get("attention_mask"))
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if real is None else real.bool()


def finite_batches(
    vlm: VLM, data: Iterable, *, limit: int | None, batch_size: int
) -> Iterator[Batch]:
    """Batches of data in its own order, each sequence once.

    Args:
        vlm: whose processor reads the samples.
        data: samples; texts or strings; ready batches, or anything with `batch(number)`.
        limit: at most this many sequences; ready batches are not split.
        batch_size: sequences of a batch; ready batches keep their own.

    Raises:
        WorkbenchError: no data, only the name of some, or data without end and no limit; or
            batch_size is below 1.
    """
    data = checked_data(data)
    if batch_size < 1:
        raise WorkbenchError(f"batch_size must be at least 1, not {batch_size}.")
    if limit is not None and limit < 1:
        raise WorkbenchError(f"limit={limit} leaves no sequence: ask for at least 1, or None.")
    if isinstance(data, Sequence) and len(data) == 0:
        raise WorkbenchError("There is no sample to read: the data set is empty.")
    if isinstance(data, Texts):
        packed = data.batches(vlm.tokenizer, batch_size=1, most=position_limit(vlm))
        n = min(limit or len(packed.sequences), len(packed.sequences))
        rows = [packed.batch(number) for number in range(n)]
        yield from (_joined(rows[at : at + batch_size]) for at in range(0, n, batch_size))
    elif isinstance(data, Sequence) and not isinstance(data[0], Mapping):
        some = sorted(first_of(data, limit), key=lambda s: len(s.images))
        if not some:
            raise WorkbenchError("There is no sample that can be read.")
        for start in range(0, len(some), batch_size):
            yield collate(vlm, some[start : start + batch_size])
    else:
        if limit is None and not isinstance(data, Sequence):
            raise WorkbenchError("This data may have no end: say with limit= how much to read.")
        n_rows = 0
        for batch in islice(iter(data), limit):
            if limit is not None and n_rows >= limit:
                return
            yield ready_batch(vlm, batch)
            n_rows += len(batch["input_ids"])
        if n_rows == 0:
            raise WorkbenchError("There is no batch to read: the data gives none.")


def _joined(rows: list[Batch]) -> Batch:
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
