"""evaluate, on models small enough to see."""

import json
import math

import pytest
import tiny
from trainees import PLAN, graded, samples

from workbench.data import load_data
from workbench.errors import WorkbenchError
from workbench.models.generation import answer_batch
from workbench.steps.conversion.initialization import convert
from workbench.steps.quality import evaluation
from workbench.steps.quality.evaluation import evaluate


@pytest.fixture(scope="module")
def teacher():
    return tiny.vlm()


@pytest.fixture
def student(teacher):
    return convert(teacher, PLAN, init="matvlm")


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
