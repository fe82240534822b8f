"""Print the README's table of scores, made of the files that benchmarks.pocket.evaluate wrote.

python -m benchmarks.pocket.table benchmarks/results/scores_*.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

PARTS = {"pocket/test": "", "easy-vqa/test": "", "pocket/unseen": "unseen "}
ORDER = ("pocket", "pocket-12.5", "pocket-25", "pocket-50", "pocket-100")


def read(paths: list[str]) -> dict[str, dict[str, dict]]:
    """Model name -> data set -> result."""
    scores: dict[str, dict[str, dict]] = {}
    for path in paths:
        for result in json.loads(Path(path).read_text())["results"]:
            scores.setdefault(result["model"], {})[result["data"]] = result
    return {name: scores[name] for name in sorted(scores, key=ORDER.index)}


def table(scores: dict[str, dict[str, dict]]) -> str:
    """A Markdown table: a row per family, a column per model, percent."""
    rows = [["right answers, %", *scores], ["---", *["---:"] * len(scores)]]
    for data, prefix in PARTS.items():
        families = next(iter(scores.values()))[data]["by_family"]
        for family in families:
            values = [100 * result[data]["by_family"][family] for result in scores.values()]
            rows.append([prefix + family, *(f"{value:.1f}" for value in values)])
        if len(families) > 1:
            means = [100 * result[data]["score"] for result in scores.values()]
            label = f"**{prefix}mean of the {len(families)}**"
            rows.append([label, *(f"**{mean:.1f}**" for mean in means)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+")
    print(table(read(parser.parse_args().files)))


if __name__ == "__main__":
    main()
