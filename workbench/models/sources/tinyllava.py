"""Read the authors' own checkpoints, as their files are and without a line of their code.

*TinyLLaVA-Phi-2-SigLIP-3.1B* is the teacher of the paper, *MaTVLM_0_25_Mamba2* its published
hybrid. Both become Hugging Face models: a SigLIP tower, a two-layer projector and a Phi decoder,
whose `mamba` layers, if there are any, become mixers under the names of attention. Nothing is
copied on the way: every tensor is a view of its file until it stands in the model.

Sources: TinyLLaVA_Factory (configuration, `phi` prompt, image processing), hustvl/MaTVLM (mixer).
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import GenerationConfig, LlavaProcessor, PhiConfig, PreTrainedModel

from workbench.errors import WorkbenchError
from workbench.models.families import LANGUAGE_MODELS
from workbench.models.hybrid import MIXER_OPTIONS, hybrid_class
from workbench.models.plan import Plan
from workbench.models.sources.problems import read_json, weight_files
from workbench.models.sources.tinyllava_model import (
    TinyLlavaPhiForConditionalGeneration,
    build_processor,
    read_config,
    read_tokenizer,
)

MODEL_TYPE = "tinyllava"  # in the authors' config.json, of teacher and hybrid alike
MAMBA_CONFIG = "mamba_config.json"

# What the authors' modules are called here.
PREFIXES = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower._vision_tower.vision_model.": "model.vision_tower.",
    "connector._connector.0.": "model.multi_modal_projector.linear_1.",
    "connector._connector.2.": "model.multi_modal_projector.linear_2.",
}
# SigLIP's pooling head is in the file, but no token of the picture passes through it.
UNUSED = "vision_tower._vision_tower.vision_model.head."


def load_tinyllava(
    folder: Path, values: Mapping[str, Any], *, dtype: torch.dtype, device_map: Any
) -> tuple[PreTrainedModel, dict[str, Any], LlavaProcessor]:
    """Read one of the authors' folders.

    Args:
        folder: config.json, weights and tokenizer files; a hybrid has mamba_config.json, too.
        values: what config.json says; its model_type is "tinyllava".
        dtype: of the weights; A_log, dt_bias and D of a hybrid stay float32.
        device_map: where the weights go, as transformers takes it; None for the CPU.

    Returns:
        The model, transformers' report on its keys, and the processor.

    Raises:
        WorkbenchError: the folder holds another TinyLLaVA than Phi with SigLIP, its files do not
            agree with each other, or a tensor has no place in the model.
    """
    tokenizer = read_tokenizer(folder, values)
    mixer = _mamba_config(folder)
    model_class = TinyLlavaPhiForConditionalGeneration
    if mixer is not None:
        model_class = hybrid_class(model_class)
    config = read_config(values, tokenizer, model_class.config_class)
    if mixer is not None:
        config.text_config.ssm_hybrid = _ssm_hybrid(mixer, config.text_config)
    model, report = model_class.from_pretrained(
        None,
        config=config,
        state_dict=dict(_tensors(folder, mixer)),
        dtype=dtype,
        device_map=device_map,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # the caller reads the report, and says which and how
    )
    if report["unexpected_keys"]:
        raise _misfit(folder, sorted(report["unexpected_keys"])[0])
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model, report, build_processor(config, tokenizer)


def _ssm_hybrid(mixer: Mapping[str, Any], text: PhiConfig) -> dict[str, Any]:
    """Read plan and mixer options from mamba_config.json, and insist that both configs agree."""
    try:
        ssm, kept = mixer["ssm_cfg"], set(mixer["attn_layers"])
        head = text.hidden_size // text.num_attention_heads
        pairs = {
            "n_layer": (mixer["n_layer"], text.num_hidden_layers),
            "d_model": (mixer["d_model"], text.hidden_size),
            "intermediate_size": (mixer["intermediate_size"], text.intermediate_size),
            "hidden_act": (mixer["hidden_act"], text.hidden_act),
            "d_inner": (mixer["d_inner"], text.hidden_size),
            "d_xb": (mixer["d_xb"], text.num_key_value_heads * head),
            "ngroups": (ssm["ngroups"], text.num_attention_heads),
            "d_state": (ssm["d_state"], head),
        }
    except KeyError as missing:
        raise WorkbenchError(f"{MAMBA_CONFIG} lacks its {missing.args[0]!r}.") from None
    for name, (said, expected) in pairs.items():
        if said != expected:
            raise WorkbenchError(
                f"{MAMBA_CONFIG} is for another model: its {name} is {said}, "
                f"and config.json asks for {expected}."
            )
    if mixer.get("is_bias") or mixer.get("bidirectional"):
        raise WorkbenchError(
            f"{MAMBA_CONFIG} asks for mixers with biases or in two directions, which are not read."
        )
    n_layers = text.num_hidden_layers
    Plan(n_layers, tuple(kept))  # refuses a layer that the model does not have
    layers = tuple(i for i in range(n_layers) if i not in kept)
    plan = Plan(n_layers, layers, "published", "The authors trained these layers.")
    sizes = {"d_conv": ssm.get("d_conv", 4), "chunk_size": ssm.get("chunk_size", 256)}
    return {"plan": plan.to_dict(), "options": MIXER_OPTIONS | sizes}


def _tensors(folder: Path, mixer: Mapping[str, Any] | None) -> Iterator[tuple[str, Tensor]]:
    """Give every tensor under its new name, as a view of the file."""
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                if name.startswith(UNUSED):
                    continue
                new = _renamed(name)
                if new is None:
                    raise _misfit(folder, name)
                if ".mamba." not in new:
                    yield new, opened.get_tensor(name)
                elif mixer is None:
                    raise WorkbenchError(
                        f"The weights in {folder} are those of a hybrid, but {MAMBA_CONFIG}, "
                        "which describes it, is missing."
                    )
                else:
                    yield from _mixer_tensors(new, opened.get_tensor(name), mixer)


def _mixer_tensors(
    name: str, tensor: Tensor, mixer: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """Give a tensor of the authors' mixer as what it is here; `in_proj` becomes five.

    Its rows are [z, x, B, C, dt], and x and B are stored once for heads that share them, as they
    are here: no row moves. `layout.unpack` is for mamba_ssm's own layout, which repeats them.
    """
    names = LANGUAGE_MODELS["phi"].names
    layer, _, part = name.partition(".mamba.")
    if part == "out_proj.weight":
        part = f"{names.out}.weight"
    if part != "in_proj.weight":
        yield f"{layer}.self_attn.{part}", tensor
        return
    inner, shared, n_heads = mixer["d_inner"], mixer["d_xb"], mixer["ssm_cfg"]["ngroups"]
    widths = [inner, shared, shared, inner, n_heads]
    if tensor.shape != (sum(widths), mixer["d_model"]):
        raise WorkbenchError(
            f"The tensor {name!r} has shape {tuple(tensor.shape)}, "
            f"and {MAMBA_CONFIG} asks for {(sum(widths), mixer['d_model'])}."
        )
    parts = ["z_proj.weight", *(f"{n}.weight" for n in (names.x, names.B, names.C)), "dt_weight"]
    for new, rows in zip(parts, tensor.split(widths), strict=True):
        yield f"{layer}.self_attn.{new}", rows


def _renamed(name: str) -> str | None:
    for theirs, ours in PREFIXES.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return None


def _misfit(folder: Path, name: str) -> WorkbenchError:
    return WorkbenchError(
        f"The weights in {folder} hold {name!r}, which has no place in the model."
    )


def _mamba_config(folder: Path) -> dict[str, Any] | None:
    file = folder / MAMBA_CONFIG
    return read_json(file) if file.is_file() else None
