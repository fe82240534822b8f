"""compare: replies, and next tokens, of two models; and layer_fit."""

import json
import math
from pathlib import Path

import pytest
import tiny
import torch
from test_token_types import model as needs_pictures
from torch.nn import functional as F
from trainees import PLAN, graded, samples

from workbench.data import Sample, Texts
from workbench.data.conversations import IGNORE
from workbench.errors import WorkbenchError
from workbench.models.cache import CACHE
from workbench.models.hybrid import mixers
from workbench.models.prompts import prepare_inputs
from workbench.models.teacher import VLM
from workbench.steps.conversion.initialization import convert
from workbench.steps.conversion.scores import score_layers
from workbench.steps.conversion.selection import choose_layers
from workbench.steps.quality import evaluation, fidelity
from workbench.steps.quality.comparison import compare
from workbench.steps.quality.fidelity import layer_fit, token_fidelity
from workbench.steps.training.answers import answers_of
from workbench.steps.training.batches import collate
from workbench.steps.training.distillation import distill


@pytest.fixture(scope="module")
def teacher():
    return tiny.vlm()


@pytest.fixture(scope="module")
def student(teacher):
    return convert(teacher, PLAN, init="matvlm")


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


def plainly(teacher, student, some):
    """KL, agreement and both surprises of each answer token, from whole logits, one by one."""
    rows = []
    for sample in some:
        batch = collate(teacher, [sample])
        labels = batch.pop("labels")[0, 1:]
        with torch.no_grad():
            p, q = (vlm.model(**batch).logits[0, :-1].log_softmax(-1) for vlm in (teacher, student))
        for at in (labels != IGNORE).nonzero().flatten():
            kl = (p[at].exp() * (p[at] - q[at])).sum()
            rows.append(
                (kl, p[at].argmax() == q[at].argmax(), -p[at, labels[at]], -q[at, labels[at]])
            )
    return torch.tensor(rows).double()


@pytest.mark.parametrize("batch_size, at_once", [(1, 2**25), (3, 2**25), (5, 1)])
def test_fidelity_is_the_mean_over_answer_tokens(
    batch_size, at_once, teacher, student, monkeypatch
):
    monkeypatch.setattr(fidelity, "LOGITS_AT_ONCE", at_once)
    some = [*samples(3), *samples(1, n_images=2), *samples(1, n_images=0)]
    expected = plainly(teacher, student, some)
    found = token_fidelity(teacher, student, some, batch_size=batch_size)
    assert found.n_tokens == len(expected)
    numbers = (found.kl, found.token_agreement, found.teacher_nats, found.student_nats)
    assert numbers == pytest.approx(expected.mean(0).tolist(), rel=1e-4)
    assert found.perplexity == pytest.approx([math.exp(n) for n in numbers[2:]])


def test_compare_tells_fidelity_beside_the_replies(teacher, student):
    some = samples(4)
    comparison = compare(teacher, student, some, limit=3)
    alone = token_fidelity(teacher, student, some, limit=3)
    assert comparison.kl == pytest.approx(alone.kl)
    assert comparison.token_agreement == alone.token_agreement
    assert comparison.perplexity == pytest.approx(alone.perplexity)
    assert len(comparison.pairs) == 3
    assert "nats per answer token" in str(comparison)
    assert json.loads(json.dumps(comparison.to_dict()))["fidelity"]["kl"] == comparison.kl


def test_a_seed_is_another_world_of_questions(teacher, student, monkeypatch):
    monkeypatch.setattr(evaluation, "answer_batch", lambda vlm, asked, **_: ["x"] * len(asked))
    one, other = (
        [pair.question + pair.answer for pair in compare(
            teacher, student, "pocket", limit=3, seed=seed
        ).pairs]
        for seed in (0, 7)
    )  # fmt: skip
    assert one != other


def test_texts_are_compared_without_asking():
    teacher = VLM("letters", tiny.language_model("llama"), tiny.tokenizer())
    student = convert(teacher, PLAN, init="matvlm")
    texts = Texts("words", ["which bar is the tallest bar " * 9, "how many?"], context=32)
    comparison = compare(teacher, student, texts)
    assert comparison.agreement is None
    assert comparison.teacher is None
    assert comparison.pairs == ()
    packed = texts.batches(teacher.tokenizer, batch_size=1)
    logits, labels = [], []
    for number in range(len(packed.sequences)):
        batch = packed.batch(number)
        with torch.no_grad():
            logits.append(student.model(input_ids=batch["input_ids"]).logits[0, :-1])
        labels.append(batch["labels"][0, 1:])
    nats = F.cross_entropy(torch.cat(logits), torch.cat(labels), ignore_index=IGNORE).item()
    assert comparison.perplexity[1] == pytest.approx(math.exp(nats), rel=1e-4)
    assert comparison.kl > 0
    assert "same words" not in str(comparison)
    assert compare(teacher, student, texts, limit=1).fidelity.n_tokens == 31


