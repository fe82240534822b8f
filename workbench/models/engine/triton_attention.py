"""Attention of one token to a static cache, the keys of a head shared out among programs.

Only places that are filled are read. Where the token belongs is read from a tensor, so that a CUDA
graph of it stays true. This module needs Triton; import it only where that is installed.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.mamba.triton_chain import chained, wait


class Shape(NamedTuple):
    """How a program goes through its keys."""

    keys: int  # that it looks at together
    warps: int
    stages: int  # loads under way at once


SHAPE = Shape(32, 2, 4)  # the fastest of eight on an H200, from 828 keys to 16 x 16,384
FEWEST_QUERIES = 16  # rows of the smallest matrix product
LOG2_E = 1 / math.log(2)  # exp(s) is exp2(s * LOG2_E), and the GPU has exp2


@triton.jit
def _seen(qs, ks, vs, among, top, weight, total, scale, PRECISION: tl.constexpr):
    """Add some keys and values to what was seen so far: (M,), (M,), (M, D2), float32."""
    score = tl.dot(qs, tl.trans(ks), input_precision=PRECISION) * scale
    score = tl.where(among[None, :], score, float("-inf"))
    # Of nothing seen at all -inf is the highest score, and -inf - -inf is no number.
    higher = tl.maximum(tl.maximum(top, tl.max(score, axis=1)), -1e30)
    p = tl.exp2(score - higher[:, None])
    shrink = tl.exp2(top - higher)
    weight = weight * shrink + tl.sum(p, axis=1)
    total = total * shrink[:, None]
    total += tl.dot(p.to(vs.dtype), vs, input_precision=PRECISION)
    return higher, weight, total


@triton.jit
def _attend_kernel(
    q, k, v, q_row, k_row, v_row, cos, sin, rotary_row, keys, values, place, start,
    sums, tops, weights, scale, length,
    KV: tl.constexpr, REPEATS: tl.constexpr, D: tl.constexpr, D2: tl.constexpr,
    WIDTH: tl.constexpr, SPLITS: tl.constexpr, M: tl.constexpr, BN: tl.constexpr,
    ROTATE: tl.constexpr, PRECISION: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Attend to one split of the keys of one key head; keep the new key and value on the way."""
    pair, split = tl.program_id(0), tl.program_id(1)
    batch, kv = pair // KV, pair % KV
    at = tl.load(place).to(tl.int32)
    begin = tl.load(start + batch).to(tl.int32)
    each = tl.cdiv(tl.cdiv(at + 1 - begin, SPLITS), BN) * BN
    low = begin + split * each
    high = tl.minimum(low + each, at + 1)
    old = tl.minimum(high, at)  # the newest is not in memory yet
    m, d = tl.arange(0, M), tl.arange(0, D2)
    in_d = d < D
    turns = d < WIDTH
    other = tl.where(turns, (d + WIDTH // 2) % WIDTH, d)
    inside = (m < REPEATS)[:, None] & in_d[None, :]
    base = pair.to(tl.int64) * length * D
    # Older keys stay as they are: the first are on their way while the kernel before ends.
    n = low + tl.arange(0, BN)
    known = (n < old)[:, None] & in_d[None, :]
    within = (n - begin)[:, None] * D + d[None, :]
    head_keys = keys + base + begin.to(tl.int64) * D
    head_values = values + base + begin.to(tl.int64) * D
    ks = tl.load(head_keys + within, mask=known, other=0.0)
    vs = tl.load(head_values + within, mask=known, other=0.0)
    wait(CHAINED)
    heads = q + batch * q_row + (kv * REPEATS + m)[:, None] * D
    qs = tl.load(heads + d[None, :], mask=inside, other=0.0)
    top = tl.full((M,), float("-inf"), tl.float32)
    weight = tl.zeros((M,), tl.float32)
    total = tl.zeros((M, D2), tl.float32)
    if ROTATE:
        c = tl.load(cos + batch * rotary_row + d, mask=turns, other=1.0).to(tl.float32)
        s = tl.load(sin + batch * rotary_row + d, mask=turns, other=0.0).to(tl.float32)
        partner = tl.load(heads + other[None, :], mask=inside, other=0.0).to(tl.float32)
        qs = (qs.to(tl.float32) * c[None, :] + partner * s[None, :]).to(q.dtype.element_ty)
    if (low <= at) & (at < high):  # the program that meets the newest
        key = tl.load(k + batch * k_row + kv * D + d, mask=in_d, other=0.0)
        value = tl.load(v + batch * v_row + kv * D + d, mask=in_d, other=0.0)
        if ROTATE:
            across = tl.load(k + batch * k_row + kv * D + other, mask=in_d, other=0.0)
            key = (key.to(tl.float32) * c + across.to(tl.float32) * s).to(k.dtype.element_ty)
        tl.store(keys + base + at.to(tl.int64) * D + d, key, mask=in_d)
        tl.store(values + base + at.to(tl.int64) * D + d, value, mask=in_d)
        top = scale * tl.sum(qs.to(tl.float32) * key.to(tl.float32)[None, :], axis=1)
        weight += 1
        total += value.to(tl.float32)[None, :]
    top, weight, total = _seen(qs, ks, vs, n < old, top, weight, total, scale, PRECISION)
    for first in range(low + BN, old, BN):
        n = first + tl.arange(0, BN)
        known = (n < old)[:, None] & in_d[None, :]
        within = (n - begin)[:, None] * D + d[None, :]
        ks = tl.load(head_keys + within, mask=known, other=0.0)
        vs = tl.load(head_values + within, mask=known, other=0.0)
        top, weight, total = _seen(qs, ks, vs, n < old, top, weight, total, scale, PRECISION)
    slot = (pair * SPLITS + split) * REPEATS + m
    tl.store(tops + slot, top, mask=m < REPEATS)
    tl.store(weights + slot, weight, mask=m < REPEATS)
    tl.store(sums + slot[:, None] * D + d[None, :], total, mask=inside)


@triton.jit
def _join_kernel(
    sums, tops, weights, out,
    REPEATS: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, SPLITS: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Join the splits of one head."""
    wait(CHAINED)
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
        keys, values, place, start, sums, tops, weights, scale * LOG2_E, length,
        KV=n_kv, REPEATS=repeats, D=headdim, D2=D2, WIDTH=cos.shape[-1] if rotate else 0,
        SPLITS=n_splits, M=max(FEWEST_QUERIES, triton.next_power_of_2(repeats)), BN=SHAPE.keys,
        ROTATE=rotate, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=SHAPE.warps, num_stages=SHAPE.stages, **chained(device),
    )  # fmt: skip
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    _join_kernel[(pairs * repeats,)](
        sums, tops, weights, out, REPEATS=repeats, D=headdim, D2=D2, SPLITS=n_splits, num_warps=4,
        **chained(device),
    )
    return out
