"""What a plan will cost in memory, computed from sizes alone, before anything is converted."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass

import torch

from workbench.models.families import decoder_layers, read_attention, text_config
from workbench.models.hybrid import MIXER_OPTIONS, SSMAttention, check_plan
from workbench.models.plan import Plan
from workbench.models.teacher import VLM


@dataclass(frozen=True)
class Budget:
    """Bytes of one sequence of `length` tokens. All of it is computed, nothing measured."""

    length: int
    weight_bytes: int  # of the whole model, vision tower and embeddings included
    kv_bytes: int  # keys and values
    ssm_bytes: int  # Mamba-2 states
    read_bytes: int  # what one new token has to fetch: decoder, output layer, cache

    @property
    def cache_bytes(self) -> int:
        """All that the past takes up."""
        return self.kv_bytes + self.ssm_bytes

    def to_dict(self) -> dict:
        """Plain data for JSON."""
        return asdict(self) | {"cache_bytes": self.cache_bytes}

    def __str__(self) -> str:
        return (
            f"at {self.length:,} tokens: weights {self.weight_bytes / 2**20:,.1f} MiB, "
            f"cache {self.cache_bytes / 2**10:,.0f} KiB (keys and values "
            f"{self.kv_bytes / 2**10:,.0f}, states {self.ssm_bytes / 2**10:,.0f}); computed"
        )


def budget(teacher: VLM, plan: Plan | None = None, *, length: int = 1024) -> Budget:
    """Compute what a model and its cache will take up once `plan` is carried out.

    A new token has to fetch every weight of the decoder and of the output layer, all keys and
    values, and every state, which it also writes. So on a machine that waits for memory, decoding
    cannot speed up more than `read_bytes` shrink.

    Args:
        teacher: the model to convert.
        plan: None is the teacher as it is.
        length: tokens of the sequence, those of pictures included.

    Raises:
        WorkbenchError: the plan does not fit the teacher.
    """
    plan = plan or Plan(len(decoder_layers(teacher.model)), ())
    check_plan(teacher.model, plan)
    config, layers = text_config(teacher.model), decoder_layers(teacher.model)
    kv_bytes = ssm_bytes = added = 0
    for index, layer in enumerate(layers):
        attention, item = layer.self_attn, next(layer.self_attn.parameters()).element_size()
        if index not in plan.mamba_layers:
            taken = read_attention(attention, config)
            width = config.num_key_value_heads * (taken.headdim + taken.d_state)
            kv_bytes += length * width * item
            continue
        mixer = _empty_mixer(attention, config, plan, index)
        added += _bytes(mixer) - _bytes(attention)
        sizes = mixer.config
        ssm_bytes += sizes.n_heads * sizes.headdim * sizes.d_state * 4
        ssm_bytes += sum(sizes.widths) * (sizes.d_conv - 1) * item
    read = _bytes(layers) + _bytes(teacher.model.get_output_embeddings()) + added
    return Budget(
        length, _bytes(teacher.model) + added, kv_bytes, ssm_bytes, read + kv_bytes + 2 * ssm_bytes
    )


def _empty_mixer(attention: torch.nn.Module, config, plan: Plan, index: int) -> SSMAttention:
    """The mixer that would take this attention's place, without a byte of memory."""
    config = copy.copy(config)
    config.ssm_hybrid = {"plan": plan.to_dict(), "options": MIXER_OPTIONS}
    memo = {
        id(p): torch.nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
        for p in attention.parameters()
    }
    return SSMAttention(copy.deepcopy(attention, memo), config, index)


def _bytes(module: torch.nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())
