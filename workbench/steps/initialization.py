"""From teacher and plan to a student whose mixers start from the teacher's attention."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from workbench.errors import WorkbenchError
from workbench.models.hybrid import SSMAttention, build_hybrid, mixers
from workbench.models.plan import Plan
from workbench.models.teacher import VLM


@dataclass(frozen=True)
class Init:
    """A named start: the options that the mixers are built with, and whether attention is kept."""

    summary: str
    options: dict = field(default_factory=dict)
    keeps_attention: bool = True


# MaTVLM, arXiv 2503.13440, section 3.2: x <- W_V, B <- W_K, C <- W_Q, out <- W_O without their
# biases and without RoPE; z, dt, conv1d, A_log, dt_bias at random, D and norm at one.
INITS = {
    "matvlm": Init("the paper's: attention's own projections, everything new at random"),
    "random": Init("the control: every matrix of the mixer at random", keeps_attention=False),
}


def convert(teacher: VLM, plan: Plan, *, init: str = "matvlm", seed: int = 0) -> VLM:
    """Replace the planned layers' attention by Mamba-2; FFN, norms and all other layers are kept.

    Args:
        teacher: the model to convert; it is not changed.
        plan: from `choose_layers`.
        init: a key of `INITS`.
        seed: of the parameters that start at random.

    Returns:
        A new `VLM` named after the teacher and the ratio: "pocket-25".

    Raises:
        WorkbenchError: an unknown init, or a plan that does not fit the teacher.
    """
    if init not in INITS:
        raise WorkbenchError(f"There is no init {init!r}. Choose one of {', '.join(INITS)}.")
    start = INITS[init]
    model = build_hybrid(teacher.model, plan, start.options)
    for index, mixer in mixers(model).items():
        mixer.reset_new_parameters(seed=1000 * seed + index)
        if not start.keeps_attention:
            # A seed of its own: from that of z_proj, C would come out as the gate, shifted.
            _randomise_projections(mixer, seed=1000 * seed + index + 500)
    return VLM(f"{teacher.name}-{100 * plan.ratio:g}", model, teacher.processor, plan)


def _randomise_projections(mixer: SSMAttention, seed: int) -> None:
    """Overwrite what came from attention with nn.Linear's default, drawn on the CPU from `seed`."""
    generator = torch.Generator("cpu").manual_seed(seed)
    for name in mixer.names.all():
        module = getattr(mixer, name)
        if isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            fresh = torch.empty(module.weight.shape).uniform_(-bound, bound, generator=generator)
            with torch.no_grad():
                module.weight.copy_(fresh)
