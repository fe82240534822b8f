"""One row for each family: its smallest random model, and what it is fed.

All sizes differ from each other, so that no two axes can be mixed up unnoticed: 2 questions, 3 key
and value heads for 6 heads of 10 channels (8 where a family derives it), 4 layers, width 48.
"""

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from tiny import COMMON, shaken
from transformers import CONFIG_MAPPING

from workbench.models.families import LANGUAGE_MODELS, VISION_LANGUAGE_MODELS
from workbench.models.hybrid import build_hybrid
from workbench.models.plan import Plan

N_LAYERS, PAD, IMAGE, VISION_START, VISION_END = 4, 0, 3, 4, 5
N_SPECIAL = 6  # token ids below are not words
WORDS = (5, 8)  # of two questions of different length
SIZES = COMMON | {"num_attention_heads": 6, "num_key_value_heads": 3}
WIDE = {"head_dim": 10}
BIASED = {"attention_bias": True}
TIED = {"tie_word_embeddings": True}
SLIDING = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"] * 2}
GEMMA = WIDE | SLIDING | {"query_pre_attn_scalar": 19}

# What a language model's config says beside SIZES.
LANGUAGE = {
    "cohere2": WIDE | SLIDING | BIASED,
    "gemma": WIDE | BIASED | TIED,
    "gemma2": GEMMA | BIASED | TIED,
    "gemma3_text": GEMMA,
    "granite": BIASED | {"attention_multiplier": 0.2},
    "llama": WIDE | BIASED,
    "mistral": WIDE | {"sliding_window": 7},
    "olmo2": BIASED,
    "phi": {"partial_rotary_factor": 0.5, "qk_layernorm": True},
    "phi3": {"partial_rotary_factor": 0.5, "sliding_window": 7},
    "qwen2": SLIDING | {"use_sliding_window": True},
    "qwen3": WIDE | BIASED,
    "smollm3": BIASED | {"no_rope_layers": [1, 0, 1, 1]},
    "starcoder2": {},
}


@dataclass(frozen=True)
class Pictured:
    """How a vision-language model is built, and what one picture is to it."""

    text: dict[str, Any]  # of the text config, beside SIZES
    vision: dict[str, Any]  # of the vision config, beside TOWER
    config: dict[str, Any]  # of the whole, beside OUTER
    n_tokens: int  # that a picture takes
    pixels: tuple[int, ...]  # shape of a picture as the processor would give it
    beside: dict[str, list[int]] = field(default_factory=dict)  # one row for each picture


TOWER = {
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}  # 2 x 2 patches
OUTER = {"image_token_id": IMAGE, "image_token_index": IMAGE, "tie_word_embeddings": False}
SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False}
QWEN = {"depth": 1, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
QWEN_OUTER = {"vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
QWEN_PIXELS = (4 * 6, 3 * 2 * 4 * 4)  # 4 x 6 patches of 2 frames, merged to 2 x 3 tokens
QWEN_GRID = {"image_grid_thw": [1, 4, 6]}


def mrope(*sections: int) -> dict[str, Any]:
    parameters = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections)}
    return {"rope_parameters": parameters}


