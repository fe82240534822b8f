"""The weights that travel with the package: small, complete, and as good as they should be."""

import json

import pytest
import torch
from safetensors.torch import load_file

import workbench as wb
from workbench.mamba.mixer import Mamba2Mixer
from workbench.models import teacher as shelf
from workbench.models.hybrid import mixers
from workbench.models.teacher import POCKET, POCKET_HYBRIDS

N_MAMBA = {"pocket-12.5": 2, "pocket-25": 4, "pocket-50": 8, "pocket-100": 16}
THERE = [name for name, folder in POCKET_HYBRIDS.items() if (POCKET / folder).is_dir()]


@pytest.fixture(scope="module")
def teacher():
    return wb.load_teacher("pocket")


@pytest.mark.slow
@pytest.mark.parametrize("data", ["pocket", "easy-vqa"])
def test_the_teacher_sees_and_reads(data, teacher):
    # Five of each family: those with several pictures share a batch, and none is padded to them.
    result = wb.evaluate(teacher, data, limit=40, batch_size=5)
    assert result.score >= 0.85, str(result)


def test_all_weights_are_safetensors_of_two_bytes_a_number_and_few():
    files = [path for path in POCKET.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 60e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja"}
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) >= 1 + len(THERE)
    for path in weights:
        for name, tensor in load_file(path).items():
            kept = name.rpartition(".")[2] in Mamba2Mixer.float32_parameters
            assert tensor.dtype == (torch.float32 if kept else torch.bfloat16), (path.name, name)
            assert tensor.isfinite().all(), (path.name, name)


def test_every_hybrid_has_a_known_name():
    folders = {path.name for path in POCKET.iterdir() if path.is_dir()}
    assert folders <= {"teacher", *POCKET_HYBRIDS.values()}
    assert set(POCKET_HYBRIDS) == set(N_MAMBA)


@pytest.mark.parametrize("name", THERE)
def test_a_hybrid_loads_and_answers(name):
    student = wb.load(name)
    assert student.name == name
    assert student.plan.n_layers == 16
    assert len(student.plan.mamba_layers) == N_MAMBA[name]
    assert student.plan.method == "greedy"
    assert list(mixers(student.model)) == list(student.plan.mamba_layers)
    sample = wb.load_data("pocket", limit=1)[0]
    said = wb.answer(student, sample.images, sample.question, max_new_tokens=4)
    assert said.text
    assert said.ssm_bytes > 0
    assert (said.kv_bytes == 0) == (name == "pocket-100")


def copied(folder, tmp_path, without=""):
    """A copy of one model's folder, less one file; big files are linked."""
    (tmp_path / folder).mkdir()
    for path in (POCKET / folder).iterdir():
        if path.name != without:
            (tmp_path / folder / path.name).symlink_to(path)
    return tmp_path / folder


def test_a_teacher_without_its_weights_is_said_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(shelf, "POCKET", tmp_path)
    with pytest.raises(wb.WorkbenchError, match="teacher"):
        wb.load("pocket")
    folder = copied("teacher", tmp_path, without="model.safetensors")
    with pytest.raises(wb.WorkbenchError, match="holds no weights: no .safetensors file is there"):
        wb.load_teacher("pocket")
    with (POCKET / "teacher" / "model.safetensors").open("rb") as whole:
        (folder / "model.safetensors").write_bytes(whole.read(100_000))
    with pytest.raises(wb.WorkbenchError, match="cut short or damaged"):
        wb.load_teacher("pocket")


@pytest.mark.skipif(not THERE, reason="no hybrid is there")
def test_a_hybrid_without_its_weights_is_said_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(shelf, "POCKET", tmp_path)
    copied("teacher", tmp_path)
    name = THERE[0]
    folder = copied(POCKET_HYBRIDS[name], tmp_path, without="delta.safetensors")
    with pytest.raises(wb.WorkbenchError, match=r"the file delta\.safetensors is missing"):
        wb.load(name)
    plan = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").unlink()
    with pytest.raises(wb.WorkbenchError, match=r"the file plan\.json is missing"):
        wb.load(name)
    assert len(plan["plan"]["mamba_layers"]) == N_MAMBA[name]
    assert wb.load("pocket").plan is None
