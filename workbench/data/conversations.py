"""Conversations as token ids, and endless shuffled batches of them for training.

A training sequence asks one scene several questions, so that its image tokens, most of the cost,
are read once for many answers:

    USER: <image> x 256  question ASSISTANT: answer </s>  USER: question ASSISTANT: answer </s> ...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from workbench.data import easy_vqa
from workbench.data.drawing import IMAGE_SIZE
from workbench.data.scenes import Scene, Turn, make_scene
from workbench.errors import WorkbenchError

IGNORE = -100  # the label that cross-entropy skips
MOST_IMAGES = 4
# How often a family is drawn in training. The harder ones come more often.
MIXTURE = {
    "name": 1.2, "grid": 1.6, "count": 1.2, "flag": 0.7, "word": 1.3, "letters": 0.6,
    "chart": 1.0, "describe": 1.0, "easy-vqa": 0.6,
}  # fmt: skip


@dataclass
class Encoder:
    """Turns text into ids with a tokenizer that knows USER:, ASSISTANT:, <image> and </s>.

    The pieces of a conversation are few and come again, so each is encoded once and kept.
    """

    tokenizer: object
    n_image_tokens: int = 256
    _cache: dict[str, list[int]] = field(default_factory=dict, repr=False)

    def text(self, text: str) -> list[int]:
        """Ids of a piece of text between two special tokens."""
        if text not in self._cache:
            self._cache[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return self._cache[text]

    def special(self, token: str) -> int:
        """Id of one special token."""
        return self.tokenizer.convert_tokens_to_ids(token)

    def conversation(
        self, turns: Sequence[Turn], n_images: int, max_text: int
    ) -> tuple[list[int], list[int]]:
        """Ids and labels of as many turns as fit `max_text` tokens besides the image tokens.

        Returns:
            ids, and labels of the same length: the id where it belongs to an answer (its </s>
            included), else `IGNORE`. A first turn that does not fit is cut.
        """
        user, assistant, end = (self.special(t) for t in ("USER:", "ASSISTANT:", "</s>"))
        image_ids = [self.special("<image>")] * (n_images * self.n_image_tokens)
        room = max_text + len(image_ids)
        ids: list[int] = []
        labels: list[int] = []
        for number, turn in enumerate(turns):
            seen = image_ids if number == 0 else ()
            question = [user, *seen, *self.text(turn.question), assistant]
            reply = [*self.text(turn.answer), end]
            if number and len(ids) + len(question) + len(reply) > room:
                continue
            ids += question + reply
            labels += [IGNORE] * len(question) + reply
        return ids[:room], labels[:room]


def asking_order(rng: Random, turns: Sequence[Turn]) -> list[Turn]:
    """The turns in random order; half of the time the scene's main question, turn 0, comes first.

    Any question may open a conversation later on, so any question must open some of these. A long
    description that does not come first comes second, where it still fits.
    """
    main, *others = turns
    rng.shuffle(others)
    if rng.random() < 0.5:
        return [main, *others]
    place = 1 if main.facts is not None else rng.randint(1, max(1, len(others)))
    return [*others[:place], main, *others[place:]]


def pixels(pictures: Sequence[Image.Image], n: int) -> torch.Tensor:
    """Pictures as (n, 3, 128, 128) uint8, resized where needed, blank beyond the last."""
    out = np.zeros((n, 3, IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    for place, picture in enumerate(pictures):
        if picture.size != (IMAGE_SIZE, IMAGE_SIZE):
            picture = picture.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        out[place] = np.asarray(picture).transpose(2, 0, 1)
    return torch.from_numpy(out)


class TrainingBatches(IterableDataset):
    """Endless training batches of the pocket families; workers draw disjoint scenes.

    Each item is a dict: `pixel_values` (batch_size, 3, 128, 128) uint8 in the order of the image
    tokens; `input_ids` and `labels` (n_rows, n_slots * n_image_tokens + max_text) int64,
    right-padded with id 0 and `IGNORE`, which a causal model may read without a mask; `real`, of
    the same shape, False where that padding is; and `text_tokens`, how many of the last positions
    hold text in any row. One batch in `several_every` is of prompts with two to four pictures and
    holds a quarter as many rows; blank pictures fill up its `pixel_values`, so that compiled code
    sees two shapes only.

    Raises:
        WorkbenchError: a batch size too small for one prompt of four pictures.
    """

    def __init__(
        self, encoder: Encoder, batch_size: int, *, max_text: int = 80, several_every: int = 12,
        seed: int = 0, mixture: Mapping[str, float] = MIXTURE,
    ):  # fmt: skip
        if batch_size < MOST_IMAGES:
            raise WorkbenchError(f"batch_size={batch_size} is too small: ask for {MOST_IMAGES}.")
        self.encoder, self.batch_size, self.max_text = encoder, batch_size, max_text
        self.several_every, self.seed, self.mixture = several_every, seed, dict(mixture)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = get_worker_info()
        number, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        while True:
            yield self.batch(number)
            number += stride

    def batch(self, number: int) -> dict[str, torch.Tensor]:
        """Batch `number`, always the same one for a seed."""
        rng = Random(f"{self.seed}/batch/{number}")
        if number % self.several_every == self.several_every - 1:
            families = ["several"] * (self.batch_size // MOST_IMAGES)
            return self._stack(rng, families, MOST_IMAGES, fewest=2)
        names, weights = zip(*self.mixture.items(), strict=True)
        return self._stack(rng, rng.choices(names, weights, k=self.batch_size), 1)

    def _stack(self, rng: Random, families: list[str], slots: int, fewest: int = 1) -> dict:
        n_image_tokens = self.encoder.n_image_tokens
        length = slots * n_image_tokens + self.max_text
        ids = torch.zeros(len(families), length, dtype=torch.long)
        labels = torch.full((len(families), length), IGNORE)
        real = torch.zeros(len(families), length, dtype=torch.bool)
        pictures: list[Image.Image] = []
        for row, family in enumerate(families):
            scene = self._scene(rng, family)
            turns = asking_order(rng, scene.turns)
            text, wanted = self.encoder.conversation(turns, len(scene.images), self.max_text)
            ids[row, : len(text)] = torch.tensor(text)
            labels[row, : len(text)] = torch.tensor(wanted)
            real[row, : len(text)] = True
            pictures += scene.images
        return {
            "pixel_values": pixels(pictures, self.batch_size),
            "input_ids": ids,
            "labels": labels,
            "real": real,
            "text_tokens": length - fewest * n_image_tokens,
        }

    def _scene(self, rng: Random, family: str) -> Scene:
        if family == "easy-vqa":
            return easy_vqa.training_scene(rng)
        return make_scene(family, "train", rng.getrandbits(48), self.seed)
