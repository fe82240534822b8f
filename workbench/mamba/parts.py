"""Parts of a mixer: its convolution, its norm, and the rotation by position."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.errors import WorkbenchError
from workbench.mamba import kernels


class Projected(NamedTuple):
    """What a mixer's projections say of a sequence; widths are those of `Mamba2Config`."""

    x: Tensor  # (batch, seqlen, n_kv_heads * headdim)
    B: Tensor  # (batch, seqlen, n_kv_heads * d_state)
    C: Tensor  # (batch, seqlen, n_heads * d_state)
    z: Tensor | None  # (batch, seqlen, d_inner), or no gate
    dt: Tensor  # (batch, seqlen, n_heads), before its bias and softplus


class CausalConv1d(nn.Conv1d):
    """Depthwise causal convolution, then SiLU or nothing; shaped as in mamba_ssm."""

    def __init__(self, channels: int, d_conv: int, activation: str | None) -> None:
        super().__init__(channels, channels, d_conv, groups=channels, padding=d_conv - 1)
        self.activation = activation

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map (batch, seqlen, channels) to the same shape, and return the state after it."""
        return kernels.causal_conv1d(
            x, self.weight.squeeze(1), self.bias, activation=self.activation, state=state
        )


def newest(x: Tensor, past: Tensor | None, end: Tensor, taps: int) -> Tensor:
    """Return what a convolution reads before `end`, (batch, channels, taps).

    Args:
        x: (batch, seqlen, channels).
        past: (batch, channels, taps), the inputs just before x, or None for zeros.
        end: (1,), a position of x, or its length.
        taps: how many inputs.
    """
    window = F.pad(x, (0, 0, taps, 0)) if past is None else torch.cat([past.mT, x], dim=1)
    return window.index_select(1, end + torch.arange(taps, device=x.device)).mT


class GatedRMSNorm(nn.Module):
    """norm(y * silu(z)), or norm(y) without z, over groups of channels, computed in float32."""

    def __init__(self, width: int, group_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.group_size, self.eps = group_size, eps

    def forward(self, y: Tensor, z: Tensor | None) -> Tensor:
        """Map y and z, both (batch, seqlen, width), to the same shape, at least float32."""
        groups = gated(y, z).unflatten(-1, (-1, self.group_size))
        scale = torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + self.eps)
        return (groups * scale).flatten(-2) * self.weight.to(groups.dtype)


def gated(y: Tensor, z: Tensor | None) -> Tensor:
    """Return y * silu(z), or y without z, in at least float32."""
    high = torch.promote_types(y.dtype, torch.float32)
    return y.to(high) if z is None else y.to(high) * F.silu(z.to(high))


def normed(norm: nn.Module, t: Tensor, width: int) -> Tensor:
    """Apply a query or key norm: over each head if its weight is one head wide, else over all."""
    if norm.weight.shape[-1] != width:
        return norm(t)
    return norm(t.unflatten(-1, (-1, width))).flatten(-2)


def rotate(t: Tensor, rotary: tuple[Tensor, Tensor] | None, interleaved: bool) -> Tensor:
    """Rotate the first r channels of each head by position: (b, l, h, n), cos and sin (b, l, r)."""
    if rotary is None:
        raise WorkbenchError("This mixer was built with rope=True and needs the rotary embeddings.")
    cos, sin = (r.unsqueeze(-2).to(t.dtype) for r in rotary)
    turned, kept = t.tensor_split([cos.shape[-1]], dim=-1)
    if interleaved:
        first, second = turned.unflatten(-1, (-1, 2)).unbind(-1)
        crosswise = torch.stack([-second, first], dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        crosswise = torch.cat([-second, first], dim=-1)
    turned = turned * cos + crosswise * sin
    return torch.cat([turned, kept], dim=-1)
