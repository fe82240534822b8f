"""What a training step costs: tokens/s and peak memory of ours and of the paper's, written plainly.

    python -m benchmarks.training_step --device cuda --batch 8 --length 1024 --json OUT.json

A Llama of SmolLM2-135M's shape with random weights is converted at `--ratio`; each way of stepping
runs in a process of its own, one after the other, on the same random tokens:

plain    the paper's step (`plain_step.py`)
matvlm   both of the paper's losses as `distill` computes them, over the same positions
align    the first stage of the default recipe: layers on their own, no logits
distill  its second stage: KL over the same positions
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import workbench as wb
from benchmarks.plain_step import PlainStep
from workbench.mamba import kernels
from workbench.steps.training.stages import RECIPES

WAYS = ("plain", "matvlm", "align", "distill")
SIZES = {  # SmolLM2-135M's config.json, and what a test can afford
    "smollm2-135m": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    },
    "tiny": {
        "vocab_size": 512, "hidden_size": 48, "intermediate_size": 64,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    },
}  # fmt: skip


def models(args: argparse.Namespace) -> tuple[wb.VLM, wb.VLM]:
    """Student and teacher."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES[args.size], tie_word_embeddings=True,
                         max_position_embeddings=max(2048, args.length))  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).to(args.device).eval()
    teacher = wb.VLM("random", model, None)
    plan = wb.choose_layers(teacher, ratio=args.ratio)
    return wb.convert(teacher, plan, init="matvlm"), teacher


class Meter:
    """Seconds and peak memory from the end of the warm-up on."""

    def __init__(self, device: str):
        self.on_gpu = device.startswith("cuda")

    def start(self) -> None:
        """Begin to count."""
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.began = time.perf_counter()

    def stop(self) -> tuple[float, float]:
        """Seconds, and MiB: of tensors on a GPU, of the whole process on a CPU."""
        if self.on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.began
        if self.on_gpu:
            return seconds, torch.cuda.max_memory_allocated() / 2**20
        return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def measured(way: str, args: argparse.Namespace) -> dict:
    """Run one way: warm-up, then the steps that count."""
    student, teacher = models(args)
    ids = torch.randint(0, SIZES[args.size]["vocab_size"], (args.batch, args.length))
    meter = Meter(args.device)
    if way == "plain":
        step, ids = PlainStep(student, teacher, compiled=args.compile), ids.to(args.device)
        for _ in range(args.warmup):
            step(ids)
        meter.start()
        for _ in range(args.steps):
            step(ids)
        seconds, mib = meter.stop()
    else:
        stages = {stage.name: stage for recipe in RECIPES.values() for stage in recipe}
        stage = replace(stages[way], steps=args.warmup + args.steps, tokens="all")
        ends: list[tuple[float, float]] = []

        def on_step(row: wb.StepRow) -> None:
            if row.step == args.warmup:
                meter.start()
            elif row.step == args.warmup + args.steps:
                ends.append(meter.stop())

        wb.distill(
            student, teacher, [{"input_ids": ids, "labels": ids}], recipe=[stage],
            compile_layers=args.compile, graph_layers=args.graph, on_step=on_step,
            log_every=args.warmup,
        )  # fmt: skip
        (seconds, mib) = ends[0]
    tokens = args.steps * args.batch * args.length
    return {"way": way, "tokens_per_s": tokens / seconds, "peak_mib": mib,
            "step_ms": 1e3 * seconds / args.steps}  # fmt: skip


def table(rows: list[dict]) -> str:
    """Markdown, with the plain step as 1."""
    plain = rows[0]
    lines = ["| step | tokens/s | x plain | peak MiB | x plain |"]
    lines.append("| --- | ---: | ---: | ---: | ---: |")
    for row in rows:
        lines.append(
            f"| {row['way']} | {row['tokens_per_s']:,.0f} "
            f"| {row['tokens_per_s'] / plain['tokens_per_s']:.2f} "
            f"| {row['peak_mib']:,.0f} | {row['peak_mib'] / plain['peak_mib']:.2f} |"
        )
    return "\n".join(lines)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--size", choices=SIZES, default="smollm2-135m")
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20, help="that count")
    parser.add_argument("--compile", action="store_true", help="every decoder layer, both ways")
    parser.add_argument("--graph", action="store_true", help="CUDA graphs, not in the plain step")
    parser.add_argument("--kernels", default="auto", help="of the scan; auto measures them first")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Command line."""
    args = parsed()
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 64
    kernels.use(args.kernels)
    if args.only:
        print(json.dumps(measured(args.only, args)))
        return
    rows = []
    for way in args.ways:
        command = [sys.executable, "-m", "benchmarks.training_step", *sys.argv[1:], "--only", way]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    on_gpu = args.device.startswith("cuda")
    machine = torch.cuda.get_device_name() if on_gpu else "CPU"
    print(f"\n{machine}, torch {torch.__version__}\n\n{table(rows)}")
    if args.json:
        arguments = {name: value for name, value in vars(args).items() if name != "json"}
        found = {"machine": machine, "torch": torch.__version__, "arguments": arguments}
        found["rows"] = rows
        Path(args.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
