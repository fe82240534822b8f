"""Look through a profile: any figure of it, against length, model by model."""

from collections.abc import Sequence

import ipywidgets

from workbench.steps.efficiency.profiling import Profile
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
from workbench.views.widgets.panel import Panel, row

COLOURS = (TEACHER, HYBRID, "#c8842b", "#8a5fb0")
UNITS = {"_ms": ("ms", 1), "_bytes": ("KiB", 1 / 1024), "_mib": ("MiB", 1),
         "_tokens_per_s": ("tokens/s", 1), "_s": ("s", 1)}  # fmt: skip
KEYS = ("model", "ratio", "batch_size", "n_prompt_tokens", "n_new_tokens", "note")


def profile_explorer(profile: Profile) -> "ProfileExplorer":
    """Show a profile's figures one at a time, as a drawing and as a table.

    Args:
        profile: what `profile` returned.

    Returns:
        A widget; `.value` is the profile and what is chosen, as plain data.
    """
    return ProfileExplorer(profile)


class ProfileExplorer(Panel):
    """What `profile_explorer` returns."""

    def __init__(self, profile: Profile) -> None:
        super().__init__()
        self.profile = profile
        self.rows = profile.to_dict()["rows"]
        if len({r["batch_size"] for r in self.rows}) > 1:
            self.rows = [
                r | {"model": f"{r['model']}, batch {r['batch_size']}"} for r in self.rows
            ]
        self.models = list(dict.fromkeys(r["model"] for r in self.rows))
        figures = [
            k for k in self.rows[0]
            if k not in KEYS and any(isinstance(r.get(k), int | float) for r in self.rows)
        ]  # fmt: skip
        self.figure = ipywidgets.Dropdown(
            options=[(_label(k), k) for k in figures], value=figures[0], description="figure"
        )
        self.ratio = ipywidgets.Checkbox(
            description=f"in proportion to {self.models[0]}", indent=False,
            layout=ipywidgets.Layout(width="auto"),
        )  # fmt: skip
        for control in (self.figure, self.ratio):
            control.observe(lambda _: self.draw(), "value")
        self.build(row(self.figure, self.ratio))

    def _of(self, model: str) -> list[tuple[int, float]]:
        """(tokens of the prompt, figure) of one model, the shortest first."""
        key = self.figure.value
        scale = 1 if self.ratio.value else _unit(key)[1]
        own, first = (
            {r["n_prompt_tokens"]: r.get(key) for r in self.rows if r["model"] == name}
            for name in (model, self.models[0])
        )
        found = []
        for length, value in sorted(own.items()):
            if self.ratio.value:
                value = value / first[length] if value is not None and first.get(length) else None
            if value is not None:
                found.append((length, value * scale))
        return found

    @property
    def value(self) -> dict:
        """The whole profile, and which figure is shown."""
        return {"figure": self.figure.value, "in_proportion": self.ratio.value,
                "profile": self.profile.to_dict()}  # fmt: skip

    def to_html(self) -> str:
        """Draw lines where there are several lengths, else bars; and every figure in a table."""
        label = _label(self.figure.value)
        if self.ratio.value:
            label = f"{label.partition(',')[0]}, times {self.models[0]}"
        points = {model: self._of(model) for model in self.models}
        measured = "bound" not in self.figure.value
        if max(map(len, points.values())) > 1:
            drawn = lines(
                [Line(m, *_columns(points[m]), _colour(i), measured)
                 for i, m in enumerate(self.models)],
                "tokens of the prompt", label,
            )  # fmt: skip
        else:
            drawn = bars(
                [Bar(m, points[m][0][1], f"{points[m][0][1]:,.3g}", _colour(i), measured)
                 for i, m in enumerate(self.models) if points[m]], label,
            )  # fmt: skip
        rows = [
            [m, f"{length:,}", f"{value:,.1f}" if value >= 100 else f"{value:,.3g}"]
            for m in self.models for length, value in points[m]
        ]  # fmt: skip
        return side_by_side(drawn, table(["model", "prompt tokens", label], rows))

    def __str__(self) -> str:
        return str(self.profile)


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [p[0] for p in points], [p[1] for p in points]


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def _unit(key: str) -> tuple[str, float]:
    return next((unit for ending, unit in UNITS.items() if key.endswith(ending)), ("", 1))


def _label(key: str) -> str:
    for ending, (unit, _) in UNITS.items():
        if key.endswith(ending):
            return f"{key.removesuffix(ending).replace('_', ' ')}, {unit}"
    return key.replace("_", " ")
