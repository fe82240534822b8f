import json

import miniature
import pytest
import tiny
import torch
from transformers import AutoModelForImageTextToText

from workbench.data.samples import Sample
from workbench.errors import WorkbenchError
from workbench.mamba.layout import pack
from workbench.models.generation import answer, answer_batch
from workbench.models.hybrid import mixers, plan_of
from workbench.models.plan import Plan
from workbench.models.prompts import build_prompt, prepare_inputs
from workbench.models.sources import tinyllava_model
from workbench.models.sources.tinyllava_model import SYSTEM
from workbench.models.teacher import load, load_teacher, save
from workbench.steps.conversion.initialization import convert

QUESTION = "What is in the picture?"
N_TOKENS = miniature.N_PATCHES - 1


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    where = tmp_path_factory.mktemp("authors")
    miniature.write(where / "teacher")
    miniature.write(where / "hybrid", miniature.MAMBA_LAYERS)
    return where


def asked(vlm, size=(31, 17)):
    return prepare_inputs(vlm, [[tiny.image(3, size)]], [QUESTION], 1)


def reference(folder, inputs):
    ids = inputs["input_ids"][0].tolist()
    first = ids.index(miniature.IMAGE)
    before, after = ids[:first], ids[first + N_TOKENS :]
    assert ids == [*before, *[miniature.IMAGE] * N_TOKENS, *after]
    return miniature.reference_logits(folder, inputs["pixel_values"], before, after)


@pytest.mark.parametrize("kind", ["teacher", "hybrid"])
def test_the_authors_checkpoint_computes_what_their_code_does(folders, kind):
    vlm = load(folders / kind)
    inputs = asked(vlm)
    logits = vlm.model(**inputs).logits
    torch.testing.assert_close(logits, reference(folders / kind, inputs), atol=1e-4, rtol=1e-4)
    assert logits.std() > 0.3, "numbers too small to tell right from wrong"


def test_the_plan_and_the_options_of_the_hybrid_are_those_of_its_files(folders):
    vlm = load(folders / "hybrid")
    assert vlm.plan.mamba_layers == miniature.MAMBA_LAYERS
    assert vlm.plan.n_layers == miniature.N_LAYERS
    config = mixers(vlm.model)[0].config
    assert (config.chunk_size, config.d_conv, config.bias, config.rope) == (256, 4, False, False)
    assert load_teacher(folders / "teacher").plan is None
    with pytest.raises(WorkbenchError, match="is a hybrid, not a teacher"):
        load_teacher(folders / "hybrid")
    with pytest.raises(WorkbenchError, match="hybrid already"):
        convert(vlm, Plan(miniature.N_LAYERS, (1,)))


@pytest.mark.parametrize("kind", ["teacher", "hybrid"])
def test_every_tensor_of_the_file_has_its_place(folders, kind):
    stored, vlm = miniature.read(folders / kind), load(folders / kind)
    used = {n: t for n, t in stored.items() if ".vision_model.head." not in n}
    n_stored = sum(t.numel() for t in used.values())
    assert n_stored == sum(p.numel() for p in vlm.model.parameters())
    for i, mixer in mixers(vlm.model).items():
        prefix = f"language_model.model.layers.{i}.mamba."
        packed = pack(mixer)
        theirs = {n.removeprefix(prefix): t for n, t in stored.items() if n.startswith(prefix)}
        assert packed.keys() == theirs.keys()
        for name, tensor in packed.items():
            assert torch.equal(tensor, theirs[name]), name
    assert bool(mixers(vlm.model)) == (kind == "hybrid")


def test_the_tuned_output_layer_is_used_with_its_bias(folders):
    stored, vlm = miniature.read(folders / "teacher"), load(folders / "teacher")
    assert torch.equal(vlm.model.lm_head.weight, stored["language_model.lm_head.weight"])
    assert torch.equal(vlm.model.lm_head.bias, stored["language_model.lm_head.bias"])
    assert vlm.model.get_output_embeddings() is vlm.model.lm_head
    assert vlm.model.lm_head.weight is not vlm.model.get_input_embeddings().weight


def test_the_prompt_is_the_authors_and_keeps_all_patches_but_the_first(folders):
    vlm = load(folders / "teacher")
    head = f"{SYSTEM} USER: "
    assert build_prompt(vlm, 1, QUESTION) == f"{head}<image>\n{QUESTION} ASSISTANT:"
    assert build_prompt(vlm, 0, QUESTION) == f"{head}{QUESTION} ASSISTANT:"
    turns = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Two?"},
    ]
    text = vlm.processor.apply_chat_template(turns, add_generation_prompt=True)
    assert text == f"{head}One? ASSISTANT: Yes.<|endoftext|>USER: Two? ASSISTANT:"
    ids = asked(vlm)["input_ids"][0].tolist()
    assert ids.count(miniature.IMAGE) == N_TOKENS == vlm.model.config.image_seq_length
    # The authors tokenise what stands before and after the picture on its own.
    bare = vlm.tokenizer(head)["input_ids"], vlm.tokenizer(f"\n{QUESTION} ASSISTANT:")["input_ids"]
    assert ids == [*bare[0], *[miniature.IMAGE] * N_TOKENS, *bare[1]]
    assert vlm.tokenizer.decode(bare[0]) == head
    merged = vlm.tokenizer.convert_tokens_to_ids("Ġthe")
    assert merged in vlm.tokenizer("in the   end")["input_ids"]
    assert miniature.END + 1 in vlm.tokenizer("in the   end")["input_ids"]


