"""Small drawings in HTML and SVG that take the page's own colour of text, light or dark."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from workbench.views.figures import FONT, GRID, HYBRID, TEACHER

__all__ = ["HYBRID", "TEACHER", "Bar", "Line", "bars", "cells", "lines", "side_by_side", "table"]

_SVG = (
    '<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}" style="width:100%;'
    'max-width:{width}px;height:auto;font:12px {font};color:inherit;overflow:visible">'
    "{inside}</svg>"
)
LEFT, RIGHT, TOP, BOTTOM = 70, 12, 26, 40


@dataclass(frozen=True)
class Line:
    """One line of `lines`; `measured` is drawn full, what is only computed dotted."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str = HYBRID
    measured: bool = True


@dataclass(frozen=True)
class Bar:
    """One bar of `bars`; `measured` is drawn full, what is only computed as an outline."""

    name: str
    value: float
    said: str
    colour: str = HYBRID
    measured: bool = True


def lines(
    curves: Sequence[Line],
    x: str,
    y: str,
    *,
    width: int = 480,
    height: int = 230,
    log: bool = False,
) -> str:
    """Draw lines against a common axis.

    Args:
        curves: those without points are left out of the drawing, not of the legend.
        x: what the horizontal axis says.
        y: what the vertical axis says.
        width: in pixels, at most; the drawing shrinks with its page.
        height: in pixels at that width.
        log: a logarithmic vertical axis; values of 0 and below are left out.
    """
    points = [p for c in curves for p in zip(c.x, c.y, strict=True) if not log or p[1] > 0]
    inside = _legend(curves)
    if not points:
        inside += _text(width / 2, height / 2, "nothing yet", anchor="middle", faint=True)
        return _svg(width, height, f"{y} against {x}: nothing yet", inside)
    right = max(p[0] for p in points) or 1
    left = 0 if not log else min(p[0] for p in points)
    values = [p[1] for p in points]
    low, high = (min(values), max(values)) if log else (0, max(values) or 1)
    ticks = _log_ticks(low, high) if log else _ticks(high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def across(value: float) -> float:
        return LEFT + (value - left) / max(right - left, 1e-9) * (width - LEFT - RIGHT)

    def up(value: float) -> float:
        if log:
            low_, high_, value = math.log(low), math.log(high), math.log(value)
        else:
            low_, high_ = low, high
        return height - BOTTOM - (value - low_) / max(high_ - low_, 1e-9) * (height - TOP - BOTTOM)

    for tick in ticks:
        inside += f'<path d="M{LEFT} {up(tick):.1f}H{width - RIGHT}" stroke="{GRID}"/>'
        inside += _text(LEFT - 6, up(tick) + 4, _short(tick), anchor="end", faint=True)
    for tick in _ticks(right)[0 if not log else 1 :]:
        if left <= tick <= right:
            inside += _text(across(tick), height - 22, _short(tick), anchor="middle", faint=True)
    inside += _text((LEFT + width - RIGHT) / 2, height - 5, x, anchor="middle", faint=True)
    inside += _text(
        0, 0, y, anchor="middle", faint=True,
        more=f'transform="translate(12 {(TOP + height - BOTTOM) / 2:.0f}) rotate(-90)"',
    )  # fmt: skip
    for curve in curves:
        mine = [p for p in zip(curve.x, curve.y, strict=True) if not log or p[1] > 0]
        inside += _curve(curve, [(across(a), up(b)) for a, b in mine], mine)
    return _svg(width, height, f"{y} against {x}", inside)


def bars(rows: Sequence[Bar], title: str, *, width: int = 480, top: float | None = None) -> str:
    """Draw horizontal bars, one under the other.

    Args:
        rows: outlines stand for what is computed.
        title: what they measure, with its unit.
        width: in pixels, at most.
        top: the value of a full bar; None is the largest.
    """
    name_width = min(230, 16 + max((len(row.name) for row in rows), default=0) * 8)
    most = top or max((abs(row.value) for row in rows), default=1) or 1
    room = width - name_width - 90
    inside = _text(0, 14, title, faint=True)
    for place, row in enumerate(rows):
        y, length = 24 + 24 * place, max(1.5, min(1, abs(row.value) / most) * room)
        look = f'fill="{row.colour}"' if row.measured else (
            f'fill="{row.colour}" fill-opacity="0.12" stroke="{row.colour}" stroke-dasharray="3 2"'
        )  # fmt: skip
        kind = "measured" if row.measured else "computed"
        inside += _text(name_width - 8, y + 13, row.name, anchor="end")
        inside += (
            f'<rect x="{name_width}" y="{y + 1}" width="{length:.1f}" height="16" rx="2" {look}>'
            f"<title>{escape(row.name)}: {escape(row.said)} ({kind})</title></rect>"
        )
        inside += _text(name_width + length + 6, y + 13, row.said)
    return _svg(width, 30 + 24 * max(1, len(rows)), title, inside)


def cells(chosen: Sequence[int], n: int, heights: Sequence[float] | None = None) -> str:
    """Draw the decoder as a row of cells, first layer to the left; heights are scores, if given."""
    width, inside = 16 + 28 * n, ""
    most = max(heights, default=0) if heights is not None else 0
    for layer in range(n):
        height = 34 if not most else 3 + 31 * max(0, heights[layer]) / most
        kind = "Mamba-2" if layer in chosen else "attention"
        said = f"layer {layer}: {kind}" + (f", {heights[layer]:.3f}" if heights is not None else "")
        inside += (
            f'<rect x="{8 + 28 * layer}" y="{38 - height:.1f}" width="24" height="{height:.1f}" '
            f'rx="2" fill="{HYBRID if layer in chosen else TEACHER}"><title>{said}</title></rect>'
        ) + _text(20 + 28 * layer, 54, str(layer), anchor="middle", faint=True)
    listed = ", ".join(map(str, sorted(chosen))) or "none"
    return _svg(width, 60, f"{n} decoder layers; Mamba-2: {listed}", inside)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table; numbers to the right, the first column and columns of prose to the left."""
    columns = zip(head, *rows, strict=True)
    sides = [
        "right" if i and max(len(str(cell)) for cell in column) < 24 else "left"
        for i, column in enumerate(columns)
    ]
    where = 'style="text-align:{};vertical-align:top;padding:2px 14px 2px 0;line-height:1.4"'

    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag} {where.format(side)}>{escape(str(cell))}</{tag}>"
            for side, cell in zip(sides, cells, strict=True)
        )

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    top = f"<tr>{line(head, 'th')}</tr>"
    return f'<table style="margin:4px 0">{top}{body}</table>'


def side_by_side(*parts: str) -> str:
    """Set parts next to each other where the page is wide enough, else one under the other."""
    boxes = "".join(f'<div style="flex:1 1 380px;min-width:0">{part}</div>' for part in parts)
    style = f"display:flex;flex-wrap:wrap;gap:8px 28px;font-family:{FONT};line-height:1.4"
    return f'<div style="{style}">{boxes}</div>'


def _svg(width: float, height: float, label: str, inside: str) -> str:
    font = FONT.replace('"', "'")
    return _SVG.format(width=width, height=height, label=escape(label), font=font, inside=inside)


def _text(
    x: float, y: float, said: str, *, anchor: str = "start", faint: bool = False, more: str = ""
) -> str:
    opacity = ' fill-opacity="0.7"' if faint else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="currentColor"{opacity} '
        f"{more}>{escape(said)}</text>"
    )


def _legend(curves: Sequence[Line]) -> str:
    drawn, x = "", LEFT
    for curve in curves:
        dash = "" if curve.measured else ' stroke-dasharray="2 4"'
        drawn += f'<path d="M{x} 10h22" stroke="{curve.colour}" stroke-width="3"{dash}/>'
        drawn += _text(x + 28, 14, curve.name)
        x += 46 + 7 * len(curve.name)
    return drawn


def _curve(curve: Line, places: list[tuple[float, float]], values: list[tuple]) -> str:
    if not places:
        return ""
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    dash = "" if curve.measured else ' stroke-dasharray="2 4"'
    drawn = f'<path d="{path}" fill="none" stroke="{curve.colour}" stroke-width="2.5"{dash}/>'
    if len(places) > 40:
        return drawn
    for (x, y), (a, b) in zip(places, values, strict=True):
        said = f"{escape(curve.name)}: {_short(b)} at {_short(a)}"
        drawn += (
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{curve.colour}">'
            f"<title>{said}</title></circle>"
        )
    return drawn


def _ticks(high: float) -> list[float]:
    """Round numbers from 0 to just above `high`."""
    high = high if high > 0 else 1
    step = 10 ** math.floor(math.log10(high))
    step = next(s for s in (step / 5, step / 2, step, 2 * step) if high / s <= 6)
    return [i * step for i in range(math.ceil(high / step - 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ticks = [m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5)]
    below = max((t for t in ticks if t <= low), default=low)
    above = min((t for t in ticks if t >= high), default=high)
    return [t for t in ticks if below <= t <= above]


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"
