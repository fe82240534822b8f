"""What a stage minimises, against the formulas, and what it trains."""

import copy
import json
from contextlib import ExitStack

import numpy as np
import pytest
import tiny
import torch
from torch.nn import functional as F
from trainees import PLAN, samples
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Gemma2Config,
    GraniteConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipVisionConfig,
)

from workbench.data.conversations import IGNORE
from workbench.errors import WorkbenchError
from workbench.models.families import decoder_layers
from workbench.models.hybrid import mixers
from workbench.models.teacher import VLM
from workbench.steps.conversion.initialization import convert
from workbench.steps.training import losses
from workbench.steps.training.batches import collate
from workbench.steps.training.distillation import distill
from workbench.steps.training.losses import Divergence, divergence, head_logits, token_losses
from workbench.steps.training.objective import Objective, places
from workbench.steps.training.stages import (
    RECIPES,
    Stage,
    parameter_groups,
    plan_stages,
    stage_from_dict,
    trained_parameters,
)


@pytest.fixture(scope="module")
def teacher():
    return tiny.vlm()


@pytest.fixture
def student(teacher):
    return convert(teacher, PLAN, init="matvlm")


def paligemma():
    text = Gemma2Config(**tiny.COMMON, num_key_value_heads=2, head_dim=12,
                        final_logit_softcapping=0.5)  # fmt: skip
    vision = SiglipVisionConfig(hidden_size=20, intermediate_size=24, num_hidden_layers=1,
                                num_attention_heads=2, image_size=16, patch_size=4)  # fmt: skip
    config = PaliGemmaConfig(text_config=text, vision_config=vision, image_token_index=3)
    return PaliGemmaForConditionalGeneration(config)


def text_model(config_class, **options):
    return AutoModelForCausalLM.from_config(config_class(**tiny.COMMON, **options))


HEADS = {
    "plain": lambda: tiny.language_model("llama"),
    "phi": lambda: tiny.language_model("phi"),  # a bias in its head
    "llava": lambda: tiny.llava(),
    "cohere2": lambda: text_model(Cohere2Config, logit_scale=0.3, num_key_value_heads=2),
    "granite": lambda: text_model(GraniteConfig, logits_scaling=7.0, num_key_value_heads=2),
    "gemma2": lambda: text_model(
        Gemma2Config, final_logit_softcapping=0.5, num_key_value_heads=2, head_dim=12
    ),
    "paligemma": paligemma,
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_gives_the_logits_of_its_model(name):
    torch.manual_seed(0)
    model = tiny.shaken(HEADS[name](), 0)
    ids = tiny.token_ids()
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(head_logits(model, hidden), model(input_ids=ids).logits)
        plain = model.get_output_embeddings()(hidden)
        if name != "paligemma":  # of which some versions of transformers read no cap
            scaled = name not in ("plain", "phi", "llava")
            assert scaled != torch.allclose(plain, head_logits(model, hidden))


def test_divergences_are_what_the_formulas_say():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 7)
    for t in (1.0, 2.5):
        q, p = (F.softmax(logits / t, -1) for logits in (student, teacher))
        m = (p + q) / 2
        kl = {
            "forward": (p * (p / q).log()).sum(-1),
            "reverse": (q * (q / p).log()).sum(-1),
            "js": ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2,
        }
        for kind, nats in kl.items():
            torch.testing.assert_close(divergence(student, teacher, kind, t), t**2 * nats)
    assert (divergence(100 * student, 100 * teacher, "js", 1) < 0.6932).all()


@pytest.mark.parametrize("kind", losses.KL_KINDS)
@pytest.mark.parametrize("head_trains", [False, True])
def test_chunks_give_the_loss_and_the_gradients_of_the_whole(kind, head_trains, monkeypatch):
    torch.manual_seed(0)
    student, teacher = (tiny.language_model("llama", seed) for seed in (0, 1))
    student.lm_head.requires_grad_(head_trains)
    ours, theirs = torch.randn(2, 150, 48)
    labels = torch.randint(0, 300, (150,))
    labels[::3] = IGNORE
    found = []
    for most in (64 * 300, 10**9):  # three chunks; one
        monkeypatch.setattr(losses, "LOGITS_AT_ONCE", most)
        hidden = ours.clone().requires_grad_()
        got = token_losses(
            student, teacher, (hidden, theirs), labels,
            kl=Divergence(0.5, kind, 2.0), ce=torch.tensor(0.25),
        )  # fmt: skip
        got.total.backward(torch.tensor(3.0))
        found.append((*got, hidden.grad, student.lm_head.weight.grad))
        student.zero_grad()
    hidden = ours.clone().requires_grad_()
    logits = head_logits(student, hidden)
    nats = divergence(logits, head_logits(teacher, theirs), kind, 2.0).sum()
    surprise = F.cross_entropy(logits, labels, reduction="sum")
    (3 * (0.5 * nats + 0.25 * surprise)).backward()
    whole = (0.5 * nats + 0.25 * surprise, nats, surprise, hidden.grad, student.lm_head.weight.grad)
    for chunked in found:
        for one, other in zip(chunked, whole, strict=True):
            if other is None:
                assert one is None
            else:
                torch.testing.assert_close(one, other.detach(), rtol=1e-4, atol=1e-4)
    assert (whole[-1] is None) != head_trains


