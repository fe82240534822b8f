"""What each ingredient gives: the same data, the same steps, row by row, and three seeds.

    python -m benchmarks.ablation.run --seconds 520 --steps 1000 --out FOLDER
    python -m benchmarks.ablation.run --teacher smollm2 --corpus CORPUS --seconds 520 --out FOLDER
    python -m benchmarks.ablation.run --rows ROWS.json --ratios 25 --seeds 1 --score 160
    python -m benchmarks.ablation.run --steps 2 --batch 4 --seeds 1 --limit 4 --only init   (CPU)

Writes ablation_NAME.jsonl, a line a job as soon as it is done, then .json and .md: KL to the
teacher before training and after, how often both would say the same next token, and seconds, at
each ratio. What matters most runs first; nothing is begun that would not end within `--seconds`.
The same command goes on with what is missing, `--join` with what another run found.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
import transformers

import workbench as wb
from benchmarks.ablation.data import batches_of, begin_drawing, load_teacher
from benchmarks.ablation.record import Record
from benchmarks.ablation.rows import ROWS, jobs_of, read_rows
from benchmarks.ablation.schedule import Schedule
from benchmarks.ablation.table import report
from benchmarks.ablation.workers import run_here, run_parallel, visible_gpus
from benchmarks.smollm2.corpus import HELDOUT

RESULTS = Path(__file__).parents[1] / "results"
# What results depend on: it must be the same when a run goes on.
SAME = ("teacher", "steps", "align", "batch", "lr", "context", "limit", "score", "data_seed", "cap")
WRITING = 4  # seconds kept for the table
# Where the teacher is a language model, and where it is pocket.
USUAL = {True: {"steps": 305, "batch": 32, "lr": 5e-4}, False: {"steps": 1000, "batch": 16}}


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """The command line, with what follows from it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--teacher", choices=("pocket", "smollm2"), default="pocket")
    parser.add_argument("--corpus", help="of smollm2: folder of tokens.npy")
    parser.add_argument("--gguf", help="of smollm2: read the teacher from this file")
    parser.add_argument("--heldout", default=str(HELDOUT), help="of smollm2: held-out texts")
    parser.add_argument("--context", type=int, default=1024, help="of smollm2: tokens a sequence")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, help="processes; 0 is this one; 4 a GPU, or 1")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, help="after which all has ended")
    parser.add_argument("--steps", type=int, help="1,000; of smollm2 305")
    parser.add_argument("--align", type=int, help="steps of alignment; a third of --steps if not")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ratios", type=float, nargs="+", default=[25, 50, 100])
    parser.add_argument("--placement-ratios", type=float, nargs="+", default=[50, 75])
    parser.add_argument("--batch", type=int, help="16 sequences a step; of smollm2 32")
    parser.add_argument("--lr", type=float, help="the recipe's; of smollm2 5e-4")
    parser.add_argument("--limit", type=int, default=64, help="held-out sequences of each KL")
    parser.add_argument("--score", type=int, default=0, help="held-out questions to be answered")
    parser.add_argument("--data-seed", type=int, default=2000, help="of the first seed's data")
    parser.add_argument("--compile", action="store_true", help="every decoder layer")
    parser.add_argument("--graph", action="store_true", help="every decoder layer a CUDA graph")
    parser.add_argument("--kernels", default="auto", help="of the scan; auto measures them first")
    parser.add_argument("--rows", type=Path, help="a JSON list of rows in place of the built-in")
    parser.add_argument("--cap", type=int, help="at most so many steps a row, to try a file")
    names = sorted({name for row in ROWS for name in (row.group, row.name)})
    parser.add_argument("--only", nargs="+", metavar="ROW",
                        help=f"or train/ROW/50/0, or a group: {names}")  # fmt: skip
    parser.add_argument("--join", type=Path, nargs="+", default=[], help=".jsonl of earlier runs")
    parser.add_argument("--name", default="pocket")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(words)
    args.on_text = args.teacher == "smollm2"
    if args.on_text and not args.corpus:
        parser.error("--teacher smollm2 needs --corpus")
    if args.on_text and args.score:
        parser.error("--score asks about pictures: leave it out for smollm2")
    for name, value in USUAL[args.on_text].items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    args.align = args.align or max(1, args.steps // 3)
    if args.workers is None:
        each = 1 if args.on_text else 4
        args.workers = each * len(visible_gpus()) if args.device == "cuda" else 1
    args.drawers = max(1, args.cores - args.workers)
    return args


def main(words: list[str] | None = None) -> None:
    """Read the command line, run, write."""
    # What was spent before this line, on importing, counts as well.
    began = psutil.Process().create_time() if words is None else time.time()
    args = parsed(words)

    def seconds_left() -> float:
        return (args.seconds or float("inf")) - WRITING - (time.time() - began)

    settings = {name: getattr(args, name) for name in SAME}
    record = Record(args.out / f"ablation_{args.name}.jsonl", settings, args.join)
    schedule = Schedule(jobs_of(args), record, args, seconds_left)
    print(f"{len(schedule.pending)} jobs, {args.workers} worker(s) on {args.device}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="ablation"))
    drawing = []
    try:
        if not args.on_text:
            tokenizer = load_teacher(args, "cpu").tokenizer
            wanted = batches_of(schedule.pending, args)
            drawing = begin_drawing(tokenizer, wanted, folder, args)
        (run_parallel if args.workers else run_here)(schedule, args, folder)
    finally:
        for process in drawing:
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)
        write(record, len(schedule.pending), args)


def write(record: Record, left: int, args: argparse.Namespace) -> None:
    """The JSON with every run, and the table."""
    lines = list(record.found.values())
    devices = sorted({line["device"] for line in lines if "device" in line})
    versions = {"torch": torch.__version__, "transformers": transformers.__version__,
                "python": platform.python_version(), "device": " and ".join(devices)}  # fmt: skip
    place = args.out / f"ablation_{args.name}"
    found = {"settings": record.settings, "versions": versions, "not_done": left, "runs": lines}
    place.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    order = [row.name for row in (read_rows(args.rows) if args.rows else ROWS)]
    text = "\n".join(report(lines, record.settings, versions, left, order)) + "\n"
    place.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    # Asked to end, it still writes the table.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        main()
    except wb.WorkbenchError as error:
        raise SystemExit(str(error)) from None
