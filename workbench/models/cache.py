"""The slot of a Hugging Face cache in which a Mamba-2 layer keeps its state.

A cache made for the teacher has one slot for keys and values in each layer. Before the first token,
the slots of all Mamba-2 layers are replaced by `SSMSlot`. Questions about length, which a state of
fixed size cannot answer, go to an attention slot of the same kind (its *peer*).
"""

import inspect
from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import LlamaForCausalLM
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    LinearAttentionLayer,
    StaticLayer,
)

from workbench.errors import WorkbenchError
from workbench.mamba.mixer import MixerState

# What models and their layers call a cache that they are given: renamed in transformers 5.24.
CACHE = next(
    name for name in ("cache", "past_key_values")
    if name in inspect.signature(LlamaForCausalLM.forward).parameters
)  # fmt: skip


class SSMSlot(LinearAttentionLayer, CacheLayerMixin):
    """Convolution and SSM state of one layer, in tensors whose address and size stay the same.

    Args:
        replaced: the empty slot in whose place this one stands.
        peer: an attention slot with the same window, or None if no layer has one.
    """

    is_compileable = True
    is_croppable = False

    def __init__(self, replaced: CacheLayerMixin, peer: CacheLayerMixin | None) -> None:
        super().__init__()
        self.keys = self.values = None
        self.is_initialized = False
        self.is_sliding = getattr(replaced, "is_sliding", False)
        self.peer, self.seen = peer, 0

    def read(self) -> MixerState | None:
        """Return the state so far, or None before the first token."""
        if not self.has_previous_state[0]:
            return None
        return MixerState(self.conv_states[0], self.recurrent_states[0])

    def tensors(self) -> MixerState | None:
        """Return what holds the state, whatever is in it now; None before there is any."""
        if not self.is_conv_states_initialized[0]:
            return None
        return MixerState(self.conv_states[0], self.recurrent_states[0])

    def write(self, state: MixerState, n_tokens: int) -> None:
        """Keep the state after n_tokens more tokens; these tensors themselves will do."""
        if not self.is_conv_states_initialized[0]:
            self.lazy_initialization(conv_states=state.conv, recurrent_states=state.ssm)
            self.is_initialized = True
        if torch.is_grad_enabled() and state.ssm.requires_grad:
            self.conv_states[0], self.recurrent_states[0] = state
        else:  # in place: a CUDA graph reads these addresses
            self.conv_states[0].copy_(state.conv)
            self.recurrent_states[0].copy_(state.ssm)
        self.has_previous_state[0] = True
        if self.peer is None:
            self.seen += n_tokens

    def get_seq_length(self) -> int:
        """Return how many tokens the layer has seen."""
        return self.seen if self.peer is None else self.peer.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of the mask, as an attention layer here would have them."""
        if self.peer is None:
            return self.seen + query_length, 0
        return self.peer.get_mask_sizes(query_length)

    def reset(self) -> None:
        """Forget everything, keep the tensors."""
        super().reset()
        self.seen = 0

    def forget(self) -> None:
        """As `reset`, but leave what the tensors hold: the next prompt writes over all of it."""
        self.has_previous_state[0] = False
        self.seen = 0

    def update(self, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Refuse keys and values.

        Raises:
            WorkbenchError: always; this cache belongs to a model that attends here.
        """
        raise WorkbenchError(
            "This cache was filled by a hybrid, whose Mamba-2 layers have no keys and values; "
            "start a new cache for each model."
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to forget single tokens.

        Raises:
            WorkbenchError: always; a state that has absorbed a token cannot give it back.
        """
        raise WorkbenchError(
            "The state of a Mamba-2 layer cannot be cropped to fewer tokens; start a new cache."
        )


def install_slots(cache: Cache, mamba_layers: Collection[int], n_layers: int) -> None:
    """Replace the slots of all Mamba-2 layers, unless that is done already.

    Args:
        cache: any Hugging Face cache with one slot for each layer, or still without slots.
        mamba_layers: indices of the layers.
        n_layers: decoder layers of the model.

    Raises:
        WorkbenchError: the cache already holds another model's keys and values there.
    """
    if all(i < len(cache.layers) and isinstance(cache.layers[i], SSMSlot) for i in mamba_layers):
        return
    while len(cache.layers) < n_layers:
        cache.layers.append(cache.layer_class_to_replicate())
    if any(cache.layers[i].get_seq_length() for i in mamba_layers):
        raise WorkbenchError(
            "This cache already holds keys and values of layers that are Mamba-2 in this model; "
            "start a new cache for each model."
        )
    attention = [slot for i, slot in enumerate(cache.layers) if i not in mamba_layers]
    for i in mamba_layers:
        window = getattr(cache.layers[i], "is_sliding", False)
        peers = (slot for slot in attention if getattr(slot, "is_sliding", False) == window)
        cache.layers[i] = SSMSlot(cache.layers[i], next(peers, None))


def real_positions(
    attention_mask: Tensor | BlockMask | None, length: int, slot: SSMSlot | None
) -> Tensor | None:
    """Read from the mask that attention would get which of the last `length` positions are real.

    Args:
        attention_mask: None; (batch, keys), nonzero where real (flash attention); (batch, 1,
            queries, keys), bool or 0 / -inf (SDPA and eager); or a BlockMask (flex attention).
        length: positions in this call.
        slot: the layer's place in the cache, or None without a cache.

    Returns:
        (batch, length) bool, or None if nothing is padding.
    """
    if attention_mask is None:
        return None
    # In a static cache the columns are places in the cache, not the last tokens.
    static = slot is not None and isinstance(slot.peer, StaticLayer)
    if isinstance(attention_mask, BlockMask):
        batch = torch.arange(attention_mask.shape[0], device=attention_mask.kv_indices.device)
        query = torch.arange(length, device=batch.device)
        key = torch.arange(attention_mask.shape[-1], device=batch.device)
        sees = attention_mask.mask_mod
        if static:
            return _see_themselves(sees(batch[:, None, None], 0, query[:, None], key))
        return sees(batch[:, None], 0, query, key[-length:])
    if attention_mask.ndim == 2:
        return attention_mask[:, -length:].bool()
    sees = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
    if static:
        return _see_themselves(sees[:, 0])
    # A real token sees itself, a padding token does not.
    return sees[:, 0, :, -length:].diagonal(dim1=-2, dim2=-1)


def _see_themselves(sees: Tensor) -> Tensor:
    """Tell which queries of (batch, queries, keys) see their own place in a static cache.

    Nobody sees the places that are still free, so the newest place seen is that of the last query.
    That a query sees anything is not enough: in a block that sees itself, padding does, too.
    """
    places = torch.arange(sees.shape[-1], device=sees.device)
    queries = places[: sees.shape[-2]]
    newest = torch.where(sees.flatten(0, 1).any(0), places, 0).amax()
    own = (newest - queries[-1] + queries).clamp(min=0)
    return sees[:, queries, own]


def cache_bytes(cache: Cache) -> tuple[int, int]:
    """Add up what the cache holds now: bytes of keys and values, and bytes of Mamba-2 states."""
    kv = ssm = 0
    for slot in cache.layers:
        if isinstance(slot, SSMSlot):
            ssm += sum(t.nbytes for t in slot.read() or ())
        else:
            kv += sum(t.nbytes for t in (slot.keys, slot.values) if t is not None)
    return kv, ssm
