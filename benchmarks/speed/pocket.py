"""The pocket models on a CPU: `generate` of transformers beside the engine, in turns, in one run.

    python -m benchmarks.speed.pocket [--rounds 5] [--tokens 32] [--out FILE.json]

Every round lets each way answer the same question with equally many tokens; the time of the prompt
is taken off by a second answer of one token. The table gives medians over the rounds.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from workbench.data import load_data
from workbench.models.engine import Engine
from workbench.models.prompts import prepare_inputs
from workbench.models.teacher import load
from workbench.steps.efficiency.machine import about

MODELS = ("pocket", "pocket-25", "pocket-50", "pocket-100")
MODES = ("static",)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--modes", nargs="+", default=MODES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    sample = load_data("pocket", limit=1)[0]
    rows = []
    for name in asked.models:
        rows.append(measure(name, sample, asked.modes, asked.rounds, asked.tokens))
        print(line(rows[-1]), flush=True)
    if asked.out:
        found = {"about": about(torch.device("cpu")), "rows": rows}
        asked.out.write_text(json.dumps(found, indent=1) + "\n")


def measure(name: str, sample, modes, rounds: int, n_new: int) -> dict:
    """Time every way of one model, in turns; milliseconds a token, and what was said."""
    vlm = load(name)
    vlm.model.generation_config.eos_token_id = None
    vlm.tokenizer.eos_token = None
    inputs = prepare_inputs(vlm, [sample.images], [sample.question], n_new)
    engines = {mode: Engine(vlm, mode) for mode in modes}
    ways = {"generate": lambda n: generate(vlm, inputs, n)}
    for mode, engine in engines.items():
        ways[mode] = lambda n, engine=engine: list(engine.generate(inputs, max_new_tokens=n))
    seconds = {way: [] for way in ways}
    said = {}
    for _ in range(rounds + 1):  # the first warms up
        for way, ask in ways.items():
            short = clock(lambda ask=ask: ask(1))[0]
            whole, said[way] = clock(lambda ask=ask: ask(n_new))
            seconds[way].append((whole - short) / (n_new - 1))
    for way in modes:
        assert [row[0] for row in said[way]] == said["generate"], f"{name}, {way}: other tokens"
    medians = {way: statistics.median(s[1:]) * 1e3 for way, s in seconds.items()}
    return {
        "model": name,
        "n_prompt_tokens": inputs["input_ids"].shape[1],
        "ms_per_token": medians,
        "ms_per_token_range": {w: [min(s[1:]) * 1e3, max(s[1:]) * 1e3] for w, s in seconds.items()},
        "speed_up": {way: medians["generate"] / medians[way] for way in modes},
        "warm_up_ms": {mode: engine.warm_up_ms for mode, engine in engines.items()},
    }


def generate(vlm, inputs, n: int) -> list[int]:
    """Answer as transformers does by default."""
    tokens = vlm.model.generate(**inputs, do_sample=False, max_new_tokens=n, pad_token_id=0)
    return tokens[0, inputs["input_ids"].shape[1] :].tolist()


def clock(work) -> tuple[float, object]:
    """Return the seconds that work took, and its result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def line(row: dict) -> str:
    """One model as a line of text."""
    ways = ", ".join(
        f"{way} {ms:.1f} ms/token"
        + (f" ({row['speed_up'][way]:.1f}x)" if way in row["speed_up"] else "")
        for way, ms in row["ms_per_token"].items()
    )
    return f"{row['model']:<12} {row['n_prompt_tokens']} tokens of prompt: {ways}"


if __name__ == "__main__":
    main()
