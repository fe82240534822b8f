"""choose_layers, convert, distill, evaluate, compare and profile, on models small enough to see."""

import copy
import json
import math

import pytest
import tiny
import torch
from tokenizers.processors import TemplateProcessing
from torch.nn import functional as F
from transformers import (
    AutoProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)

from workbench.data import Sample, load_data
from workbench.data.conversations import IGNORE, Encoder, TrainingBatches, pixels
from workbench.errors import WorkbenchError
from workbench.models.families import decoder_layers
from workbench.models.generation import Answer, answer_batch, prepare_inputs
from workbench.models.hybrid import mixers
from workbench.models.plan import Plan
from workbench.models.pocket_model import pocket_config
from workbench.models.teacher import POCKET, VLM
from workbench.steps import distillation, evaluation, profiling
from workbench.steps.batches import as_batches, collate, ready_batch
from workbench.steps.comparison import compare
from workbench.steps.distillation import distill, trainable_parameters
from workbench.steps.evaluation import evaluate
from workbench.steps.initialization import convert
from workbench.steps.profiling import profile
from workbench.steps.selection import choose_layers

PLAN = Plan(tiny.N_LAYERS, (0, 2))


def samples(n=4, n_images=1):
    answers = ("red", "two bars", "the tallest bar is red", "no")
    return [
        Sample(
            tuple(tiny.image(4 * i + k) for k in range(n_images)),
            f"which colour is bar {'x' * (i % 3)}{i}?",
            answers[i % 4],
            ("colour", "count")[i % 2],
        )
        for i in range(n)
    ]


