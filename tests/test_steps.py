"""choose_layers, convert, evaluate and compare, on models small enough to see."""

import json
import math

import pytest
import tiny
import torch
from trainees import PLAN, same, samples, tensors
from transformers import LlamaConfig, LlamaForCausalLM

from workbench.data import Sample, load_data
from workbench.errors import WorkbenchError
from workbench.models.generation import Answer, answer_batch
from workbench.models.hybrid import mixers
from workbench.models.teacher import VLM
from workbench.steps import evaluation
from workbench.steps.comparison import compare
from workbench.steps.evaluation import evaluate
from workbench.steps.initialization import convert
from workbench.steps.selection import choose_layers


def stack(n_layers):
    """All that choose_layers looks at: a family, and so many layers."""
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=n_layers))
    return VLM("stack", model, None)


@pytest.fixture(scope="module")
def teacher():
    return tiny.vlm()


@pytest.fixture
def student(teacher):
    return convert(teacher, PLAN)


@pytest.mark.parametrize(
    "n_layers, ratio, expected",
    [
        (32, 0.125, (0, 6, 12, 18)),
        (32, 0.25, (0, 4, 8, 12, 16, 20, 24, 28)),
        (32, 0.5, tuple(range(0, 32, 2))),
        (32, 1.0, tuple(range(32))),
        (16, 0.125, (0, 8)),
        (16, 0.25, (0, 4, 8, 12)),
        (16, 0.5, tuple(range(0, 16, 2))),
        (16, 1, tuple(range(16))),
        (10, 0.3, (0, 3, 6)),
        (16, 0, ()),
    ],
)
def test_layers_are_the_papers_or_evenly_spread(n_layers, ratio, expected):
    plan = choose_layers(stack(n_layers), ratio=ratio)
    assert plan.mamba_layers == expected
    assert plan.n_layers == n_layers
    assert plan.method == "even"
    assert ("MaTVLM's own list" in plan.reason) == (n_layers == 32 and 0 < ratio < 1)


def test_a_quarter_is_chosen_where_nothing_is_said():
    assert choose_layers(stack(32)) == choose_layers(stack(32), ratio=0.25)


def test_ratios_and_methods_that_do_not_exist_are_refused():
    for ratio in (-0.1, 1.01, math.nan):
        with pytest.raises(WorkbenchError, match=f"ratio={ratio} is not a share of layers"):
            choose_layers(stack(16), ratio=ratio)
    with pytest.raises(WorkbenchError, match=r"ratio=0.03 of 16 layers rounds to none.* 0.0625"):
        choose_layers(stack(16), ratio=0.03)
    assert choose_layers(stack(16), ratio=0.0625).mamba_layers == (0,)
    with pytest.raises(WorkbenchError, match="no selection method 'best'. Choose 'even'"):
        choose_layers(stack(16), method="best")


def test_convert_keeps_all_that_is_not_new(teacher):
    before = tensors(teacher)
    student = convert(teacher, PLAN)
    assert same(tensors(teacher), before)
    assert student.name == "tiny-50"
    assert student.plan == PLAN
    assert student.processor is teacher.processor
    assert list(mixers(student.model)) == [0, 2]
    after = tensors(student)
    new = {name.split(".self_attn.")[1] for name in after.keys() - before.keys()}
    assert new == {
        "A_log",
        "D",
        "dt_bias",
        "dt_weight",
        "z_proj.weight",
        "conv1d.weight",
        "conv1d.bias",
        "norm.weight",
    }
    gone = before.keys() - after.keys()
    assert len(gone) == 2 * 4
    assert all(".self_attn." in name and name.endswith(".bias") for name in gone)
    for name in before.keys() & after.keys():  # the projections' weights among them
        assert torch.equal(before[name], after[name]), name


