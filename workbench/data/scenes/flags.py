"""Flags of countries: which country, its capital, its continent."""

from __future__ import annotations

from random import Random

from PIL import Image

from workbench.data.assets import load_atlas
from workbench.data.drawing import IMAGE_SIZE, canvas, paste
from workbench.data.scenes.scene import Scene, ask, flag_drawings


def flag_scene(rng: Random, unseen: bool) -> Scene:
    """One flag."""
    flag, drawing = rng.choice(flag_drawings(unseen))
    country = load_atlas().flags[flag]
    which = ("Which country is this?", "Whose flag is this?", "Which country has this flag?")
    turns = [
        ask(rng, which, country.country),
        ask(rng, ("What is the capital of this country?",), country.capital),
        ask(rng, ("Which continent is this country in?",), country.continent),
    ]
    return Scene((flag_picture(rng, flag, drawing),), tuple(turns))


def flag_picture(rng: Random, flag: int, drawing: int) -> Image.Image:
    """A picture of one flag, 72 to 112 px wide, a little turned: (128, 128) RGB."""
    picture = canvas(rng)
    size = rng.randint(72, 112)
    sides = (size, 0.75 * size)
    centre = [IMAGE_SIZE / 2 + rng.uniform(-1, 1) * (IMAGE_SIZE - side) / 2 for side in sides]
    sprite = load_atlas().flag(flag, drawing).convert("RGBA")
    paste(picture, sprite, centre, size, angle=rng.uniform(-6, 6))
    return picture
