"""Tiny random models, and what it takes to feed them: no files, no hub."""

from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

from workbench.models.hybrid import build_hybrid
from workbench.models.plan import Plan
from workbench.models.sources.pocket_model import build_pocket_processor
from workbench.models.teacher import VLM

HOUSE = Path(__file__).resolve().parents[1]
N_LAYERS = 4
IMAGE_SIZE, PATCH_SIZE = 16, 4
SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<image>", "USER:", "ASSISTANT:"]
IMAGE_TOKEN = SPECIAL_TOKENS.index("<image>")
COMMON = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def text_config(family):
    if family == "phi":
        return PhiConfig(**COMMON, partial_rotary_factor=0.5)
    if family == "phi-norms":
        return PhiConfig(**COMMON, partial_rotary_factor=0.5, qk_layernorm=True)
    if family == "llama":
        return LlamaConfig(**COMMON, num_key_value_heads=2)
    return Qwen2Config(**COMMON, num_key_value_heads=2)


def language_model(family, seed=0):
    torch.manual_seed(seed)
    return shaken(AutoModelForCausalLM.from_config(text_config(family)), seed)


def llava(seed=0, **text):
    torch.manual_seed(seed)
    vision = SiglipVisionConfig(
        hidden_size=20,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        vision_use_head=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=PhiConfig(**(COMMON | text), partial_rotary_factor=0.5),
        image_token_id=IMAGE_TOKEN,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    return shaken(LlavaForConditionalGeneration(config), seed)


def tokenizer():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=COMMON["vocab_size"], special_tokens=SPECIAL_TOKENS, initial_alphabet=letters
    )
    bpe.train_from_iterator(["which colour is the tallest bar, and how many are there"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )


def vlm(layers=None, options=None, seed=0):
    """A tiny Llava: a teacher without layers, else its hybrid."""
    model = llava(seed)
    model.generation_config.eos_token_id = COMMON["eos_token_id"]
    plan = None if layers is None else Plan(N_LAYERS, tuple(layers))
    if plan is not None:
        model = build_hybrid(model, plan, options)
    processor = build_pocket_processor(tokenizer(), image_size=IMAGE_SIZE, patch_size=PATCH_SIZE)
    return VLM("tiny", model, processor, plan)


def image(seed=0, size=(IMAGE_SIZE, IMAGE_SIZE)):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def token_ids(batch=2, length=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    low = len(SPECIAL_TOKENS)
    return torch.randint(low, COMMON["vocab_size"], (batch, length), generator=generator)


def shaken(model, seed):
    """Large random weights and biases, so that every path matters and greedy choices are clear."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * noise)
    return model.eval()
