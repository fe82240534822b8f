"""Projections of one token, side by side in one kernel.

They are bound by memory: weights are read once and in order, by as many programs as the GPU has
room for. Nothing is copied to lie side by side: a program finds the matrix that its rows belong to.
This module needs Triton; import it only where that is installed.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.mamba.triton_chain import chained, wait
from workbench.models.engine.decoder import Matrix, Norm


class Tile(NamedTuple):
    """What a program holds of a matrix at a time."""

    rows: int
    columns: int
    warps: int


MOST_MATRICES = 6
# The fastest of nine each on an H200, for matrices of 2,560 and 10,240 columns.
PROJECT, ADD = Tile(4, 512, 2), Tile(4, 1024, 4)
ACTIVATIONS = {"gelu_new": 1, "gelu_pytorch_tanh": 1, "silu": 2, "swish": 2}


@triton.jit
def activated(y, KIND: tl.constexpr):
    """Apply the activation of that number in ACTIVATIONS; 0: none."""
    if KIND == 1:
        t = 0.7978845608028654 * (y + 0.044715 * y * y * y)
        y = y * (1 - 1 / (tl.exp(2 * t) + 1))  # y (1 + tanh t) / 2
    if KIND == 2:
        y = y / (1 + tl.exp(-y))
    return y


@triton.jit
def _tile(w, rows, inside, k, K: tl.constexpr, BK: tl.constexpr):
    """Read columns from k on of some rows: (R, BK)."""
    cols = k + tl.arange(0, BK)
    return tl.load(
        w + rows[:, None] * K + cols[None, :],
        mask=inside[:, None] & (cols < K)[None, :],
        other=0.0,
        eviction_policy="evict_first",
    )


@triton.jit
def _dot(first, w, x, by, rows, inside, K: tl.constexpr, BK: tl.constexpr):
    """Multiply rows of w, whose first tile is there, by x, or by x * by: (R,) float32."""
    total = tl.zeros((rows.shape[0], BK), tl.float32)
    for k in tl.static_range(0, K, BK):
        m = first if k == 0 else _tile(w, rows, inside, k, K, BK)
        cols = k + tl.arange(0, BK)
        t = tl.load(x + cols, mask=cols < K, other=0.0).to(tl.float32)
        if by is not None:
            t = t * tl.load(by + cols, mask=cols < K, other=0.0).to(tl.float32)
        total += m.to(tl.float32) * t[None, :]
    return tl.sum(total, axis=1)


@triton.jit
def _norm_dot(
    first, w, x, gamma, beta, eps, rows, inside,
    K: tl.constexpr, BK: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """Multiply rows of w, whose first tile is there, by norm(x): (R,) float32."""
    mean = 0.0
    if CENTRED:
        part = tl.zeros((BK,), tl.float32)
        for k in tl.static_range(0, K, BK):
            cols = k + tl.arange(0, BK)
            part += tl.load(x + cols, mask=cols < K, other=0.0).to(tl.float32)
        mean = tl.sum(part, axis=0) / K
    part = tl.zeros((BK,), tl.float32)
    for k in tl.static_range(0, K, BK):
        cols = k + tl.arange(0, BK)
        t = tl.load(x + cols, mask=cols < K, other=0.0).to(tl.float32)
        t = tl.where(cols < K, t - mean, 0.0)
        part += t * t
    scale = 1 / tl.sqrt(tl.sum(part, axis=0) / K + eps)
    total = tl.zeros((rows.shape[0], BK), tl.float32)
    for k in tl.static_range(0, K, BK):
        m = first if k == 0 else _tile(w, rows, inside, k, K, BK)
        cols = k + tl.arange(0, BK)
        in_k = cols < K
        t = (tl.load(x + cols, mask=in_k, other=0.0).to(tl.float32) - mean) * scale
        t = t * tl.load(gamma + cols, mask=in_k, other=0.0).to(tl.float32)
        if beta is not None:
            t += tl.load(beta + cols, mask=in_k, other=0.0).to(tl.float32)
        total += m.to(tl.float32) * t[None, :]
    return tl.sum(total, axis=1)


@triton.jit
def _rows(
    w, b, out, block, x, gamma, beta, eps, N: tl.constexpr, KIND: tl.constexpr,
    K: tl.constexpr, CENTRED: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    rows = block * R + tl.arange(0, R)
    inside = rows < N
    first = _tile(w, rows, inside, 0, K, BK)
    wait(CHAINED)
    y = _norm_dot(first, w, x, gamma, beta, eps, rows, inside, K, BK, CENTRED)
    if b is not None:
        y += tl.load(b + rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + rows, activated(y, KIND), mask=inside)


@triton.jit
def _project_kernel(
    x, gamma, beta, eps, out,
    w0, w1, w2, w3, w4, w5, b0, b1, b2, b3, b4, b5,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, N4: tl.constexpr,
    N5: tl.constexpr, ACTIVE: tl.constexpr, KIND: tl.constexpr,
    K: tl.constexpr, CENTRED: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Write w_i @ norm(x) + b_i, one i after the other; that of ACTIVE goes through KIND."""
    block = tl.program_id(0)
    E0: tl.constexpr = (N0 + R - 1) // R
    E1: tl.constexpr = E0 + (N1 + R - 1) // R
    E2: tl.constexpr = E1 + (N2 + R - 1) // R
    E3: tl.constexpr = E2 + (N3 + R - 1) // R
    E4: tl.constexpr = E3 + (N4 + R - 1) // R
    if block < E0:
        _rows(w0, b0, out, block, x, gamma, beta, eps, N0, KIND if ACTIVE == 0 else 0,
              K, CENTRED, R, BK, CHAINED)  # fmt: skip
    if N1 > 0:  # noqa: SIM102 - compiled away, or not
        if (block >= E0) & (block < E1):
            _rows(w1, b1, out + N0, block - E0, x, gamma, beta, eps, N1,
                  KIND if ACTIVE == 1 else 0, K, CENTRED, R, BK, CHAINED)  # fmt: skip
    if N2 > 0:  # noqa: SIM102 - compiled away, or not
        if (block >= E1) & (block < E2):
            _rows(w2, b2, out + N0 + N1, block - E1, x, gamma, beta, eps, N2,
                  KIND if ACTIVE == 2 else 0, K, CENTRED, R, BK, CHAINED)  # fmt: skip
    if N3 > 0:  # noqa: SIM102 - compiled away, or not
        if (block >= E2) & (block < E3):
            _rows(w3, b3, out + N0 + N1 + N2, block - E2, x, gamma, beta, eps, N3,
                  KIND if ACTIVE == 3 else 0, K, CENTRED, R, BK, CHAINED)  # fmt: skip
    if N4 > 0:  # noqa: SIM102 - compiled away, or not
        if (block >= E3) & (block < E4):
            _rows(w4, b4, out + N0 + N1 + N2 + N3, block - E3, x, gamma, beta, eps, N4,
                  KIND if ACTIVE == 4 else 0, K, CENTRED, R, BK, CHAINED)  # fmt: skip
    if N5 > 0:  # noqa: SIM102 - compiled away, or not
        if block >= E4:
            _rows(w5, b5, out + N0 + N1 + N2 + N3 + N4, block - E4, x, gamma, beta, eps, N5,
                  KIND if ACTIVE == 5 else 0, K, CENTRED, R, BK, CHAINED)  # fmt: skip


