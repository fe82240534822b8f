"""Which tokens see what follows: Gemma 3 and PaliGemma, fed by their own processors."""

import inspect

import pytest
import tiny
import tiny_families
import torch
from transformers import (
    Gemma3ImageProcessor,
    Gemma3Processor,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
)

import workbench as wb
from workbench.data import Sample
from workbench.models.engine import Engine
from workbench.models.generation import answer_batch
from workbench.models.plan import Plan
from workbench.models.prompts import build_prompt, prepare_inputs
from workbench.models.teacher import VLM
from workbench.steps.quality.fidelity import hidden_states
from workbench.steps.training.batches import collate
from workbench.steps.training.losses import head_logits
from workbench.steps.training.writing import write_conversation

FAMILIES = ("gemma3", "paligemma")
QUESTIONS = ("which bar?", "how many bars are there?")
# Of Gemma 3: a picture begins with "USER:" and ends with "ASSISTANT:", two tokens that are there.
GEMMA = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}USER:"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
)
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SIZE = {"height": 8, "width": 8}


def processor(family):
    words = tiny.tokenizer()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words.backend_tokenizer, pad_token="<pad>", bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={
            "image_token": "<image>", "boi_token": "USER:", "eoi_token": "ASSISTANT:",
        },
    )  # fmt: skip
    if family == "gemma3":
        pictures = Gemma3ImageProcessor(size=SIZE)
        return Gemma3Processor(pictures, tokenizer, GEMMA, image_seq_length=4)
    pictures = SiglipImageProcessor(size=SIZE)
    pictures.image_seq_length = 4
    return PaliGemmaProcessor(pictures, tokenizer)


def model(family, layers=None):
    plan = None if layers is None else Plan(tiny_families.N_LAYERS, layers)
    if plan is None:
        return VLM(family, tiny_families.teacher(family), processor(family))
    return VLM(f"{family}-50", tiny_families.student(family, layers), processor(family), plan)


def samples():
    return [
        Sample((tiny.image(i, (8, 8)),), question, answer, "bars")
        for i, (question, answer) in enumerate(zip(QUESTIONS, ("red", "two bars"), strict=True))
    ]


def made_by_the_processor(vlm, **more):
    """All that the processor makes of both questions, whatever a model reads of it."""
    texts = [build_prompt(vlm, 1, question) for question in QUESTIONS]
    return vlm.processor(
        text=texts, images=[list(s.images) for s in samples()], padding=True, return_tensors="pt",
        **more,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("layers", [None, (0, 3)], ids=["teacher", "hybrid"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_question_is_read_as_the_processor_says(family, layers):
    vlm = model(family, layers)
    pictures = [s.images for s in samples()]
    ours = prepare_inputs(vlm, pictures, QUESTIONS, 1)
    whole = made_by_the_processor(vlm, padding_side="left")
    assert "labels" not in ours
    whole.pop("labels", None)  # of PaliGemma's processor; they do not change the logits
    logits = vlm.model(**whole).logits
    assert torch.equal(vlm.model(**ours).logits, logits)
    blind = {name: t for name, t in ours.items() if name != "token_type_ids"}
    real = ours["attention_mask"].bool()
    assert not torch.allclose(vlm.model(**blind).logits[real], logits[real], atol=1e-3)


@pytest.mark.parametrize("layers", [None, (0, 3)], ids=["teacher", "hybrid"])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_generate_with_all_that_the_processor_made(family, layers):
    vlm = model(family, layers)
    whole = made_by_the_processor(vlm, padding_side="left")
    whole.pop("labels", None)
    tokens = vlm.model.generate(**whole, do_sample=False, max_new_tokens=6)
    texts = vlm.tokenizer.batch_decode(tokens[:, whole["input_ids"].shape[1] :], True)
    expected = [text.strip() for text in texts]
    asked = samples()
    assert answer_batch(vlm, asked, max_new_tokens=6) == expected
    alone = [wb.answer(vlm, s.images, s.question, max_new_tokens=6).text for s in asked]
    assert alone == expected
    for mode in ("eager", "static"):
        engine = Engine(vlm, mode)
        assert answer_batch(vlm, asked, max_new_tokens=6, engine=engine) == expected
        one = wb.answer(vlm, asked[1].images, QUESTIONS[1], max_new_tokens=6, engine=engine)
        assert one.text == expected[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_for_training_is_read_as_the_processor_says(family):
    vlm = model(family)
    batch, eos = collate(vlm, samples()), vlm.tokenizer.eos_token
    answers = [s.answer for s in samples()]
    for row, answer in zip(batch["labels"], answers, strict=True):
        assert vlm.tokenizer.decode(row[row != -100]).strip() == f"{answer}{eos}"
    if family == "paligemma":
        whole = made_by_the_processor(vlm, padding_side="right", suffix=answers)
        assert torch.equal(whole.pop("labels"), batch["labels"])
    else:
        texts = [write_conversation(vlm, s)[0] for s in samples()]
        images = [list(s.images) for s in samples()]
        whole = vlm.processor(text=texts, images=images, padding=True, padding_side="right",
                              return_tensors="pt")  # fmt: skip
    theirs = vlm.model(**whole).logits
    assert torch.equal(head_logits(vlm.model, hidden_states(vlm, batch)), theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_answer_is_seen_before_it_is_said(family):
    vlm = model(family)
    batch = collate(vlm, samples())
    other = batch | {"input_ids": batch["input_ids"].clone()}
    last = batch["attention_mask"][1].sum() - 1
    other["input_ids"][1, last] = 77
    before, after = (hidden_states(vlm, some)[1, :last] for some in (batch, other))
    assert torch.equal(before, after)


@pytest.mark.parametrize("family", FAMILIES)
def test_later_turns_are_labelled_too(family):
    vlm = model(family)
    talk = Sample((tiny.image(0, (8, 8)),), "which bar?", "red", "bars", more=(("and?", "two"),))
    row = collate(vlm, [talk])["labels"][0]
    assert vlm.tokenizer.decode(row[row != -100]).replace(" ", "") == "red</s>two</s>"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hybrid_is_calibrated_and_distilled_on_such_batches(family):
    teacher = model(family)
    student = wb.convert(teacher, Plan(4, (0, 3)), calibration=samples())
    with torch.enable_grad():
        run = wb.distill(student, teacher, samples(), steps=2, batch_size=2)
    assert run.steps == 2


def test_a_model_that_knows_no_token_types_is_given_none():
    vlm = tiny.vlm()
    vlm.tokenizer.model_input_names = ["input_ids", "attention_mask", "token_type_ids"]
    inputs = prepare_inputs(vlm, [[]], ["which bar?"], 1)
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert set(collate(vlm, [Sample((), "which bar?", "red", "bars")])) == {*inputs, "labels"}
    assert "token_type_ids" not in inspect.signature(vlm.model.forward).parameters
