"""The authors' checkpoints in miniature: their files, names and shapes, with small random numbers.

`reference_logits` is what their code computes, written down from its description: it shares nothing
with the workbench, and of transformers it uses the SigLIP tower only.
"""

import json
import math

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import SiglipVisionConfig, SiglipVisionModel

N_LAYERS, D_MODEL, N_HEADS, FFN, VOCAB = 5, 24, 3, 40, 280
HEAD = D_MODEL // N_HEADS
MAMBA_LAYERS = (0, 3)
VISION = {
    "hidden_size": 20,
    "image_size": 12,
    "intermediate_size": 28,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "patch_size": 4,
}
N_PATCHES = 9
MERGES = ["Ġ t", "h e", "Ġt he", "i n", "Ġ a"]
SPACES = ["   ", "    "]  # Phi-2 adds runs of spaces to the vocabulary of GPT-2
END = 256 + len(MERGES)  # "<|endoftext|>"
IMAGE = END + 1 + len(SPACES)  # the first free id


def config(**changes):
    """config.json, with what transformers 4.39 leaves out left out."""
    return {
        "architectures": ["TinyLlavaForConditionalGeneration"],
        "auto_map": {
            "AutoConfig": "configuration.TinyLlavaConfig",
            "AutoModelForCausalLM": "modeling_tinyllava_phi.TinyLlavaForConditionalGeneration",
        },
        "cache_dir": None,
        "connector_type": "mlp2x_gelu",
        "hidden_size": D_MODEL,
        "ignore_index": -100,
        "image_aspect_ratio": "square",
        "image_token_index": -200,
        "llm_model_name_or_path": "microsoft/phi-2",
        "model_type": "tinyllava",
        "num_queries": 128,
        "pad_token": "<|endoftext|>",
        "pad_token_id": 50256,
        "text_config": {
            "_name_or_path": "microsoft/phi-2",
            "architectures": ["PhiForCausalLM"],
            "bos_token_id": 50256,
            "embd_pdrop": 0.0,
            "eos_token_id": 50256,
            "hidden_size": D_MODEL,
            "intermediate_size": FFN,
            "max_position_embeddings": 400,
            "model_type": "phi",
            "num_attention_heads": N_HEADS,
            "num_hidden_layers": N_LAYERS,
            "num_key_value_heads": N_HEADS,
            "partial_rotary_factor": 0.5,
            "resid_pdrop": 0.1,
            "torch_dtype": "float16",
            "vocab_size": VOCAB,
        },
        "tokenizer_model_max_length": 3072,
        "tokenizer_padding_side": "right",
        "tokenizer_use_fast": False,
        "torch_dtype": "float16",
        "transformers_version": "4.39.3",
        "use_cache": False,
        "vision_config": {
            "model_name_or_path": "google/siglip-so400m-patch14-384",
            "model_name_or_path2": "",
            "model_type": "siglip_vision_model",
            **VISION,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "patch",
        "vision_hidden_size": VISION["hidden_size"],
        "vision_model_name_or_path": "google/siglip-so400m-patch14-384",
        "vision_model_name_or_path2": "",
        "vocab_size": VOCAB,
    } | changes


def mamba_config():
    return {
        "d_model": D_MODEL,
        "ssm_cfg": {"expand": 1, "ngroups": N_HEADS, "d_state": HEAD},
        "layer_norm_eps": 1e-05,
        "vocab_size": None,
        "d_inner": D_MODEL,
        "d_xb": D_MODEL,
        "intermediate_size": FFN,
        "hidden_act": "gelu_new",
        "n_layer": N_LAYERS,
        "attn_layers": [i for i in range(N_LAYERS) if i not in MAMBA_LAYERS],
        "resid_pdrop": 0.1,
        "bidirectional": False,
        "is_bias": False,
    }


def write_tokenizer(folder):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(merge.replace(" ", "") for merge in MERGES)]
    vocab = {word: i for i, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocab | {"<|endoftext|>": END}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    (folder / "added_tokens.json").write_text(
        json.dumps({word: END + 1 + i for i, word in enumerate(SPACES)})
    )
    end = {
        "content": "<|endoftext|>",
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
    }
    added = {str(END): end | {"special": True}}
    for i, word in enumerate(SPACES):
        spaces = {"content": word, "normalized": True, "special": False}
        added[str(END + 1 + i)] = end | spaces
    roles = ("bos_token", "eos_token", "pad_token", "unk_token")
    (folder / "special_tokens_map.json").write_text(json.dumps(dict.fromkeys(roles, end)))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "add_prefix_space": False,
                "added_tokens_decoder": added,
                "clean_up_tokenization_spaces": True,
                "errors": "replace",
                "model_max_length": 3072,
                "padding_side": "right",
                "return_token_type_ids": False,
                "tokenizer_class": "CodeGenTokenizer",
                **dict.fromkeys(roles, "<|endoftext|>"),
            }
        )
    )


