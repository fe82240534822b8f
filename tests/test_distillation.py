"""distill and the batches it reads, on models small enough to see."""

import copy
import json
import math

import pytest
import tiny
import torch
from tokenizers.processors import TemplateProcessing
from torch.nn import functional as F
from trainees import PLAN, same, samples, tensors
from transformers import AutoProcessor, LlavaForConditionalGeneration

from workbench.data import Sample, load_data
from workbench.data.conversations import IGNORE, Encoder, TrainingBatches, pixels
from workbench.errors import WorkbenchError
from workbench.models.families import decoder_layers
from workbench.models.plan import Plan
from workbench.models.prompts import prepare_inputs
from workbench.models.sources.pocket_model import pocket_config
from workbench.models.teacher import POCKET, VLM
from workbench.steps.conversion.initialization import convert
from workbench.steps.conversion.selection import choose_layers
from workbench.steps.training import objective
from workbench.steps.training.batches import as_batches, collate, ready_batch
from workbench.steps.training.distillation import Stage, distill
from workbench.steps.training.stages import trained_parameters


@pytest.fixture(scope="module")
def teacher():
    return tiny.vlm()


@pytest.fixture
def student(teacher):
    return convert(teacher, PLAN, init="matvlm")


def test_collate_reads_a_prompt_as_generation_does_and_labels_the_answer(teacher):
    some = [*samples(3), *samples(1, n_images=2), Sample((), "and?", "no", "text")]
    batch = collate(teacher, some)
    assert batch["pixel_values"].shape == (5, 3, 16, 16)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["labels"].shape
    for row, sample in enumerate(some):
        asked = prepare_inputs(teacher, [sample.images], [sample.question], 1)["input_ids"][0]
        n = int(batch["attention_mask"][row].sum())
        ids, labels = batch["input_ids"][row], batch["labels"][row]
        assert torch.equal(ids[: len(asked)], asked)
        assert (labels[: len(asked)] == IGNORE).all()
        assert (labels[n:] == IGNORE).all()
        assert torch.equal(labels[len(asked) : n], ids[len(asked) : n])
        assert ids[n - 1] == teacher.tokenizer.eos_token_id
        spoken = teacher.tokenizer.decode(ids[len(asked) : n - 1]).strip()
        assert spoken == sample.answer


def test_collate_asks_a_language_model_and_writes_the_first_token_once():
    tokenizer = tiny.tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    vlm = VLM("words", tiny.language_model("llama"), tokenizer)
    some = [Sample((), sample.question, sample.answer, "text") for sample in samples(2)]
    for template in (None, "<s>{{ messages[0]['content'] }}:"):
        tokenizer.chat_template = template
        batch = collate(vlm, some)
        assert "pixel_values" not in batch
        assert (batch["input_ids"] == 1).sum(1).tolist() == [1, 1]
        for row, sample in enumerate(some):
            asked = prepare_inputs(vlm, [()], [sample.question], 1)["input_ids"][0]
            assert torch.equal(batch["input_ids"][row, : len(asked)], asked)
            assert batch["labels"][row].ne(IGNORE).nonzero()[0] == len(asked)


def test_samples_come_in_a_new_order_each_time_round(teacher, monkeypatch):
    collating = "workbench.steps.training.batches.collate"
    monkeypatch.setattr(collating, lambda vlm, some, longest: list(some))

    def rounds(seed):
        batches = as_batches(teacher, list(range(10)), batch_size=4, seed=seed)
        drawn = [next(batches) for _ in range(6)]
        assert [len(batch) for batch in drawn] == [4, 4, 2] * 2
        return sum(drawn[:3], []), sum(drawn[3:], [])

    first, second = rounds(0)
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert rounds(0) == (first, second)
    assert rounds(1)[0] != first


def train(teacher, data, steps=6, recipe="matvlm", **options):
    student = convert(teacher, PLAN, init="matvlm")
    options = {"steps": steps, "batch_size": 4, "recipe": recipe} | options
    return student, distill(student, teacher, data, **options)


