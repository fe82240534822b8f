"""Samples and comparisons that tests of training share."""

import tiny
import torch

from workbench.data import Sample
from workbench.models.plan import Plan

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
