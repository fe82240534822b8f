"""Several processes: the same weights in each, and those of one process with the joint batch."""

import multiprocessing
import os
import socket
import sys

import pytest
import tiny
import torch
from trainees import PLAN, samples, tensors

from workbench.errors import WorkbenchError
from workbench.steps.conversion.initialization import convert
from workbench.steps.training import parallel, sharding
from workbench.steps.training.distillation import Stage, distill
from workbench.steps.training.parallel import Processes, own_device

# Not the relative layer loss: it measures each batch by a scale of its own.
STAGES = [
    Stage("align", 3, layer_weight=1, layer_kind="norm", trains="mixers"),
    Stage("distill", 3, layer_weight=0.5, layer_kind="norm", kl_weight=1, ce_weight=0.1),
]


def train(batch_size, *, n_pictured=6, device="cpu", **options):
    teacher = tiny.vlm()
    teacher.model.to(device)
    student = convert(teacher, PLAN, init="matvlm")
    # The last two leave the projector alone.
    mixed = [*samples(n_pictured), *samples(2, n_images=0)]
    run = distill(student, teacher, mixed, recipe=STAGES, batch_size=batch_size, **options)
    return {name: tensor.cpu() for name, tensor in tensors(student).items()}, run


def apart(one, other):
    """Distance of two students, as a share of how far training moved the second.

    Single elements differ: AdamW's first step has the sign of a gradient, even of one that is 0 but
    for rounding.
    """
    start = tensors(convert(tiny.vlm(), PLAN, init="matvlm"))

    def norm(left, right):
        return sum((left[n] - right[n]).float().square().sum() for n in left).sqrt()

    return norm(one, other) / norm(other, start)


SHARDED = {  # as `accelerate launch --use_fsdp --fsdp_version 2` has them
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}  # fmt: skip


def train_as(rank, count, port, folder, tell, options, more):
    environment = {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "ACCELERATE_USE_CPU": str("device" not in options).lower(),
    }  # fmt: skip
    os.environ |= {name: str(value) for name, value in (environment | more).items()}
    torch.set_num_threads(1)
    if "device" in options:
        options = options | {"device": own_device()}
    cut, held = sharding.shard, []

    def shard(objective, trainee, mesh):
        n = sum(p.numel() for p in trainee.model.parameters())
        cut(objective, trainee, mesh)
        held.append(sum(p.to_local().numel() for p in trainee.model.parameters()) / n)

    sharding.shard = shard
    weights, run = train(**{"batch_size": 2, "folder": folder} | options)
    torch.save((weights, run.rows), folder / f"rank-{rank}.pt")
    tell.send((Processes().count, Processes().first([rank]), *held))


def train_in_two(folder, options=None, more=None):
    """Both processes' weights and rows, and what they know of each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_parallel"])
    hear, tell = context.Pipe(duplex=False)
    given = port, folder, tell, options or {}, more or {}
    both = [context.Process(target=train_as, args=(rank, 2, *given)) for rank in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    for count, first, *held in (hear.recv(), hear.recv()):
        assert (count, first) == (2, [0])
        assert held == ([pytest.approx(0.5, abs=0.02)] if more else [])
    return (torch.load(folder / f"rank-{rank}.pt", "cpu", weights_only=False) for rank in (0, 1))


on_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
PLACES = [{}, pytest.param({"device": "cuda", "bf16": False}, marks=on_two_gpus)]


@pytest.mark.parametrize("place", PLACES, ids=["CPU", "CUDA"])
@pytest.mark.parametrize("options", [{}, {"batch_size": 1, "accumulate": 2}], ids=["", "in parts"])
@pytest.mark.parametrize("more", [{}, SHARDED], ids=["DDP", "FSDP2"])
def test_two_processes_do_what_one_does_with_the_joint_batch(
    more, options, place, tmp_path, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    (first, rows), (second, others) = train_in_two(tmp_path, options | place, more)
    whole, run = train(4, **place)
    assert first.keys() == whole.keys()
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name
    assert apart(first, whole) < 0.02
    for row, other, alone in zip(rows, others, run.rows, strict=True):
        assert row.loss == other.loss == pytest.approx(alone.loss, rel=1e-4)
        assert row.layer_losses == pytest.approx(alone.layer_losses, rel=1e-4)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000006"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6


def test_without_pictures_the_projector_of_a_sharded_run_keeps_still(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    (weights, _), _ = train_in_two(tmp_path, {"n_pictured": 0}, SHARDED)
    start = tensors(convert(tiny.vlm(), PLAN, init="matvlm"))
    moved = {name for name, weight in weights.items() if not torch.equal(weight, start[name])}
    assert moved
    assert not [name for name in moved if "projector" in name]


def test_a_sharded_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    for name in ("unbroken", "stopped"):
        (tmp_path / name).mkdir()
    (unbroken, _), _ = train_in_two(tmp_path / "unbroken", more=SHARDED)
    folder = tmp_path / "stopped"
    (early, rows), _ = train_in_two(folder, {"stop": Stops(4)}, SHARDED)
    assert rows[-1].step == 4
    (late, rows), _ = train_in_two(folder, {"resume": True}, SHARDED)
    assert rows[-1].step == 6
    for name, weight in unbroken.items():
        assert torch.equal(weight, late[name]), name
    assert not all(torch.equal(early[name], weight) for name, weight in late.items())


class Stops:
    """True from the n-th time it is asked."""

    def __init__(self, n):
        self.left = n

    def __call__(self):
        self.left -= 1
        return self.left <= 0


def test_sharding_says_what_it_cannot_do(monkeypatch):
    student = convert(tiny.vlm(), PLAN, init="matvlm")
    student.model.get_output_embeddings().to(torch.bfloat16)
    with pytest.raises(WorkbenchError, match="has bfloat16 and float32: load it with"):
        sharding.double(student)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(WorkbenchError, match="choose --fsdp_version 2"):
        parallel._asked_to_shard()


def test_accumulated_batches_count_as_one():
    whole, run = train(4)
    parts, again = train(2, accumulate=2)
    assert apart(parts, whole) < 0.02
    for row, alone in zip(again.rows, run.rows, strict=True):
        assert row.loss == pytest.approx(alone.loss, rel=1e-4)


def test_one_process_needs_no_accelerator(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = Processes()
    alone.check_device(torch.device("meta"))
    assert (alone.count, alone.rank, alone.any(True), alone.any(False)) == (1, 0, True, False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert own_device() == "cuda:1"


def test_a_model_on_another_device_than_its_process_is_refused():
    class Elsewhere:
        device, process_index = torch.device("cuda", 1), 1

    processes = Processes()
    processes._accelerator = Elsewhere()
    with pytest.raises(WorkbenchError, match="Process 1 works on cuda:1, but its models are on c"):
        processes.check_device(torch.device("cuda", 0))
    processes.check_device(torch.device("cuda", 1))
