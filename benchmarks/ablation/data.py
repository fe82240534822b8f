"""What rows are trained and measured on: the same for every row of a seed, drawn only once."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch

import workbench as wb
from benchmarks.ablation.rows import Job
from workbench.data.conversations import Encoder, TrainingBatches
from workbench.data.text import TextBatches, Texts, load_texts, read_ids
from workbench.models.sources import smollm2
from workbench.steps.training.batches import collate

# Of each array of a batch, how it is kept: pictures are bytes as they are drawn, ids fit 16 bits.
KEPT_AS = {"pixel_values": np.uint8, "input_ids": np.int16, "labels": np.int16, "real": np.bool_}
PATIENCE = 300  # seconds to wait for a batch that is being drawn
N_CALIBRATED = 12  # sequences of the training text that mixers are fitted to


def load_teacher(args: argparse.Namespace, device: str) -> wb.VLM:
    """The teacher; a language model's file may be named by `--gguf`."""
    if args.gguf:
        model, tokenizer = smollm2.read_gguf(args.gguf)
        return wb.VLM(smollm2.TEACHER, model.to(device), tokenizer)
    return wb.load_teacher(smollm2.TEACHER if args.on_text else args.teacher, device=device)


class DrawnBatches:
    """Batches of `TrainingBatches` in files that processes share, exactly as they were drawn.

    One process draws batch `n` while others already read those before it.
    """

    def __init__(self, folder: Path, *, pinned: bool = False) -> None:
        self.arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in KEPT_AS}
        self.done = np.load(folder / "done.npy", mmap_mode="r")
        self.pinned = pinned  # so that a copy to a GPU waits for nothing

    def __iter__(self) -> Iterator[dict]:
        return (self.batch(number) for number in range(len(self.done)))

    def batch(self, number: int) -> dict:
        """Batch `number`, as soon as it is there.

        Raises:
            WorkbenchError: nobody draws it.
        """
        end = time.monotonic() + PATIENCE
        while number < len(self.done) and not self.done[number] and time.monotonic() < end:
            time.sleep(0.02)
        if number >= len(self.done) or not self.done[number]:
            raise wb.WorkbenchError(f"Batch {number} was not drawn: {len(self.done)} were to be.")
        made = {name: torch.from_numpy(array[number].copy()) for name, array in self.arrays.items()}
        made |= {name: made[name].long() for name in ("input_ids", "labels")}
        return {name: t.pin_memory() for name, t in made.items()} if self.pinned else made


def batches_of(jobs: list[Job], args: argparse.Namespace) -> dict[tuple[int, int], int]:
    """How many batches the jobs read, by seed and batch size."""
    wanted: dict[tuple[int, int], int] = {}
    for job in jobs:
        if job.kind == "train":
            key, n = (job.seed, job.row.batch or args.batch), job.row.n_steps(args)
        elif job.kind == "donor":
            key, n = (job.seed, args.batch), args.align
        else:
            continue
        wanted[key] = max(n, wanted.get(key, 0))
    return wanted


def begin_drawing(
    tokenizer: object, wanted: dict[tuple[int, int], int], folder: Path, args: argparse.Namespace
) -> list[BaseProcess]:
    """Make the files for `wanted`, {(seed, batch size): batches}, and let processes fill them."""
    for (seed, size), n in wanted.items():
        _make_files(_source(tokenizer, seed, size, args).batch(0), n, _place(folder, seed, size))
    share = [
        get_context("fork").Process(
            target=_draw, args=(tokenizer, wanted, folder, args, i), daemon=True
        )
        for i in range(args.drawers)
    ]
    for process in share:
        process.start()
    return share


def _source(tokenizer: object, seed: int, size: int, args: argparse.Namespace) -> TrainingBatches:
    # One picture each: prompts of four take four times as long and say no more here.
    return TrainingBatches(
        Encoder(tokenizer), size, seed=args.data_seed + seed, several_every=10**9
    )


def _place(folder: Path, seed: int, size: int) -> Path:
    return folder / f"batches-{seed}-{size}"


