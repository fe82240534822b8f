"""Models of real size with random weights: speed does not ask what a weight says."""

import gc
from functools import lru_cache

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

from workbench.models.hybrid import MIXER_OPTIONS, build_hybrid, hybrid_class
from workbench.models.plan import Plan
from workbench.models.teacher import VLM
from workbench.steps.conversion.selection import choose_layers, even_layers
from workbench.steps.efficiency.bounds import Sizes, sizes

PHI_2 = {
    "vocab_size": 51200, "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 2048, "partial_rotary_factor": 0.4,
}  # fmt: skip
SMOLLM2_135M = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}  # fmt: skip
TINY = {
    "vocab_size": 500, "hidden_size": 320, "intermediate_size": 640, "num_hidden_layers": 4,
    "num_attention_heads": 4, "max_position_embeddings": 1024, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def phi(sizes: dict, device: str, dtype: torch.dtype, name: str) -> VLM:
    """Build a Phi of these sizes."""
    return _built(PhiForCausalLM, PhiConfig(**sizes), device, dtype, name)


def llama(sizes: dict, device: str, dtype: torch.dtype, name: str) -> VLM:
    """Build a Llama of these sizes."""
    return _built(LlamaForCausalLM, LlamaConfig(**sizes), device, dtype, name)


def hybrid(teacher: VLM, ratio: float, **options) -> VLM:
    """Convert a teacher; its name says how much of it."""
    if not ratio:
        return teacher
    plan = choose_layers(teacher, ratio=ratio)
    model = build_hybrid(teacher.model, plan, options).eval()
    return VLM(f"{teacher.name} {ratio:.1%}", model, None, plan)


@lru_cache
def phi_2_sizes(ratio: float) -> Sizes:
    """Sizes of a hybrid of Phi-2, bf16, whose weights are nowhere."""
    n_layers = PHI_2["num_hidden_layers"]
    plan = Plan(n_layers, even_layers(n_layers, round(ratio * n_layers)), "even", "for its size")
    described = {"plan": plan.to_dict(), "options": dict(MIXER_OPTIONS)}
    config = PhiConfig(**PHI_2, ssm_hybrid=described)
    return sizes(_built(hybrid_class(PhiForCausalLM), config, "meta", torch.bfloat16, "phi-2"))


def free() -> None:
    """Give memory back that nothing holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _built(model_class, config, device, dtype, name) -> VLM:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = model_class(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None
    return VLM(name, model, None)
