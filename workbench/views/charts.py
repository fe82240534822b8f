"""Plotly charts of plain numbers, for the lessons: matrices, curves and bars."""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots
from torch import Tensor

from workbench.views.figures import GRID, HYBRID, TEACHER, TEXT, _layout

COLOURS = (TEACHER, HYBRID, "#c8842b", "#8a5fb0", "#3f9d74")
# From clear to blue, and to orange below zero: it stands on a white page as on a dark one.
SCALE = [[0, "rgb(214,110,20)"], [0.5, "rgba(128,128,128,0.06)"], [1, "rgb(31,141,208)"]]


def matrices_figure(matrices: Mapping[str, Tensor], *, height: int = 300) -> go.Figure:
    """Draw matrices side by side, query downwards, key to the right, each on its own scale.

    Args:
        matrices: title to (rows, columns); blue is positive, orange negative.
        height: in pixels.
    """
    figure = make_subplots(1, len(matrices), subplot_titles=list(matrices), horizontal_spacing=0.06)
    for column, matrix in enumerate(matrices.values(), 1):
        values = matrix.detach().float().cpu()
        most = float(values.abs().max()) or 1.0
        figure.add_heatmap(
            z=[[round(v, 4) for v in row] for row in values.tolist()],
            zmin=-most, zmax=most, colorscale=SCALE, showscale=False, xgap=1, ygap=1,
            hovertemplate="from position %{x} to %{y}: %{z:.3f}<extra></extra>",
            row=1, col=column,
        )  # fmt: skip
    figure.update_layout(**{**_layout(height=height), "margin": dict(l=8, r=8, t=40, b=8)})
    figure.update_xaxes(showgrid=False, zeroline=False, dtick=4, constrain="domain")
    figure.update_yaxes(
        autorange="reversed", showgrid=False, zeroline=False, dtick=4, constrain="domain",
        constraintoward="top",
    )  # fmt: skip
    for column in range(1, len(matrices) + 1):
        figure.update_yaxes(scaleanchor=f"x{column if column > 1 else ''}", row=1, col=column)
    figure.update_annotations(font=dict(size=12, color=TEXT))
    return figure


def curves_figure(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x: str,
    y: str,
    log: bool = False,
    dotted: Sequence[str] = (),
    height: int = 300,
) -> go.Figure:
    """Draw lines, the first in the teacher's grey, the second in the hybrid's blue.

    Args:
        curves: name to (x values, y values).
        x: what the horizontal axis says, with its unit.
        y: what the vertical axis says, with its unit.
        log: logarithmic axes.
        dotted: names of lines that are computed, not measured.
        height: in pixels.
    """
    figure = go.Figure()
    for place, (name, (xs, ys)) in enumerate(curves.items()):
        look = dict(color=COLOURS[place % len(COLOURS)], width=3)
        figure.add_scatter(
            x=list(xs), y=list(ys), name=name, mode="lines" if name in dotted else "lines+markers",
            line=look | (dict(dash="dot") if name in dotted else {}),
            hovertemplate=f"{name}: %{{y:.4g}} at %{{x}}<extra></extra>",
        )  # fmt: skip
    figure.update_layout(**_layout(height=height))
    along = up = dict(rangemode="tozero")
    if log:  # plotly would label what lies between powers of ten 2, 3, 4 and so on
        along = dict(type="log", tickvals=sorted({v for xs, _ in curves.values() for v in xs}))
        up = dict(type="log", dtick=1)
    figure.update_xaxes(title=x, **along)
    figure.update_yaxes(title=y, gridcolor=GRID, **up)
    return figure


def bars_figure(
    values: Mapping[str, float], *, x: str, chosen: Sequence[str] = (), height: int = 300
) -> go.Figure:
    """Draw a bar for each name; the `chosen` ones in the hybrid's blue, the others grey.

    Args:
        values: name to value, the first on top.
        x: what the values are, with their unit.
        chosen: names to stand out.
        height: in pixels.
    """
    names = list(values)
    most = max(values.values(), default=0)
    figure = go.Figure()
    figure.add_bar(
        x=[values[name] for name in names], y=names, orientation="h",
        marker_color=[HYBRID if name in chosen else TEACHER for name in names],
        text=[_said(values[name], most) for name in names],
        textposition="outside", cliponaxis=False,
        hovertemplate="%{y}: %{x:.4g}<extra></extra>",
    )  # fmt: skip
    figure.update_layout(**_layout(height=height), showlegend=False)
    figure.update_xaxes(title=x, gridcolor=GRID, range=[0, 1.12 * most or 1])  # room for its text
    figure.update_yaxes(autorange="reversed", showgrid=False, type="category", ticksuffix=" ")
    return figure


def _said(value: float, most: float) -> str:
    """Three digits, and no powers of ten for what is next to nothing beside the longest bar."""
    return "< 0.001" if 0 < value < min(0.001, most / 100) else f"{value:.3g}"
