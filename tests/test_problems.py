"""Whatever is wrong with a model is said in one sentence: what it is, and what to do."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, T5Config

from workbench.errors import WorkbenchError
from workbench.models.sources import hub, loading, problems
from workbench.models.teacher import load, load_teacher, save


@pytest.fixture
def folder(tmp_path):
    """A tiny teacher on the disk, to be spoilt."""
    return save(tiny.vlm(), tmp_path / "teacher")


def told(source, words, **options):
    """Load, which must fail; the sentence must hold the words, stand on one line, and end."""
    with pytest.raises(WorkbenchError, match=words) as caught:
        load(source, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert re.match(r"[A-Z'].*[.)\w]$", text), text
    return text


def edited(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def failing(kind, status=None):
    error = kind.__new__(kind)
    error.response = SimpleNamespace(status_code=status)

    def download(*_, **__):
        raise error

    return download


@pytest.mark.parametrize(
    "download, words",
    [
        (
            failing(RepositoryNotFoundError, 401),
            "There is no model 'some/model'.*check the spelling",
        ),
        (failing(HFValidationError), "There is no model 'some/model'"),
        (failing(GatedRepoError, 403), "is gated: accept its licence at huggingface.co/some/model"),
        (failing(HfHubHTTPError, 401), "is gated.*hf auth login"),
        (
            failing(LocalEntryNotFoundError),
            "cannot be reached.*hf download some/model.*pass its path",
        ),
        (failing(ConnectionError), "cannot be reached"),
        (failing(HfHubHTTPError, 500), "cannot be downloaded: HfHubHTTPError"),
        (failing(ArithmeticError), "cannot be downloaded: ArithmeticError"),
    ],
)
def test_what_the_hub_says_is_said_in_a_sentence(monkeypatch, download, words):
    monkeypatch.setattr(hub, "snapshot_download", download)
    told("some/model", words)


def test_without_a_network_the_way_to_bring_the_files_is_named():
    told("some/model", "HF_HUB_OFFLINE is set.*--local-dir FOLDER")


def test_an_id_is_a_folder_once_it_is_downloaded(monkeypatch, folder):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", download)
    vlm = load_teacher("some/model")
    assert vlm.name == "model"
    assert vlm.model.name_or_path == "some/model"
    assert asked["name"] == "some/model"
    assert "*.py" not in asked["allow_patterns"]
    load_teacher("some/model", trust_remote_code=True)
    assert "*.py" in asked["allow_patterns"]


@pytest.mark.parametrize(
    "names, words",
    [
        (["config.json", "pytorch_model.bin"], "pickle files.*only .safetensors files are read"),
        (["config.json", "pytorch_model-00001-of-00002.bin"], "save_pretrained"),
        (["adapter_config.json", "adapter_model.safetensors"], "is an adapter.*merge_and_unload"),
        (["model-Q4_K_M.gguf"], "weights as GGUF.*model that it was made from"),
        (["config.json", "model-Q4_K_M.gguf"], "weights as GGUF"),
        (["config.json", "tokenizer.json"], "holds no weights: no .safetensors file is there"),
        (["config.json", "tf_model.h5"], "pickle files"),
        (["model.safetensors"], "config.json is missing"),
        (["README.md"], "config.json is missing"),
    ],
)
def test_files_of_another_form_are_refused_by_name(monkeypatch, tmp_path, names, words):
    for name in names:
        (tmp_path / name).write_text("{}")
    told(tmp_path, words)
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr(hub.HfApi, "list_repo_files", lambda *_: [*names, "onnx/model.onnx"])
    assert "some/model" in told("some/model", words)


def test_a_file_that_is_cut_short_or_damaged_is_named(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for spoilt in (whole[:-7], whole[:90], whole[:5], b"", b"torn", whole + b"more"):
        file.write_bytes(spoilt)
        told(folder, "model.safetensors is cut short or damaged.*again")
    file.write_bytes(whole[:8] + b"?" + whole[9:])
    told(folder, "model.safetensors is cut short or damaged")
    for nonsense in ("[]", "{torn", '{"model_type": '):
        (folder / "config.json").write_text(nonsense)
        file.write_bytes(whole)
        told(folder, "config.json (is damaged|cannot be read)")


def test_a_shard_that_is_missing_is_named(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = folder / "model.safetensors.index.json"
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": names[0], "b": names[1]}}))
    told(folder, f"its index names {names[1]}, which is not there")
    index.write_text("{}")
    told(folder, "index.json is damaged: it has no weight_map")


def test_a_tensor_of_another_shape_is_named_with_both(folder):
    config = json.loads((folder / "config.json").read_text())
    edited(folder / "config.json", text_config=config["text_config"] | {"intermediate_size": 41})
    told(folder, r"fc1.bias' has shape \(40,\) in the file, and the model needs \(41,\).*others")
    edited(folder / "config.json", text_config=config["text_config"] | {"num_hidden_layers": 6})
    told(folder, r"tensors are missing, 'model.language_model.layers.4")


def test_a_plan_for_another_number_of_layers_is_refused(tmp_path):
    student = save(tiny.vlm((0, 2)), tmp_path)
    text = json.loads((student / "config.json").read_text())["text_config"]
    text["ssm_hybrid"]["plan"]["n_layers"] = 9
    edited(student / "config.json", text_config=text)
    told(student, "The plan in config.json is for a model of 9 layers, but this one has 4")
    del text["ssm_hybrid"]["plan"]["mamba_layers"]
    edited(student / "config.json", text_config=text)
    told(student, "plan lacks its 'mamba_layers'")


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
(Path({marker!r})).touch()
class MineConfig(LlamaConfig):
    model_type = "mine"
class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


def test_code_that_comes_with_a_model_runs_only_if_it_is_trusted(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    marker = tmp_path / "it ran"
    folder = tmp_path / "mine"
    tiny.language_model("llama").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    (folder / "mine.py").write_text(CODE.format(marker=str(marker)))
    auto_map = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"}
    edited(folder / "config.json", model_type="mine", auto_map=auto_map)
    told(folder, "comes with Python code of its own.*trust_remote_code=True")
    assert not marker.exists()
    vlm = load_teacher(folder, trust_remote_code=True)
    assert marker.exists()
    assert type(vlm.model).__name__ == "MineForCausalLM"
    edited(folder / "config.json", model_type="mine", auto_map=None)
    told(folder, "model_type 'mine' .* is unknown to transformers")


def test_models_that_write_no_text_are_refused_by_class(tmp_path):
    bert = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    BertModel(bert).save_pretrained(tmp_path / "bert")
    told(tmp_path / "bert", r"BertModel \(bert\) is not a decoder.*causal language models")
    T5Config(d_model=8, architectures=["T5ForConditionalGeneration"]).save_pretrained(
        tmp_path / "t5"
    )
    (tmp_path / "t5" / "model.safetensors").write_bytes(
        (tmp_path / "bert" / "model.safetensors").read_bytes()
    )
    told(tmp_path / "t5", "T5ForConditionalGeneration .* is not a decoder")
    edited(tmp_path / "bert" / "config.json", model_type="siglip_vision_model", architectures=None)
    told(tmp_path / "bert", "'siglip_vision_model' is not a decoder")
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=300))
    gpt2.save_pretrained(tmp_path / "gpt2")
    tiny.tokenizer().save_pretrained(tmp_path / "gpt2")
    told(tmp_path / "gpt2", "family 'gpt2' cannot be converted: its attention")


def test_what_a_model_needs_is_known_from_its_headers(folder):
    tensors = problems.check_weights(folder)
    model = load(folder).model
    stored = load_file(folder / "model.safetensors")
    assert {n: s for n, (_, s) in tensors.items()} == {n: tuple(t.shape) for n, t in stored.items()}
    full = sum(p.nbytes for p in model.parameters())
    assert problems.bytes_needed(tensors, torch.float32) == full
    assert problems.bytes_needed(tensors, torch.bfloat16) == full // 2
    mixed = {"a": ("I64", (3,)), "b": ("BOOL", (5,)), "c": ("F8_E4M3", (7,)), "d": ("F16", ())}
    assert problems.bytes_needed(mixed, torch.float32) == 24 + 5 + 7 + 4


def test_a_model_that_does_not_fit_is_not_even_read(folder, monkeypatch):
    def never(*_, **__):
        raise AssertionError("it was read")

    monkeypatch.setattr(loading.AutoModelForImageTextToText, "from_pretrained", never)
    monkeypatch.setattr(problems, "free_bytes", lambda device: 99_999)
    monkeypatch.setattr(problems, "GIB", 100_000)
    needed = problems.bytes_needed(problems.check_weights(folder), torch.float32)
    text = told(folder, "pass dtype=torch.bfloat16")
    assert (
        f"The model 'teacher' needs {needed / 1e5:.1f} GiB for its weights in float32 on cpu"
        in text
    )
    assert f"and 1.0 GiB are free: pass dtype=torch.bfloat16 ({needed / 2e5:.1f} GiB)" in text
    assert text.endswith("another device, or device_map='auto'.")
    assert "bfloat16 (" not in told(folder, "in bfloat16 on cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried ..."),
    ],
)
def test_memory_that_runs_out_on_the_way_is_said_the_same(folder, monkeypatch, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(loading.AutoModelForImageTextToText, "from_pretrained", full)
    told(folder, "needs 0.0 GiB .* GiB are free: pass dtype=torch.bfloat16 .*device_map='auto'")


def test_free_memory_is_known_here(tmp_path, monkeypatch):
    assert problems.free_bytes(torch.device("cpu")) > 2**20
    assert problems.free_bytes(torch.device("meta")) is None
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.stat").write_text("file 900\nanon 1200\n")
    monkeypatch.setattr(problems, "CONTROL_GROUP", Path(tmp_path))
    assert problems.free_bytes(torch.device("cpu")) == 3800
    (tmp_path / "memory.max").write_text("max\n")
    assert problems.free_bytes(torch.device("cpu")) > 2**20


def test_device_and_device_map_are_alternatives(folder):
    told(folder, "device or device_map, not both", device="cpu", device_map="auto")
    told("pocket", "'pocket' is small: pass device", device_map="auto")
    told(folder, "cannot be loaded", device_map="abacus")
    plain = load(folder).model.state_dict()
    for device_map in ("auto", {"": "cpu"}):
        mapped = load(folder, device_map=device_map).model.state_dict()
        assert all(torch.equal(plain[name], mapped[name]) for name in plain)


def test_a_folder_without_its_tokenizer_is_refused(folder):
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        (folder / name).unlink()
    told(folder, "cannot be loaded")


def test_a_library_that_a_processor_needs_is_named(folder, monkeypatch):
    def refuse(*args, **options):
        raise ImportError("\nVideoProcessor requires the Torchvision library but it was not found.")

    monkeypatch.setattr("workbench.models.sources.loading.AutoProcessor.from_pretrained", refuse)
    with pytest.raises(WorkbenchError, match="the library Torchvision, .* pip install torchvision"):
        load_teacher(folder)