def _make_files(like: dict, n: int, place: Path) -> None:
    place.mkdir(parents=True)
    for name, kind in KEPT_AS.items():
        shape = (n, *like[name].shape)
        np.lib.format.open_memmap(place / f"{name}.npy", "w+", kind, shape).flush()
    np.lib.format.open_memmap(place / "done.npy", "w+", np.uint8, (n,)).flush()


def _draw(
    tokenizer: object, wanted: dict, folder: Path, args: argparse.Namespace, share: int
) -> None:
    """Draw every `args.drawers`-th batch; those that are read first come first."""
    torch.set_num_threads(1)
    stores = [
        (_source(tokenizer, *key, args), _open(_place(folder, *key)), n)
        for key, n in wanted.items()
    ]
    for number in range(share, max(wanted.values(), default=0), args.drawers):
        for source, arrays, n in stores:
            if number < n:
                batch = source.batch(number)
                for name in KEPT_AS:
                    arrays[name][number] = batch[name].numpy()
                arrays["done"][number] = 1


def _open(place: Path) -> dict[str, np.ndarray]:
    return {name: np.load(place / f"{name}.npy", mmap_mode="r+") for name in (*KEPT_AS, "done")}


class PocketData:
    """Generated scenes."""

    def __init__(self, teacher: wb.VLM, folder: Path, args: argparse.Namespace) -> None:
        self.teacher, self.folder, self.args = teacher, folder, args
        self.held_out = self._batches(self._single("test", 2 * args.limit)[: args.limit])
        self.samples = wb.load_data("pocket", split="test", limit=args.score or 1)[:]

    def training(self, seed: int, size: int) -> DrawnBatches:
        """The seed's batches, the same for each row."""
        pinned = self.teacher.model.device.type == "cuda"
        return DrawnBatches(_place(self.folder, seed, size), pinned=pinned)

    def calibration(self, seed: int) -> None:
        """What mixers are fitted to: the library's own drawings."""
        return None

    def searched_on(self) -> list:
        """What placements are searched with."""
        return self._single("train", 48)

    def _single(self, split: str, limit: int) -> list[wb.Sample]:
        return [
            s for s in wb.load_data("pocket", split=split, limit=limit)[:] if len(s.images) == 1
        ]

    def _batches(self, samples: list[wb.Sample]) -> list[dict]:
        return [collate(self.teacher, samples[i : i + 16]) for i in range(0, len(samples), 16)]


class TextData:
    """Packed text from a corpus, and fixed windows of held-out text."""

    def __init__(self, teacher: wb.VLM, args: argparse.Namespace) -> None:
        self.args = args
        end = teacher.tokenizer.eos_token_id
        self.tokens = read_ids(Path(args.corpus) / "tokens.npy", end)
        self.held_out = _windows(teacher, load_texts(args.heldout), args)
        self._made: dict[tuple[int, int], TextBatches] = {}

    def training(self, seed: int, size: int) -> TextBatches:
        """The seed's batches, the same for each row."""
        if (seed, size) not in self._made:
            self._made[seed, size] = TextBatches(
                self.tokens, batch_size=size, context=self.args.context, seed=seed
            )
        return self._made[seed, size]

    def calibration(self, seed: int) -> list[dict]:
        """What mixers are fitted to: a few sequences of the training text."""
        batch = self.training(seed, self.args.batch).batch(0)
        return [{name: t[:N_CALIBRATED] for name, t in batch.items()}]

    def searched_on(self) -> list[dict]:
        """What placements are searched with."""
        return self.calibration(0)


def _windows(teacher: wb.VLM, texts: Texts, args: argparse.Namespace) -> list[dict]:
    """The first `--limit` windows of the held-out text, which are drawn from all of it."""
    packed = Texts(texts.name, texts, context=args.context).batches(teacher.tokenizer, batch_size=1)
    rows = [packed.batch(i) for i in range(min(args.limit, len(packed.sequences)))]
    return [_joined(rows[i : i + 8]) for i in range(0, len(rows), 8)]


def _joined(rows: list[dict]) -> dict:
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
