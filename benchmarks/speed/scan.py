"""On a GPU: are the kernels of a prompt right, and how fast are they? Phi-2's shape, bfloat16.

    python -m benchmarks.speed.scan [--seconds 80] [--out benchmarks/results/scan_gpu.json]

What is compared sees the same inputs in one run: scans with attention's own operation, and a whole
mixer layer with an attention layer of the same projections. The file is written line by line: what
is killed or runs out of time keeps what it has. First our kernels run one by one, so that one that
breaks is known by its name. A kernel that reads or writes where it must not leaves its process
without a GPU: the parts run in a process of their own, and another takes up the parts after that.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.speed.check_gpu import Notes
from benchmarks.speed.layers import (
    D_MODEL,
    HEADDIM,
    N_HEADS,
    OPTIONS,
    angles,
    attention_layer,
    inputs,
    mixer,
)
from workbench.mamba import kernels, ssd
from workbench.steps.efficiency.machine import about

LENGTHS = (65536, 1024, 4096, 16384)  # the most telling ones first
LONGEST_IN_TORCH = 4096
OURS = ("triton", "torch")  # implementations that need no other package
ROUNDS, WARM_UP = 7, 3
SPARE = 4  # seconds for what comes last
ALONE = (  # name, changes to Tiles: simpler ones show what breaks the default
    ("one segment", {"programs": 0}),
    ("default", {}),
    ("one tile a head", {"split": False}),
    ("nothing in flight", {"stages": 1, "state_stages": 1}),
    ("eight warps", {"warps": 8, "state_warps": 8}),
)
VARIANTS = (  # of Tiles, beside the default
    {"programs": 4},
    {"programs": 8},
    {"stages": 3},
    {"chunk": 128, "warps": 8},
    {"chunk": 128, "warps": 8, "split": False},
    {"state_chunk": 128, "state_warps": 8, "state_stages": 2},
    {"stages": 1},
    {"state_stages": 4},
)


class Results(Notes):
    """What is known so far, shared by the processes that take turns."""

    def load(self) -> None:
        """Take up what another process has written."""
        self.found = json.loads(self.out.with_suffix(".json").read_text())

    def time(self, what: str, name: str, tokens: int, run: Callable, graph: bool = False) -> None:
        """Time one thing; if it fails, say why."""
        if self.left() < SPARE:
            return
        try:
            row = {"ms": milliseconds(run)}
            if graph:
                row["graph_ms"] = milliseconds(recorded(run))
        except Exception as error:  # a variant that does not compile must not end the run
            self.add("rows", what=what, name=name, tokens=tokens, note=_note(error))
            torch.cuda.empty_cache()  # raises if the GPU is lost
            return
        self.add("rows", what=what, name=name, tokens=tokens, **row)


def milliseconds(run: Callable) -> float:
    """Return the median of several calls, each between two events."""
    for _ in range(WARM_UP):
        run()
    torch.cuda.synchronize()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(ROUNDS)]
    for start, stop in marks:
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in marks)


def recorded(run: Callable) -> Callable:
    """Record a call as a CUDA graph: its kernels without the time that launching them takes."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


class Watched:
    """A Triton kernel whose launches are waited for, and named."""

    def __init__(self, kernel, results: Results, what: str) -> None:
        self.kernel, self.results, self.what = kernel, results, what

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        """Return what launches it, as Triton does."""

        def launch(*args, **options):
            name, start = self.kernel.__name__, time.monotonic()
            print(f"{self.what}: {name} {grid}", end=" ", flush=True)
            try:
                self.kernel[grid](*args, **options)
                torch.cuda.synchronize()
            except Exception as error:
                print("FAILED", flush=True)
                self.results.add("checks", what=self.what, name=name, note=_note(error))
                raise
            print(f"ran, {time.monotonic() - start:.1f} s", flush=True)

        return launch


def run_scans_alone(results: Results, name: str, changes: dict) -> None:
    """Launch the kernels of the scan, and wait for each."""
    if "triton" not in kernels.available():
        return
    from workbench.mamba import triton_scan

    for kernel in ("states_kernel", "scan_kernel"):
        setattr(triton_scan, kernel, Watched(getattr(triton_scan, kernel), results, name))
    try:
        for length in (500, 4096):
            given = inputs(length)
            first = torch.randn(1, N_HEADS, HEADDIM, HEADDIM, device="cuda")
            tiles = triton_scan.Tiles(**changes)
            y, state = triton_scan.scan(*given, initial_state=first, tiles=tiles)
            expected = ssd.ssd_chunked(*(t.float() for t in given), initial_state=first)
            errors = dict(zip(("y", "state"), map(_error, (y, state), expected), strict=True))
            results.add("checks", what="alone", name=name, tokens=length, **errors)
    finally:
        for kernel in ("states_kernel", "scan_kernel"):
            setattr(triton_scan, kernel, getattr(triton_scan, kernel).kernel)


