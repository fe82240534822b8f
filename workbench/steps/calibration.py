"""Fit mixers to the attention they replace, in closed form, from a few sequences of the teacher.

Two things are found, layer by layer, on what the teacher's layer was given and gave:

1. the decay of each head: of `RATES`, the one whose output, mapped linearly, comes nearest to the
   output of the same head of the attention;
2. the output projection: that linear map folded into the attention's own W_O, then corrected
   towards the output of the whole attention, as far as the data say so and no further.

No gradient is computed, and nothing but the layer's own input and output is looked at.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from workbench.models.families import decoder_layers
from workbench.models.hybrid import SSMAttention, mixers
from workbench.models.teacher import VLM
from workbench.steps.batches import Batch

# Forgetting per token, exp(-rate): memories of 300 tokens down to one.
RATES = (0.0032, 0.01, 0.032, 0.1, 0.32, 1.0)
# Weight of the prior in each least-squares fit, relative to the mean square of the features: the
# prior of a head is "no output", that of the whole layer is what its heads give.
HEAD_RIDGE, LAYER_RIDGE = 1e-2, 1e-1


def calibrate(student: VLM, teacher: VLM, batch: Batch) -> None:
    """Set decays and output projections of every mixer of `student` from one batch, in place.

    Each layer is fitted while the teacher runs past it, so that one layer's activations at a time
    are kept. A quantised output projection stays as it is.

    Args:
        student: a hybrid whose mixers pass their input through (`pass_through`).
        teacher: the model that it was built from.
        batch: model inputs, with `real` or `attention_mask` where there is padding.
    """
    device = teacher.model.device
    real = batch.get("real", batch.get("attention_mask"))
    if real is None:
        real = torch.ones_like(batch["input_ids"])
    fits = [
        _Fit(mixer, decoder_layers(teacher.model)[i].self_attn, real.bool().to(device))
        for i, mixer in mixers(student.model).items()
    ]
    names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids")
    inputs = {name: batch[name].to(device) for name in names if name in batch}
    try:
        with torch.no_grad():
            teacher.model(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        for fit in fits:
            fit.close()


class _Fit:
    """Listens to one attention of the teacher, and fits one mixer when it has answered."""

    def __init__(self, mixer: SSMAttention, attention: nn.Module, real: Tensor) -> None:
        self.mixer, self.real = mixer, real
        out = getattr(attention, mixer.names.out)
        self.hooks = [
            out.register_forward_pre_hook(self._keep_heads),
            attention.register_forward_hook(self._fit, with_kwargs=True),
        ]

    def _keep_heads(self, module: nn.Module, args: tuple[Tensor]) -> None:
        self.heads = args[0][self.real].double().unflatten(-1, (self.mixer.config.n_heads, -1))

    def _fit(self, attention: nn.Module, args: tuple, kwargs: dict, output: tuple) -> None:
        mixer, out = self.mixer, getattr(self.mixer, self.mixer.names.out)
        call = kwargs | {"past_key_values": None}
        maps = _HeadMaps(mixer.config.n_heads, intercept=out.bias is not None)
        for rate in RATES:
            mixer.A_log.fill_(rate).log_()
            mixed = self._mixed(args, call).unflatten(-1, self.heads.shape[1:])
            maps.offer(rate, mixed, self.heads)
        mixer.A_log.copy_(torch.tensor(maps.rates)).log_()
        if type(out) is nn.Linear and out.weight.is_floating_point():
            _fold(out, maps)
            mixed = self._mixed(args, call)
            missing = output[0][self.real].double() - out(mixed.to(out.weight.dtype)).double()
            _add(out, _ridge(mixed, missing, LAYER_RIDGE, maps.intercept))
        self.heads = None

    def _mixed(self, args: tuple, kwargs: dict) -> Tensor:
        """What the mixer hands to its output projection at real positions: (tokens, d_inner)."""
        kept = []
        out = getattr(self.mixer, self.mixer.names.out)
        hook = out.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
        self.mixer(*args, **kwargs)
        hook.remove()
        return kept[0][self.real].double()

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()


class _HeadMaps:
    """For each head the best rate so far, and the map from the mixer's head to attention's."""

    def __init__(self, n_heads: int, intercept: bool) -> None:
        self.intercept = intercept
        self.errors, self.rates = [float("inf")] * n_heads, [1.0] * n_heads
        self.maps: list[Tensor | None] = [None] * n_heads

    def offer(self, rate: float, mixed: Tensor, wanted: Tensor) -> None:
        """Keep `rate` for those heads that it serves best; both tensors (tokens, h, headdim)."""
        for head in range(len(self.rates)):
            x, y = mixed[:, head], wanted[:, head]
            solved = _ridge(x, y, HEAD_RIDGE, self.intercept)
            error = (x @ solved[:-1] + solved[-1] - y).norm().item()
            if error < self.errors[head]:
                self.errors[head], self.rates[head], self.maps[head] = error, rate, solved


def _ridge(x: Tensor, y: Tensor, weight: float, intercept: bool = True) -> Tensor:
    """Solve y ~ x W + b with a penalty on W: (tokens, n), (tokens, m) -> (n + 1, m), b last."""
    x = torch.cat([x, torch.full_like(x[:, :1], float(intercept))], dim=1)
    gram = x.mT @ x
    penalty = weight * gram.diagonal()[:-1].mean() + 1e-12
    gram.diagonal().add_(penalty)
    return torch.linalg.solve(gram, x.mT @ y)


def _fold(out: nn.Linear, maps: _HeadMaps) -> None:
    """W_O (M y + c) = (W_O M) y + W_O c, where M maps head by head."""
    weight = out.weight.double()
    constant = weight @ torch.cat([solved[-1] for solved in maps.maps])
    block = torch.block_diag(*(solved[:-1].mT for solved in maps.maps))
    out.weight.copy_(weight @ block)
    if out.bias is not None:
        out.bias.add_(constant)


def _add(out: nn.Linear, solved: Tensor) -> None:
    out.weight.add_(solved[:-1].mT)
    if out.bias is not None:
        out.bias.add_(solved[-1])
