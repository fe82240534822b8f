"""Processes that share the GPUs; each loads the teacher once, and takes one job after the other."""

from __future__ import annotations

import argparse
import os
import traceback
from multiprocessing import connection, get_context
from pathlib import Path

import torch

import workbench as wb
from benchmarks.ablation.bench import Bench
from benchmarks.ablation.rows import Job
from benchmarks.ablation.schedule import Schedule

MOST_RESTARTS = 8
# Both of these wait for the GPU at each step, and only check what cannot be otherwise here.
ENVIRONMENT = {"TRANSFORMERS_DISABLE_TORCH_CHECK": "1", "TOKENIZERS_PARALLELISM": "false"}


def visible_gpus() -> list[str]:
    """Names of the GPUs that may be used, as CUDA_VISIBLE_DEVICES takes them."""
    n = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return (named or [str(i) for i in range(n)])[:n]


class Worker:
    """One process, and the job that it is at.

    Args:
        number: which it is; workers take turns on the GPUs.
        gpus: names of them; none is the CPU.
        args: the command line.
        folder: what all share.
    """

    def __init__(
        self, number: int, gpus: list[str], args: argparse.Namespace, folder: Path
    ) -> None:
        context, self.job = get_context("spawn"), None
        self.pipe, theirs = context.Pipe()
        device = "cuda" if gpus else "cpu"
        self.process = context.Process(
            target=serve, args=(theirs, args, folder, device), daemon=True
        )
        # A process reads these while it starts, before it could set them itself.
        own = ENVIRONMENT | {"OMP_NUM_THREADS": str(max(1, args.cores // max(1, args.workers)))}
        if gpus:
            own["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
        before = {name: os.environ.get(name) for name in own}
        os.environ.update(own)
        self.process.start()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        theirs.close()

    def give(self, job: Job) -> None:
        """Let it begin."""
        self.job = job
        self.pipe.send(job)

    def result(self) -> dict:
        """What became of its job, once its pipe can be read."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(5)
            return {"error": f"the process ended with code {self.process.exitcode}", "last": True}

    def end(self) -> None:
        """Stop it, wherever it is."""
        self.pipe.close()
        self.process.join(0 if self.job else 3)
        self.process.kill()
        self.process.join(5)


def serve(pipe: connection.Connection, args: argparse.Namespace, folder: Path, device: str) -> None:
    """Do the jobs that come through the pipe, until it ends."""
    bench = None
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            bench = bench or Bench(args, folder, device)
            pipe.send(bench.do(job))
        except wb.WorkbenchError as error:
            pipe.send({"error": str(error)})
        except Exception as error:  # whatever is left of a GPU after that is not to be trusted
            traceback.print_exc()
            pipe.send({"error": f"{type(error).__name__}: {error}"[:500], "last": True})
            return


def run_parallel(schedule: Schedule, args: argparse.Namespace, folder: Path) -> None:
    """Keep `args.workers` processes busy until all is done, or the time is over."""
    gpus, restarts = visible_gpus() if args.device == "cuda" else [], 0
    workers = [Worker(i, gpus, args, folder) for i in range(args.workers)]
    try:
        while schedule.seconds_left() > 0:
            for worker in workers:
                if worker.job is None and (job := schedule.next()):
                    worker.give(job)
            busy = [worker for worker in workers if worker.job]
            if not busy:
                break
            ready = connection.wait([worker.pipe for worker in busy], timeout=0.5)
            for worker in [worker for worker in busy if worker.pipe in ready]:
                result, job = worker.result(), worker.job
                last, worker.job = result.pop("last", False), None
                schedule.done(job, result)
                if last:
                    worker.end()
                    place = workers.index(worker)
                    workers.remove(worker)
                    restarts += 1
                    if restarts <= MOST_RESTARTS:
                        workers.insert(place, Worker(place, gpus, args, folder))
    finally:
        for worker in workers:
            worker.end()
        schedule.pending += [worker.job for worker in workers if worker.job]


def run_here(schedule: Schedule, args: argparse.Namespace, folder: Path) -> None:
    """Do the jobs in this process, one after the other."""
    bench = None
    while job := schedule.next():
        try:
            bench = bench or Bench(args, folder, args.device)
            result = bench.do(job)
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"[:500]}
        schedule.done(job, result)
