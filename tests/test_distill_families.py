"""One distillation step in every family: what a family passes to its layers is passed on."""

import math
from contextlib import ExitStack

import pytest
import tiny_families as tiny
import torch
from torch.nn import functional as F

from workbench.models.plan import Plan
from workbench.models.teacher import VLM
from workbench.steps.training.distillation import Stage, distill
from workbench.steps.training.losses import head_logits
from workbench.steps.training.objective import Objective, places

PLAN = Plan(tiny.N_LAYERS, (0, 3))
STAGE = Stage("s", 2, layer_weight=1, kl_weight=1, tokens="all", trains="mixers+projector")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_can_be_distilled(family):
    teacher = VLM(family, tiny.teacher(family), None)
    student = VLM(f"{family}-50", tiny.student(family, PLAN.mamba_layers), None, PLAN)
    batch = tiny.questions(family)
    batch["labels"] = batch["input_ids"].clone()
    before = {name: p.detach().clone() for name, p in student.model.named_parameters()}
    with torch.no_grad(), ExitStack() as undo:
        objective = Objective(student, teacher, undo)
        objective.stage = STAGE
        where = places(batch, "all")
        _, record = objective(batch, where, 1 / where.counts)
        fed = {k: v for k, v in batch.items() if k != "labels"}
        p, q = (F.log_softmax(vlm.model(**fed).logits, -1) for vlm in (teacher, student))
        real = batch["attention_mask"].bool()
        wanted = real[:, :-1] & real[:, 1:]
        kl = (p.exp() * (p - q)).sum(-1)[:, :-1][wanted].mean()
        hidden = teacher.model.base_model(**fed).last_hidden_state
        torch.testing.assert_close(head_logits(teacher.model, hidden).log_softmax(-1), p)
    assert record[2].item() == pytest.approx(kl.item(), rel=1e-3, abs=1e-5)
    run = distill(student, teacher, [batch], recipe=[STAGE])
    assert run.steps == 2
    assert all(math.isfinite(row.loss) and row.layer_loss > 0 for row in run.rows)
    after = dict(student.model.named_parameters())
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert any(".self_attn." in name for name in moved)
    projects = any(part in name for name in moved for part in ("projector", "connector", "merger"))
    assert projects == (family in tiny.VISION_LANGUAGE)
