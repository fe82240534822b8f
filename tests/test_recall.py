"""The recall probe: every question can be answered from its own prompt, and only from there."""

import re

import pytest
import tiny

from workbench.data import load_data
from workbench.data.recall import FILLER, TOKENS_PER_FACT, load_recall
from workbench.errors import WorkbenchError
from workbench.models.teacher import VLM
from workbench.steps.quality import evaluation
from workbench.steps.quality.evaluation import evaluate

FACT = r"The number of (\w+)'s (\w+) is (\d{4})\."


def test_the_answer_stands_in_the_prompt_once():
    data = load_data("recall", length=(128, 512), limit=12)
    assert data.families == ("128", "512")
    for sample in data:
        told = {(name, thing): code for name, thing, code in re.findall(FACT, sample.question)}
        assert len(told) == 4
        assert len(set(told.values())) == 4
        asked = re.search(r"What is the number of (\w+)'s (\w+)\?", sample.question)
        assert sample.answer == f"The number of {asked[1]}'s {asked[2]} is {told[asked.groups()]}."
        assert sample.question.count(sample.answer) == 1
        assert sample.images == ()
        assert sample.score(f"{sample.answer}\n\nThe number of") == 1
        assert sample.score(f"It is {sample.answer[-5:-1]}") == 1
        assert sample.score("To find the number") == sample.score("It is 0000.") == 0


def test_prompts_grow_with_the_length_and_facts_do_too_where_asked():
    short, long = load_recall(lengths=(128, 1024), limit=2)
    assert 5 < len(long.question) / len(short.question) < 12
    assert any(sentence in long.question for sentence in FILLER)
    few, many = load_recall(lengths=(128, 1024), n_facts=None, limit=2)
    assert len(re.findall(FACT, few.question)) == 128 // TOKENS_PER_FACT
    assert len(re.findall(FACT, many.question)) == 1024 // TOKENS_PER_FACT


def test_facts_are_the_same_for_a_seed():
    one, again, other = (
        [s.question for s in load_data("recall", length=128, limit=5, seed=k)] for k in (1, 1, 2)
    )
    assert one == again
    assert not set(one) & set(other)


def test_what_cannot_be_asked_is_said():
    with pytest.raises(WorkbenchError, match=r"\[32\] do not all hold 4 facts: .* at least 56"):
        load_data("recall", length=32)
    with pytest.raises(WorkbenchError, match="limit=0 leaves no sample"):
        load_data("recall", length=128, limit=0)


def test_it_is_reported_by_length():
    vlm = VLM("letters", tiny.language_model("llama"), tiny.tokenizer())
    vlm.model.config.max_position_embeddings = 4096
    result = evaluate(vlm, load_data("recall", length=(64, 128), limit=4), max_new_tokens=3)
    assert set(result.by_family) == {"64", "128"}


def test_questions_of_one_length_are_answered_together(monkeypatch):
    asked = []

    def answer(vlm, samples, **_):
        asked.extend(samples)
        return [sample.answer for sample in samples]

    monkeypatch.setattr(evaluation, "answer_batch", answer)
    vlm = VLM("letters", tiny.language_model("llama"), tiny.tokenizer())
    result = evaluate(vlm, load_data("recall", length=(128, 1024), limit=8))
    assert [sample.family for sample in asked] == ["128"] * 4 + ["1024"] * 4
    assert result.score == 1
