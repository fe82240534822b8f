"""Kernels for one token through a decoder: projections side by side, and attention in splits.

Both are bound by memory: the weights, and the keys and values, are read once and in order, by as
many programs as the GPU has room for. Nothing is copied to lie side by side: a program finds the
matrix that its rows belong to. This module needs Triton; import it only where that is installed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.models.decoder import Matrix, Norm

MOST_MATRICES = 6
ROWS = 8  # of a matrix, in one program
KEYS = 64  # that a program of attention looks at together
FEWEST_QUERIES = 16  # rows of the smallest matrix product
ACTIVATIONS = {"gelu_new": 1, "gelu_pytorch_tanh": 1, "silu": 2, "swish": 2}


@triton.jit
def _activated(y, KIND: tl.constexpr):
    if KIND == 1:
        t = 0.7978845608028654 * (y + 0.044715 * y * y * y)
        y = y * (1 - 1 / (tl.exp(2 * t) + 1))  # y (1 + tanh t) / 2
    if KIND == 2:
        y = y / (1 + tl.exp(-y))
    return y


@triton.jit
def _dot(w, x, by, rows, inside, K: tl.constexpr, BK: tl.constexpr):
    """Multiply rows of w by x, or by x * by: (R,) float32."""
    total = tl.zeros((rows.shape[0], BK), tl.float32)
    for k in range(0, K, BK):
        cols = k + tl.arange(0, BK)
        in_k = cols < K
        t = tl.load(x + cols, mask=in_k, other=0.0).to(tl.float32)
        if by is not None:
            t = t * tl.load(by + cols, mask=in_k, other=0.0).to(tl.float32)
        m = tl.load(
            w + rows[:, None] * K + cols[None, :],
            mask=inside[:, None] & in_k[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        total += m.to(tl.float32) * t[None, :]
    return tl.sum(total, axis=1)


@triton.jit
def _norm_dot(
    w, x, gamma, beta, eps, rows, inside, K: tl.constexpr, BK: tl.constexpr, CENTRED: tl.constexpr
):
    """Multiply rows of w by norm(x): (R,) float32."""
    mean = 0.0
    if CENTRED:
        part = tl.zeros((BK,), tl.float32)
        for k in range(0, K, BK):
            cols = k + tl.arange(0, BK)
            part += tl.load(x + cols, mask=cols < K, other=0.0).to(tl.float32)
        mean = tl.sum(part, axis=0) / K
    part = tl.zeros((BK,), tl.float32)
    for k in range(0, K, BK):
        cols = k + tl.arange(0, BK)
        t = tl.load(x + cols, mask=cols < K, other=0.0).to(tl.float32)
        t = tl.where(cols < K, t - mean, 0.0)
        part += t * t
    scale = 1 / tl.sqrt(tl.sum(part, axis=0) / K + eps)
    total = tl.zeros((rows.shape[0], BK), tl.float32)
    for k in range(0, K, BK):
        cols = k + tl.arange(0, BK)
        in_k = cols < K
        t = (tl.load(x + cols, mask=in_k, other=0.0).to(tl.float32) - mean) * scale
        t = t * tl.load(gamma + cols, mask=in_k, other=0.0).to(tl.float32)
        if beta is not None:
            t += tl.load(beta + cols, mask=in_k, other=0.0).to(tl.float32)
        m = tl.load(
            w + rows[:, None] * K + cols[None, :],
            mask=inside[:, None] & in_k[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        total += m.to(tl.float32) * t[None, :]
    return tl.sum(total, axis=1)


@triton.jit
def _rows(
    w, b, out, block, x, gamma, beta, eps, N: tl.constexpr, KIND: tl.constexpr,
    K: tl.constexpr, CENTRED: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    rows = block * R + tl.arange(0, R)
    inside = rows < N
    y = _norm_dot(w, x, gamma, beta, eps, rows, inside, K, BK, CENTRED)
    if b is not None:
        y += tl.load(b + rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + rows, _activated(y, KIND), mask=inside)


@triton.jit
def _project_kernel(
    x, gamma, beta, eps, out,
    w0, w1, w2, w3, w4, w5, b0, b1, b2, b3, b4, b5,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, N4: tl.constexpr,
    N5: tl.constexpr, ACTIVE: tl.constexpr, KIND: tl.constexpr,
    K: tl.constexpr, CENTRED: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out = w_i @ norm(x) + b_i, one i after the other; that of ACTIVE goes through KIND."""
    block = tl.program_id(0)
    E0: tl.constexpr = (N0 + R - 1) // R
    E1: tl.constexpr = E0 + (N1 + R - 1) // R
    E2: tl.constexpr = E1 + (N2 + R - 1) // R
    E3: tl.constexpr = E2 + (N3 + R - 1) // R
    E4: tl.constexpr = E3 + (N4 + R - 1) // R
    if block < E0:
        _rows(w0, b0, out, block, x, gamma, beta, eps, N0, KIND if ACTIVE == 0 else 0,
              K, CENTRED, R, BK)  # fmt: skip
    if N1 > 0:
        if (block >= E0) & (block < E1):
            _rows(w1, b1, out + N0, block - E0, x, gamma, beta, eps, N1,
                  KIND if ACTIVE == 1 else 0, K, CENTRED, R, BK)  # fmt: skip
    if N2 > 0:
        if (block >= E1) & (block < E2):
            _rows(w2, b2, out + N0 + N1, block - E1, x, gamma, beta, eps, N2,
                  KIND if ACTIVE == 2 else 0, K, CENTRED, R, BK)  # fmt: skip
    if N3 > 0:
        if (block >= E2) & (block < E3):
            _rows(w3, b3, out + N0 + N1 + N2, block - E2, x, gamma, beta, eps, N3,
                  KIND if ACTIVE == 3 else 0, K, CENTRED, R, BK)  # fmt: skip
    if N4 > 0:
        if (block >= E3) & (block < E4):
            _rows(w4, b4, out + N0 + N1 + N2 + N3, block - E3, x, gamma, beta, eps, N4,
                  KIND if ACTIVE == 4 else 0, K, CENTRED, R, BK)  # fmt: skip
    if N5 > 0:
        if block >= E4:
            _rows(w5, b5, out + N0 + N1 + N2 + N3 + N4, block - E4, x, gamma, beta, eps, N5,
                  KIND if ACTIVE == 5 else 0, K, CENTRED, R, BK)  # fmt: skip


