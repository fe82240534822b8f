"""Sizes and options of a mixer, and the names of what it takes over.

The options' defaults are the paper's. With others a mixer can hold exactly what attention without
softmax computes: `Mamba2Mixer.reset_to_linear_attention` says which.

ours       paper  mamba_ssm  transformers       attention twin
d_model    D      d_model    hidden_size        hidden_size
d_state    N      d_state    state_size         head_dim of Q and K
headdim    P      headdim    head_dim           head_dim of V
n_heads    H      nheads     num_heads          num_attention_heads
n_groups   G      ngroups    n_groups           K and V are shared by groups of heads (GQA)
d_conv     -      d_conv     conv_kernel        -
d_inner    -      d_inner    intermediate_size  n_heads * head_dim
"""

from dataclasses import dataclass

from workbench.errors import WorkbenchError


@dataclass(frozen=True)
class Mamba2Config:
    """Sizes and options of one mixer.

    Raises:
        WorkbenchError: sizes that do not divide each other, or an unknown activation.
    """

    d_model: int  # width of the residual stream (D)
    n_heads: int  # heads of C, z and the output (H)
    n_kv_heads: int  # heads of x and B, each repeated for n_heads / n_kv_heads heads (G)
    headdim: int  # width of x in one head (P)
    d_state: int  # width of B and C in one head (N)
    d_conv: int = 4  # taps of the causal convolution over x, B and C; 1: no look at the past
    chunk_size: int = 64  # positions computed as one matrix (Q)
    bias: bool = False  # keep the biases of the projections; the paper drops them
    rope: bool = False  # rotate B and C by position, as attention does; the paper does not
    rope_interleaved: bool = False  # turn channels (0, 1), (2, 3), ... instead of the two halves
    conv_activation: str | None = "silu"  # after the convolution; None: the sum as it is
    gate: bool = True  # multiply the output by silu(z); False: there is no z at all
    norm: bool = True  # normalise the (gated) output; False: there is no norm at all
    norm_group_size: int | None = None  # channels normalised together; None: one head (P)
    norm_eps: float = 1e-5  # epsilon of the norm
    scale: float | None = None  # multiplies C after the convolution, as attention scales Q; None: 1

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads:
            raise WorkbenchError(
                f"n_heads ({self.n_heads}) must be a multiple of n_kv_heads ({self.n_kv_heads})."
            )
        if self.d_inner % self.group_size:
            raise WorkbenchError(
                f"norm_group_size ({self.group_size}) must divide d_inner ({self.d_inner})."
            )
        if min(self.d_conv, self.chunk_size) < 1:
            raise WorkbenchError(
                f"d_conv ({self.d_conv}) and chunk_size ({self.chunk_size}) must be at least 1."
            )
        if self.conv_activation not in ("silu", None):
            raise WorkbenchError(
                f"conv_activation is 'silu' or None, but not {self.conv_activation!r}."
            )

    @property
    def d_inner(self) -> int:
        """Width of z and of the mixed sequence over all heads."""
        return self.n_heads * self.headdim

    @property
    def group_size(self) -> int:
        """Channels that the norm normalises together."""
        return self.norm_group_size or self.headdim

    @property
    def widths(self) -> tuple[int, int, int]:
        """Channels of x, B and C as projected and convolved, before groups are repeated."""
        return (
            self.n_kv_heads * self.headdim,
            self.n_kv_heads * self.d_state,
            self.n_heads * self.d_state,
        )


@dataclass(frozen=True)
class ProjectionNames:
    """What a family calls the modules that the mixer takes over; None where it has none."""

    C: str | None = "q_proj"
    B: str | None = "k_proj"
    x: str | None = "v_proj"
    fused: str | None = None  # one matrix with rows [C, B, x], in place of the three above
    out: str = "o_proj"
    C_norm: str | None = None  # a norm on queries, kept on C
    B_norm: str | None = None  # a norm on keys, kept on B

    def all(self) -> tuple[str, ...]:
        """Every name that is set."""
        projections = (self.fused,) if self.fused else (self.C, self.B, self.x)
        return tuple(n for n in (*projections, self.out, self.C_norm, self.B_norm) if n)
