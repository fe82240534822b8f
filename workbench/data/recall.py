"""Recall over length: facts are told, filler or other facts go by, then one fact is asked again.

Short answers hide what attention is for. Here the answer stands somewhere in the prompt, word for
word, and nowhere else, so a model is right only if it still knows what it read so long ago.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random

from workbench.data.samples import Dataset, Sample
from workbench.errors import WorkbenchError

LENGTHS = (128, 256, 512, 1024, 2048)
TOKENS_PER_FACT = 14  # of SmolLM2's tokenizer, on average
NAMES = (
    "Alice", "Boris", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Irene", "Jack", "Karen",
    "Louis", "Maria", "Nora", "Oscar", "Paula", "Quentin", "Rosa", "Simon", "Teresa", "Ursula",
    "Victor", "Wendy", "Xavier", "Yvonne", "Zach",
)  # fmt: skip
THINGS = ("door", "locker", "phone", "room", "safe", "ticket", "train", "seat")


@dataclass(frozen=True)
class RecallSample(Sample):
    """A question whose answer is right if its first number is, whatever words stand around it."""

    def score(self, reply: str) -> float:
        """1 if the first number of four digits is the one that was told, else 0."""
        said, told = (re.search(r"\d{4}", text) for text in (reply, self.answer))
        return float(said is not None and said[0] == told[0])


def load_recall(
    *,
    lengths: tuple[int, ...] = LENGTHS,
    n_facts: int | None = 4,
    limit: int = 100,
    seed: int = 0,
) -> Dataset:
    """Return questions whose answer was told a while ago, in families by length.

    Args:
        lengths: of the prompts, in tokens, roughly.
        n_facts: told in each prompt, with everyday sentences between them; None fills the whole
            prompt with facts, so that what is to be remembered grows with the length.
        limit: questions in all; the lengths take turns.
        seed: of the facts.

    Raises:
        WorkbenchError: a length too short for its facts, or a limit below 1.
    """
    shortest = TOKENS_PER_FACT * (n_facts or 1)
    if not lengths or min(lengths) < shortest:
        raise WorkbenchError(
            f"The lengths {list(lengths)} do not all hold {n_facts or 1} facts: "
            f"ask for at least {shortest} tokens each."
        )
    if limit < 1:
        raise WorkbenchError(f"limit={limit} leaves no sample: ask for at least 1.")

    def make(index: int) -> Sample:
        length = lengths[index % len(lengths)]
        rng = Random(f"{seed}/recall/{length}/{n_facts}/{index // len(lengths)}")
        return _sample(rng, length, n_facts)

    return Dataset("recall", tuple(map(str, lengths)), make, limit)


FILLER = (
    "The weather was mild and the streets were quiet.",
    "A dog slept in front of the bakery.",
    "Somebody had left a newspaper on the bench.",
    "The bus came a little late that morning.",
    "Children played in the park behind the station.",
    "The market sold apples, bread and cheese.",
    "A light rain began in the afternoon and soon stopped.",
    "The old clock on the tower struck three.",
)
TOKENS_PER_FILLER = 11


def _sample(rng: Random, length: int, n_facts: int | None) -> Sample:
    n_told = n_facts or length // TOKENS_PER_FACT
    keys = rng.sample([(name, thing) for name in NAMES for thing in THINGS], min(n_told, 208))
    codes = rng.sample(range(1000, 10_000), len(keys))
    told = [
        f"The number of {name}'s {thing} is {code}."
        for (name, thing), code in zip(keys, codes, strict=True)
    ]
    n_filler = max(0, length - TOKENS_PER_FACT * len(told)) // TOKENS_PER_FILLER
    sentences = told + [rng.choice(FILLER) for _ in range(n_filler)]
    rng.shuffle(sentences)
    asked = rng.randrange(len(keys))
    name, thing = keys[asked]
    question = f"{' '.join(sentences)}\n\nWhat is the number of {name}'s {thing}?"
    return RecallSample((), question, told[asked], str(length))
