"""The one place that chooses how the mixer's sequence operations are computed.

Every implementation offers the same functions with the same signatures. "torch" runs anywhere and
is the reference; "fla" and "mamba_ssm" run on a GPU where those packages are installed, and hand
back to torch what they cannot do. "triton" is ours: it keeps no gradients, and what needs some goes
to the others. "auto", the choice unless another is made, measures them once for each class of
shapes, and remembers; a mixer that needs no gradients it runs as a whole in Triton
(`workbench.mamba.fused`). `use` overrides it, for a block (`with use("torch"):`) or for good
(`use("torch")`).
"""

import functools
import math
import statistics
import time
from types import TracebackType

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.mamba import backends
from workbench.mamba import ssd as plain

_PACKAGES = {  # what an implementation imports
    "mamba_ssm": ("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined"),
    "fla": ("fla.ops.simple_gla", "chunk_simple_gla"),
    "triton": ("workbench.mamba.triton_scan", "scan"),
}
_SCANS = {
    "mamba_ssm": backends.ssd_mamba_ssm,
    "fla": backends.ssd_fla,
    "triton": backends.ssd_triton,
}
_OLDEST_FOR_TRITON = (8, 0)  # compute capability: bfloat16 on tensor cores, copies that overlap
_LONGEST_MEASURED_IN_TORCH = 4096  # beyond, plain torch may run out of memory
# A prompt in float32: to try out what the packages offer took minutes on an H100, for milliseconds.
_UNMEASURED_IN_FLOAT32 = 2048
_SHORTEST_MEASURED = 64  # below, launching is all there is, and compiling takes much longer
_ROUNDS = 5

_chosen = "auto"
_fastest: dict[tuple, str] = {}


@functools.cache
def missing() -> dict[str, str]:
    """Say for each implementation that cannot run here why not."""
    reasons = {}
    for name, (module, *functions) in _PACKAGES.items():
        if not torch.cuda.is_available():
            reasons[name] = "there is no GPU"
            continue
        if name == "triton" and torch.cuda.get_device_capability() < _OLDEST_FOR_TRITON:
            reasons[name] = "the GPU is older than Ampere"
            continue
        try:
            backends.load(module, *functions)
        except ImportError as error:
            reasons[name] = str(error)
    return reasons


@functools.cache
def _has_conv() -> bool:
    try:
        return torch.cuda.is_available() and bool(
            backends.load("causal_conv1d", "causal_conv1d_fn", "causal_conv1d_update")
        )
    except ImportError:
        return False


def available() -> tuple[str, ...]:
    """Name the implementations that can run here, plain torch first."""
    return ("torch", *(name for name in _PACKAGES if name not in missing()))


def chosen() -> str:
    """Name the implementation in use, or "auto"."""
    return _chosen


