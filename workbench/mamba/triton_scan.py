"""Mamba-2 over a whole prompt in three Triton kernels, for inference: nothing keeps gradients.

`scan` is the map of `workbench.mamba.ssd`, if asked with skip, gate and norm; `mix` is all of a
mixer between its projections. This module needs Triton; import it only where that is installed.
"""

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from workbench.mamba.config import Mamba2Config
from workbench.mamba.triton_prepare import prepare
from workbench.mamba.triton_scan_kernels import scan_kernel, states_kernel

SMALLEST = 16  # side of a tile that tensor cores take
WIDEST = 128  # headdim and d_state: a state must fit into the registers of one program
MOST_SEGMENTS = 64  # each reads the states of all before it
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Tiles(NamedTuple):
    """How the work is cut; any choice gives the same numbers, up to rounding."""

    chunk: int = 64  # positions computed as one matrix
    warps: int = 4
    stages: int = 2  # chunks in flight from memory
    state_chunk: int = 64  # the same three of the first kernel
    state_warps: int = 4
    state_stages: int = 3
    split: bool = True  # a headdim such as 80 as two tiles, 64 + 16, instead of one of 128
    # For each processor of the GPU, at most; longer segments if there are more. On an H200, at
    # Phi-2's size, two are faster than four up to 4,096 positions, and as fast beyond.
    programs: int = 2


def can_scan(headdim: int, d_state: int, dtype: torch.dtype) -> bool:
    """Tell whether the kernels have tiles for these sizes."""
    return max(headdim, d_state) <= WIDEST and dtype in DTYPES


