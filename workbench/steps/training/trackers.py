"""A run's rows in TensorBoard or Trackio, through accelerate, beside its metrics.jsonl."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.errors import WorkbenchError
from workbench.steps.training.runs import StepRow

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

# Each name, and the packages of which one must be there.
TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",)}


def track(name: str, folder: str | Path, run: str = "distill") -> Callable[[StepRow], None]:
    """Make an `on_step` for `distill` that also writes rows where a dashboard reads them.

    Args:
        name: "tensorboard", which writes event files below `folder`, or "trackio", which keeps a
            database of its own and takes nothing from `folder`.
        folder: of the run.
        run: what the dashboard calls it.

    Returns:
        A function of a `StepRow`; in several processes make it in the first one alone.

    Raises:
        WorkbenchError: no tracker is called so, or its package is not installed.
    """
    if name not in TRACKERS:
        raise WorkbenchError(f"track={name!r} does not exist: choose {' or '.join(TRACKERS)}.")
    if not any(importlib.util.find_spec(package) for package in TRACKERS[name]):
        raise WorkbenchError(
            f"track={name!r} needs a package that is missing: pip install {TRACKERS[name][-1]}."
        )
    tracker = _started(name, Path(folder), run)
    return lambda row: tracker.log(scalars(row), step=row.step)


def scalars(row: StepRow) -> dict[str, float]:
    """The figures of a row by name; the loss of layer i is `layer_losses/i`."""
    values = {key: value for key, value in vars(row).items() if isinstance(value, int | float)}
    values |= {f"layer_losses/{i}": loss for i, loss in enumerate(row.layer_losses)}
    return {key: value for key, value in values.items() if key != "step"}


def _started(name: str, folder: Path, run: str) -> GeneralTracker:
    from accelerate.tracking import TensorBoardTracker, TrackioTracker

    tracker = TrackioTracker(run) if name == "trackio" else TensorBoardTracker(run, folder)
    tracker.start()
    return tracker
