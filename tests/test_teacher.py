import json

import pytest
import tiny
import torch
from transformers.utils import logging

from workbench.errors import WorkbenchError
from workbench.models.delta import load_delta, save_delta
from workbench.models.fingerprint import fingerprint
from workbench.models.hybrid import build_hybrid, mixers, plan_of
from workbench.models.plan import Plan
from workbench.models.teacher import load, load_teacher, save


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def test_a_delta_holds_what_changed_and_no_more(tmp_path):
    teacher = tiny.llava()
    student = build_hybrid(teacher, Plan(4, (0, 2)), {"rope": True, "bias": True, "d_conv": 3})
    mixers(student)[0].q_proj.weight.add_(1)
    save_delta(student, teacher, tmp_path)
    again = load_delta(teacher, tmp_path)
    assert plan_of(again) == plan_of(student)
    for name, tensor in student.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    size = (tmp_path / "delta.safetensors").stat().st_size
    new = sum(
        p.nbytes
        for mixer in mixers(student).values()
        for name, p in mixer.named_parameters()
        if name.split(".")[0] not in ("q_proj", "k_proj", "v_proj", "dense")
    )
    assert new < size < new + mixers(student)[0].q_proj.weight.nbytes + 4096
    save_delta(student, teacher, tmp_path, dtype=torch.bfloat16)
    low = load_delta(teacher, tmp_path)
    assert torch.equal(mixers(low)[0].A_log, mixers(student)[0].A_log)


def test_a_delta_that_does_not_fit_is_refused_in_words(tmp_path):
    teacher = tiny.llava()
    save_delta(build_hybrid(teacher, Plan(4, (0,))), teacher, tmp_path)
    with pytest.raises(WorkbenchError, match="difference from its teacher"):
        save_delta(teacher, teacher, tmp_path / "other")
    described = json.loads((tmp_path / "plan.json").read_text())

    def told(words, **changes):
        changed = described | {"plan": described["plan"] | changes}
        (tmp_path / "plan.json").write_text(json.dumps(changed))
        with pytest.raises(WorkbenchError, match=words):
            load_delta(teacher, tmp_path)

    told("tensors are missing", mamba_layers=[0, 1])
    told("tensors are unknown", mamba_layers=[])
    told("for a model of 9 layers", n_layers=9)
    described["options"]["d_conv"] = 2
    told("has shape")
    (tmp_path / "delta.safetensors").write_bytes(b"torn")
    told("cannot be read")
    (tmp_path / "delta.safetensors").unlink()
    told("delta.safetensors is missing")


def test_a_vlm_is_saved_and_loaded_with_its_processor(tmp_path):
    vlm = tiny.vlm((0, 2))
    assert save(vlm, tmp_path / "mine") == tmp_path / "mine"
    again = load(tmp_path / "mine")
    assert again.name == "mine"
    assert again.plan == vlm.plan
    assert again.processor.chat_template == vlm.processor.chat_template
    assert "Mamba-2 layers: 0, 2 (50.0%)" in str(again)
    with pytest.raises(WorkbenchError, match="is a hybrid, not a teacher"):
        load_teacher(tmp_path / "mine")
    save(tiny.vlm(), tmp_path / "teacher")
    teacher = load_teacher(tmp_path / "teacher", dtype=torch.bfloat16)
    assert teacher.plan is None
    assert teacher.model.dtype == torch.bfloat16
    assert "Every layer attends" in str(teacher)


def test_saving_and_loading_show_no_progress_bar_and_leave_it_on_for_others(tmp_path, capfd):
    assert logging.is_progress_bar_enabled()
    vlm = tiny.vlm((0, 2))
    capfd.readouterr()
    save(vlm, tmp_path)
    load(tmp_path)
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled()


def test_the_repr_of_a_vlm_fits_on_a_line():
    assert repr(tiny.vlm()) == "VLM(name='tiny', plan=None)"


def test_what_cannot_be_loaded_or_saved_is_said_in_a_sentence(tmp_path):
    with pytest.raises(WorkbenchError, match=r"no model or folder called 'pockets'.*pocket-12.5"):
        load("pockets")
    with pytest.raises(WorkbenchError, match="config.json is missing"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WorkbenchError, match="no .safetensors file"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(WorkbenchError, match="cut short or damaged"):
        load(tmp_path)
    with pytest.raises(WorkbenchError, match="device 'abacus'"):
        load(tmp_path, device="abacus")
    with pytest.raises(WorkbenchError, match="is a file"):
        save(tiny.vlm(), tmp_path / "config.json")


@pytest.mark.parametrize("name", ["bfloat16", "torch.bfloat16"])
def test_a_dtype_may_be_named(name, tmp_path):
    save(tiny.vlm(), tmp_path)
    assert load_teacher(tmp_path, dtype=name).model.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [None, "auto", "bf16", "nn", 16, torch.int8])
def test_what_is_no_dtype_is_said(dtype):
    for verb in (load, load_teacher):
        with pytest.raises(WorkbenchError, match=r"dtype=.* is no type of weights: choose torch\."):
            verb("pocket", dtype=dtype)


def test_a_fingerprint_tells_weights_apart_but_not_their_precision():
    model = tiny.llava(0)
    halves = [tiny.llava(seed).bfloat16() for seed in (0, 1)]
    same, other = (fingerprint(half, rounded=torch.bfloat16) for half in halves)
    assert fingerprint(model, rounded=torch.bfloat16) == same != other
    assert fingerprint(model) != fingerprint(halves[0])
    assert fingerprint(model.to("meta"))  # offloaded: names and shapes