def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    initial_state: Tensor | None = None,
    A_is_log: bool = False,
    D: Tensor | None = None,
    z: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
    final_into: Tensor | None = None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Mix a sequence, as `workbench.mamba.ssd.ssd_chunked` does, and finish it if told how.

    Args:
        x: (batch, seqlen, n_heads or a divisor, headdim), the last axis contiguous, as in B and C.
        dt: (batch, seqlen, n_heads), after softplus, float32.
        A: (n_heads,), < 0.
        B: (batch, seqlen, n_heads or a divisor, d_state).
        C: (batch, seqlen, n_heads or a divisor, d_state).
        initial_state: (batch, n_heads, headdim, d_state), or None for zeros.
        A_is_log: A stands for -exp(A).
        D: (n_heads,), weight of x in the output; None: no skip.
        z: (batch, seqlen, n_heads * headdim), the gate before SiLU; None: no gate.
        norm_weight: (n_heads * headdim,) of an RMS norm over each head; None: no norm.
        norm_eps: epsilon of that norm.
        final_into: contiguous float32, gets the final state; None: a new tensor.
        tiles: how to cut the work; None: as suits the sizes.

    Returns:
        y (batch, seqlen, n_heads, headdim) in the dtype of x, and the final state in float32.
    """
    (batch, seqlen, n_heads), (headdim, d_state) = dt.shape, (x.shape[3], B.shape[3])
    tiles = tiles or default_tiles(headdim, d_state, x.dtype)
    span, segments = _segments(seqlen, batch * n_heads, tiles, x.device)
    high = {"dtype": torch.float32, "device": x.device}
    states = torch.empty(batch, n_heads, segments - 1, headdim, d_state, **high)
    decays = torch.empty(batch, n_heads, segments - 1, **high)
    final = final_into
    if final is None:
        final = torch.empty(batch, n_heads, headdim, d_state, **high)
    y = torch.empty(batch, seqlen, n_heads, headdim, dtype=x.dtype, device=x.device)
    P0, P1 = _parts(headdim) if tiles.split else (_filled(headdim), SMALLEST)
    common = {
        "x_row": x.stride(1), "x_head": x.stride(2), "B_row": B.stride(1), "B_head": B.stride(2),
        "dt_row": dt.stride(1),
        "X_REPEATS": n_heads // x.shape[2], "B_REPEATS": n_heads // B.shape[2], "P": headdim,
        "N": d_state, "P0": P0, "P1": P1, "N2": _filled(d_state), "IS_LOG": A_is_log,
        "PRECISION": "tf32x3" if x.dtype == torch.float32 else "tf32",
    }  # fmt: skip
    if segments > 1:
        states_kernel[(n_heads, segments - 1, batch)](
            x, B, dt, A, states, decays, span, segments, x.stride(0), B.stride(0), dt.stride(0),
            dt.stride(2), Q=tiles.state_chunk, num_warps=tiles.state_warps,
            num_stages=tiles.state_stages, **common,
        )  # fmt: skip
    scan_kernel[(n_heads, segments, batch)](
        x, B, C, dt, A, D, z, norm_weight, states, decays,
        None if initial_state is None else initial_state.contiguous(), final, y,
        seqlen, span, segments, norm_eps, x.stride(0), B.stride(0), C.stride(0), dt.stride(0),
        dt.stride(2), 0 if z is None else z.stride(0),
        C_row=C.stride(1), C_head=C.stride(2), z_row=0 if z is None else z.stride(1),
        C_REPEATS=n_heads // C.shape[2], HEADS=n_heads, Q=tiles.chunk, num_warps=tiles.warps,
        num_stages=tiles.stages, **common,
    )  # fmt: skip
    return y, final


def mix(
    x: Tensor,
    B: Tensor,
    C: Tensor,
    z: Tensor | None,
    dt: Tensor,
    config: Mamba2Config,
    conv_weight: Tensor,
    conv_bias: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    D: Tensor,
    norm_weight: Tensor | None,
    *,
    mask: Tensor | None = None,
    end: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    conv_state: Tensor | None = None,
    ssm_state: Tensor | None = None,
    into: tuple[Tensor, Tensor] = (None, None),
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute all of a mixer between its projections; see `prepare` and `scan` for the arguments.

    Returns:
        y (batch, seqlen, d_inner), gated, and normalised if norm_weight is given; then the states
        of the convolution and of the scan.
    """
    ready = prepare(
        x, B, C, dt, config, conv_weight, conv_bias, dt_bias,
        mask=mask, rotary=rotary, end=end, conv_state=conv_state, conv_into=into[0],
    )  # fmt: skip
    y, state = scan(
        ready.x, ready.dt, A_log, ready.B, ready.C, initial_state=ssm_state, A_is_log=True, D=D,
        z=z, norm_weight=norm_weight, norm_eps=config.norm_eps,
        final_into=into[1], tiles=tiles,
    )  # fmt: skip
    return y.flatten(2), ready.conv_state, state


def default_tiles(headdim: int, d_state: int, dtype: torch.dtype) -> Tiles:
    """Choose tiles by what fits into registers and shared memory."""
    if dtype == torch.float32:
        # Never eight warps, which split 64 rows by columns: Triton 3.6 then reads outside of shared
        # memory (on an H100, with tiles of 16), or is wrong (40 by 128).
        return Tiles(stages=1, state_chunk=32, state_stages=1)
    if headdim * d_state > 96 * 96:
        return Tiles(warps=8, state_warps=8)
    return Tiles()


def _filled(width: int) -> int:
    return max(SMALLEST, triton.next_power_of_2(width))


def _parts(width: int) -> tuple[int, int]:
    """Cut a width into two tiles, if they are less than one; the second is unused otherwise."""
    whole = _filled(width)
    first = whole // 2
    second = _filled(width - first)
    return (first, second) if first >= SMALLEST and first + second < whole else (whole, SMALLEST)


def _segments(seqlen: int, n_pairs: int, tiles: Tiles, device: torch.device) -> tuple[int, int]:
    """Return how long a segment is, and how many there are, for so many pairs of row and head."""
    step = max(tiles.chunk, tiles.state_chunk)
    wanted = min(MOST_SEGMENTS, max(1, tiles.programs * _processors(device) // n_pairs))
    span = step * -(-seqlen // (step * wanted))
    return span, -(-seqlen // span)


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
