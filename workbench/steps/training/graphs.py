"""Decoder layers as CUDA graphs, so that a step waits for arithmetic and not for launches.

A small model's layer is a hundred kernels of a few microseconds each, forward and backward, and
Python launches them one by one. Recorded once for a shape, they are launched as two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from workbench.errors import WorkbenchError
from workbench.models.engine.recorded_prompts import recording


class LayerGraphs:
    """A decoder layer's `forward` that replays what it did the first time in each situation.

    Outputs and gradients stand in memory of the graph's own, and are overwritten when the same
    graph runs again. So a layer may run once a step, and once more as `another_call`; and gradients
    must be added to tensors that are there before (`zero_grad(set_to_none=False)`).

    Args:
        layer: whose own `forward` is recorded.
        forward: that, or that compiled.
        pool: memory shared by graphs that run in the order in which they were recorded, each
            reading no more than the output of the one before; None gives each its own.
    """

    def __init__(self, layer: nn.Module, forward: Callable, pool: Any = None) -> None:
        self.layer, self.forward, self.pool = layer, forward, pool
        self.another = False
        self.parameters = dict(layer.named_parameters())
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
        is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        key = (
            self.another, torch.is_grad_enabled(), str(constants), tuple(is_tensor),
            tuple((t.shape, t.dtype, t.requires_grad) for t in given),
            tuple(p.requires_grad for p in self.parameters.values()),
        )  # fmt: skip
        if key not in self.graphs:
            self.graphs[key] = self._recorded(self._of_tensors(is_tensor, constants, form), given)
        return self.graphs[key](*given, *self.parameters.values())

    def _of_tensors(self, is_tensor: list[bool], constants: list, form: TreeSpec) -> Callable:
        """The forward as a function of tensors alone: its arguments, then the parameters."""

        def call(*tensors: Tensor) -> Any:
            put = iter(tensors)
            filled = [next(put) if t else c for t, c in zip(is_tensor, constants, strict=True)]
            args, kwargs = tree_unflatten(filled, form)
            own = dict(zip(self.parameters, put, strict=True))
            # torch.func.functional_call would call the layer: hooks, and this object once more.
            with _reparametrize_module(self.layer, own):
                return self.forward(*args, **kwargs)

        return call

    def _recorded(self, call: Callable, given: list[Tensor]) -> Callable:
        """The function as graphs of its forward and its backward.

        It is recorded on leaves that share the parameters' memory: what collects the gradients of
        the parameters themselves belongs to another stream, which may not be waited for.
        """
        samples = [_leaf(t.clone(), t) for t in given]
        shared = [_leaf(p, p) for p in self.parameters.values()]
        try:
            with _recording():
                return torch.cuda.make_graphed_callables(
                    call, (*samples, *shared), allow_unused_input=True, pool=self.pool
                )
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = str(error).strip().partition("\n")[0]
            raise WorkbenchError(
                f"{type(self.layer).__name__} cannot be recorded as a CUDA graph ({reason}): "
                "distil with graph_layers=False."
            ) from error


@contextmanager
def _recording() -> Iterator[None]:
    """Other threads may allocate, copy and pin memory; a failure leaves the GPU usable.

    By itself torch records in mode "global", in which a DataLoader that pins memory in a thread of
    its own breaks the recording. In mode "thread_local" a thread that pinned ever more memory broke
    1 of 2 runs of 30 recordings on an H100, in mode "relaxed" none of 6. To wait for the whole
    device breaks it in any mode.
    """
    relaxed = partial(torch.cuda.graph, capture_error_mode="relaxed")
    with recording(), patch.object(torch.cuda, "graph", relaxed):
        yield


def _leaf(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(like.requires_grad)
