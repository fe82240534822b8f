"""On a GPU: how near to copying do a few sequences' projections, and their Mamba-2 steps, come?

    python -m benchmarks.speed.rows [--seconds 80] [--out benchmarks/results/rows.json]

Phi-2's sizes in bfloat16. Each product runs in a CUDA graph over weights (or states) of several
layers in turn, more than a cache holds. Per cent are of the bandwidth of a copy, and count the
weights alone, or the states read and written. `inward` is q, k, v, z, dt and fc1 with the
activation, `back` is out and fc2 with the residual stream; the norm is in torch's inward and in
that of one row, and in the back of our several rows. Written as they come, as OUT.json and OUT.md.
"""

import argparse
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.speed.check_gpu import Notes
from benchmarks.speed.models import PHI_2
from workbench.mamba.config import Mamba2Config
from workbench.mamba.triton_kernels import mix_step
from workbench.models.engine import triton_kernels, triton_rows
from workbench.models.engine.decoder import Matrix, Norm
from workbench.models.engine.triton_rows import Stream
from workbench.steps.efficiency.machine import about, machine

D, FED, WORDS = (PHI_2[n] for n in ("hidden_size", "intermediate_size", "vocab_size"))
HEADS = PHI_2["num_attention_heads"]
INWARD = (D, D, D, D, HEADS, FED)  # C, B, x, z, dt, fc1
LAYERS, WORD_MATRICES, STATES = 10, 2, 16
ROUNDS, REPLAYS = 5, 4
# (rows, columns, warps, stages), the likeliest first; then programs, for the way back.
TILES = ((128, 64, 4, 4), (64, 128, 4, 3), (64, 64, 4, 6), (128, 128, 8, 3), (128, 64, 4, 6),
         (64, 128, 4, 5), (32, 128, 4, 4), (32, 256, 4, 3), (64, 256, 4, 3), (128, 128, 4, 4),
         (16, 256, 2, 4))  # fmt: skip
INWARD_STREAMS = [Stream(*tile, ahead, 1) for ahead in (128, 0) for tile in TILES]
BACK_TILES = ((64, 128, 4, 4), *TILES)
BACK_STREAMS = [Stream(*tile, 128, programs) for programs in (200, 400, 130) for tile in BACK_TILES]
TAKEN = {"inward": triton_rows.PROJECT, "back": triton_rows.ADD, "head": triton_rows.HEAD}


@dataclass
class Layer:
    """The projections of a layer of a hybrid."""

    norm: Norm
    inward: tuple[Matrix, ...]
    out: Matrix
    down: Matrix


