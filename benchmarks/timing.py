"""How many steps of a recipe fit into so many seconds, on the machine that will run them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import workbench as wb

WARM_UP, TIMED = 12, 16  # steps of each stage; every shape of batch must come up in the first ones


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
        Steps of all stages together, at least one for each.
    """
    began, step_seconds = time.perf_counter(), 0.0
    student, whole = start(), sum(stage.steps for stage in stages)
    for stage in stages:
        rows = train(student, recipe=[stage], steps=WARM_UP + TIMED, log_every=WARM_UP).rows
        one = (rows[-1].seconds - rows[0].seconds) / TIMED
        print(f"{student.name} {stage.name}: {1e3 * one:.0f} ms a step", flush=True)
        step_seconds += one * stage.steps / whole
    left = seconds - (time.perf_counter() - began)
    return max(len(stages), int(left / step_seconds))
