"""The one table of where a model family keeps its decoder layers and their projections.

Every other file speaks of C, B, x and out; Hugging Face attribute paths stand here only. Each
family listed calls a layer's attention `self_attn`, by keyword, and unpacks two values. What a row
need not say is read from the attention itself: biases, head sizes, the number of key and value
heads, how many channels of a head rotate, and the scale. Sliding windows and masks with
bidirectional images fall away with the softmax: a Mamba-2 layer is causal over all tokens.
"""

from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from workbench.errors import WorkbenchError
from workbench.mamba.config import ProjectionNames

_HYBRID = "ssm_hybrid-"  # before the model_type of every hybrid
_NORMED = ProjectionNames(C_norm="q_norm", B_norm="k_norm")


@dataclass(frozen=True)
class Family:
    """One row: the class that transformers builds, and how its attention is made."""

    model_class: str | None  # None: it exists inside vision-language models only
    names: ProjectionNames = ProjectionNames()  # a norm that a model lacks is left out
    rope_switch: str | None = None  # attribute of the attention, false where a layer has no RoPE
    rope_interleaved: bool = False  # RoPE turns neighbouring channels, not the halves of a head


# By model_type of the text config. A family of language models is one row here, and one line in
# tests/tiny_families.py.
LANGUAGE_MODELS = {
    "cohere2": Family("Cohere2ForCausalLM", rope_switch="sliding_window", rope_interleaved=True),
    "gemma": Family("GemmaForCausalLM"),
    "gemma2": Family("Gemma2ForCausalLM"),
    "gemma3_text": Family("Gemma3ForCausalLM", _NORMED),
    "granite": Family("GraniteForCausalLM"),
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM"),
    "olmo2": Family("Olmo2ForCausalLM", _NORMED),
    "phi": Family(
        "PhiForCausalLM",
        ProjectionNames(out="dense", C_norm="q_layernorm", B_norm="k_layernorm"),
    ),
    "phi3": Family("Phi3ForCausalLM", ProjectionNames(fused="qkv_proj")),
    "qwen2": Family("Qwen2ForCausalLM"),
    "qwen2_vl_text": Family(None),
    "qwen2_5_vl_text": Family(None),
    "qwen3": Family("Qwen3ForCausalLM", _NORMED),
    "qwen3_vl_text": Family(None, _NORMED),
    "smollm3": Family("SmolLM3ForCausalLM", rope_switch="use_rope"),
    "starcoder2": Family("Starcoder2ForCausalLM"),
}

# By model_type of the whole config: vision-language models around one of the language models above.
VISION_LANGUAGE_MODELS = {
    "gemma3": "Gemma3ForConditionalGeneration",
    "idefics3": "Idefics3ForConditionalGeneration",
    "internvl": "InternVLForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
    "paligemma": "PaliGemmaForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "smolvlm": "SmolVLMForConditionalGeneration",
}

