"""One process, or several that `accelerate launch` or `torchrun` started, each with its own data.

Every process reads its own batches, and gradients are averaged. With DDP each holds the whole
student, with FSDP2 (`accelerate launch --use_fsdp --fsdp_version 2`) a part of it, of its gradients
and of AdamW's moments; of accelerate's plugin nothing else is read. The teacher is whole in each,
and so is the student, on the CPU, while its parts train.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from workbench.errors import WorkbenchError
from workbench.models.teacher import VLM
from workbench.steps.training import sharding


class Processes:
    """What a training loop needs to know of the processes beside its own."""

    def __init__(self) -> None:
        self._accelerator, self.shards = None, False
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            self.shards = _asked_to_shard()
            if self.shards:
                # Or transformers leaves buffers on the CPU in all processes but the first.
                os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
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

    def trainee(self, student: VLM, undo: ExitStack) -> VLM:
        """What trains for the student: itself, or a double of it that may be sharded."""
        if not self.shards:
            return student
        undo.callback(sharding.move, student.model, student.model.device)
        return sharding.double(student)

    def shard(self, objective: nn.Module, trainee: VLM, student: VLM) -> None:
        """Keep a part of the trainee's weights here, if that is asked for."""
        if not self.shards:
            return
        mesh = init_device_mesh(trainee.model.device.type, (self.count,))
        sharding.shard(objective, trainee, mesh)
        sharding.move(student.model, "cpu")

    def wrap(self, module: nn.Module) -> nn.Module:
        """Make gradients of `module` the mean over processes."""
        if self._accelerator is None or self.shards:
            return module
        return self._accelerator.prepare_model(module, device_placement=False)

    def together(self, module: nn.Module, now: bool) -> AbstractContextManager:
        """Average gradients inside, or (`now` False) leave that to a later backward pass."""
        if self.shards:
            module.set_requires_gradient_sync(now)
        if self._accelerator is None or self.shards or now:
            return nullcontext()
        return self._accelerator.no_sync(module)

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors as the first process writes them: in one piece. The others get none."""
        if not self.shards:
            return dict(tensors)
        found = {}
        for name, tensor in tensors.items():  # one at a time, as all of them may not fit
            full = sharding.whole(tensor)
            if self.rank == 0:
                found[name] = full.cpu()
        return found

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over processes."""
        return self._accelerator.reduce(tensor, "sum") if self._accelerator else tensor

    def first(self, value: object) -> object:
        """What the first process has, in all of them."""
        if self._accelerator is None:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

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


def _asked_to_shard() -> bool:
    """Whether `accelerate launch` was asked for FSDP.

    Raises:
        WorkbenchError: it was asked for what is not done here.
    """

    def said(name: str) -> str:
        return os.environ.get(name, "").lower()

    if said("ACCELERATE_USE_FSDP") != "true":
        return False
    if said("FSDP_VERSION") != "2" or said("FSDP_OFFLOAD_PARAMS") == "true":
        raise WorkbenchError(
            "distill shards by FSDP2, and without offloading: choose --fsdp_version 2 and leave "
            "--fsdp_offload_params out."
        )
    return True


def _accelerator():
    from accelerate import Accelerator, DistributedType
    from accelerate.utils import DistributedDataParallelKwargs

    # A text-only batch leaves the projector without a gradient, and so does a layer loss.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    # Precision is the objective's own business, the same with one process as with several.
    accelerator = Accelerator(
        mixed_precision="no", cpu=not torch.cuda.is_available(), kwargs_handlers=[unused]
    )
    known = (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.FSDP)
    if accelerator.distributed_type not in known:
        raise WorkbenchError(
            "distill runs on several processes by DDP or FSDP2, not as "
            f"{accelerator.distributed_type.value}: choose MULTI_GPU or FSDP in accelerate's "
            "configuration."
        )
    return accelerator