def tensors(vlm):
    return {name: tensor.clone() for name, tensor in vlm.model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


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
    monkeypatch.setattr("workbench.steps.batches.collate", lambda vlm, some: list(some))

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


def train(teacher, data, steps=6, **options):
    student = convert(teacher, PLAN)
    return student, distill(student, teacher, data, steps=steps, batch_size=4, **options)


def test_distilling_lowers_both_losses_and_touches_mixers_and_projector_only(teacher, student):
    teacher_before, before = tensors(teacher), tensors(student)
    run = distill(student, teacher, samples(4), steps=40, lr=5e-3)
    first, last = run.rows[0], run.rows[-1]
    assert last.layer_loss < 0.8 * first.layer_loss
    assert last.kl_nats < 0.5 * first.kl_nats
    assert same(tensors(teacher), teacher_before)
    after = tensors(student)
    trained = set(trainable_parameters(student))
    assert run.n_trainable == sum(after[name].numel() for name in trained)
    for name in before:
        mine = any(f"layers.{i}.self_attn." in name for i in (0, 2)) and "language" in name
        assert (name in trained) == (mine or "projector" in name), name
        assert torch.equal(before[name], after[name]) == (name not in trained), name
    assert not student.model.training
    assert not any(p.grad is not None for p in teacher.model.parameters())


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
    assert run.seconds == run.rows[-1].seconds > 0
    assert json.loads(json.dumps(run.to_dict()))["rows"][2]["step"] == 3
    assert "tiny-50: 6 steps in" in str(run)
    assert f"{run.n_trainable:,} parameters" in str(run)


def test_the_learning_rate_warms_up_and_decays_to_a_tenth(teacher):
    rates = [distillation._rate(step, 100) for step in range(1, 101)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)
    assert distillation._rate(1, 1) == 1
    _, run = train(teacher, samples(2), steps=4, lr=2e-3)
    expected = [2e-3 * distillation._rate(step, 4) for step in (1, 2, 3, 4)]
    assert [row.lr for row in run.rows] == pytest.approx(expected)


def test_decay_spares_all_but_matrices(student):
    trained = trainable_parameters(student)
    decayed, spared = distillation._groups(trained)
    names = {id(p): name for name, p in trained.items()}
    assert decayed["weight_decay"] > spared["weight_decay"] == 0
    assert {names[id(p)].rpartition(".")[2] for p in decayed["params"]} == {"weight", "dt_weight"}
    kept = {names[id(p)] for p in spared["params"]}
    for ending in ("A_log", "D", "dt_bias", "conv1d.weight", "conv1d.bias", "norm.weight"):
        assert sum(name.endswith("self_attn." + ending) for name in kept) == 2
    assert len(decayed["params"]) + len(spared["params"]) == len(trained)


def test_the_losses_are_what_the_formulas_say(teacher, student):
    batch = collate(teacher, samples(4))
    losses = distillation._Losses(student, teacher, 0.5, 2.0, False)
    with torch.no_grad():
        total, layer, kl = losses(batch)
        losses.close()
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values")}
        inputs["use_cache"] = False
        theirs = teacher.model(**inputs, output_hidden_states=True)
        ours = student.model(**inputs)
        predicts = batch["labels"][:, 1:] != IGNORE
        p, q = (F.log_softmax(out.logits[:, :-1][predicts], -1) for out in (theirs, ours))
        assert kl.item() == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
        # Layer 0 and 2 of the student, each on the hidden state that the teacher's own gets.
        distances, real = [], batch["attention_mask"].bool()
        assert not real.all()
        for i in PLAN.mamba_layers:
            twin = copy.deepcopy(teacher.model)
            decoder_layers(twin)[i].self_attn = mixers(student.model)[i]
            got = twin(**inputs, output_hidden_states=True).hidden_states[i + 1]
            wanted = theirs.hidden_states[i + 1]
            distances.append((got - wanted).norm(dim=-1)[real].mean() / 48**0.5)
    assert layer.item() == pytest.approx(sum(distances).item() / 2, rel=1e-4)
    assert total.item() == pytest.approx(0.5 * layer.item() + 2 * kl.item(), rel=1e-5)


def test_a_student_that_equals_its_teacher_has_nothing_to_learn(teacher, student):
    for i in PLAN.mamba_layers:
        attention = copy.deepcopy(decoder_layers(teacher.model)[i].self_attn)
        decoder_layers(student.model)[i].self_attn = attention
    run = distill(student, teacher, samples(4), steps=3, batch_size=4)
    assert run.rows[0].layer_loss < 1e-6
    assert abs(run.rows[0].kl_nats) < 1e-6
    # The distance has no slope at zero; it must not become NaN there.
    assert all(math.isfinite(row.loss) for row in run.rows)


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
        ours = [[h for h in some if h.__module__ == distillation.__name__] for some in hooks]
        return [i for i, some in enumerate(ours) if some]

    def stop(row):
        assert all("forward" in vars(layer) for layer in layers)
        assert hooked() == [0, 2]
        assert student.model.training
        if fails:
            raise KeyboardInterrupt

    options = {"steps": 2, "compile_layers": True, "on_step": stop}
    if fails:
        with pytest.raises(KeyboardInterrupt):
            distill(student, teacher, samples(2), **options)
    else:
        distill(student, teacher, samples(2), **options)
    assert len(compiled) == 8
    assert not any("forward" in vars(layer) for layer in layers)
    assert hooked() == []
    assert not student.model.training


def test_what_cannot_be_distilled_is_said_in_a_sentence(teacher, student):
    before = tensors(student)

    def told(words, who=student, data=None, **options):
        with pytest.raises(WorkbenchError, match=words):
            distill(who, teacher, samples(2) if data is None else data, **({"steps": 3} | options))

    told("tiny has no Mamba-2 layer to train: convert a teacher first", who=teacher)
    told("tiny-0 has no Mamba-2 layer", who=convert(teacher, choose_layers(teacher, ratio=0)))
    told("the data set is empty", data=[])
    told("steps=0 trains nothing", steps=0)
    told("batch_size=0 trains nothing", batch_size=0)
    told("log_every=0 trains nothing", log_every=0)
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
    student = convert(small_pocket, Plan(2, (1,)))
    run = distill(student, small_pocket, batches, steps=2)
    assert [row.step for row in run.rows] == [1, 2]
    assert all(math.isfinite(row.loss) and row.loss > 0 for row in run.rows)
    listed = [batches.batch(0), batches.batch(1)]
    other = convert(small_pocket, Plan(2, (1,)))
    again = distill(other, small_pocket, listed, steps=3)
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