def run_preparing_alone(results: Results) -> None:
    """Launch the kernel that comes before the scan, and wait for it."""
    if "triton" not in kernels.available():
        return
    from workbench.mamba import triton_prepare

    kernel = triton_prepare.prepare_kernel
    triton_prepare.prepare_kernel = Watched(kernel, results, "prepare")
    try:
        for length in (500, 4096):
            for options in OPTIONS.values():
                _preparing(length, options)()
    finally:
        triton_prepare.prepare_kernel = kernel


def check_scans(results: Results) -> None:
    """Relative errors of output and state, against the chunked form in float32."""
    for length in (500, 4096):
        given = inputs(length)
        first = torch.randn(1, N_HEADS, HEADDIM, HEADDIM, device="cuda")
        expected = ssd.ssd_chunked(*(t.float() for t in given), initial_state=first)
        for name in OURS:
            if name in kernels.available():
                with kernels.use(name):
                    found = kernels.ssd(*given, initial_state=first)
                errors = dict(zip(("y", "state"), map(_error, found, expected), strict=True))
                results.add("checks", what="scan", name=name, tokens=length, **errors)


def check_mixers(results: Results) -> None:
    """Relative errors of whole mixers in bfloat16, against the same in float32 and plain torch."""
    for name, options in OPTIONS.items():
        exact = mixer(options, torch.float32)
        for length in (500, 4096):
            hidden = torch.randn(1, length, D_MODEL, device="cuda")
            given = {"rotary": angles(length)}
            with kernels.use("torch"):
                expected, _ = exact(hidden, **given)
            small = mixer(options)
            for kind in OURS:
                if kind in kernels.available():
                    with kernels.use(kind):
                        y = _error(small(hidden.bfloat16(), **given)[0], expected)
                    results.add("checks", what=name, name=kind, tokens=length, y=y)


def time_layers(results: Results) -> None:
    """Whole layers between residual streams: projections, mixing, projection back."""
    plain = attention_layer()
    mixers = {name: mixer(options) for name, options in OPTIONS.items()}
    for length in (1024, 4096, 2048):
        hidden = torch.randn(1, length, D_MODEL, device="cuda", dtype=torch.bfloat16)
        turns = angles(length)
        time_layer = partial(results.time, "layer", tokens=length, graph=True)
        time_layer(name="attention", run=partial(plain, hidden, turns))
        for kind in OURS:
            for name, layer in mixers.items():
                if kind in kernels.available():
                    with kernels.use(kind):
                        time_layer(name=f"{name}: {kind}", run=partial(layer, hidden, rotary=turns))


def time_scans(results: Results) -> None:
    """The operation that mixes, alone: attention's, and ours."""
    for length in LENGTHS:
        given = inputs(length)
        _time_scan(results, "triton", given)
        q, k, v = (given[i].transpose(1, 2).contiguous() for i in (4, 3, 0))
        attention = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True)
        results.time("scan", "attention", length, attention)


def time_other_scans(results: Results) -> None:
    """The same of other projects, which compile for long, and of plain torch."""
    for length in LENGTHS:
        for name in reversed(kernels.available()):
            if name != "triton" and (name != "torch" or length <= LONGEST_IN_TORCH):
                _time_scan(results, name, inputs(length))


def _time_scan(results: Results, name: str, given: tuple[torch.Tensor, ...]) -> None:
    if name in kernels.available():
        with kernels.use(name):
            results.time("scan", name, given[0].shape[1], partial(kernels.ssd, *given))


def time_variants(results: Results) -> None:
    """Our scan cut in other ways, at the longest length and the shortest."""
    if "triton" not in kernels.available():
        return
    from workbench.mamba.triton_scan import Tiles, scan

    for length in LENGTHS[:2]:
        given = inputs(length)
        for changes in VARIANTS:
            name = "triton " + " ".join(f"{k}={v}" for k, v in changes.items())
            results.time("scan", name, length, partial(scan, *given, tiles=Tiles(**changes)))


