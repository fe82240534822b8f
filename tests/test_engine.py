"""Every mode says what plain `generate` says, for teacher and hybrid, one by one and in batches."""

import shutil
import threading

import pytest
import tiny
import torch

from workbench.data import Sample
from workbench.errors import WorkbenchError
from workbench.models.cache import CACHE
from workbench.models.engine.decoder import read_decoder
from workbench.models.engine.decoding import State, step
from workbench.models.engine.engine import Engine, draw
from workbench.models.engine.operations import Operations
from workbench.models.engine.prompt import read
from workbench.models.generation import answer_batch, stream_answer
from workbench.models.hybrid import build_hybrid
from workbench.models.plan import Plan
from workbench.models.prompts import prepare_inputs
from workbench.models.teacher import VLM

QUESTION = "which colour is the bar?"
LAYERS = {"teacher": None, "hybrid": (0, 2), "all": (0, 1, 2, 3)}
GPU = torch.cuda.is_available()
MODES = ("eager", "static", "compiled") if shutil.which("g++") else ("eager", "static")
NEW = 9


def endless(vlm):
    vlm.model.generation_config.eos_token_id = None
    vlm.tokenizer.eos_token = None
    return vlm


def words(family, layers=None, **options):
    model = tiny.language_model(family)
    model.generation_config.eos_token_id = None
    if layers is not None:
        model = build_hybrid(model, Plan(tiny.N_LAYERS, layers), options)
    return endless(VLM(family, model, tiny.tokenizer()))


def generated(vlm, inputs, n=NEW):
    tokens = vlm.model.generate(
        **inputs, do_sample=False, max_new_tokens=n, pad_token_id=vlm.tokenizer.pad_token_id
    )
    return tokens[:, inputs["input_ids"].shape[1] :].tolist()