def test_distilling_lowers_both_losses_and_touches_mixers_and_projector_only(teacher, student):
    teacher_before, before = tensors(teacher), tensors(student)
    run = distill(student, teacher, samples(4), recipe="matvlm", steps=40, lr=5e-3)
    first, last = run.rows[0], run.rows[-1]
    assert last.layer_loss < 0.8 * first.layer_loss
    assert last.kl_nats < 0.5 * first.kl_nats
    assert same(tensors(teacher), teacher_before)
    after = tensors(student)
    trained = set(trained_parameters(student, "mixers+projector"))
    assert run.n_trainable == sum(after[name].numel() for name in trained)
    for name in before:
        mine = any(f"layers.{i}.self_attn." in name for i in (0, 2)) and "language" in name
        assert (name in trained) == (mine or "projector" in name), name
        assert torch.equal(before[name], after[name]) == (name not in trained), name
    assert not student.model.training
    for vlm in (teacher, student):
        assert all(p.grad is None and p.requires_grad for p in vlm.model.parameters())


def test_a_run_keeps_its_rows_and_says_what_it_did(teacher):
    seen = []
    _, run = train(teacher, samples(4), log_every=1, on_step=seen.append)
    _, again = train(teacher, samples(4))
    _, other = train(teacher, samples(4), seed=1)
    _, thinner = train(teacher, samples(4), steps=6, log_every=4)
    assert tuple(seen) == run.rows
    assert [row.step for row in run.rows] == [1, 2, 3, 4, 5, 6]
    history = [[(r.loss, r.layer_loss, r.kl_nats, r.lr) for r in one.rows] for one in (run, again)]
    assert history[0] == history[1]
    assert [row.loss for row in other.rows] != [row.loss for row in run.rows]
    assert [row.step for row in thinner.rows] == [4, 6]
    for row, steps in zip(thinner.rows, (run.rows[:4], run.rows[4:]), strict=True):
        for value in ("loss", "layer_loss", "kl_nats"):
            mean = sum(getattr(step, value) for step in steps) / len(steps)
            assert getattr(row, value) == pytest.approx(mean, rel=1e-5)
    for row in run.rows:
        assert row.loss == pytest.approx(row.layer_loss + row.kl_nats, rel=1e-5)
    assert [row.seconds for row in run.rows] == sorted(row.seconds for row in run.rows)
    assert run.seconds >= run.rows[-1].seconds > 0
    assert [row.eta_s > 0 for row in run.rows] == 5 * [True] + [False]
    assert run.n_tokens == 6 * int(collate(teacher, samples(4))["attention_mask"].sum())
    assert json.loads(json.dumps(run.to_dict()))["rows"][2]["step"] == 3
    assert "tiny-50: 6 steps in" in str(run)
    assert f"{run.n_trainable:,} parameters" in str(run)


def test_the_learning_rate_warms_up_and_decays_to_zero(teacher):
    stage = Stage("s", 100, kl_weight=1)
    rates = [stage.rate(step) for step in range(1, 101)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-2:] == pytest.approx([2 / 96, 1 / 96])  # the next step would stand still
    assert Stage("s", 1, kl_weight=1).rate(1) == 1
    stages = [Stage("one", 4, kl_weight=1, lr=2e-3, lr_new=6e-3), Stage("two", 2, ce_weight=1)]
    _, run = train(teacher, samples(2), recipe=stages, steps=None)
    assert [row.stage for row in run.rows] == 4 * ["one"] + 2 * ["two"]
    assert [row.lr for row in run.rows[:4]] == pytest.approx([2e-3, 1.5e-3, 1e-3, 0.5e-3])
    assert [row.lr_new for row in run.rows] == pytest.approx(
        [6e-3, 4.5e-3, 3e-3, 1.5e-3, 1e-3, 0.5e-3]
    )
    _, faster = train(teacher, samples(2), recipe=stages, steps=None, lr=4e-3)
    assert [row.lr_new for row in faster.rows[::4]] == pytest.approx([12e-3, 4e-3])


def test_a_student_that_equals_its_teacher_has_nothing_to_learn(teacher, student):
    for i in PLAN.mamba_layers:
        attention = copy.deepcopy(decoder_layers(teacher.model)[i].self_attn)
        decoder_layers(student.model)[i].self_attn = attention
    run = distill(student, teacher, samples(4), recipe="matvlm", steps=3, batch_size=4)
    assert run.rows[0].layer_loss < 1e-6
    assert abs(run.rows[0].kl_nats) < 1e-6
    # The distance has no slope at zero; it must not become NaN there.
    assert all(math.isfinite(row.loss) for row in run.rows)


