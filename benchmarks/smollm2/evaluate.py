"""Perplexity by kind of text, and the same five chats, of SmolLM2 and its hybrids side by side.

    python -m benchmarks.smollm2.evaluate --characters 20000 --out benchmarks/results/smollm2

All of the held-out text takes a GPU a minute and two cores an hour; `--characters` reads the first
so many of each kind. Writes OUT.json and OUT.md with machine, date, command and versions.
`--hybrids FOLDER` reads deltas from there instead of the package.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

import workbench as wb
from benchmarks.smollm2.corpus import HELDOUT
from workbench.data.text import Document, Texts, load_texts
from workbench.models.delta import load_delta
from workbench.models.hybrid import plan_of
from workbench.models.sources import smollm2
from workbench.steps.efficiency.machine import about

QUESTIONS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a short story about a robot who learns to paint.",
    "Give me three tips for sleeping better.",
    "Write a Python function that adds two numbers.",
)


def models(args: argparse.Namespace) -> list[wb.VLM]:
    """The teacher first, then every hybrid that is there."""
    if args.gguf:
        model, tokenizer = smollm2.read_gguf(args.gguf)
        teacher = wb.VLM(smollm2.TEACHER, model.to(args.device), tokenizer)
    else:
        teacher = wb.load_teacher(smollm2.TEACHER, device=args.device)
    found = [teacher]
    for name, folder in smollm2.HYBRIDS.items():
        if (Path(args.hybrids) / folder).is_dir():
            student = load_delta(teacher.model, Path(args.hybrids) / folder)
            found.append(wb.VLM(name, student, teacher.processor, plan_of(student)))
    return found


def first_of_each_kind(texts: Texts, characters: int | None) -> Texts:
    """The first documents of each kind, the last of them cut; None takes everything."""
    if characters is None:
        return texts
    room, kept = dict.fromkeys(texts.kinds, characters), []
    for document in texts:
        some = document.text[: max(0, room[document.kind])]
        room[document.kind] -= len(some)
        if some:
            kept.append(Document(some, document.kind))
    return Texts(texts.name, kept)


def table(results: Sequence[wb.Perplexity]) -> str:
    """A Markdown table: a row for each kind of text, a column for each model."""
    kinds = [row.kind for row in results[0].rows]
    rows = [["perplexity", "tokens", *(r.model for r in results)]]
    rows.append(["---", *["---:"] * (len(results) + 1)])
    for at, kind in enumerate(kinds):
        values = [f"{result.rows[at].perplexity:.2f}" for result in results]
        rows.append([kind, f"{results[0].rows[at].n_tokens:,}", *values])
    total = [f"**{result.perplexity:.2f}**" for result in results]
    rows.append(["**all**", f"{results[0].n_tokens:,}", *total])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def quoted(text: str) -> str:
    """A text as a Markdown quotation."""
    return "\n".join(f"> {line}".rstrip() for line in (text or "(nothing)").splitlines())


def markdown(where: dict, results: Sequence[wb.Perplexity], chats: dict[str, dict]) -> str:
    """The whole report."""
    parts = [
        "# SmolLM2-135M-Instruct and its hybrids",
        f"Measured {where['date']}, {where['device']}, {where['cpu_cores']} "
        f"CPU cores, torch {where['torch']}, transformers {where['transformers']}, by "
        f"`{where['command']}`. Held-out text, windows of {results[0].context} tokens.",
        table(results),
        "## The same questions to all of them",
        "Greedy, cut off where a long answer is.",
    ]
    for question in QUESTIONS:
        parts.append(f"### {question}")
        for name, said in chats.items():
            parts += [f"**{name}**", quoted(said[question])]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hybrids", default=str(smollm2.FOLDER), help="folder of their deltas")
    parser.add_argument("--gguf", help="read the teacher from this file")
    parser.add_argument("--heldout", default=str(HELDOUT))
    parser.add_argument("--characters", type=int, help="of each kind of text; all by default")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=2, help="windows read at once")
    parser.add_argument("--answer-tokens", type=int, default=120)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", help="OUT.json and OUT.md are written")
    args = parser.parse_args()
    texts = first_of_each_kind(load_texts(args.heldout), args.characters)
    results, chats = [], {}
    for vlm in models(args):
        results.append(wb.perplexity(vlm, texts, context=args.context, batch_size=args.batch))
        print(results[-1], flush=True)
        chats[vlm.name] = {
            question: wb.answer(vlm, [], question, max_new_tokens=args.answer_tokens).text
            for question in QUESTIONS
        }
    where = about(torch.device(args.device))
    written = markdown(where, results, chats)
    print(written)
    if args.out:
        report = {"machine": where, "perplexity": [r.to_dict() for r in results], "chats": chats}
        Path(f"{args.out}.json").write_text(json.dumps(report, indent=1) + "\n")
        Path(f"{args.out}.md").write_text(written)


if __name__ == "__main__":
    main()
