"""Runs that are stopped, killed, resumed, or out of room."""

import errno
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time

import pytest
import tiny
import torch
from trainees import PLAN, same, samples, tensors

from workbench.errors import WorkbenchError
from workbench.models.plan import Plan
from workbench.steps.conversion.initialization import convert
from workbench.steps.training import checkpoints
from workbench.steps.training.distillation import Stage, distill
from workbench.steps.training.watch import Watch

STAGES = [
    Stage("align", 5, layer_weight=1, trains="mixers"),
    Stage("distill", 7, kl_weight=1, trains="mixers+projector+ffn"),
]


@pytest.fixture(scope="module")
def teacher():
    return tiny.vlm()


def train(teacher, **options):
    student = convert(teacher, PLAN, init="matvlm")
    common = {"recipe": STAGES, "batch_size": 3, "log_every": 2}
    return student, distill(student, teacher, samples(8), **common | options)


def shown(rows):
    return [(r.step, r.stage, r.loss, r.layer_loss, r.kl_nats, r.layer_losses) for r in rows]


@pytest.fixture(scope="module")
def unbroken(teacher):
    return train(teacher)


@pytest.mark.parametrize("at", [1, 4, 5, 6, 11])
def test_a_stopped_run_goes_on_bit_by_bit(teacher, unbroken, tmp_path, at):
    looks = []

    def stop():
        looks.append(1)
        return len(looks) == at

    _, half = train(teacher, folder=tmp_path, stop=stop, save_every=100)
    assert half.stopped
    assert half.steps == at
    assert f"stopped before step {at + 1} of 12" in str(half)
    assert [path.name for path in tmp_path.glob("step-*")] == [f"step-{at:08d}"]
    state = tmp_path / f"step-{at:08d}" / checkpoints.STATE
    kept = json.loads(state.read_text())["state"]["seconds"]
    student, run = train(teacher, folder=tmp_path, resume=True)
    assert not run.stopped
    assert run.steps == 12
    assert same(tensors(student), tensors(unbroken[0]))
    assert shown(run.rows) == shown(unbroken[1].rows)
    assert run.n_tokens == unbroken[1].n_tokens
    assert run.seconds > kept > 0
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [row.step for row in run.rows]
    again, same_run = train(teacher, folder=tmp_path, resume=True)
    assert same_run.rows == run.rows
    assert same(tensors(again), tensors(unbroken[0]))


def test_an_event_or_ctrl_c_stops_within_a_step_and_saves(teacher, tmp_path):
    event = threading.Event()
    _, run = train(teacher, stop=event, on_step=lambda row: event.set(), folder=tmp_path / "event")
    assert (run.steps, run.stopped) == (2, True)

    def press(row):
        if row.step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    _, run = train(teacher, on_step=press, folder=tmp_path / "pressed")
    assert (run.steps, run.stopped) == (4, True)
    assert signal.getsignal(signal.SIGINT) is before

    def interrupt(row):
        raise KeyboardInterrupt

    _, run = train(teacher, on_step=interrupt, folder=tmp_path / "raised")
    assert (run.steps, run.stopped) == (2, True)
    for name, step in (("event", 2), ("pressed", 4), ("raised", 2)):
        assert (tmp_path / name / f"step-{step:08d}" / "state.json").is_file()
    # Asked at its very last step, a run is not stopped: it is done.
    assert not train(teacher, stop=lambda: True, recipe=[Stage("one", 1, kl_weight=1)])[1].stopped


def test_a_run_in_another_thread_can_be_stopped(teacher):
    event, found = threading.Event(), []
    thread = threading.Thread(
        target=lambda: found.append(
            train(teacher, stop=event, on_step=lambda row: event.set())[1]
        )
    )
    thread.start()
    thread.join()
    assert found[0].stopped


def train_and_tell(folder, told):
    """What the killed processes do."""
    torch.set_num_threads(1)
    train(
        tiny.vlm(), folder=folder, save_every=1, log_every=1, resume=True,
        on_step=lambda row: told.send(row.step),
    )  # fmt: skip
    told.send("done")


