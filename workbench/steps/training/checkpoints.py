"""Checkpoints that survive: a run killed at any moment goes on from the last whole one.

A folder holds `metrics.jsonl`, a row a line, and `step-N/` with `weights.safetensors` (what
trains), `training.safetensors` (AdamW's moments, the state of the random generators) and
`state.json`. A checkpoint is written beside the last one under another name, brought to the disk,
and only then renamed; after that the last one goes.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from workbench.errors import WorkbenchError
from workbench.steps.training.runs import StepRow
from workbench.steps.training.sharding import part_of

WEIGHTS, TRAINING, STATE, METRICS = (
    "weights.safetensors", "training.safetensors", "state.json", "metrics.jsonl"
)  # fmt: skip
UNFINISHED = ".unfinished"


class Checkpoint(NamedTuple):
    """What was read back."""

    step: int
    state: dict  # plain data
    weights: dict[str, Tensor]
    training: dict[str, Tensor]
    rows: tuple[StepRow, ...]


class Checkpoints:
    """The folder of one run.

    Args:
        folder: made if it is not there.
        run: plain data that must be the same when the run goes on: plan, stages, and so on.
        writes: False in all processes but the first, which only read.
    """

    def __init__(self, folder: str | Path, run: Mapping, *, writes: bool = True) -> None:
        self.folder, self.run = Path(folder).expanduser(), json.loads(json.dumps(run))
        self.writes, self._metrics = writes, None
        if self.folder.exists() and not self.folder.is_dir():
            raise WorkbenchError(f"{self.folder} is a file; name a folder to keep the run in.")
        self.folder.mkdir(parents=True, exist_ok=True)

    def open(self, resume: bool) -> Checkpoint | None:
        """Begin, or go on from the last whole checkpoint, and cut the metrics back to it.

        Raises:
            WorkbenchError: a run is there but `resume` is not asked for; the checkpoint belongs to
                another plan or recipe; or it is damaged.
        """
        found = self._found()
        if found and not resume:
            raise WorkbenchError(
                f"{self.folder} holds a run already: go on with resume=True, or name another one."
            )
        checkpoint = self._read(found[-1]) if found else None
        if not self.writes:
            return checkpoint
        for left in self.folder.glob(f"*{UNFINISHED}"):
            shutil.rmtree(left, ignore_errors=True)
        rows = checkpoint.rows if checkpoint else ()
        fresh = self.folder / f"{METRICS}{UNFINISHED}"
        fresh.write_text("".join(f"{json.dumps(asdict(row))}\n" for row in rows))
        os.replace(fresh, self.folder / METRICS)
        self._metrics = (self.folder / METRICS).open("a")
        return checkpoint

    def log(self, row: StepRow) -> None:
        """Add a row to the metrics, at once.

        Raises:
            WorkbenchError: it cannot be written.
        """
        if not self.writes:
            return
        try:
            self._metrics.write(f"{json.dumps(asdict(row))}\n")
            self._metrics.flush()
        except OSError as error:
            raise self._failed(error) from error

    def save(
        self, step: int, weights: Mapping[str, Tensor], training: Mapping[str, Tensor], state: dict
    ) -> None:
        """Write a checkpoint; the one before stays until this one is whole.

        Raises:
            WorkbenchError: it cannot be written: the disk is full, for one.
        """
        target = self.folder / f"step-{step:08d}"
        if target.exists() or not self.writes:
            return
        unfinished = target.with_name(target.name + UNFINISHED)
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            for name, tensors in ((WEIGHTS, weights), (TRAINING, training)):
                save_file({n: t.detach().contiguous() for n, t in tensors.items()},
                          unfinished / name)  # fmt: skip
            plain = {"step": step, "run": self.run, "state": state}
            (unfinished / STATE).write_text(json.dumps(plain, indent=1))
            for path in (*unfinished.iterdir(), unfinished):
                _to_disk(path)
            os.replace(unfinished, target)
            _to_disk(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise self._failed(error) from error
        for old in self._found():
            if old != target:
                shutil.rmtree(old, ignore_errors=True)

    def close(self) -> None:
        """Let go of the metrics."""
        if self._metrics is not None:
            with suppress(OSError):
                self._metrics.close()

    def _found(self) -> list[Path]:
        return sorted(
            path for path in self.folder.glob("step-*")
            if not path.name.endswith(UNFINISHED) and (path / STATE).is_file()
        )  # fmt: skip

    def _read(self, path: Path) -> Checkpoint:
        try:
            plain = json.loads((path / STATE).read_text())
            step, run, state = plain["step"], plain["run"], plain["state"]
            weights, training = (load_file(path / name) for name in (WEIGHTS, TRAINING))
        except (OSError, json.JSONDecodeError, KeyError, TypeError, SafetensorError) as error:
            raise WorkbenchError(f"The checkpoint {path} cannot be read: {error}.") from error
        for name, value in self.run.items():
            if run.get(name, value) != value:  # a run of an older workbench may not say
                raise WorkbenchError(
                    f"The checkpoint {path} belongs to another run: its {name} is "
                    f"{_short(run.get(name))}, not {_short(value)}. Name another folder, or ask "
                    "for what it was begun with."
                )
        return Checkpoint(step, state, weights, training, tuple(self._rows(step)))

    def _rows(self, step: int) -> Iterable[StepRow]:
        path = self.folder / METRICS
        for line in path.read_text().splitlines() if path.is_file() else ():
            try:
                row = StepRow.from_dict(json.loads(line))
            except (json.JSONDecodeError, TypeError):
                return  # cut off when the run was killed
            if row.step <= step:
                yield row

    def _failed(self, error: Exception) -> WorkbenchError:
        full = getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error)
        reason = "the disk is full" if full else str(error).rstrip(".")
        found = self._found()
        kept = f"the last good checkpoint, {found[-1].name}, is whole" if found else "none is kept"
        return WorkbenchError(
            f"The run cannot be kept in {self.folder}: {reason}; {kept}. "
            "Make room, then go on with resume=True."
        )


def layers_of(folder: str | Path) -> tuple[int, ...] | None:
    """The Mamba-2 layers of the run that a folder holds; None where there is none.

    Raises:
        WorkbenchError: its last checkpoint is damaged.
    """
    found = sorted(Path(folder).expanduser().glob(f"step-*[0-9]/{STATE}"))
    try:
        return tuple(json.loads(found[-1].read_text())["run"]["plan"][1]) if found else None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise WorkbenchError(
            f"The checkpoint {found[-1].parent} cannot be read: {error}."
        ) from error


def training_tensors(optimizer: Optimizer, trained: Mapping[str, nn.Parameter]) -> dict:
    """AdamW's state by the names of parameters, and the random generators', as tensors."""
    names = {id(p): name for name, p in trained.items()}
    tensors = {
        f"{names[id(p)]}/{key}": torch.as_tensor(value)
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }
    tensors["rng/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    return tensors


def restore_training(
    optimizer: Optimizer, trained: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `training_tensors` took."""
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        if name == "rng":
            put = {"cpu": torch.set_rng_state, "cuda": torch.cuda.set_rng_state}[entry]
            if entry == "cpu" or torch.cuda.is_available():
                put(value)
        elif name in trained:
            p = trained[name]
            if entry != "step":
                value = part_of(value, p)
            elif optimizer.defaults.get("fused"):
                value = value.to(p.device)
            optimizer.state[p][entry] = value


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
