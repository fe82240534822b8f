"""evaluate and profile, on models small enough to see."""

import json
import math

import pytest
import tiny
from trainees import PLAN, graded, samples

from workbench.data import load_data
from workbench.errors import WorkbenchError
from workbench.models.generation import Answer, answer_batch
from workbench.steps import evaluation, profiling
from workbench.steps.evaluation import evaluate
from workbench.steps.initialization import convert
from workbench.steps.profiling import profile


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


def test_a_profile_has_a_row_for_each_model_and_prompt_and_counts_bytes():
    models = [tiny.vlm(), tiny.vlm((0, 2)), tiny.vlm((0, 1, 2, 3))]
    for vlm in models:
        vlm.model.generation_config.eos_token_id = None
        vlm.tokenizer.eos_token = None
    asked = [samples(1)[0], samples(1, n_images=3)[0]]
    result = profile(models, asked, repeats=1, max_new_tokens=5)
    assert result.device == "cpu"
    assert len(result.rows) == 6
    for row, vlm in zip(result.rows, 2 * models, strict=True):
        assert row.weight_bytes == sum(p.nbytes for p in vlm.model.parameters())
        n_mamba = len(vlm.plan.mamba_layers) if vlm.plan else 0
        read = row.n_prompt_tokens + row.n_new_tokens - 1
        assert row.kv_bytes == (4 - n_mamba) * 2 * read * 48 * 4
        assert row.ssm_bytes == n_mamba * (3 * 48 * 3 + 4 * 12 * 12) * 4
        assert row.cache_bytes == row.kv_bytes + row.ssm_bytes
        assert row.n_new_tokens == 5
        assert 0 < row.prefill_ms < 60_000
        assert row.decode_tokens_per_s > 0
    short, long = result.rows[:3], result.rows[3:]
    assert len({row.n_prompt_tokens for row in short}) == 1
    assert long[0].n_prompt_tokens == short[0].n_prompt_tokens + 2 * (16 + 1)
    assert long[2].cache_bytes == short[2].cache_bytes
    assert json.loads(json.dumps(result.to_dict()))["rows"][5]["kv_bytes"] == 0
    assert len(str(result).splitlines()) == 7


def test_models_take_turns_and_the_first_round_does_not_count(teacher, student, monkeypatch):
    calls = []

    def fake(vlm, images, question, max_new_tokens):
        calls.append((vlm.name, question))
        n = len(calls)
        return Answer("", 10, 4, float(n), 1000.0 / n, 1, 2, 3)

    monkeypatch.setattr(profiling, "answer", fake)
    result = profile([teacher, student], samples(2), repeats=3)
    first, second = (sample.question for sample in samples(2))
    assert calls == 4 * [("tiny", first), ("tiny-50", first)] + 4 * [
        ("tiny", second),
        ("tiny-50", second),
    ]
    assert [row.model for row in result.rows] == ["tiny", "tiny-50"] * 2
    assert [row.prefill_ms for row in result.rows] == [5, 6, 13, 14]
    assert result.rows[0].decode_tokens_per_s == 1000 / 5


def test_what_cannot_be_profiled_is_said_in_a_sentence(teacher):
    for models, options in (([], {}), (teacher, {}), ([teacher], {"repeats": 0})):
        with pytest.raises(WorkbenchError, match="a list of at least one model, and at least one"):
            profile(models, samples(1), **options)
    with pytest.raises(WorkbenchError, match="at least one sample"):
        profile([teacher], [])


def test_the_profile_asks_for_a_description_and_for_several_pictures_by_itself():
    one, many = profiling._default_samples()
    assert one.family == "describe"
    assert len(many.images) == 4
