"""Projections of a few tokens, one of each sequence, by matrix products that stream the weights.

They are bound by memory as those of one token are, so all that matters is that weights keep
coming. Weights are the tall operand of each product and tokens its 16 columns: the other way round,
a matrix unit that takes 64 rows at a time would have 48 of nothing. The way back to the residual
stream has fewer rows than a GPU needs programs, so columns are shared out as well, and a second
kernel adds up what they found and takes the next norm on the way. This module needs Triton; import
it only where that is installed.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.mamba.triton_chain import chained, wait
from workbench.models.engine.decoder import Matrix, Norm
from workbench.models.engine.triton_kernels import ACTIVATIONS, MOST_MATRICES, activated

MOST_TOKENS = 16  # columns of a matrix product, filled or not
LEAST = 16  # rows and columns of the smallest tile of a matrix product


class Stream(NamedTuple):
    """How a product is shared out among programs, and how each reads its part."""

    rows: int  # of a tile of weights
    columns: int
    warps: int
    stages: int  # tiles under way at once
    ahead: int  # columns that a program asks for while the kernel before still runs
    programs: int  # rather smaller parts than fewer programs


# The fastest tried at 16 rows on an H100: `benchmarks/results/rows_h100.json`.
PROJECT = Stream(64, 128, 4, 5, 128, 1)
ADD = Stream(64, 128, 4, 4, 128, 200)
HEAD = Stream(128, 128, 8, 3, 128, 1)
JOIN_WARPS = 8


@triton.jit
def _ask_for(w, low, width, AHEAD: tl.constexpr, CHAINED: tl.constexpr):
    """Bring AHEAD columns of the rows that begin at w, from low on, into the L2 cache."""
    if CHAINED and AHEAD > 0:
        size = tl.minimum(width - low, AHEAD) * (w.dtype.element_ty.primitive_bitwidth // 8)
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;", "=r,l,r",
            [(w + low).to(tl.int64), size], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _product(
    w, x, by, gated, low, high, width,
    EVEN: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, M: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Multiply the rows that begin at w by those at x, or if gated by x * by: (R, M) float32.

    Only columns from low to high, which is `width`, that of w, or a multiple of BK further.
    EVEN: width is a multiple of BK, so that no load needs a mask, which would make it slower.
    """
    total = tl.zeros((R, M), tl.float32)
    for k in range(low, high, BK):
        cols = k + tl.arange(0, BK)[None, :]
        if EVEN:
            m = tl.load(w[:, None] + cols, eviction_policy="evict_first")
            t = tl.load(x[:, None] + cols)
        else:
            m = tl.load(w[:, None] + cols, mask=cols < width, other=0.0)
            t = tl.load(x[:, None] + cols, mask=cols < width, other=0.0)
        if by is not None:
            t = t * tl.load(by[:, None] + cols, mask=gated & (cols < width), other=1.0)
        total = tl.dot(m, tl.trans(t), total, input_precision=PRECISION)
    return total


