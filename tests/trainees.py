"""Samples and comparisons that tests of training share."""

import tiny
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from workbench.data import Sample
from workbench.models.plan import Plan
from workbench.models.teacher import VLM

PLAN = Plan(tiny.N_LAYERS, (0, 2))


def samples(n=4, n_images=1):
    answers = ("red", "two bars", "the tallest bar is red", "no")
    return [
        Sample(
            tuple(tiny.image(4 * i + k) for k in range(n_images)),
            f"which colour is bar {'x' * (i % 3)}{i}?",
            answers[i % 4],
            ("colour", "count")[i % 2],
        )
        for i in range(n)
    ]


def tensors(vlm):
    return {name: tensor.clone() for name, tensor in vlm.model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def graded(replies, families=None):
    """An answer_batch that says these words, and samples with the answers 'yes'."""
    families = families or ["only"] * len(replies)
    some = [Sample((), f"{i}?", "yes", family) for i, family in enumerate(families)]
    said = {f"{i}?": reply for i, reply in enumerate(replies)}

    def fake(vlm, asked, **options):
        return [said[sample.question] for sample in asked]

    return some, fake


def stack(n_layers):
    """All that choose_layers looks at: a family, and so many layers."""
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=n_layers))
    return VLM("stack", model, None)
