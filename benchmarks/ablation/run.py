"""What each ingredient gives: the same data, the same steps, row by row, and three seeds.

    python -m benchmarks.ablation.run --device cuda --steps 1000 --name h200
    python -m benchmarks.ablation.run --steps 2 --seeds 1 --limit 4 --only init      (a minute, CPU)

Writes benchmarks/results/ablation_NAME.json and .md: KL to the teacher before training and after,
how often both would say the same next token, and seconds, at each ratio. A row whose share of
`--minutes` is spent is cut short and says after how many steps.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev
from time import perf_counter

import torch
import transformers

import workbench as wb
from workbench.data.conversations import Encoder, TrainingBatches
from workbench.steps.quality.fidelity import Fidelity, token_fidelity

RESULTS = Path(__file__).parents[1] / "results"
KEPT = {"rope": True, "bias": True}


@dataclass(frozen=True)
class Row:
    """One line of the table: what it is about, and how it is made."""

    group: str
    name: str
    init: str = "calibrated"  # or "aligned"
    options: dict = field(default_factory=dict)
    recipe: str = "workbench"
    placement: str = "even"


ROWS = (
    Row("init", "random", "random"),
    Row("init", "matvlm", "matvlm"),
    Row("init", "linear", "linear"),
    Row("init", "calibrated", "calibrated"),
    Row("init", "aligned", "aligned"),
    # The paper's start with one thing at a time put back, which attention has or does.
    Row("mixer", "matvlm + rope", "matvlm", {"rope": True}),
    Row("mixer", "matvlm + bias", "matvlm", {"bias": True}),
    Row("mixer", "matvlm + rope + bias", "matvlm", KEPT),
    # The calibrated start with one thing at a time taken away.
    Row("mixer", "calibrated - rope", options={"rope": False}),
    Row("mixer", "calibrated - SiLU", options={"conv_activation": None}),
    Row("mixer", "calibrated - convolution", options={"d_conv": 1}),
    Row("mixer", "calibrated - gate", options={"gate": False}),
    Row("mixer", "calibrated - norm", options={"norm": False}),
    Row("recipe", "matvlm, paper's recipe", "matvlm", recipe="matvlm"),
    Row("recipe", "calibrated, paper's recipe", recipe="matvlm"),
    Row("placement", "replace-one", "aligned", placement="replace-one"),
    Row("placement", "leave-one-in", "aligned", placement="leave-one-in"),
    Row("placement", "greedy", "aligned", placement="greedy"),
)


def main() -> None:
    """Read the command line, run, write."""
    args = arguments()
    torch.set_float32_matmul_precision("high")
    teacher = wb.load_teacher(args.teacher, device=args.device)
    rows = [row for row in ROWS if args.only is None or {row.group, row.name} & set(args.only)]
    found, jobs = [], len(rows) * len(args.ratios) * args.seeds
    share = 60 * args.minutes / jobs if args.minutes else None
    for seed in range(args.seeds):
        bench = Bench(teacher, seed, args)
        for ratio in args.ratios:
            for row in rows:
                found.append(bench.measure(row, ratio / 100, share))
                print(len(found), "of", jobs, json.dumps(found[-1]), flush=True)
    write(found, args)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--teacher", default="pocket")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--align", type=int, help="steps of alignment; a third of --steps if not")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ratios", type=float, nargs="+", default=[25, 50, 100])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--limit", type=int, default=64, help="held-out samples of each KL")
    parser.add_argument("--minutes", type=float, help="of training, over all rows together")
    names = sorted({name for row in ROWS for name in (row.group, row.name)})
    parser.add_argument("--only", nargs="+", choices=names, metavar="ROW", help="or its group")
    parser.add_argument("--name", default="pocket")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


class Bench:
    """One seed: its data, its aligned donor, and what it measures on."""

    def __init__(self, teacher: wb.VLM, seed: int, args: argparse.Namespace) -> None:
        self.teacher, self.seed, self.args = teacher, seed, args
        held_out = wb.load_data("pocket", split="test", limit=2 * args.limit)
        # One picture each: prompts of four take four times as long and say no more here.
        self.held_out = [s for s in held_out[:] if len(s.images) == 1][: args.limit]
        self.searched_on = [
            s for s in wb.load_data("pocket", split="train", limit=48)[:] if len(s.images) == 1
        ]
        self._donor: wb.VLM | None = None
        self._donor_seconds = 0.0

    def batches(self) -> TrainingBatches:
        """The seed's training data, the same for each row."""
        encoder = Encoder(self.teacher.tokenizer)
        return TrainingBatches(encoder, self.args.batch, seed=2000 + self.seed, several_every=10**9)

    def donor(self) -> wb.VLM:
        """All layers aligned, once a seed."""
        if self._donor is None:
            started = perf_counter()
            steps = self.args.align or max(1, self.args.steps // 3)
            self._donor = wb.align(self.teacher, self.batches(), steps=steps, seed=self.seed)
            self._donor_seconds = perf_counter() - started
        return self._donor

    def measure(self, row: Row, ratio: float, share: float | None) -> dict:
        """One row at one ratio: what it is worth before training, and after."""
        donor = self.donor() if row.init == "aligned" else None
        started = perf_counter()
        plan = self.plan(row, ratio)
        placed = perf_counter() - started
        student = wb.convert(
            self.teacher, plan, init=donor or row.init, seed=self.seed,
            options=None if donor else row.options,
        )  # fmt: skip
        converted = perf_counter() - started - placed
        before = self.fidelity(student)
        run = wb.distill(
            student, self.teacher, self.batches(), recipe=row.recipe, steps=self.args.steps,
            seed=self.seed, log_every=max(1, self.args.steps // 20), stop=deadline(share),
        )  # fmt: skip
        after = self.fidelity(student)
        return asdict(row) | {
            "ratio": ratio,
            "seed": self.seed,
            "layers": list(plan.mamba_layers),
            "kl_before": before.kl,
            "agreement_before": before.token_agreement,
            "kl_after": after.kl,
            "agreement_after": after.token_agreement,
            "steps": run.rows[-1].step if run.rows else 0,
            "train_seconds": run.seconds,
            "convert_seconds": converted,
            "placement_seconds": placed,
            "align_seconds": self._donor_seconds if donor else 0.0,
        }

    def plan(self, row: Row, ratio: float) -> wb.Plan:
        """Where the row puts its Mamba-2 layers."""
        if row.placement == "even":
            return wb.choose_layers(self.teacher, ratio=ratio)
        return wb.choose_layers(
            self.teacher, ratio=ratio, method=row.placement, data=self.searched_on,
            donor=self.donor(),
        )  # fmt: skip

    def fidelity(self, student: wb.VLM) -> Fidelity:
        """KL and agreement on the held-out samples."""
        return token_fidelity(self.teacher, student, self.held_out, batch_size=16)


def deadline(seconds: float | None):
    """A `stop` for distill that is true once so many seconds have passed; None never stops."""
    if seconds is None:
        return None
    end = perf_counter() + seconds
    return lambda: perf_counter() > end


def write(found: list[dict], args: argparse.Namespace) -> None:
    """The JSON with every run, and the table with the mean and the spread over seeds."""
    machine = torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU"
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    settings.pop("out")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__,
                "python": platform.python_version(), "device": machine}  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    place = args.out / f"ablation_{args.name}"
    place.with_suffix(".json").write_text(
        json.dumps({"settings": settings, "versions": versions, "runs": found}, indent=1) + "\n"
    )
    text = "\n".join(table(found, args, versions)) + "\n"
    place.with_suffix(".md").write_text(text)
    print(text)


def table(found: list[dict], args: argparse.Namespace, versions: dict) -> Iterator[str]:
    """Lines of Markdown."""
    yield (
        f"{args.teacher}: {args.steps} steps of {args.batch} sequences, {args.seeds} seed(s), "
        f"{args.limit} held-out questions; {', '.join(f'{k} {v}' for k, v in versions.items())}."
    )
    yield ""
    columns = ("group", "row", "Mamba-2 %", "KL before", "KL after", "same token after %", "steps",
               "seconds: start", "training")  # fmt: skip
    yield f"| {' | '.join(columns)} |"
    yield "| --- | --- |" + " ---: |" * (len(columns) - 2)
    for ratio in args.ratios:
        for row in ROWS:
            runs = [r for r in found if (r["name"], r["ratio"]) == (row.name, ratio / 100)]
            if runs:
                start = [
                    r["convert_seconds"] + r["placement_seconds"] + r["align_seconds"] for r in runs
                ]
                yield (
                    f"| {row.group} | {row.name} | {ratio:g} | {spread(runs, 'kl_before')} | "
                    f"{spread(runs, 'kl_after')} | {spread(runs, 'agreement_after', 100)} | "
                    f"{min(r['steps'] for r in runs)} | {mean(start):.1f} | "
                    f"{mean(r['train_seconds'] for r in runs):.1f} |"
                )


def spread(runs: list[dict], key: str, factor: float = 1) -> str:
    """Mean, and the standard deviation over seeds where there are several."""
    values = [factor * run[key] for run in runs]
    digits = 1 if factor > 1 else 3
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


if __name__ == "__main__":
    main()
