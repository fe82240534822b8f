"""Kernels that begin while the one before still runs (programmatic dependent launch).

Between two kernels a GPU idles for microseconds: the last programs end, the next are launched, and
their first bytes come from far. On Hopper and newer, a kernel may be launched as soon as all
programs of the one before have begun. It reads what nobody changes, weights and older states, then
waits until the kernel before has ended, and only then reads what that has written.
https://docs.nvidia.com/cuda/cuda-c-programming-guide/#programmatic-dependent-launch-and-synchronization
"""

import functools

import torch
import triton
import triton.language as tl

OLDEST = (9, 0)  # compute capability


@triton.jit
def wait(CHAINED: tl.constexpr):
    """Let the next kernel begin, and wait for the one before; nothing waits unless CHAINED."""
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


def chained(device: torch.device) -> dict[str, bool]:
    """Return the options to launch a kernel with that calls `wait`, on this device.

    Where there is no such launch (no GPU, an older one, an older Triton), kernels follow each
    other as ever.
    """
    return {"CHAINED": True, "launch_pdl": True} if _can_chain(device) else {"CHAINED": False}


@functools.cache
def _can_chain(device: torch.device) -> bool:
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= OLDEST
        and hasattr(tl.extra.cuda, "gdc_wait")
    )
