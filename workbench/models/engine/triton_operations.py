"""`Operations` on a GPU: Triton kernels where they pay, torch's own where they do not.

For one sequence, a layer is four kernels: projections with the norm before them, attention and the
joining of its splits (or one kernel for all of Mamba-2), and the way back to the residual stream.
A few sequences take two kernels for the way back, the second of which has the next norm in it. More
go through torch's matrix products, which then have enough to do.
"""

import importlib.util

import torch
from torch import Tensor

from workbench.models.engine.decoder import AttentionPart, Block, Decoder, MixerPart, Norm
from workbench.models.engine.operations import Inward, Operations, feeding, matrices, normed_heads

PROGRAMS_A_PROCESSOR = 4  # of the GPU, that attention is split into


def has_triton() -> bool:
    """Tell whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


class TritonOperations(Operations):
    """Kernels that read the token's place from a tensor, so that they can be recorded.

    Args:
        decoder: that will run.
        dense: use the kernels for projections, too, when there are few sequences.
    """

    def __init__(self, decoder: Decoder, dense: bool = True) -> None:
        super().__init__(by_place=True)
        from workbench.mamba import triton_kernels as mixing
        from workbench.models.engine import triton_attention as attention
        from workbench.models.engine import triton_kernels as kernels
        from workbench.models.engine import triton_prompt as prompt
        from workbench.models.engine import triton_rows as rows

        self.mixing, self.attention, self.kernels, self.rows = mixing, attention, kernels, rows
        self.prompt = prompt
        self.dense = dense
        norms = [*(block.norm for block in decoder.blocks[1:]), decoder.norm]
        self.next_norm = {
            id(block): norm for block, norm in zip(decoder.blocks, norms, strict=True)
        }
        self.ahead: tuple[Tensor | None, Tensor | None] = None, None  # h, and it normalised
        device = decoder.embedding.device
        self.processors = (
            torch.cuda.get_device_properties(device).multi_processor_count
            if device.type == "cuda"
            else 4
        )

    def begin(self, state) -> None:
        """Nothing to prepare: the kernels know what a row sees."""

    def enter(self, block: Block, h: Tensor) -> tuple[Tensor, Inward]:
        """See `Operations.enter`; the feed-forward's part comes activated."""
        if not (self._alone(block, h) or self._few(block, h)):
            return super().enter(block, h)
        some, active = matrices(block), -1
        if block.second_norm is None:
            active = len(some) - len(feeding(block))
        if self._alone(block, h):
            return h, self.kernels.project(h, block.norm, some, active, block.activation_name)
        normed = self._normalised(h, block.norm)
        return normed, self.rows.project(normed, some, active, block.activation_name)

    def attend(
        self,
        part: AttentionPart,
        inward: Inward,
        cos: Tensor,
        sin: Tensor,
        keys: Tensor,
        values: Tensor,
        state,
    ) -> Tensor:
        """See `Operations.attend`."""
        q, k, v = _normed(part, inward)
        pairs = keys.shape[0] * keys.shape[1]
        splits = max(2, PROGRAMS_A_PROCESSOR * self.processors // pairs)
        return self.attention.attend(
            q, k, v, cos, sin, keys, values, state.place, state.start,
            headdim=part.headdim, scale=part.scale, n_splits=1 << (splits - 1).bit_length(),
        )  # fmt: skip

    def keep_prompt(
        self,
        part: AttentionPart,
        inward: Inward,
        cos: Tensor,
        sin: Tensor,
        slot,
        batch: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Operations.keep_prompt`."""
        q, k, v = _normed(part, inward)
        heads = [
            t.unflatten(0, (batch, -1)).unflatten(-1, (-1, part.headdim)).transpose(1, 2)
            for t in (q, k, v)
        ]
        self.prompt.keep(q, k, v, cos, sin, *slot.fill(*heads[1:]))
        return tuple(heads)

    def mix(
        self,
        part: MixerPart,
        inward: Inward,
        cos: Tensor,
        sin: Tensor,
        conv_state: Tensor,
        ssm_state: Tensor,
    ) -> Tensor:
        """See `Operations.mix`."""
        if not self.mixing.can_mix(part.config):
            return super().mix(part, inward, cos, sin, conv_state, ssm_state)
        if part.C_norm is not None:
            C = normed_heads(part.C_norm, inward[0], part.config.d_state)
            B = normed_heads(part.B_norm, inward[1], part.config.d_state)
            inward = (C, B, *inward[2:])
        return self.mixing.mix_step(
            inward, part.config, part.conv_weight, part.conv_bias, part.A_log, part.dt_bias,
            part.D, part.norm_weight, cos, sin, conv_state, ssm_state,
        )  # fmt: skip

    def feeds_apart(self, block: Block, h: Tensor) -> bool:
        """See `Operations.feeds_apart`."""
        ours = self._alone(block, h) or self._few(block, h)
        return not ours and super().feeds_apart(block, h)

    def leave(
        self, block: Block, h: Tensor, normed: Tensor, mixed: Tensor, inward: Inward
    ) -> Tensor:
        """See `Operations.leave`."""
        if self._few(block, h):
            return self._leave_few(block, h, mixed, inward)
        if not self._alone(block, h):
            return super().leave(block, h, normed, mixed, inward)
        add, n_fed = self.kernels.add, len(feeding(block))
        if block.second_norm is None:
            return add(h, block.out, mixed, block.down, *inward[-n_fed:])
        h = add(h, block.out, mixed)
        fed = self.kernels.project(h, block.second_norm, feeding(block), 0, block.activation_name)
        return add(h, block.down, _folded(fed))

    def _leave_few(self, block: Block, h: Tensor, mixed: Tensor, inward: Inward) -> Tensor:
        add, norm = self.rows.add, self.next_norm[id(block)]
        if block.second_norm is None:
            fed = inward[-len(feeding(block)) :]
            h, normed = add(h, block.out, mixed, block.down, *fed, norm=norm)
        else:
            h, read = add(h, block.out, mixed, norm=block.second_norm)
            fed = self.rows.project(read, feeding(block), 0, block.activation_name)
            h, normed = add(h, block.down, _folded(fed), norm=norm)
        self.ahead = h, normed
        return h

    def logits(self, decoder: Decoder, h: Tensor) -> Tensor:
        """See `Operations.logits`."""
        if self.dense and h.shape[0] == 1:
            return self.kernels.project(h, decoder.norm, (decoder.head,))[0]
        if self._fits(h):
            normed = self._normalised(h, decoder.norm)
            return self.rows.project(normed, (decoder.head,), stream=self.rows.HEAD)[0]
        return super().logits(decoder, h)

    def _normalised(self, h: Tensor, norm: Norm) -> Tensor:
        """Normalise h, unless the layer before has."""
        return self.ahead[1] if self.ahead[0] is h else self.rows.normalise(h, norm)

    def _alone(self, block: Block, h: Tensor) -> bool:
        return self.dense and h.shape[0] == 1 and block.activation_name in self.kernels.ACTIVATIONS

    def _few(self, block: Block, h: Tensor) -> bool:
        return self._fits(h) and block.activation_name in self.kernels.ACTIVATIONS

    def _fits(self, h: Tensor) -> bool:
        """Tell whether there are few rows; matrix units would round float32 to fewer bits."""
        few = 1 < h.shape[0] <= self.rows.MOST_TOKENS
        return self.dense and few and h.dtype != torch.float32


def _normed(part: AttentionPart, inward: Inward) -> Inward:
    """Return queries, keys and values, normalised where the layer does that."""
    q, k, v = inward[:3]
    if part.q_norm is not None:
        q = normed_heads(part.q_norm, q, part.headdim)
        k = normed_heads(part.k_norm, k, part.headdim)
    return q, k, v


def _folded(fed: tuple[Tensor, ...]) -> Tensor:
    """Apply the gate of a feed-forward that is activated already."""
    return fed[0] if len(fed) == 1 else fed[0] * fed[1]
