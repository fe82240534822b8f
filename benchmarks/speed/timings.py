"""The table of speeds and memory, most telling cells first."""

import statistics
import time
from functools import partial

import torch

from benchmarks.speed.models import PHI_2, SMOLLM2_135M, free, hybrid, llama, phi
from workbench.mamba import kernels
from workbench.models.engine import Engine
from workbench.steps.efficiency.bounds import (
    Idle,
    amdahl,
    out_of_memory,
    ratio,
    sizes,
)
from workbench.steps.efficiency.machine import machine

RATIOS = (0, 0.125, 0.25, 0.5, 0.75, 1)
STEPS, ROUNDS = 32, 3
TURNS = 30  # of models that are close to each other
ROOM = 256  # places beyond the context
IMAGE_AND_PROMPT = 828


def decode_phi_2(notes, device) -> None:
    """Milliseconds a token, teacher and hybrids, at one row and short context first."""
    make = partial(phi, PHI_2, str(device), torch.bfloat16, "phi-2")
    shapes = ((1, 828), (1, 16384), (1, 65536), (16, 16384), (16, 828))
    _decode(notes, device, make, [("graph", *shape) for shape in shapes], RATIOS, 0.4)
    modes = ("compiled", "static", "eager")
    _decode(notes, device, make, [(mode, 1, 828) for mode in modes], (0, 0.5), 0.3)


def decode_large_batch(notes, device) -> None:
    """Where a hybrid gains most: many rows of long context."""
    make = partial(phi, PHI_2, str(device), torch.bfloat16, "phi-2")
    cells = [("graph", 4, 32768), ("graph", 8, 16384), ("graph", 16, 8192), ("graph", 4, 65536)]
    _decode(notes, device, make, cells, (0, 0.5, 1), 0.5)


def decode_smollm2(notes, device) -> None:
    """The same for a small model with grouped heads."""
    make = partial(llama, SMOLLM2_135M, str(device), torch.bfloat16, "smollm2-135m")
    _decode(notes, device, make, [("graph", 1, 828), ("graph", 16, 8192)], (0, 0.5, 1), 0.5)


def _decode(notes, device, make, cells, ratios, share_of_time) -> None:
    """Each model alone on the GPU: `make` builds the teacher again for each hybrid."""
    until = notes.left() * (1 - share_of_time)
    for mode, batch, context in cells:
        base, mixing = None, None
        for r in ratios:
            if notes.left() < until:
                return
            vlm = hybrid(make(), r)
            free()
            row = {"what": "decode", "model": vlm.name, "mode": mode, "batch": batch}
            try:
                ms, engine = _decode_ms(vlm, mode, batch, context)
                row |= _memory(engine, vlm)
                warm_up = engine.warm_up_ms
                del engine
                if not r:
                    base = ms
                    free()
                    idle = _decode_ms(vlm, mode, batch, context, Idle)[0]
                    mixing = max(0.0, 1 - idle / ms)
                at = context + STEPS * ROUNDS // 2
                bound = sizes(vlm).decode_seconds(machine(device, torch.bfloat16), batch, at) * 1e3
                row |= {"tokens": context, "ms": ms, "bound_ms": bound, "of_bound": bound / ms}
                if r and base:
                    row |= {"speed_up": base / ms, "amdahl": amdahl(mixing, ratio(vlm))}
                row["warm_up_ms"] = warm_up
            except Exception as error:
                row |= {"tokens": context, "note": _reason(error)}
            notes.add("rows", **row)
            del vlm
            free()


def _decode_ms(vlm, mode, batch, context, wrap=None):
    engine = Engine(vlm, mode, max_length=context + ROOM, batch_size=batch, wrap=wrap)
    torch.cuda.reset_peak_memory_stats()
    if engine.mode == "eager":
        ids = {"input_ids": torch.randint(3, 500, (batch, context), device=engine.device)}
        engine.prefill(ids, max_new_tokens=ROOM)
        # Every length once, uncounted: cuDNN's attention seems to plan for each that is new, and
        # the first model would pay for all.
        for _ in range(3 + STEPS * ROUNDS):
            engine.step()
        engine.prefill(ids, max_new_tokens=ROOM)
    else:
        engine.pretend(batch, context, max_new_tokens=ROOM)
    for _ in range(3):
        engine.step()
    seconds = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(STEPS):
            engine.step()
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / STEPS)
    return statistics.median(seconds) * 1e3, engine


def _memory(engine, vlm) -> dict:
    weights = sum(p.nbytes for p in vlm.model.parameters())
    expected = weights + sum(engine.runner.bytes_reserved())
    return {
        "peak_MiB": torch.cuda.max_memory_allocated() / 2**20,
        "weights_and_cache_MiB": expected / 2**20,
    }