@triton.jit
def _project_kernel(
    x, x_row, n_tokens, out,
    w0, w1, w2, w3, w4, w5, b0, b1, b2, b3, b4, b5,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, N4: tl.constexpr,
    N5: tl.constexpr, ACTIVE: tl.constexpr, KIND: tl.constexpr, K: tl.constexpr, M: tl.constexpr,
    R: tl.constexpr, BK: tl.constexpr, AHEAD: tl.constexpr, PRECISION: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Write x @ w_i.T + b_i, side by side; that of ACTIVE goes through KIND."""
    block = tl.program_id(0)
    E1: tl.constexpr = (N0 + R - 1) // R
    E2: tl.constexpr = E1 + (N1 + R - 1) // R
    E3: tl.constexpr = E2 + (N2 + R - 1) // R
    E4: tl.constexpr = E3 + (N3 + R - 1) // R
    E5: tl.constexpr = E4 + (N4 + R - 1) // R
    A2: tl.constexpr = N0 + N1
    A3: tl.constexpr = A2 + N2
    A4: tl.constexpr = A3 + N3
    A5: tl.constexpr = A4 + N4
    # The last matrix that begins at this block or before; without a bias, w stands for it.
    w, n, at, first, active = w0, N0, 0, 0, ACTIVE == 0
    b, biased = w0 if b0 is None else b0, b0 is not None
    if N1 > 0 and block >= E1:
        w, n, at, first, active = w1, N1, N0, E1, ACTIVE == 1
        b, biased = w1 if b1 is None else b1, b1 is not None
    if N2 > 0 and block >= E2:
        w, n, at, first, active = w2, N2, A2, E2, ACTIVE == 2
        b, biased = w2 if b2 is None else b2, b2 is not None
    if N3 > 0 and block >= E3:
        w, n, at, first, active = w3, N3, A3, E3, ACTIVE == 3
        b, biased = w3 if b3 is None else b3, b3 is not None
    if N4 > 0 and block >= E4:
        w, n, at, first, active = w4, N4, A4, E4, ACTIVE == 4
        b, biased = w4 if b4 is None else b4, b4 is not None
    if N5 > 0 and block >= E5:
        w, n, at, first, active = w5, N5, A5, E5, ACTIVE == 5
        b, biased = w5 if b5 is None else b5, b5 is not None
    rows, tokens = (block - first) * R + tl.arange(0, R), tl.arange(0, M)
    # What lies beyond the last row or token is the last again, and is not stored.
    w += tl.minimum(rows, n - 1).to(tl.int64) * K
    _ask_for(w, 0, K, AHEAD, CHAINED)
    bias = tl.load(b + rows, mask=(rows < n) & biased, other=0.0).to(tl.float32)
    wait(CHAINED)
    x += tl.minimum(tokens, n_tokens - 1) * x_row
    y = bias[:, None] + _product(w, x, None, False, 0, K, K, K % BK == 0, R, BK, M, PRECISION)
    if active:
        y = activated(y, KIND)
    here = out + tokens[None, :] * (A5 + N5) + at + rows[:, None]
    tl.store(here, y, mask=(rows < n)[:, None] & (tokens < n_tokens)[None, :])


@triton.jit
def _add_kernel(
    w0, x0, x0_row, w1, x1, x1_row, by1, by1_row, n_tokens, parts,
    N: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, EACH: tl.constexpr, M: tl.constexpr,
    R: tl.constexpr, BK: tl.constexpr, AHEAD: tl.constexpr, PRECISION: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Write x0 @ w0.T and (x1 * by1) @ w1.T in parts of EACH columns: (parts, tokens, N)."""
    part = tl.program_id(1)
    FIRST: tl.constexpr = (K0 + EACH - 1) // EACH  # how many are of x0 @ w0.T
    # Two loops, one for each, would take their shared memory twice.
    w, x, x_row, width, low, second = w0, x0, x0_row, K0, part * EACH, False
    if w1 is not None and part >= FIRST:
        w, x, x_row, width, low, second = w1, x1, x1_row, K1, (part - FIRST) * EACH, True
    rows, tokens = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, M)
    w += tl.minimum(rows, N - 1).to(tl.int64) * width
    _ask_for(w, low, width, AHEAD, CHAINED)
    wait(CHAINED)
    token = tl.minimum(tokens, n_tokens - 1)
    x += token * x_row
    by = None if by1 is None else by1 + token * by1_row
    EVEN: tl.constexpr = K0 % BK == 0 and K1 % BK == 0
    y = _product(
        w, x, by, second, low, tl.minimum(low + EACH, width), width, EVEN, R, BK, M, PRECISION
    )
    here = parts + (part * n_tokens + tokens)[None, :] * N + rows[:, None]
    tl.store(here, y, mask=(rows < N)[:, None] & (tokens < n_tokens)[None, :])