def test_a_picture_is_resized_to_the_square_and_scaled(folders):
    pixels = asked(load(folders / "teacher"), size=(31, 17))["pixel_values"]
    assert pixels.shape == (1, 3, 12, 12)
    expected = torch.tensor(list(tiny.image(3, (31, 17)).resize((12, 12), 3).tobytes()))
    expected = expected.view(12, 12, 3).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(pixels[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["teacher", "hybrid"])
def test_it_answers_alone_and_in_a_batch_and_ends_at_its_own_token(folders, kind):
    vlm = load(folders / kind)
    assert vlm.model.generation_config.eos_token_id == miniature.END
    found = answer(vlm, [tiny.image(1)], QUESTION, max_new_tokens=6)
    assert found.n_new_tokens >= 1
    samples = [
        Sample((tiny.image(1),), QUESTION, "", "test"),
        Sample((tiny.image(2),), "What is in the middle of it, and of what kind?", "", "test"),
    ]
    assert answer_batch(vlm, samples, max_new_tokens=6)[0] == found.text


@pytest.mark.parametrize("kind", ["teacher", "hybrid"])
def test_what_was_saved_reads_back_the_same(folders, kind, tmp_path):
    vlm = load(folders / kind)
    inputs = asked(vlm)
    logits = vlm.model(**inputs).logits
    save(vlm, tmp_path / "mine")
    again = load(tmp_path / "mine")
    assert torch.equal(again.model(**inputs).logits, logits)
    assert again.plan == vlm.plan
    assert build_prompt(again, 1, QUESTION) == build_prompt(vlm, 1, QUESTION)
    assert torch.equal(asked(again)["input_ids"], inputs["input_ids"])
    auto = AutoModelForImageTextToText.from_pretrained(tmp_path / "mine").eval()
    assert torch.equal(auto(**inputs).logits, logits)
    assert plan_of(auto) == vlm.plan
    assert auto.generation_config.eos_token_id == miniature.END


def test_the_teacher_converts_like_any_other(folders, tmp_path):
    teacher = load_teacher(folders / "teacher")
    student = convert(teacher, Plan(miniature.N_LAYERS, (0, 4)), init="matvlm")
    assert "family llava (phi)" in str(teacher)
    inputs = asked(teacher)
    logits = student.model(**inputs).logits
    assert not torch.allclose(logits, teacher.model(**inputs).logits)
    save(student, tmp_path / "student")
    assert torch.equal(load(tmp_path / "student").model(**inputs).logits, logits)


def test_the_dtype_is_the_one_that_was_asked_for(folders):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model = load(folders / "hybrid", dtype=dtype).model
        for name, parameter in model.named_parameters():
            kept = name.rpartition(".")[2] in ("A_log", "dt_bias", "D")
            assert parameter.dtype == (torch.float32 if kept else dtype), name
    mapped = load(folders / "hybrid", device_map="auto").model
    plain = load(folders / "hybrid").model
    for name, tensor in plain.state_dict().items():
        assert torch.equal(mapped.state_dict()[name].to(tensor), tensor), name


def test_the_published_sizes_come_out(folders):
    """3,217.42 M parameters in the teacher's file, 15.24 M of them SigLIP's unused pooling head."""
    values = miniature.config()
    values["text_config"] |= {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "vocab_size": 51200,
    }
    values["vision_config"] |= {
        "hidden_size": 1152,
        "image_size": 384,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
    }
    model_class = tinyllava_model.TinyLlavaPhiForConditionalGeneration
    tokenizer = load(folders / "teacher").tokenizer
    config = tinyllava_model.read_config(values, tokenizer, model_class.config_class)
    with torch.device("meta"):
        model = model_class(config)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 3202.18
    assert config.image_seq_length == 728


def changed(folder, file, **values):
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | values))


def test_what_does_not_fit_is_said_in_a_sentence(tmp_path):
    def told(words, file, **values):
        for old in tmp_path.glob("*"):
            old.unlink()
        miniature.write(tmp_path, miniature.MAMBA_LAYERS, n_files=1)
        changed(tmp_path, file, **values)
        with pytest.raises(WorkbenchError, match=words):
            load(tmp_path)

    text = miniature.config()["text_config"]
    told("'qwen2' as its language model", "config.json", text_config=text | {"model_type": "qwen2"})
    told("'resampler' as its connector", "config.json", connector_type="resampler")
    told("'pad' as its image_aspect_ratio", "config.json", image_aspect_ratio="pad")
    told("'clip_vision_model' as its vision", "config.json", vision_config={
        "model_type": "clip_vision_model"})  # fmt: skip
    told("its n_layer is 7, and config.json asks for 5", "mamba_config.json", n_layer=7)
    told("d_xb is 8, and", "mamba_config.json", d_xb=8)
    told("mixers with biases", "mamba_config.json", is_bias=True)
    told("names layer 9, but the model has 5", "mamba_config.json", attn_layers=[1, 2, 9])
    told("fills all 256 rows", "config.json", text_config=text | {"vocab_size": 256})
    told("has shape .* in the file, and the model needs", "config.json", text_config=text | {
        "vocab_size": 290})  # fmt: skip


def test_weights_and_mamba_config_belong_together(tmp_path):
    miniature.write(tmp_path, miniature.MAMBA_LAYERS)
    (tmp_path / "mamba_config.json").unlink()
    with pytest.raises(WorkbenchError, match="mamba_config.json, which describes it, is missing"):
        load(tmp_path)
    miniature.write(tmp_path)
    (tmp_path / "mamba_config.json").write_text(json.dumps(miniature.mamba_config()))
    with pytest.raises(WorkbenchError, match="has no place|are missing"):
        load(tmp_path)
