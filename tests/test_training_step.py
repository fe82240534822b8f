import json
import sys

import pytest
import torch

from benchmarks import training_step


@pytest.mark.slow
def test_both_steps_are_measured_on_a_tiny_model(tmp_path, monkeypatch, capfd):
    out = tmp_path / "step.json"
    command = [
        "training_step", "--device", "cpu", "--size", "tiny",
        "--batch", "2", "--length", "40", "--warmup", "1", "--steps", "2", "--ways", "plain",
        "matvlm", "--json", str(out),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    # Each way runs in a process of its own, which sets these for itself; other tests want neither.
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    limit = torch._dynamo.config.recompile_limit
    try:
        training_step.main()
    finally:
        torch._dynamo.config.recompile_limit = limit
    found = json.loads(out.read_text())
    assert [row["way"] for row in found["rows"]] == ["plain", "matvlm"]
    assert all(row["tokens_per_s"] > 0 and row["peak_mib"] > 0 for row in found["rows"])
    assert "| plain |" in capfd.readouterr().out


def test_the_plain_step_has_the_papers_losses(monkeypatch):
    import tiny

    from benchmarks.plain_step import PlainStep
    from workbench.models.plan import Plan
    from workbench.models.teacher import VLM
    from workbench.steps.conversion.initialization import convert
    from workbench.steps.training.distillation import Stage, distill

    teacher = VLM("t", tiny.language_model("llama"), None)
    student = convert(teacher, Plan(4, (0, 2)), init="matvlm")
    ids = tiny.token_ids(batch=1)
    step = PlainStep(student, teacher, compiled=False)
    loss = step.loss(ids).item()
    batch = {"input_ids": ids, "labels": ids}
    stage = Stage("s", 1, layer_weight=1, layer_kind="norm", kl_weight=1, tokens="all")
    student = convert(teacher, Plan(4, (0, 2)), init="matvlm")
    row = distill(student, teacher, [batch], recipe=[stage]).rows[0]
    # The same KL but for the last position, which predicts no token that is there.
    with torch.no_grad():
        q, p = (m(input_ids=ids).logits.log_softmax(-1) for m in (student.model, teacher.model))
        last = (p.exp() * (p - q))[:, -1].sum()
        n = ids.shape[1]
        kl = row.kl_nats * (n - 1) + last.item()
    # One norm of the whole tensor is at most the root of the sum of squares of per-token norms.
    assert 0 < loss - kl < 2 * row.layer_loss * n * 48**0.5
    step(ids)
    assert all(torch.isfinite(p).all() for p in step.trained)
