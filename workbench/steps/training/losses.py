"""How far two distributions over the vocabulary are apart, without ever holding many of them.

Logits of all tokens are the largest tensor of a step: 8 x 1024 tokens of a vocabulary of 49,152
are 1.6 GB, and a KL between two models needs half a dozen of them. Here both models' final hidden
states are picked at the wanted positions first; then a chunk of tokens at a time gets its logits,
its loss and its gradient, and leaves only the gradient of the hidden states behind.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from workbench.data.conversations import IGNORE
from workbench.models.families import text_config

KL_KINDS = ("forward", "reverse", "js")
LOGITS_AT_ONCE = 2**25  # elements of one chunk's logits: 134 MB in float32


class Divergence(NamedTuple):
    """How `divergence` is taken, and what each token of it weighs."""

    weight: Tensor | float
    kind: str = "forward"
    temperature: float = 1.0


class TokenLosses(NamedTuple):
    """Sums over tokens: what is to be minimised, weighted, and its two parts, unweighted, in nats.

    Only `total` has a gradient; a part that is left out is 0.
    """

    total: Tensor
    kl: Tensor
    ce: Tensor


def head_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Turn final hidden states (..., d_model) into logits (..., vocab), as `model(...)` does."""
    logits, config = model.get_output_embeddings()(hidden), text_config(model)
    factor, divisor, cap = (
        getattr(config, name, None) if _reads(type(model), name) else None
        # of cohere2; of granite; of gemma2, gemma3 and paligemma
        for name in ("logit_scale", "logits_scaling", "final_logit_softcapping")
    )
    if factor is not None:
        logits = logits * factor
    if divisor is not None:
        logits = logits / divisor
    return logits if cap is None else torch.tanh(logits / cap) * cap


@functools.cache
def _reads(model_class: type[PreTrainedModel], name: str) -> bool:
    """Whether a model's forward reads a setting: one around another's decoder may not."""
    return name in inspect.getsource(inspect.unwrap(model_class.forward))


def divergence(student: Tensor, teacher: Tensor, kind: str, temperature: float) -> Tensor:
    """How far the student's logits (tokens, vocab) are from the teacher's, (tokens,) in nats.

    Args:
        student: logits.
        teacher: logits of the same shape.
        kind: "forward" is KL(teacher || student), which covers all that the teacher may say;
            "reverse" is KL(student || teacher), which keeps to what the teacher would say; "js" is
            the mean KL of both to their mixture, at most log 2.
        temperature: divides the logits; the result is multiplied by its square, so that gradients
            keep their size (Hinton et al., arXiv 1503.02531).
    """
    student, teacher = student.float(), teacher.float()
    if temperature != 1:
        student, teacher = student / temperature, teacher / temperature
    log_q, log_p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    if kind == "forward":
        nats = _kl(log_p, log_q)
    elif kind == "reverse":
        nats = _kl(log_q, log_p)
    else:
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        nats = (_kl(log_p, log_m) + _kl(log_q, log_m)) / 2
    return temperature**2 * nats


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def token_losses(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    hidden: tuple[Tensor, Tensor],
    labels: Tensor,
    *,
    kl: Divergence | None,
    ce: Tensor | float | None,
    apart: Callable[[Tensor, Tensor, str, float], Tensor] = divergence,
) -> TokenLosses:
    """Weighted divergence and cross-entropy, summed over tokens, a chunk of tokens at a time.

    Args:
        student: whose head reads the first hidden states.
        teacher: whose head reads the second ones.
        hidden: of student and teacher, each (tokens, d_model), where a wanted token is predicted.
        labels: (tokens,), the id that follows, or `IGNORE`; read by the cross-entropy.
        kl: how the divergence is taken and what a token of it weighs; None leaves it out.
        ce: what a token of the cross-entropy weighs; None leaves it out.
        apart: `divergence`, or that compiled.
    """
    ours, theirs = hidden

    def of_chunk(at: slice, piece: Tensor) -> tuple[Tensor, Tensor]:
        logits = head_logits(student, piece)
        total, nats, surprise = logits.new_zeros(3, dtype=torch.float32)
        if kl is not None:
            with torch.no_grad():
                target = head_logits(teacher, theirs[at])
            nats = apart(logits, target, kl.kind, kl.temperature).sum()
            total = total + kl.weight * nats
        if ce is not None:
            surprise = F.cross_entropy(
                logits.float(), labels[at], ignore_index=IGNORE, reduction="sum"
            )
            total = total + ce * surprise
        return total, torch.stack((nats, surprise)).detach()

    head = student.get_output_embeddings()
    chunk = max(64, LOGITS_AT_ONCE // text_config(student).vocab_size)
    weights = [p for p in head.parameters() if p.requires_grad]
    total, parts = _InChunks.apply(of_chunk, chunk, ours, *weights)
    return TokenLosses(total, *parts)


class _InChunks(torch.autograd.Function):
    """Sum a loss over chunks of rows and take each chunk's gradient at once.

    Recomputing in the backward pass would save the same memory, but run both heads twice.
    """

    @staticmethod
    def forward(
        ctx: Any, of_chunk: Callable, chunk: int, rows: Tensor, *weights: nn.Parameter
    ) -> tuple[Tensor, Tensor]:
        wanted = any(ctx.needs_input_grad)
        total, parts = (torch.zeros(n, device=rows.device) for n in ((), 2))
        slope = torch.empty_like(rows) if wanted else None
        slopes = [torch.zeros_like(w) for w in weights] if wanted else []
        for start in range(0, len(rows), chunk):
            at = slice(start, start + chunk)
            with torch.set_grad_enabled(wanted):
                piece = rows[at].detach().requires_grad_(wanted)
                value, part = of_chunk(at, piece)
            if wanted:
                slope[at], *found = torch.autograd.grad(value, (piece, *weights))
                for sum_, one in zip(slopes, found, strict=True):
                    sum_ += one
            total += value.detach()
            parts += part
        ctx.slopes = (slope, *slopes)
        ctx.mark_non_differentiable(parts)
        return total, parts

    @staticmethod
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple:
        return (None, None, *((scale * slope).to(slope.dtype) for slope in ctx.slopes))


def at_once(loss: Callable[[], Tensor], parameters: Iterable[nn.Parameter]) -> Tensor:
    """Compute a scalar loss, and its gradient with it: nothing else of its graph is kept.

    Args:
        loss: computes it.
        parameters: all that it depends on and that may train.
    """
    return _AtOnce.apply(loss, *(p for p in parameters if p.requires_grad))


class _AtOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Callable[[], Tensor], *weights: nn.Parameter) -> Tensor:
        wanted = any(ctx.needs_input_grad)
        with torch.set_grad_enabled(wanted):
            value = loss()
        found = torch.autograd.grad(value, weights, allow_unused=True) if wanted else ()
        ctx.slopes = found
        return value.detach()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple:
        return (None, *(None if s is None else (scale * s).to(s.dtype) for s in ctx.slopes))
