"""Coloured shapes on a 3 x 3 grid: the `describe` family, with answers of 30 to 80 tokens."""

from __future__ import annotations

import re
from random import Random

from workbench.data.drawing import COLOURS, SHAPES, canvas, draw_shape, shade
from workbench.data.scenes.scene import Fact, Scene, Turn, article, ask

_ROWS, _COLUMNS = ("top", "middle", "bottom"), ("left", "middle", "right")
PLACES = {
    ("middle" if row == column == "middle" else f"{row} {column}"): (x, y)
    for y, row in enumerate(_ROWS)
    for x, column in enumerate(_COLUMNS)
}
_SENTENCE = re.compile(r"(\w+) (\w+) in the ((?:top|middle|bottom) (?:left|middle|right)|middle)")


def describe_scene(rng: Random, unseen: bool) -> Scene:
    """Four to eight coloured shapes: describe them all, or answer about one of them."""
    places = rng.sample(list(PLACES), rng.randint(4, 8))
    facts = tuple((p, rng.choice(list(COLOURS)), rng.choice(SHAPES)) for p in sorted_places(places))
    picture = canvas(rng)
    for place, colour, shape in facts:
        x, y = PLACES[place]
        centre = (22 + 42 * x + rng.uniform(-3, 3), 22 + 42 * y + rng.uniform(-3, 3))
        draw_shape(picture, shape, shade(rng, colour), centre, rng.randint(26, 36))
    describe = ("Describe the picture.", "What can you see?", "Describe what you see.")
    turns = [Turn(rng.choice(describe), sentence(facts), facts)]
    return Scene((picture,), tuple(turns + _short_turns(rng, facts)))


def sorted_places(places: list[str]) -> list[str]:
    """Reading order: row by row, left to right."""
    return [place for place in PLACES if place in places]


def sentence(facts: tuple[Fact, ...]) -> str:
    """The description that the facts make up, in reading order."""
    parts = [f"{article(colour)} {shape} in the {place}" for place, colour, shape in facts]
    return f"There is {', '.join(parts[:-1])} and {parts[-1]}."


def read_facts(text: str) -> tuple[Fact, ...]:
    """The facts that a description states; the inverse of `sentence` on well-formed text."""
    return tuple((place, colour, shape) for colour, shape, place in _SENTENCE.findall(text))


def share_right(text: str, facts: tuple[Fact, ...]) -> float:
    """Share of facts that `text` gets right, in 0..1.

    Every true object carries two facts, its colour and its shape, at its place. An object that is
    claimed where there is none, or claimed twice, adds two wrong facts, so that inventing costs.
    """
    truth = {place: (colour, shape) for place, colour, shape in facts}
    right, seen, wrong = 0, set(), 0
    for place, colour, shape in read_facts(text):
        if place in seen or place not in truth:
            wrong += 2
            continue
        seen.add(place)
        right += (colour == truth[place][0]) + (shape == truth[place][1])
    return right / (2 * len(truth) + wrong)


def _short_turns(rng: Random, facts: tuple[Fact, ...]) -> list[Turn]:
    place, colour, shape = rng.choice(facts)
    turns = [
        ask(rng, ("What is in the {p}?",), article(f"{colour} {shape}"), p=place),
        ask(rng, ("What color is the shape in the {p}?",), colour, p=place),
        ask(rng, ("How many shapes are there?",), str(len(facts))),
    ]
    turns += [
        ask(rng, ("Where is the {c} {s}?",), p, c=c, s=s)
        for p, c, s in facts
        if sum(f[1:] == (c, s) for f in facts) == 1
    ][:1]
    rng.shuffle(turns)
    return turns
