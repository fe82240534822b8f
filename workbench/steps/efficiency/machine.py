"""What this machine can do at best: bytes from memory and products of matrices, each measured once.

And who it is, so that a figure can be traced: names, versions, date and command.
"""

import datetime
import functools
import os
import platform
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from workbench.models.generation import wait

_ROUNDS = 7
_COPIED = 2**30  # bytes, many times what any cache holds
_READ = 2**27
_GPU_SIDE, _CPU_SIDE = 8192, 1024


@dataclass(frozen=True)
class Machine:
    """The two rates that bound everything."""

    bandwidth: float  # bytes a second between memory and processor
    flops: float  # floating-point operations a second in a large matrix product


@functools.cache
def machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """Measure a device, the first time it is asked for: the best of several rounds.

    A GPU copies a large tensor (bytes read and written count); a CPU, whose models are read more
    than written, adds one up.
    """
    if device.type == "cuda":
        source = torch.empty(_COPIED, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        bandwidth = 2 * _COPIED / _best(device, lambda: target.copy_(source))
        side = _GPU_SIDE
        del source, target
    else:
        source = torch.ones(_READ // 4)
        bandwidth, side = _READ / _best(device, source.sum), _CPU_SIDE
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    return Machine(bandwidth, 2 * side**3 / _best(device, lambda: a @ b))


def about(device: torch.device) -> dict[str, str]:
    """Say where and with what a measurement was made."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": name,
        "cpu_cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "command": _command(),
    }


def _command() -> str:
    """What was run, so that it can be run again; where its results went is nobody's business."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    run = ["-m", spec.name.removesuffix(".__main__")] if spec else [Path(sys.argv[0]).name]
    given = sys.argv[1:]
    if "--out" in given:
        at = given.index("--out")
        given = given[:at] + given[at + 2 :]
    return shlex.join(["python", *run, *given])


def _best(device: torch.device, work) -> float:
    seconds = []
    for _ in range(_ROUNDS):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