@triton.jit
def _add_kernel(
    h, out, w0, x0, b0, w1, x1, by1, b1,
    N: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Write h + w0 @ x0 + b0 + w1 @ (x1 * by1) + b1, or without the second product."""
    rows = tl.program_id(0) * R + tl.arange(0, R)
    inside = rows < N
    first = _tile(w0, rows, inside, 0, K0, BK)
    second = None if w1 is None else _tile(w1, rows, inside, 0, K1, BK)
    wait(CHAINED)
    y = tl.load(h + rows, mask=inside, other=0.0).to(tl.float32)
    y += _dot(first, w0, x0, None, rows, inside, K0, BK)
    if b0 is not None:
        y += tl.load(b0 + rows, mask=inside, other=0.0).to(tl.float32)
    if w1 is not None:
        y += _dot(second, w1, x1, by1, rows, inside, K1, BK)
        if b1 is not None:
            y += tl.load(b1 + rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + rows, y, mask=inside)


def project(
    x: Tensor, norm: Norm, some: tuple[Matrix, ...], active: int = -1, activation: str = ""
) -> tuple[Tensor, ...]:
    """Normalise one token and multiply it by several matrices, in one kernel.

    Args:
        x: (1, n_in).
        norm: before the matrices.
        some: at most MOST_MATRICES, with contiguous rows.
        active: the matrix whose result goes through `activation`; -1: none.
        activation: of ACTIVATIONS.

    Returns:
        For each matrix (1, n_out).
    """
    sizes = [matrix.weight.shape[0] for matrix in some]
    out = torch.empty(1, sum(sizes), dtype=x.dtype, device=x.device)
    missing = MOST_MATRICES - len(some)
    weights = [matrix.weight for matrix in some] + [None] * missing
    biases = [matrix.bias for matrix in some] + [None] * missing
    _project_kernel[(sum(-(-n // PROJECT.rows) for n in sizes),)](
        x, norm.weight, norm.bias, norm.eps, out, *weights, *biases, *sizes, *[0] * missing,
        ACTIVE=active, KIND=ACTIVATIONS.get(activation, 0), K=x.shape[1], CENTRED=norm.centred,
        **_shape(PROJECT, x.shape[1]), **chained(x.device),
    )  # fmt: skip
    return out.split(sizes, dim=1)


def add(
    h: Tensor,
    first: Matrix,
    x: Tensor,
    second: Matrix | None = None,
    y: Tensor | None = None,
    by: Tensor | None = None,
) -> Tensor:
    """Return h + first(x) + second(y * by), for one token, in one kernel; all are (1, width)."""
    n = h.shape[1]
    out = torch.empty_like(h)
    wide = first.weight if second is None else second.weight
    _add_kernel[(-(-n // ADD.rows),)](
        h, out, first.weight, x, first.bias,
        None if second is None else second.weight, y, by, None if second is None else second.bias,
        N=n, K0=first.weight.shape[1], K1=wide.shape[1],
        **_shape(ADD, wide.shape[1]), **chained(h.device),
    )  # fmt: skip
    return out


def _shape(tile: Tile, width: int) -> dict[str, int]:
    columns = min(tile.columns, triton.next_power_of_2(width))
    return {"R": tile.rows, "BK": columns, "num_warps": tile.warps}
