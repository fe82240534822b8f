"""Teach the student to do what the teacher does, in stages that are data.

The losses are in `objective.py`, what a stage can ask for in `stages.py`, how a run survives in
`checkpoints.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from workbench.errors import WorkbenchError
from workbench.models.teacher import VLM
from workbench.steps.training.loop import Loop, Options, Stop
from workbench.steps.training.runs import Run, StepRow
from workbench.steps.training.stages import Stage, plan_stages

__all__ = ["Run", "Stage", "StepRow", "distill"]


def distill(
    student: VLM,
    teacher: VLM,
    data: Iterable,
    *,
    recipe: str | Sequence[Stage] = "workbench",
    steps: int | None = None,
    batch_size: int = 8,
    lr: float | None = None,
    accumulate: int = 1,
    max_length: int | None = None,
    seed: int = 0,
    compile_layers: bool = False,
    graph_layers: bool = False,
    bf16: bool | None = None,
    on_step: Callable[[StepRow], None] | None = None,
    log_every: int = 1,
    progress: bool = False,
    stop: Stop | None = None,
    folder: str | Path | None = None,
    save_every: int | None = None,
    resume: bool = False,
) -> Run:
    """Train `student` in place towards `teacher`, which is not changed.

    AdamW (betas 0.9, 0.95), gradients clipped to norm 1. Dropout stays off: it would only blur what
    the student is compared with. In several processes (`accelerate launch`) each reads its own
    batches, and gradients are means over all of them; with FSDP2 each trains a part of the student,
    which needs weights of one dtype and, should the run fail, stays as it was.

    Args:
        student: a hybrid from `convert`.
        teacher: the model that it came from, on the same device.
        data: samples, texts, strings, or ready batches: dicts with `input_ids`, `labels`, and,
            where there are, `pixel_values`, `attention_mask`, and `real`, (batch, seqlen), for
            right padding that needs no mask but is not to be counted.
        recipe: "workbench" (every layer on its own, then the whole), "matvlm" (the paper's), or a
            list of `Stage`.
        steps: optimiser steps of all stages together; None is 100 for a named recipe, and what the
            stages say for a list. Samples start over when they end.
        batch_size: samples of a batch, in each process; ready batches keep their own size.
        lr: peak learning rate instead of the recipe's; `lr_new` keeps its ratio to it.
        accumulate: batches of one step.
        max_length: tokens after which samples are cut; None is the model's own limit.
        seed: orders the samples.
        compile_layers: `torch.compile` every decoder layer (worth it for long runs on a GPU; not
            with FSDP).
        graph_layers: record every decoder layer as CUDA graphs, once a shape: small models, which
            wait for launches, train several times as fast. Takes a GPU, one process, no gradient
            checkpointing, and no other thread that waits for the whole GPU while it records.
        bf16: bfloat16 autocast, of forward and backward only; None is on a GPU, but not on a CPU,
            where it pays if the processor multiplies bfloat16 itself (AVX-512 BF16, AMX).
        on_step: called with each logged `StepRow`.
        log_every: steps between rows; each row is a mean over them.
        progress: draw a progress line.
        stop: looked at after every step: an Event that is set, or a function that returns True,
            ends the run there, as Ctrl-C does. The run is saved and says `stopped`.
        folder: where metrics.jsonl and checkpoints go; None keeps nothing.
        save_every: steps between checkpoints; None makes about ten.
        resume: go on from the last checkpoint in `folder`, if there is one.

    Returns:
        A `Run`; `print(run)` says how far the losses fell, stage by stage.

    Raises:
        WorkbenchError: a student without Mamba layers or that is its own teacher, data that is none
            or ends too early, a number out of range, a loss that is not a number or runs away (says
            at which step), a folder that holds another run, or a full disk.
    """
    if student.plan is None or not student.plan.mamba_layers:
        raise WorkbenchError(
            f"{student.name} has no Mamba-2 layer to train: convert a teacher first."
        )
    if student.model is teacher.model:
        raise WorkbenchError(f"{student.name} cannot learn from itself: give its teacher.")
    stages = plan_stages(recipe, steps, lr)
    every = max(1, sum(s.steps for s in stages) // 10) if save_every is None else save_every
    options = Options(
        batch_size, accumulate, max_length, seed, log_every, every, on_step, stop, progress
    )
    with ExitStack() as undo:
        loop = Loop(
            student, teacher, data, stages, options, undo, compile_layers, graph_layers, bf16
        )
        if folder is not None:
            loop.keep_in(folder, resume)
        return loop.run()
