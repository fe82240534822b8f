"""What a generator returns, and what decides which drawings it may use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

from PIL import Image

from workbench.data.assets import load_atlas

SPLITS = ("train", "test", "unseen")
Fact = tuple[str, str, str]  # (place, colour, shape)


@dataclass(frozen=True)
class Turn:
    """One question about a scene. `facts` is set where the answer is scored fact by fact."""

    question: str
    answer: str
    facts: tuple[Fact, ...] | None = None


@dataclass(frozen=True)
class Scene:
    """One to four 128 x 128 RGB pictures and the questions that can be asked about them."""

    images: tuple[Image.Image, ...]
    turns: tuple[Turn, ...]


def ask(rng: Random, wordings: Sequence[str], answer: str, **names: str) -> Turn:
    """A turn in one of several wordings, its {slots} filled from `names`."""
    return Turn(rng.choice(wordings).format(**names), answer)


def article(noun: str) -> str:
    """`noun` with a or an: 'apple' -> 'an apple'."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


# Held out for good. `train` and `test` draw from the rest (test with other seeds); `unseen` draws
# only from these, so it shows drawings, flags and words that no model of ours was trained on.
@lru_cache
def drawings(unseen: bool) -> tuple[tuple[int, int], ...]:
    """(concept, drawing) pairs: of every fifth concept, one of the three drawings is held out."""
    pairs = [(c, d) for c in range(len(load_atlas().concepts)) for d in range(3)]
    return tuple(p for p in pairs if (p[0] % 5 == 0 and (p[0] // 5) % 3 == p[1]) is unseen)


@lru_cache
def flag_drawings(unseen: bool) -> tuple[tuple[int, int], ...]:
    """(flag, drawing) pairs: of every fifth flag, the second drawing is held out."""
    pairs = [(f, d) for f in range(len(load_atlas().flags)) for d in range(2)]
    return tuple(p for p in pairs if (p[0] % 5 == 0 and p[1] == 1) is unseen)


@lru_cache
def words(unseen: bool) -> tuple[str, ...]:
    """Every eighth word of the list is held out."""
    return tuple(w for i, w in enumerate(load_atlas().words) if (i % 8 == 0) is unseen)
