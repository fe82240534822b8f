"""Teach the student to do what the teacher does: MaTVLM's two losses, normalised by tokens.

The layer loss feeds each Mamba layer the *teacher's* input and compares its output with the
teacher's; the logit loss compares what both models predict at the answers' positions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.data.conversations import IGNORE
from workbench.errors import WorkbenchError
from workbench.models.families import decoder_layers
from workbench.models.teacher import VLM
from workbench.steps.batches import Batch, as_batches


@dataclass(frozen=True)
class StepRow:
    """One optimiser step. Losses in the units of `distill`; time since the run began."""

    step: int
    loss: float
    layer_loss: float
    kl_nats: float
    lr: float
    seconds: float


@dataclass(frozen=True)
class Run:
    """What a distillation did."""

    student: str
    rows: tuple[StepRow, ...]
    n_trainable: int

    @property
    def seconds(self) -> float:
        """Wall time of the run."""
        return self.rows[-1].seconds

    def to_dict(self) -> dict:
        """Plain data for JSON."""
        rows = [asdict(row) for row in self.rows]
        return {"student": self.student, "n_trainable": self.n_trainable, "rows": rows}

    def __str__(self) -> str:
        first, last = self.rows[0], self.rows[-1]
        return (
            f"{self.student}: {last.step} steps in {self.seconds:.0f} s,"
            f" {self.n_trainable:,} parameters trained\n"
            f"  layer loss {first.layer_loss:.3f} -> {last.layer_loss:.3f},"
            f"  KL {first.kl_nats:.3f} -> {last.kl_nats:.3f} nats a token"
        )


def distill(
    student: VLM,
    teacher: VLM,
    data: Iterable,
    *,
    steps: int = 100,
    batch_size: int = 8,
    lr: float = 1e-3,
    layer_weight: float = 1.0,
    kl_weight: float = 1.0,
    seed: int = 0,
    compile_layers: bool = False,
    on_step: Callable[[StepRow], None] | None = None,
    log_every: int = 1,
) -> Run:
    """Train `student` in place towards `teacher`.

    What trains is what MaTVLM trains: the mixers and the projector. The teacher is not changed.

    Args:
        student: a hybrid from `convert`.
        teacher: the model that it came from, on the same device.
        data: samples, or ready batches: dicts with `input_ids`, `labels`, and, where there are,
            `pixel_values`, `attention_mask`, and `real`, (batch, seqlen), for right padding that
            needs no mask but is not to be counted.
        steps: optimiser steps; samples start over when they end.
        batch_size: samples a step; ready batches keep their own size.
        lr: peak learning rate of AdamW (betas 0.9, 0.95), after a warm-up over 5 % of the steps
            and before a linear decay to a tenth.
        layer_weight: of the layer loss, the mean over Mamba layers and tokens of
            ||student - teacher||_2 / sqrt(d_model).
        kl_weight: of KL(teacher || student), in nats per answer token.
        seed: orders the samples.
        compile_layers: `torch.compile` every decoder layer (worth it for long runs on a GPU).
        on_step: called with each logged `StepRow`.
        log_every: steps between rows; each row is a mean over them.

    Returns:
        A `Run`; `print(run)` says how far the losses fell.

    Raises:
        WorkbenchError: a student without Mamba layers, data that is none or ends too early, a
            number out of range, or a loss that is not a number (says at which step).

    Source: MaTVLM, arXiv 2503.13440, section 3.3; its code sums the KL over every position and
    takes one norm of the whole tensor, so that the balance drifts with length (train_hybrid.py).
    """
    _check(student, lr, {"steps": steps, "batch_size": batch_size, "log_every": log_every})
    trained = trainable_parameters(student)
    optimizer = torch.optim.AdamW(_groups(trained), lr=lr, betas=(0.9, 0.95))
    losses = _Losses(student, teacher, layer_weight, kl_weight, compile_layers)
    batches = as_batches(student, data, batch_size=batch_size, seed=seed)
    rows: list[StepRow] = []
    start, sums = time.perf_counter(), torch.zeros(3, device=student.model.device)
    student.model.train()
    try:
        for step in range(1, steps + 1):
            now = lr * _rate(step, steps)
            for group in optimizer.param_groups:
                group["lr"] = now
            total, layer, kl = losses(_next(batches, step))
            total.backward()
            nn.utils.clip_grad_norm_(trained.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            sums += torch.stack((total.detach(), layer.detach(), kl.detach()))
            if step % log_every == 0 or step == steps:
                n = (step - 1) % log_every + 1
                means = [value / n for value in sums.tolist()]
                sums.zero_()
                rows.append(StepRow(step, *means, now, time.perf_counter() - start))
                _must_be_finite(rows[-1])
                if on_step is not None:
                    on_step(rows[-1])
    finally:
        losses.close()
        student.model.eval()
    return Run(student.name, tuple(rows), sum(p.numel() for p in trained.values()))


def trainable_parameters(student: VLM) -> dict[str, nn.Parameter]:
    """Freeze everything but the mixers and the projector; returns what is left, by name.

    Source: MaTVLM trains names with "mamba" and, with `tune_mlp: true`, the connector.
    """
    layers = decoder_layers(student.model)
    mixers = {id(p) for i in student.plan.mamba_layers for p in layers[i].self_attn.parameters()}
    trained = {}
    for name, p in student.model.named_parameters():
        p.requires_grad_(id(p) in mixers or "projector" in name)
        if p.requires_grad:
            trained[name] = p
    return trained


class _Losses:
    """Both losses of one batch. Hooks keep what the teacher's layers were given and gave."""

    def __init__(
        self, student: VLM, teacher: VLM, layer_weight: float, kl_weight: float, compiled: bool
    ):
        self.student, self.teacher = student.model, teacher.model
        self.layer_weight, self.kl_weight = layer_weight, kl_weight
        self.image_token_id = getattr(self.student.config, "image_token_id", None)
        self.calls: dict[int, tuple] = {}
        self.student_layers = decoder_layers(self.student)
        layers, mamba_layers = decoder_layers(self.teacher), student.plan.mamba_layers
        self.hooks = [
            layers[i].register_forward_hook(self._keep(i), with_kwargs=True) for i in mamba_layers
        ]
        self.compiled = [*layers, *self.student_layers] if compiled else []
        for layer in self.compiled:
            layer.forward = torch.compile(layer.forward, dynamic=False)

    def _keep(self, index: int):
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            self.calls[index] = (args, kwargs, output)

        return hook

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        inputs, rows, columns, keep = self._inputs(batch)
        device = self.student.device
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            with torch.no_grad():
                target = self.teacher(**inputs, logits_to_keep=keep).logits[rows, columns]
            layer = self._layer_loss(batch.get("real", batch.get("attention_mask")))
            logits = self.student(**inputs, logits_to_keep=keep).logits[rows, columns]
        kl = F.kl_div(
            F.log_softmax(logits.float(), -1),
            F.log_softmax(target.float(), -1),
            reduction="batchmean",
            log_target=True,
        )
        return self.layer_weight * layer + self.kl_weight * kl, layer, kl

    def _layer_loss(self, real: Tensor | None) -> Tensor:
        """Each Mamba layer on the teacher's input against the teacher's output, at real tokens."""
        if real is not None:
            real = real.to(self.student.device, torch.float32, non_blocking=True)
            weight = real / real.sum()
        distances = []
        for index, (args, kwargs, output) in self.calls.items():
            got, wanted = _hidden(self.student_layers[index](*args, **kwargs)), _hidden(output)
            distance = (got.float() - wanted.float()).norm(dim=-1) / wanted.shape[-1] ** 0.5
            distances.append(distance.mean() if real is None else (distance * weight).sum())
        self.calls.clear()
        return torch.stack(distances).mean()

    def _inputs(self, batch: Batch) -> tuple[dict, Tensor, Tensor, int]:
        """Model inputs on the device, and where the tokens are that predict an answer's token.

        Only the last `keep` positions get logits; `rows`, `columns` index them. All of it is found
        on the CPU, so that the GPU is never waited for.
        """
        device = self.student.device
        rows, columns = (batch["labels"][:, 1:] != IGNORE).nonzero(as_tuple=True)
        first = int(columns.min())
        keep = batch["labels"].shape[1] - first
        names = ("input_ids", "attention_mask", "pixel_values")
        inputs = {k: batch[k].to(device, non_blocking=True) for k in names if k in batch}
        return (
            inputs | {"use_cache": False},
            rows.to(device, non_blocking=True),
            (columns - first).to(device, non_blocking=True),
            keep,
        )

    def close(self) -> None:
        """Take the hooks and compiled forwards off again."""
        for hook in self.hooks:
            hook.remove()
        for layer in self.compiled:
            del layer.forward


