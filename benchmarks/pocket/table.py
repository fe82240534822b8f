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
    """A Markdown table: a row per family, a column per model, percent; empty where not asked."""
    rows = [["right answers, %", *scores], ["---", *["---:"] * len(scores)]]
    for data, prefix in PARTS.items():
        results = [result.get(data) for result in scores.values()]
        families = next(result for result in results if result)["by_family"]
        for name in families:
            rows.append([prefix + name, *(_percent(r and r["by_family"][name]) for r in results)])
        if len(families) > 1:
            means = [_percent(r and r["score"]) for r in results]
            label = f"**{prefix}mean of the {len(families)}**"
            rows.append([label, *(f"**{mean}**" if mean else "" for mean in means)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+")
    print(table(read(parser.parse_args().files)))


if __name__ == "__main__":
    main()
