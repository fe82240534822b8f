"""Try starts and mixer options one by one, before any training, and keep the results in sight."""

from collections.abc import Sequence

import ipywidgets

from workbench.data import Sample, load_data
from workbench.models.plan import Plan
from workbench.models.teacher import VLM
from workbench.steps.conversion.initialization import INITS, convert
from workbench.steps.quality.together import read_together
from workbench.views.widgets.drawing import HYBRID, TEACHER, Bar, bars, side_by_side, table
from workbench.views.widgets.panel import Panel, button, row

SWITCHES = {  # option of the mixer: how it is called, its value when switched on, and when off
    "rope": ("rotate by position (rope)", True, False),
    "bias": ("keep biases (bias)", True, False),
    "conv_activation": ("SiLU after the convolution", "silu", None),
    "norm": ("norm before the output (norm)", True, False),
    "gate": ("gate by silu(z) (gate)", True, False),
}


def init_bench(
    teacher: VLM,
    plan: Plan,
    *,
    samples: Sequence[Sample] | None = None,
    inits: Sequence[str] = ("matvlm",),
) -> "InitBench":
    """Compare starts by the KL of the untrained student: choose one, switch its parts, measure.

    Args:
        teacher: the model to convert.
        plan: which layers change.
        samples: whose answers both models read; None takes two long descriptions.
        inits: measured at once, so that the bench is not empty.

    Returns:
        A widget; `.measure(init, **options)` does what the button does, `.value["rows"]` is data.

    Raises:
        WorkbenchError: an init that does not exist, or no sample.
    """
    return InitBench(teacher, plan, samples, inits)


class InitBench(Panel):
    """What `init_bench` returns."""

    def __init__(
        self, teacher: VLM, plan: Plan, samples: Sequence[Sample] | None, inits: Sequence[str]
    ) -> None:
        super().__init__()
        if samples is None:
            some = load_data("pocket", split="test", limit=32)
            samples = [s for s in some if s.family == "describe"][:2]
        self.teacher, self.plan, self.samples = teacher, plan, list(samples)
        self.rows: list[dict] = []
        style = {"description_width": "initial"}
        self.init = ipywidgets.Dropdown(options=list(INITS), value="matvlm", description="init")
        self.switches = {
            name: ipywidgets.Checkbox(
                description=label, indent=False, style=style,
                layout=ipywidgets.Layout(width="auto", margin="0 14px 0 0"),
            )
            for name, (label, *_) in SWITCHES.items()
        }  # fmt: skip
        self.init.observe(lambda _: self._reset(), "value")
        self._reset()
        self.button = button(
            "Measure", self._measure_slowly, icon="flask", tip="Convert, and let both models read"
        )
        self.build(row(self.init, self.button), row(*self.switches.values()))
        for name in inits:
            self.measure(name)

    def _reset(self) -> None:
        """Set the switches to what the chosen init does by itself."""
        for name, (_, on, _) in SWITCHES.items():
            self.switches[name].value = self._own(self.init.value, name) == on

    def _own(self, init: str, option: str) -> object:
        defaults = {"rope": False, "bias": False, "conv_activation": "silu"}
        return INITS[init].options.get(option, defaults.get(option, True))

    def measure(self, init: str, **options: object) -> dict:
        """Convert with `init` and mixer options, and compare with the teacher.

        Returns:
            The new row: init, options, kl_nats, agreement.
        """
        student = convert(self.teacher, self.plan, init=init, options=options)
        tokens = [t for a in read_together(self.teacher, student, self.samples) for t in a]
        found = {
            "init": init,
            "options": options,
            "kl_nats": sum(t.kl_nats for t in tokens) / len(tokens),
            "agreement": sum(t.agree for t in tokens) / len(tokens),
        }
        same = [r for r in self.rows if (r["init"], r["options"]) == (init, options)]
        self.rows = [r for r in self.rows if r not in same] + [found]
        self.draw()
        return found

    def _measure_slowly(self) -> None:
        init, options = self.init.value, {}
        for name, (_, on, off) in SWITCHES.items():
            chosen = on if self.switches[name].value else off
            if chosen != self._own(init, name):
                options[name] = chosen

        def work() -> None:
            found = self.measure(init, **options)
            self.say(f"{_name(found)}: {found['kl_nats']:.3f} nats a token.")

        self.in_background(work, busy=f"Measuring {init} …")

    @property
    def value(self) -> dict:
        """The plan, and every row measured so far."""
        return {"plan": self.plan.to_dict(), "rows": [dict(r) for r in self.rows]}

    def to_html(self) -> str:
        """Draw a bar and a line of the table for each row."""
        drawn = [
            Bar(_name(r), r["kl_nats"], f"{r['kl_nats']:.3f}", HYBRID if r["options"] else TEACHER)
            for r in self.rows
        ]
        rows = [
            [_name(r), f"{r['kl_nats']:.3f}", f"{r['agreement']:.0%}", INITS[r["init"]].summary]
            for r in self.rows
        ]
        head = ["start", "KL, nats a token", "same token", "what it is"]
        chart = bars(drawn, "KL to the teacher before any training, nats a token", width=560)
        return side_by_side(chart, table(head, rows))

    def __str__(self) -> str:
        lines = [f"Before any training, layers {', '.join(map(str, self.plan.mamba_layers))}:"]
        lines += [
            f"  {_name(r):<32}{r['kl_nats']:8.3f} nats a token, {r['agreement']:4.0%} same token"
            for r in self.rows
        ]
        return "\n".join(lines)


def _name(found: dict) -> str:
    changed = ", ".join(f"{k}={v}" for k, v in found["options"].items())
    return f"{found['init']}, {changed}" if changed else found["init"]
