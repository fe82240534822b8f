"""Queries and keys of a prompt rotated, and keys and values kept, in one kernel.

Apart that is seven, which at a thousand tokens of Phi-2's size took 1.8 times as long as attention
itself (an H200, bf16). This module needs Triton; import it only where that is installed.
"""

import triton
import triton.language as tl
from torch import Tensor

ROWS = 16  # positions of a head that one program takes


@triton.jit
def _rotated(t, at, cos, sin, angle, HALF: tl.constexpr, mask):
    """Rotate both halves of some rows, in place, and return them.

    Each number is loaded once, with its partner, and both are stored after that.
    """
    a, b = tl.load(t + at, mask=mask, other=0.0), tl.load(t + at + HALF, mask=mask, other=0.0)
    c0 = tl.load(cos + angle, mask=mask, other=1.0).to(tl.float32)
    c1 = tl.load(cos + angle + HALF, mask=mask, other=1.0).to(tl.float32)
    s0 = tl.load(sin + angle, mask=mask, other=0.0).to(tl.float32)
    s1 = tl.load(sin + angle + HALF, mask=mask, other=0.0).to(tl.float32)
    first, second = a.to(tl.float32), b.to(tl.float32)
    a = (first * c0 + second * s0).to(t.dtype.element_ty)
    b = (second * c1 + first * s1).to(t.dtype.element_ty)
    tl.store(t + at, a, mask=mask)
    tl.store(t + at + HALF, b, mask=mask)
    return a, b


@triton.jit(do_not_specialize=["rows", "seqlen"])
def _keep_kernel(
    q, k, v, cos, sin, keys, values, rows, seqlen, places,
    q_row: tl.constexpr, k_row: tl.constexpr, v_row: tl.constexpr, angle_row: tl.constexpr,
    HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, D2: tl.constexpr,
    HALF: tl.constexpr, HALF2: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Take some rows of one head of the queries, then of the keys, then of the values."""
    # Programs of the same rows follow each other.
    head = tl.program_id(0) % (HEADS + 2 * KV)
    row = tl.program_id(0).to(tl.int64) // (HEADS + 2 * KV) * L + tl.arange(0, L)
    position, batch = row % seqlen, row // seqlen
    half, d = tl.arange(0, HALF2), tl.arange(0, D2)
    there = (row < rows)[:, None]
    turns = there & (half < HALF)[None, :]
    angle = position[:, None] * angle_row + half[None, :]
    if head < HEADS:
        _rotated(q, row[:, None] * q_row + head * D + half[None, :], cos, sin, angle, HALF, turns)
    else:
        kv = (head - HEADS) % KV
        place = (((batch * KV + kv) * places + position) * D)[:, None]
        if head < HEADS + KV:
            at = row[:, None] * k_row + kv * D
            a, b = _rotated(k, at + half[None, :], cos, sin, angle, HALF, turns)
            tl.store(keys + place + half[None, :], a, mask=turns)
            tl.store(keys + place + half[None, :] + HALF, b, mask=turns)
            if 2 * HALF < D:
                stays = there & ((d >= 2 * HALF) & (d < D))[None, :]
                rest = tl.load(k + at + d[None, :], mask=stays, other=0.0)
                tl.store(keys + place + d[None, :], rest, mask=stays)
        else:
            whole = there & (d < D)[None, :]
            value = tl.load(v + row[:, None] * v_row + kv * D + d[None, :], mask=whole, other=0.0)
            tl.store(values + place + d[None, :], value, mask=whole)


def keep(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor
) -> None:
    """Rotate q and k in place, and put k and v into a cache, from its first place on.

    Args:
        q: (batch * seqlen, heads * headdim), the last axis contiguous.
        k: (batch * seqlen, kv heads * headdim), the last axis contiguous.
        v: like k.
        cos: (seqlen, rotated width), contiguous.
        sin: like cos, negative in the first half.
        keys: (batch, kv heads, places, headdim), contiguous.
        values: like keys.
    """
    (rows, width), (_, n_kv, places, headdim) = q.shape, keys.shape
    half, n_heads = cos.shape[-1] // 2, width // headdim
    _keep_kernel[((n_heads + 2 * n_kv) * triton.cdiv(rows, ROWS),)](
        q, k, v, cos, sin, keys, values, rows, len(cos), places,
        q_row=q.stride(0), k_row=k.stride(0), v_row=v.stride(0), angle_row=cos.stride(0),
        HEADS=n_heads, KV=n_kv, D=headdim, D2=triton.next_power_of_2(headdim),
        HALF=half, HALF2=triton.next_power_of_2(half), L=ROWS, num_warps=4,
    )  # fmt: skip