@triton.jit
def _join_kernel(
    h, parts, b0, b1, out, gamma, beta, eps, normed, n_tokens,
    N: tl.constexpr, N2: tl.constexpr, PARTS: tl.constexpr, CENTRED: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Write h + parts + b0 + b1 of one token if there are parts; its norm if there is gamma."""
    token, n = tl.program_id(0), tl.arange(0, N2)
    inside = n < N
    bias = tl.zeros((N2,), tl.float32)
    if b0 is not None:
        bias += tl.load(b0 + n, mask=inside, other=0.0).to(tl.float32)
    if b1 is not None:
        bias += tl.load(b1 + n, mask=inside, other=0.0).to(tl.float32)
    wait(CHAINED)
    y = tl.load(h + token * N + n, mask=inside, other=0.0).to(tl.float32) + bias
    for part in tl.static_range(PARTS):
        y += tl.load(parts + (part * n_tokens + token) * N + n, mask=inside, other=0.0)
    if PARTS > 0:
        y = y.to(h.dtype.element_ty)
        tl.store(out + token * N + n, y, mask=inside)
        y = y.to(tl.float32)
    if gamma is not None:
        if CENTRED:
            y = tl.where(inside, y - tl.sum(y, axis=0) / N, 0.0)
        y = y * tl.rsqrt(tl.sum(y * y, axis=0) / N + eps)
        y = y * tl.load(gamma + n, mask=inside, other=0.0).to(tl.float32)
        if beta is not None:
            y += tl.load(beta + n, mask=inside, other=0.0).to(tl.float32)
        tl.store(normed + token * N + n, y, mask=inside)


def normalise(x: Tensor, norm: Norm) -> Tensor:
    """Normalise (tokens, width), contiguous."""
    return _join(x, None, (None, None), norm)[1]


def project(
    x: Tensor, some: tuple[Matrix, ...], active: int = -1, activation: str = "",
    stream: Stream = PROJECT,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Multiply a few tokens, normalised before, by several matrices, in one kernel.

    Args:
        x: (tokens, n_in), at most MOST_TOKENS, the last axis contiguous.
        some: at most MOST_MATRICES, with contiguous rows, all of x's precision.
        active: the matrix whose result goes through `activation`; -1: none.
        activation: of ACTIVATIONS.
        stream: how to read the matrices.

    Returns:
        For each matrix (tokens, n_out), the last axis contiguous.
    """
    sizes = [matrix.weight.shape[0] for matrix in some]
    n_tokens, width = x.shape
    out = torch.empty(n_tokens, sum(sizes), dtype=x.dtype, device=x.device)
    missing = MOST_MATRICES - len(some)
    weights = [matrix.weight for matrix in some] + [None] * missing
    biases = [matrix.bias for matrix in some] + [None] * missing
    while stream.rows > LEAST and _tiles(stream, sizes) < stream.programs:
        stream = stream._replace(rows=stream.rows // 2)
    _project_kernel[(_tiles(stream, sizes),)](
        x, x.stride(0), n_tokens, out, *weights, *biases, *sizes, *[0] * missing,
        ACTIVE=active, KIND=ACTIVATIONS.get(activation, 0), K=width,
        **_shape(stream, [matrix.weight for matrix in some]), **chained(x.device),
    )  # fmt: skip
    return out.split(sizes, dim=1)


def add(
    h: Tensor, first: Matrix, x: Tensor, second: Matrix | None = None, y: Tensor | None = None,
    by: Tensor | None = None, norm: Norm | None = None, stream: Stream = ADD,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Add first(x) + second(y * by) to the residual stream of a few tokens, and normalise it.

    Args:
        h: (tokens, width), at most MOST_TOKENS, contiguous.
        first: with contiguous rows, of h's precision.
        x: (tokens, n_in), the last axis contiguous.
        second: like first.
        y: what second multiplies, like x.
        by: like y; None: ones.
        norm: of what reads the result next.
        stream: how to read the matrices.

    Returns:
        (tokens, width), and the same normalised, or None without a norm.
    """
    n_tokens, n = h.shape
    weights = [matrix.weight for matrix in (first, second) if matrix is not None]
    widths = [weight.shape[1] for weight in weights]
    shape = _shape(stream, weights)
    tiles = _tiles(stream, [n])
    # As many whole tiles of columns as leave enough programs.
    each = max(1, tiles * sum(widths) // (stream.programs * shape["BK"])) * shape["BK"]
    n_parts = sum(triton.cdiv(width, each) for width in widths)
    parts = torch.empty(n_parts, n_tokens, n, dtype=torch.float32, device=h.device)
    _add_kernel[(tiles, n_parts)](
        first.weight, x, x.stride(0), None if second is None else second.weight,
        y, 0 if y is None else y.stride(0), by, 0 if by is None else by.stride(0), n_tokens, parts,
        N=n, K0=widths[0], K1=widths[-1], EACH=each, **shape, **chained(h.device),
    )  # fmt: skip
    return _join(h, parts, (first.bias, None if second is None else second.bias), norm)


def _join(
    h: Tensor, parts: Tensor | None, biases: tuple[Tensor | None, ...], norm: Norm | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return h + parts + biases, if there are parts, and that normalised, if there is a norm."""
    n_tokens, n = h.shape
    out = None if parts is None else torch.empty_like(h)
    normed = None if norm is None else torch.empty_like(h)
    norm = norm or Norm(None, None, 0.0, False)
    _join_kernel[(n_tokens,)](
        h, parts, *biases, out, norm.weight, norm.bias, norm.eps, normed, n_tokens,
        N=n, N2=triton.next_power_of_2(n), PARTS=0 if parts is None else parts.shape[0],
        CENTRED=norm.centred, num_warps=JOIN_WARPS, **chained(h.device),
    )  # fmt: skip
    return out, normed


def _tiles(stream: Stream, sizes: list[int]) -> int:
    return sum(triton.cdiv(n, stream.rows) for n in sizes)


def _shape(stream: Stream, weights: list[Tensor]) -> dict[str, int | str]:
    """Return what a kernel must know to be compiled for these weights."""
    widest = max(weight.shape[1] for weight in weights)
    # Nothing is asked for but in whole pieces of 16 bytes.
    whole = all(
        weight.data_ptr() % 16 == 0 and weight.shape[1] * weight.itemsize % 16 == 0
        for weight in weights
    )
    return {
        "M": MOST_TOKENS, "R": stream.rows,
        "BK": max(LEAST, min(stream.columns, triton.next_power_of_2(widest))),
        "AHEAD": stream.ahead if whole else 0,
        "PRECISION": "ieee" if weights[0].dtype == torch.float32 else "tf32",
        "num_warps": stream.warps, "num_stages": stream.stages,
    }  # fmt: skip
