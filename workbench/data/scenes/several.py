"""Two to four pictures in one prompt: which of them, and do they agree?"""

from __future__ import annotations

from random import Random

from workbench.data.assets import Concept, load_atlas
from workbench.data.scenes.objects import single_object
from workbench.data.scenes.scene import Scene, Turn, ask, drawings

ORDINALS = ("first", "second", "third", "fourth")


def several_scene(rng: Random, unseen: bool) -> Scene:
    """Two to four pictures of one object each, sometimes with a repetition."""
    n = rng.randint(2, 4)
    chosen = [rng.choice(drawings(unseen)) for _ in range(n)]
    if rng.random() < 0.35:
        chosen[rng.randrange(1, n)] = chosen[0]
    things = [load_atlas().concepts[concept] for concept, _ in chosen]
    pictures = tuple(single_object(rng, concept, drawing) for concept, drawing in chosen)
    turns = [
        ask(rng, ("What is in the {o} picture?",), thing.name, o=ordinal)
        for ordinal, thing in zip(ORDINALS, things, strict=False)
    ]
    turns += _which_picture(rng, things) + [_same(rng, [t.name for t in things])]
    kind = rng.choice(things).category
    n_kind = sum(thing.category == kind for thing in things)
    how_many = ("How many pictures show something of the kind {k}?",)
    turns.append(ask(rng, how_many, str(n_kind), k=kind))
    rng.shuffle(turns)
    return Scene(pictures, tuple(turns))


def _which_picture(rng: Random, things: list[Concept]) -> list[Turn]:
    return [
        ask(rng, ("Which picture shows {t}?",), ordinal, t=thing.with_article)
        for ordinal, thing in zip(ORDINALS, things, strict=False)
        if things.count(thing) == 1
    ]


def _same(rng: Random, names: list[str]) -> Turn:
    i, j = sorted(rng.sample(range(len(names)), 2))
    same = "yes" if names[i] == names[j] else "no"
    question = "Do the {a} and the {b} picture show the same thing?"
    return ask(rng, (question,), same, a=ORDINALS[i], b=ORDINALS[j])
