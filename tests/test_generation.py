import json

import pytest
import tiny
import torch
from tokenizers.processors import TemplateProcessing

from workbench.data import Sample
from workbench.errors import WorkbenchError
from workbench.models import generation
from workbench.models.engine import Engine
from workbench.models.generation import answer, answer_batch, stream_answer
from workbench.models.prompts import build_prompt, prepare_inputs
from workbench.models.teacher import VLM

QUESTION = "which colour is the bar?"
MODELS = {"teacher": None, "hybrid": (0, 2), "all": (0, 1, 2, 3)}


def sample(question, *images):
    return Sample(images, question, "", "test", None)


def endless(vlm):
    """Let it run to max_new_tokens: a random model may stop at once."""
    vlm.model.generation_config.eos_token_id = None
    vlm.tokenizer.eos_token = None
    return vlm


@pytest.mark.parametrize("layers", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("n_images", [0, 1, 2])
def test_the_loop_says_what_generate_says(layers, n_images):
    vlm = endless(tiny.vlm(layers))
    images = [tiny.image(i) for i in range(n_images)]
    inputs = prepare_inputs(vlm, [images], [QUESTION], 12)
    tokens = vlm.model.generate(**inputs, do_sample=False, max_new_tokens=12)
    expected = tokens[0, inputs["input_ids"].shape[1] :]
    *_, last = stream_answer(vlm, images, QUESTION, max_new_tokens=12)
    assert last.text == vlm.tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert last.n_new_tokens == 12
    assert last.n_prompt_tokens == inputs["input_ids"].shape[1]
    assert last.n_prompt_tokens >= 16 * n_images


def test_figures_are_what_the_cache_and_the_weights_hold():
    teacher, student = endless(tiny.vlm()), endless(tiny.vlm((0, 1, 2)))
    one, other = (answer(m, [tiny.image()], QUESTION, max_new_tokens=5) for m in (teacher, student))
    seen = one.n_prompt_tokens + 4  # the last token is not read back
    assert one.kv_bytes == 4 * 2 * seen * 48 * 4
    assert one.ssm_bytes == 0
    assert other.kv_bytes == one.kv_bytes // 4
    assert other.ssm_bytes == 3 * (3 * 48 * 3 + 4 * 12 * 12) * 4
    assert other.cache_bytes == other.kv_bytes + other.ssm_bytes
    assert one.weight_bytes == sum(p.nbytes for p in teacher.model.parameters())
    assert min(one.prefill_ms, one.decode_tokens_per_s) > 0
    assert json.loads(json.dumps(other.to_dict()))["cache_bytes"] == other.cache_bytes
    assert f"{other.n_prompt_tokens} prompt tokens" in str(other)


def test_the_peak_is_weights_and_what_came_on_top(monkeypatch):
    vlm = endless(tiny.vlm())
    assert answer(vlm, [tiny.image()], QUESTION, max_new_tokens=2).peak_bytes is None  # on a CPU
    monkeypatch.setattr(generation, "_memory_now", lambda device: 5000)
    monkeypatch.setattr(generation, "_memory_peak", lambda device: 5700)
    one = answer(vlm, [tiny.image()], QUESTION, max_new_tokens=2)
    assert one.peak_bytes == one.weight_bytes + 700
    engine = Engine(vlm)
    one = answer(vlm, [tiny.image()], QUESTION, max_new_tokens=2, engine=engine)
    assert one.reserved_bytes == sum(engine.bytes_reserved()) > one.cache_bytes
    assert one.peak_bytes == one.weight_bytes + one.reserved_bytes + 700  # it was there before
    monkeypatch.setattr(generation, "_memory_peak", lambda device: 5300)  # what a graph works in
    again = answer(vlm, [tiny.image()], QUESTION, max_new_tokens=2, engine=engine)
    assert again.peak_bytes == one.peak_bytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_peak_on_a_gpu_holds_the_cache():
    vlm = endless(tiny.vlm())
    vlm = VLM(vlm.name, vlm.model.cuda(), vlm.processor)
    one = answer(vlm, [tiny.image()], QUESTION, max_new_tokens=20)
    assert one.peak_bytes >= one.weight_bytes + one.cache_bytes


def test_a_stream_grows_token_by_token_and_ends_at_the_end_token():
    vlm = endless(tiny.vlm((0,)))
    parts = list(stream_answer(vlm, [tiny.image()], QUESTION, max_new_tokens=6))
    assert [p.n_new_tokens for p in parts] == [1, 2, 3, 4, 5, 6]
    assert parts[0].decode_tokens_per_s == 0
    inputs = prepare_inputs(vlm, [[tiny.image()]], [QUESTION], 6)
    tokens = vlm.model.generate(**inputs, do_sample=False, max_new_tokens=6)[0, -6:].tolist()
    vlm.model.generation_config.eos_token_id = [tokens[3]]
    stopped = answer(vlm, [tiny.image()], QUESTION, max_new_tokens=6)
    assert stopped.n_new_tokens == tokens.index(tokens[3]) + 1


def test_characters_of_several_bytes_come_whole(monkeypatch):
    vlm = endless(tiny.vlm())
    tokens = iter(vlm.tokenizer.encode(" né 日本", add_special_tokens=False))
    said = len(vlm.tokenizer.encode(" né 日本", add_special_tokens=False))

    def scripted(vlm, cache, **inputs):
        return torch.tensor([[next(tokens)]]), 0.1

    monkeypatch.setattr("workbench.models.generation._timed_step", scripted)
    parts = [a.text for a in stream_answer(vlm, [], QUESTION, max_new_tokens=said)]
    assert parts[-1] == "né 日本"
    assert said > len("né 日本")
    assert all(parts[-1].startswith(part) for part in parts)


@pytest.mark.parametrize("layers", MODELS.values(), ids=MODELS)
def test_a_batch_answers_as_one_by_one(layers):
    vlm = endless(tiny.vlm(layers))
    samples = [
        sample("how many?", tiny.image(0)),
        sample("which colour is the tallest bar, and how many are there?"),
        sample(QUESTION, tiny.image(1), tiny.image(2, (30, 20))),
    ]
    alone = [answer(vlm, s.images, s.question, max_new_tokens=7).text for s in samples]
    assert answer_batch(vlm, samples, max_new_tokens=7, batch_size=3) == alone
    assert answer_batch(vlm, samples, max_new_tokens=7, batch_size=2) == alone
    assert answer_batch(vlm, [], max_new_tokens=7, batch_size=2) == []


@pytest.mark.parametrize("said_by", ["config", "tokenizer"])
def test_a_batch_stops_where_one_answer_does(said_by):
    vlm = tiny.vlm()
    inputs = prepare_inputs(vlm, [[]], [QUESTION], 1)
    first = vlm.model(**inputs).logits[0, -1].argmax().item()
    vlm.model.generation_config.eos_token_id = first if said_by == "config" else None
    vlm.tokenizer.eos_token = vlm.tokenizer.convert_ids_to_tokens(first)
    assert answer(vlm, [], QUESTION, max_new_tokens=9).n_new_tokens == 1
    alone = answer(vlm, [], QUESTION, max_new_tokens=9).text
    assert answer_batch(vlm, [sample(QUESTION)], max_new_tokens=9) == [alone]


def test_prompts_follow_the_template_of_the_model():
    vlm = tiny.vlm()
    expected = "USER: <image>\n<image>\nhow many? ASSISTANT:"
    assert build_prompt(vlm, 2, "how many?") == expected
    vlm.processor.chat_template = None
    assert build_prompt(vlm, 2, "how many?") == expected
    vlm.tokenizer.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}"
    assert build_prompt(vlm, 1, "how many?") == "<s><image>\nhow many?"
    starts = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    vlm.tokenizer.backend_tokenizer.post_processor = starts
    for template in (vlm.tokenizer.chat_template, None):
        vlm.tokenizer.chat_template = template
        ids = prepare_inputs(vlm, [[]], ["how many?"], 1)["input_ids"][0].tolist()
        assert ids.count(vlm.tokenizer.bos_token_id) == 1


