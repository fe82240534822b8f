"""One job after the other: what a row is worth before training, and after."""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path
from time import perf_counter

import torch

import workbench as wb
from benchmarks.ablation.data import PocketData, TextData, load_teacher
from benchmarks.ablation.rows import ALIGNED, Job, Row
from workbench.mamba import kernels
from workbench.models.families import decoder_layers
from workbench.models.hybrid import build_hybrid, mixer_options_of, mixers
from workbench.models.plan import Plan
from workbench.steps.quality.fidelity import token_fidelity


class Bench:
    """A teacher with its data, and the measures that several jobs share."""

    def __init__(self, args: argparse.Namespace, folder: Path, device: str) -> None:
        torch.set_float32_matmul_precision("high")
        if args.compile:  # every layer compiles on its own: with and without gradients
            torch._dynamo.config.recompile_limit = 64
            # Inductor would write what follows --only, "the paper's" too, into its code unquoted.
            torch._inductor.config.benchmark_harness = False
        self.args, self.folder = args, folder
        kernels.use(args.kernels)
        self.teacher = load_teacher(args, device)
        on_text = args.on_text
        self.data = TextData(self.teacher, args) if on_text else PocketData(
            self.teacher, folder, args
        )  # fmt: skip
        self._before: dict[str, dict] = {}
        self._donor: tuple[int, wb.VLM] | None = None

    def do(self, job: Job) -> dict:
        """What is found out; `seconds` are those of the whole job."""
        began = perf_counter()
        found = {"train": self.row, "start": self.row, "donor": self.align}.get(job.kind, self.own)
        made = found(job) | {"device": self._device()}
        gc.collect()  # the student's hooks refer to each other
        if self.args.compile:  # what one student's layers compiled to is of no use to the next
            torch._dynamo.reset()
        return made | {"seconds": perf_counter() - began}

    def _device(self) -> str:
        on_gpu = self.teacher.model.device.type == "cuda"
        return torch.cuda.get_device_name() if on_gpu else "CPU"

    def own(self, job: Job) -> dict:
        """The teacher's own score."""
        return {"score": self.score(self.teacher)}

    def align(self, job: Job) -> dict:
        """Make the donor of a seed: all layers aligned, for every row that takes some of them."""
        args, began = self.args, perf_counter()
        donor = wb.align(
            self.teacher, self.data.training(job.seed, args.batch), steps=args.align,
            calibration=self.data.calibration(job.seed), lr=args.lr or 1e-3, seed=job.seed,
            compile_layers=args.compile, graph_layers=args.graph,
        )  # fmt: skip
        states = {i: mixer.state_dict() for i, mixer in mixers(donor.model).items()}
        place = self._donor_place(job.seed)
        part = place.with_suffix(".part")
        torch.save({"options": mixer_options_of(donor.model), "mixers": states}, part)
        part.replace(place)
        return {"align_seconds": perf_counter() - began, "steps": args.align}

    def _donor_place(self, seed: int) -> Path:
        return self.folder / f"donor-{seed}.pt"

    def donor(self, seed: int) -> wb.VLM:
        """The donor of a seed, read back."""
        if self._donor is None or self._donor[0] != seed:
            place, n = self._donor_place(seed), len(decoder_layers(self.teacher.model))
            kept = torch.load(place, map_location=self.teacher.model.device, weights_only=True)
            plan = Plan(n, tuple(range(n)), "all", "aligned once, to take any layers from")
            model = build_hybrid(self.teacher.model, plan, kept["options"])
            for index, mixer in mixers(model).items():
                mixer.load_state_dict(kept["mixers"][index])
            donor = wb.VLM(f"{self.teacher.name}-aligned", model, self.teacher.processor, plan)
            self._donor = seed, donor
        return self._donor[1]

    def row(self, job: Job) -> dict:
        """One row at one ratio and one seed; a "start" is not trained."""
        began = perf_counter()
        plan = self.plan(job)
        placed = perf_counter()
        student = self.student(job, plan)
        found = {
            "layers": list(plan.mamba_layers),
            "placement_seconds": placed - began,
            "convert_seconds": perf_counter() - placed,
        }
        found |= {f"{name}_before": value for name, value in self.before(job, student).items()}
        if job.kind == "train":
            found |= self.train(job, student)
            found |= {f"{name}_after": value for name, value in self.measures(student).items()}
        return found

    def plan(self, job: Job) -> wb.Plan:
        """Where the row puts its Mamba-2 layers."""
        ratio, method = job.percent / 100, job.row.placement
        if method == "even":
            return wb.choose_layers(self.teacher, ratio=ratio)
        return wb.choose_layers(
            self.teacher, ratio=ratio, method=method, data=self.data.searched_on(),
            donor=self.donor(job.seed),
        )  # fmt: skip

    def student(self, job: Job, plan: wb.Plan) -> wb.VLM:
        """The row's start."""
        if job.row.init == ALIGNED:
            return wb.convert(self.teacher, plan, init=self.donor(job.seed), seed=job.seed)
        return wb.convert(
            self.teacher, plan, init=job.row.init, options=job.row.options, seed=job.seed,
            calibration=self.data.calibration(job.seed),
        )  # fmt: skip

    def train(self, job: Job, student: wb.VLM) -> dict:
        """Distil the student, and say how long that took."""
        stages = job.row.planned(self.args)
        run = wb.distill(
            student, self.teacher, self.data.training(job.seed, job.row.batch or self.args.batch),
            recipe=stages, seed=job.seed, compile_layers=self.args.compile,
            graph_layers=self.args.graph,
            log_every=max(1, sum(stage.steps for stage in stages) // 20),
        )  # fmt: skip
        return {
            "steps": run.steps,
            "train_seconds": run.seconds,
            "stages": [stage.to_dict() for stage in stages],
            "losses": [[row.step, row.stage, row.loss] for row in run.rows],
        }

    def before(self, job: Job, student: wb.VLM) -> dict:
        """The measures of a start, once for all rows that start so."""
        row: Row = job.row
        start = json.dumps([row.init, row.options, row.placement, job.percent, job.seed])
        if start not in self._before:
            self._before[start] = self.measures(student)
        return self._before[start]

    def measures(self, vlm: wb.VLM) -> dict:
        """KL and agreement on the held-out tokens; right answers, where they are asked for."""
        apart = token_fidelity(self.teacher, vlm, self.data.held_out)
        found = {"kl": apart.kl, "agreement": apart.token_agreement, "tokens": apart.n_tokens}
        return found | ({"score": self.score(vlm)} if self.args.score else {})

    def score(self, vlm: wb.VLM) -> float:
        """Right answers on held-out samples, the mean over families, 0..1."""
        on_gpu = vlm.model.device.type == "cuda"
        return wb.evaluate(vlm, self.data.samples, batch_size=64 if on_gpu else 16).score
