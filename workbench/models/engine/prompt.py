"""A prompt through a decoder's records, all of its positions at once.

The model's own forward asks Python and memory for more: each layer rebuilds what it is told, and
writes down each part of an activation or a rotation. Positions are rows here, as the sequences of a
step are, so both are computed by the same `Operations`.
"""

import threading

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from workbench.mamba.mixer import MixerState
from workbench.mamba.parts import Projected
from workbench.models.cache import SSMSlot
from workbench.models.engine.decoder import AttentionPart, Decoder, MixerPart
from workbench.models.engine.decoding import State
from workbench.models.engine.operations import Inward, Operations, normed_heads

Rotary = tuple[Tensor, Tensor]  # cos and sin, each (seqlen, rotated width)


class _Fed(Exception):
    """What the decoder would have read."""

    def __init__(self, embedded: Tensor) -> None:
        super().__init__()
        self.embedded = embedded


def embed(model: PreTrainedModel, decoder: Decoder, inputs: dict[str, Tensor]) -> Tensor:
    """Return what the decoder reads, (batch, seqlen, d_model): pictures stand among the words.

    A model with pictures is run as far as its decoder, by its own code.

    Args:
        model: a language model, or one with pictures around it.
        decoder: its records.
        inputs: as its forward takes them, without padding.
    """
    if inputs.keys() <= {"input_ids"}:
        return F.embedding(inputs["input_ids"], decoder.embedding)

    mine = threading.get_ident()  # another thread may run the same model meanwhile

    def stop(module: torch.nn.Module, args: tuple, given: dict) -> None:
        if threading.get_ident() == mine:
            raise _Fed(given["inputs_embeds"])

    hook = model.get_decoder().register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(**inputs, use_cache=False, logits_to_keep=1)
    except _Fed as fed:
        return fed.embedded
    finally:
        hook.remove()
    raise AssertionError("the model did not call its decoder")


def read(decoder: Decoder, state: State, operations: Operations, embedded: Tensor) -> Tensor:
    """Read a prompt from the beginning, and return the logits after it, (batch, vocabulary).

    Args:
        decoder: what the model was read into.
        state: gets keys, values and states of Mamba-2; its place stays.
        operations: how the parts of a layer are computed.
        embedded: (batch, seqlen, d_model), no position of which is padding.
    """
    batch, seqlen = embedded.shape[:2]
    rotary = state.cos[:seqlen], state.sin[:seqlen]
    h = embedded.flatten(0, 1)
    for block, slot in zip(decoder.blocks, state.cache.layers, strict=True):
        normed, inward = operations.enter(block, h)
        if isinstance(block.part, AttentionPart):
            mixed = operations.attend_prompt(block.part, inward, *rotary, slot, batch)
        else:
            mixed = mix(block.part, inward, rotary, slot, batch)
        h = operations.leave(block, h, normed, mixed, inward)
    return operations.logits(decoder, h.unflatten(0, (batch, seqlen))[:, -1].contiguous())


def mix(part: MixerPart, inward: Inward, rotary: Rotary, slot: SSMSlot, batch: int) -> Tensor:
    """Mix by Mamba-2, and keep its state: (batch * seqlen, d_inner), gated and normalised."""
    C, B, x, *rest = (t.unflatten(0, (batch, -1)) for t in inward[: 4 + (part.z is not None)])
    if part.C_norm is not None:
        C = normed_heads(part.C_norm, C, part.config.d_state)
        B = normed_heads(part.B_norm, B, part.config.d_state)
    z, dt = rest if part.z is not None else (None, *rest)
    cos, sin = rotary
    half = sin.shape[-1] // 2  # the sign of sin stands in the table, where the mixer has its own
    sin = torch.cat([-sin[:, :half], sin[:, half:]], dim=-1)
    y, *after = part.mixer.mix(Projected(x, B, C, z, dt), rotary=(cos[None], sin[None]))
    slot.write(MixerState(*after), x.shape[1])
    return y.flatten(0, 1)
