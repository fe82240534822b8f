"""One process, or several that `accelerate launch` or `torchrun` started, each with its own data.

Every process holds the whole student and reads its own batches; gradients are averaged (DDP).
FSDP2 would shard the student, but the layer loss calls single layers outside the model's forward,
which sharded modules do not allow without more; it is refused.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from workbench.errors import WorkbenchError


class Processes:
    """What a training loop needs to know of the processes beside its own."""

    def __init__(self) -> None:
        self._accelerator = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            self._accelerator = _accelerator()

    @property
    def count(self) -> int:
        """How many there are."""
        return self._accelerator.num_processes if self._accelerator else 1

    @property
    def rank(self) -> int:
        """Which this is; the one with 0 writes files."""
        return self._accelerator.process_index if self._accelerator else 0

    def check_device(self, device: torch.device) -> None:
        """Insist that the models are where this process works.

        Raises:
            WorkbenchError: they are elsewhere.
        """
        if self._accelerator is None:
            return
        own = self._accelerator.device
        if (device.type, device.index or 0) != (own.type, own.index or 0):
            raise WorkbenchError(
                f"Process {self.rank} works on {own}, but its models are on {device}: "
                f"load them with device={str(own)!r}."
            )

    def wrap(self, module: nn.Module) -> nn.Module:
        """Make gradients of `module` the mean over processes."""
        if self._accelerator is None:
            return module
        return self._accelerator.prepare_model(module, device_placement=False)

    def together(self, module: nn.Module, now: bool) -> AbstractContextManager:
        """Average gradients inside, or (`now` False) leave that to a later backward pass."""
        if self._accelerator is None or now:
            return nullcontext()
        return self._accelerator.no_sync(module)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over processes."""
        return self._accelerator.reduce(tensor, "sum") if self._accelerator else tensor

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        if self._accelerator is None:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self._accelerator.device)))


def own_device() -> str:
    """Return the device on which this process should load its models."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


def _accelerator():
    from accelerate import Accelerator, DistributedType
    from accelerate.utils import DistributedDataParallelKwargs

    # A text-only batch leaves the projector without a gradient, and so does a layer loss.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    # Precision is the objective's own business, the same with one process as with several.
    accelerator = Accelerator(
        mixed_precision="no", cpu=not torch.cuda.is_available(), kwargs_handlers=[unused]
    )
    known = (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    if accelerator.distributed_type not in known:
        raise WorkbenchError(
            f"distill runs on several processes as DDP, not as {accelerator.distributed_type.value}"
            ": choose MULTI_GPU in accelerate's configuration."
        )
    return accelerator