def _hidden(output: Tensor | tuple) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _groups(trained: Mapping[str, nn.Parameter]) -> list[dict]:
    """Weight decay for matrices only: never for decays, steps, norms, convolutions and biases."""
    matrices = [p for p in trained.values() if p.ndim == 2]
    others = [p for p in trained.values() if p.ndim != 2]
    return [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]


def _rate(step: int, steps: int) -> float:
    warmup = max(1, steps // 20)
    return min(step / warmup, 1 - 0.9 * max(0, step - warmup) / max(1, steps - warmup))


def _next(batches: Iterator[Batch], step: int) -> Batch:
    try:
        return next(batches)
    except StopIteration:
        raise WorkbenchError(
            f"The data ended before step {step}: give more batches, or ask for fewer steps."
        ) from None


def _check(student: VLM, lr: float, counts: Mapping[str, int]) -> None:
    if student.plan is None or not student.plan.mamba_layers:
        raise WorkbenchError(
            f"{student.name} has no Mamba-2 layer to train: convert a teacher first."
        )
    for name, count in counts.items():
        if count < 1:
            raise WorkbenchError(f"{name}={count} trains nothing: ask for at least 1.")
    if not (math.isfinite(lr) and lr > 0):
        raise WorkbenchError(f"lr={lr} is no learning rate: choose one above 0, such as 1e-3.")


def _must_be_finite(row: StepRow) -> None:
    if not math.isfinite(row.loss):
        raise WorkbenchError(
            f"The loss is {row.loss} at step {row.step} (lr {row.lr:.1e}): lower the learning rate."
        )
