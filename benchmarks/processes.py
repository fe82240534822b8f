"""What each of several processes holds at its peak, and that they say the same.

    accelerate launch --num_processes 2 --multi_gpu -m benchmarks.processes
    accelerate launch --num_processes 2 --use_fsdp --fsdp_version 2 -m benchmarks.processes

A Llama of SmolLM2-135M's shape with random weights, 25 % of it Mamba-2, all of which trains by KL.
Every process prints one line of JSON: its rank, its peak in MiB, loss of each step, tokens/s.
"""

from __future__ import annotations

import argparse
import json
import os

import torch

import workbench as wb
from benchmarks.training_step import SIZES, models
from workbench.mamba import kernels
from workbench.steps.training.parallel import own_device

WARM_UP, STEPS = 3, 8


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="smollm2-135m")
    parser.add_argument("--batch", type=int, default=2, help="sequences of each process")
    parser.add_argument("--length", type=int, default=1024, help="tokens of each")
    parser.add_argument("--ratio", type=float, default=0.25)
    args = parser.parse_args()
    args.device = own_device()
    on_gpu = args.device != "cpu"
    if on_gpu:
        torch.cuda.set_device(args.device)
    kernels.use("torch")
    student, teacher = models(args)
    rank = int(os.environ.get("RANK", 0))
    torch.manual_seed(1 + rank)
    ids = torch.randint(0, 500, (args.batch, args.length))  # words that both sizes know

    def on_step(row: wb.StepRow) -> None:
        if row.step == WARM_UP and on_gpu:
            torch.cuda.reset_peak_memory_stats()

    stage = wb.Stage("distill", STEPS, kl_weight=1, trains="all", tokens="all", lr=1e-4)
    run = wb.distill(
        student, teacher, [{"input_ids": ids, "labels": ids}], recipe=[stage], on_step=on_step,
        log_every=1,
    )  # fmt: skip
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None
    losses, rate = [round(row.loss, 5) for row in run.rows], run.rows[-1].tokens_per_s
    print(
        json.dumps({"rank": rank, "peak_mib": peak, "losses": losses, "tokens_per_s": rate}),
        flush=True,
    )


if __name__ == "__main__":
    main()