def test_no_logits_outlive_their_chunk(monkeypatch):
    student, teacher = (tiny.language_model("llama", seed) for seed in (0, 1))
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 64 * 300)
    largest = []

    class Watching(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made.shape[-1:] == (300,):
                largest.append(made.numel())
            return made

    hidden = torch.randn(1000, 48, requires_grad=True)
    with Watching():
        token_losses(
            student, teacher, (hidden, hidden.detach()), torch.zeros(1000, dtype=torch.long),
            kl=Divergence(1.0), ce=None,
        ).total.backward()  # fmt: skip
    assert 0 < max(largest) <= 64 * 300
    none = token_losses(student, teacher, (hidden[:0], hidden[:0]), torch.zeros(0),
                        kl=Divergence(1.0), ce=None)  # fmt: skip
    none.total.backward()
    assert none.total == none.kl == 0


def objective_of(student, teacher, stage, batch, undo):
    made = Objective(student, teacher, undo)
    made.stage = stage
    at = places(batch, stage.tokens)
    return made(batch, at, 1 / at.counts.clamp(min=1))


def reference(teacher, student, batch):
    """Logits of both; and each Mamba layer's input, the teacher's output and the student's."""
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values")}
    inputs["use_cache"] = False
    theirs = teacher.model(**inputs, output_hidden_states=True)
    ours = student.model(**inputs)
    layers = []
    for i in PLAN.mamba_layers:
        twin = copy.deepcopy(teacher.model)
        decoder_layers(twin)[i].self_attn = mixers(student.model)[i]
        got = twin(**inputs, output_hidden_states=True).hidden_states[i + 1]
        layers.append((theirs.hidden_states[i], theirs.hidden_states[i + 1], got))
    return theirs.logits, ours.logits, layers


@pytest.mark.parametrize("tokens", ["answers", "all"])
@pytest.mark.parametrize("kind", ["norm", "relative"])
def test_the_losses_are_what_the_formulas_say(teacher, student, kind, tokens):
    batch = collate(teacher, samples(4))
    stage = Stage(
        "all", 1, layer_weight=0.5, layer_kind=kind, kl_weight=2.0, ce_weight=0.1, tokens=tokens
    )
    real = batch["attention_mask"].bool()
    assert not real.all()
    with torch.no_grad(), ExitStack() as undo:
        total, record = objective_of(student, teacher, stage, batch, undo)
    with torch.no_grad():
        p, q, layers = reference(teacher, student, batch)
    answers = batch["labels"][:, 1:] != IGNORE
    predicts = answers if tokens == "answers" else real[:, 1:]
    log_p, log_q = (F.log_softmax(logits[:, :-1], -1) for logits in (p, q))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[predicts].mean()
    ce = F.nll_loss(log_q[answers], batch["labels"][:, 1:][answers])
    distances = []
    for given, wanted, got in layers:
        error, added = ((t[real] ** 2).sum(-1) for t in (got - wanted, wanted - given))
        distances.append(
            error.sum() / added.sum() if kind == "relative" else error.sqrt().mean() / 48**0.5
        )
    hidden = torch.zeros(())  # which the stage does not ask for
    expected = torch.stack([torch.stack(distances).mean(), kl, ce, hidden, *distances])
    torch.testing.assert_close(record[1:], expected, rtol=1e-4, atol=1e-5)
    assert total.item() == pytest.approx(
        0.5 * expected[0].item() + 2 * kl.item() + 0.1 * ce.item(), rel=1e-4
    )


def test_a_layers_gradient_is_the_same_at_once(teacher, student):
    batch = collate(teacher, samples(3))
    stage = Stage("s", 1, layer_weight=0.5, layer_kind="norm")
    with ExitStack() as undo:
        total, _ = objective_of(student, teacher, stage, batch, undo)
        (3 * total).backward()
    found = {name: p.grad for name, p in student.model.named_parameters()}
    student.model.zero_grad()
    real = batch["attention_mask"].bool()
    losses = []
    _, _, layers = reference(teacher, student, batch)
    for (_, wanted, _), i in zip(layers, PLAN.mamba_layers, strict=True):
        twin = copy.deepcopy(teacher.model)
        decoder_layers(twin)[i] = decoder_layers(student.model)[i]
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values")}
        got = twin(**inputs, use_cache=False, output_hidden_states=True).hidden_states[i + 1]
        losses.append((got - wanted.detach())[real].norm(dim=-1).mean() / 48**0.5)
    (3 * 0.5 * torch.stack(losses).mean()).backward()
    for name, p in student.model.named_parameters():
        if "language_model.layers.0." in name or "language_model.layers.2." in name:
            torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-6, msg=name)
        else:
            assert found[name] is None, name


