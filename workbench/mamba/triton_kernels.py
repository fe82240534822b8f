"""One position of a Mamba-2 layer in one kernel: convolution, rotation, state, skip, gate, norm.

In plain torch the same takes some twenty kernels, each of which waits for the memory that the one
before has written. This module needs Triton; import it only where that is installed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.mamba.config import Mamba2Config
from workbench.mamba.triton_chain import chained, wait


@triton.jit
def _convolved(
    new, state, weight, bias, at, inside, channel, N_TAPS: tl.constexpr, SILU: tl.constexpr
):
    """Convolve channels with their past: new[at], whose taps are those of `channel`."""
    latest = tl.load(new + at, mask=inside, other=0.0)
    y = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    y += latest.to(tl.float32) * tl.load(
        weight + channel * N_TAPS + N_TAPS - 1, mask=inside, other=0.0
    ).to(tl.float32)
    for tap in tl.static_range(N_TAPS - 1):
        past = tl.load(state + channel * (N_TAPS - 1) + tap, mask=inside, other=0.0)
        y += past.to(tl.float32) * tl.load(
            weight + channel * N_TAPS + tap, mask=inside, other=0.0
        ).to(tl.float32)
    if SILU:
        y = y / (1 + tl.exp(-y))
    return y.to(latest.dtype).to(tl.float32)


@triton.jit
def _remember(new, state, at, inside, channel, N_TAPS: tl.constexpr):
    """Shift the convolution's past by one, in place."""
    for tap in tl.static_range(N_TAPS - 2):
        later = tl.load(state + channel * (N_TAPS - 1) + tap + 1, mask=inside, other=0.0)
        tl.store(state + channel * (N_TAPS - 1) + tap, later, mask=inside)
    if N_TAPS > 1:
        latest = tl.load(new + at, mask=inside, other=0.0)
        tl.store(state + channel * (N_TAPS - 1) + N_TAPS - 2, latest, mask=inside)


