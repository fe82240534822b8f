"""Recognition, position and counting: scenes of small drawings of things."""

from __future__ import annotations

from random import Random

from PIL import Image

from workbench.data.assets import load_atlas
from workbench.data.drawing import IMAGE_SIZE, canvas, paste
from workbench.data.scenes.scene import Scene, Turn, ask, drawings

CELLS = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}
_SIDE_QUESTIONS = (
    ("to the left of", -1, 0),
    ("to the right of", 1, 0),
    ("above", 0, -1),
    ("below", 0, 1),
)


def name_scene(rng: Random, unseen: bool) -> Scene:
    """One large object: what is it, and what kind of thing is it?"""
    concept, drawing = rng.choice(drawings(unseen))
    thing = load_atlas().concepts[concept]
    picture = single_object(rng, concept, drawing)
    turns = (
        ask(rng, ("What is this?", "Name the object.", "What does the picture show?"), thing.name),
        ask(rng, ("What kind of thing is shown?", "Which category is this?"), thing.category),
    )
    return Scene((picture,), turns)


def single_object(rng: Random, concept: int, drawing: int) -> Image.Image:
    """A picture of one object, 64 to 112 px, a little turned: (128, 128) RGB."""
    picture = canvas(rng)
    size = rng.randint(64, 112)
    slack = (IMAGE_SIZE - size) / 2
    centre = tuple(IMAGE_SIZE / 2 + rng.uniform(-slack, slack) for _ in range(2))
    sprite = load_atlas().sprite(concept, drawing)
    paste(picture, sprite, centre, size, angle=rng.uniform(-12, 12), flip=rng.random() < 0.5)
    return picture


def grid_scene(rng: Random, unseen: bool) -> Scene:
    """Four objects in a 2 x 2 grid: what is where?"""
    chosen = _distinct(rng, unseen, 5)
    things = [load_atlas().concepts[concept] for concept, _ in chosen]
    names = {cell: thing.name for cell, thing in zip(CELLS, things, strict=False)}
    picture = canvas(rng)
    for (column, row), (concept, drawing) in zip(CELLS.values(), chosen, strict=False):
        centre = [32 + 64 * k + rng.uniform(-5, 5) for k in (column, row)]
        paste(picture, load_atlas().sprite(concept, drawing), centre, rng.randint(42, 58))
    turns = [_what_is_in(rng, cell, name) for cell, name in names.items()]
    turns += [ask(rng, ("Where is the {n}?",), cell, n=name) for cell, name in names.items()]
    turns.append(_is_there(rng, rng.choice(things[:4]).with_article, "yes"))
    turns.append(_is_there(rng, things[4].with_article, "no"))
    turns.append(_neighbour(rng, names))
    rng.shuffle(turns)
    return Scene((picture,), tuple(turns))


def count_scene(rng: Random, unseen: bool) -> Scene:
    """One to six copies of one thing among up to four of another: how many?"""
    (target, other), names = _countable_pair(rng, unseen)
    n_target, n_other = rng.randint(1, 6), rng.randint(0, 4)
    cells = rng.sample([(x, y) for x in range(4) for y in range(4)], n_target + n_other)
    picture = canvas(rng)
    for i, (x, y) in enumerate(cells):
        concept, drawing = target if i < n_target else other
        centre = [16 + 32 * k + rng.uniform(-2, 2) for k in (x, y)]
        paste(picture, load_atlas().sprite(concept, drawing), centre, rng.randint(24, 31))
    how_many = ("How many {n} are there?", "Count the {n}.")
    turns = [
        ask(rng, how_many, str(n_target), n=names[0]),
        ask(rng, how_many, str(n_other), n=names[1]),
        ask(rng, ("How many things are there in all?",), str(n_target + n_other)),
    ]
    return Scene((picture,), tuple(turns))


def _distinct(rng: Random, unseen: bool, n: int) -> list[tuple[int, int]]:
    chosen: dict[int, int] = {}
    while len(chosen) < n:
        concept, drawing = rng.choice(drawings(unseen))
        chosen.setdefault(concept, drawing)
    return list(chosen.items())


def _countable_pair(rng: Random, unseen: bool):
    while True:
        pair = _distinct(rng, unseen, 2)
        names = [load_atlas().concepts[concept].plural for concept, _ in pair]
        if all(names):
            return pair, names


def _what_is_in(rng: Random, cell: str, name: str) -> Turn:
    return ask(rng, ("What is in the {c}?", "Name the object in the {c}."), name, c=cell)


def _is_there(rng: Random, thing: str, answer: str) -> Turn:
    return ask(rng, ("Is there {t}?", "Is there {t} in the picture?"), answer, t=thing)


def _neighbour(rng: Random, names: dict[str, str]) -> Turn:
    side, dx, dy = rng.choice(_SIDE_QUESTIONS)
    at = {position: names[cell] for cell, position in CELLS.items()}
    pairs = [(at[p], at[p[0] + dx, p[1] + dy]) for p in at if (p[0] + dx, p[1] + dy) in at]
    anchor, answer = rng.choice(pairs)
    return ask(rng, ("What is {s} the {n}?",), answer, s=side, n=anchor)