def engined(engine, inputs, n=NEW, **options):
    rows = list(engine.generate(inputs, max_new_tokens=n, **options))
    return [list(row) for row in zip(*rows, strict=True)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_greedy_answers_are_those_of_generate(mode, layers):
    vlm = endless(tiny.vlm(layers))
    engine = Engine(vlm, mode, backend="aot_eager")
    assert engine.reason is None
    one = prepare_inputs(vlm, [[tiny.image()]], [QUESTION], NEW)
    assert engined(engine, one) == generated(vlm, one)
    several = prepare_inputs(vlm, [[tiny.image()], []], [QUESTION, "how many?"], NEW)
    assert engined(engine, several) == generated(vlm, several)
    assert engined(engine, one) == generated(vlm, one)


@pytest.mark.parametrize("family", ["llama", "phi-norms", "qwen2"])
@pytest.mark.parametrize("layers", [None, (1, 2)], ids=["teacher", "hybrid"])
def test_other_families_are_read_into_records(family, layers):
    vlm = words(family, layers)
    engine = Engine(vlm, "static")
    assert engine.reason is None
    inputs = prepare_inputs(vlm, [[], []], [QUESTION, "how many?"], NEW)
    assert engined(engine, inputs) == generated(vlm, inputs)


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("family", ["pictures", "llama", "phi-norms", "qwen2"])
def test_a_prompt_through_records_leaves_what_the_models_own_forward_leaves(family, layers):
    vlm = endless(tiny.vlm(layers)) if family == "pictures" else words(family, layers, rope=True)
    if family == "pictures":
        inputs = prepare_inputs(vlm, [[tiny.image()]] * 2, [QUESTION] * 2, NEW)
        inputs["pixel_values"] = torch.randn_like(inputs["pixel_values"])
    else:
        inputs = {"input_ids": tiny.token_ids(2, 9)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    engine = Engine(vlm, "static")
    with torch.inference_mode():
        logits = engine.prefill(dict(inputs))
        own = vlm.model(**inputs, use_cache=True, logits_to_keep=1)
    assert torch.allclose(logits, own.logits[:, -1], atol=1e-4)
    assert not torch.allclose(logits[0], logits[1], atol=1e-3)
    seqlen = inputs["input_ids"].shape[1]
    for slot, other in zip(engine.runner.state.cache.layers, own[CACHE].layers, strict=True):
        if slot.keys is None:
            mine = slot.conv_states[0], slot.recurrent_states[0]
            theirs = other.conv_states[0], other.recurrent_states[0]
        else:
            mine = slot.keys[:, :, :seqlen], slot.values[:, :, :seqlen]
            theirs = other.keys, other.values
        for one, same in zip(mine, theirs, strict=True):
            assert torch.allclose(one, same, atol=1e-4)


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("seqlen", [1, 2, 5, 9])
def test_what_stands_behind_the_end_of_a_prompt_changes_nothing(layers, seqlen):
    vlm = words("phi-norms", layers, rope=True)
    decoder, found = read_decoder(vlm.model), []
    embedded = torch.randn(2, 9, decoder.embedding.shape[1])
    for end in (None, torch.tensor([seqlen])):
        state = State(decoder, 2, 12, layers or ())
        given = embedded[:, :seqlen] if end is None else embedded
        with torch.no_grad():
            logits = read(decoder, state, Operations(), given, end)
        tensors = [logits]
        for slot in state.cache.layers:
            if slot.keys is None:
                tensors += [slot.conv_states[0], slot.recurrent_states[0]]
            else:
                tensors += [slot.keys[:, :, :seqlen], slot.values[:, :, :seqlen]]
        found.append(tensors)
    for one, same in zip(*found, strict=True):
        torch.testing.assert_close(one, same)


def test_a_prompt_that_does_not_fit_into_a_cache_is_refused():
    decoder = read_decoder(words("llama").model)
    state = State(decoder, 1, 8, ())
    for shape in ((1, 9), (2, 5)):
        embedded = torch.zeros(*shape, decoder.embedding.shape[1])
        with pytest.raises(WorkbenchError, match="does not fit"), torch.no_grad():
            read(decoder, state, Operations(), embedded)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_short_prompts_are_recorded_and_say_the_same(layers):
    vlm = words("phi-norms", layers, rope=True)
    vlm.model.cuda()
    engine = Engine(vlm, "graph", max_length=200)
    for seqlen in (9, 5, 1, 130, 9):
        inputs = {"input_ids": tiny.token_ids(2, seqlen).cuda()}
        assert engined(engine, inputs) == generated(vlm, inputs)
    assert list(engine.runner.recorded.recorded) == [128, 200]


def test_a_language_model_may_be_given_more_than_words():
    vlm = words("llama", (1, 2))
    engine, ids = Engine(vlm, "static"), tiny.token_ids(2, 9)
    plain = engine.prefill({"input_ids": ids}).clone()
    assert torch.equal(engine.prefill({"input_ids": ids, "output_attentions": False}), plain)


def test_another_thread_may_run_the_model_while_a_prompt_is_embedded(monkeypatch):
    vlm = endless(tiny.vlm((0, 2)))
    engine, said = Engine(vlm, "static"), []
    inputs = prepare_inputs(vlm, [[tiny.image()]], [QUESTION], NEW)
    decoder = vlm.model.get_decoder()
    words_only = {"input_ids": inputs["input_ids"][:, -5:]}

    def beside(*unused):  # between the hook and the decoder
        thread = threading.Thread(target=lambda: said.append(vlm.model(**words_only)))
        thread.start()
        thread.join()

    hook = vlm.model.model.multi_modal_projector.register_forward_hook(beside)
    engine.prefill(dict(inputs))
    hook.remove()
    assert len(said) == 1
    assert not decoder._forward_pre_hooks


@pytest.mark.parametrize("start", [[0], [0, 3]], ids=["one", "padded"])
def test_a_step_that_is_recorded_says_what_one_that_slices_says(start):
    vlm = endless(tiny.vlm((0, 2), {"rope": True}))
    decoder, said = read_decoder(vlm.model), []
    ids, begin = tiny.token_ids(len(start), 7), torch.tensor(start)
    mask = (torch.arange(7) >= begin[:, None]).long()
    for by_place in (False, True):
        state, operations = State(decoder, len(start), 20, (0, 2)), Operations(by_place)
        with torch.no_grad():
            state.begin(begin)
            given = {"input_ids": ids, "attention_mask": mask if state.padded else None}
            vlm.model(**given, **{CACHE: state.cache}, use_cache=True)
            state.follow(7)
            state.padded = state.padded and not by_place  # a recorded step cannot ask
            for i in range(3):
                state.token.copy_(ids[:, i])
                said.append(step(decoder, state, operations))
                state.length += 1
    torch.testing.assert_close(torch.stack(said[:3]), torch.stack(said[3:]))


def test_a_family_that_is_not_described_runs_its_own_forward():
    vlm = words("llama", (1, 2))
    vlm.model.config.rope_parameters["rope_type"] = "dynamic"
    inputs = prepare_inputs(vlm, [[], []], [QUESTION, "how many?"], NEW)
    expected = generated(vlm, inputs)
    for mode in ("eager", "static", "compiled"):
        engine = Engine(vlm, mode, backend="aot_eager")
        assert "depends on the length" in engine.reason
        assert "own forward" in str(engine)
        assert engined(engine, inputs) == expected
    with pytest.raises(WorkbenchError, match="needs a GPU"):
        Engine(vlm, "graph", max_length=32)
    if GPU:
        there = VLM(vlm.name, vlm.model.cuda(), vlm.processor, vlm.plan)
        with pytest.raises(WorkbenchError, match="cannot be recorded"):
            Engine(there, "graph", max_length=32)


def test_a_cache_that_is_too_short_grows_and_one_of_a_given_size_says_so():
    vlm = endless(tiny.vlm((0, 2)))
    inputs = prepare_inputs(vlm, [[]], [QUESTION], 1)
    engine = Engine(vlm, "static")
    short, long = engined(engine, inputs, 3), engined(engine, inputs, 240)
    assert long[0][:3] == short[0]
    assert long == generated(vlm, inputs, 240)
    fixed = Engine(vlm, "static", max_length=16)
    assert fixed.warm_up_ms > 0
    with pytest.raises(WorkbenchError, match="was made for 16"):
        engined(fixed, inputs, 12)


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_an_engine_may_be_as_short_as_two_tokens(layers):
    vlm = words("llama", layers)
    vlm.model.to("cuda" if GPU else "cpu")
    ids = torch.tensor([[5]], device=vlm.model.device)
    engine = Engine(vlm, "graph" if GPU else "static", max_length=2)
    with torch.inference_mode():
        own = vlm.model(input_ids=ids).logits[:, -1]
        logits = engine.prefill({"input_ids": ids}, max_new_tokens=1)
    torch.testing.assert_close(logits, own, atol=1e-4, rtol=1e-4)


def test_weights_that_change_are_read_again():
    vlm = endless(tiny.vlm((0, 2)))
    engine = Engine(vlm, "static")
    inputs = prepare_inputs(vlm, [[]], [QUESTION], NEW)
    before = engined(engine, inputs)
    with torch.no_grad():
        for parameter in vlm.model.get_decoder().parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    after = engined(engine, inputs)
    assert after != before
    assert after == generated(vlm, inputs)


def test_rows_end_one_by_one():
    vlm = endless(tiny.vlm((0, 2)))
    engine = Engine(vlm, "static")
    inputs = prepare_inputs(vlm, [[], []], [QUESTION, "how many?"], NEW)
    free = engined(engine, inputs)
    stop = free[0][3]
    vlm.model.generation_config.eos_token_id = [stop]
    rows = engined(engine, inputs)
    assert rows == generated(vlm, inputs)
    assert len(rows[0]) <= NEW


def test_draws_repeat_with_a_seed_and_stay_among_the_likeliest():
    vlm = endless(tiny.vlm((0, 2)))
    engine = Engine(vlm, "static")
    inputs = prepare_inputs(vlm, [[]], [QUESTION], NEW)
    hot = {"temperature": 2.0, "top_p": 0.9}
    one = engined(engine, inputs, seed=1, **hot)
    assert one == engined(engine, inputs, seed=1, **hot)
    assert one != engined(engine, inputs, seed=2, **hot)
    assert engined(engine, inputs, temperature=0.7, top_p=1e-6) == generated(vlm, inputs)
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(4000, 4)
    seen = draw(logits, 1.0, 0.75, torch.Generator().manual_seed(0)).bincount(minlength=4) / 4000
    torch.testing.assert_close(seen, torch.tensor([0.625, 0.375, 0, 0]), atol=0.03, rtol=0)
    for wrong in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(WorkbenchError, match="temperature is 0 or more"):
            engined(engine, inputs, **wrong)


def test_answers_stream_and_come_in_batches_through_an_engine():
    vlm = endless(tiny.vlm((0, 2)))
    engine = Engine(vlm, "static")
    plain = list(stream_answer(vlm, [tiny.image()], QUESTION, max_new_tokens=6))
    fast = list(stream_answer(vlm, [tiny.image()], QUESTION, max_new_tokens=6, engine=engine))
    assert [a.text for a in fast] == [a.text for a in plain]
    assert [a.kv_bytes for a in fast] == [a.kv_bytes for a in plain]
    assert fast[-1].ssm_bytes == plain[-1].ssm_bytes
    assert fast[-1].decode_tokens_per_s > 0
    asked = [Sample((tiny.image(i),), QUESTION, "", "test", None) for i in range(3)]
    options = {"max_new_tokens": 6, "batch_size": 2}
    assert answer_batch(vlm, asked, engine=engine, **options) == answer_batch(vlm, asked, **options)
    with pytest.raises(WorkbenchError, match="was made of"):
        stream_answer(tiny.vlm(), [], QUESTION, engine=engine)


def test_what_an_engine_cannot_do_is_said_in_a_sentence():
    vlm = tiny.vlm()
    with pytest.raises(WorkbenchError, match="no mode 'warp'"):
        Engine(vlm, "warp")
    with pytest.raises(WorkbenchError, match="batch_size must be at least 1"):
        Engine(vlm, batch_size=0)
    with pytest.raises(WorkbenchError, match="max_length must be at least 2"):
        Engine(vlm, max_length=1)
    inputs = prepare_inputs(vlm, [[], []], [QUESTION, "how?"], 1)
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    with pytest.raises(WorkbenchError, match="padded on the left only"):
        engined(Engine(vlm), inputs)
