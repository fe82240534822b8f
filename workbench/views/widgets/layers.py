"""Choose layers by hand, and see at once what that should cost; measure when you like."""

from collections.abc import Sequence

import ipywidgets

from workbench.data import Sample, load_data
from workbench.models.generation import answer
from workbench.models.plan import Plan
from workbench.models.prompts import position_limit
from workbench.models.teacher import VLM
from workbench.steps.conversion.initialization import convert
from workbench.steps.conversion.scores import Scores
from workbench.steps.conversion.selection import choose_layers, even_layers
from workbench.steps.efficiency.budget import Budget, budget
from workbench.steps.quality.together import mean_kl
from workbench.views.widgets.drawing import (
    HYBRID,
    TEACHER,
    Bar,
    Line,
    bars,
    cells,
    lines,
    side_by_side,
    table,
)
from workbench.views.widgets.panel import Panel, button, row


def layer_picker(
    teacher: VLM,
    *,
    ratio: float = 0.25,
    length: int = 1024,
    scores: Scores | Sequence[float] | None = None,
    init: str | VLM = "matvlm",
    samples: Sequence[Sample] | None = None,
) -> "LayerPicker":
    """Show the decoder's layers as buttons; predicted memory and speed follow every click.

    Args:
        teacher: the model to convert.
        ratio: share of Mamba-2 layers to begin with.
        length: tokens at which the cache is shown.
        scores: of `score_layers`, or a number a layer in nats: how much replacing it alone hurts.
            Then their sum is
            shown as an estimate, and layers can be chosen by score.
        init: of `convert`, for what is measured.
        samples: questions that are measured on; None takes four of the workbench's own.

    Returns:
        A widget; `.plan` is a `Plan`, `.value` is all that it shows as plain data.
    """
    return LayerPicker(teacher, ratio, length, scores, init, samples)