def shapes(mamba_layers=()):
    """Every key of the authors' files with its shape."""

    def affine(name, out, *into):
        return {f"{name}.weight": (out, *into), f"{name}.bias": (out,)}

    width, ffn = VISION["hidden_size"], VISION["intermediate_size"]
    tower = "vision_tower._vision_tower.vision_model"
    found = {
        "language_model.model.embed_tokens.weight": (VOCAB, D_MODEL),
        **affine("language_model.model.final_layernorm", D_MODEL),
        **affine("language_model.lm_head", VOCAB, D_MODEL),
        **affine("connector._connector.0", D_MODEL, width),
        **affine("connector._connector.2", D_MODEL, D_MODEL),
        **affine(f"{tower}.embeddings.patch_embedding", width, 3, 4, 4),
        f"{tower}.embeddings.position_embedding.weight": (N_PATCHES, width),
        **affine(f"{tower}.post_layernorm", width),
        f"{tower}.head.probe": (1, 1, width),
        f"{tower}.head.attention.in_proj_weight": (3 * width, width),
        f"{tower}.head.attention.in_proj_bias": (3 * width,),
        **affine(f"{tower}.head.attention.out_proj", width, width),
        **affine(f"{tower}.head.layernorm", width),
        **affine(f"{tower}.head.mlp.fc1", ffn, width),
        **affine(f"{tower}.head.mlp.fc2", width, ffn),
    }
    for i in range(VISION["num_hidden_layers"]):
        layer = f"{tower}.encoder.layers.{i}"
        found |= affine(f"{layer}.layer_norm1", width) | affine(f"{layer}.layer_norm2", width)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found |= affine(f"{layer}.self_attn.{part}", width, width)
        found |= affine(f"{layer}.mlp.fc1", ffn, width) | affine(f"{layer}.mlp.fc2", width, ffn)
    for i in range(N_LAYERS):
        layer = f"language_model.model.layers.{i}"
        found |= affine(f"{layer}.input_layernorm", D_MODEL)
        found |= affine(f"{layer}.mlp.fc1", FFN, D_MODEL) | affine(f"{layer}.mlp.fc2", D_MODEL, FFN)
        if i not in mamba_layers:
            for part in ("q_proj", "k_proj", "v_proj", "dense"):
                found |= affine(f"{layer}.self_attn.{part}", D_MODEL, D_MODEL)
            continue
        found |= {
            f"{layer}.mamba.A_log": (N_HEADS,),
            f"{layer}.mamba.D": (N_HEADS,),
            f"{layer}.mamba.dt_bias": (N_HEADS,),
            f"{layer}.mamba.in_proj.weight": (4 * D_MODEL + N_HEADS, D_MODEL),
            f"{layer}.mamba.conv1d.weight": (3 * D_MODEL, 1, 4),
            f"{layer}.mamba.conv1d.bias": (3 * D_MODEL,),
            f"{layer}.mamba.norm.weight": (D_MODEL,),
            f"{layer}.mamba.out_proj.weight": (D_MODEL, D_MODEL),
        }
    return found


