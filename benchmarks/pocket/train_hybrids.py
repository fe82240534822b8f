"""Distil the pocket hybrids from the pocket teacher, one after the other.

    python -m benchmarks.pocket.train_hybrids --teacher FOLDER --out FOLDER 12.5:60 25:80 50:120

Each is made by the library's own verbs, choose_layers(even), convert(init) and distill, from the
teacher alone. Writes a delta and the curve of each hybrid.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch.utils.data import DataLoader

import workbench as wb
from workbench.data.conversations import Encoder, TrainingBatches
from workbench.models.delta import save_delta


def on_gpu() -> bool:
    """Whether to train on a GPU; without one everything runs, slowly, on the CPU."""
    return torch.cuda.is_available()


def batches(teacher: wb.VLM, args: argparse.Namespace) -> DataLoader:
    """Endless training conversations, other ones than the teacher saw."""
    encoder = Encoder(teacher.processor.tokenizer)
    data = TrainingBatches(encoder, args.batch, seed=args.seed + 1000)
    return DataLoader(data, batch_size=None, num_workers=args.workers, pin_memory=on_gpu())


def steps_in(seconds: float, plan: wb.Plan, teacher: wb.VLM, args: argparse.Namespace) -> int:
    """How many steps fit: a throw-away student is compiled and timed over its last steps."""
    student = wb.convert(teacher, plan, init=args.init)
    run = wb.distill(
        student, teacher, batches(teacher, args), steps=36, compile_layers=on_gpu(), log_every=12
    )
    step_seconds = (run.rows[-1].seconds - run.rows[-2].seconds) / 12
    return max(1, int((seconds - run.seconds) / step_seconds))


def train_hybrid(teacher: wb.VLM, percent: float, seconds: float, args: argparse.Namespace) -> None:
    """Convert, distil, save."""
    plan = wb.choose_layers(teacher, ratio=percent / 100)
    steps = args.steps or steps_in(seconds, plan, teacher, args)
    student = wb.convert(teacher, plan, init=args.init, seed=args.seed)
    run = wb.distill(
        student, teacher, batches(teacher, args), steps=steps, lr=args.lr,
        compile_layers=on_gpu(), log_every=args.log_every,
        on_step=lambda row: print(f"{percent} {row}", flush=True),
    )  # fmt: skip
    folder = Path(args.out) / f"hybrid-{percent:g}"
    save_delta(student.model, teacher.model, folder, dtype=torch.bfloat16)
    arguments = {name: value for name, value in vars(args).items() if name != "out"}
    curve = run.to_dict() | {"arguments": arguments}
    (folder / "curve.json").write_text(json.dumps(curve, indent=1))
    print(run, flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hybrids", nargs="+", help="percent:seconds, such as 25:80")
    parser.add_argument("--teacher", default="pocket", help="name or folder of the teacher")
    parser.add_argument("--out", required=True)
    parser.add_argument("--init", default="matvlm")
    parser.add_argument("--steps", type=int, help="exactly so many, whatever the seconds")
    parser.add_argument("--batch", type=int, default=256, help="pictures a step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    # Every layer compiles on its own: two shapes, with and without gradients, Mamba-2 or not.
    torch._dynamo.config.recompile_limit = 64
    teacher = wb.load_teacher(args.teacher, device="cuda" if on_gpu() else "cpu")
    for entry in args.hybrids:
        percent, seconds = map(float, entry.split(":"))
        train_hybrid(teacher, percent, seconds, args)


if __name__ == "__main__":
    main()