def time_preparing(results: Results) -> None:
    """What comes before the scan, cut in several ways."""
    if "triton" not in kernels.available():
        return
    from workbench.mamba.triton_prepare import Blocks

    for length in LENGTHS[:2]:
        run = _preparing(length, OPTIONS["mixer (as attention)"])
        others = (Blocks(8, 256), Blocks(4, 256), Blocks(8, 128, 2), Blocks(16, 128, 8))
        for blocks in (Blocks(), *others):
            name = f"rows={blocks.rows} channels={blocks.channels} warps={blocks.warps}"
            results.time("prepare", name, length, partial(run, blocks=blocks))


def _preparing(length: int, options: dict) -> Callable:
    from workbench.mamba.triton_prepare import prepare

    layer = mixer(options)
    x, B, C = torch.randn(3, 1, length, D_MODEL, device="cuda", dtype=torch.bfloat16)
    dt = torch.randn(1, length, N_HEADS, device="cuda", dtype=torch.bfloat16)
    conv = layer.conv1d
    return partial(
        prepare, x, B, C, dt, layer.config, conv.weight, conv.bias, layer.dt_bias,
        rotary=angles(length),
    )  # fmt: skip


def table(rows: list[dict]) -> str:
    """Lay out milliseconds, a line for each thing and a column for each length."""
    lengths = sorted({row["tokens"] for row in rows})
    lines = ["| ms | " + " | ".join(map(str, lengths)) + " |", "| --- " * (len(lengths) + 1) + "|"]
    for key in dict.fromkeys((row["what"], row["name"]) for row in rows):
        mine = {r["tokens"]: r for r in rows if (r["what"], r["name"]) == key}
        cells = [_cell(mine[n]) if n in mine else "" for n in lengths]
        lines.append(f"| {' '.join(key)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: dict) -> str:
    if "ms" not in row:
        return "failed"
    graph = f" ({row['graph_ms']:.3f} as a graph)" if "graph_ms" in row else ""
    return f"{row['ms']:.3f}{graph}"


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected).norm() / expected.norm()).item()


def _note(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]


PARTS = {
    "alone: prepare": run_preparing_alone,
    **{f"alone: {name}": partial(run_scans_alone, name=name, changes=c) for name, c in ALONE},
    **{
        part.__name__: part
        for part in (
            check_scans, check_mixers, time_layers, time_scans, time_variants, time_preparing,
            time_other_scans,
        )
    },
}  # fmt: skip


@torch.no_grad()
def run_parts(results: Results, first: int) -> None:
    """Run the parts from one on, until the time is up or the GPU is lost to this process."""
    results.load()
    print(torch.cuda.get_device_name(), kernels.available(), kernels.missing(), flush=True)
    for number, (name, part) in enumerate(PARTS.items()):
        if number < first or results.left() < SPARE:
            continue
        results.found["begun"] = number
        results.write()
        start = time.monotonic()
        try:
            part(results)
            torch.cuda.synchronize()
        except Exception as error:
            results.add("checks", what=name, note=_note(error))
            if _is_lost():
                return
        print(f"{name}: {time.monotonic() - start:.1f} s", flush=True)


def _is_lost() -> bool:
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except Exception:  # whatever it says, nothing will run here any more
        return True
    return False


def main() -> None:
    """Have processes check, then time, until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=80)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scan_gpu.json"))
    parser.add_argument("--first", type=int, help="run the parts from this one on, here")
    asked = parser.parse_args()
    results = Results(asked.out, asked.seconds)
    if asked.first is not None:
        run_parts(results, asked.first)
        return
    results.found |= {"about": about(torch.device("cuda")), "begun": -1}
    results.write()
    first = 0
    while first < len(PARTS) and results.left() > SPARE:
        left = results.left()
        command = [
            sys.executable, "-m", "benchmarks.speed.scan", "--seconds", str(left),
            "--out", str(asked.out), "--first", str(first),
        ]  # fmt: skip
        try:
            subprocess.run(command, timeout=left + SPARE, check=False)
        except subprocess.TimeoutExpired:
            print("a part took too long", flush=True)
        results.load()
        first = max(first, results.found["begun"]) + 1
    print(table(results.found["rows"]))


if __name__ == "__main__":
    main()