def write(folder, mamba_layers=(), n_files=2):
    """Write a checkpoint as the authors publish theirs; return its tensors."""
    generator = torch.Generator().manual_seed(7)
    dtype = torch.bfloat16 if mamba_layers else torch.float16
    tensors = {}
    for name, shape in shapes(mamba_layers).items():
        values = torch.randn(shape, generator=generator) * 0.3
        if "norm" in name and name.endswith("weight"):
            values += 1
        tensors[name] = values.to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config()))
    (folder / "generation_config.json").write_text(
        json.dumps({"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2})
    )
    write_tokenizer(folder)
    if mamba_layers:
        (folder / "mamba_config.json").write_text(json.dumps(mamba_config(), indent=4))
    names, weight_map = sorted(tensors), {}
    for n in range(n_files):
        file = f"model-{n + 1:05d}-of-{n_files:05d}.safetensors"
        part = {name: tensors[name] for name in names[n::n_files]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return tensors


def read(folder):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= {name: tensor.float() for name, tensor in load_file(file).items()}
    return tensors


def reference_logits(folder, pixels, before, after):
    """Logits of [before, picture, after]: token ids on both sides of the picture's features."""
    w = read(folder)
    rows = w["language_model.model.embed_tokens.weight"]
    x = torch.cat([rows[before], picture_features(w, pixels), rows[after]])[None]
    for i in range(N_LAYERS):
        layer = f"language_model.model.layers.{i}."
        h = norm(w, layer + "input_layernorm", x)
        is_mamba = layer + "mamba.A_log" in w
        mixed = mamba(w, layer + "mamba.", h) if is_mamba else attention(w, layer, h)
        inner = F.gelu(linear(w, layer + "mlp.fc1", h), approximate="tanh")
        x = x + mixed + linear(w, layer + "mlp.fc2", inner)
    return linear(w, "language_model.lm_head", norm(w, "language_model.model.final_layernorm", x))


def picture_features(w, pixels):
    """SigLIP's last hidden state but one, without its first patch, through the connector."""
    tower = SiglipVisionModel(SiglipVisionConfig(**VISION, vision_use_head=False)).eval()
    prefix = "vision_tower._vision_tower.vision_model."
    stored = {n.removeprefix(prefix): t for n, t in w.items() if n.startswith(prefix)}
    names = {n: n.removeprefix("vision_model.") for n in tower.state_dict()}
    tower.load_state_dict({n: stored[short] for n, short in names.items()})
    states = tower(pixels, output_hidden_states=True).hidden_states
    assert len(states) == VISION["num_hidden_layers"] + 1
    patches = states[-2][0, 1:]
    return linear(w, "connector._connector.2", F.gelu(linear(w, "connector._connector.0", patches)))


def attention(w, layer, h):
    q, k, v = (
        linear(w, f"{layer}self_attn.{n}_proj", h).unflatten(-1, (N_HEADS, HEAD)).transpose(1, 2)
        for n in "qkv"
    )
    q, k = rotated(q), rotated(k)
    scores = q @ k.transpose(-1, -2) / math.sqrt(HEAD)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    y = scores.masked_fill(future, -math.inf).softmax(-1) @ v
    return linear(w, layer + "self_attn.dense", y.transpose(1, 2).flatten(2))


def rotated(t):
    """Turn the first half of each head's channels: partial_rotary_factor 0.5, theta 10,000."""
    width = HEAD // 2
    speeds = 10_000 ** (-torch.arange(0, width, 2) / width)
    angles = torch.arange(t.shape[-2])[:, None] * speeds
    cos, sin = angles.cos(), angles.sin()
    a, b, rest = t.split([width // 2, width // 2, HEAD - width], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def mamba(w, prefix, h):
    """One step after the other: rows [z, x, B, C, dt], conv and SiLU, recurrence, gated norm."""
    rows = (h @ w[prefix + "in_proj.weight"].T).split([D_MODEL] * 4 + [N_HEADS], dim=-1)
    z, dt = rows[0], F.softplus(rows[4] + w[prefix + "dt_bias"])
    kernel, bias = w[prefix + "conv1d.weight"][:, 0], w[prefix + "conv1d.bias"]
    xBC = F.pad(torch.cat(rows[1:4], dim=-1), (0, 0, 3, 0))
    length = h.shape[1]
    xBC = F.silu(sum(xBC[:, k : k + length] * kernel[:, k] for k in range(4)) + bias)
    x, B, C = (t.unflatten(-1, (N_HEADS, HEAD)) for t in xBC.split(D_MODEL, dim=-1))
    A, state, ys = -w[prefix + "A_log"].exp(), torch.zeros(len(h), N_HEADS, HEAD, HEAD), []
    for t in range(length):
        decay = (dt[:, t] * A).exp()[..., None, None]
        state = decay * state + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
        ys.append(
            torch.einsum("bhpn,bhn->bhp", state, C[:, t]) + w[prefix + "D"][:, None] * x[:, t]
        )
    y = torch.stack(ys, dim=1) * F.silu(z).unflatten(-1, (N_HEADS, HEAD))
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)
    return (y.flatten(2) * w[prefix + "norm.weight"]) @ w[prefix + "out_proj.weight"].T


def linear(w, name, x):
    return F.linear(x, w[name + ".weight"], w[name + ".bias"])


def norm(w, name, x):
    return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], eps=1e-5)