def test_padding_counts_nowhere(teacher, student):
    batch = collate(teacher, samples(3))
    padding = {"input_ids": 0, "attention_mask": 0, "labels": IGNORE}
    longer = {n: F.pad(batch[n], (0, 7), value=v) for n, v in padding.items()}
    longer["pixel_values"] = batch["pixel_values"]
    unmasked = dict(longer, real=longer["attention_mask"].bool())
    unmasked.pop("attention_mask")
    for kind in ("norm", "relative"):
        stage = Stage("s", 1, layer_weight=1, layer_kind=kind, kl_weight=1, tokens="all")
        found = []
        for some in (batch, longer, unmasked):
            with torch.no_grad(), ExitStack() as undo:
                found.append(objective_of(student, teacher, stage, some, undo)[1])
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[2], found[0], rtol=1e-4, atol=1e-5)


def counted(module, calls, name):
    module.register_forward_hook(lambda *_: calls.append(name))


def test_alignment_runs_the_mamba_layers_and_nothing_else_of_the_student(teacher):
    calls = []
    mine = VLM("t", tiny.llava(), teacher.processor)
    student = convert(mine, PLAN, init="matvlm")
    counted(student.model.base_model, calls, "student")
    counted(student.model.lm_head, calls, "student's head")
    counted(mine.model.lm_head, calls, "teacher's head")
    for i, layer in enumerate(decoder_layers(student.model)):
        counted(layer, calls, i)
    distill(student, mine, samples(2), recipe=[Stage("align", 1, layer_weight=1)])
    assert calls == [0, 2]


def test_pictures_are_seen_once_where_the_towers_are_the_same(teacher):
    def seen(stage, change=None):
        calls = []
        student = convert(teacher, PLAN, init="matvlm")
        tower = student.model.base_model.vision_tower
        if change is not None:
            with torch.no_grad():
                next(tower.parameters()).add_(change)
        handle = teacher.model.base_model.vision_tower.register_forward_pre_hook(
            lambda *_: calls.append("teacher")
        )
        inner = next(tower.children())
        inner.register_forward_pre_hook(lambda *_: calls.append("student"))
        row = distill(student, teacher, samples(2), recipe=[stage]).rows[0]
        handle.remove()
        return calls, row.kl_nats

    calls, kl = seen(Stage("s", 1, kl_weight=1))
    again, same_kl = seen(Stage("s", 1, kl_weight=1, trains="all+vision"))
    assert calls == ["teacher"]
    assert again == ["teacher", "student"]
    assert same_kl == kl  # bit by bit: the same tower saw the same pictures
    assert seen(Stage("s", 1, kl_weight=1), change=0.1)[0] == ["teacher", "student"]


