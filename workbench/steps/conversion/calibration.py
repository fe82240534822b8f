"""Fit mixers to the attention they replace, in closed form, from a few sequences of the teacher.

Layer by layer, from the bottom up, two things are found:

1. the decay of each head: of `RATES`, the one whose output, mapped linearly, comes nearest to the
   output of the same head of the attention;
2. the output projection: that linear map folded into the attention's own W_O, then corrected
   towards the output of the whole attention, as far as the data say so and no further.

Each mixer is fitted on what the student gives it, once all layers below are fitted: so it also
makes up for what they got wrong. No gradient is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.models.cache import CACHE
from workbench.models.families import decoder_layers
from workbench.models.hybrid import SSMAttention, mixers
from workbench.models.teacher import VLM
from workbench.steps.quality.fidelity import model_inputs
from workbench.steps.training.batches import Batch

# Forgetting per token, exp(-rate): memories of 300 tokens down to one.
RATES = (0.0032, 0.01, 0.032, 0.1, 0.32, 1.0)
# Weight of the prior in each least-squares fit, relative to the mean square of the features: the
# prior of a head is "no output", that of the whole layer is what its heads give.
HEAD_RIDGE, LAYER_RIDGE = 1e-2, 1e-1
# Of the tokens of a picture, which are many and much alike, every so many'th is fitted to.
THIN = 8


def calibrate(student: VLM, teacher: VLM, batch: Batch) -> None:
    """Set decays and output projections of every mixer of `student` from one batch, in place.

    Teacher and student go up the stack side by side, so that one layer's activations at a time are
    kept. A quantised output projection stays as it is.

    Args:
        student: a hybrid whose mixers pass their input on (`Mamba2Mixer.reset_to_pass_through`).
        teacher: the model that it was built from.
        batch: model inputs, with `real` or `attention_mask` where there is padding.
    """
    device, fitted = teacher.model.device, _fitted_tokens(teacher, batch)
    inputs = model_inputs(teacher, batch)
    with ExitStack() as undo, torch.no_grad():
        _side_by_side(student, teacher, undo)
        for index, mixer in mixers(student.model).items():
            attention = decoder_layers(teacher.model)[index].self_attn
            _Fit(mixer, attention, fitted.to(device), undo)
        teacher.model(**inputs, use_cache=False, logits_to_keep=1)


def _fitted_tokens(teacher: VLM, batch: Batch) -> Tensor:
    """(batch, seqlen) bool: all real tokens of text, and some of each picture's."""
    real = batch.get("real", batch.get("attention_mask"))
    real = torch.ones_like(batch["input_ids"]) if real is None else real
    image_token = getattr(teacher.model.config, "image_token_id", None)
    if image_token is None:
        return real.bool()
    picture = batch["input_ids"] == image_token
    return real.bool() & ~(picture & (picture.cumsum(1) % THIN != 1))


def _side_by_side(student: VLM, teacher: VLM, undo: ExitStack) -> None:
    """While the teacher runs, let each layer of the student run just after the teacher's own.

    What a model adds to the stream between two layers of the teacher is added to the student's.
    """
    stream: Tensor | None = None  # the student's, (batch, seqlen, d_model)
    left: Tensor | None = None  # what the teacher's layer below gave

    def follow(layer: nn.Module) -> Callable:
        def hook(theirs: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
            nonlocal stream, left
            given, rest = (args[0], args[1:]) if args else (kwargs["hidden_states"], ())
            ours = given if stream is None else stream + (given - left)
            call = {k: v for k, v in kwargs.items() if k != "hidden_states"}
            stream, left = _hidden(layer(ours, *rest, **call)), _hidden(output)

        return hook

    first, ours = min(mixers(student.model)), decoder_layers(student.model)
    for index, theirs in enumerate(decoder_layers(teacher.model)):
        if index >= first:  # below it, they are the same
            undo.callback(
                theirs.register_forward_hook(follow(ours[index]), with_kwargs=True).remove
            )


class _Fit:
    """Listens to one attention of the teacher, and fits its mixer when that is called next."""

    def __init__(
        self, mixer: SSMAttention, attention: nn.Module, real: Tensor, undo: ExitStack
    ) -> None:
        self.mixer, self.real = mixer, real
        self.out = getattr(mixer, mixer.names.out)
        listeners = (
            getattr(attention, mixer.names.out).register_forward_pre_hook(self._keep_heads),
            attention.register_forward_hook(self._keep_output),
            mixer.register_forward_pre_hook(self._fit, with_kwargs=True),
        )
        for listener in listeners:
            undo.callback(listener.remove)

    def _keep_heads(self, module: nn.Module, args: tuple[Tensor]) -> None:
        self.heads = args[0][self.real].double().unflatten(-1, (self.mixer.config.n_heads, -1))

    def _keep_output(self, module: nn.Module, args: tuple, output: tuple) -> None:
        self.wanted = output[0][self.real].double()

    def _fit(self, mixer: SSMAttention, args: tuple, kwargs: dict) -> None:
        scan = _Scan(mixer, args, kwargs)
        maps = _HeadMaps(mixer.config.n_heads, intercept=self.out.bias is not None)
        for rate in RATES:
            mixer.A_log.fill_(rate).log_()
            mixed = scan.again()[self.real].double()
            maps.offer(rate, mixed.unflatten(-1, self.heads.shape[1:]), self.heads)
        mixer.A_log.copy_(torch.tensor(maps.rates)).log_()
        if type(self.out) is nn.Linear and self.out.weight.is_floating_point():
            _fold(self.out, maps.maps)
            mixed = scan.again()[self.real]
            missing = self.wanted - self.out(mixed.to(self.out.weight.dtype)).double()
            _add(self.out, _ridge(mixed.double(), missing, LAYER_RIDGE, maps.intercept))
        self.heads = self.wanted = None


class _Scan:
    """One call of a mixer, of which what depends on the decay can be computed again."""

    def __init__(self, mixer: SSMAttention, args: tuple, kwargs: dict) -> None:
        self.mixer, self.z = mixer, None
        with ExitStack() as undo:
            if mixer.config.gate:
                undo.callback(mixer.z_proj.register_forward_hook(self._keep_gate).remove)
            mixer._scan = self._keep_scan
            undo.callback(delattr, mixer, "_scan")
            mixer.forward(*args, **kwargs | {CACHE: None})

    def _keep_gate(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.z = output

    def _keep_scan(self, x: Tensor, *rest: Tensor | None) -> tuple[Tensor, None]:
        self.x, self.rest = x, rest
        return torch.zeros_like(x), None

    def again(self) -> Tensor:
        """What the mixer hands to its output projection, (batch, seqlen, d_inner)."""
        y, _ = self.mixer._scan(self.x, *self.rest)
        y = (y + self.x * self.mixer.D[:, None]).flatten(2)
        if self.mixer.config.norm:
            return self.mixer.norm(y, self.z)
        return y if self.z is None else y * F.silu(self.z)


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


def _fold(out: nn.Linear, maps: list[Tensor]) -> None:
    """W_O (M y + c) = (W_O M) y + W_O c, where M maps head by head."""
    weight = out.weight.double()
    constant = weight @ torch.cat([solved[-1] for solved in maps])
    block = torch.block_diag(*(solved[:-1].mT for solved in maps))
    out.weight.copy_(weight @ block)
    if out.bias is not None:
        out.bias.add_(constant)


def _add(out: nn.Linear, solved: Tensor) -> None:
    out.weight.add_(solved[:-1].mT)
    if out.bias is not None:
        out.bias.add_(solved[-1])


def _hidden(output: Tensor | tuple) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
