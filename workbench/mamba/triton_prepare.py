"""From what the projections say to what the scan reads, in one kernel.

The convolution over the past, SiLU, rotation by position, the scale on C, softplus of the step and
the padding mask each touch every number once: apart they are twenty kernels that wait for memory.
This module needs Triton; import it only where that is installed. It keeps no gradients.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.mamba.config import Mamba2Config


class Blocks(NamedTuple):
    """What one program of the kernel takes; any choice gives the same numbers."""

    rows: int = 16  # the fastest of nine on an H200, with rotation
    channels: int = 128
    warps: int = 4


class Prepared(NamedTuple):
    """What the scan reads, and what the convolution keeps for the next call."""

    x: Tensor  # (batch, seqlen, n_kv_heads, headdim)
    B: Tensor  # (batch, seqlen, n_kv_heads, d_state)
    C: Tensor  # (batch, seqlen, n_heads, d_state)
    dt: Tensor  # (batch, seqlen, n_heads), float32, positions next to each other in memory
    conv_state: Tensor  # (batch, channels of x + B + C, d_conv - 1)


@triton.jit
def _inputs(
    new, new_row: tl.constexpr, past, past_channel, past_tap, mask, first, rows, end, at,
    channel, inside,
    N_TAPS: tl.constexpr,
):  # fmt: skip
    """Load (rows, channels) of the convolution's input; rows count from `first`.

    Rows before the sequence come from the past, or are zero; padding is zero, as is
    what stands behind the end.
    """
    row = first + rows
    there = (row >= 0) & (row < end)
    if mask is not None:
        there = there & (tl.load(mask + row, mask=there, other=0) != 0)
    t = tl.load(
        new + rows[:, None] * new_row + at[None, :],
        mask=there[:, None] & inside[None, :], other=0.0,
    )  # fmt: skip
    if past is not None:  # noqa: SIM102 - the outer one is decided when Triton compiles
        if first < N_TAPS:
            before = (row < 0) & (row > -N_TAPS)
            t += tl.load(
                past + (row[:, None] + N_TAPS - 1) * past_tap + channel[None, :] * past_channel,
                mask=before[:, None] & inside[None, :], other=0.0,
            ).to(t.dtype)  # fmt: skip
    return t


@triton.jit
def _convolved(
    new, new_row: tl.constexpr, past, past_channel, past_tap, mask, first, rows, end, at,
    channel, inside,
    weight, bias, N_TAPS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Convolve (rows, channels) with their past, rounded as a module's output would be."""
    y = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(N_TAPS):
        t = _inputs(
            new, new_row, past, past_channel, past_tap, mask, first, rows + (tap - N_TAPS + 1),
            end, at, channel, inside, N_TAPS,
        )  # fmt: skip
        w = tl.load(weight + channel * N_TAPS + tap, mask=inside, other=0.0).to(tl.float32)
        y += t.to(tl.float32) * w[None, :]
    if SILU:
        y = y / (1 + tl.exp(-y))
    return y.to(new.dtype.element_ty).to(tl.float32)