@triton.jit
def _add_kernel(
    h, out, w0, x0, b0, w1, x1, by1, b1,
    N: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out = h + w0 @ x0 + b0 + w1 @ (x1 * by1) + b1; without the second product if w1 is None."""
    rows = tl.program_id(0) * R + tl.arange(0, R)
    inside = rows < N
    y = tl.load(h + rows, mask=inside, other=0.0).to(tl.float32)
    y += _dot(w0, x0, None, rows, inside, K0, BK)
    if b0 is not None:
        y += tl.load(b0 + rows, mask=inside, other=0.0).to(tl.float32)
    if w1 is not None:
        y += _dot(w1, x1, by1, rows, inside, K1, BK)
        if b1 is not None:
            y += tl.load(b1 + rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + rows, y, mask=inside)


@triton.jit
def _attend_kernel(
    q, k, v, q_row, k_row, v_row, cos, sin, rotary_row, keys, values, place, start,
    sums, tops, weights, scale, length,
    KV: tl.constexpr, REPEATS: tl.constexpr, D: tl.constexpr, D2: tl.constexpr,
    WIDTH: tl.constexpr, SPLITS: tl.constexpr, M: tl.constexpr, BN: tl.constexpr,
    ROTATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to one split of the keys of one key head; keep the new key and value on the way."""
    pair, split = tl.program_id(0), tl.program_id(1)
    batch, kv = pair // KV, pair % KV
    at = tl.load(place).to(tl.int32)
    begin = tl.load(start + batch).to(tl.int32)
    each = tl.cdiv(tl.cdiv(at + 1 - begin, SPLITS), BN) * BN
    low = begin + split * each
    high = tl.minimum(low + each, at + 1)
    m, d = tl.arange(0, M), tl.arange(0, D2)
    in_d = d < D
    turns = d < WIDTH
    other = tl.where(turns, (d + WIDTH // 2) % WIDTH, d)
    inside = (m < REPEATS)[:, None] & in_d[None, :]
    heads = q + batch * q_row + (kv * REPEATS + m)[:, None] * D
    qs = tl.load(heads + d[None, :], mask=inside, other=0.0)
    key = tl.load(k + batch * k_row + kv * D + d, mask=in_d, other=0.0)
    value = tl.load(v + batch * v_row + kv * D + d, mask=in_d, other=0.0)
    if ROTATE:
        c = tl.load(cos + batch * rotary_row + d, mask=turns, other=1.0).to(tl.float32)
        s = tl.load(sin + batch * rotary_row + d, mask=turns, other=0.0).to(tl.float32)
        partner = tl.load(heads + other[None, :], mask=inside, other=0.0).to(tl.float32)
        qs = (qs.to(tl.float32) * c[None, :] + partner * s[None, :]).to(q.dtype.element_ty)
        partner = tl.load(k + batch * k_row + kv * D + other, mask=in_d, other=0.0).to(tl.float32)
        key = (key.to(tl.float32) * c + partner * s).to(k.dtype.element_ty)
    base = pair.to(tl.int64) * length * D
    if (low <= at) & (at < high):
        tl.store(keys + base + at.to(tl.int64) * D + d, key, mask=in_d)
        tl.store(values + base + at.to(tl.int64) * D + d, value, mask=in_d)
    top = tl.full((M,), float("-inf"), tl.float32)
    weight = tl.zeros((M,), tl.float32)
    total = tl.zeros((M, D2), tl.float32)
    for first in range(low, high, BN):
        n = first + tl.arange(0, BN)
        old = (n < at)[:, None] & in_d[None, :] & (n < high)[:, None]
        places = base + n.to(tl.int64)[:, None] * D + d[None, :]
        # The newest is not in memory for sure yet: it comes from where it was computed.
        ks = tl.load(keys + places, mask=old, other=0.0)
        ks = tl.where((n == at)[:, None], key[None, :], ks)
        score = tl.dot(qs, tl.trans(ks), input_precision=PRECISION) * (scale * 1.4426950408889634)
        score = tl.where((n < high)[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        p = tl.exp2(score - higher[:, None])
        shrink = tl.exp2(top - higher)
        vs = tl.load(values + places, mask=old, other=0.0)
        vs = tl.where((n == at)[:, None], value[None, :], vs)
        weight = weight * shrink + tl.sum(p, axis=1)
        total = total * shrink[:, None]
        total += tl.dot(p.to(vs.dtype), vs, input_precision=PRECISION)
        top = higher
    slot = (pair * SPLITS + split) * REPEATS + m
    tl.store(tops + slot, top, mask=m < REPEATS)
    tl.store(weights + slot, weight, mask=m < REPEATS)
    tl.store(sums + slot[:, None] * D + d[None, :], total, mask=inside)


@triton.jit
def _join_kernel(
    sums, tops, weights, out,
    REPEATS: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Join the splits of one head."""
    head = tl.program_id(0)
    pair, repeat = head // REPEATS, head % REPEATS
    slot = (pair * SPLITS + tl.arange(0, SPLITS)) * REPEATS + repeat
    d = tl.arange(0, D2)
    in_d = d < D
    top = tl.load(tops + slot)
    share = tl.exp2(top - tl.max(top, axis=0))
    weight = tl.sum(share * tl.load(weights + slot), axis=0)
    total = tl.load(sums + slot[:, None] * D + d[None, :], mask=in_d[None, :], other=0.0)
    y = tl.sum(share[:, None] * total, axis=0) / weight
    tl.store(out + head * D + d, y, mask=in_d)


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
    _project_kernel[(sum(-(-n // ROWS) for n in sizes),)](
        x, norm.weight, norm.bias, norm.eps, out, *weights, *biases, *sizes, *[0] * missing,
        ACTIVE=active, KIND=ACTIVATIONS.get(activation, 0), K=x.shape[1], CENTRED=norm.centred,
        R=ROWS, BK=_block(x.shape[1]), num_warps=4,
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
    _add_kernel[(-(-n // ROWS),)](
        h, out, first.weight, x, first.bias,
        None if second is None else second.weight, y, by, None if second is None else second.bias,
        N=n, K0=first.weight.shape[1], K1=wide.shape[1], R=ROWS, BK=_block(wide.shape[1]),
        num_warps=4,
    )  # fmt: skip
    return out


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    keys: Tensor,
    values: Tensor,
    place: Tensor,
    start: Tensor,
    *,
    headdim: int,
    scale: float,
    n_splits: int,
) -> Tensor:
    """Rotate, keep and attend for one token of each row; reads only the places that are filled.

    Args:
        q: (batch, heads * headdim), the last axis contiguous.
        k: (batch, kv heads * headdim), the last axis contiguous.
        v: like k.
        cos: (1 or batch, 1, rotated width), or None if q and k are rotated already.
        sin: like cos, negative in the first half.
        keys: (batch, kv heads, places, headdim), contiguous; the new key is put at `place`.
        values: like keys.
        place: (1,), where the new token belongs.
        start: (batch,), places before it are padding.
        headdim: width of a head.
        scale: of query times key.
        n_splits: programs that share the keys of a head, a power of two.

    Returns:
        (batch, heads * headdim).
    """
    batch, n_kv, length, _ = keys.shape
    repeats = q.shape[1] // (n_kv * headdim)
    pairs, device = batch * n_kv, q.device
    sums = torch.empty(pairs, n_splits, repeats, headdim, dtype=torch.float32, device=device)
    tops, weights = torch.empty(2, pairs, n_splits, repeats, dtype=torch.float32, device=device)
    rotate = cos is not None
    cos, sin = (cos, sin) if rotate else (q, q)
    D2 = max(16, triton.next_power_of_2(headdim))
    _attend_kernel[(pairs, n_splits)](
        q, k, v, q.stride(0), k.stride(0), v.stride(0),
        cos, sin, cos.stride(0) if rotate and cos.shape[0] > 1 else 0,
        keys, values, place, start, sums, tops, weights, scale, length,
        KV=n_kv, REPEATS=repeats, D=headdim, D2=D2, WIDTH=cos.shape[-1] if rotate else 0,
        SPLITS=n_splits, M=max(FEWEST_QUERIES, triton.next_power_of_2(repeats)), BN=KEYS,
        ROTATE=rotate, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=4, num_stages=3,
    )  # fmt: skip
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    _join_kernel[(pairs * repeats,)](
        sums, tops, weights, out, REPEATS=repeats, D=headdim, D2=D2, SPLITS=n_splits, num_warps=4
    )
    return out


def _block(width: int) -> int:
    return min(512, triton.next_power_of_2(width))