@pytest.mark.parametrize("init", ["matvlm", "random"])
def test_a_seed_fixes_a_student(init, teacher):
    one, again, other = (tensors(convert(teacher, PLAN, init=init, seed=k)) for k in (3, 3, 4))
    assert same(one, again)
    differ = {name for name in one if not torch.equal(one[name], other[name])}
    drawn = ["A_log", "conv1d.bias", "conv1d.weight", "dt_bias", "dt_weight", "z_proj.weight"]
    if init == "random":
        drawn += [f"{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "dense")]
    assert sorted(name.split("self_attn.")[1] for name in differ) == sorted(2 * drawn)
    first, second = (name for name in sorted(one) if name.endswith("A_log"))
    assert not torch.equal(one[first], one[second])


def test_random_is_a_control_without_attention(teacher):
    matvlm, control = (convert(teacher, PLAN, init=init) for init in ("matvlm", "random"))
    for index in PLAN.mamba_layers:
        ours, theirs = mixers(matvlm.model)[index], mixers(control.model)[index]
        drawn = {}
        for name in ("q_proj", "k_proj", "v_proj", "dense"):
            weight = drawn[name] = getattr(theirs, name).weight.detach()
            assert not torch.equal(weight, getattr(ours, name).weight)
            assert weight.abs().max() <= weight.shape[1] ** -0.5
        assert torch.equal(ours.z_proj.weight, theirs.z_proj.weight)
        # Independent draws: no matrix repeats another's numbers, wherever they stand in it.
        drawn["z_proj"] = theirs.z_proj.weight.detach()
        numbers = torch.cat([weight.flatten() for weight in drawn.values()])
        steps = numbers.sort().values.diff()
        assert (steps < 1e-7).float().mean() < 0.1
    changed = {n for n, t in tensors(control).items() if not torch.equal(t, tensors(matvlm)[n])}
    assert len(changed) == 2 * 4
    assert all(".self_attn." in name for name in changed)


def test_an_unknown_init_or_a_strange_plan_is_refused(teacher, student):
    with pytest.raises(WorkbenchError, match=r"no init 'zeros'. Choose one of matvlm, random"):
        convert(teacher, PLAN, init="zeros")
    with pytest.raises(WorkbenchError, match="for a model of 32 layers, but this one has 4"):
        convert(teacher, choose_layers(stack(32)))
    with pytest.raises(WorkbenchError, match="hybrid already"):
        convert(student, PLAN)


def test_an_empty_plan_is_the_teacher_again(teacher):
    student = convert(teacher, choose_layers(teacher, ratio=0))
    assert student.name == "tiny-0"
    assert same(tensors(student), tensors(teacher))
    comparison = compare(teacher, student, samples(5))
    assert comparison.agreement == 1.0
    assert comparison.partings == ()


def graded(replies, families=None):
    """An answer_batch that says these words, and samples with the answers 'yes'."""
    families = families or ["only"] * len(replies)
    some = [Sample((), f"{i}?", "yes", family) for i, family in enumerate(families)]
    said = {f"{i}?": reply for i, reply in enumerate(replies)}

    def fake(vlm, asked, **options):
        return [said[sample.question] for sample in asked]

    return some, fake


def test_a_score_is_the_mean_over_families(teacher, monkeypatch):
    families = ["a", "b", "a", "b", "a", "a"]
    some, fake = graded(["yes", "no", "Yes.", "no", "no", "no"], families)
    monkeypatch.setattr(evaluation, "answer_batch", fake)
    result = evaluate(teacher, some)
    assert result.by_family == {"a": 0.5, "b": 0.0}
    assert result.score == 0.25
    assert result.stderr == pytest.approx(math.sqrt((1 / 3) / 4) / 2)
    assert [r.reply for r in result.records] == ["yes", "no", "Yes.", "no", "no", "no"]
    assert [r.score for r in result.records] == [1, 0, 1, 0, 0, 0]
    assert json.loads(json.dumps(result.to_dict())) == {
        "model": "tiny",
        "data": "your samples",
        "n": 6,
        "score": 0.25,
        "stderr": result.stderr,
        "by_family": {"a": 0.5, "b": 0.0},
    }
    lines = str(result).splitlines()
    assert lines[0].startswith("tiny on your samples: 25.0% ± ")
    assert lines[1].split() == ["a", "50.0%", "n", "=", "4"]
    assert lines[2].split() == ["b", "0.0%", "n", "=", "2"]


def test_a_limit_holds_for_names_and_for_samples_of_your_own(teacher, monkeypatch):
    some, fake = graded(["yes"] * 5)
    monkeypatch.setattr(evaluation, "answer_batch", fake)
    assert [r.question for r in evaluate(teacher, some, limit=2).records] == ["0?", "1?"]
    assert len(evaluate(teacher, some, limit=99).records) == 5
    monkeypatch.setattr(evaluation, "answer_batch", lambda vlm, asked, **_: ["x"] * len(asked))
    named = evaluate(teacher, "pocket", split="unseen", limit=7, seed=3)
    assert named.data == "pocket/unseen"
    assert [r.question for r in named.records] == [
        sample.question for sample in load_data("pocket", split="unseen", limit=7, seed=3)
    ]
    for empty in ([], load_data("pocket", limit=3)[:0]):
        with pytest.raises(WorkbenchError, match="no sample to ask: the data set is empty"):
            evaluate(teacher, empty)
    with pytest.raises(WorkbenchError, match="no sample to ask"):
        evaluate(teacher, some, limit=0)
    with pytest.raises(WorkbenchError, match="no data set named 'vqa'"):
        evaluate(teacher, "vqa")


@pytest.mark.parametrize("layers", [None, (0, 2)], ids=["teacher", "hybrid"])
def test_replies_keep_the_order_of_samples_whatever_the_batch_size(layers):
    vlm = tiny.vlm(layers)
    mixed = [*samples(3, n_images=2), *samples(4), *samples(2, n_images=0)]
    progress = []

    def note(answered, every):
        progress.append((answered, every))

    results = [
        evaluate(vlm, mixed, batch_size=n, max_new_tokens=6, on_progress=note) for n in (1, 4, 9)
    ]
    asked = [(s.family, s.question, s.answer) for s in mixed]
    for result in results:
        assert [(r.family, r.question, r.answer) for r in result.records] == asked
    replies = [[r.reply for r in result.records] for result in results]
    assert replies[0] == replies[1] == replies[2]
    assert replies[0] == answer_batch(vlm, mixed, max_new_tokens=6, batch_size=1)
    assert len(set(replies[0])) > 1
    assert progress[:9] == [(n, 9) for n in range(1, 10)]


def test_compare_pairs_the_replies_and_shows_where_they_part(teacher, student, monkeypatch):
    some, teacher_says = graded(["yes", "no", "yes", "yes "])
    _, student_says = graded(["yes", "yes", "no", "yes"])

    def fake(vlm, asked, **options):
        return (teacher_says if vlm is teacher else student_says)(vlm, asked)

    monkeypatch.setattr(evaluation, "answer_batch", fake)
    comparison = compare(teacher, student, some)
    assert comparison.agreement == 0.5
    assert [pair.question for pair in comparison.partings] == ["1?", "2?"]
    parted = comparison.partings[0]
    assert (parted.teacher_reply, parted.student_reply) == ("no", "yes")
    assert (parted.teacher_score, parted.student_score) == (0.0, 1.0)
    assert comparison.teacher.model == "tiny"
    assert comparison.student.model == "tiny-50"
    plain = json.loads(json.dumps(comparison.to_dict()))
    assert plain["agreement"] == 0.5
    assert len(plain["partings"]) == 2
    assert "same words on 50.0% of 4 questions" in str(comparison)
    assert "'no' / 'yes'" in str(comparison)
    assert len(compare(teacher, student, some, limit=3).pairs) == 3
    with pytest.raises(WorkbenchError, match="with itself says nothing"):
        compare(teacher, teacher, some)
