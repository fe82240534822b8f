"""Bar charts: which bar is tallest, what is its value, how many are there?"""

from __future__ import annotations

from random import Random

from PIL import Image, ImageDraw

from workbench.data.assets import load_atlas
from workbench.data.drawing import COLOURS, canvas, shade
from workbench.data.scenes.scene import Scene, Turn, ask

_LEFT, _RIGHT, _TOP, _BOTTOM = 18, 124, 8, 118  # the plot's area, px
_MOST = 10  # the axis ends here


def chart_scene(rng: Random, unseen: bool) -> Scene:
    """Three to six coloured bars with whole values from 1 to 10 and one axis."""
    n_bars = rng.randint(3, 6)
    values = dict(zip(rng.sample(list(COLOURS), n_bars), _values(rng, n_bars), strict=True))
    picture = canvas(rng)
    bars = [(shade(rng, colour), value) for colour, value in values.items()]
    _draw_axis(picture, rng.random() < 0.7)
    _draw_bars(picture, bars, rng.uniform(0.55, 0.85))
    return Scene((picture,), tuple(_turns(rng, values)))


def _values(rng: Random, n: int) -> list[int]:
    """Whole values whose largest and smallest stand alone, so that each question has one answer."""
    while True:
        values = [rng.randint(1, _MOST) for _ in range(n)]
        if values.count(max(values)) == values.count(min(values)) == 1:
            return values


def _draw_axis(picture: Image.Image, grid: bool) -> None:
    draw, font = ImageDraw.Draw(picture), load_atlas().font(0, 9)
    for value in range(0, _MOST + 1, 2):
        y = _height(value)
        if grid:
            draw.line((_LEFT, y, _RIGHT, y), fill=(190, 190, 190))
        draw.text((_LEFT - 3, y), str(value), fill=(40, 40, 40), font=font, anchor="rm")
    draw.line((_LEFT, _TOP, _LEFT, _BOTTOM), fill=(40, 40, 40))
    draw.line((_LEFT, _BOTTOM, _RIGHT, _BOTTOM), fill=(40, 40, 40))


def _draw_bars(picture: Image.Image, bars: list[tuple], fill_share: float) -> None:
    draw, step = ImageDraw.Draw(picture), (_RIGHT - _LEFT) / len(bars)
    for i, (colour, value) in enumerate(bars):
        middle = _LEFT + (i + 0.5) * step
        half = fill_share * step / 2
        draw.rectangle((middle - half, _height(value), middle + half, _BOTTOM - 1), fill=colour)


def _height(value: int) -> int:
    return round(_BOTTOM - (_BOTTOM - _TOP) * value / _MOST)


def _turns(rng: Random, values: dict[str, int]) -> list[Turn]:
    colours = list(values)
    tallest, shortest = max(colours, key=values.get), min(colours, key=values.get)
    one, two = rng.sample(colours, 2)
    turns = [
        ask(rng, ("Which bar is the tallest?", "What color is the tallest bar?"), tallest),
        ask(rng, ("Which bar is the shortest?", "What color is the shortest bar?"), shortest),
        ask(rng, ("What is the value of the {c} bar?",), str(values[one]), c=one),
        ask(rng, ("What is the value of the {c} bar?",), str(values[two]), c=two),
        ask(rng, ("How many bars are there?",), str(len(colours))),
    ]
    if values[one] != values[two]:
        taller = one if values[one] > values[two] else two
        question = "Which is taller, the {a} bar or the {b} bar?"
        turns.append(ask(rng, (question,), taller, a=one, b=two))
    rng.shuffle(turns)
    return turns