def test_a_layer_is_compared_on_the_teachers_own_input(teacher, student):
    some = samples(2)
    fit = layer_fit(student, teacher, some, batch_size=2)
    batch = collate(teacher, some)
    heard = {}

    def listen(module, args, kwargs, output):
        heard["call"] = (args, kwargs | {CACHE: None}, output[0])

    layer = teacher.model.get_decoder().layers[2].self_attn
    hook = layer.register_forward_hook(listen, with_kwargs=True)
    with torch.no_grad():
        teacher.model(**{k: v for k, v in batch.items() if k != "labels"})
        hook.remove()
        args, kwargs, attended = heard["call"]
        mixed, _ = mixers(student.model)[2](*args, **kwargs)
    real = batch["attention_mask"].bool()
    mixed, attended = mixed[real], attended[real]
    row = fit.rows[1]
    assert row.layer == 2
    error = ((mixed - attended).norm() / attended.norm()).item()
    assert row.relative_error == pytest.approx(error, rel=1e-4)
    cosine = F.cosine_similarity(mixed.flatten(), attended.flatten(), dim=0).item()
    assert row.cosine == pytest.approx(cosine, rel=1e-4)
    assert fit.n_tokens == int(real.sum())
    assert json.loads(json.dumps(fit.to_dict()))["rows"][0]["layer"] == 0
    assert len(str(fit).splitlines()) == 4
    with pytest.raises(WorkbenchError, match="tiny has no Mamba-2 layer to look at"):
        layer_fit(teacher, student, some)


def test_data_without_end_needs_a_limit(teacher, student):
    batch = collate(teacher, samples(2))
    for data in ([batch], iter([batch, batch])):
        assert token_fidelity(teacher, student, data, limit=2).n_tokens > 0
    with pytest.raises(WorkbenchError, match="may have no end: say with limit="):
        token_fidelity(teacher, student, iter([batch]))
    with pytest.raises(WorkbenchError, match="limit=0 leaves no sequence"):
        token_fidelity(teacher, student, [batch], limit=0)
    silent = batch | {"labels": torch.full_like(batch["labels"], IGNORE)}
    with pytest.raises(WorkbenchError, match="no token of an answer in this data"):
        token_fidelity(teacher, student, [silent])
    with pytest.raises(WorkbenchError, match="no batch to read"):
        layer_fit(student, teacher, iter([]), limit=2)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_of_no_sequence_is_refused(batch_size, teacher, student):
    texts = Texts("words", ["which bar is the tallest bar"])
    for data in (samples(2), texts, [collate(teacher, samples(2))]):
        with pytest.raises(
            WorkbenchError, match=f"batch_size must be at least 1, not {batch_size}"
        ):
            token_fidelity(teacher, student, data, batch_size=batch_size)
    with pytest.raises(WorkbenchError, match="batch_size must be at least 1"):
        score_layers(teacher, donor=student, data=samples(2), batch_size=batch_size)
    with pytest.raises(WorkbenchError, match="batch_size must be at least 1"):
        answers_of(teacher, samples(2), batch_size=batch_size)


@pytest.mark.parametrize("max_length", [0, -5])
def test_samples_are_not_cut_to_nothing(max_length, teacher, student):
    for data in (samples(2), Texts("words", ["which bar is the tallest bar"])):
        with pytest.raises(
            WorkbenchError, match=f"max_length must be at least 1, not {max_length}"
        ):
            distill(student, teacher, data, steps=1, max_length=max_length)
    with pytest.raises(WorkbenchError, match="max_length must be at least 1"):
        collate(teacher, samples(2), max_length)


@pytest.mark.parametrize("name", ["pocket", Path("pocket")])
def test_the_name_of_data_is_no_data(name, teacher, student):
    for verb in (
        lambda: distill(student, teacher, name, steps=1),
        lambda: layer_fit(student, teacher, name),
        lambda: score_layers(teacher, donor=student, data=name),
        lambda: choose_layers(teacher, method="greedy", donor=student, data=name),
        lambda: answers_of(teacher, name),
    ):
        with pytest.raises(WorkbenchError, match=r"load it first, with wb\.load_data\('pocket'\)"):
            verb()
    with pytest.raises(WorkbenchError, match="Plain text asks nothing"):
        answers_of(teacher, ["which bar"])


def test_a_file_is_named_by_a_string_or_a_path(teacher, student, tmp_path):
    tiny.image(0).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nwhich bar?"}, {"from": "gpt", "value": "red"}]
    file = tmp_path / "x.json"
    file.write_text(json.dumps([{"image": "a.png", "conversations": turns}]))
    one, other = (compare(teacher, student, data, batch_size=1) for data in (file, str(file)))
    assert one.to_dict() == other.to_dict()
    (tmp_path / "a.txt").write_text("which bar is the tallest bar")
    assert compare(teacher, student, tmp_path / "a.txt").pairs == ()


def test_a_model_that_insists_on_pictures_says_so():
    vlm = needs_pictures("paligemma")
    for some in ([()], [(), (tiny.image(0, (8, 8)),)]):
        with pytest.raises(WorkbenchError, match="paligemma reads no question without a picture"):
            prepare_inputs(vlm, some, ["which bar?"] * len(some), 1)
        asked = [Sample(pictures, "which bar?", "red", "bars") for pictures in some]
        with pytest.raises(WorkbenchError, match="paligemma reads no question without a picture"):
            collate(vlm, asked)


def test_a_tokenizer_without_pad_and_end_tokens_pads(teacher):
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    vlm = VLM("letters", tiny.language_model("llama"), tokenizer)
    asked = prepare_inputs(vlm, [(), ()], ["which bar?", "how many bars are there?"], 1)
    assert asked["attention_mask"].sum(1).tolist() != [asked["input_ids"].shape[1]] * 2
    texts = [Sample((), s.question, s.answer, "text") for s in samples(2)]
    assert collate(vlm, texts)["labels"].ne(IGNORE).any(1).all()
