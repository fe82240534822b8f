"""Align all layers once, on the teacher's own inputs, for every choice of layers that follows."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from workbench.errors import WorkbenchError
from workbench.models.families import decoder_layers
from workbench.models.plan import Plan
from workbench.models.teacher import VLM
from workbench.steps.conversion.initialization import convert
from workbench.steps.training.distillation import distill
from workbench.steps.training.loop import Stop
from workbench.steps.training.runs import StepRow
from workbench.steps.training.stages import Stage


def align(
    teacher: VLM,
    data: Iterable,
    *,
    steps: int = 100,
    init: str = "calibrated",
    calibration: Iterable | None = None,
    batch_size: int = 8,
    accumulate: int = 1,
    max_length: int | None = None,
    lr: float = 1e-3,
    seed: int = 0,
    compile_layers: bool = False,
    graph_layers: bool = False,
    bf16: bool | None = None,
    on_step: Callable[[StepRow], None] | None = None,
    stop: Stop | None = None,
) -> VLM:
    """Train a mixer for every layer to stand in for its attention, all in one pass.

    Each layer is fed what the teacher's layer is fed, so none waits for another, and the result
    serves every plan: `convert(teacher, plan, init=aligned)`, `choose_layers(teacher,
    method="greedy", donor=aligned)`.

    Args:
        teacher: the model to convert; it is not changed.
        data: what `distill` takes.
        steps: optimiser steps.
        init: how the mixers start, a key of `INITS`.
        calibration: for an init that is calibrated, as in `convert`.
        batch_size: sequences of a batch.
        accumulate: as in `distill`.
        max_length: as in `distill`.
        lr: peak learning rate.
        seed: of the start, and of the order of the samples.
        compile_layers: as in `distill`.
        graph_layers: as in `distill`.
        bf16: as in `distill`.
        on_step: called with each `StepRow`.
        stop: as in `distill`.

    Returns:
        A hybrid of all layers, "pocket-aligned".

    Raises:
        WorkbenchError: as in `convert` and `distill`, and if it was stopped.
    """
    n_layers = len(decoder_layers(teacher.model))
    plan = Plan(n_layers, tuple(range(n_layers)), "all", "aligned once, to take any layers from")
    name = f"{teacher.name}-aligned"
    donor = convert(teacher, plan, init=init, calibration=calibration, seed=seed, name=name)
    stage = Stage("align", steps, layer_weight=1.0, trains="mixers", lr=lr, lr_new=lr)
    run = distill(
        donor, teacher, data, recipe=[stage], batch_size=batch_size, accumulate=accumulate,
        max_length=max_length, seed=seed, compile_layers=compile_layers,
        graph_layers=graph_layers, bf16=bf16, on_step=on_step, stop=stop,
    )  # fmt: skip
    if run.stopped:
        raise WorkbenchError(f"The alignment was stopped after {run.steps} of {steps} steps.")
    return donor