@pytest.mark.parametrize(
    "trains, expected",
    [
        ("mixers", {"mixer"}),
        ("mixers+projector", {"mixer", "projector"}),
        ("mixers+projector+ffn", {"mixer", "projector", "mamba layer"}),
        ("all", {"mixer", "projector", "mamba layer", "other layer", "rest"}),
        ("all+vision", {"mixer", "projector", "mamba layer", "other layer", "rest", "vision"}),
    ],
)
def test_what_trains_is_a_choice(teacher, student, trains, expected):
    def kind(name):
        if "vision_tower" in name:
            return "vision"
        if "projector" in name:
            return "projector"
        if ".layers." not in name:
            return "rest"
        mamba = any(f".layers.{i}." in name for i in PLAN.mamba_layers)
        if mamba and "self_attn" in name:
            return "mixer"
        return "mamba layer" if mamba else "other layer"

    chosen = trained_parameters(student, trains)
    for name, _ in student.model.named_parameters():
        assert (name in chosen) == (kind(name) in expected), name
    before = {name: p.clone() for name, p in student.model.named_parameters()}
    stage = Stage("s", 2, layer_weight=1, kl_weight=1, trains=trains)
    distill(student, teacher, samples(2), recipe=[stage])
    moved = {kind(n) for n, p in student.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == expected


def test_old_and_new_have_their_own_rates_and_decay_spares_all_but_matrices(student):
    trained = trained_parameters(student, "mixers+projector")
    stage = Stage("s", 1, kl_weight=1, lr=1e-4, lr_new=1e-3)
    names = {id(p): name for name, p in trained.items()}
    found = {}
    for group in parameter_groups(student, trained, stage):
        for p in group["params"]:
            found[names[id(p)]] = (group["peak"], group["weight_decay"])
    assert found.keys() == trained.keys()
    for name, (peak, decay) in found.items():
        ending = name.partition("self_attn.")[2]
        new = ending.partition(".")[0] in (
            "z_proj", "dt_weight", "conv1d", "A_log", "dt_bias", "D", "norm"
        )  # fmt: skip
        assert peak == (1e-3 if new else 1e-4), name
        assert (decay > 0) == (trained[name].ndim == 2), name


def test_steps_and_rates_scale_a_recipe():
    align, rest = plan_stages("workbench", 1000)
    assert (align.name, align.steps, rest.name, rest.steps) == ("align", 300, "distill", 700)
    assert not align.reads_logits
    assert rest.reads_logits
    assert [s.steps for s in plan_stages("workbench", 3)] == [1, 2]
    assert [s.name for s in plan_stages("workbench", 1)] == ["distill"]
    assert plan_stages("matvlm")[0].steps == 100
    mine = [Stage("a", 5, kl_weight=1), Stage("b", 5, ce_weight=1)]
    assert plan_stages(mine) == tuple(mine)
    assert [s.steps for s in plan_stages(mine, 7)] == [4, 3]
    scaled = plan_stages([Stage("a", 5, kl_weight=1, lr=1e-3, lr_new=4e-3)], lr=1e-4)[0]
    assert (scaled.lr, scaled.lr_new) == (1e-4, pytest.approx(4e-4))
    for stages in RECIPES.values():
        assert sum(stage.steps for stage in stages) == 100
        assert [stage_from_dict(stage.to_dict()) for stage in stages] == list(stages)


@pytest.mark.parametrize(
    "options, words",
    [
        ({}, "give at least one above 0"),
        ({"kl_weight": -1.0}, "none below"),
        ({"kl_weight": float("nan")}, "none below"),
        ({"kl_weight": 1, "kl_kind": "backward"}, "kl_kind='backward' does not exist: choose for"),
        ({"kl_weight": 1, "trains": "nothing"}, "trains='nothing' does not exist"),
        ({"kl_weight": 1, "temperature": 0}, "temperature=0 is no temperature"),
        ({"kl_weight": 1, "lr": -1}, "lr=-1 is no learning rate"),
        ({"kl_weight": 1, "steps": 0}, "steps=0 trains nothing"),
        ({"kl_weight": 1, "steps": "10"}, "steps='10': it must be of kind int"),
        ({"kl_weight": 1, "steps": 2.0}, "steps=2.0: it must be of kind int"),
        ({"kl_weight": 1, "lr": "1e-4"}, "lr='1e-4': it must be of kind float"),
        ({"kl_weight": True}, "kl_weight=True: it must be of kind float"),
        ({"kl_weight": 1, "trains": ["all"]}, "it must be of kind str"),
    ],
)
def test_a_stage_that_cannot_be_is_refused(options, words):
    with pytest.raises(WorkbenchError, match=words):
        Stage("s", **{"steps": 1} | options)


def test_a_stage_read_from_a_file_knows_its_keys():
    with pytest.raises(WorkbenchError, match="no 'weight'; it has name, steps, layer_weight"):
        stage_from_dict({"name": "s", "steps": 1, "weight": 2})
    with pytest.raises(WorkbenchError, match="A stage needs steps"):
        stage_from_dict({"name": "s"})
    with pytest.raises(WorkbenchError, match="an object with keys, not 5"):
        stage_from_dict(5)


def test_numbers_of_numpy_become_plain_ones():
    stage = Stage("one", np.int64(3), kl_weight=np.float32(0.5))
    assert json.loads(json.dumps(stage.to_dict())) == stage.to_dict()
