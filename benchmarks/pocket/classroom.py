"""What a class reaches without a GPU: minutes of distillation on a CPU, and how much comes back.

    python -m benchmarks.pocket.classroom --steps 300 --bf16 --out benchmarks/results/classroom.json

A hybrid of `--ratio` starts as the paper starts it (`--init matvlm`), is scored, distilled for so
many steps, whose seconds are taken, and scored again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

import workbench as wb
from workbench.data.conversations import Encoder, TrainingBatches
from workbench.steps.efficiency.machine import about


def scored(vlm: wb.VLM, args: argparse.Namespace) -> dict:
    """Right answers on held-out samples."""
    result = wb.evaluate(vlm, "pocket", limit=args.limit)
    print(result, flush=True)
    return result.to_dict()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--init", default="matvlm")
    parser.add_argument("--recipe", default="workbench")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=4, help="pictures a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--bf16", action="store_true", help="of a CPU that multiplies it itself")
    parser.add_argument("--limit", type=int, default=160, help="held-out questions of each score")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    teacher = wb.load_teacher("pocket")
    plan = wb.choose_layers(teacher, ratio=args.ratio)
    data = TrainingBatches(
        Encoder(teacher.tokenizer), args.batch, seed=args.seed + 3000, several_every=10**9
    )
    best = scored(teacher, args)
    student = wb.convert(teacher, plan, init=args.init, seed=args.seed)
    before, began = scored(student, args), time.perf_counter()
    run = wb.distill(
        student, teacher, data, recipe=args.recipe, steps=args.steps, lr=args.lr, seed=args.seed,
        bf16=args.bf16, log_every=max(1, args.steps // 20),
        on_step=lambda row: print(row, flush=True),
    )  # fmt: skip
    seconds = time.perf_counter() - began
    after = scored(student, args)
    recovered = (after["score"] - before["score"]) / (best["score"] - before["score"])
    print(f"{args.steps} steps, {seconds:.0f} s: {recovered:.0%} of what conversion cost came back")
    if args.out:
        report = {
            "machine": about(torch.device("cpu")), "seconds": seconds, "recovered": recovered,
            "teacher": best, "before": before, "after": after, "run": run.to_dict(),
        }  # fmt: skip
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
