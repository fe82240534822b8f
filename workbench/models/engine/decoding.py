"""One token through a decoder, and what it leaves behind, in tensors that stay where they are.

`State` is filled by a prompt (*prefill*), through `prompt` or by the model's own forward, to which
it is a Hugging Face cache; `step` then reads the records and adds one token at a time, with the
operations it is given.
A step that is recorded as a CUDA graph reads its token and its place from tensors only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from workbench.models.cache import install_slots
from workbench.models.engine.decoder import AttentionPart, Decoder
from workbench.models.engine.operations import Operations


class StaticSlot(CacheLayerMixin):
    """Keys and values of one layer at addresses that stay; prefill sees itself only.

    `transformers` has a static slot, too, but hands attention all places, the free ones masked:
    prefill then needs a mask of length squared, and misses the kernels that are fast without.
    """

    is_compileable = True
    is_sliding = False

    def __init__(self, max_length: int) -> None:
        super().__init__()
        self.max_length, self.seen = max_length, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for max_length positions, once."""
        self.dtype, self.device = key_states.dtype, key_states.device
        shape = (*key_states.shape[:2], self.max_length)
        # Zeros, not what memory happens to hold: a masked NaN is still NaN times zero.
        self.keys = key_states.new_zeros(*shape, key_states.shape[-1])
        self.values = value_states.new_zeros(*shape, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Keep keys and values of more positions, and return those that attention sees."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        fresh, end = self.seen == 0, self.seen + key_states.shape[2]
        self.keys[:, :, self.seen : end] = key_states
        self.values[:, :, self.seen : end] = value_states
        self.seen = end
        if fresh:
            return key_states, value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def fill(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Forget the past, and return all places, the first of which these are to fill."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.seen = key_states.shape[2]
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Return how many positions are filled."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of the mask, as for a cache that grows."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """Return how many positions there is room for."""
        return self.max_length

    def reset(self) -> None:
        """Forget everything, keep the tensors."""
        self.seen = 0

    forget = reset


class State:
    """Cache, token and place of a batch.

    Args:
        decoder: what the model was read into.
        batch_size: sequences side by side.
        max_length: positions that there is room for, prompt and answer together.
        mamba_layers: indices of the Mamba-2 layers.
    """

    def __init__(
        self, decoder: Decoder, batch_size: int, max_length: int, mamba_layers: tuple[int, ...]
    ) -> None:
        device, n_layers = decoder.embedding.device, len(decoder.blocks)
        self.cache = Cache(layers=[StaticSlot(max_length) for _ in range(n_layers)])
        install_slots(self.cache, mamba_layers, n_layers)
        self.max_length = max_length
        self.cos, sin = decoder.rotary_table(max_length)
        # Rotating halves: (a, b) -> (a cos - b sin, b cos + a sin); the sign stands in the table.
        half = sin.shape[-1] // 2
        self.sin = torch.cat([-sin[:, :half], sin[:, half:]], dim=-1)
        self.token = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.place = torch.zeros(1, dtype=torch.long, device=device)
        self.start = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.logits: Tensor | None = None
        self.length, self.padded = 0, False

    def begin(self, start: Tensor | None) -> None:
        """Forget the past; start: (batch,), how many positions of each row are padding."""
        for slot in self.cache.layers:
            slot.forget()
        self.padded = start is not None and bool(start.any())
        self.start.copy_(start) if self.padded else self.start.zero_()
        self.length = 0

    def follow(self, length: int) -> None:
        """Put the place behind a prompt of so many positions."""
        self.length = length
        self.place.fill_(length)

    def rotary(self, by_place: bool) -> tuple[Tensor, Tensor]:
        """Return cos and sin at the place of each row: (1 or batch, 1, rotated width).

        by_place: of a step that is recorded, which must be right for padded rows, too.
        """
        positions = self.place - self.start if self.padded or by_place else self.place
        return self.cos[positions, None], self.sin[positions, None]


def step(decoder: Decoder, state: State, operations: Operations) -> Tensor:
    """Read state.token, add it to the past, and return the logits of the next, (batch, vocabulary).

    Args:
        decoder: what the model was read into.
        state: where its past is; the place moves on by one.
        operations: how each part of a layer is computed.
    """
    cos, sin = state.rotary(operations.by_place)
    operations.begin(state)
    h = F.embedding(state.token, decoder.embedding)
    for block, slot in zip(decoder.blocks, state.cache.layers, strict=True):
        normed, inward = operations.enter(block, h)
        if isinstance(block.part, AttentionPart):
            mixed = operations.attend(
                block.part, inward, cos, sin, slot.keys, slot.values, state
            )
        else:
            mixed = operations.mix(
                block.part, inward, cos, sin, slot.conv_states[0], slot.recurrent_states[0]
            )
        h = operations.leave(block, h, normed, mixed, inward)
    state.place.add_(1)
    return operations.logits(decoder, h)