@triton.jit
def _turned(
    new, state, weight, bias, first, start, n, inside, cos, sin,
    N_TAPS: tl.constexpr, SILU: tl.constexpr, ROPE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Convolve one head of B or C, and rotate it; its channels begin at start + first."""
    t = _convolved(
        new, state, weight, bias, first + n, inside, start + first + n, N_TAPS, SILU
    )
    if ROPE:
        turns = n < WIDTH
        other = tl.where(turns, (n + WIDTH // 2) % WIDTH, n)
        partner = _convolved(
            new, state, weight, bias, first + other, inside, start + first + other, N_TAPS, SILU
        )
        c = tl.load(cos + n, mask=turns, other=1.0).to(tl.float32)
        s = tl.load(sin + n, mask=turns, other=0.0).to(tl.float32)
        t = t * c + partner * s
    return t


@triton.jit
def _mix_kernel(
    C, B, x, z, dt, C_row, B_row, x_row, z_row, dt_row,
    conv_state, conv_weight, conv_bias, ssm_state, A_log, dt_bias, D, norm_weight,
    cos, sin, rotary_row, out, eps, scale,
    KV: tl.constexpr, REPEATS: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    P2: tl.constexpr, N2: tl.constexpr, N_TAPS: tl.constexpr, SILU: tl.constexpr,
    GATE: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, WIDTH: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    batch, kv = tl.program_id(0), tl.program_id(1)
    heads = KV * REPEATS
    n_channels = KV * P + KV * N + heads * N
    conv_state += batch * n_channels * (N_TAPS - 1)
    cos += batch * rotary_row
    sin += batch * rotary_row
    C += batch * C_row
    B += batch * B_row
    x += batch * x_row
    p, n = tl.arange(0, P2), tl.arange(0, N2)
    in_p, in_n = p < P, n < N
    inside = in_p[:, None] & in_n[None, :]
    ssm_state += (batch * heads + kv * REPEATS) * P * N + p[:, None] * N + n[None, :]
    # The state is the largest read, and the kernel before does not write it.
    first = tl.load(ssm_state, mask=inside, other=0.0)
    wait(CHAINED)
    # Channels of the convolution: x of all heads, then B of all, then C of all.
    x_at, B_at = kv * P, kv * N
    xs = _convolved(
        x, conv_state, conv_weight, conv_bias, x_at + p, in_p, x_at + p, N_TAPS, SILU
    )
    Bs = _turned(
        B, conv_state, conv_weight, conv_bias, B_at, KV * P, n, in_n, cos, sin,
        N_TAPS, SILU, ROPE, WIDTH,
    )  # fmt: skip
    for repeat in tl.static_range(REPEATS):
        head = kv * REPEATS + repeat
        Cs = scale * _turned(
            C, conv_state, conv_weight, conv_bias, head * N, KV * (P + N), n, in_n, cos, sin,
            N_TAPS, SILU, ROPE, WIDTH,
        )  # fmt: skip
        step = tl.load(dt + batch * dt_row + head).to(tl.float32) + tl.load(dt_bias + head)
        step = tl.where(step > 20, step, tl.log(1 + tl.exp(step)))
        decay = tl.exp(-tl.exp(tl.load(A_log + head)) * step)
        state = first
        if repeat > 0:
            state = tl.load(ssm_state + repeat * P * N, mask=inside, other=0.0)
        state = state * decay + (xs * step)[:, None] * Bs[None, :]
        tl.store(ssm_state + repeat * P * N, state, mask=inside)
        y = tl.sum(state * Cs[None, :], axis=1)
        y = y.to(x.dtype.element_ty).to(tl.float32) + xs * tl.load(D + head)
        if GATE:
            gate = tl.load(z + batch * z_row + head * P + p, mask=in_p, other=0.0).to(tl.float32)
            y = y * gate / (1 + tl.exp(-gate))
        if NORM:
            y = y * tl.rsqrt(tl.sum(y * y, axis=0) / P + eps)
            y = y * tl.load(norm_weight + head * P + p, mask=in_p, other=0.0).to(tl.float32)
        tl.store(out + (batch * heads + head) * P + p, y, mask=in_p)
    # Every thread has read the past before any writes it.
    tl.debug_barrier()
    _remember(x, conv_state, x_at + p, in_p, x_at + p, N_TAPS)
    _remember(B, conv_state, B_at + n, in_n, KV * P + B_at + n, N_TAPS)
    for repeat in tl.static_range(REPEATS):
        C_at = (kv * REPEATS + repeat) * N
        _remember(C, conv_state, C_at + n, in_n, KV * (P + N) + C_at + n, N_TAPS)


def can_mix(config: Mamba2Config) -> bool:
    """Tell whether the kernel computes a mixer of these options: its norm must be one head wide."""
    return (not config.norm or config.group_size == config.headdim) and not (
        config.rope and config.rope_interleaved
    )


def mix_step(
    inward: tuple[Tensor, ...],
    config: Mamba2Config,
    conv_weight: Tensor,
    conv_bias: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    D: Tensor,
    norm_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
) -> Tensor:
    """Advance a mixer by one position, its states in place.

    Args:
        inward: C, B, x, z if there is a gate, and dt before its bias, each (batch, its width),
            the last axis contiguous.
        config: sizes and options.
        conv_weight: (channels, d_conv), contiguous.
        conv_bias: (channels,).
        A_log: (n_heads,), float32.
        dt_bias: (n_heads,), float32.
        D: (n_heads,), float32.
        norm_weight: (d_inner,) or None.
        cos: (1 or batch, 1, rotated width), read if config.rope.
        sin: like cos, negative in the first half.
        conv_state: (batch, channels, d_conv - 1), contiguous.
        ssm_state: (batch, n_heads, headdim, d_state), float32, contiguous.

    Returns:
        (batch, d_inner), gated and normalised.
    """
    C, B, x = inward[:3]
    z, dt = (inward[3], inward[4]) if config.gate else (x, inward[3])
    batch = x.shape[0]
    out = torch.empty(batch, config.d_inner, dtype=x.dtype, device=x.device)
    _mix_kernel[(batch, config.n_kv_heads)](
        C, B, x, z, dt, C.stride(0), B.stride(0), x.stride(0), z.stride(0), dt.stride(0),
        conv_state, conv_weight, conv_bias, ssm_state, A_log, dt_bias, D,
        D if norm_weight is None else norm_weight,
        cos, sin, cos.stride(0) if cos.shape[0] > 1 else 0, out,
        config.norm_eps, 1.0 if config.scale is None else config.scale,
        KV=config.n_kv_heads, REPEATS=config.n_heads // config.n_kv_heads,
        P=config.headdim, N=config.d_state,
        P2=triton.next_power_of_2(config.headdim), N2=triton.next_power_of_2(config.d_state),
        N_TAPS=config.d_conv, SILU=config.conv_activation == "silu", GATE=config.gate,
        NORM=norm_weight is not None, ROPE=config.rope, WIDTH=cos.shape[-1],
        num_warps=4, **chained(x.device),
    )  # fmt: skip
    return out
