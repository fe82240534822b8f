"""python -m workbench: settings from a file, errors in a sentence."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import tiny
from trainees import same, samples, tensors

from workbench import __main__ as command
from workbench.__main__ import main
from workbench.errors import WorkbenchError
from workbench.models.hybrid import mixers
from workbench.models.teacher import load, save
from workbench.steps import headless
from workbench.steps.headless import distill_from, read_settings
from workbench.steps.training.checkpoints import layers_of
from workbench.steps.training.stages import stage_from_dict
from workbench.steps.training.trackers import track


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    save(tiny.vlm(), folder)
    return folder


@pytest.fixture
def settings(tmp_path, teacher_folder):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    records = []
    for number, sample in enumerate(samples(6)):
        sample.images[0].save(pictures / f"{number}.png")
        said = (("human", sample.question), ("gpt", sample.answer))
        conversation = [{"from": who, "value": text} for who, text in said]
        records.append({"id": number, "image": f"{number}.png", "conversations": conversation})
    (tmp_path / "talk.json").write_text(json.dumps(records))
    return {
        "teacher": str(teacher_folder),
        "layers": [0, 2],
        "init": "matvlm",
        "data": {"name": str(tmp_path / "talk.json"), "images": str(pictures)},
        "steps": 4,
        "batch_size": 2,
        "folder": str(tmp_path / "run"),
        "device": "cpu",
    }


def written(tmp_path, settings, name="settings.json"):
    path = tmp_path / name
    path.write_text(json.dumps(settings))
    return str(path)


def test_a_run_from_a_file_ends_in_a_model_that_loads(tmp_path, settings, capsys, monkeypatch):
    assert main(["distill", written(tmp_path, settings)]) == 0
    said = capsys.readouterr().out
    assert "step 1 (align): layer loss" in said
    assert "4 steps in" in said
    student = load(tmp_path / "run" / "model")
    assert list(mixers(student.model)) == [0, 2]
    assert (tmp_path / "run" / "step-00000004" / "weights.safetensors").is_file()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4
    assert main(["distill", written(tmp_path, settings)]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert main(["distill", written(tmp_path, settings), "--resume"]) == 0
    talk = settings["data"]
    model, scores = str(tmp_path / "run" / "model"), "~/scores.json"
    monkeypatch.setenv("HOME", str(tmp_path))
    asked = ["evaluate", model, talk["name"], "--images", talk["images"]]
    assert main([*asked, "--limit", "3", "--device", "cpu", "--json", scores]) == 0
    assert json.loads((tmp_path / "scores.json").read_text())["n"] == 3
    assert "model on talk.json" in capsys.readouterr().out


def test_layers_are_aligned_searched_and_found_again(settings, monkeypatch):
    del settings["layers"]
    settings |= {"align": 2, "method": "greedy", "ratio": 0.5}
    unbroken = distill_from(settings | {"folder": settings["folder"] + "-unbroken"})
    with pytest.raises(WorkbenchError, match="alignment was stopped after 1 of 2 steps"):
        distill_from(settings, stop=lambda: True)
    stopped = distill_from(settings, stop=iter([False, False, True]).__next__)
    assert (unbroken.stopped, stopped.stopped, stopped.steps) == (False, True, 2)
    folder = Path(settings["folder"])
    layers = layers_of(folder)
    assert len(layers) == tiny.N_LAYERS // 2

    def asked(*_, **__):
        raise AssertionError("asked again")

    for name in ("align", "_chosen"):
        monkeypatch.setattr(headless, name, asked)
    distill_from(settings | {"resume": True})
    found, expected = load(folder / "model"), load(f"{folder}-unbroken/model")
    assert (found.plan.mamba_layers, found.plan.method) == (layers, "greedy")
    with pytest.raises(WorkbenchError, match="holds a run with 2 Mamba-2 layers, and the ratio a"):
        distill_from(settings | {"resume": True, "ratio": 0.25})
    assert same(tensors(found), tensors(expected))


def test_a_run_writes_for_tensorboard_too(tmp_path, settings):
    seen = []
    distill_from(settings | {"track": "tensorboard"}, on_step=seen.append)
    assert [row.step for row in seen] == [1, 2, 3, 4]
    events = b"".join(p.read_bytes() for p in (tmp_path / "run").rglob("events.out.tfevents.*"))
    for name in (b"kl_nats", b"layer_losses/1", b"tokens_per_s"):
        assert name in events
    assert b"ce_nats" not in events  # this recipe has none


def test_trackers_that_are_not_there_are_named(tmp_path, monkeypatch):
    with pytest.raises(WorkbenchError, match="choose tensorboard or trackio"):
        track("paper", tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(WorkbenchError, match="pip install trackio"):
        track("trackio", tmp_path)


def test_stages_stand_in_the_file_and_toml_reads_alike(tmp_path, settings):
    stages = [
        {"name": "one", "steps": 1, "layer_weight": 1, "trains": "mixers"},
        {"name": "two", "steps": 2, "kl_weight": 1, "kl_kind": "reverse"},
    ]
    del settings["steps"]
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items() if name != "data"]
    lines += ["[data]", *(f"{name} = {json.dumps(v)}" for name, v in settings["data"].items())]
    for stage in stages:
        lines += ["[[stages]]", *(f"{name} = {json.dumps(v)}" for name, v in stage.items())]
    path = tmp_path / "settings.toml"
    path.write_text("\n".join(lines))
    assert read_settings(path) == settings | {"stages": stages}
    run = distill_from(read_settings(path))
    assert [row.stage for row in run.rows] == ["one", "two", "two"]


def test_a_run_that_is_asked_to_end_goes_on_later(tmp_path, settings, monkeypatch, capsys):
    path = written(tmp_path, settings)
    real = headless.distill

    def pressed(*args, on_step=None, **options):
        def tell(row):
            on_step(row)
            if row.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        return real(*args, on_step=tell, **options)

    monkeypatch.setattr(headless, "distill", pressed)
    assert main(["distill", path]) == 0
    assert "stopped before step 3 of 4" in capsys.readouterr().out
    assert not (tmp_path / "run" / "model").exists()
    monkeypatch.undo()
    assert main(["distill", path, "--resume"]) == 0
    assert main(["distill", path, "--folder", str(tmp_path / "whole")]) == 0
    one, other = (load(tmp_path / name / "model") for name in ("run", "whole"))
    assert same(tensors(one), tensors(other))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(
    "change, words",
    [
        ({"ration": 0.5}, "has 'ration', which means nothing here; there are teacher, student"),
        ({"data": {"nam": "x"}}, "has 'nam', which means nothing here; there are name, split"),
        ({"steps": "many"}, "steps in .* is 'many': it must be of kind int"),
        ({"steps": True}, "steps in .* is True"),
        ({"ratio": 0.5}, "give layers=.* and neither a ratio nor another method"),
        ({"method": "greedy"}, "give layers=.* and neither a ratio nor another method"),
        ({"recipe": "matvlm", "stages": []}, "have a recipe and stages: keep one"),
        ({"student": "x"}, "have a student and layers: a student has its layers already"),
        ({"stages": [{"name": "s", "step": 1}]}, "A stage has no 'step'"),
        ({"stages": [5]}, "A stage is an object with keys, not 5"),
        ({"stages": [{"name": "s", "steps": "10"}]}, "steps='10': it must be of kind int"),
        ({"layers": ["a"]}, "a list of whole numbers, such as .*, not .'a'"),
        ({"layers": [[0]]}, "a list of whole numbers"),
        ({"layers": [0.7]}, "a list of whole numbers"),
        ({"data": {"images": "pics"}}, "data in the settings needs a name"),
        ({"data": {"split": "train"}}, "data in the settings needs a name"),
        ({"teacher": "nobody"}, "no model or folder called 'nobody'"),
        ({"layers": [0, 9]}, "names layer 9, but the model has 4 layers"),
        ({"data": "nothing"}, "no data set named 'nothing'"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_in_a_sentence(tmp_path, settings, change, words):
    with pytest.raises(WorkbenchError, match=words):
        distill_from(read_settings(written(tmp_path, settings | change)))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"folder": "."}, "holds a run already"),
        ({"method": "gredy"}, "no selection method 'gredy'"),
        ({"method": "explicit"}, "Layers named by hand go with"),
        ({"ratio": 50}, "ratio=50 is not a share of layers"),
        ({"ratio": 0.0}, "leave no layer to train"),
        ({"lr": -1.0}, "lr=-1.0 is no learning rate"),
        ({"steps": 0}, "steps=0 trains nothing"),
        ({"recipe": "paper"}, "no recipe 'paper'"),
        ({"save_every": 0}, "save_every=0 trains nothing"),
        ({"track": "paper"}, "choose tensorboard or trackio"),
    ],
)
def test_what_can_be_checked_is_checked_before_an_alignment(
    tmp_path, settings, change, words, monkeypatch
):
    def aligned(*_, **__):
        raise AssertionError("aligned first")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(headless, "align", aligned)
    (tmp_path / "step-00000004").mkdir()
    (tmp_path / "step-00000004" / "state.json").write_text("{}")
    del settings["layers"]
    with pytest.raises(WorkbenchError, match=words):
        distill_from(settings | {"align": 2, "method": "greedy"} | change)


@pytest.mark.parametrize("target", ["no/such/x.json", "~/none/x.json", "."])
def test_where_scores_go_is_known_before_any_question(tmp_path, target, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(command, "evaluate", None)
    assert main(["evaluate", "pocket", "pocket", "--json", target]) == 2
    assert "name a file in a folder that is there" in capsys.readouterr().err


def test_files_that_are_no_settings_are_refused(tmp_path, settings, capsys):
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "bad.toml").write_text("a = ")
    for name, words in (
        ("list.json", "must be an object with keys"),
        ("bad.toml", "cannot be read"),
        ("none.json", "cannot be read"),
        ("settings.yaml", "give a .json or a .toml file"),
    ):
        assert main(["distill", str(tmp_path / name)]) == 2
        assert words in capsys.readouterr().err
    del settings["folder"], settings["teacher"]
    with pytest.raises(WorkbenchError, match="The settings need teacher and folder"):
        distill_from(settings)


def test_a_hybrid_can_be_trained_further(tmp_path, settings):
    distill_from(settings)
    before = tensors(load(tmp_path / "run" / "model"))
    for name in ("layers", "init"):
        del settings[name]
    more = settings | {"student": str(tmp_path / "run" / "model"), "folder": str(tmp_path / "more"),
                       "recipe": "matvlm", "ratio": 0.5}  # fmt: skip
    with pytest.raises(WorkbenchError, match="a student and ratio"):
        distill_from(more)
    del more["ratio"]
    distill_from(more)
    after = tensors(load(tmp_path / "more" / "model"))
    assert not same(before, after)


def test_the_settings_in_the_readme_are_settings(tmp_path):
    text = (tiny.HOUSE / "README.md").read_text()
    example = re.search(r"```json\n(.*?)```", text, re.S)[1]
    (tmp_path / "settings.json").write_text(example)
    settings = read_settings(tmp_path / "settings.json")
    assert [stage_from_dict(stage).name for stage in settings["stages"]] == ["align", "distill"]
