"""Notice a run that no longer learns: a loss that is no number, or one that has run away."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

from workbench.errors import WorkbenchError

TOO_HIGH = 10.0  # times the median of the steps before
PATIENCE = 20  # steps in a row
MEMORY = 200  # steps that the median looks back on


class Watch:
    """Reads the loss and the gradient norm of every step, in order; a new stage starts anew."""

    def __init__(self) -> None:
        self._stage, self._before, self.n_high = "", deque(maxlen=MEMORY), 0

    def look(self, step: int, stage: str, loss: float, norm: float, lr: float) -> None:
        """Take note of one step.

        Raises:
            WorkbenchError: the run has failed: at which step, and why.
        """
        if stage != self._stage:
            self._stage, self.n_high = stage, 0
            self._before.clear()
        for name, value in (("loss", loss), ("gradient", norm)):
            if not math.isfinite(value):
                raise WorkbenchError(
                    f"The {name} is {value} at step {step} (lr {lr:.1e}): lower the learning rate."
                )
        if len(self._before) >= PATIENCE and loss > TOO_HIGH * median(self._before):
            self.n_high += 1
        else:
            self.n_high = 0
            self._before.append(loss)
        if self.n_high >= PATIENCE:
            raise WorkbenchError(
                f"The loss ran away: since step {step - PATIENCE + 1} it has been more than "
                f"{TOO_HIGH:g} times its median before ({loss:.3g} against "
                f"{median(self._before):.3g} at step {step}, lr {lr:.1e}): lower the learning rate."
            )
