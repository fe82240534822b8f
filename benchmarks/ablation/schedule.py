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
        # (kind, work, seconds) of finished jobs, then of those that earlier runs finished.
        self.took: list[tuple[str, int, float]] = []
        self.before = [self._taken(line) for line in record.found.values() if "error" not in line]
        self.begun = False

    def next(self) -> Job | None:
        """The next job that can begin now, and end in time; the first begins whatever is known."""
        for place, job in enumerate(self.pending):
            ready = not job.needs_donor or self.donors.get(job.seed, False)
            if ready and (not self.begun or self.estimate(job) < self.seconds_left()):
                self.begun = True
                return self.pending.pop(place)
        return None

    def estimate(self, job: Job) -> float:
        """Seconds that the job will take; 0 as long as nothing is known.

        Until one of its kind has finished, the lowest guess counts: a donor, which trains all
        layers at once, is slower than a row, and an earlier run may have had another machine.
        """
        if of_its_kind := [found for found in self.took if found[0] == job.kind]:
            return self._guess(job, of_its_kind)
        before = [found for found in self.before if found[0] == job.kind]
        return min((self._guess(job, some) for some in (self.took, before) if some), default=0.0)

    def _guess(self, job: Job, took: list[tuple[str, int, float]]) -> float:
        own = self._work(job)
        alike = [seconds for _, work, seconds in took if work == own]
        if alike:
            return MARGIN * mean(alike[-8:])
        return MARGIN * own * max(seconds / work for _, work, seconds in took)

    @staticmethod
    def _taken(line: dict) -> tuple[str, int, float]:
        return line["kind"], OVERHEAD + line.get("steps", 0), line["seconds"]

    def _work(self, job: Job) -> int:
        steps = {"train": lambda: job.row.n_steps(self.args), "donor": lambda: self.args.align}
        return OVERHEAD + steps.get(job.kind, int)()

    def done(self, job: Job, result: dict) -> None:
        """Write down what a job gave; without its donor, no row that needs it can be made."""
        line = job.facts() | result
        self.record.add(line)
        if "error" not in line:
            self.took.append(self._taken(line))
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
