"""The training loop of `distill`: steps, rows, checkpoints, and how it ends."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from workbench.data import Sample
from workbench.errors import WorkbenchError
from workbench.models.families import text_config
from workbench.models.fingerprint import fingerprint
from workbench.models.teacher import VLM
from workbench.steps.training.batches import Batch, as_batches
from workbench.steps.training.checkpoints import Checkpoints, restore_training, training_tensors
from workbench.steps.training.objective import Objective, places
from workbench.steps.training.parallel import Processes
from workbench.steps.training.runs import Run, StepRow
from workbench.steps.training.sharding import give_back, part_of, whole
from workbench.steps.training.stages import (
    Stage,
    parameter_groups,
    reads_pictures,
    trained_parameters,
)
from workbench.steps.training.watch import Watch

Stop = Callable[[], bool] | threading.Event


@dataclass(frozen=True)
class Options:
    """How the training loop runs, beside its stages; `distill` says what each is."""

    batch_size: int
    accumulate: int
    max_length: int | None
    seed: int
    log_every: int
    save_every: int
    on_step: Callable[[StepRow], None] | None
    stop: Stop | None
    progress: bool

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise WorkbenchError(
                    f"{name}={getattr(self, name)} trains nothing: ask for at least 1."
                )


class Loop:
    """One run: its state between steps, and the step."""

    def __init__(
        self, student: VLM, teacher: VLM, data: Iterable, stages: tuple[Stage, ...],
        options: Options, undo: ExitStack, compiled: bool, graphed: bool = False,
        bf16: bool | None = None,
    ):  # fmt: skip
        self.student, self.teacher, self.data = student, teacher, data
        self.stages, self.options = stages, options
        self.undo, self.device = undo, student.model.device
        self.processes, self.watch = Processes(), Watch()
        self.processes.check_device(self.device)
        recomputes = any(
            getattr(module, "gradient_checkpointing", False) for module in student.model.modules()
        )
        if compiled and self.processes.shards:
            raise WorkbenchError(
                "compile_layers=True does not go with FSDP: leave one of them out."
            )
        if graphed and (self.device.type != "cuda" or self.processes.count > 1 or recomputes):
            raise WorkbenchError(
                "graph_layers=True needs a GPU, one process, and no gradient checkpointing: "
                "leave it out here."
            )
        for p in student.model.parameters():
            undo.callback(p.requires_grad_, p.requires_grad)
        undo.callback(student.model.eval)
        # Gradient checkpointing works in training mode only, and is all that needs it.
        student.model.train(recomputes)
        self.vlm = self.processes.trainee(student, undo)
        self.model = self.vlm.model
        self.objective = Objective(
            self.vlm, teacher, undo, compiled=compiled, graphed=graphed, bf16=bf16,
            sharded=self.processes.shards,
        )  # fmt: skip
        self.processes.shard(self.objective, self.vlm, student)
        self.graphed, self.bf16 = graphed, bf16
        self.trained = {
            name: p for stage in stages
            for name, p in trained_parameters(self.vlm, stage.trains).items()
        }  # fmt: skip
        self.rows: list[StepRow] = []
        self.step, self.whole, self.n_tokens, self.n_cut = 0, sum(s.steps for s in stages), 0, 0
        # Sums since the last row: total, layer loss, KL, CE, hidden loss, each layer's loss,
        # tokens; over how many steps; and the losses and gradient norms that the watch has not seen
        # yet. They stay on the device, so that a GPU is not waited for at every step.
        self.sums = torch.zeros(6 + len(student.plan.mamba_layers), device=self.device)
        self.n_summed, self.unseen = 0, []
        self.seconds_before = self.last_row_at = 0.0
        self.store: Checkpoints | None = None
        self.restored: dict[str, Tensor] | None = None

    def keep_in(self, folder: str | Path, resume: bool) -> None:
        """Keep metrics and checkpoints in a folder; take up the run that is there."""
        o, plan = self.options, self.vlm.plan
        same = {
            "plan": [plan.n_layers, list(plan.mamba_layers)],
            "mixer options": text_config(self.model).ssm_hybrid["options"],
            "stages": [stage.to_dict() for stage in self.stages],
            "batches": [o.batch_size, o.accumulate, o.max_length, self.processes.count],
            "seed": o.seed,
            "bf16": self.bf16,
            "teacher": fingerprint(self.teacher.model, rounded=torch.bfloat16)[:12],
            "data": self.processes.first(_described(self.data)),
            "shapes": {name: list(p.shape) for name, p in self.trained.items()},
        }
        store = Checkpoints(folder, same, writes=self.processes.rank == 0)
        self.undo.callback(store.close)
        found = store.open(resume)
        self.store = store
        if found is None:
            return
        with torch.no_grad():
            for name, p in self.trained.items():
                p.copy_(part_of(found.weights[name], p))
        state, self.rows, self.step = found.state, list(found.rows), found.step
        self.n_tokens, self.n_cut, self.n_summed = (
            state[name] for name in ("n_tokens", "n_cut", "n_summed")
        )
        self.seconds_before, self.last_row_at = state["seconds"], state["last_row_at"]
        self.sums.copy_(torch.tensor(state["sums"]))
        self.restored = found.training

    def run(self) -> Run:
        """All stages from where the run stands; ends early when asked to."""
        o, n = self.options, self.processes.count
        batches = as_batches(
            self.vlm, self.data, batch_size=o.batch_size, seed=o.seed, max_length=o.max_length,
            first=self.step * o.accumulate * n + self.processes.rank, stride=n,
        )  # fmt: skip
        self.started, stopped = time.perf_counter(), False
        with (
            tqdm(total=self.whole, initial=self.step, disable=not o.progress) as bar,
            _interrupts() as self.interrupted,
        ):
            for stage, step in self._steps():
                self._step(stage, step, batches)
                last_of_stage = step == stage.steps
                if self.step % o.log_every == 0 or last_of_stage:
                    self._log(stage, step)
                    bar.set_postfix_str(str(self.rows[-1]), refresh=False)
                bar.update()
                stopped = self.step < self.whole and self._asked_to_stop()
                if self.step % o.save_every == 0 or self.step == self.whole or stopped:
                    self._save(stage, step)
                if stopped:
                    break
        if self.vlm is not self.student:
            give_back(self.trained, self.student.model)
        return Run(
            self.vlm.name, tuple(self.rows), sum(p.numel() for p in self.trained.values()),
            self.stages, self.step, self._seconds(), self.n_tokens, self.n_cut, stopped,
        )  # fmt: skip

    def _steps(self) -> Iterator[tuple[Stage, int]]:
        """What is still to be done: each step's stage, and its number in it from 1."""
        before = 0
        for stage in self.stages:
            done = max(0, self.step - before)
            if done < stage.steps:
                self._begin(stage, fresh=done == 0)
                for step in range(done + 1, stage.steps + 1):
                    yield stage, step
            before += stage.steps

    def _begin(self, stage: Stage, fresh: bool) -> None:
        """Freeze what a stage does not train, and make its optimiser, or take it up again."""
        self.objective.stage = stage
        self.training = trained_parameters(self.vlm, stage.trains)
        chosen = {id(p) for p in self.training.values()}
        for p in self.model.parameters():
            p.requires_grad_(id(p) in chosen)
        groups = parameter_groups(self.vlm, self.training, stage)
        # One kernel for all parameters: small models wait for launches, not for arithmetic.
        fused = all(p.is_cuda for p in self.training.values())
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=fused or None)
        for p in self.training.values() if self.graphed else ():
            p.grad = torch.zeros_like(p)
        self.module = self.processes.wrap(self.objective)
        if self.restored is not None:
            restore_training(self.optimizer, {} if fresh else self.training, self.restored)
            self.restored = None

    def _step(self, stage: Stage, step: int, batches: Iterator[Batch]) -> None:
        rate = stage.rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        micro = [_next(batches, self.step + 1) for _ in range(self.options.accumulate)]
        where = [places(batch, stage.tokens) for batch in micro]
        counts = torch.stack([at.counts for at in where]).sum(0)
        counts = self.processes.sum(counts.to(self.device, non_blocking=True))
        per_token = self.processes.count / counts.clamp(min=1)
        record = 0
        for batch, at in zip(micro, where, strict=True):
            with self.processes.together(self.module, at is where[-1]):
                total, part = self.module(batch, at, per_token)
                total.backward()
            record = record + part
        if self.processes.shards and not self.processes.any(
            any("pixel_values" in batch for batch in micro)
        ):
            for name in filter(reads_pictures, self.training):
                self.training[name].grad = None  # not 0, by which AdamW would move it
        norm = whole(nn.utils.clip_grad_norm_(self.training.values(), 1.0))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.graphed)
        record = self.processes.sum(record) / self.processes.count
        self.sums += torch.cat((record, counts[1:2]))
        self.unseen.append(torch.stack((record[0], norm)))
        self.n_summed += 1
        self.step += 1
        self.n_cut += sum(int(batch.get("n_cut", 0)) for batch in micro)

    def _log(self, stage: Stage, step: int) -> None:
        """Make a row of what was summed up, and let everybody know."""
        self._look(stage, step)
        total, layer, kl, ce, hidden, *layers, tokens = self.sums.tolist()
        n, now = self.n_summed, self._seconds()
        since = max(now - self.last_row_at, 1e-9)
        rate = stage.rate(step)
        self.n_tokens += int(tokens)
        row = StepRow(
            step=self.step,
            stage=stage.name,
            loss=total / n,
            layer_loss=layer / n if stage.layer_weight else None,
            kl_nats=kl / n if stage.kl_weight else None,
            ce_nats=ce / n if stage.ce_weight else None,
            hidden_loss=hidden / n if stage.hidden_weight else None,
            lr=stage.lr * rate,
            lr_new=stage.lr_new * rate,
            seconds=now,
            eta_s=(self.whole - self.step) * since / n,
            tokens_per_s=tokens / since,
            layer_losses=tuple(value / n for value in layers) if stage.layer_weight else (),
        )
        self.sums.zero_()
        self.n_summed, self.last_row_at = 0, now
        self.rows.append(row)
        if self.store is not None:
            self.store.log(row)
        if self.options.on_step is not None:
            try:
                self.options.on_step(row)
            except KeyboardInterrupt:
                self.interrupted.set()

    def _look(self, stage: Stage, step: int) -> None:
        """Show the watch every step since it last looked."""
        losses = torch.stack(self.unseen).tolist() if self.unseen else []
        for back, (loss, norm) in zip(range(len(losses) - 1, -1, -1), losses, strict=True):
            lr = stage.lr * stage.rate(step - back)
            self.watch.look(self.step - back, stage.name, loss, norm, lr)
        self.unseen.clear()

    def _save(self, stage: Stage, step: int) -> None:
        """Write a checkpoint, unless the run is suspected of running away."""
        if self.store is None:
            return
        self._look(stage, step)
        if self.watch.n_high:
            return
        state = {
            "n_tokens": self.n_tokens, "n_cut": self.n_cut, "n_summed": self.n_summed,
            "seconds": self._seconds(), "last_row_at": self.last_row_at,
            "sums": self.sums.tolist(),
        }  # fmt: skip
        weights, training = (
            self.processes.whole(tensors)
            for tensors in (self.trained, training_tensors(self.optimizer, self.training))
        )
        failed = None
        try:
            self.store.save(self.step, weights, training, state)
        except WorkbenchError as error:
            failed = error
        if self.processes.any(failed is not None):
            raise failed or WorkbenchError("The first process could not write its checkpoint.")

    def _asked_to_stop(self) -> bool:
        stop = self.options.stop
        asked = stop.is_set() if isinstance(stop, threading.Event) else bool(stop and stop())
        return self.processes.any(asked or self.interrupted.is_set())

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """An Event that Ctrl-C sets, so that it ends the run between two steps; a second one raises."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.getsignal(signal.SIGINT)

    def ask(number: int, frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def _described(data: Iterable) -> list:
    """Say enough of data to tell it from other data; of an iterator nothing can be said."""
    if not isinstance(data, Sequence) or not len(data):
        return []
    said = [data[0].question] if isinstance(data[0], Sample) else []
    return [getattr(data, "name", ""), len(data), *said]


def _next(batches: Iterator[Batch], step: int) -> Batch:
    try:
        return next(batches)
    except StopIteration:
        raise WorkbenchError(
            f"The data ended before step {step}: give more batches, or ask for fewer steps."
        ) from None
