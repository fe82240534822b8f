"""Stages as data: what a stretch of training minimises, what it trains, and how fast."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral, Real

from torch import nn

from workbench.errors import WorkbenchError
from workbench.models.families import decoder_layers
from workbench.models.hybrid import mixers
from workbench.models.teacher import VLM
from workbench.steps.training.losses import KL_KINDS

TRAINS = ("mixers", "mixers+projector", "mixers+projector+ffn", "all", "all+vision")
LAYER_KINDS = ("relative", "norm")
TOKENS = ("answers", "all")
# Modules between picture and language model, and towers, by any part of a parameter's name.
PROJECTORS = ("projector", "connector", "merger")
TOWERS = ("vision", "visual")
# What a value may be, and what it becomes, by the annotation of its field.
KINDS = {"str": (str, str), "int": (Integral, int), "float": (Real, float)}


@dataclass(frozen=True)
class Stage:
    """A stretch of training.

    Args:
        name: what rows and curves call it.
        steps: optimiser steps.
        layer_weight: of the layer loss: each Mamba layer is fed the teacher's input and compared
            with the teacher's output, at every real position; the mean over layers.
        layer_kind: "norm" is MaTVLM's, per token: ||student - teacher||_2 / sqrt(d_model).
            "relative" is ||student - teacher||^2 over ||what the teacher's layer added||^2, both
            summed over a batch's tokens: 1 is a layer that adds nothing, whatever its scale.
        kl_weight: of the divergence between both models' next-token distributions.
        kl_kind: "forward", "reverse" or "js"; `losses.divergence` says what they are.
        temperature: of the divergence, which is multiplied by its square.
        ce_weight: of the cross-entropy with the labels, in nats per answer token.
        hidden_weight: of the final hidden states, at every real position: ||student - teacher||^2
            over ||teacher||^2, both summed over a batch's tokens (TinyBERT, arXiv 1909.10351,
            takes the squares as they are, of every layer).
        lr: peak learning rate of what was there before: q, k, v, o, projector, FFN.
        lr_new: peak learning rate of what Mamba-2 brought: z, dt, conv, A_log, dt_bias, D, norm.
        tokens: where the divergence is taken: "answers", the positions that predict an answer's
            token, or "all", every real position that predicts a real token.
        trains: "mixers", "mixers+projector" (the paper's), "mixers+projector+ffn" (the rest of the
            Mamba layers too), "all" (all but the vision tower), or "all+vision".

    Raises:
        WorkbenchError: a value of another kind, a choice that does not exist, or a number out of
            range.
    """

    name: str
    steps: int
    layer_weight: float = 0.0
    layer_kind: str = "relative"
    kl_weight: float = 0.0
    kl_kind: str = "forward"
    temperature: float = 1.0
    ce_weight: float = 0.0
    hidden_weight: float = 0.0
    lr: float = 1e-3
    lr_new: float = 1e-3
    tokens: str = "answers"
    trains: str = "mixers+projector"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            kind, plain = KINDS[field.type]
            if not isinstance(value, kind) or isinstance(value, bool):
                raise WorkbenchError(
                    f"A stage has {field.name}={value!r}: it must be of kind {field.type}."
                )
            if not isinstance(value, int | float | str):  # numpy's numbers are no JSON
                object.__setattr__(self, field.name, plain(value))
        choices = {
            "layer_kind": LAYER_KINDS, "kl_kind": KL_KINDS, "tokens": TOKENS, "trains": TRAINS,
        }  # fmt: skip
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise WorkbenchError(
                    f"{name}={getattr(self, name)!r} does not exist: choose {' or '.join(known)}."
                )
        if self.steps < 1:
            raise WorkbenchError(f"steps={self.steps} trains nothing: ask for at least 1.")
        for name in ("lr", "lr_new", "temperature"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                what = "temperature" if name == "temperature" else "learning rate"
                raise WorkbenchError(f"{name}={value} is no {what}: choose one above 0.")
        weights = (self.layer_weight, self.kl_weight, self.ce_weight, self.hidden_weight)
        if not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
            raise WorkbenchError(
                f"The stage {self.name!r} has the weights {weights} for layers, KL, CE and hidden: "
                "give at least one above 0, and none below."
            )

    @property
    def reads_logits(self) -> bool:
        """Whether the student's own forward and the heads run at all."""
        return bool(self.kl_weight or self.ce_weight or self.hidden_weight)

    def to_dict(self) -> dict:
        """Plain data for JSON."""
        return asdict(self)

    def rate(self, step: int) -> float:
        """Factor of both learning rates at a step from 1: warm-up, then down to zero."""
        warmup = max(1, self.steps // 20)
        return min(step / warmup, (self.steps + 1 - step) / (self.steps + 1 - warmup))


# Recipes by name, for 100 steps; `plan_stages` scales them.
RECIPES: dict[str, tuple[Stage, ...]] = {
    # arXiv 2503.13440, section 3.3, both losses at once; its code sums the KL over every position
    # and takes one norm of the whole tensor, so that the balance drifts with length.
    "matvlm": (Stage("matvlm", 100, layer_weight=1.0, layer_kind="norm", kl_weight=1.0),),
    # First every layer on its own, which needs neither the student's forward nor any logits; then
    # the whole (MOHAWK, arXiv 2408.10189; RADLADS, arXiv 2505.03005).
    "workbench": (
        Stage("align", 30, layer_weight=1.0, trains="mixers"),
        Stage("distill", 70, kl_weight=1.0, temperature=2.0, hidden_weight=16.0),
    ),
}


def plan_stages(
    recipe: str | Sequence[Stage], steps: int | None = None, lr: float | None = None
) -> tuple[Stage, ...]:
    """Turn a recipe into its stages.

    Args:
        recipe: a key of `RECIPES`, or stages.
        steps: of all stages together, which keep their shares; None keeps them as they are.
        lr: a peak learning rate for all stages; each stage's `lr_new` keeps its ratio to it.

    Raises:
        WorkbenchError: an unknown recipe, none at all, or a number out of range.
    """
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            known = ", ".join(RECIPES)
            raise WorkbenchError(f"There is no recipe {recipe!r}: choose {known}, or give stages.")
        recipe = RECIPES[recipe]
    stages = tuple(recipe)
    if not stages or not all(isinstance(stage, Stage) for stage in stages):
        raise WorkbenchError("A recipe is a name or a list of Stage, with at least one in it.")
    if steps is not None:
        stages = _scaled(stages, steps)
    if lr is not None:
        stages = tuple(replace(s, lr=lr, lr_new=lr * s.lr_new / s.lr) for s in stages)
    return stages


def stage_from_dict(values: Mapping) -> Stage:
    """Read a stage from plain data.

    Raises:
        WorkbenchError: no keys at all, one that a stage does not have, or one that is missing.
    """
    if not isinstance(values, Mapping):
        raise WorkbenchError(f"A stage is an object with keys, not {values!r}.")
    known = [field.name for field in fields(Stage)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise WorkbenchError(f"A stage has no {unknown[0]!r}; it has {', '.join(known)}.")
    missing = [name for name in ("name", "steps") if name not in values]
    if missing:
        raise WorkbenchError(f"A stage needs {' and '.join(missing)}.")
    return Stage(**values)


def _scaled(stages: tuple[Stage, ...], steps: int) -> tuple[Stage, ...]:
    if steps < 1:
        raise WorkbenchError(f"steps={steps} trains nothing: ask for at least 1.")
    whole, done, so_far, scaled = sum(s.steps for s in stages), 0, 0, []
    for stage in stages:
        so_far += stage.steps
        upto = round(steps * so_far / whole)
        if upto > done:
            scaled.append(replace(stage, steps=upto - done))
        done = max(done, upto)
    return tuple(scaled)


def trained_parameters(student: VLM, trains: str) -> dict[str, nn.Parameter]:
    """Return, by name, the parameters that `trains` stands for; nothing is changed.

    Source: MaTVLM trains names with "mamba" and, with `tune_mlp: true`, the connector.
    """
    layers, own = decoder_layers(student.model), mixers(student.model)
    mixing = {id(p) for mixer in own.values() for p in mixer.parameters()}
    changed = {id(p) for i in own for p in layers[i].parameters()}

    def wanted(name: str, p: nn.Parameter) -> bool:
        projects = any(part in name for part in PROJECTORS)
        sees = any(part in name for part in TOWERS) and not projects
        if trains.startswith("all"):
            return trains == "all+vision" or not sees
        return (
            id(p) in mixing
            or ("projector" in trains and projects)
            or ("ffn" in trains and id(p) in changed)
        )

    return {n: p for n, p in student.model.named_parameters() if wanted(n, p)}


def reads_pictures(name: str) -> bool:
    """Whether a parameter of this name has no part in a step without pictures."""
    return any(part in name for part in (*PROJECTORS, *TOWERS))


def parameter_groups(student: VLM, trained: dict[str, nn.Parameter], stage: Stage) -> list[dict]:
    """Groups for AdamW, each with its peak rate as `peak`: old and new, matrices and the rest.

    Weight decay is for matrices only: never for decays, steps, norms, convolutions and biases.
    """
    new = set()
    for mixer in mixers(student.model).values():
        for name, p in mixer.named_parameters():
            if name.partition(".")[0] not in mixer.names.all():
                new.add(id(p))
    groups = []
    for peak, is_new in ((stage.lr, False), (stage.lr_new, True)):
        for decay, is_matrix in ((0.01, True), (0.0, False)):
            params = [
                p for p in trained.values()
                if (id(p) in new) == is_new and (p.ndim == 2) == is_matrix
            ]  # fmt: skip
            if params:
                groups.append({"params": params, "weight_decay": decay, "peak": peak, "lr": peak})
    return groups