def test_the_hidden_loss_is_a_share_of_the_teachers_final_states(teacher, student):
    batch = collate(teacher, samples(4))
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with torch.no_grad():
        theirs, ours = (vlm.model.base_model(**inputs)[0] for vlm in (teacher, student))
    real = batch["attention_mask"].bool()
    wanted = (ours - theirs)[real].square().sum() / theirs[real].square().sum()
    stage = Stage("end", 3, hidden_weight=2.0)
    run = distill(student, teacher, iter(3 * [batch]), recipe=[stage])
    assert run.rows[0].hidden_loss == pytest.approx(float(wanted), rel=1e-5)
    assert run.rows[0].loss == pytest.approx(2 * run.rows[0].hidden_loss)
    assert run.rows[0].kl_nats is None
    assert run.rows[-1].hidden_loss < run.rows[0].hidden_loss
    assert "hidden loss" in str(run)


def test_bfloat16_is_another_precision_of_the_same_training(teacher):
    exact, rounded = (
        train(teacher, samples(4), 4, batch_size=2, bf16=bf16)[1].rows[-1] for bf16 in (None, True)
    )
    for name in ("layer_loss", "kl_nats"):
        wanted, found = getattr(exact, name), getattr(rounded, name)
        assert found != wanted
        assert found == pytest.approx(wanted, rel=5e-2)


def test_losses_are_means_over_tokens(teacher):
    batch = collate(teacher, samples(4))
    twice = {name: torch.cat([tensor, tensor]) for name, tensor in batch.items()}
    padding = {"input_ids": 0, "attention_mask": 0, "labels": IGNORE}
    longer = {n: F.pad(batch[n], (0, 7), value=v) for n, v in padding.items()}
    longer["pixel_values"] = batch["pixel_values"]
    one, two, padded = (train(teacher, iter([b]), 1)[1].rows[0] for b in (batch, twice, longer))
    assert two.layer_loss == pytest.approx(one.layer_loss, rel=1e-5)
    assert two.kl_nats == pytest.approx(one.kl_nats, rel=1e-5)
    assert padded.kl_nats == pytest.approx(one.kl_nats, rel=1e-5)
    assert padded.layer_loss == pytest.approx(one.layer_loss, rel=1e-5)


