"""All of a mixer between its projections in three Triton kernels, where no gradients are needed.

The same in parts is some forty kernels: at a thousand tokens a GPU waits for their launches, at
many thousands for the memory that each writes and the next reads.
"""

from __future__ import annotations

import importlib
import logging
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.mamba import kernels
from workbench.mamba.parts import Projected

if TYPE_CHECKING:
    from workbench.mamba.mixer import Mamba2Mixer, MixerState

log = logging.getLogger(__name__)
_refused: set[tuple] = set()  # what did not compile here


def suits(mixer: Mamba2Mixer, said: Projected) -> bool:
    """Tell whether the kernels can mix what the projections say, and are wanted."""
    x = said.x
    if not x.is_cuda or kernels.chosen() not in ("auto", "triton"):
        return False
    if x.dtype == torch.float32 and kernels.chosen() == "auto":
        return False  # who asks for float32 wants its digits more than the kernels' speed
    if torch.compiler.is_compiling() or "triton" in kernels.missing():
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *mixer.parameters())):
        return False
    return fits(mixer, said) and _like(mixer, x) not in _refused


def fits(mixer: Mamba2Mixer, said: Projected) -> bool:
    """Tell whether the kernels have tiles for these sizes; Triton must be installed."""
    config, (x, B, C, *_) = mixer.config, said
    return (
        x.shape[1] > 1
        and x.dtype == B.dtype == C.dtype
        and all(t.stride(-1) == 1 for t in (x, B, C))
        and _kernels().can_scan(config.headdim, config.d_state, x.dtype)
    )


def mix(
    mixer: Mamba2Mixer,
    said: Projected,
    *,
    into: MixerState | None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `mixer.mix_in_parts` does; with "auto", leave it to that if a kernel fails.

    Args:
        mixer: whose.
        said: what its projections say.
        into: as in `Mamba2Mixer.mix`.
        **options: those of `mix_in_parts`.
    """
    if mixer.config.rope and options["rotary"] is None:
        return mixer.mix_in_parts(said, **options)  # says so
    try:
        return _mix(mixer, said, into=into, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers fail in many ways
        if kernels.chosen() == "triton":
            raise
        log.warning("Plain torch mixes from now on: a Triton kernel failed (%s)", error)
        _refused.add(_like(mixer, said.x))
        return mixer.mix_in_parts(said, **options)


def _mix(
    mixer: Mamba2Mixer,
    said: Projected,
    mask: Tensor | None,
    end: Tensor | None,
    rotary: tuple[Tensor, Tensor] | None,
    state: MixerState | None,
    into: MixerState | None,
) -> tuple[Tensor, Tensor, Tensor]:
    config, conv1d = mixer.config, mixer.conv1d
    conv_state, ssm_state = (None, None) if state is None else state
    by_head = config.norm and config.group_size == config.headdim
    with torch.no_grad(), torch.cuda.device_of(said.x):
        y, conv_state, ssm_state = _kernels().mix(
            *said, config, conv1d.weight, conv1d.bias,
            mixer.A_log, mixer.dt_bias, mixer.D, mixer.norm.weight if by_head else None,
            mask=mask, end=end, rotary=rotary, conv_state=conv_state, ssm_state=ssm_state,
            into=into if _takes(into, mixer, said.x) else (None, None),
        )  # fmt: skip
        if config.norm and not by_head:  # no program has the whole of a wider group
            y = mixer.norm(y, None).to(said.x.dtype)
    return y, conv_state, ssm_state


def _takes(into: MixerState | None, mixer: Mamba2Mixer, x: Tensor) -> bool:
    """Tell whether kernels can write a state into these tensors."""
    if into is None or (into.conv.dtype, into.ssm.dtype) != (x.dtype, torch.float32):
        return False
    config, batch = mixer.config, x.shape[0]
    conv = (batch, sum(config.widths), config.d_conv - 1)
    ssm = (batch, config.n_heads, config.headdim, config.d_state)
    fits = (into.conv.shape, into.ssm.shape) == (conv, ssm)
    return fits and into.conv.is_contiguous() and into.ssm.is_contiguous()


def _kernels() -> ModuleType:
    return importlib.import_module("workbench.mamba.triton_scan")


def _like(mixer: Mamba2Mixer, x: Tensor) -> tuple:
    return x.device, x.dtype, mixer.config
