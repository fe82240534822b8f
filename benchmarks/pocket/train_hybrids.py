"""Distil the pocket hybrids from the pocket teacher, one after the other.

    python -m benchmarks.pocket.train_hybrids --out FOLDER 25:120 12.5:80 50:120 100:200

Each is made by the library's own verbs, align, choose_layers, convert and distill, from the teacher
alone, in so many seconds. Writes a delta and the curve of each hybrid.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch.utils.data import DataLoader

import workbench as wb
from benchmarks.timing import steps_in, train_each
from workbench.data.conversations import MIXTURE, Encoder, TrainingBatches
from workbench.mamba import kernels
from workbench.models.delta import load_delta, save_delta
from workbench.steps.training.stages import RECIPES, Stage

# What the teacher itself finds hard is where a student falls behind.
HARD = {"count": 4.0, "grid": 2.5, "word": 2.0, "letters": 1.0, "describe": 0.5, "flag": 0.5}


def on_gpu() -> bool:
    """Whether to train on a GPU; without one everything runs, slowly, on the CPU."""
    return torch.cuda.is_available()


def batches(teacher: wb.VLM, args: argparse.Namespace) -> DataLoader:
    """Endless training conversations, other ones than the teacher saw."""
    data = TrainingBatches(
        Encoder(teacher.processor.tokenizer), args.batch, seed=args.seed + 1000,
        mixture=MIXTURE | HARD, several_every=args.several_every,
    )  # fmt: skip
    return DataLoader(data, batch_size=None, num_workers=args.workers, pin_memory=on_gpu())


def stages_of(args: argparse.Namespace) -> tuple[Stage, ...]:
    """The recipe; what goes on from an earlier run needs its last stage only."""
    return RECIPES[args.recipe][-1:] if args.start else RECIPES[args.recipe]


def aligned(teacher: wb.VLM, args: argparse.Namespace) -> wb.VLM | None:
    """The donor of all hybrids: a mixer for every layer, to search with and to start from."""
    if not args.align:
        return None
    return wb.align(
        teacher, batches(teacher, args), steps=args.align, lr=args.lr, seed=args.seed,
        graph_layers=args.graph, bf16=args.bf16,
        on_step=lambda row: print(f"align {row}", flush=True),
    )  # fmt: skip


def started(
    teacher: wb.VLM, plan: wb.Plan, donor: wb.VLM | None, args: argparse.Namespace
) -> wb.VLM:
    """The student before training: converted, or what an earlier run left."""
    if args.start:
        model = load_delta(teacher.model, Path(args.start) / f"hybrid-{100 * plan.ratio:g}")
        return wb.VLM(f"{teacher.name}-{100 * plan.ratio:g}", model, teacher.processor, plan)
    return wb.convert(teacher, plan, init=donor or args.init, seed=args.seed)


def trained(student: wb.VLM, teacher: wb.VLM, args: argparse.Namespace, **more) -> wb.Run:
    """`wb.distill` with what every run here shares."""
    return wb.distill(
        student, teacher, batches(teacher, args), lr=args.lr, graph_layers=args.graph,
        bf16=args.bf16, compile_layers=on_gpu() and not args.graph, **more,
    )  # fmt: skip


def train_hybrid(
    teacher: wb.VLM, donor: wb.VLM | None, percent: float, seconds: float, args: argparse.Namespace
) -> None:
    """Place, convert, distil, save."""
    plan = wb.choose_layers(
        teacher, ratio=percent / 100, method=args.method, donor=donor, limit=args.limit
    )
    print(plan, flush=True)
    steps = args.steps or steps_in(
        seconds, stages_of(args), lambda: started(teacher, plan, donor, args),
        lambda student, **how: trained(student, teacher, args, **how),
    )  # fmt: skip
    student = started(teacher, plan, donor, args)
    run = trained(
        student, teacher, args, recipe=stages_of(args), steps=steps, log_every=args.log_every,
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
    parser.add_argument("--init", default="calibrated", help="of the mixers that nothing aligned")
    parser.add_argument("--align", type=int, default=0, help="steps on all layers before the rest")
    parser.add_argument("--method", default="even", help="of placement, as in choose_layers")
    parser.add_argument("--limit", type=int, default=96, help="questions of a search")
    parser.add_argument("--graph", action="store_true", help="CUDA graphs in place of compiling")
    parser.add_argument("--bf16", action="store_true", default=None, help="without a GPU, too")
    parser.add_argument("--kernels", default="auto", help="of the scan; auto measures them first")
    parser.add_argument("--start", help="folder of an earlier run, to go on from its hybrids")
    parser.add_argument("--recipe", default="workbench")
    parser.add_argument("--steps", type=int, help="exactly so many, whatever the seconds")
    parser.add_argument("--batch", type=int, default=512, help="pictures a step")
    parser.add_argument("--several-every", type=int, default=8, help="batches of several pictures")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    torch.set_num_threads(4)  # the loader's workers need the other cores
    # Every layer compiles on its own: two shapes, with and without gradients, Mamba-2 or not.
    torch._dynamo.config.recompile_limit = 64
    kernels.use(args.kernels)
    teacher = wb.load_teacher(args.teacher, device="cuda" if on_gpu() else "cpu")
    donor = aligned(teacher, args)
    _, refused = train_each(
        args.hybrids, lambda percent, seconds: train_hybrid(teacher, donor, percent, seconds, args)
    )
    if refused:
        raise SystemExit("\n".join(refused))


if __name__ == "__main__":
    main()
