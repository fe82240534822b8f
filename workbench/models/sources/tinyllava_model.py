"""What the authors' TinyLLaVA is made of: its model class, config, tokenizer, prompt and pictures.

Source: TinyLLaVA_Factory (TinyLlavaConfig, the `phi` prompt, image_preprocess).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PhiConfig,
    PreTrainedTokenizerBase,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from workbench.errors import WorkbenchError
from workbench.models.hybrid import hybrid_class

# The authors splice picture features in at a negative token id; here the placeholder is a real
# token, whose embedding is never read.
IMAGE_TOKEN = "<image>"

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# "{system} USER: <image>\n{question} ASSISTANT: {answer}<|endoftext|>", and so on.
CHAT_TEMPLATE = (
    f"{{{{ {json.dumps(SYSTEM + ' ')} }}}}"
    "{% for message in messages %}"
    "{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] | trim }}"
    "{% endfor %}{% endif %}"
    "{{ ' ' if message['role'] == 'user' else '<|endoftext|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


class TinyLlavaPhiConfig(LlavaConfig):
    """A Llava config under a name of its own, so that no other class reads these models."""

    model_type = "tinyllava_phi"
    workbench_family = "llava"  # the row in the table of families


class TinyLlavaPhiForConditionalGeneration(LlavaForConditionalGeneration):
    """Llava whose output layer has a bias, as Phi's has and Llava's has not."""

    config_class = TinyLlavaPhiConfig

    def __init__(self, config: TinyLlavaPhiConfig) -> None:
        super().__init__(config)
        self.lm_head.bias = nn.Parameter(self.lm_head.weight.new_zeros(self.lm_head.out_features))


def read_config(
    values: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    config_class: type[TinyLlavaPhiConfig],
) -> TinyLlavaPhiConfig:
    """Translate the authors' config; what theirs leaves out has the default of its class."""
    text, vision = dict(values.get("text_config") or {}), dict(values.get("vision_config") or {})
    _insist("language model", text.pop("model_type", None), "phi")
    _insist("vision tower", vision.pop("model_type", None), "siglip_vision_model")
    _insist("connector", values.get("connector_type"), "mlp2x_gelu")
    _insist("image_aspect_ratio", values.get("image_aspect_ratio", "square"), "square")
    strategies = {"patch": "default", "cls_patch": "full"}
    strategy = values.get("vision_feature_select_strategy", "patch")
    _insist("vision_feature_select_strategy", strategy, *strategies)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = PhiConfig.from_dict(text | ids | {"tie_word_embeddings": False})
    vision = SiglipVisionConfig.from_dict(vision | {"vision_use_head": False})
    image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if image_token >= text.vocab_size:
        raise WorkbenchError(
            f"The tokenizer fills all {text.vocab_size} rows of the embedding: "
            f"there is none left for {IMAGE_TOKEN!r}."
        )
    n_patches = (vision.image_size // vision.patch_size) ** 2
    return config_class(
        text_config=text,
        vision_config=vision,
        image_token_id=image_token,
        vision_feature_layer=values.get("vision_feature_layer", -2),
        # "default" drops the first token: CLS in CLIP, a patch in SigLIP, here as in their code.
        vision_feature_select_strategy=strategies[strategy],
        image_seq_length=n_patches - (strategy == "patch"),
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
        **ids,
    )


def read_tokenizer(folder: Path, values: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """Read vocab.json and merges.txt, and add the placeholder as the first id that is free."""
    tokenizer = AutoTokenizer.from_pretrained(
        folder,
        config=PhiConfig(),  # theirs has a model_type that transformers does not know
        local_files_only=True,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        clean_up_tokenization_spaces=False,  # theirs says True, which transformers ignores aloud
    )
    tokenizer.padding_side = values.get("tokenizer_padding_side", "right")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def build_processor(config: LlavaConfig, tokenizer: PreTrainedTokenizerBase) -> LlavaProcessor:
    """Join the tokenizer with SigLIP's own processing: a plain resize, and values from -1 to 1."""
    side, half = config.vision_config.image_size, [0.5, 0.5, 0.5]
    return LlavaProcessor(
        image_processor=SiglipImageProcessorPil(
            size={"height": side, "width": side},
            image_mean=half,
            image_std=half,
            do_convert_rgb=True,
        ),
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=CHAT_TEMPLATE,
    )


def _insist(what: str, found: Any, *supported: str) -> None:
    if found not in supported:
        raise WorkbenchError(
            f"This TinyLLaVA has {found!r} as its {what}; of the authors' checkpoints, those with "
            f"{' or '.join(map(repr, supported))} are read."
        )


def _register() -> None:
    """Let transformers read these models again, and their hybrids, once they have been saved."""
    ours = TinyLlavaPhiConfig.model_type
    mapping = get_checkpoint_conversion_mapping(LlavaConfig.model_type)
    if mapping is not None:
        register_checkpoint_conversion_mapping(ours, mapping, overwrite=True)
    AutoConfig.register(ours, TinyLlavaPhiConfig, exist_ok=True)
    AutoModelForImageTextToText.register(
        TinyLlavaPhiConfig, TinyLlavaPhiForConditionalGeneration, exist_ok=True
    )
    hybrid_class(TinyLlavaPhiForConditionalGeneration)


_register()