class use:  # lower case, as it reads like a verb
    """Choose an implementation from now on; as a context manager, until the end of the block.

    Args:
        name: one of `available()`, or "auto".

    Raises:
        WorkbenchError: there is no such implementation, or it cannot run here.
    """

    def __init__(self, name: str) -> None:
        global _chosen
        if name not in (*available(), "auto"):
            reason = missing().get(name)
            raise WorkbenchError(
                f"The kernels called {name!r} cannot run here: {reason}."
                if reason
                else f"There are no kernels called {name!r} here; there are "
                f"{', '.join((*available(), 'auto'))}."
            )
        self._previous, _chosen = _chosen, name

    def __enter__(self) -> "use":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _chosen
        _chosen = self._previous


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mix a sequence; shapes and results as `workbench.mamba.ssd.ssd_chunked`.

    chunk_size counts in plain torch only: the kernels have chunks that suit a GPU.
    """
    name = _chosen
    if name == "auto" or (name == "triton" and _learns(x, dt, A, B, C)):
        name = _choose(x, dt, A, B, C, initial_state) if x.is_cuda else "torch"
    return _scan(name, x, dt, A, B, C, chunk_size, initial_state)


def ssd_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Advance by one position; shapes and results as `workbench.mamba.ssd.ssd_step`."""
    if x.is_cuda and _chosen in ("auto", "mamba_ssm") and "mamba_ssm" not in missing():
        found = backends.step_mamba_ssm(x, dt, A, B, C, state=state)
        if found is not None:
            return found
    return plain.ssd_step(x, dt, A, B, C, state=state)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None = "silu",
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve each channel with its own past, then apply SiLU unless told not to.

    Args:
        x: (batch, seqlen, channels).
        weight: (channels, d_conv), the newest position last.
        bias: (channels,) or None.
        activation: "silu", or None for the sum as it is.
        state: (batch, channels, d_conv - 1), the inputs just before x, or None for zeros.

    Returns:
        y like x, and the state after x (batch, channels, d_conv - 1).
    """
    if x.is_cuda and _chosen != "torch" and _has_conv():
        found = backends.conv_causal_conv1d(x, weight, bias, activation=activation, state=state)
        if found is not None:
            return found
    return _conv_torch(x, weight, bias, activation, state)


def _conv_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    context, length = weight.shape[-1] - 1, x.shape[1]
    window = F.pad(x, (0, 0, context, 0)) if state is None else torch.cat([state.mT, x], dim=1)
    # Shifted products, which a compiler fuses with the SiLU; a depthwise convolution it cannot.
    high = torch.promote_types(weight.dtype, torch.float32)
    y = x.new_zeros(()).to(high) if bias is None else bias.to(high)
    for i, tap in enumerate(weight.to(high).unbind(-1)):
        y = torch.addcmul(y, window[:, i : i + length], tap)
    y = F.silu(y) if activation == "silu" else y
    return y.to(x.dtype), window[:, length:].mT


def _scan(
    name: str,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if name in _SCANS:
        found = _SCANS[name](x, dt, A, B, C, initial_state=initial_state)
        if found is not None:
            return found
    return plain.ssd_chunked(x, dt, A, B, C, chunk_size=chunk_size, initial_state=initial_state)


def _choose(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None
) -> str:
    """Return the fastest scan for shapes like these, measured when they are first seen.

    Lengths within a factor of two, and likewise batch times heads, make one class. Short prompts,
    and those of some length in float32, are not worth it: they stay plain torch. What torch
    compiles stays plain torch, which it can look into; while a CUDA graph is recorded nothing can
    be measured, and the last name is taken.
    """
    if torch.compiler.is_compiling() or x.shape[1] < _SHORTEST_MEASURED:
        return "torch"
    learns = _learns(x, dt, A, B, C)
    if not learns and x.dtype == torch.float32 and x.shape[1] <= _UNMEASURED_IN_FLOAT32:
        return "torch"
    names = tuple(name for name in available() if not (learns and name == "triton"))
    if len(names) == 1:
        return names[0]
    length, width = (math.ceil(math.log2(max(n, 1))) for n in (x.shape[1], x.shape[0] * x.shape[2]))
    like = (x.device, x.dtype, x.shape[3], B.shape[3], length, width, learns)
    if like not in _fastest:
        if torch.cuda.is_current_stream_capturing():
            return names[-1]
        inputs = [t.detach().requires_grad_(learns) for t in (x, dt, A, B, C)]
        times = {}
        for name in names:
            if name == "torch" and x.shape[1] > _LONGEST_MEASURED_IN_TORCH:
                continue
            try:
                times[name] = _time(name, inputs, initial_state, learns)
            except Exception:  # a kernel that does not compile here loses, whatever the reason
                torch.cuda.empty_cache()
        _fastest[like] = min(times, key=times.__getitem__) if times else "torch"
    return _fastest[like]


def _learns(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _time(name: str, inputs: list[Tensor], initial_state: Tensor | None, learns: bool) -> float:
    """Return the seconds of one scan, its backward included if the caller learns."""
    seconds = []
    for _ in range(_ROUNDS + 1):  # the first compiles
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.set_grad_enabled(learns):
            y, _ = _scan(name, *inputs, 64, initial_state)
            if learns:
                torch.autograd.grad(y.float().sum(), inputs)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])
