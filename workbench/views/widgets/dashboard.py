"""Watch a distillation while it runs, pause it, stop it; the notebook stays usable meanwhile."""

import threading
import time
from collections.abc import Iterable
from dataclasses import asdict

import ipywidgets

from workbench.errors import WorkbenchError
from workbench.models.teacher import VLM
from workbench.steps.training.distillation import Run, StepRow, distill
from workbench.steps.training.stages import plan_stages
from workbench.views.widgets.drawing import (
    HYBRID,
    TEACHER,
    Bar,
    Line,
    bars,
    lines,
    side_by_side,
    table,
)
from workbench.views.widgets.panel import Panel, button, row

LOSSES = {"layer_loss": ("layer loss", TEACHER), "kl_nats": ("KL, nats a token", HYBRID),
          "ce_nats": ("CE, nats a token", "#c8842b"),
          "hidden_loss": ("hidden loss", "#7a6ff0")}  # fmt: skip
MOST_POINTS = 400


def distill_dashboard(
    student: VLM, teacher: VLM, data: Iterable, *, steps: int | None = None, **options: object
) -> "Dashboard":
    """Show Start, Pause and Stop above the curves of a distillation.

    Args:
        student: trained in place.
        teacher: not changed.
        data: as `distill` takes it.
        steps: of all stages together; None as in `distill`.
        **options: any other option of `distill`: recipe, batch_size, lr, folder, save_every, ...
            With a `folder`, a start after a stop goes on from the last checkpoint.

    Returns:
        A widget; `.start()`, `.pause()`, `.go_on()`, `.stop()` do what the buttons do, `.wait()`
        waits for the end, `.run` is the `Run`, `.value` is what it shows as plain data.

    Raises:
        WorkbenchError: an option that `distill` chooses itself here.
    """
    taken = {"on_step", "stop", "progress", "resume"} & options.keys()
    if taken:
        raise WorkbenchError(f"The dashboard sets {min(taken)} itself: leave it out.")
    return Dashboard(student, teacher, data, steps, options)


