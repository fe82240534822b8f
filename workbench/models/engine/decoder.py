"""A decoder read once, so that one token can pass through it with nothing but arithmetic.

`transformers` rebuilds masks, positions and outputs for each token, in Python, layer by layer: for
a small model, or any model on a fast GPU, that takes longer than the arithmetic. Here the layers
are read into plain records which point at the model's own weights: nothing is copied, and what
training changes is seen. What a record cannot describe is refused, and runs the model's forward.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from workbench.errors import WorkbenchError
from workbench.mamba.config import Mamba2Config
from workbench.mamba.mixer import Mamba2Mixer
from workbench.models.families import decoder_layers, text_config

# By model_type of the language model: the layers that are described here. All add a rotary
# embedding to queries and keys and keep every key; in a "parallel" one the feed-forward reads what
# attention reads.
PARALLEL = ("phi",)
SEQUENTIAL = ("llama", "mistral", "qwen2", "qwen3")
FIXED_ROPE = ("default", "linear", "llama3", "yarn", "proportional")  # the same at every length


@dataclass(frozen=True)
class Norm:
    """A layer norm, or an RMS norm, over the last axis."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    centred: bool  # a layer norm

    def __call__(self, t: Tensor) -> Tensor:
        """Normalise (..., width)."""
        if self.centred:
            return F.layer_norm(t, self.weight.shape, self.weight, self.bias, self.eps)
        return F.rms_norm(t, self.weight.shape, self.weight, self.eps)


@dataclass(frozen=True)
class Matrix:
    """A projection: (n_in,) -> (n_out,)."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, t: Tensor) -> Tensor:
        """Project (..., n_in) to (..., n_out)."""
        return F.linear(t, self.weight, self.bias)


@dataclass(frozen=True)
class AttentionPart:
    """What is particular to a layer that attends."""

    q: Matrix
    k: Matrix
    v: Matrix
    q_norm: Norm | None
    k_norm: Norm | None
    n_heads: int
    n_kv_heads: int
    headdim: int
    scale: float
    rotates: bool = True


@dataclass(frozen=True)
class MixerPart:
    """What is particular to a Mamba-2 layer."""

    C: Matrix
    B: Matrix
    x: Matrix
    z: Matrix | None
    dt: Matrix
    dt_bias: Tensor  # (n_heads,), added in float32
    C_norm: Norm | None
    B_norm: Norm | None
    conv_weight: Tensor  # (channels of x, B and C, d_conv)
    conv_bias: Tensor
    A_log: Tensor  # (n_heads,), float32
    D: Tensor  # (n_heads,), float32
    norm_weight: Tensor | None
    config: Mamba2Config
    mixer: Mamba2Mixer  # that mixes prompts


@dataclass(frozen=True)
class Block:
    """One decoder layer."""

    norm: Norm
    part: AttentionPart | MixerPart
    out: Matrix
    second_norm: Norm | None  # before the feed-forward; None: it reads what the first norm says
    gate: Matrix | None  # of a gated feed-forward
    up: Matrix
    down: Matrix
    activation: Callable[[Tensor], Tensor]
    activation_name: str


@dataclass(frozen=True)
class Decoder:
    """A whole language model, from token ids to logits."""

    embedding: Tensor  # (vocabulary, d_model)
    blocks: tuple[Block, ...]
    norm: Norm
    head: Matrix
    rotary: nn.Module

    def rotary_table(self, length: int) -> tuple[Tensor, Tensor]:
        """Return cos and sin of every position below length, each (length, rotated width)."""
        positions = torch.arange(length, device=self.embedding.device)[None]
        with torch.no_grad():
            cos, sin = self.rotary(self.embedding[:1, None], positions)
        return cos[0].contiguous(), sin[0].contiguous()


def why_not(model: PreTrainedModel) -> str | None:
    """Say why a model's layers cannot be read into records; None if they can."""
    config = text_config(model)
    kind = config.model_type.removeprefix("ssm_hybrid-")
    if kind not in (*PARALLEL, *SEQUENTIAL):
        return f"layers of the family {kind!r} are not described"
    kinds = getattr(config, "layer_types", None) or ()
    # Qwen2 keeps a sliding_window in its config that no layer uses.
    if any("sliding" in k for k in kinds) or (
        kind == "mistral" and getattr(config, "sliding_window", None)
    ):
        return "some layers attend to a window only"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in FIXED_ROPE:
        return f"its rotary embedding ({rope}) depends on the length"
    decoder = model.get_decoder()
    if {p.device for p in decoder.parameters()} != {model.get_input_embeddings().weight.device}:
        return "its layers are spread over several devices"
    linear = [m for m in decoder.modules() if isinstance(getattr(m, "weight", None), Tensor)]
    odd = [m for m in linear if "inear" in type(m).__name__ and type(m) is not nn.Linear]
    if odd or any(hasattr(m, "base_layer") for m in decoder.modules()):
        return "its projections are quantised, or carry adapters"
    if any(
        isinstance(layer.self_attn, Mamba2Mixer) and layer.self_attn.names.fused
        for layer in decoder_layers(model)
    ):
        return "its projections are fused already"
    return None


