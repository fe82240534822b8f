"""Every mode says what plain `generate` says, for teacher and hybrid, one by one and in batches."""

import shutil

import pytest
import tiny
import torch

from workbench.errors import WorkbenchError
from workbench.models.engine import Engine, draw
from workbench.models.generation import prepare_inputs
from workbench.models.hybrid import build_hybrid
from workbench.models.plan import Plan
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
