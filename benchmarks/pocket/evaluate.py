"""Score pocket models family by family; this fills the tables of the README.

    python -m benchmarks.pocket.evaluate pocket pocket-25 --limit 400
    python -m benchmarks.pocket.evaluate pocket pocket-{12.5,25,50,100} --device cuda

Writes OUT (a JSON file) with machine, date, command and versions.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import workbench as wb
from workbench.steps.efficiency.machine import about

PARTS = (("pocket", "test"), ("pocket", "unseen"), ("easy-vqa", "test"))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="names or folders")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit", type=int, help="samples of each part; all of them by default")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--only", nargs="+", help="parts, such as pocket/test; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    results = []
    for name in args.models:
        vlm = wb.load(name, device=args.device)
        for data, split in PARTS:
            if args.only and f"{data}/{split}" not in args.only:
                continue
            result = wb.evaluate(
                vlm, data, split=split, limit=args.limit, seed=args.seed,
                batch_size=args.batch,
            )  # fmt: skip
            print(result, flush=True)
            results.append(result.to_dict())
    if args.out:
        report = {"machine": about(torch.device(args.device)), "results": results}
        Path(args.out).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
