"""Build the pocket processor: byte-level BPE of 2,048 tokens on the generator's own questions.

    python -m benchmarks.pocket.build_processor FOLDER

Deterministic: the same generator gives the same tokenizer.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from random import Random

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from workbench.data import easy_vqa
from workbench.data.assets import load_atlas
from workbench.data.conversations import MIXTURE
from workbench.data.scenes import make_scene
from workbench.models.sources.pocket_model import build_pocket_processor

VOCAB_SIZE = 2048
SPECIAL = ("<pad>", "</s>", "USER:", "ASSISTANT:", "<image>")  # ids 0..4


def corpus(n_scenes: int = 40_000) -> Iterator[str]:
    """Questions and answers of training scenes, and every name once, so that none is rare."""
    rng = Random(0)
    families = [f for f in (*MIXTURE, "several") if f != "letters"]
    for index in range(n_scenes):
        family = families[index % len(families)]
        if family == "easy-vqa":
            scene = easy_vqa.training_scene(rng)
        else:
            scene = make_scene(family, "train", index)
        for turn in scene.turns:
            yield turn.question
            yield turn.answer
    atlas = load_atlas()
    for thing in atlas.concepts:
        yield from [thing.name, thing.plural or thing.name] * 20
    for flag in atlas.flags:
        yield from [flag.country, flag.capital] * 20


def train_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, ready for `save_pretrained`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    # The markers swallow the blanks around them, so that a piece of text is encoded alike wherever
    # it stands and "ASSISTANT: red" ends in the same token as "is it red".
    special = [AddedToken(t, lstrip=True, rstrip=True, special=True) for t in SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        extra_special_tokens={
            "image_token": "<image>",
            "user_token": "USER:",
            "assistant_token": "ASSISTANT:",
        },
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def main() -> None:
    """Command line: writes the whole processor, tokenizer and image processor."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    build_pocket_processor(train_tokenizer()).save_pretrained(parser.parse_args().folder)


if __name__ == "__main__":
    main()