class Products:
    """Weights of several layers, and the ways to multiply by them.

    Args:
        device: where they are.
    """

    def __init__(self, device: torch.device) -> None:
        make = partial(torch.randn, device=device, dtype=torch.bfloat16)

        def matrix(n_out: int, n_in: int) -> Matrix:
            return Matrix(make(n_out, n_in) / n_in**0.5, make(n_out))

        self.make = make
        self.norm = Norm(1 + make(D) / 8, make(D), 1e-5, True)
        self.layers = [
            Layer(self.norm, tuple(matrix(n, D) for n in INWARD), matrix(D, D), matrix(D, FED))
            for _ in range(LAYERS)
        ]
        self.words = [matrix(WORDS, D) for _ in range(WORD_MATRICES)]
        self.take(16)

    def take(self, n: int) -> None:
        """Make the tokens of n sequences."""
        self.h, self.mixed, self.wide = self.make(n, D), self.make(n, D), self.make(n, FED)
        self.normed = self.norm(self.h)

    def ways(self, what: str, streams: list[Stream]) -> dict:
        """Name -> function of a layer, or of a matrix of words; torch's beside what is taken."""
        torch_way, one_way, way = {
            "inward": (self.torch_inward, self.one_inward, self.inward),
            "back": (self.torch_back, self.one_back, self.back),
            "head": (self.torch_head, self.one_head, self.head),
        }[what]
        if self.h.shape[0] == 1:
            return {"one row": one_way, "torch": torch_way}
        ours = {_name(stream): partial(way, stream=stream) for stream in streams}
        return ours | ({"torch": torch_way} if streams == [TAKEN[what]] else {})

    def torch_inward(self, layer: Layer) -> tuple[Tensor, ...]:
        """Norm, products, activation."""
        x = layer.norm(self.h)
        *some, fed = (matrix(x) for matrix in layer.inward)
        return *some, F.gelu(fed, approximate="tanh")

    def torch_back(self, layer: Layer) -> Tensor:
        """Products and sum."""
        return self.h + layer.out(self.mixed) + layer.down(self.wide)

    def torch_head(self, matrix: Matrix) -> Tensor:
        """Logits of what is normalised."""
        return matrix(self.normed)

    def one_inward(self, layer: Layer) -> tuple[Tensor, ...]:
        """The kernel of one row."""
        return triton_kernels.project(self.h, layer.norm, layer.inward, 5, "gelu_new")

    def one_back(self, layer: Layer) -> Tensor:
        """The kernel of one row."""
        return triton_kernels.add(self.h, layer.out, self.mixed, layer.down, self.wide)

    def one_head(self, matrix: Matrix) -> Tensor:
        """The kernel of one row, its norm included."""
        return triton_kernels.project(self.h, self.norm, (matrix,))[0]

    def inward(self, layer: Layer, stream: Stream = triton_rows.PROJECT) -> tuple[Tensor, ...]:
        """The kernel of a few rows."""
        return triton_rows.project(self.normed, layer.inward, 5, "gelu_new", stream)

    def back(self, layer: Layer, stream: Stream = triton_rows.ADD) -> Tensor:
        """Both kernels of a few rows."""
        return triton_rows.add(
            self.h, layer.out, self.mixed, layer.down, self.wide, norm=layer.norm, stream=stream
        )[0]

    def head(self, matrix: Matrix, stream: Stream = triton_rows.HEAD) -> Tensor:
        """The kernel of a few rows."""
        return triton_rows.project(self.normed, (matrix,), stream=stream)[0]

    def over(self, what: str) -> tuple[list, int]:
        """What a way goes over, and the bytes of each."""
        if what == "head":
            return self.words, 2 * WORDS * D
        return self.layers, 2 * D * (sum(INWARD) if what == "inward" else D + FED)


def check(products: Products, notes: Notes) -> None:
    """Relative errors beside the same products in float32."""
    exact = _exactly(products)
    for what, expected in exact.items():
        for name, way in products.ways(what, [TAKEN[what]]).items():
            found = way(products.over(what)[0][0])
            found = found if isinstance(found, tuple) else (found,)
            error = max(
                float((f.float() - e).norm() / e.norm())
                for f, e in zip(found, expected, strict=True)
            )
            result = "ok" if error < 1e-2 else "WRONG"
            notes.add("checks", what=f"{what} {name}", result=result, error=error)


def _exactly(products: Products) -> dict[str, tuple[Tensor, ...]]:
    layer, words = products.layers[0], products.words[0]

    def times(matrix: Matrix, x: Tensor) -> Tensor:
        return x.double() @ matrix.weight.double().T + matrix.bias.double()

    *some, fed = (times(matrix, products.normed) for matrix in layer.inward)
    back = products.h + times(layer.out, products.mixed) + times(layer.down, products.wide)
    found = {
        "inward": (*some, F.gelu(fed, approximate="tanh")),
        "back": (back,),
        "head": (times(words, products.normed),),
    }
    return {what: tuple(t.float() for t in those) for what, those in found.items()}


