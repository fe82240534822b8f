"""FSDP2: each process keeps a part of the student, and the caller's student stays what it is.

`fully_shard` changes the classes and parameters of the modules that it is given, and has no way
back. So a double of the student's modules trains, made of the same parameters before they are cut
into parts; what the caller gave waits on the CPU, and takes the trained weights back at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from workbench.errors import WorkbenchError
from workbench.models.families import decoder_layers
from workbench.models.teacher import VLM


def double(student: VLM) -> VLM:
    """The same weights in modules of their own.

    Raises:
        WorkbenchError: weights of several dtypes, which cannot travel as one.
    """
    dtypes = {p.dtype for p in student.model.parameters()}
    if len(dtypes) > 1:
        names = " and ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
        raise WorkbenchError(
            f"FSDP shards weights of one dtype, and {student.name} has {names}: load it with "
            "dtype=torch.float32; on a GPU it is computed in bfloat16 all the same."
        )
    shared = {id(p): p for p in student.model.parameters()}
    model = deepcopy(student.model, shared)
    model.get_input_embeddings().register_forward_hook(_differentiable)
    return replace(student, model=model)


def _differentiable(module: nn.Module, args: tuple, output: Tensor) -> None:
    """Let all processes reduce gradients in one order, whether or not their batches have pictures.

    The first layer's come at another time if what it reads has none, as a text under a picture's
    projector that trains.
    """
    if torch.is_grad_enabled():
        output.requires_grad_()


def shard(objective: nn.Module, trains: VLM, mesh: DeviceMesh) -> None:
    """Cut the weights of `trains` into parts, layer by layer, what is outside of layers as one.

    Layers are called inside `objective`, alone and with the rest: it is the root.
    """
    from torch.distributed.fsdp import fully_shard  # half a second, which few need

    for layer in decoder_layers(trains.model):
        fully_shard(layer, mesh=mesh)
    fully_shard(objective, mesh=mesh)


def outside_layers(model: nn.Module) -> list[nn.Parameter]:
    """What trains beside the decoder layers: a batch without pictures leaves some of it alone."""
    inside = {id(p) for layer in decoder_layers(model) for p in layer.parameters()}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in inside]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which this process may have a part; all processes must ask together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that this process has of `like`."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def give_back(trained: Mapping[str, Tensor], model: nn.Module) -> None:
    """Put trained weights into the model of the caller; all processes together."""
    theirs = dict(model.named_parameters())
    for name, tensor in trained.items():
        theirs[name].copy_(whole(tensor))


def move(model: nn.Module, device: torch.device | str) -> None:
    """Let the weights of a model stand elsewhere, and leave its buffers."""
    for p in model.parameters():
        p.data = p.data.to(device)