# What cannot be converted, by model_type of the text config, and why.
REFUSED = {
    "its cross-attention layers take keys and values from the image": ("mllama_text_model",),
    "its keys and values are unfolded from one latent vector (MLA)": (
        "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "longcat_flash", "minicpm3", "mistral4",
    ),
    "its softmax has a learned sink in each head, and there is no softmax in Mamba-2": ("gpt_oss",),
    "some of its layers read the keys and values of another layer": ("gemma3n_text", "gemma4_text"),
    "some or all of its layers are linear in the length already": (
        "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "kimi_linear", "lfm2",
        "mamba", "mamba2", "minimax", "nemotron_h", "qwen3_5_text", "qwen3_next", "recurrent_gemma",
        "rwkv", "zamba", "zamba2",
    ),
    "its attention is not a self_attn with query, key, value and output projections": (
        "bloom", "falcon", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "mpt", "persimmon",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Attention:
    """What a mixer has to know of the attention whose place it takes."""

    names: ProjectionNames
    headdim: int  # width of a value
    d_state: int  # width of a query and of a key
    scale: float  # of query times key
    rotates: bool  # False in a layer without RoPE
    rope_interleaved: bool


def text_config(model: PreTrainedModel | PreTrainedConfig) -> PreTrainedConfig:
    """Return the config of the language model, which for a language model is the config itself."""
    config = model.config if isinstance(model, PreTrainedModel) else model
    return config.get_text_config(decoder=True)


def family_name(model: PreTrainedModel) -> str:
    """Name the model's family as people say it: "llava (phi)", or "phi" for a language model."""
    outer, inner = (name.removesuffix("_text") for name in _model_types(model))
    return outer if outer == inner else f"{outer} ({inner})"


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the layers of the language model, the bottom one first.

    Raises:
        WorkbenchError: the model keeps them where no family in the table does.
    """
    layers = getattr(model.get_decoder(), "layers", None)
    if layers is None:
        raise WorkbenchError(_refusal(*_model_types(model)))
    return layers


def check_family(model: PreTrainedModel) -> None:
    """Insist that the model is of a family in the table.

    Raises:
        WorkbenchError: it is not, and why.
    """
    outer, inner = _model_types(model)
    known = LANGUAGE_MODELS.get(inner)
    alone = outer == inner
    if known is None or (alone and not known.model_class):
        raise WorkbenchError(_refusal(outer, inner))
    if not alone and outer not in VISION_LANGUAGE_MODELS:
        raise WorkbenchError(_refusal(outer, inner))


def read_attention(attention: nn.Module, config: PreTrainedConfig) -> Attention:
    """Find out what a mixer needs to take the place of one layer's attention.

    Args:
        attention: a layer's `self_attn`, of a family in the table.
        config: the text config.

    Raises:
        WorkbenchError: the module lacks a projection, or has learned parameters that the table
            does not know and a mixer would lose.
    """
    family = LANGUAGE_MODELS[config.model_type.removeprefix(_HYBRID)]
    absent = {
        role: None
        for role in ("C_norm", "B_norm")
        if not hasattr(attention, getattr(family.names, role) or "")
    }
    names = replace(family.names, **absent)
    missing = [name for name in names.all() if not hasattr(attention, name)]
    if missing:
        raise WorkbenchError(
            f"The attention of this {config.model_type} has no {' and no '.join(missing)}: "
            "it is not built as the table of families says."
        )
    unknown = {n.partition(".")[0] for n, _ in attention.named_parameters()} - set(names.all())
    if unknown:
        raise WorkbenchError(
            f"The attention of this {config.model_type} has a {' and a '.join(sorted(unknown))}, "
            "which the table of families does not know and a mixer would lose."
        )
    if names.fused:
        headdim = d_state = attention.head_dim
    else:
        headdim = getattr(attention, names.x).out_features // config.num_key_value_heads
        d_state = getattr(attention, names.C).out_features // config.num_attention_heads
    rotates = family.rope_switch is None or bool(getattr(attention, family.rope_switch))
    return Attention(names, headdim, d_state, attention.scaling, rotates, family.rope_interleaved)


def _model_types(model: PreTrainedModel) -> tuple[str, str]:
    """Return the model_type of the whole and of its language model, as they were in the teacher."""
    kind = type(model.config)  # a class of our own says which family it is built like
    outer = getattr(kind, "workbench_family", kind.model_type).removeprefix(_HYBRID)
    return outer, text_config(model).model_type.removeprefix(_HYBRID)


def _refusal(outer: str, inner: str) -> str:
    name = repr(outer) if outer == inner else f"{outer!r} (around {inner!r})"
    for reason, families in REFUSED.items():
        if inner in families:
            return f"Models of the family {name} cannot be converted: {reason}."
    alone = ", ".join(n for n, family in LANGUAGE_MODELS.items() if family.model_class)
    return (
        f"Models of the family {name} cannot be converted yet; those that can are {alone}, and "
        f"around one of them {', '.join(VISION_LANGUAGE_MODELS)}."
    )