class LayerPicker(Panel):
    """What `layer_picker` returns."""

    def __init__(
        self, teacher: VLM, ratio: float, length: int, scores: Sequence[float] | None,
        init: str | VLM, samples: Sequence[Sample] | None,
    ) -> None:  # fmt: skip
        super().__init__()
        first = choose_layers(teacher, ratio=ratio)
        scores = scores.values if isinstance(scores, Scores) else scores
        self.teacher, self.init, self.samples = teacher, init, samples
        self.n_layers = first.n_layers
        self.scores = None if scores is None else [float(s) for s in scores]
        self.length = length
        self.measured: dict[tuple[int, ...], dict] = {}
        self._quiet = False
        self._controls(first)
        self.build(
            row(self.ratio, self.spread, self.tokens),
            row(*self.buttons),
            row(self.button),
        )

    def _controls(self, first: Plan) -> None:
        style = {"description_width": "initial"}
        self.ratio = ipywidgets.IntSlider(
            len(first.mamba_layers), 0, self.n_layers, description="Mamba-2 layers", style=style,
            layout=ipywidgets.Layout(width="380px"),
        )  # fmt: skip
        spreads = ["even", "first", "last"] + (["by score"] if self.scores else [])
        self.spread = ipywidgets.Dropdown(options=spreads, description="spread", style=style)
        self.spread.layout.width, self.spread.layout.margin = "170px", "2px 16px 2px 2px"
        limit = position_limit(self.teacher)
        lengths = sorted({n for n in (256, 512, 1024, 2048, 4096, 8192, 16384, 32768) if n <= limit}
                         | {min(self.length, limit)})  # fmt: skip
        self.tokens = ipywidgets.SelectionSlider(
            options=[(f"{n:,}", n) for n in lengths], value=min(self.length, limit),
            description="tokens", style=style, layout=ipywidgets.Layout(width="260px"),
        )  # fmt: skip
        narrow = ipywidgets.Layout(width="38px", padding="0", margin="2px 2px")
        self.buttons = [
            ipywidgets.ToggleButton(
                value=i in first.mamba_layers, description=str(i), layout=narrow,
                tooltip=f"layer {i}: press for Mamba-2, release for attention",
            )
            for i in range(self.n_layers)
        ]  # fmt: skip
        self.button = button(
            "Measure", self._measure_slowly, icon="flask",
            tip="Convert by this plan, ask the student, and compare it with the teacher",
        )  # fmt: skip
        self.ratio.observe(lambda _: self._spread_out(), "value")
        self.spread.observe(lambda _: self._spread_out(), "value")
        self.tokens.observe(lambda _: self.draw(), "value")
        for toggle in self.buttons:
            toggle.observe(lambda _: self._clicked(), "value")
        self._colour()

    def _spread_out(self) -> None:
        """The slider or the spread moved: set the buttons."""
        if self._quiet:
            return
        n, everything = self.ratio.value, list(range(self.n_layers))
        if self.spread.value == "first":
            chosen = everything[:n]
        elif self.spread.value == "last":
            chosen = everything[self.n_layers - n :]
        elif self.spread.value == "by score":
            chosen = sorted(everything, key=self.scores.__getitem__)[:n]
        else:
            chosen = even_layers(self.n_layers, n) if n else ()
        self.choose(chosen)

    def choose(self, layers: Sequence[int]) -> None:
        """Choose layers as a click on each would."""
        self._quiet = True
        for i, toggle in enumerate(self.buttons):
            toggle.value = i in layers
        self.ratio.value = len(set(layers))
        self._quiet = False
        self._colour()
        self.draw()

    def _clicked(self) -> None:
        if not self._quiet:
            self.choose(self.plan.mamba_layers)

    def _colour(self) -> None:
        for toggle in self.buttons:
            toggle.button_style = "info" if toggle.value else ""

    @property
    def plan(self) -> Plan:
        """The layers chosen now."""
        chosen = tuple(i for i, toggle in enumerate(self.buttons) if toggle.value)
        return Plan(self.n_layers, chosen, "picked", "chosen in the layer picker")

    def measure(self) -> dict:
        """Convert by the plan, and measure; returns what `value["measured"]` then holds."""
        plan = self.plan
        if self.samples is None:
            some = load_data("pocket", split="test", limit=16)
            self.samples = [s for s in some if len(s.images) == 1][:4]
        student = convert(self.teacher, plan, init=self.init)
        sample, found = self.samples[0], {}
        for name, vlm in (("teacher", self.teacher), ("student", student)):
            got = answer(vlm, sample.images, sample.question, max_new_tokens=12)
            found[f"{name}_cache_bytes"] = got.cache_bytes
            found[f"{name}_decode_tokens_per_s"] = got.decode_tokens_per_s
            found["n_tokens"] = got.n_prompt_tokens + got.n_new_tokens - 1
        found["kl_nats"] = mean_kl(self.teacher, student, self.samples)
        self.measured[plan.mamba_layers] = found
        self.draw()
        return found

    def _measure_slowly(self) -> None:
        def work() -> None:
            self.measure()
            self.say("Measured on this machine; one short answer says little about speed.")

        self.in_background(work, busy="Converting and asking …")

    @property
    def value(self) -> dict:
        """The plan, what it should cost (computed), the estimate, and what was measured."""
        plan, length = self.plan, self.tokens.value
        kl = None if self.scores is None else sum(self.scores[i] for i in plan.mamba_layers)
        return {
            "plan": plan.to_dict(),
            "teacher": budget(self.teacher, length=length).to_dict(),
            "computed": budget(self.teacher, plan, length=length).to_dict(),
            "estimated_kl_nats": kl,
            "measured": self.measured.get(plan.mamba_layers),
        }

    def to_html(self) -> str:
        """Draw the stack, the cache against length, and a table: computed beside measured."""
        plan, length = self.plan, self.tokens.value
        before, after = (budget(self.teacher, p, length=length) for p in (None, plan))
        share = f"{len(plan.mamba_layers)} of {self.n_layers}"
        found = self.measured.get(plan.mamba_layers)
        left = (
            f"<b>{share} layers mix with Mamba-2 ({plan.ratio:.0%})</b><br>"
            + cells(plan.mamba_layers, self.n_layers, self.scores)
            + ("<div><small>height: KL when this layer alone is replaced</small></div>"
               if self.scores else "")
            + self._table(before, after, found)
        )
        right = self._curve(before, after) + self._bars(before, after, found)
        return side_by_side(left, right)

    def _curve(self, before: Budget, after: Budget) -> str:
        ends = (0, before.length)
        sizes = [
            (b.ssm_bytes / 1024, b.cache_bytes / 1024) for b in (before, after)
        ]
        return lines(
            [Line("teacher, computed", ends, sizes[0], TEACHER, False),
             Line("this plan, computed", ends, sizes[1], HYBRID, False)],
            "tokens", "cache, KiB",
        )  # fmt: skip

    def _bars(self, before: Budget, after: Budget, found: dict | None) -> str:
        rows = [
            Bar("teacher", before.read_bytes, _mib(before.read_bytes), TEACHER, False),
            Bar("this plan", after.read_bytes, _mib(after.read_bytes), HYBRID, False),
        ]
        drawn = bars(rows, f"bytes that a new token has to fetch at {after.length:,} tokens")
        if found or self.scores:
            total = sum(self.scores) if self.scores else None
            rows = []
            if self.scores:
                kl = self.value["estimated_kl_nats"]
                rows.append(Bar("sum of scores", kl, f"{kl:.3f}", HYBRID, False))
            if found:
                rows.append(Bar("measured", found["kl_nats"], f"{found['kl_nats']:.3f}"))
            drawn += bars(rows, "KL to the teacher, nats a token", top=total)
        return drawn

    def _table(self, before: Budget, after: Budget, found: dict | None) -> str:
        bound = before.read_bytes / after.read_bytes
        rows = [
            ["weights", _mib(before.weight_bytes), _mib(after.weight_bytes), ""],
            ["cache", _kib(before.cache_bytes), _kib(after.cache_bytes), ""],
            ["decoding, at most", "1.00 x", f"{bound:.2f} x", ""],
        ]
        if found:
            there = f" at {found['n_tokens']}"
            rows[1][3] = _kib(found["student_cache_bytes"]) + there
            ratio = found["student_decode_tokens_per_s"] / found["teacher_decode_tokens_per_s"]
            rows[2][3] = f"{ratio:.2f} x{there}"
        if found or self.scores:
            kl = self.value["estimated_kl_nats"]
            rows.append(
                ["KL, nats a token", "0", "" if kl is None else f"{kl:.3f}",
                 f"{found['kl_nats']:.3f}" if found else ""]
            )  # fmt: skip
        return table(["", "teacher, computed", "plan, computed", "plan, measured"], rows)

    def __str__(self) -> str:
        after = budget(self.teacher, self.plan, length=self.tokens.value)
        return f"{self.plan}\n{after}"


def _mib(n_bytes: float) -> str:
    return f"{n_bytes / 2**20:,.1f} MiB"


def _kib(n_bytes: float) -> str:
    return f"{n_bytes / 2**10:,.0f} KiB"