VISION_LANGUAGE = {
    "gemma3": Pictured(
        GEMMA | {"model_type": "gemma3_text"},
        SIGLIP,
        {"mm_tokens_per_image": 4},
        4,
        (3, 8, 8),
    ),
    "idefics3": Pictured(
        {"model_type": "llama"} | BIASED,
        {"image_size": 16},
        {"scale_factor": 2},
        4,
        (1, 3, 16, 16),
    ),
    "internvl": Pictured(
        {"model_type": "qwen2"},
        {"image_size": [8, 8], "patch_size": [2, 2]},
        {"downsample_ratio": 0.5, "vision_feature_select_strategy": "default"},
        4,
        (3, 8, 8),
    ),
    "llava": Pictured(
        {"model_type": "llama"} | BIASED,
        SIGLIP,
        {"vision_feature_select_strategy": "full", "vision_feature_layer": -1},
        4,
        (3, 8, 8),
    ),
    "llava_onevision": Pictured(
        {"model_type": "qwen2"},
        SIGLIP,
        {"image_grid_pinpoints": [[8, 8]], "vision_feature_select_strategy": "full"},
        4 + 2 * 3,  # the whole, then rows that end in a newline token
        (2, 3, 8, 8),
        {"image_sizes": [8, 8]},
    ),
    "paligemma": Pictured(
        WIDE | {"model_type": "gemma"}, SIGLIP, {"projection_dim": 48}, 4, (3, 8, 8)
    ),
    "qwen2_5_vl": Pictured(
        mrope(1, 1, 2),
        QWEN | {"out_hidden_size": 48, "window_size": 16, "fullatt_block_indexes": [0]},
        QWEN_OUTER,
        6,
        QWEN_PIXELS,
        QWEN_GRID,
    ),
    "qwen2_vl": Pictured(
        mrope(1, 1, 2), QWEN | {"embed_dim": 24, "hidden_size": 48}, QWEN_OUTER, 6, QWEN_PIXELS,
        QWEN_GRID,
    ),
    "qwen3_vl": Pictured(
        WIDE | BIASED | mrope(1, 2, 2),
        QWEN
        | {"out_hidden_size": 48, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        QWEN_OUTER,
        6,
        QWEN_PIXELS,
        QWEN_GRID,
    ),
    "smolvlm": Pictured(
        {"model_type": "llama"} | BIASED,
        {"image_size": 16},
        {"scale_factor": 2},
        4,
        (1, 3, 16, 16),
    ),
}  # fmt: skip
FAMILIES = (*LANGUAGE, *VISION_LANGUAGE)


@functools.cache
def teacher(family: str) -> transformers.PreTrainedModel:
    """Build the family's tiny model; every test gets the same one, so it must not change it."""
    torch.manual_seed(0)
    if family in LANGUAGE:
        config = CONFIG_MAPPING[family](**SIZES | LANGUAGE[family])
        model_class = LANGUAGE_MODELS[family].model_class
    else:
        row = VISION_LANGUAGE[family]
        config = CONFIG_MAPPING[family](
            text_config=SIZES | row.text, vision_config=TOWER | row.vision, **OUTER, **row.config
        )
        model_class = VISION_LANGUAGE_MODELS[family]
    return shaken(getattr(transformers, model_class)(config), 0)


def student(family: str, layers: tuple[int, ...], **options: Any) -> transformers.PreTrainedModel:
    """Convert the family's tiny model."""
    return build_hybrid(teacher(family), Plan(N_LAYERS, layers), options)


def questions(family: str, rows: tuple[int, ...] = (0, 1), filler: int = PAD) -> dict[str, Any]:
    """Make what `generate` and `forward` take for these of two questions, padded on the left.

    Vision-language models get a picture in each question. `filler` stands where padding is.
    """
    row = VISION_LANGUAGE.get(family)
    picture = [VISION_START, *[IMAGE] * row.n_tokens, VISION_END] if row else []
    length = max(WORDS[i] for i in rows) + len(picture) + 1
    ids = torch.full((len(rows), length), filler)
    mask = torch.zeros_like(ids)
    for place, i in enumerate(rows):
        words = torch.randint(N_SPECIAL, SIZES["vocab_size"], (WORDS[i] + 1,), generator=_seed(i))
        question = [int(words[0]), *picture, *words[1:].tolist()]
        ids[place, -len(question) :] = torch.tensor(question)
        mask[place, -len(question) :] = 1
    fed = {"input_ids": ids, "attention_mask": mask}
    if row:
        pixels = torch.stack([torch.randn(row.pixels, generator=_seed(i)) for i in rows])
        flat = family.startswith("qwen")
        fed["pixel_values"] = pixels.flatten(0, 1) if flat else pixels
        fed |= {key: torch.tensor([value] * len(rows)) for key, value in row.beside.items()}
        is_picture = (ids == IMAGE).long()
        if flat:
            fed["mm_token_type_ids"] = is_picture
        if family == "gemma3":
            fed["token_type_ids"] = is_picture
        if family == "paligemma":  # 0 in the prefix, whose tokens all see each other
            fed["token_type_ids"] = torch.zeros_like(ids)
    return fed


def longer(fed: dict[str, Any], ids: torch.Tensor) -> dict[str, Any]:
    """Put ids, which begin with those fed, in their place; what follows is text."""
    n_new = ids.shape[1] - fed["input_ids"].shape[1]
    grown = {"input_ids": ids}
    for key, value in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
        if key in fed:
            grown[key] = torch.nn.functional.pad(fed[key], (0, n_new), value=value)
    if "token_type_ids" in fed and not fed["token_type_ids"].any():  # PaliGemma's suffix
        grown["token_type_ids"][:, -n_new:] = 1
    return fed | grown


def _seed(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
