"""How fast a model could be on a machine, and how fast any hybrid of its kind could be.

*Roof*: a step cannot take less time than its bytes need at the machine's bandwidth, nor than its
operations need at the rate of a large matrix product. *Amdahl*: a hybrid that mixes in no time at
all still pays for the rest; the share of mixing in the teacher is measured by leaving it out.
*Reachable*: Mamba-2 also reads its gate, and reads and writes its states, which Amdahl forgets.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from workbench.models.engine.operations import Operations
from workbench.models.families import text_config
from workbench.models.hybrid import mixers, plan_of
from workbench.models.teacher import VLM
from workbench.steps.efficiency.machine import Machine

_IDLE = "workbench_idle"


@dataclass(frozen=True)
class Sizes:
    """What moves and what is computed, for one model; bytes are those of its dtype."""

    layer_parameters: int  # of all decoder layers
    head_parameters: int
    bytes_each: int
    kv_bytes_a_token: int
    ssm_bytes: int  # of one sequence
    attention_width: int  # heads * headdim, summed over the layers that attend
    state_size: int  # n_heads * headdim * d_state, summed over the Mamba-2 layers
    new_parameters: int  # of the Mamba-2 layers, what attention did not have: gate, dt, convolution

    def own_bytes(self, batch: int) -> int:
        """Count what one step moves for Mamba-2 that it would not if attention were just gone."""
        return self.new_parameters * self.bytes_each + 2 * batch * self.ssm_bytes

    def decode_bytes(self, batch: int, context: int) -> int:
        """Count what one step reads and writes at least, for so many rows of so many tokens."""
        weights = (self.layer_parameters + self.head_parameters) * self.bytes_each
        return weights + batch * (context * self.kv_bytes_a_token + 2 * self.ssm_bytes)

    def prefill_flops(self, batch: int, length: int) -> float:
        """Count the operations of a prompt; causal attention needs half of its square."""
        dense = 2 * (length * self.layer_parameters + self.head_parameters)
        mixing = 2 * length**2 * self.attention_width + 6 * length * self.state_size
        return float(batch * (dense + mixing))

    def prefill_seconds(self, machine: Machine, batch: int, length: int) -> float:
        """Return the least time of a prompt, pictures left out."""
        weights = (self.layer_parameters + self.head_parameters) * self.bytes_each
        moved = weights + batch * (length * self.kv_bytes_a_token + self.ssm_bytes)
        return max(moved / machine.bandwidth, self.prefill_flops(batch, length) / machine.flops)

    def decode_seconds(self, machine: Machine, batch: int, context: int) -> float:
        """Return the least time of one step."""
        flops = 2 * batch * (self.layer_parameters + self.head_parameters)
        flops += batch * (4 * context * self.attention_width + 6 * self.state_size)
        moved = self.decode_bytes(batch, context)
        return max(moved / machine.bandwidth, flops / machine.flops)


def sizes(vlm: VLM) -> Sizes:
    """Read a model's sizes off its parameters."""
    model, config = vlm.model, text_config(vlm.model)
    changed, head = mixers(model), model.get_output_embeddings().weight
    layers = model.get_decoder().layers
    headdim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    n_attention = config.num_hidden_layers - len(changed)
    ssm = state = new = 0
    for mixer in changed.values():
        old = mixer.names.all()
        new += sum(p.numel() for n, p in mixer.named_parameters() if n.partition(".")[0] not in old)
        c = mixer.config
        state += c.n_heads * c.headdim * c.d_state
        ssm += 4 * c.n_heads * c.headdim * c.d_state
        ssm += sum(c.widths) * (c.d_conv - 1) * head.element_size()
    return Sizes(
        layer_parameters=sum(p.numel() for p in layers.parameters()),
        head_parameters=head.numel(),
        bytes_each=head.element_size(),
        kv_bytes_a_token=2 * n_attention * config.num_key_value_heads * headdim
        * head.element_size(),
        ssm_bytes=ssm,
        attention_width=n_attention * config.num_attention_heads * headdim,
        state_size=state,
        new_parameters=new,
    )  # fmt: skip


def ratio(vlm: VLM) -> float:
    """Return the share of decoder layers that are Mamba-2."""
    plan = plan_of(vlm.model)
    return 0.0 if plan is None else plan.ratio


def amdahl(share: float, replaced: float, added: float = 0.0) -> float:
    """Return the largest speed-up when `replaced` of a `share` of the time costs nothing.

    Args:
        share: of mixing in the teacher's time, 0 to 1.
        replaced: share of the layers that no longer attend, 0 to 1.
        added: what stands in costs at least, as a share of the teacher's time.
    """
    return 1 / max(1 - share * replaced + added, 1e-9)


class Idle:
    """Operations in which attention costs nothing: it says what it was asked.

    Args:
        inner: that do the rest.
    """

    def __init__(self, inner: Operations) -> None:
        self.inner, self.by_place = inner, inner.by_place
        self.begin, self.enter, self.mix = inner.begin, inner.enter, inner.mix
        self.leave, self.logits = inner.leave, inner.logits
        self.feeds_apart = inner.feeds_apart
        self.for_prompts = self if inner.for_prompts is inner else Idle(inner.for_prompts)

    def attend(self, part, inward: tuple[Tensor, ...], *unused: object) -> Tensor:
        """Return the queries."""
        return inward[0].contiguous()

    def attend_prompt(
        self, part, inward: tuple[Tensor, ...], cos: Tensor, sin: Tensor, slot, batch: int
    ) -> Tensor:
        """Return the queries; keys and values have their places, which stay empty."""
        heads = (t.unflatten(-1, (part.n_kv_heads, -1)) for t in inward[1:3])
        slot.fill(*(t.unflatten(0, (batch, -1)).transpose(1, 2) for t in heads))
        return inward[0].contiguous()


@contextmanager
def idle_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the decoder's attention returns its queries, and no mask is made."""
    config = model.get_decoder().config
    before = config._attn_implementation
    AttentionInterface.register(_IDLE, _say_the_queries)
    config._attn_implementation = _IDLE
    try:
        yield
    finally:
        config._attn_implementation = before


def _say_the_queries(module, query: Tensor, *unused: object, **options: object):
    return query.transpose(1, 2).contiguous(), None


def out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out, on a GPU or a CPU."""
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    words = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "out of memory" in words or "can't allocate memory" in words or "not enough memory" in words
    )
