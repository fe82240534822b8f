"""Strokes that every generated picture is made of: a canvas, sprites, coloured shapes, words.

All pictures are 128 x 128 RGB. Randomness comes from the caller's `random.Random`, so that a seed
fixes every pixel.
"""

from __future__ import annotations

import math
from functools import lru_cache
from random import Random

from PIL import Image, ImageDraw, ImageFont

IMAGE_SIZE = 128
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "orange": (245, 130, 32),
    "yellow": (247, 208, 32),
    "green": (44, 150, 60),
    "teal": (20, 160, 160),
    "blue": (36, 90, 200),
    "purple": (128, 60, 170),
    "pink": (240, 120, 180),
    "brown": (130, 80, 45),
    "gray": (128, 128, 128),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring", "moon")
_MASK_SIZE = 96


def canvas(rng: Random) -> Image.Image:
    """A plain, light background: (128, 128) RGB."""
    base = rng.randint(218, 250)
    tint = tuple(min(255, max(205, base + rng.randint(-12, 12))) for _ in range(3))
    return Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), tint)


def shade(rng: Random, colour: str) -> tuple[int, int, int]:
    """The named colour, a little lighter, darker or off: RGB in 0..255."""
    return tuple(min(255, max(0, c + rng.randint(-14, 14))) for c in COLOURS[colour])


def paste(
    picture: Image.Image,
    sprite: Image.Image,
    centre: tuple[float, float],
    size: int,
    *,
    angle: float = 0.0,
    flip: bool = False,
) -> None:
    """Paste an RGBA sprite onto `picture`, its longer side `size` px, turned by `angle` degrees."""
    if flip:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = size / max(sprite.size)
    box = tuple(max(1, round(side * scale)) for side in sprite.size)
    sprite = sprite.resize(box, Image.Resampling.BILINEAR)
    if angle:
        sprite = sprite.rotate(angle, Image.Resampling.BILINEAR, expand=True)
    corner = (round(centre[0] - sprite.width / 2), round(centre[1] - sprite.height / 2))
    picture.paste(sprite, corner, sprite)


def draw_shape(
    picture: Image.Image,
    shape: str,
    colour: tuple[int, int, int],
    centre: tuple[float, float],
    size: int,
) -> None:
    """Fill one of `SHAPES`, `size` px across, around `centre`."""
    mask = shape_mask(shape).resize((size, size), Image.Resampling.BILINEAR)
    corner = (round(centre[0] - size / 2), round(centre[1] - size / 2))
    picture.paste(colour, (*corner, corner[0] + size, corner[1] + size), mask)


def draw_text(
    picture: Image.Image,
    text: str,
    font: ImageFont.FreeTypeFont,
    colour: tuple[int, int, int],
    centre: tuple[float, float],
    angle: float = 0.0,
) -> None:
    """Write `text` around `centre`, turned by `angle` degrees."""
    left, top, right, bottom = font.getbbox(text)
    mask = Image.new("L", (right - left + 4, bottom - top + 4), 0)
    ImageDraw.Draw(mask).text((2 - left, 2 - top), text, fill=255, font=font)
    if angle:
        mask = mask.rotate(angle, Image.Resampling.BILINEAR, expand=True)
    corner = (round(centre[0] - mask.width / 2), round(centre[1] - mask.height / 2))
    picture.paste(colour, (*corner, corner[0] + mask.width, corner[1] + mask.height), mask)


@lru_cache
def shape_mask(shape: str) -> Image.Image:
    """An antialiased (96, 96) mask of one of `SHAPES`."""
    big = 4 * _MASK_SIZE
    mask = Image.new("L", (big, big), 0)
    _fill(ImageDraw.Draw(mask), shape, big)
    return mask.resize((_MASK_SIZE, _MASK_SIZE), Image.Resampling.LANCZOS)


def _fill(draw: ImageDraw.ImageDraw, shape: str, s: int) -> None:
    if shape in _POLYGONS:
        draw.polygon([(x * s, y * s) for x, y in _POLYGONS[shape]], fill=255)
        return
    edge = 0.03 * s
    draw.ellipse((edge, edge, s - edge, s - edge), fill=255)
    if shape == "ring":
        draw.ellipse((0.28 * s, 0.28 * s, 0.72 * s, 0.72 * s), fill=0)
    elif shape == "moon":
        draw.ellipse((0.3 * s, -0.06 * s, 1.16 * s, 0.8 * s), fill=0)


def _star(points: int, inner: float) -> list[tuple[float, float]]:
    corners = []
    for i in range(2 * points):
        radius = 0.5 if i % 2 == 0 else 0.5 * inner
        turn = math.pi * i / points - math.pi / 2
        corners.append((0.5 + radius * math.cos(turn), 0.52 + radius * math.sin(turn)))
    return corners


def _heart(steps: int = 60) -> list[tuple[float, float]]:
    corners = []
    for i in range(steps):
        t = 2 * math.pi * i / steps
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        corners.append((0.5 + x / 35, 0.47 - y / 35))
    return corners


_A, _B = 0.34, 0.66  # where the arms of the cross begin and end
_POLYGONS: dict[str, list[tuple[float, float]]] = {
    "square": [(0.08, 0.08), (0.92, 0.08), (0.92, 0.92), (0.08, 0.92)],
    "triangle": [(0.5, 0.05), (0.97, 0.92), (0.03, 0.92)],
    "diamond": [(0.5, 0.0), (0.88, 0.5), (0.5, 1.0), (0.12, 0.5)],
    "star": _star(5, 0.42),
    "heart": _heart(),
    "cross": [
        (_A, 0.04), (_B, 0.04), (_B, _A), (0.96, _A), (0.96, _B), (_B, _B),
        (_B, 0.96), (_A, 0.96), (_A, _B), (0.04, _B), (0.04, _A), (_A, _A),
    ],
}  # fmt: skip
