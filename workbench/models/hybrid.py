"""From a plan to a model: mixers in place of attention, in an ordinary Hugging Face model.

The text config carries the plan as a plain dict, `ssm_hybrid`. The class of the model is made on
demand: `SSMHybrid<Class>` builds the original, then swaps the layers, so loading, sharding and
devices see the final structure. Its own model_type keeps stock transformers from reading the file
as something else.
"""

import copy
import functools
from collections.abc import Mapping
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.generation.configuration_utils import GenerationMode

from workbench.errors import WorkbenchError
from workbench.mamba.config import Mamba2Config
from workbench.mamba.mixer import Mamba2Mixer
from workbench.models.cache import CACHE, install_slots, real_positions
from workbench.models.families import (
    LANGUAGE_MODELS,
    VISION_LANGUAGE_MODELS,
    check_family,
    decoder_layers,
    read_attention,
    text_config,
)
from workbench.models.plan import Plan

# What a mixer can be built with beside the sizes it takes over, and the paper's choices;
# Mamba2Config says what each means. scale="attention" is the factor of the attention replaced.
MIXER_OPTIONS: dict[str, Any] = {
    "rope": False,
    "bias": False,
    "d_conv": 4,
    "conv_activation": "silu",
    "chunk_size": 64,
    "gate": True,
    "norm": True,
    "norm_group_size": None,
    "scale": None,
}


class SSMAttention(Mamba2Mixer):
    """A mixer that answers to the call a decoder layer makes to its `self_attn`.

    Args:
        attention: the module it replaces, whose projections it takes over.
        config: the text config, with its `ssm_hybrid`.
        layer_idx: which layer of the decoder this is; also the seed of its new parameters.
    """

    def __init__(self, attention: nn.Module, config: PreTrainedConfig, layer_idx: int) -> None:
        taken, hybrid = read_attention(attention, config), config.ssm_hybrid
        modules = {name: getattr(attention, name) for name in taken.names.all()}
        options = MIXER_OPTIONS | hybrid["options"]
        options["rope"] = options["rope"] and taken.rotates
        if options["scale"] == "attention":
            options["scale"] = taken.scale
        mixer_config = Mamba2Config(
            d_model=config.hidden_size,
            n_heads=config.num_attention_heads,
            n_kv_heads=config.num_key_value_heads,
            headdim=taken.headdim,
            d_state=taken.d_state,
            rope_interleaved=taken.rope_interleaved,
            **options,
        )
        super().__init__(mixer_config, modules, taken.names, seed=layer_idx)
        self.layer_idx = layer_idx
        self.n_layers = hybrid["plan"]["n_layers"]
        self.mamba_layers = tuple(hybrid["plan"]["mamba_layers"])
        self.train(attention.training)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Mix (batch, seqlen, d_model); what else decoder layers pass is not needed."""
        slot, cache = None, kwargs.get(CACHE)
        if cache is not None:
            install_slots(cache, self.mamba_layers, self.n_layers)
            slot = cache.layers[self.layer_idx]
        length = hidden_states.shape[1]
        output, state = super().forward(
            hidden_states,
            mask=real_positions(attention_mask, length, slot),
            rotary=position_embeddings,
            state=None if slot is None else slot.read(),
        )
        if slot is not None:
            slot.write(state, length)
        return output, None


class HybridMixin:
    """What every hybrid adds to the class of its teacher."""

    _is_stateful = True  # transformers must not expect that the cache can take tokens back

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        _swap(self)

    def _validate_generation_mode(self, generation_mode: str, *args: Any) -> None:
        if generation_mode == GenerationMode.ASSISTED_GENERATION:
            raise WorkbenchError(
                "Assisted decoding and prompt lookup take tokens back, which the state of a "
                "Mamba-2 layer cannot; generate without them."
            )
        super()._validate_generation_mode(generation_mode, *args)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        cache, plan = model_kwargs.get(CACHE), plan_of(self)
        if cache is not None:
            install_slots(cache, plan.mamba_layers, plan.n_layers)


def build_hybrid(
    model: PreTrainedModel,
    plan: Plan,
    mixer_options: Mapping[str, Any] | None = None,
    *,
    in_place: bool = False,
) -> PreTrainedModel:
    """Build a new model in which the planned layers mix with Mamba-2; the given one is not touched.

    The mixers' own parameters hold the paper's random draw, and wait for steps.initialization.

    Args:
        model: a Hugging Face model of a family in the table.
        plan: which layers change.
        mixer_options: any of MIXER_OPTIONS; the rest keep the paper's choice.
        in_place: turn the given model itself into the hybrid, which saves the memory of a copy.

    Returns:
        A model of class `SSMHybrid<Class>`, on the same device and in the same dtype.

    Raises:
        WorkbenchError: the plan does not fit the model, the model is a hybrid already or of a
            family that is not in the table, or an option does not exist.
    """
    check_plan(model, plan)
    options = MIXER_OPTIONS | dict(mixer_options or {})
    unknown = sorted(set(options) - set(MIXER_OPTIONS))
    if unknown:
        raise WorkbenchError(
            f"There is no mixer option {unknown[0]!r}; there are {', '.join(MIXER_OPTIONS)}."
        )
    student = model if in_place else copy.deepcopy(model)
    text_config(student).ssm_hybrid = {"plan": plan.to_dict(), "options": options}
    _swap(student)
    student.__class__ = hybrid_class(type(student))
    student.config.__class__ = student.config_class
    # A config read from a file carries a copy of the old model_type, which would hide the new one.
    student.config.__dict__.pop("model_type", None)
    return student


def check_plan(model: PreTrainedModel, plan: Plan) -> None:
    """Insist that a plan can be carried out on a model.

    Raises:
        WorkbenchError: it cannot, and why.
    """
    if plan_of(model) is not None:
        raise WorkbenchError("This model is a hybrid already; convert its teacher instead.")
    check_family(model)
    layers = decoder_layers(model)
    if plan.n_layers != len(layers):
        raise WorkbenchError(
            f"The plan is for a model of {plan.n_layers} layers, but this one has {len(layers)}."
        )
    absent = [i for i in plan.mamba_layers if next(layers[i].parameters()).is_meta]
    if absent:
        raise WorkbenchError(
            f"Layer {absent[0]} is not in memory; load the model without offloading first."
        )


def plan_of(model: PreTrainedModel) -> Plan | None:
    """Read the plan that a hybrid was built from; None for any other model."""
    hybrid = getattr(text_config(model), "ssm_hybrid", None)
    return Plan.from_dict(hybrid["plan"]) if hybrid else None


def mixer_options_of(model: PreTrainedModel) -> dict[str, Any]:
    """Read the options that a hybrid's mixers were built with; empty for any other model."""
    hybrid = getattr(text_config(model), "ssm_hybrid", None)
    return dict(hybrid["options"]) if hybrid else {}