@pytest.fixture
def one_thread():
    """Sums over several threads round as the threads divide them: bits need the same number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_after_kill_9_at_any_moment_the_run_ends_as_if_unbroken(teacher, tmp_path, monkeypatch):
    # The server does not take over sys.path, and would leave each import to every process.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    context = multiprocessing.get_context("forkserver")  # imports once, then forks
    context.set_forkserver_preload(["test_checkpoints"])
    first_steps = []
    for number in range(8):
        hear, tell = context.Pipe(duplex=False)
        process = context.Process(target=train_and_tell, args=(tmp_path, tell))
        process.start()
        tell.close()
        first_steps.append(hear.recv())
        time.sleep(0.05 + 0.037 * number)  # somewhere in a step or in a checkpoint
        process.kill()
        process.join()
        if first_steps[-1] == "done":
            break
    assert len(set(first_steps)) > 2  # it was killed more than once on its way
    student, run = train(teacher, folder=tmp_path, save_every=1, log_every=1, resume=True)
    whole, unbroken = train(teacher, log_every=1)
    assert same(tensors(student), tensors(whole))
    assert shown(run.rows) == shown(unbroken.rows)


def test_a_checkpoint_of_something_else_is_refused(teacher, tmp_path):
    train(teacher, folder=tmp_path, stop=lambda: True)
    before = sorted(path.name for path in tmp_path.rglob("*"))

    def told(words, plan=PLAN, **options):
        common = {"recipe": STAGES, "batch_size": 3, "folder": tmp_path, "resume": True}
        student = convert(teacher, plan, init="matvlm")
        with pytest.raises(WorkbenchError, match=words):
            distill(student, teacher, samples(8), **common | options)

    told("holds a run already: go on with resume=True", resume=False)
    told(r"another run: its plan is \[4, \[0, 2\]\], not \[4, \[1, 3\]\]", plan=Plan(4, (1, 3)))
    told("its stages is", recipe="matvlm")
    told(r"its batches is \[3, 1, null, 1\], not \[2, 1", batch_size=2)
    told("its seed is 0, not 1", seed=1)
    told("its bf16 is null, not true", bf16=True)
    other = tiny.vlm(seed=1)
    with pytest.raises(WorkbenchError, match="its teacher is"):
        distill(convert(other, PLAN, init="matvlm"), other, samples(8), recipe=STAGES, batch_size=3,
                folder=tmp_path, resume=True)  # fmt: skip
    with pytest.raises(WorkbenchError, match=r'its data is \["", 8, .*not \["", 7, '):
        distill(convert(teacher, PLAN, init="matvlm"), teacher, samples(7), recipe=STAGES,
                batch_size=3, folder=tmp_path, resume=True)  # fmt: skip
    (tmp_path / "file").write_text("")
    told("is a file; name a folder", folder=tmp_path / "file")
    assert sorted(path.name for path in tmp_path.rglob("*") if path.name != "file") == before
    weights = next(tmp_path.glob("step-*/weights.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    told("cannot be read")


@pytest.mark.parametrize("place", ["tensors", "state", "metrics"])
def test_a_full_disk_leaves_the_last_good_checkpoint_whole(teacher, tmp_path, monkeypatch, place):
    full = OSError(errno.ENOSPC, "No space left on device")
    armed = []

    def failing(function):
        def maybe(*args, **kwargs):
            if armed:
                raise full
            return function(*args, **kwargs)

        return maybe

    if place == "tensors":
        monkeypatch.setattr(checkpoints, "save_file", failing(checkpoints.save_file))
    elif place == "state":
        monkeypatch.setattr(os, "fsync", failing(os.fsync))
    else:
        monkeypatch.setattr(checkpoints.json, "dumps", failing(json.dumps))

    def arm(row):
        if row.step == 6:
            armed.append(1)

    with pytest.raises(WorkbenchError, match="the disk is full; the last good checkpoint, step-0"):
        train(teacher, folder=tmp_path, save_every=4, on_step=arm)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000004"]
    student, run = train(teacher, folder=tmp_path, save_every=4, resume=True)
    whole, unbroken = train(teacher)
    assert run.steps == 12
    assert same(tensors(student), tensors(whole))


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_checkpoint(teacher, tmp_path):
    def poison(row):
        if row.step == 6:
            with torch.no_grad():
                next(student.model.base_model.language_model.parameters()).fill_(math.nan)

    student = convert(teacher, PLAN, init="matvlm")
    with pytest.raises(WorkbenchError, match="The loss is nan at step 7 .*lower the learning rate"):
        distill(
            student, teacher, samples(8), recipe=STAGES, folder=tmp_path, on_step=poison,
            save_every=1,
        )  # fmt: skip
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000006"]


def test_a_run_that_runs_away_is_stopped():
    watch = Watch()
    for step in range(1, 41):
        watch.look(step, "s", 1.0 + step % 3, 1.0, 1e-3)
    for step in range(41, 60):
        watch.look(step, "s", 25.0, 1.0, 1e-3)
    assert watch.n_high == 19
    with pytest.raises(WorkbenchError, match="ran away: since step 41 .* 10 times its median"):
        watch.look(60, "s", 25.0, 1.0, 1e-3)
    calm = Watch()
    for step in range(1, 100):  # a few high steps are no harm, nor is another stage's other scale
        calm.look(step, "a", 30.0 if step % 20 == 0 else 1.0, 1.0, 1e-3)
    for step in range(100, 200):
        calm.look(step, "b", 500.0, 1.0, 1e-3)
    with pytest.raises(WorkbenchError, match="The gradient is inf at step 200"):
        calm.look(200, "b", 1.0, math.inf, 1e-3)
