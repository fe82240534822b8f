"""Decoder layers as CUDA graphs, so that a step waits for arithmetic and not for launches.

A small model's layer is a hundred kernels of a few microseconds each, forward and backward, and
Python launches them one by one. Recorded once for a shape, they are launched as two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from workbench.errors import WorkbenchError


class LayerGraphs:
    """A decoder layer's `forward` that replays what it did the first time in each situation.

    Outputs and gradients stand in memory of the graph's own, and are overwritten when the same
    graph runs again. So each layer may run once a step, and once more as `another_call`; and
    gradients must be added to tensors that are there before (`zero_grad(set_to_none=False)`).

    Args:
        layer: whose own `forward` is recorded.
        forward: that, or that compiled.
        pool: memory shared by graphs that run in the order in which they were recorded, each
            reading no more than the output of the one before; None gives each its own.
    """

    def __init__(self, layer: nn.Module, forward: Callable, pool: Any = None) -> None:
        self.layer, self.forward, self.pool = layer, forward, pool
        self.another = False
        self.graphs: dict[tuple, Callable] = {}

    @contextmanager
    def another_call(self) -> Iterator[None]:
        """Calls inside have graphs of their own."""
        self.another = True
        try:
            yield
        finally:
            self.another = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer, whose arguments may be nested; those that are no tensors are constants."""
        leaves, form = tree_flatten((args, kwargs))
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        rest = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        places = tuple(isinstance(leaf, Tensor) for leaf in leaves)
        key = (
            self.another, torch.is_grad_enabled(), str(rest), places,
            tuple((t.shape, t.dtype, t.requires_grad) for t in given),
            tuple(p.requires_grad for p in self.layer.parameters()),
        )  # fmt: skip
        if key not in self.graphs:
            call = _Call(self.layer, self.forward, rest, places, form)
            self.graphs[key] = _recorded(call, given, self.pool)
        return self.graphs[key](*given)


class _Call(nn.Module):
    """A layer as a function of tensors alone, with its parameters."""

    def __init__(
        self, layer: nn.Module, run: Callable, rest: list, places: tuple[bool, ...], form: TreeSpec
    ) -> None:
        super().__init__()
        self.layer, self.rest, self.places, self.form = layer, rest, places, form
        self.run = run
        self.train(layer.training)

    def forward(self, *given: Tensor) -> Any:
        tensors = iter(given)
        leaves = [
            next(tensors) if is_tensor else constant
            for constant, is_tensor in zip(self.rest, self.places, strict=True)
        ]
        args, kwargs = tree_unflatten(leaves, self.form)
        return self.run(*args, **kwargs)


def _recorded(call: _Call, given: list[Tensor], pool: Any) -> Callable:
    samples = tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in given)
    try:
        return torch.cuda.make_graphed_callables(
            call, samples, allow_unused_input=True, pool=pool
        )
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise WorkbenchError(
            f"{type(call.layer).__name__} cannot be recorded as a CUDA graph ({reason}): "
            "distil with graph_layers=False."
        ) from error