def mixers(model: PreTrainedModel) -> dict[int, SSMAttention]:
    """Return the mixers of a hybrid by layer index; empty for any other model."""
    attention = (layer.self_attn for layer in decoder_layers(model))
    return {i: mixer for i, mixer in enumerate(attention) if isinstance(mixer, SSMAttention)}


def _swap(model: PreTrainedModel) -> None:
    config = text_config(model)
    for i in config.ssm_hybrid["plan"]["mamba_layers"]:
        layer = decoder_layers(model)[i]
        layer.self_attn = SSMAttention(layer.self_attn, config, i)


@functools.cache
def hybrid_class(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Make the hybrid of a model class, and of its config class, and let transformers know both."""
    base = model_class.config_class
    config_class = type(
        f"SSMHybrid{base.__name__}",
        (base,),
        {"model_type": f"ssm_hybrid-{base.model_type}", "__module__": __name__},
    )
    hybrid = type(
        f"SSMHybrid{model_class.__name__}",
        (HybridMixin, model_class),
        {"config_class": config_class, "__module__": __name__},
    )
    # pickle looks classes up in the module that they name.
    globals().update({config_class.__name__: config_class, hybrid.__name__: hybrid})
    for new, old in (
        (config_class.model_type, base.model_type),
        (hybrid.__name__, model_class.__name__),
    ):
        # Names in the checkpoints of some families change on the way in; keep that for the hybrid.
        mapping = get_checkpoint_conversion_mapping(old)
        if mapping is not None:
            register_checkpoint_conversion_mapping(new, mapping, overwrite=True)
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if base in auto._model_mapping:
            auto.register(config_class, hybrid, exist_ok=True)
    return hybrid


def _register_families() -> None:
    """Let AutoModel read hybrids of every family in the table, once this module is imported."""
    names = [family.model_class for family in LANGUAGE_MODELS.values() if family.model_class]
    for name in (*names, *VISION_LANGUAGE_MODELS.values()):
        hybrid_class(getattr(transformers, name))


_register_families()
