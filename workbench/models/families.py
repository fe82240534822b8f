"""The one table of where a model family keeps its decoder layers and their projections.

Every other file speaks of C, B, x and out; Hugging Face attribute paths stand here only. Each
family listed calls a layer's attention `self_attn`, by keyword, and unpacks two values.
"""

from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from workbench.errors import WorkbenchError
from workbench.mamba.config import ProjectionNames


@dataclass(frozen=True)
class Family:
    """One row: the class that transformers builds, and what its attention calls its modules."""

    model_class: str
    names: ProjectionNames = ProjectionNames()


# By model_type of the text config. A family of language models is one row here.
LANGUAGE_MODELS = {
    "llama": Family("LlamaForCausalLM"),
    "phi": Family(
        "PhiForCausalLM",
        ProjectionNames(out="dense", C_norm="q_layernorm", B_norm="k_layernorm"),
    ),
    "qwen2": Family("Qwen2ForCausalLM"),
}

# By model_type of the whole config: vision-language models around one of the language models above.
VISION_LANGUAGE_MODELS = {
    "llava": "LlavaForConditionalGeneration",
}


def text_config(model: PreTrainedModel | PreTrainedConfig) -> PreTrainedConfig:
    """Return the config of the language model, which for a language model is the config itself."""
    config = model.config if isinstance(model, PreTrainedModel) else model
    return config.get_text_config(decoder=True)


def family_name(model: PreTrainedModel) -> str:
    """Name the model's family as people say it: "llava (phi)", or "phi" for a language model."""
    outer = type(model.config).model_type.removeprefix("ssm_hybrid-")
    inner = text_config(model).model_type.removeprefix("ssm_hybrid-")
    return outer if outer == inner else f"{outer} ({inner})"


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the layers of the language model, the bottom one first."""
    return model.get_decoder().layers


def projection_names(model_type: str, attention: nn.Module) -> ProjectionNames:
    """Look up what one attention module calls its projections and norms.

    Args:
        model_type: of the text config.
        attention: a layer's `self_attn`; norms that it does not have are left out.

    Raises:
        WorkbenchError: the family is not in the table, or the module lacks a projection.
    """
    family = LANGUAGE_MODELS.get(model_type.removeprefix("ssm_hybrid-"))
    if family is None:
        raise WorkbenchError(
            f"Models of the family {model_type!r} cannot be converted yet; "
            f"those that can are {', '.join(LANGUAGE_MODELS)}, alone or inside "
            f"{', '.join(VISION_LANGUAGE_MODELS)}."
        )
    absent = {
        role: None
        for role in ("C_norm", "B_norm")
        if not hasattr(attention, getattr(family.names, role) or "")
    }
    names = replace(family.names, **absent)
    missing = [name for name in names.all() if not hasattr(attention, name)]
    if missing:
        raise WorkbenchError(
            f"The attention of this {model_type} has no {' and no '.join(missing)}: "
            "it is not built as the table of families says."
        )
    return names
