"""Which job is begun next, so that everything ends in time."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import mean

from benchmarks.ablation.record import Record
from benchmarks.ablation.rows import Job

MARGIN = 1.15  # jobs differ
OVERHEAD = 20  # steps' worth of measuring in each job


class Schedule:
    """Jobs in their order, except those that wait for a donor or would not end in time.

    Args:
        jobs: all of them, the most important first.
        record: gets what they gave; what is in it already is not done again.
        args: the command line.
        seconds_left: until everything must have ended.
    """

    def __init__(
        self, jobs: list[Job], record: Record, args: argparse.Namespace,
        seconds_left: Callable[[], float],
    ) -> None:  # fmt: skip
        self.record, self.args, self.seconds_left = record, args, seconds_left
        missing = [job for job in jobs if job.kind != "donor" and not record.has(job)]
        waiting = {job.seed for job in missing if job.needs_donor}
        # Donors are no results: one is made again where something still needs it.
        self.pending = [
            job for job in jobs if job in missing or (job.kind == "donor" and job.seed in waiting)
        ]
        self.donors: dict[int, bool] = {}  # by seed, whether it was made
        self.took: list[tuple[str, int, float]] = []  # kind, work, seconds of finished jobs
        for line in record.found.values():  # those of an earlier run, until there are newer ones
            self._remember(line)

    def next(self) -> Job | None:
        """The next job that can begin now, and end in time."""
        for place, job in enumerate(self.pending):
            ready = not job.needs_donor or self.donors.get(job.seed, False)
            if ready and self.estimate(job) < self.seconds_left():
                return self.pending.pop(place)
        return None

    def estimate(self, job: Job) -> float:
        """Seconds that the job will take; 0 as long as nothing is known."""
        own = self._work(job)
        # A donor trains all layers at once, which says little of a row.
        took = [found for found in self.took if found[0] == job.kind] or self.took
        alike = [seconds for _, work, seconds in took if work == own]
        if alike:
            return MARGIN * mean(alike[-8:])
        rates = [seconds / work for _, work, seconds in took]
        return MARGIN * own * max(rates) if rates else 0.0

    def _remember(self, line: dict) -> None:
        if "error" not in line:
            steps = line.get("steps", 0)
            self.took.append((line["kind"], OVERHEAD + steps, line["seconds"]))

    def _work(self, job: Job) -> int:
        steps = {"train": lambda: job.row.n_steps(self.args), "donor": lambda: self.args.align}
        return OVERHEAD + steps.get(job.kind, int)()

    def done(self, job: Job, result: dict) -> None:
        """Write down what a job gave; without its donor, no row that needs it can be made."""
        line = job.facts() | result
        self.record.add(line)
        self._remember(line)
        if job.kind == "donor":
            self.donors[job.seed] = "error" not in result
            if "error" in result:
                self._give_up(job.seed, result["error"])
        said = {name: line[name] for name in ("kl_before", "kl_after", "error") if name in line}
        print(f"{job.key}: {result.get('seconds', 0):.1f} s {said}; {len(self.pending)} to do,"
              f" {self.seconds_left():.0f} s left", flush=True)  # fmt: skip

    def _give_up(self, seed: int, error: str) -> None:
        lost = [job for job in self.pending if job.needs_donor and job.seed == seed]
        self.pending = [job for job in self.pending if job not in lost]
        for job in lost:
            self.done(job, {"error": f"its donor failed: {error}"})
