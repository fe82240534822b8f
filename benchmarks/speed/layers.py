"""What the kernels of a prompt are tried on: a mixer and an attention layer of Phi-2's size."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from workbench.mamba.config import Mamba2Config
from workbench.mamba.mixer import Mamba2Mixer
from workbench.mamba.parts import rotate

N_HEADS, HEADDIM, ROTATED = 32, 80, 32
D_MODEL = N_HEADS * HEADDIM
OPTIONS = {
    "mixer (paper)": {},
    "mixer (as attention)": {"rope": True, "bias": True, "scale": HEADDIM**-0.5},
}


def inputs(length: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    """Draw x, dt, A, B and C, of the size that a mixer's are."""
    generator = torch.Generator("cuda").manual_seed(length)
    draw = partial(torch.randn, generator=generator, device="cuda")
    x, B, C = draw(3, 1, length, N_HEADS, HEADDIM).to(dtype)
    dt = torch.rand(1, length, N_HEADS, generator=generator, device="cuda") * 0.1
    A = -torch.rand(N_HEADS, generator=generator, device="cuda") * 4
    return x, dt, A, B, C / HEADDIM**0.5


def mixer(options: dict, dtype: torch.dtype = torch.bfloat16) -> Mamba2Mixer:
    """Build a mixer of Phi-2's size, the same weights each time."""
    torch.manual_seed(0)
    sizes = {"d_model": D_MODEL, "n_heads": N_HEADS, "n_kv_heads": N_HEADS}
    config = Mamba2Config(**sizes, headdim=HEADDIM, d_state=HEADDIM, **options)
    return Mamba2Mixer(config).to("cuda", dtype)


def attention_layer() -> Callable:
    """Build attention with the same projections, as Phi-2 has it."""
    q, k, v, out = (nn.Linear(D_MODEL, D_MODEL).to("cuda", torch.bfloat16) for _ in range(4))

    def forward(hidden, turns):
        queries, keys, values = (p(hidden).unflatten(-1, (N_HEADS, HEADDIM)) for p in (q, k, v))
        queries, keys = (rotate(t, turns, False) for t in (queries, keys))
        heads = (t.transpose(1, 2) for t in (queries, keys, values))
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        return out(mixed.transpose(1, 2).flatten(2))

    return forward


def angles(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin by position, as Phi-2 rotates."""
    rates = 10000 ** (-torch.arange(0, ROTATED, 2, device="cuda") / ROTATED)
    angle = torch.arange(length, device="cuda")[:, None] * rates
    angle = torch.cat([angle, angle], -1)[None]
    return angle.cos().bfloat16(), angle.sin().bfloat16()
