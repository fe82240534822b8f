"""Reading: words in four typefaces, and strings of letters that no dictionary knows."""

from __future__ import annotations

import string
from random import Random

from workbench.data.assets import load_atlas
from workbench.data.drawing import COLOURS, IMAGE_SIZE, canvas, draw_text, shade
from workbench.data.scenes.scene import Scene, ask, words

_DARK = [name for name in COLOURS if name != "yellow"]  # yellow on a light canvas is unreadable


def word_scene(rng: Random, unseen: bool) -> Scene:
    """One word: read it."""
    return _written(rng, rng.choice(words(unseen)), "word")


def letters_scene(rng: Random, unseen: bool) -> Scene:
    """Three to six letters without a meaning. Trained on only: they teach to read, not to guess."""
    return _written(rng, "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 6))), "text")


def _written(rng: Random, text: str, kind: str) -> Scene:
    picture, colour = canvas(rng), rng.choice(_DARK)
    shown = text.upper() if rng.random() < 0.35 else text
    face, size = rng.randrange(4), rng.randint(16, 30)
    font = load_atlas().font(face, size)
    while font.getlength(shown) > IMAGE_SIZE - 10:
        size -= 1
        font = load_atlas().font(face, size)
    slack = (max(0.0, IMAGE_SIZE - 8 - font.getlength(shown)) / 2, (IMAGE_SIZE - 1.5 * size) / 2)
    centre = tuple(IMAGE_SIZE / 2 + rng.uniform(-s, s) for s in slack)
    draw_text(picture, shown, font, shade(rng, colour), centre, rng.uniform(-4, 4))
    read = ("Read the {k}.", "What does the {k} say?", "What is written here?")
    turns = [
        ask(rng, read, text, k=kind),
        ask(rng, ("What color is the {k}?",), colour, k=kind),
        ask(rng, ("What is the first letter?",), text[0]),
        ask(rng, ("What is the last letter?",), text[-1]),
        ask(rng, ("How many letters are there?",), str(len(text))),
    ]
    return Scene((picture,), tuple(turns))