@triton.jit
def _channels(
    new, new_row: tl.constexpr, out, past, past_channel, past_tap, future, mask, weight, bias,
    cos, sin, rotary_row: tl.constexpr, block, before, first, end, seqlen, scale,
    WIDTH: tl.constexpr, HEAD: tl.constexpr, TURNED: tl.constexpr, INTERLEAVED: tl.constexpr,
    N_TAPS: tl.constexpr, SILU: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Prepare one block of x, B or C, whose first channel is the convolution's `before`.

    The sequence ends at `end`; what is written goes on to `seqlen`, all of it finite.
    """
    rows = tl.arange(0, L)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < WIDTH
    new += first * new_row
    out += first * WIDTH
    y = _convolved(
        new, new_row, past, past_channel, past_tap, mask, first, rows, end, at, before + at,
        inside, weight, bias, N_TAPS, SILU,
    )  # fmt: skip
    real = (first + rows < seqlen)[:, None]
    if TURNED > 0:
        n = at % HEAD
        turns = n < TURNED
        if INTERLEAVED:
            leads = n % 2 == 0
            other = tl.where(leads, at + 1, at - 1)
        else:
            leads = n < TURNED // 2
            other = tl.where(leads, at + TURNED // 2, at - TURNED // 2)
            other = tl.max_contiguous(tl.multiple_of(other, ALIGNED), ALIGNED)
        partner = _convolved(
            new, new_row, past, past_channel, past_tap, mask, first, rows, end, other,
            before + other, inside & turns, weight, bias, N_TAPS, SILU,
        )  # fmt: skip
        place = (first + rows)[:, None] * rotary_row + n[None, :]
        known = real & turns[None, :]
        c = tl.load(cos + place, mask=known, other=1.0).to(tl.float32)
        s = tl.load(sin + place, mask=known, other=0.0).to(tl.float32)
        y = y * c + tl.where(leads[None, :], -partner, partner) * s
    y *= scale
    tl.store(out + rows[:, None] * WIDTH + at[None, :], y, mask=real & inside[None, :])
    if (first < end) & (first + L >= end):
        for tap in tl.static_range(N_TAPS - 1):
            last = tl.full((1,), 0, tl.int32) + (end - first + tap - N_TAPS + 1)
            t = _inputs(
                new, new_row, past, past_channel, past_tap, mask, first, last, end, at,
                before + at, inside, N_TAPS,
            )  # fmt: skip
            keep = future + (before + at)[None, :] * (N_TAPS - 1) + tap
            tl.store(keep, t, mask=inside[None, :])


@triton.jit
def _steps(
    dt, dt_row: tl.constexpr, dt_bias, out, mask, first, end, seqlen,
    H: tl.constexpr, H2: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Write softplus(dt + bias), 0 at padding and from the end on, as (heads, positions)."""
    row, head = first + tl.arange(0, L), tl.arange(0, H2)
    inside = (row < seqlen)[:, None] & (head < H)[None, :]
    step = tl.load(dt + row[:, None] * dt_row + head[None, :], mask=inside, other=0.0)
    step = step.to(tl.float32)
    step += tl.load(dt_bias + head, mask=head < H, other=0.0).to(tl.float32)[None, :]
    # As torch: beyond 20 it is the identity; below, log1p keeps what 1 + exp would swallow.
    power = tl.exp(tl.minimum(step, 20.0))
    grown = 1 + power
    small = tl.where(grown == 1, power, tl.log(grown) * power / tl.where(grown == 1, 1, grown - 1))
    step = tl.where((row < end)[:, None], tl.where(step > 20, step, small), 0.0)
    if mask is not None:
        real = tl.load(mask + row, mask=row < seqlen, other=0) != 0
        step = tl.where(real[:, None], step, 0.0)
    tl.store(out + head[None, :].to(tl.int64) * seqlen + row[:, None], step, mask=inside)


@triton.jit(do_not_specialize=["seqlen"])
def prepare_kernel(
    x, B, C, dt, x_batch, B_batch, C_batch, dt_batch,
    weight, bias, dt_bias, past, past_batch, past_channel, past_tap, mask, end_at, cos, sin,
    rotary_batch, x_out, B_out, C_out, dt_out, future, seqlen, scale,
    x_row: tl.constexpr, B_row: tl.constexpr, C_row: tl.constexpr, dt_row: tl.constexpr,
    rotary_row: tl.constexpr,
    KV: tl.constexpr, H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, H2: tl.constexpr,
    TURNED: tl.constexpr, INTERLEAVED: tl.constexpr, N_TAPS: tl.constexpr, SILU: tl.constexpr,
    L: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Prepare a block of channels of x, B or C, or all steps, over L positions of one row."""
    X_BLOCKS: tl.constexpr = (KV * P + BLOCK - 1) // BLOCK
    B_BLOCKS: tl.constexpr = (KV * N + BLOCK - 1) // BLOCK
    C_BLOCKS: tl.constexpr = (H * N + BLOCK - 1) // BLOCK
    BLOCKS: tl.constexpr = X_BLOCKS + B_BLOCKS + C_BLOCKS + 1
    # Programs of the same positions follow each other: they read the same pages of memory.
    block, batch = tl.program_id(0) % BLOCKS, tl.program_id(1).to(tl.int64)
    first = (tl.program_id(0) // BLOCKS).to(tl.int64) * L
    future += batch * (KV * P + KV * N + H * N) * (N_TAPS - 1)
    end = seqlen
    if end_at is not None:
        end = tl.load(end_at).to(tl.int32)
    if past is not None:
        past += batch * past_batch
    if mask is not None:
        mask += batch * seqlen
    if TURNED > 0:
        cos += batch * rotary_batch
        sin += batch * rotary_batch
    # Channels of the convolution: x of all heads, then B of all, then C of all.
    if block < X_BLOCKS:
        _channels(
            x + batch * x_batch, x_row, x_out + batch * seqlen * (KV * P), past, past_channel,
            past_tap, future, mask, weight, bias, cos, sin, rotary_row, block, 0, first,
            end, seqlen, 1.0, KV * P, P, 0, INTERLEAVED, N_TAPS, SILU, L, BLOCK, ALIGNED,
        )  # fmt: skip
    elif block < X_BLOCKS + B_BLOCKS:
        _channels(
            B + batch * B_batch, B_row, B_out + batch * seqlen * (KV * N), past, past_channel,
            past_tap, future, mask, weight, bias, cos, sin, rotary_row, block - X_BLOCKS, KV * P,
            first, end, seqlen, 1.0, KV * N, N, TURNED, INTERLEAVED, N_TAPS, SILU, L, BLOCK,
            ALIGNED,
        )  # fmt: skip
    elif block < X_BLOCKS + B_BLOCKS + C_BLOCKS:
        _channels(
            C + batch * C_batch, C_row, C_out + batch * seqlen * (H * N), past, past_channel,
            past_tap, future, mask, weight, bias, cos, sin, rotary_row,
            block - X_BLOCKS - B_BLOCKS, KV * (P + N), first, end, seqlen, scale,
            H * N, N, TURNED, INTERLEAVED, N_TAPS, SILU, L, BLOCK, ALIGNED,
        )  # fmt: skip
    else:
        _steps(
            dt + batch * dt_batch, dt_row, dt_bias, dt_out + batch * seqlen * H, mask, first,
            end, seqlen, H, H2, L,
        )  # fmt: skip


def prepare(
    x: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    config: Mamba2Config,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    *,
    mask: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    end: Tensor | None = None,
    conv_state: Tensor | None = None,
    conv_into: Tensor | None = None,
    blocks: Blocks | None = None,
) -> Prepared:
    """Mask, convolve, rotate and scale, as `Mamba2Mixer.forward` does before its scan.

    Args:
        x: (batch, seqlen, n_kv_heads * headdim); slices of one tensor will do, here and below, as
            long as channels are next to each other.
        B: (batch, seqlen, n_kv_heads * d_state).
        C: (batch, seqlen, n_heads * d_state).
        dt: (batch, seqlen, n_heads), before its bias and softplus.
        config: sizes and options.
        conv_weight: (channels, d_conv) or (channels, 1, d_conv), contiguous.
        conv_bias: (channels,).
        dt_bias: (n_heads,).
        mask: (batch, seqlen) bool, False at padding.
        rotary: cos and sin, each (batch or 1, seqlen, rotated width); read if config.rope.
        end: (1,), from 1 to seqlen, where all sequences end; None: they fill their tensors.
        conv_state: (batch, channels, d_conv - 1), what came before, or None for zeros.
        conv_into: contiguous, gets what the next call will take for it; None: a new tensor.
        blocks: what a program takes.
    """
    batch, seqlen = x.shape[:2]
    blocks, widths = blocks or Blocks(), config.widths
    outs = [torch.empty(batch, seqlen, w, dtype=x.dtype, device=x.device) for w in widths]
    steps = torch.empty(batch, config.n_heads, seqlen, dtype=torch.float32, device=x.device)
    future = conv_into
    if future is None:
        future = torch.empty(batch, sum(widths), config.d_conv - 1, dtype=x.dtype, device=x.device)
    cos = sin = None
    turned = rotary_batch = rotary_row = 0
    if config.rope:
        cos, sin = (t if t.is_contiguous() else t.contiguous() for t in rotary)
        turned, rotary_row = cos.shape[-1], cos.stride(1)
        rotary_batch = cos.stride(0) if cos.shape[0] > 1 else 0
    has_past = conv_state is not None and config.d_conv > 1
    if mask is not None:
        mask = mask.contiguous().view(torch.uint8)
    n_blocks = sum(-(-w // blocks.channels) for w in widths) + 1
    prepare_kernel[(n_blocks * -(-seqlen // blocks.rows), batch)](
        x, B, C, dt, x.stride(0), B.stride(0), C.stride(0), dt.stride(0),
        conv_weight, conv_bias, dt_bias,
        conv_state if has_past else None, *(conv_state.stride() if has_past else (0, 0, 0)),
        mask, end, cos, sin, rotary_batch, *outs, steps, future, seqlen,
        1.0 if config.scale is None else config.scale,
        x_row=x.stride(1), B_row=B.stride(1), C_row=C.stride(1), dt_row=dt.stride(1),
        rotary_row=rotary_row, KV=config.n_kv_heads, H=config.n_heads, P=config.headdim,
        N=config.d_state, H2=triton.next_power_of_2(config.n_heads), TURNED=turned,
        INTERLEAVED=config.rope_interleaved, N_TAPS=config.d_conv,
        SILU=config.conv_activation == "silu", L=blocks.rows, BLOCK=blocks.channels,
        # Lanes whose partners in a rotation stand next to each other, too.
        ALIGNED=math.gcd(turned // 2, config.d_state, 8) if turned else 1,
        num_warps=blocks.warps,
    )  # fmt: skip
    heads = zip(outs, (config.headdim, config.d_state, config.d_state), strict=True)
    x, B, C = (t.view(batch, seqlen, -1, width) for t, width in heads)
    return Prepared(x, B, C, steps.transpose(1, 2), future)
