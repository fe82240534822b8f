"""On a GPU: are the kernels right, does every mode say what `generate` says, and how fast is it?

    python -m benchmarks.speed.check_gpu [--seconds 400] [--out benchmarks/results/speed_gpu]

Results are written as they come, as OUT.json and OUT.md: what is killed or runs out of time keeps
what it has. Weights are random; a prompt longer than the model's positions is for speed only.
"""

import argparse
import json
import time
import traceback
from pathlib import Path

import torch

from benchmarks.speed import checks, timings
from workbench.steps.efficiency.bounds import out_of_memory
from workbench.steps.efficiency.machine import about, machine


class Notes:
    """What is known so far, on disk after each line."""

    def __init__(self, out: Path, seconds: float) -> None:
        self.out, self.end = out, time.monotonic() + seconds
        self.reserve = seconds / 5  # kept for what comes after the checks
        self.found = {"about": {}, "checks": [], "rows": []}
        out.parent.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.end - time.monotonic()

    def add(self, kind: str, **values) -> None:
        """Write down one line."""
        self.found[kind].append(values)
        print(kind, *(f"{k}={_short(v)}" for k, v in values.items()), flush=True)
        self.write()

    def write(self) -> None:
        """Write both files."""
        self.out.with_suffix(".json").write_text(json.dumps(self.found, indent=1) + "\n")
        lines = [f"{k}: {v}" for k, v in self.found["about"].items()]
        for kind in ("checks", "rows"):
            names = list(dict.fromkeys(n for row in self.found[kind] for n in row))
            lines += ["", f"| {' | '.join(names)} |", "|" + " --- |" * len(names)]
            for row in self.found[kind]:
                lines.append("| " + " | ".join(_short(row.get(n, "")) for n in names) + " |")
        self.out.with_suffix(".md").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Check, then time, until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=400)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/speed_gpu"))
    parser.add_argument("--only", nargs="*", help="names of parts")
    parser.add_argument("--device", default="cuda")
    asked = parser.parse_args()
    device = torch.device(asked.device)
    notes = Notes(asked.out, asked.seconds)
    best = machine(device, torch.bfloat16)
    notes.found["about"] = about(device) | {
        "bandwidth_GB_s": f"{best.bandwidth / 1e9:.0f}",
        "matmul_TFLOP_s": f"{best.flops / 1e12:.0f}",
    }
    notes.write()
    # What compiles for long comes after what must not be missed.
    for part in (*checks.SHORT, *timings.FIRST, *checks.LONG, *timings.REST):
        if asked.only and part.__name__ not in asked.only:
            continue
        if notes.left() < 5:
            notes.add("checks", what=part.__name__, result="no time left")
            continue
        start = time.monotonic()
        try:
            part(notes, device)
        except KeyboardInterrupt:
            notes.add("checks", what=part.__name__, result="interrupted")
            return
        except Exception as error:
            result = "out of memory" if out_of_memory(error) else f"{type(error).__name__}: {error}"
            notes.add("checks", what=part.__name__, result=result[:300])
            traceback.print_exc()
        print(f"{part.__name__}: {time.monotonic() - start:.1f} s", flush=True)


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


if __name__ == "__main__":
    main()
