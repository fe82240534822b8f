"""The one place that chooses how the mixer's two sequence operations are computed.

Every implementation offers the same functions with the same signatures. "torch" runs anywhere and
is the reference. `use` overrides the choice, for a block (`with use("torch"):`) or for good
(`use("torch")`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.mamba import ssd as plain


@dataclass(frozen=True)
class Kernels:
    """One implementation of each operation; the signatures are those of the functions below."""

    ssd: Callable[..., tuple[Tensor, Tensor]]
    ssd_step: Callable[..., tuple[Tensor, Tensor]]
    causal_conv1d: Callable[..., tuple[Tensor, Tensor]]


def _conv_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None = "silu",
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    context, length = weight.shape[-1] - 1, x.shape[1]
    window = F.pad(x, (0, 0, context, 0)) if state is None else torch.cat([state.mT, x], dim=1)
    # Shifted products, which a compiler fuses with the SiLU; a depthwise convolution it cannot.
    high = torch.promote_types(weight.dtype, torch.float32)
    taps = weight.to(high).unbind(-1)
    y = sum(window[:, i : i + length] * tap for i, tap in enumerate(taps))
    if bias is not None:
        y = y + bias.to(high)
    y = F.silu(y) if activation == "silu" else y
    return y.to(x.dtype), window[:, length:].mT


_IMPLEMENTATIONS = {"torch": Kernels(plain.ssd_chunked, plain.ssd_step, _conv_torch)}
_chosen = "torch"


def available() -> tuple[str, ...]:
    """Name the implementations that can run here, the best one last."""
    return tuple(_IMPLEMENTATIONS)


class use:  # lower case, as it reads like a verb
    """Choose an implementation from now on; as a context manager, until the end of the block.

    Raises:
        WorkbenchError: the name is not in `available()`.
    """

    def __init__(self, name: str) -> None:
        global _chosen
        if name not in _IMPLEMENTATIONS:
            raise WorkbenchError(
                f"There are no kernels called {name!r} here; there are {', '.join(available())}."
            )
        self._previous, _chosen = _chosen, name

    def __enter__(self) -> "use":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _chosen
        _chosen = self._previous


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mix a sequence; shapes and results as `workbench.mamba.ssd.ssd_chunked`."""
    return _IMPLEMENTATIONS[_chosen].ssd(
        x, dt, A, B, C, chunk_size=chunk_size, initial_state=initial_state
    )


def ssd_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Advance by one position; shapes and results as `workbench.mamba.ssd.ssd_step`."""
    return _IMPLEMENTATIONS[_chosen].ssd_step(x, dt, A, B, C, state=state)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None = "silu",
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve each channel with its own past, then apply SiLU unless told not to.

    Args:
        x: (batch, seqlen, channels).
        weight: (channels, d_conv), the newest position last.
        bias: (channels,) or None.
        activation: "silu", or None for the sum as it is.
        state: (batch, channels, d_conv - 1), the inputs just before x, or None for zeros.

    Returns:
        y like x, and the state after x (batch, channels, d_conv - 1).
    """
    return _IMPLEMENTATIONS[_chosen].causal_conv1d(
        x, weight, bias, activation=activation, state=state
    )