class Dashboard(Panel):
    """What `distill_dashboard` returns."""

    def __init__(
        self, student: VLM, teacher: VLM, data: Iterable, steps: int | None, options: dict
    ) -> None:
        super().__init__()
        self.student, self.teacher, self.data = student, teacher, data
        self.steps, self.options = steps, options
        stages = plan_stages(options.get("recipe", "workbench"), steps, options.get("lr"))
        self.whole = sum(stage.steps for stage in stages)
        self.rows: list[StepRow] = []
        self.run: Run | None = None
        self.state = "ready"
        self._ask_to_stop, self._may_go = threading.Event(), threading.Event()
        self._drawn_at = 0.0
        self._controls()
        self.build(row(*self.buttons, self.bar), row(self.log))

    def _controls(self) -> None:
        self.bar = ipywidgets.IntProgress(0, 0, self.whole, layout=ipywidgets.Layout(width="240px"))
        self.log = ipywidgets.Checkbox(
            description="logarithmic losses", indent=False, layout=ipywidgets.Layout(width="auto")
        )
        self.log.observe(lambda _: self.draw(), "value")
        self.start_button = button("Start", self.start, icon="play", tip="Train, or train again")
        self.pause_button = button(
            "Pause", self._pause_or_go_on, icon="pause", tip="Wait between two steps, and go on"
        )
        self.stop_button = button("Stop", self.stop, icon="stop", tip="End after this step")
        self.buttons = (self.start_button, self.pause_button, self.stop_button)
        self._show("ready")

    def start(self) -> None:
        """Train in the background; with a folder, go on from its last checkpoint."""
        if not self.wait(0):
            return
        if self.options.get("folder") is None:
            self.rows = []
        elif self.state == "done":
            self.say("This run is complete. Another folder, or more steps, make a new dashboard.")
            return
        self._ask_to_stop.clear()
        self._may_go.set()
        self._show("running")
        self.in_background(self._train, busy="The first step is the slowest.")

    def pause(self) -> None:
        """Wait after the step that runs now."""
        if self.state == "running":
            self._may_go.clear()
            self._show("paused")

    def go_on(self) -> None:
        """End a pause."""
        if self.state == "paused":
            self._show("running")
            self._may_go.set()

    def stop(self) -> None:
        """End after the step that runs now; what was learnt stays in the student."""
        if self.state in ("running", "paused"):
            self._ask_to_stop.set()
            self._may_go.set()
            self.say("Stopping after this step …")

    def _pause_or_go_on(self) -> None:
        self.go_on() if self.state == "paused" else self.pause()

    def _train(self) -> None:
        try:
            self.run = distill(
                self.student, self.teacher, self.data, steps=self.steps, on_step=self._note,
                stop=self._asked, resume=self.options.get("folder") is not None, **self.options,
            )  # fmt: skip
        except BaseException:
            self._show("failed")
            raise
        self.rows = list(self.run.rows)
        self._show("stopped" if self.run.stopped else "done")
        self.say(str(self.run).splitlines()[0])
        self.draw()

    def _asked(self) -> bool:
        """What `distill` looks at after every step: it waits here while there is a pause."""
        self._may_go.wait()
        return self._ask_to_stop.is_set()

    def _note(self, new: StepRow) -> None:
        self.rows.append(new)
        paused = self.state == "paused"  # this step was under way when the button was pressed
        late = time.monotonic() - self._drawn_at > 0.3  # a drawing is a message to the browser
        if paused or late:
            self._drawn_at = time.monotonic()
            self.bar.value = new.step
            self.say(f"Paused. {new}" if paused else str(new))
            self.draw()

    def _show(self, state: str) -> None:
        self.state = state
        at_work = state in ("running", "paused")
        self.start_button.disabled = at_work
        self.pause_button.disabled = self.stop_button.disabled = not at_work
        self.start_button.description = "Start" if state == "ready" else "Start again"
        self.pause_button.description = "Go on" if state == "paused" else "Pause"
        self.pause_button.icon = "play" if state == "paused" else "pause"
        self.bar.value = self.rows[-1].step if self.rows else 0
        if state == "paused":
            self.say("Paused.")

    @property
    def value(self) -> dict:
        """The state, and all rows so far."""
        return {
            "state": self.state, "steps": self.whole, "rows": [asdict(r) for r in tuple(self.rows)]
        }  # fmt: skip

    def to_html(self) -> str:
        """Draw the losses, the last loss of each layer, and what there is to say of the run."""
        rows = tuple(self.rows)[:: max(1, len(self.rows) // MOST_POINTS)]
        drawn = []
        for field, (name, colour) in LOSSES.items():
            mine = [r for r in rows if getattr(r, field) is not None]
            if mine:
                losses = [getattr(r, field) for r in mine]
                drawn.append(Line(name, [r.step for r in mine], losses, colour))
        curves = lines(drawn, "step", "loss", log=self.log.value)
        return side_by_side(curves, self._by_layer() + self._table())

    def _by_layer(self) -> str:
        last = next((r for r in reversed(tuple(self.rows)) if r.layer_losses), None)
        if last is None:
            return ""
        each = zip(self.student.plan.mamba_layers, last.layer_losses, strict=True)
        drawn = [Bar(f"layer {i}", loss, f"{loss:.3f}", TEACHER) for i, loss in each]
        return bars(drawn, f"layer loss at step {last.step}")

    def _table(self) -> str:
        if not self.rows:
            return table(["", ""], [["state", self.state], ["steps", f"0 of {self.whole}"]])
        last = self.rows[-1]
        return table(["", ""], [
            ["state", self.state], ["steps", f"{last.step} of {self.whole}"],
            ["stage", last.stage], ["tokens/s", f"{last.tokens_per_s:,.0f}"],
            ["seconds so far", f"{last.seconds:.0f}"], ["seconds left", f"{last.eta_s:.0f}"],
        ])  # fmt: skip

    def __str__(self) -> str:
        said = f"{self.student.name}: {self.state}"
        return f"{said}\n{self.rows[-1]}" if self.rows else said