def read_decoder(model: PreTrainedModel) -> Decoder:
    """Read the language model of a teacher or a hybrid.

    Raises:
        WorkbenchError: `why_not` says why.
    """
    reason = why_not(model)
    if reason:
        raise WorkbenchError(f"This model cannot be read for fast decoding: {reason}.")
    decoder = model.get_decoder()
    config = text_config(model)
    parallel = config.model_type.removeprefix("ssm_hybrid-") in PARALLEL
    head = model.get_output_embeddings()
    return Decoder(
        embedding=model.get_input_embeddings().weight,
        blocks=tuple(_block(layer, config, parallel) for layer in decoder_layers(model)),
        norm=_norm(decoder.final_layernorm if parallel else decoder.norm),
        head=Matrix(head.weight, head.bias),
        rotary=decoder.rotary_emb,
    )


def _block(layer: nn.Module, config, parallel: bool) -> Block:
    mixing, mlp = layer.self_attn, layer.mlp
    if isinstance(mixing, Mamba2Mixer):
        part, out = _mixer(mixing), getattr(mixing, mixing.names.out)
    else:
        part, out = _attention(mixing, config), mixing.dense if parallel else mixing.o_proj
    names = ("fc1", "fc2", "activation_fn") if parallel else ("up_proj", "down_proj", "act_fn")
    up, down, activation = (getattr(mlp, name) for name in names)
    return Block(
        norm=_norm(layer.input_layernorm),
        part=part,
        out=_matrix(out),
        second_norm=None if parallel else _norm(layer.post_attention_layernorm),
        gate=None if parallel else _matrix(mlp.gate_proj),
        up=_matrix(up),
        down=_matrix(down),
        activation=activation,
        activation_name=config.hidden_act,
    )


def _attention(attention: nn.Module, config) -> AttentionPart:
    norms = [("q_norm", "k_norm"), ("q_layernorm", "k_layernorm")]
    q_norm, k_norm = next(
        ((getattr(attention, q), getattr(attention, k)) for q, k in norms if hasattr(attention, q)),
        (None, None),
    )
    return AttentionPart(
        q=_matrix(attention.q_proj),
        k=_matrix(attention.k_proj),
        v=_matrix(attention.v_proj),
        q_norm=_norm(q_norm),
        k_norm=_norm(k_norm),
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        headdim=attention.head_dim,
        scale=attention.scaling,
    )


def _mixer(mixer: Mamba2Mixer) -> MixerPart:
    names, config = mixer.names, mixer.config
    C, B, x = (_matrix(getattr(mixer, name)) for name in (names.C, names.B, names.x))
    return MixerPart(
        C=C,
        B=B,
        x=x,
        z=_matrix(mixer.z_proj) if config.gate else None,
        dt=Matrix(mixer.dt_weight),
        dt_bias=mixer.dt_bias,
        C_norm=_norm(getattr(mixer, names.C_norm)) if names.C_norm else None,
        B_norm=_norm(getattr(mixer, names.B_norm)) if names.B_norm else None,
        conv_weight=mixer.conv1d.weight.squeeze(1),
        conv_bias=mixer.conv1d.bias,
        A_log=mixer.A_log,
        D=mixer.D,
        norm_weight=mixer.norm.weight if config.norm else None,
        config=config,
        mixer=mixer,
    )


def _matrix(module: nn.Linear) -> Matrix:
    return Matrix(module.weight, module.bias)


def _norm(module: nn.Module | None) -> Norm | None:
    if module is None:
        return None
    if isinstance(module, nn.LayerNorm):
        return Norm(module.weight, module.bias, module.eps, True)
    return Norm(module.weight, None, module.variance_epsilon, False)
