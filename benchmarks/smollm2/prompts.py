"""Questions and tasks by the thousand: templates over common nouns of WordNet, sums and lists.

The teacher answers them itself, so nothing here needs to be right, only varied.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

# Lexicographer files of WordNet, and what one may ask about the nouns in them.
ASKING = {
    "animal": ("05", (
        "What does {a} eat?", "Describe {a} to a child.", "Where do {s} live?",
        "Write a short story about {a} who is lost.", "How long does {a} usually live?",
        "Give me three interesting facts about {s}.")),
    "artifact": ("06", (
        "What is {a} used for?", "Explain how {a} works.", "How would you clean {a}?",
        "Who invented the {n}?", "Write an advertisement for {a}.",
        "What should I look for when I buy {a}?", "Name two alternatives to {a}.",
        "Describe {a} without using its name.")),
    "act": ("04", (
        "What does '{n}' mean?", "Give me some tips about {n}.",
        "Use the word '{n}' in a sentence.", "Why do people care about {n}?",
        "Write a short dialogue about {n}.")),
    "idea": ("09", (
        "What is {n}?", "Explain the idea of {n} in simple words.",
        "Why does {n} matter?", "Give an example of {n} from daily life.",
        "Write a paragraph about {n}.")),
    "food": ("13", (
        "How do I cook {n}?", "Give me a simple recipe with {n}.", "Is {n} healthy?",
        "What goes well with {n}?", "Write a haiku about {n}.")),
    "place": ("15", (
        "What can one see at {a}?", "Describe a day at {a}.",
        "What is the difference between {a} and a city?", "Write a postcard from {a}.")),
    "nature": ("17", (
        "How is {a} formed?", "Describe {a} in two sentences.", "Write a poem about {a}.")),
    "person": ("18", (
        "What does {a} do?", "How does one become {a}?",
        "Write a letter to {a}.", "Describe a typical day of {a}.",
        "What are the most important skills of {a}?")),
    "plant": ("20", (
        "How do I grow {a}?", "What does {a} look like?", "What is {a} used for?")),
    "body": ("08", ("What does the {n} do?", "How can I keep my {n} healthy?")),
    "feeling": ("12", (
        "What is {n}?", "How can I deal with {n}?", "Write a short poem about {n}.")),
    "time": ("28", ("What is meant by '{n}'?", "Write a sentence with the word '{n}'.")),
    "talk": ("10", (
        "What is {a}?", "Rewrite this in plain English: 'The {n} was duly noted.'",
        "Write {a} about the weather.")),
}  # fmt: skip
TASKS = (
    "Summarise the plot of a story about {a} and {b} in three sentences.",
    "Compare {a} with {b}.", "List five things that {a} and {b} have in common.",
    "Translate 'the {n} is beside the {m}' into French.",
    "Write a title for an article about {a} and {b}.",
    "Is {a} bigger than {b}?", "Correct this sentence: 'The {n} are next to an {m}.'",
    "Write an e-mail to a friend who has lost {a} and found {b}.",
    "Continue the story: Once upon a time there was {a} that wanted to be {b}.",
    "Make up a riddle whose answer is '{n}'.", "Which word does not fit: {n}, {m}, blue?",
)  # fmt: skip
SUMS = (
    "What is {x} plus {y}?", "What is {x} minus {y}?", "What is {x} times {z}?",
    "I have {x} apples and eat {z}. How many are left?", "Which is larger, {x} or {y}?",
    "Write a Python function that returns the first {z} multiples of {x}.",
    "Write a Python loop that prints the numbers from {z} to {x}.",
    "How many minutes are {z} hours?", "Count from {z} to 15.",
)  # fmt: skip


def common_nouns(folder: Path, file: str) -> list[str]:
    """Single words whose first sense stands in a lexicographer file and is met in real text."""
    nouns = []
    for line in (folder / "index.sense").read_text().splitlines():
        key, _, number, n_seen = line.split()
        lemma, _, sense = key.partition("%")
        of_noun = sense.startswith(f"1:{file}:") and number == "1"
        if of_noun and int(n_seen) >= 2 and lemma.isalpha() and 3 <= len(lemma) <= 12:
            nouns.append(lemma)
    return nouns


def with_article(noun: str) -> str:
    """The noun after "a" or "an"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    """A plural that is right most of the time."""
    if noun.endswith(("s", "x", "ch", "sh")):
        return f"{noun}es"
    return f"{noun[:-1]}ies" if noun.endswith("y") and noun[-2] not in "aeiou" else f"{noun}s"


def write_prompts(folder: Path, *, n: int, seed: int) -> list[str]:
    """`n` different prompts, of every kind in turn; always the same for a seed.

    Args:
        folder: WordNet's `dict`.
        n: how many.
        seed: of the choice of words.
    """
    rng = Random(seed)
    topics = {name: common_nouns(folder, file) for name, (file, _) in ASKING.items()}
    things = topics["artifact"] + topics["animal"]
    prompts: dict[str, None] = {}
    while len(prompts) < n:
        for name, (_, templates) in ASKING.items():
            noun = rng.choice(topics[name])
            asked = rng.choice(templates)
            prompts[asked.format(n=noun, a=with_article(noun), s=plural(noun))] = None
        one, two = rng.sample(things, 2)
        prompts[
            rng.choice(TASKS).format(n=one, m=two, a=with_article(one), b=with_article(two))
        ] = None
        x, y, z = rng.randint(12, 99), rng.randint(2, 60), rng.randint(2, 12)
        prompts[rng.choice(SUMS).format(x=x, y=y, z=z)] = None
    chosen = list(prompts)[:n]
    rng.shuffle(chosen)
    return chosen