@pytest.mark.parametrize("fails", [False, True], ids=["done", "failed"])
def test_hooks_and_compiled_layers_are_taken_off_again(teacher, student, monkeypatch, fails):
    compiled = []

    def fake_compile(forward, dynamic):
        compiled.append(forward)
        return lambda *args, **kwargs: forward(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", fake_compile)
    layers = [*decoder_layers(teacher.model), *decoder_layers(student.model)]

    def hooked():
        """Which layers distillation listens to; transformers has hooks of its own."""
        hooks = [layer._forward_hooks.values() for layer in decoder_layers(teacher.model)]
        ours = [[h for h in some if h.__module__ == objective.__name__] for some in hooks]
        return [i for i, some in enumerate(ours) if some]

    def stop(row):
        assert all("forward" in vars(layer) for layer in layers)
        assert hooked() == [0, 2]
        if fails:
            raise RuntimeError("anything")

    options = {"steps": 2, "compile_layers": True, "on_step": stop}
    if fails:
        with pytest.raises(RuntimeError, match="anything"):
            distill(student, teacher, samples(2), **options)
    else:
        distill(student, teacher, samples(2), **options)
    assert len(compiled) == 8 + 1
    assert not any("forward" in vars(layer) for layer in layers)
    assert hooked() == []
    assert "forward" not in vars(student.model.base_model.vision_tower)
    assert all(p.requires_grad for p in student.model.parameters())


def test_nothing_is_left_behind_when_the_run_cannot_even_begin(teacher, student, monkeypatch):
    calls = []

    def fails_at_last(forward, dynamic):
        calls.append(forward)
        if len(calls) == 3:
            raise RuntimeError("no compiler")
        return forward

    monkeypatch.setattr(torch, "compile", fails_at_last)
    with pytest.raises(RuntimeError, match="no compiler"):
        distill(student, teacher, samples(2), compile_layers=True)
    layers = [*decoder_layers(teacher.model), *decoder_layers(student.model)]
    assert not any("forward" in vars(layer) for layer in layers)
    hooks = [h for layer in layers for h in layer._forward_hooks.values()]
    assert not any(h.__module__ == objective.__name__ for h in hooks)


def test_what_cannot_be_distilled_is_said_in_a_sentence(teacher, student):
    before = tensors(student)

    def told(words, who=student, data=None, **options):
        with pytest.raises(WorkbenchError, match=words):
            distill(who, teacher, samples(2) if data is None else data, **({"steps": 3} | options))
        assert all(p.requires_grad for p in who.model.parameters())

    told("tiny has no Mamba-2 layer to train: convert a teacher first", who=teacher)
    told("tiny-0 has no Mamba-2 layer", who=convert(teacher, choose_layers(teacher, ratio=0)))
    with pytest.raises(WorkbenchError, match="cannot learn from itself: give its teacher"):
        distill(student, student, samples(4), steps=1)
    told("the data set is empty", data=[])
    told("steps=0 trains nothing", steps=0)
    told("batch_size=0 trains nothing", batch_size=0)
    told("log_every=0 trains nothing", log_every=0)
    told("accumulate=0 trains nothing", accumulate=0)
    told("no recipe 'best': choose matvlm, workbench", recipe="best")
    told("a name or a list of Stage", recipe=[])
    told("needs input_ids and labels", data=[{"input_ids": torch.zeros(1, 3)}])
    for lr in (math.nan, math.inf, 0, -1e-3):
        told(f"lr={lr} is no learning rate", lr=lr)
    told("put samples into a list", data=iter(samples(2)))
    told("ended before step 1", data=iter(()))
    assert same(tensors(student), before)
    told("ended before step 3", data=iter(2 * [collate(teacher, samples(2))]))


def test_a_loss_that_is_no_number_ends_the_run_with_its_step(teacher, student):
    rows = []
    with pytest.raises(WorkbenchError, match=r"The loss is (nan|inf) at step 2 \(lr .*lower the"):
        distill(student, teacher, samples(2), steps=4, lr=1e25, on_step=rows.append)
    assert [row.step for row in rows] == [1]
    assert not student.model.training


@pytest.fixture(scope="module")
def small_pocket():
    """The pocket teacher's shape, two narrow layers, random weights, and its own processor."""
    processor = AutoProcessor.from_pretrained(POCKET / "teacher")
    tokenizer = processor.tokenizer
    torch.manual_seed(0)
    config = pocket_config(
        len(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        vision_layers=1,
        text_layers=2,
        width=32,
    )
    return VLM("small", LlavaForConditionalGeneration(config).eval(), processor)


def test_training_batches_with_one_and_with_several_pictures_can_be_distilled(small_pocket):
    batches = TrainingBatches(Encoder(small_pocket.tokenizer), 4, several_every=2)
    student = convert(small_pocket, Plan(2, (1,)), init="matvlm")
    run = distill(student, small_pocket, batches, recipe="matvlm", steps=2)
    assert [row.step for row in run.rows] == [1, 2]
    assert all(math.isfinite(row.loss) and row.loss > 0 for row in run.rows)
    listed = [batches.batch(0), batches.batch(1)]
    other = convert(small_pocket, Plan(2, (1,)), init="matvlm")
    again = distill(other, small_pocket, listed, recipe="matvlm", steps=3)
    assert [r.loss for r in again.rows[:2]] == [r.loss for r in run.rows]


def test_ready_batches_show_what_the_processor_shows(small_pocket):
    batches = TrainingBatches(Encoder(small_pocket.tokenizer), 8, several_every=1)
    raw = batches.batch(0)
    ready = ready_batch(small_pocket, raw)
    n_pictures = int((raw["input_ids"] == small_pocket.model.config.image_token_id).sum()) // 256
    assert len(ready["pixel_values"]) == n_pictures < 8
    assert raw["pixel_values"].dtype == torch.uint8
    sample = load_data("pocket", limit=1)[0]
    alone = collate(small_pocket, [sample])
    seen = ready_batch(small_pocket, alone | {"pixel_values": pixels(sample.images, 4)})
    torch.testing.assert_close(seen["pixel_values"], alone["pixel_values"], atol=1e-6, rtol=0)
    assert ready_batch(small_pocket, alone) is alone


def test_a_plan_of_every_layer_can_be_distilled(teacher):
    student = convert(teacher, choose_layers(teacher, ratio=1), init="matvlm")
    run = distill(student, teacher, samples(4), steps=4)
    assert len(run.rows[0].layer_losses) == tiny.N_LAYERS


def test_a_data_set_shorter_than_a_batch_is_a_batch(teacher):
    one, run = train(teacher, samples(3), steps=2, batch_size=3)
    other, same_run = train(teacher, samples(3), steps=2, batch_size=64)
    assert same(tensors(one), tensors(other))
    assert run.n_tokens == same_run.n_tokens


def test_samples_beyond_the_limit_are_cut_and_counted(teacher):
    long = [Sample((), "which?", "red and " * 300, "f"), *samples(1)]
    _, run = train(teacher, long, steps=2, batch_size=2)
    assert run.n_cut == 2
    assert "2 samples cut to length" in str(run)
    batch = collate(teacher, long)
    assert batch["input_ids"].shape[1] == 256  # the model's last position
    assert batch["n_cut"] == 1
    shorter = collate(teacher, long, 40)
    assert all(shorter[k].shape == (2, 40) for k in ("input_ids", "attention_mask", "labels"))
    assert (shorter["labels"][0] != IGNORE).sum() > 20
    with pytest.raises(WorkbenchError, match="pictures reach beyond token 10"):
        collate(teacher, long, 10)
    ready = {"input_ids": torch.zeros(1, 300, dtype=torch.long)}
    ready["labels"] = ready["input_ids"]
    with pytest.raises(WorkbenchError, match="sequences of 300 tokens, but tiny-50 sees 256 at"):
        train(teacher, [ready], steps=1)


def test_a_batch_without_answers_is_no_end(teacher):
    batch = dict(collate(teacher, samples(2)))
    batch["labels"] = torch.full_like(batch["labels"], IGNORE)
    _, run = train(teacher, [batch], steps=1)
    assert run.rows[0].kl_nats == 0
    assert run.rows[0].layer_loss > 0


def test_gradient_checkpointing_changes_memory_only(teacher):
    weights = []
    for checkpointed in (False, True):
        student = convert(teacher, PLAN, init="matvlm")
        if checkpointed:
            student.model.gradient_checkpointing_enable()
        seen = []
        student.model.lm_head.register_forward_hook(
            lambda module, *_, seen=seen: seen.append(module.training)
        )
        distill(student, teacher, samples(3), recipe="matvlm", steps=2, batch_size=3)
        assert seen == 2 * [checkpointed]
        weights.append(tensors(student))
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-4, atol=1e-5)


def test_dropout_stays_off():
    model = tiny.llava(resid_pdrop=0.9, attention_dropout=0.9)
    teacher = VLM("dropping", model, tiny.vlm().processor)
    runs = [
        distill(
            convert(teacher, PLAN, init="matvlm"), teacher, samples(2), recipe="matvlm", steps=2
        )
        for _ in range(2)
    ]
    assert runs[0].rows[1].loss == runs[1].rows[1].loss


def test_numbered_batches_are_asked_for_by_number(teacher):
    asked = []

    class Numbered:
        def batch(self, number):
            asked.append(number)
            return collate(teacher, samples(1))

    batches = as_batches(teacher, Numbered(), batch_size=1, seed=0, first=7, stride=3)
    assert all("labels" in next(batches) for _ in range(3))
    assert asked == [7, 10, 13]
    ready = [dict(collate(teacher, samples(1)), number=n) for n in range(4)]
    for data in (ready, iter(ready)):
        some = as_batches(teacher, data, batch_size=1, seed=0, first=1, stride=2)
        assert [next(some)["number"] for _ in range(2)] == [1, 3]
    made = list(zip(range(6), as_batches(teacher, samples(5), batch_size=2, seed=3), strict=False))
    rest = as_batches(teacher, samples(5), batch_size=2, seed=3, first=1, stride=4)
    for number, batch in made[1::4]:
        assert torch.equal(next(rest)["input_ids"], batch["input_ids"]), number
