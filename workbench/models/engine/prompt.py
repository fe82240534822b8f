"""A prompt through a decoder's records, all of its positions at once.

The model's own forward asks Python and memory for more: each layer rebuilds what it is told, and
writes down each part of an activation or a rotation. Positions are rows here, as the sequences of a
step are, so both are computed by the same `Operations`.
"""

import threading
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from workbench.errors import WorkbenchError
from workbench.mamba.mixer import MixerState
from workbench.mamba.parts import Projected
from workbench.models.cache import SSMSlot
from workbench.models.engine.decoder import AttentionPart, Decoder, MixerPart
from workbench.models.engine.decoding import State
from workbench.models.engine.operations import Inward, Operations, feed, normed_heads


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

    def stop(module: torch.nn.Module, args: tuple, given: dict | None = None) -> None:
        if threading.get_ident() == mine:
            embedded = given.get("inputs_embeds")
            if embedded is None:  # of a language model, which was given more than words
                embedded = F.embedding(given["input_ids"], decoder.embedding)
            raise _Fed(embedded)

    hook = model.get_decoder().register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(**inputs, use_cache=False, logits_to_keep=1)
    except _Fed as fed:
        return fed.embedded
    finally:
        hook.remove()
    raise AssertionError("the model did not call its decoder")


def read(
    decoder: Decoder,
    state: State,
    operations: Operations,
    embedded: Tensor,
    end: Tensor | None = None,
    beside: torch.cuda.Stream | None = None,
) -> Tensor:
    """Read a prompt from the beginning, and return the logits after it, (batch, vocabulary).

    Args:
        decoder: what the model was read into.
        state: gets keys, values and states of Mamba-2; its place stays.
        operations: how the parts of a layer are computed.
        embedded: (batch, seqlen, d_model), no position of which is padding, but for those behind
            the end.
        end: (1,), where the prompt ends, in all rows; None: it fills its tensor. Positions behind
            it leave keys that the answer writes over, and nothing else.
        beside: where the feed-forward may run while a layer mixes, if neither reads the other.

    Raises:
        WorkbenchError: the state is for fewer positions, or another batch.
    """
    batch, seqlen = embedded.shape[:2]
    if seqlen > state.max_length or batch != len(state.token):
        raise WorkbenchError(
            f"A prompt of {batch} x {seqlen:,} positions does not fit into a state for "
            f"{len(state.token)} x {state.max_length:,}."
        )
    shared = _shared(state, embedded, end)
    h = embedded.flatten(0, 1)
    for block, slot in zip(decoder.blocks, state.cache.layers, strict=True):
        normed, inward = operations.enter(block, h)
        apart = beside is not None and operations.feeds_apart(block, h)
        if apart:
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                fed = feed(block, inward)
        if isinstance(block.part, AttentionPart):
            cos, sin = state.cos[:seqlen], state.sin[:seqlen]
            mixed = operations.attend_prompt(block.part, inward, cos, sin, slot, batch)
        else:
            mixed = mix(block.part, inward, shared, slot)
        if apart:
            h = h + block.out(mixed)
            torch.cuda.current_stream().wait_stream(beside)
            h = h + fed
        else:
            h = operations.leave(block, h, normed, mixed, inward)
    h = h.unflatten(0, (batch, seqlen))
    last = h[:, -1] if end is None else h.index_select(1, end - 1)[:, 0]
    return operations.logits(decoder, last.contiguous())


class Shared(NamedTuple):
    """What all Mamba-2 layers need to know of a prompt."""

    batch: int
    rotary: tuple[Tensor, Tensor]  # cos and sin, each (1, seqlen, rotated width)
    end: Tensor | None  # (1,), where it ends before its tensor does


def _shared(state: State, embedded: Tensor, end: Tensor | None) -> Shared:
    batch, seqlen = embedded.shape[:2]
    cos, sin = state.cos[:seqlen], state.sin[:seqlen]
    half = sin.shape[-1] // 2  # the sign of sin stands in the table, where the mixer has its own
    rotary = cos[None], torch.cat([-sin[:, :half], sin[:, half:]], dim=-1)[None]
    return Shared(batch, rotary, end)


def mix(part: MixerPart, inward: Inward, shared: Shared, slot: SSMSlot) -> Tensor:
    """Mix by Mamba-2, and keep its state: (batch * seqlen, d_inner), gated and normalised."""
    n_read = 4 + (part.z is not None)
    C, B, x, *rest = (t.unflatten(0, (shared.batch, -1)) for t in inward[:n_read])
    if part.C_norm is not None:
        C = normed_heads(part.C_norm, C, part.config.d_state)
        B = normed_heads(part.B_norm, B, part.config.d_state)
    z, dt = rest if part.z is not None else (None, *rest)
    y, conv, ssm = part.mixer.mix(
        Projected(x, B, C, z, dt), end=shared.end, rotary=shared.rotary, into=slot.tensors()
    )
    slot.write(MixerState(conv, ssm), x.shape[1])
    return y.flatten(0, 1)
