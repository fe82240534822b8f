"""What a decoder layer does with a token: the same four parts, computed in different ways.

`Operations` is plain torch and runs anywhere. `Compiled` hands the parts to torch.compile, one
layer of each kind only, so that a deep model compiles as fast as a shallow one. `packed` has them
for a CPU, `triton_operations` for a GPU.

A layer's projections of the normed input ("inward") come in this order: queries, keys, values, or
C, B, x, z (if there is a gate), dt; then, if the feed-forward reads the same input, its own.
"""

from collections.abc import Callable
from types import FunctionType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.models.engine.decoder import AttentionPart, Block, Decoder, Matrix, MixerPart, Norm

if TYPE_CHECKING:
    from workbench.models.engine.decoding import State, StaticSlot

Inward = tuple[Tensor, ...]


class Operations:
    """Plain torch.

    Args:
        by_place: find the token's place in a tensor, and mask the places behind it, as a step
            that is recorded must; otherwise slice by a number.
    """

    def __init__(self, by_place: bool = False) -> None:
        self.by_place = by_place

    @property
    def for_prompts(self) -> "Operations":
        """What reads prompts, whose lengths differ."""
        return self

    def begin(self, state: "State") -> None:
        """Prepare what all layers of one step share: which places a row sees."""
        self.seen, self.end = None, state.length + 1
        if self.by_place:
            places = torch.arange(state.max_length, device=state.place.device)
            self.seen = (places <= state.place)[None]
            self.seen = self.seen & (places >= state.start[:, None])
        elif state.padded:
            places = torch.arange(self.end, device=state.start.device)
            self.seen = places >= state.start[:, None]
        if self.seen is not None:
            self.seen = self.seen[:, None, None]

    def enter(self, block: Block, h: Tensor) -> tuple[Tensor, Inward]:
        """Normalise (batch, d_model) and project it inward."""
        return enter(block, h)

    def attend(
        self,
        part: AttentionPart,
        inward: Inward,
        cos: Tensor,
        sin: Tensor,
        keys: Tensor,
        values: Tensor,
        state: "State",
    ) -> Tensor:
        """Keep this token's key and value, and attend: (batch, heads * headdim)."""
        q, k, v = rotated(part, inward, cos, sin)
        if self.by_place:
            keys.index_copy_(2, state.place, k[:, :, None])
            values.index_copy_(2, state.place, v[:, :, None])
        else:
            keys[:, :, self.end - 1], values[:, :, self.end - 1] = k, v
            keys, values = keys[:, :, : self.end], values[:, :, : self.end]
        # Heads that share keys stand where a sequence of queries would.
        grouped = q.unflatten(1, (part.n_kv_heads, -1))
        mixed = F.scaled_dot_product_attention(grouped, keys, values, self.seen, scale=part.scale)
        return mixed.flatten(1)

    def attend_prompt(
        self,
        part: AttentionPart,
        inward: Inward,
        cos: Tensor,
        sin: Tensor,
        slot: "StaticSlot",
        batch: int,
    ) -> Tensor:
        """Keep a prompt's keys and values, and attend: (batch * seqlen, heads * headdim).

        cos and sin: (seqlen, rotated width).
        """
        q, k, v = self.keep_prompt(part, inward, cos, sin, slot, batch)
        shared = {"enable_gqa": True} if part.n_kv_heads < part.n_heads else {}
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=part.scale, **shared)
        return mixed.transpose(1, 2).flatten(0, 1).flatten(1)

    def keep_prompt(
        self,
        part: AttentionPart,
        inward: Inward,
        cos: Tensor,
        sin: Tensor,
        slot: "StaticSlot",
        batch: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotate queries and keys, keep keys and values: each (batch, its heads, seqlen, headdim).

        Arguments are those of `attend_prompt`.
        """
        cos, sin = (t.repeat(batch, 1)[:, None] for t in (cos, sin))
        q, k, v = (
            t.unflatten(0, (batch, -1)).transpose(1, 2) for t in rotated(part, inward, cos, sin)
        )
        for places, new in zip(slot.fill(k, v), (k, v), strict=True):
            places[:, :, : new.shape[2]] = new
        return q, k, v

    def mix(
        self,
        part: MixerPart,
        inward: Inward,
        cos: Tensor,
        sin: Tensor,
        conv_state: Tensor,
        ssm_state: Tensor,
    ) -> Tensor:
        """Advance a Mamba-2 layer, its states in place: (batch, d_inner), gated and normalised."""
        return mix(part, inward, cos, sin, conv_state, ssm_state)

    def feeds_apart(self, block: Block, h: Tensor) -> bool:
        """Tell whether the feed-forward is torch's, and reads nothing that is mixed."""
        return block.second_norm is None

    def leave(
        self, block: Block, h: Tensor, normed: Tensor, mixed: Tensor, inward: Inward
    ) -> Tensor:
        """Add what was mixed, and the feed-forward, to the residual stream (batch, d_model)."""
        return leave(block, h, normed, mixed, inward)

    def logits(self, decoder: Decoder, h: Tensor) -> Tensor:
        """Read the next token's logits, (batch, vocabulary), off the residual stream."""
        return decoder.head(decoder.norm(h))


def matrices(block: Block) -> tuple[Matrix, ...]:
    """Return the matrices that read the first norm, in the order of `Inward`."""
    part = block.part
    if isinstance(part, AttentionPart):
        inward = (part.q, part.k, part.v)
    else:
        gate = () if part.z is None else (part.z,)
        inward = (part.C, part.B, part.x, *gate, part.dt)
    return inward if block.second_norm is not None else (*inward, *feeding(block))


def feeding(block: Block) -> tuple[Matrix, ...]:
    """Return the matrices of the feed-forward that read its input."""
    return (block.up,) if block.gate is None else (block.gate, block.up)


def enter(block: Block, h: Tensor) -> tuple[Tensor, Inward]:
    """See `Operations.enter`."""
    normed = block.norm(h)
    return normed, tuple(matrix(normed) for matrix in matrices(block))


def rotated(
    part: AttentionPart, inward: Inward, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q (batch, heads, headdim), k and v (batch, kv heads, headdim), q and k in place."""
    q, k, v = inward[:3]
    if part.q_norm is not None:
        q = normed_heads(part.q_norm, q, part.headdim)
        k = normed_heads(part.k_norm, k, part.headdim)
    together = torch.cat([q, k], dim=-1).unflatten(-1, (-1, part.headdim))
    q, k = rotate(together, cos, sin).split([part.n_heads, part.n_kv_heads], dim=1)
    return q, k, v.unflatten(-1, (-1, part.headdim))


def rotate(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first channels of (batch, heads, headdim) by position, in place.

    sin carries its sign.
    """
    turned = t[..., : cos.shape[-1]]
    swapped = turned.roll(cos.shape[-1] // 2, -1)
    turned.mul_(cos).addcmul_(swapped, sin)
    return t


def mix(
    part: MixerPart,
    inward: Inward,
    cos: Tensor,
    sin: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
) -> Tensor:
    """See `Operations.mix`; what `Mamba2Mixer.forward` does with one position."""
    config = part.config
    C, B, x = inward[:3]
    if part.C_norm is not None:
        C = normed_heads(part.C_norm, C, config.d_state)
        B = normed_heads(part.B_norm, B, config.d_state)
    xBC = _convolve(part, torch.cat([x, B, C], dim=-1), conv_state)
    x, BC = xBC.split((config.widths[0], sum(config.widths[1:])), dim=-1)
    x = x.unflatten(-1, (-1, config.headdim))
    BC = BC.unflatten(-1, (-1, config.d_state))
    if config.rope:
        BC = rotate(BC, cos, sin)
    B, C = BC.split((config.n_kv_heads, config.n_heads), dim=1)
    if config.scale is not None:
        C = C * config.scale
    repeats = config.n_heads // config.n_kv_heads
    if repeats > 1:
        x, B = (t.repeat_interleave(repeats, dim=1) for t in (x, B))
    raw_dt = inward[3 if part.z is None else 4]
    dt = F.softplus(raw_dt.to(part.dt_bias.dtype) + part.dt_bias)
    y = _advance(part, x, dt, B, C, ssm_state).flatten(1)
    if part.z is not None:
        y = y * F.silu(inward[3].to(y.dtype))
    if part.norm_weight is not None:
        grouped = y.unflatten(-1, (-1, config.group_size))
        squares = grouped.square().mean(-1, keepdim=True)
        grouped = grouped * squares.add_(config.norm_eps).rsqrt_()
        y = grouped.flatten(-2) * part.norm_weight.to(y.dtype)
    return y.to(x.dtype)


def _advance(
    part: MixerPart, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> Tensor:
    """Advance the state in place, as `workbench.mamba.ssd.ssd_step` does, and read it."""
    if x.dtype != state.dtype:  # asked first: on a CPU even a cast to itself takes its time
        x, dt, B, C = (t.to(state.dtype) for t in (x, dt, B, C))
    decay = torch.exp(dt * -torch.exp(part.A_log))
    state.mul_(decay[..., None, None])
    state.addcmul_((x * dt[..., None])[..., None], B[..., None, :])
    # A product of matrices would wake all threads of a CPU, for too little to share.
    y = torch.linalg.vecdot(state, C[..., None, :])
    return torch.addcmul(y, x, part.D[:, None])


def _convolve(part: MixerPart, new: Tensor, state: Tensor) -> Tensor:
    window = torch.cat([state, new[..., None]], dim=-1)  # (batch, channels, d_conv)
    state.copy_(window[..., 1:])
    weight, bias = part.conv_weight, part.conv_bias
    if new.dtype.itemsize < 4:
        window, weight, bias = (t.float() for t in (window, weight, bias))
    y = (window * weight).sum(-1) + bias
    return (F.silu(y) if part.config.conv_activation == "silu" else y).to(new.dtype)


def normed_heads(norm: Norm, t: Tensor, width: int) -> Tensor:
    """Apply a norm of queries or keys: over each head if it is one head wide, else over all."""
    if norm.weight.shape[-1] != width:
        return norm(t)
    return norm(t.unflatten(-1, (-1, width))).flatten(-2)


def leave(block: Block, h: Tensor, normed: Tensor, mixed: Tensor, inward: Inward) -> Tensor:
    """See `Operations.leave`."""
    h = h + block.out(mixed)
    if block.second_norm is None:
        return h + feed(block, inward)
    read = block.second_norm(h)
    return h + block.down(fold(block, tuple(matrix(read) for matrix in feeding(block))))


def feed(block: Block, inward: Inward) -> Tensor:
    """Return what a feed-forward adds that reads the layer's own input: (batch, d_model)."""
    return block.down(fold(block, inward[-len(feeding(block)) :]))


def fold(block: Block, fed: tuple[Tensor, ...]) -> Tensor:
    """Apply the feed-forward's activation, and its gate: (batch, feed-forward width)."""
    wide = activate(block, fed[0])
    return wide if len(fed) == 1 else wide * fed[1]


def activate(block: Block, t: Tensor) -> Tensor:
    """Apply the feed-forward's activation, as one operation where torch has it."""
    if block.activation_name in ("gelu_new", "gelu_pytorch_tanh"):
        return F.gelu(t, approximate="tanh")
    if block.activation_name in ("silu", "swish"):
        return F.silu(t)
    return block.activation(t)


class Compiled(Operations):
    """The parts of a layer through torch.compile; layers of one kind share what was compiled.

    Attention is left out: its kernel is one call, and the place of a token must not be compiled in.

    Args:
        inner: whose parts are compiled.
        backend: of torch.compile.
    """

    def __init__(self, inner: Operations, backend: str = "inductor") -> None:
        super().__init__(inner.by_place)
        options = {"fullgraph": True, "dynamic": False, "backend": backend}
        self.inner = inner
        self.enter = torch.compile(_own(enter), **options)
        self.leave = torch.compile(_own(leave), **options)
        self.mix = torch.compile(_own(mix), **options) if _is_plain(inner, "mix") else inner.mix
        self.begin, self.attend, self.logits = inner.begin, inner.attend, inner.logits

    @property
    def for_prompts(self) -> Operations:
        """What is not compiled: each length would be compiled anew."""
        return self.inner


def _is_plain(operations: Operations, name: str) -> bool:
    return getattr(type(operations), name) is getattr(Operations, name)


def _own(function: Callable) -> Callable:
    """Copy a function with its code: what is compiled for one engine is not searched by another."""
    return FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, closure=None
    )