def prefill_phi_2(notes, device) -> None:
    """Milliseconds of a prompt, whole model, by length, and its bound."""
    teacher = phi(PHI_2, str(device), torch.bfloat16, "phi-2")
    until = notes.left() * 0.6
    for length in (1024, 4096, 16384, 65536):
        base = mixing = None
        for r in (0, 0.25, 0.5, 1):
            if notes.left() < until:
                return
            vlm = hybrid(teacher, r)
            row = {"what": "prefill", "model": vlm.name, "mode": "static", "batch": 1}
            try:
                ms = _prefill_ms(vlm, length)
                if not r:
                    base = ms
                    mixing = max(0.0, 1 - _prefill_ms(vlm, length, Idle) / ms)
                best = machine(device, torch.bfloat16)
                bound = sizes(vlm).prefill_seconds(best, 1, length) * 1e3
                row |= {"tokens": length, "ms": ms, "bound_ms": bound, "of_bound": bound / ms}
                if r and base:
                    row |= {"speed_up": base / ms, "amdahl": amdahl(mixing, ratio(vlm))}
            except Exception as error:
                row |= {"tokens": length, "note": _reason(error)}
            notes.add("rows", **row)
            del vlm
            free()


def prefill_in_turns(notes, device, sizes=PHI_2, lengths=(1024, 2048, 4096, 16384)) -> None:
    """Prompts where models differ by less than runs do: all of them in turns.

    `speed_up` is the median, over rounds, of the teacher's time by the hybrid's in the same round;
    `from` and `to` hold the middle half of the rounds.
    """
    teacher = phi(sizes, str(device), torch.bfloat16, "phi-2")
    mode = "graph" if device.type == "cuda" else "static"
    for length in lengths:
        engines = {
            vlm.name: Engine(vlm, mode, max_length=length + 8)
            for vlm in (hybrid(teacher, r) for r in RATIOS)
        }
        ids = torch.randint(3, 500, (1, length), device=device)
        for engine in engines.values():  # once each, uncounted: kernels compile and are measured
            _prefill_seconds(engine, ids)
        rounds, n_rounds = [], TURNS if length <= 4096 else TURNS // 3
        for turn in range(n_rounds):  # whoever comes first comes later in the next round
            names = list(engines)[turn % len(engines) :] + list(engines)[: turn % len(engines)]
            rounds.append({name: _prefill_seconds(engines[name], ids) for name in names})
        for name in engines:
            ms = statistics.median(found[name] for found in rounds) * 1e3
            row = {"what": "prefill in turns", "model": name, "mode": mode, "batch": 1,
                   "tokens": length, "rounds": len(rounds), "ms": ms}  # fmt: skip
            if name != teacher.name:
                gains = [found[teacher.name] / found[name] for found in rounds]
                low, middle, high = statistics.quantiles(gains, n=4)
                row |= {"speed_up": middle, "from": low, "to": high}
            notes.add("rows", **row)
        del engines
        free()


def _prefill_ms(vlm, length, wrap=None) -> float:
    engine = Engine(vlm, "static", max_length=length + 8, wrap=wrap)
    ids = torch.randint(3, 500, (1, length), device=engine.device)
    seconds = [_prefill_seconds(engine, ids) for _ in range(ROUNDS + 1)]
    return statistics.median(seconds[1:]) * 1e3


def _prefill_seconds(engine, ids) -> float:
    _wait(engine.device)
    start = time.perf_counter()
    engine.prefill({"input_ids": ids}, max_new_tokens=2)
    _wait(engine.device)
    return time.perf_counter() - start


def _wait(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def mixing_operation(notes, device) -> None:
    """Milliseconds of one layer's scan, 32 heads of 80, by implementation and length."""
    for length in (1024, 4096, 16384, 65536):
        x, B, C = torch.randn(3, 1, length, 32, 80, device=device, dtype=torch.bfloat16)
        dt = torch.rand(1, length, 32, device=device) * 0.1
        A = -torch.rand(32, device=device)
        for name in kernels.available():
            if name == "torch" and length > 4096:
                continue
            with kernels.use(name):
                seconds = []
                for _ in range(6):
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    kernels.ssd(x, dt, A, B, C)
                    torch.cuda.synchronize()
                    seconds.append(time.perf_counter() - start)
            ms = statistics.median(seconds[1:]) * 1e3
            notes.add("rows", what="scan", model=name, batch=1, tokens=length, ms=ms)


def paper_figure(notes, device) -> None:
    """The paper's own figure, both sides in every mode: batch 1, 828 tokens, then so many more.

    A context of half the answer stands for the whole of it: decode grows linearly with context.
    """
    make = partial(phi, PHI_2, str(device), torch.bfloat16, "phi-2")
    cells = [
        (mode, 1, IMAGE_AND_PROMPT + n // 2)
        for n in (1024, 16384, 32768, 4096, 2048, 8192)
        for mode in ("eager", "graph")
    ]
    _decode(notes, device, make, cells, (0, 0.25, 0.5), 1.0)


def _reason(error: Exception) -> str:
    free()
    return "out of memory" if out_of_memory(error) else f"{type(error).__name__}: {error}"[:200]


FIRST = (decode_phi_2, mixing_operation, prefill_phi_2)
REST = (prefill_in_turns, decode_large_batch, decode_smollm2, paper_figure)