def seconds_each(work, items: list) -> float:
    """Median seconds of work(item), recorded over all items and played again."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work(items[0])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for item in items:
            work(item)
    graph.replay()
    found = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1e3 / REPLAYS / len(items))
    return statistics.median(found)


def time_products(products: Products, notes: Notes, what: str, streams: list[Stream]) -> None:
    """One product in every way, until the time is up."""
    items, n_bytes = products.over(what)
    for name, way in products.ways(what, streams).items():
        _time(notes, what, products.h.shape[0], name, way, items, n_bytes)


def time_layer(products: Products, notes: Notes) -> None:
    """Inward and back in turns, as a step has them, by what the engine takes."""

    def layer_of(inward, back):
        return lambda layer: (inward(layer), back(layer))

    rows, n_bytes = products.h.shape[0], sum(products.over(w)[1] for w in ("inward", "back"))
    ways = {"torch": layer_of(products.torch_inward, products.torch_back)}
    if rows > 1:
        ways = {"ours": layer_of(products.inward, products.back)} | ways
    else:
        ways = {"ours": layer_of(products.one_inward, products.one_back)} | ways
    for name, way in ways.items():
        _time(notes, "layer", rows, name, way, products.layers, n_bytes)


def time_mixing(products: Products, notes: Notes, rows: int) -> None:
    """The step of a Mamba-2 layer, its states read and written."""
    make, device = products.make, products.h.device
    config = Mamba2Config(D, HEADS, HEADS, D // HEADS, D // HEADS)
    channels = sum(config.widths)
    inward = tuple(make(rows, n) for n in INWARD[:5])
    A_log, dt_bias, D_skip = torch.rand(3, HEADS, device=device)
    conv_weight, conv_bias, norm_weight = make(channels, config.d_conv), make(channels), make(D)
    cos, sin = torch.ones(2, 1, 1, config.d_state, device=device)
    states = [
        (
            make(rows, channels, config.d_conv - 1),
            torch.zeros(rows, HEADS, config.headdim, config.d_state, device=device),
        )
        for _ in range(STATES)
    ]
    n_bytes = 2 * sum(t.nbytes for t in states[0])

    def mix(state):
        return mix_step(
            inward, config, conv_weight, conv_bias, A_log, dt_bias, D_skip, norm_weight,
            cos, sin, *state,
        )  # fmt: skip

    _time(notes, "mix_step", rows, "ours", mix, states, n_bytes)


def _time(notes: Notes, what, rows, name, way, items, n_bytes) -> None:
    if notes.left() < 3:
        return
    row = {"what": what, "rows": rows, "way": name}
    try:
        seconds = seconds_each(way, items)
        per_cent = 100 * n_bytes / seconds / notes.bandwidth
        row |= {"us": seconds * 1e6, "per_cent": per_cent}
    except Exception as error:  # a tile that does not fit: the next may
        row["note"] = f"{type(error).__name__}: {error}"[:200]
    notes.add("rows", **row)


def _name(stream: Stream) -> str:
    return "/".join(map(str, stream))


def table(rows: list[dict]) -> str:
    """A line for each product and number of rows: torch, and the fastest of ours."""
    lines = [f"{'what':<9}{'rows':>5}{'torch us':>10}{'%':>5}{'ours us':>10}{'%':>5}  fastest"]
    timed = [row for row in rows if "us" in row]
    for what, n in dict.fromkeys((row["what"], row["rows"]) for row in timed):
        cell = [row for row in timed if (row["what"], row["rows"]) == (what, n)]
        line, best = f"{what:<9}{n:>5}", None
        for torch_s in (True, False):
            some = [row for row in cell if (row["way"] == "torch") == torch_s]
            best = min(some, key=lambda row: row["us"], default=None)
            figures = (f"{best['us']:.1f}", f"{best['per_cent']:.0f}") if best else ("", "")
            line += f"{figures[0]:>10}{figures[1]:>5}"
        lines.append(f"{line}  {best['way'] if best else ''}")
    return "\n".join(lines)


@torch.no_grad()
def main() -> None:
    """Check, then time, the most telling first."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=80)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/rows.json"))
    asked = parser.parse_args()
    device = torch.device("cuda")
    torch.manual_seed(0)
    notes = Notes(asked.out, asked.seconds)
    notes.bandwidth = machine(device, torch.bfloat16).bandwidth
    notes.found["about"] = about(device) | {"bandwidth_GB_s": f"{notes.bandwidth / 1e9:.0f}"}
    products = Products(device)
    check(products, notes)
    measure(products, notes)
    print(table(notes.found["rows"]))


def measure(products: Products, notes: Notes) -> None:
    """16 rows: what the engine takes, then the other tiles; then fewer rows, the likeliest only."""
    others = {"inward": INWARD_STREAMS, "back": BACK_STREAMS, "head": INWARD_STREAMS}
    time_layer(products, notes)
    time_mixing(products, notes, 16)
    for part in (slice(0), slice(7)):
        for what, stream in TAKEN.items():
            time_products(products, notes, what, others[what][part] or [stream])
    for rows in (2, 8, 4, 1):
        products.take(rows)
        time_layer(products, notes)
        for what, stream in TAKEN.items():
            time_products(products, notes, what, [stream])
    products.take(16)
    for what in ("back", "inward"):
        time_products(products, notes, what, others[what][7:])


if __name__ == "__main__":
    main()
