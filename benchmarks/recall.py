"""Recall under long context beside accuracy: what is still known of what was read long ago.

    python -m benchmarks.recall pocket pocket-12.5 pocket-25 pocket-50 pocket-100 --out OUT.json
    python -m benchmarks.recall smollm2-135m smollm2-135m-50 --limit 200

A pocket model sees four pictures in one prompt and is asked what is in one of them: the first lies
1,024 tokens back, the last 256 (it has not learnt to read the texts of `wb.load_data("recall")`,
and gets none of them right). A language model is asked for a number that it was told.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random

import torch

import workbench as wb
from workbench.data.assets import load_atlas
from workbench.data.scenes.objects import single_object
from workbench.data.scenes.scene import drawings
from workbench.data.scenes.several import ORDINALS
from workbench.models.prompts import sees
from workbench.steps.efficiency.machine import about

N_IMAGE_TOKENS = 256


def pictures(limit: int, seed: int) -> wb.Dataset:
    """Four different objects, and a question about one; the pictures take turns, far ones first."""
    distances = [N_IMAGE_TOKENS * (len(ORDINALS) - place) for place in range(len(ORDINALS))]

    def make(index: int) -> wb.Sample:
        number, place = divmod(index, len(ORDINALS))
        rng = Random(f"{seed}/recall of pictures/{number}")  # one scene, asked about four times
        by_concept = dict(rng.sample(drawings(unseen=False), 40))
        chosen = rng.sample(sorted(by_concept.items()), len(ORDINALS))
        images = tuple(single_object(rng, *one) for one in chosen)
        answer = load_atlas().concepts[chosen[place][0]].name
        question = f"What is in the {ORDINALS[place]} picture?"
        return wb.Sample(images, question, answer, str(distances[place]))

    return wb.Dataset("recall of pictures", tuple(map(str, distances)), make, limit)


def measured(name: str, args: argparse.Namespace) -> dict:
    """One model: recall by distance, and for a pocket model its accuracy on `pocket`."""
    vlm = wb.load(name, device=args.device)
    seeing = sees(vlm)
    data = pictures(args.limit, args.seed) if seeing else wb.load_data(
        "recall", limit=args.limit, seed=args.seed
    )  # fmt: skip
    found = wb.evaluate(vlm, data, batch_size=args.batch, max_new_tokens=24)
    result = {"model": name, "data": found.data, "n": len(found.records), "recall": found.score,
              "recall_stderr": found.stderr, "by_distance": found.by_family}  # fmt: skip
    if seeing and args.accuracy:
        whole = wb.evaluate(vlm, "pocket", limit=args.accuracy, batch_size=args.batch)
        result |= {"accuracy": whole.score, "accuracy_stderr": whole.stderr,
                   "accuracy_n": len(whole.records)}  # fmt: skip
    print(json.dumps(result), flush=True)
    return result


def table(results: list[dict]) -> str:
    """Markdown: a line a model, a column a distance."""
    distances = sorted({int(d) for found in results for d in found["by_distance"]})
    columns = ["%", "n", *(f"{d} tokens back" for d in distances), "recall", "accuracy"]
    lines = [f"| {' | '.join(columns)} |", "| --- |" + " ---: |" * (len(columns) - 1)]
    for found in results:
        shares = [found["by_distance"].get(str(d)) for d in distances]
        shares += [found["recall"], found.get("accuracy")]
        cells = ["" if share is None else f"{100 * share:.1f}" for share in shares]
        lines.append(f"| {found['model']} | {found['n']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(words: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="+", help="names or folders, all seeing or all not")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit", type=int, default=400, help="questions of recall")
    parser.add_argument("--accuracy", type=int, default=400, help="of the whole test; 0 for none")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args(words)
    results = [measured(name, args) for name in args.models]
    print(table(results))
    if args.out:
        report = {"machine": about(torch.device(args.device)), "seed": args.seed}
        args.out.write_text(json.dumps(report | {"models": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
