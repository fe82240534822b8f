"""What is measured, as data: rows, and the jobs that they make, the most telling first."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import workbench as wb
from workbench.steps.conversion.initialization import INITS
from workbench.steps.conversion.selection import METHODS
from workbench.steps.training.stages import RECIPES, plan_stages, stage_from_dict

KEPT = {"rope": True, "bias": True}
DEFAULT, PAPER = "calibrated", "matvlm, paper's recipe"
ALIGNED = "aligned"  # the init that needs a donor
OURS = "workbench"
_ALIGN, _DISTILL = RECIPES[OURS]
# Our recipe with one thing at a time taken away.
LESS = {
    f"{OURS} - align": (replace(_DISTILL, steps=100),),
    f"{OURS} - hidden": (_ALIGN, replace(_DISTILL, hidden_weight=0.0)),
    f"{OURS} - temperature": (_ALIGN, replace(_DISTILL, temperature=1.0)),
    f"{OURS} - KL": (_ALIGN, replace(_DISTILL, kl_weight=0.0)),
}
KNOWN = RECIPES | LESS


@dataclass(frozen=True)
class Row:
    """One line of the table: what it is about, how it is made, and what it is compared with."""

    group: str
    name: str
    init: str = DEFAULT  # or "aligned"
    options: dict = field(default_factory=dict)
    recipe: str = OURS
    placement: str = "even"
    against: str = ""  # the row that differs from it in one thing
    stages: tuple[dict, ...] = ()  # of `Stage`, in place of the recipe
    lr: float | None = None
    batch: int | None = None
    steps: int | None = None
    trained: bool = True  # else only what it starts with is measured

    def __post_init__(self) -> None:
        choices = {"init": (*INITS, ALIGNED), "recipe": KNOWN, "placement": METHODS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise wb.WorkbenchError(
                    f"Row {self.name!r}: {name}={getattr(self, name)!r} is none of "
                    f"{', '.join(known)}."
                )
        if self.init == ALIGNED and self.options:
            raise wb.WorkbenchError(f"Row {self.name!r}: aligned mixers have options already.")
        object.__setattr__(self, "stages", tuple(self.stages))
        for stage in self.stages:
            stage_from_dict(stage)

    @property
    def needs_donor(self) -> bool:
        """Whether all layers must have been aligned before."""
        return self.init == ALIGNED or self.placement != "even"

    def n_steps(self, args: argparse.Namespace) -> int:
        """Its own steps, or its stages', or everybody's."""
        own = self.steps or sum(stage["steps"] for stage in self.stages)
        return min(own or args.steps, args.cap or 10**9)

    def planned(self, args: argparse.Namespace) -> tuple[wb.Stage, ...]:
        """The stages that it trains with."""
        stages = tuple(map(stage_from_dict, self.stages)) or KNOWN[self.recipe]
        lr = self.lr or (None if self.stages else args.lr)
        return plan_stages(stages, self.n_steps(args), lr)


ROWS = (
    Row("recipe", PAPER, "matvlm", recipe="matvlm", against=DEFAULT),
    Row("init", DEFAULT, against="matvlm"),
    Row("init", "matvlm", "matvlm", against=PAPER),
    Row("init", "random", "random", against="matvlm"),
    Row("init", "linear", "linear", against="matvlm"),
    Row("init", "aligned", ALIGNED, against=DEFAULT),
    # The paper's start with one thing at a time put back, which attention has or does.
    Row("mixer", "matvlm + rope", "matvlm", {"rope": True}, against="matvlm"),
    Row("mixer", "matvlm + bias", "matvlm", {"bias": True}, against="matvlm"),
    Row("mixer", "matvlm + rope + bias", "matvlm", KEPT, against="matvlm"),
    # The calibrated start with one thing at a time taken away.
    Row("mixer", "calibrated - rope", options={"rope": False}, against=DEFAULT),
    Row("mixer", "calibrated - bias", options={"bias": False}, against=DEFAULT),
    Row("mixer", "calibrated - SiLU", options={"conv_activation": None}, against=DEFAULT),
    Row("mixer", "calibrated - convolution", options={"d_conv": 1}, against=DEFAULT),
    Row("mixer", "calibrated - gate", options={"gate": False}, against=DEFAULT),
    Row("mixer", "calibrated - norm", options={"norm": False}, against=DEFAULT),
    Row("recipe", "calibrated, paper's recipe", recipe="matvlm", against=DEFAULT),
    *(Row("recipe", name, recipe=name, against=DEFAULT) for name in LESS),
    Row("placement", "replace-one", ALIGNED, placement="replace-one", against="aligned"),
    Row("placement", "leave-one-in", ALIGNED, placement="leave-one-in", against="aligned"),
    Row("placement", "greedy", ALIGNED, placement="greedy", against="aligned"),
)
BY_NAME = {row.name: row for row in ROWS}


def read_rows(path: Path) -> tuple[Row, ...]:
    """Rows from a JSON file: a list of objects with the fields of `Row`.

    Raises:
        WorkbenchError: a field that a row does not have, or a name that two rows have.
    """
    known = {f.name for f in fields(Row)}
    rows = []
    for values in json.loads(path.read_text()):
        if unknown := sorted(set(values) - known):
            raise wb.WorkbenchError(f"A row has no {unknown[0]!r}: {', '.join(sorted(known))}.")
        rows.append(Row(**values))
    if len({row.name for row in rows}) < len(rows):
        raise wb.WorkbenchError(f"Two rows of {path.name} have the same name.")
    return tuple(rows)


@dataclass(frozen=True)
class Job:
    """What one worker does in one go."""

    kind: str  # "train"; "start", only the zero-shot KL; "donor"; "teacher", its own score
    row: Row | None = None
    percent: float = 0
    seed: int = 0

    @property
    def key(self) -> str:
        """Its name in the record."""
        return f"{self.kind}/{self.row.name if self.row else ''}/{self.percent:g}/{self.seed}"

    @property
    def needs_donor(self) -> bool:
        """Whether it waits for the donor of its seed."""
        return self.row is not None and self.row.needs_donor

    def facts(self) -> dict:
        """What is written down of it, whatever came out."""
        row = json.loads(json.dumps(asdict(self.row))) if self.row else None
        return {"key": self.key, "kind": self.kind, "row": row, "percent": self.percent,
                "seed": self.seed}  # fmt: skip


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """Every job once, in the order in which they are begun.

    Raises:
        WorkbenchError: `--only` names what does not exist; or as `read_rows`.
    """
    rows = read_rows(args.rows) if args.rows else None
    found = list(_given(rows, args) if rows else _built_in(args))
    first = [Job("teacher")] if args.score else []
    known = {name for job in found for name in _names(job)}
    if unknown := [name for name in args.only or () if name not in known]:
        raise wb.WorkbenchError(f"--only {unknown[0]!r} is no row, group or job of this run.")
    jobs = list({job.key: job for job in (*first, *found) if _wanted(job, args)}.values())
    donors, ordered = set(), []
    for job in jobs:
        if job.needs_donor and job.seed not in donors:
            donors.add(job.seed)
            ordered.append(Job("donor", seed=job.seed))
        ordered.append(job)
    return ordered


def _wanted(job: Job, args: argparse.Namespace) -> bool:
    return job.row is None or not args.only or bool(_names(job) & set(args.only))


def _names(job: Job) -> set[str]:
    """What `--only` may call a job."""
    return {job.row.group, job.row.name, job.key}


def _given(rows: tuple[Row, ...], args: argparse.Namespace) -> Iterator[Job]:
    for seed in range(args.seeds):
        for percent in args.ratios:
            for row in rows:
                yield Job("train" if row.trained else "start", row, percent, seed)


def _built_in(args: argparse.Namespace) -> Iterator[Job]:
    """The question of the whole first, then one ingredient after the other."""
    seeds, ratios = range(args.seeds), args.ratios
    middle = 50 if 50 in ratios else ratios[len(ratios) // 2]
    others = [percent for percent in ratios if percent != middle]
    pair = (BY_NAME[PAPER], BY_NAME[DEFAULT])
    yield from _all("train", pair, [middle], seeds)
    if args.on_text:  # dear: one seed of each ratio before more of them
        yield from _all("train", pair, others, seeds[:1])
    else:
        yield from _all("train", pair, others, seeds)
    inits = [row for row in ROWS if row.group == "init"]
    yield from _all("start", [row for row in inits if not row.needs_donor], ratios, seeds)
    yield from _all("start", [BY_NAME["aligned"]], ratios, seeds[:1] if args.on_text else seeds)
    ingredients = [row for row in ROWS if row.group != "placement" and row not in pair]
    if args.on_text:
        yield from _all("train", pair, others, seeds)
        yield from _all("start", [BY_NAME["aligned"]], ratios, seeds)
    placed = [BY_NAME["aligned"], *(row for row in ROWS if row.group == "placement")]
    for seed in seeds:  # all of one seed, then of the next
        yield from _all("train", ingredients, [middle], [seed])
        yield from _all("train", placed, args.placement_ratios, [seed])
    yield from _all("train", ingredients, others, seeds)


def _all(kind: str, rows: list[Row] | tuple[Row, ...], ratios: list, seeds: range) -> Iterator[Job]:
    for percent in ratios:
        for seed in seeds:
            yield from (Job(kind, row, percent, seed) for row in rows)
