"""Tell models apart by what they hold."""

import hashlib

import torch
from torch import nn

SAMPLES = 64  # numbers read of each tensor


def fingerprint(*models: nn.Module, rounded: torch.dtype = torch.float32) -> str:
    """Hash names, shapes and some numbers of all weights: other weights give another text.

    Args:
        models: in their order; of weights that are offloaded, only name and shape count.
        rounded: before numbers are compared, so that bfloat16 copies can pass for the same.
    """
    digest = hashlib.sha256()
    for model in models:
        for name, value in model.state_dict().items():
            digest.update(name.encode() + str(tuple(value.shape)).encode())
            if value.is_meta:
                continue
            some = value.detach().flatten()[:: max(1, value.numel() // SAMPLES)]
            digest.update(some.to(rounded).float().cpu().numpy().tobytes())
    return digest.hexdigest()
