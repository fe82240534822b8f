"""How many steps of a recipe fit into so many seconds, on the machine that will run them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence

import workbench as wb

WARM_UP, TIMED = 12, 16  # steps of each stage; every shape of batch must come up in the first ones
LEAST = 20  # steps of each stage; a hybrid of fewer is not worth keeping


def steps_in(
    seconds: float,
    stages: Sequence[wb.Stage],
    start: Callable[[], wb.VLM],
    train: Callable[..., wb.Run],
) -> int:
    """Train a throw-away student, stage by stage, and see how long a step takes.

    Args:
        seconds: for everything, the throw-away student included.
        stages: of the recipe that will run.
        start: makes a student.
        train: `wb.distill` with all but the student, `recipe`, `steps` and `log_every` given.

    Returns:
        Steps of all stages together, at least `LEAST` for each.

    Raises:
        WorkbenchError: compiling and timing left too few seconds for that.
    """
    began, step_seconds = time.perf_counter(), 0.0
    student, whole = start(), sum(stage.steps for stage in stages)
    for stage in stages:
        rows = train(student, recipe=[stage], steps=WARM_UP + TIMED, log_every=WARM_UP).rows
        one = (rows[-1].seconds - rows[0].seconds) / TIMED
        print(f"{student.name} {stage.name}: {1e3 * one:.0f} ms a step", flush=True)
        step_seconds += one * stage.steps / whole
    spent = time.perf_counter() - began
    steps = max(0, int((seconds - spent) / step_seconds))
    least = math.ceil(LEAST * whole / min(stage.steps for stage in stages))
    if steps < least:
        raise wb.WorkbenchError(
            f"{seconds:g} seconds are too few for {student.name}: compiling and timing took "
            f"{spent:.0f}, and at {1e3 * step_seconds:.0f} ms a step {steps} steps would be left. "
            f"Give {math.ceil(spent + least * step_seconds)} seconds for {least} steps, "
            "or say with --steps how many."
        )
    return steps


def train_each(
    entries: Iterable[str], train: Callable[[float, float], object]
) -> tuple[list, list[str]]:
    """Call `train` with percent and seconds of each entry, such as "25:300".

    Returns:
        What it gave, and what was refused: one refusal must not cost the hybrids after it.
    """
    made, refused = [], []
    for entry in entries:
        percent, seconds = map(float, entry.split(":"))
        try:
            made.append(train(percent, seconds))
        except wb.WorkbenchError as error:
            refused.append(str(error))
            print(error, flush=True)
    return made, refused