def test_a_language_model_answers_without_pictures():
    model = tiny.language_model("llama")
    vlm = VLM("words", model, tiny.tokenizer())
    assert answer(vlm, [], "how many?", max_new_tokens=4).n_new_tokens <= 4
    with pytest.raises(WorkbenchError, match="reads text only"):
        answer(vlm, [tiny.image()], "how many?")


def test_a_model_in_training_answers_without_dropout_and_goes_on_training():
    torch.manual_seed(0)
    vlm = endless(tiny.vlm((0,)))
    vlm.model.config.text_config.resid_pdrop = 0.5
    for layer in vlm.model.get_decoder().layers:
        layer.resid_dropout.p = 0.5
    calm = answer(vlm, [], QUESTION, max_new_tokens=8).text
    vlm.model.train()
    vlm.model.model.vision_tower.eval()
    assert answer(vlm, [], QUESTION, max_new_tokens=8).text == calm
    assert answer_batch(vlm, [sample(QUESTION)], max_new_tokens=8, batch_size=1) == [calm]
    assert vlm.model.training
    assert not vlm.model.model.vision_tower.training


def test_an_answer_ends_with_the_models_last_position():
    vlm = endless(tiny.vlm((0,)))
    words = "bar " * 100
    while prepare_inputs(vlm, [[]], [words], 1)["input_ids"].shape[1] < 250:
        words += "bar "
    last = answer(vlm, [], words, max_new_tokens=128)
    assert last.n_prompt_tokens + last.n_new_tokens == 256
    assert answer_batch(vlm, [sample(words)], max_new_tokens=128, batch_size=1) == [last.text]


def test_what_cannot_be_answered_is_said_in_a_sentence():
    vlm = tiny.vlm()
    with pytest.raises(WorkbenchError, match="The question is empty"):
        stream_answer(vlm, [], "  ")
    with pytest.raises(WorkbenchError, match=r"takes \d+ tokens, and tiny has 256 positions"):
        answer(vlm, [tiny.image()], "bar " * 300)
    with pytest.raises(WorkbenchError, match="'<image>', which stands for a picture"):
        answer(vlm, [], "what is <image>?")
    with pytest.raises(WorkbenchError, match="PIL images, not Tensor"):
        answer(vlm, [torch.zeros(3, 4, 4)], QUESTION)
    with pytest.raises(WorkbenchError, match="must be a list"):
        answer(vlm, tiny.image(), QUESTION)
    with pytest.raises(WorkbenchError, match="max_new_tokens must be at least 1, not 0"):
        answer(vlm, [], QUESTION, max_new_tokens=0)
    with pytest.raises(WorkbenchError, match="batch_size must be at least 1, not 0"):
        answer_batch(vlm, [], max_new_tokens=1, batch_size=0)
