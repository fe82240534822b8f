"""Kernels, most of other projects, behind the signatures of `workbench.mamba.kernels`.

Each function returns None where its kernel cannot do what is asked; the caller then takes plain
torch. Nothing is imported before it is needed: none of these packages has to be there.
"""

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

LONGEST_CHUNK = 128  # of mamba_ssm's scan; the chunks of the caller suit CPUs
SHORTEST_CHUNK = 16

Scan = tuple[Tensor, Tensor] | None


def load(module: str, *names: str) -> tuple[Callable, ...]:
    """Import functions of a package.

    Raises:
        ImportError: the package is missing, or built for another torch; the message says which.
    """
    try:
        found = importlib.import_module(module)
        return tuple(getattr(found, name) for name in names)
    except Exception as error:  # compiled parts fail in many ways, OSError among them
        raise ImportError(f"{module}: {type(error).__name__}: {error}") from error


def ssd_mamba_ssm(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, initial_state: Tensor | None
) -> Scan:
    """Run mamba_ssm's chunked scan; shapes as `workbench.mamba.ssd.ssd_chunked`."""
    if not _fits(x, dt, A, B, C):
        return None
    (scan,) = load("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")
    power = 1 << (x.shape[1] - 1).bit_length()
    chunk = min(LONGEST_CHUNK, max(SHORTEST_CHUNK, power))
    # dt is positive already, D is added by the caller.
    return scan(
        x, dt.float(), A.float(), B, C, chunk,
        initial_states=initial_state, dt_softplus=False, return_final_states=True,
    )  # fmt: skip


def ssd_fla(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, initial_state: Tensor | None
) -> Scan:
    """Run fla's gated linear attention, which is the same map: q = C, k = B, v = x dt, g = dt A."""
    if not _fits(x, dt, A, B, C):
        return None
    (scan,) = load("fla.ops.simple_gla", "chunk_simple_gla")
    n_heads, n_groups = x.shape[2], B.shape[2]
    if n_groups != n_heads:
        B, C = (t.repeat_interleave(n_heads // n_groups, dim=2) for t in (B, C))
    dt = dt.float()
    # Its states are (d_state, headdim), ours the other way round.
    y, state = scan(
        q=C, k=B, v=x * dt[..., None].to(x.dtype), g=dt * A.float(), scale=1.0,
        initial_state=None if initial_state is None else initial_state.float().mT.contiguous(),
        output_final_state=True,
    )  # fmt: skip
    return y, state.mT.contiguous()


def ssd_triton(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, initial_state: Tensor | None
) -> Scan:
    """Run our own kernels, which keep no gradients."""
    learns = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, dt, A, B, C, initial_state)
    )
    if learns or not _fits(x, dt, A, B, C):
        return None
    scan, can_scan = load("workbench.mamba.triton_scan", "scan", "can_scan")
    if not can_scan(x.shape[3], B.shape[3], x.dtype):
        return None
    x, B, C = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, B, C))
    with torch.cuda.device_of(x):
        return scan(x, dt.float(), A, B, C, initial_state=initial_state)


def step_mamba_ssm(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, state: Tensor
) -> Scan:
    """Run mamba_ssm's state update; shapes as `workbench.mamba.ssd.ssd_step`. No gradients."""
    inputs = (x, dt, A, B, C, state)
    if not x.is_cuda or (torch.is_grad_enabled() and any(t.requires_grad for t in inputs)):
        return None
    (update,) = load("mamba_ssm.ops.triton.selective_state_update", "selective_state_update")
    n_heads, headdim, d_state = state.shape[1:]
    zero = A.new_zeros(1, dtype=torch.float32).expand(n_heads, headdim)  # it asks for D and a bias
    after = state.float().clone(memory_format=torch.contiguous_format)  # it works in place
    y = update(
        after,
        x.contiguous(),
        dt.float()[..., None].expand(*dt.shape, headdim),
        A.float()[:, None, None].expand(n_heads, headdim, d_state),
        B,
        C,
        D=zero,
        dt_bias=zero,
        dt_softplus=False,
    )
    return y, after


def conv_causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None,
    state: Tensor | None,
) -> Scan:
    """Run causal_conv1d; shapes as `workbench.mamba.kernels.causal_conv1d`."""
    channels, d_conv = weight.shape
    small = x.dtype in (torch.float16, torch.bfloat16, torch.float32)
    if not (x.is_cuda and small and 2 <= d_conv <= 4 and channels % 8 == 0):
        return None
    forward, update = load("causal_conv1d", "causal_conv1d_fn", "causal_conv1d_update")
    learns = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias, state)
    )
    if x.shape[1] == 1 and state is not None and not learns:
        after = state.to(x.dtype).clone(memory_format=torch.contiguous_format)
        y = update(x[:, 0].contiguous(), after, weight.contiguous(), bias, activation)
        return y[:, None], after
    # Channels stand last in memory, in x and in the state.
    past = None if state is None else state.to(x.dtype).mT.contiguous()
    y = forward(
        x.contiguous().mT,
        weight.contiguous(),
        bias,
        initial_states=None if past is None else past.mT,
        activation=activation,
    )
    return y.mT, _last(x, past, d_conv - 1)


def _last(x: Tensor, past: Tensor | None, n: int) -> Tensor:
    """Return the last n inputs, (batch, channels, n), with those before x where x is short."""
    if x.shape[1] < n:
        if past is None:
            past = x.new_zeros(x.shape[0], n, x.shape[2])
        x = torch.cat([past, x], dim=1)
    return x[:, x.shape[1] - n :].mT


def _fits(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> bool:
    small = x.dtype in (torch.float16, torch.bfloat16, torch.float32)
    return x.is_cuda and small and x.dtype == B.dtype == C.dtype and x.shape[1] > 0
