"""Print the tables of speed that the READMEs have, made of what benchmarks.speed.check_gpu wrote.

python -m benchmarks.speed.table benchmarks/results/{speed,prefill_turns}_h200.json
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from benchmarks.speed.models import phi_2_sizes


def ratio_of(row: dict) -> str:
    """Tell "teacher", or the hybrid's share of Mamba-2 as the model's name has it."""
    return row["model"].partition(" ")[2] or "teacher"


def grid(rows: Iterable[dict], mode: str) -> tuple[dict, list[str]]:
    """(tokens, batch) -> ratio -> row, and the ratios in their order."""
    cells: dict[tuple[int, int], dict[str, dict]] = {}
    for row in rows:
        if row["mode"] == mode:
            cells.setdefault((row["tokens"], row["batch"]), {})[ratio_of(row)] = row
    return cells, list(dict.fromkeys(name for found in cells.values() for name in found))


def milliseconds(row: dict | None) -> str:
    """A figure with the share of its Amdahl bound that a hybrid reaches, or why there is none."""
    if row is None:
        return ""
    if "ms" not in row:
        return row["note"]
    figure = f"{row['ms']:,.0f}" if row["ms"] >= 100 else f"{row['ms']:.3g}"
    if "speed_up" not in row:
        return f"{figure} ({100 * row['of_bound']:.0f} % of bound)"
    return f"{figure} ({row['speed_up']:.2f}x of {row['amdahl']:.2f}x)"


def table(rows: Iterable[dict], mode: str, title: str) -> str:
    """Markdown: a row for each context and batch, a column for each ratio."""
    cells, ratios = grid(rows, mode)
    lines = [f"| {title} | {' | '.join(ratios)} |", "| --- |" + " ---: |" * len(ratios)]
    for (tokens, batch), found in sorted(cells.items(), key=lambda cell: cell[0][::-1]):
        figures = " | ".join(milliseconds(found.get(name)) for name in ratios)
        lines.append(f"| {batch} x {tokens:,} | {figures} |")
    return "\n".join(lines)


def reached(row: dict | None, bandwidth: float) -> str:
    """Share of what a hybrid can reach that pays for its own gate and states, and of Amdahl's."""
    if row is None or "speed_up" not in row:
        return ""
    own = phi_2_sizes(float(ratio_of(row).rstrip("%")) / 100).own_bytes(row["batch"])
    teacher_seconds = row["ms"] * row["speed_up"] / 1e3
    reachable = 1 / (1 / row["amdahl"] + own / bandwidth / teacher_seconds)
    share, strict = row["speed_up"] / reachable, row["speed_up"] / row["amdahl"]
    return f"{100 * share:.0f} ({100 * strict:.0f})"


def reach(rows: Iterable[dict], mode: str, bandwidth: float) -> str:
    """Markdown: as `table`, how much of the speed-up that can be reached was reached."""
    cells, ratios = grid(rows, mode)
    ratios = [name for name in ratios if name != "teacher"]
    title = "% of the reachable speed-up (of Amdahl's), batch x context"
    lines = [f"| {title} | {' | '.join(ratios)} |", "| --- |" + " ---: |" * len(ratios)]
    for (tokens, batch), found in sorted(cells.items(), key=lambda cell: cell[0][::-1]):
        figures = [reached(found.get(name), bandwidth) for name in ratios]
        if any(figures):
            lines.append(f"| {batch} x {tokens:,} | {' | '.join(figures)} |")
    return "\n".join(lines)


def modes(rows: Iterable[dict], tokens: int) -> str:
    """Markdown: one sequence at one length, a row for each mode."""
    rows = [row for row in rows if (row["tokens"], row["batch"]) == (tokens, 1) and "ms" in row]
    found: dict[str, dict[str, dict]] = {}
    for row in rows:
        found.setdefault(row["mode"], {})[ratio_of(row)] = row
    ratios = ("teacher", "50.0%")
    lines = [f"| mode, 1 x {tokens:,} | {' | '.join(ratios)} |", "| --- | ---: | ---: |"]
    for mode, by_ratio in found.items():
        lines.append(f"| {mode} | {' | '.join(milliseconds(by_ratio.get(r)) for r in ratios)} |")
    return "\n".join(lines)


def turns(rows: Iterable[dict]) -> str:
    """Markdown: prompts in turns, a row for each length, with each hybrid's speed-up."""
    cells, ratios = grid(rows, "graph")
    lines = [f"| ms a prompt, graph | {' | '.join(ratios)} |", "| --- |" + " ---: |" * len(ratios)]
    for (tokens, _), found in sorted(cells.items()):
        figures = " | ".join(_in_turns(found[name]) if name in found else "" for name in ratios)
        lines.append(f"| {tokens:,} | {figures} |")
    return "\n".join(lines)


def _in_turns(row: dict) -> str:
    figure = f"{row['ms']:,.0f}" if row["ms"] >= 100 else f"{row['ms']:.1f}"
    return f"{figure} ({row['speed_up']:.2f}x)" if "speed_up" in row else figure


def tables(*paths: str | Path) -> list[str]:
    """All of them: decode, how much of its bound that is, its modes, and prompts."""
    files = [json.loads(Path(path).read_text()) for path in paths]
    bandwidth = 1e9 * float(files[0]["about"]["bandwidth_GB_s"])
    rows = [row for found in files for row in found["rows"]]
    rows = [row for row in rows if not row["model"].startswith("smollm2")]  # another size
    decode = [row for row in rows if row["what"] == "decode"]
    return [
        table(decode, "graph", "ms a token, batch x context"),
        reach(decode, "graph", bandwidth),
        modes(decode, 828),
        turns(row for row in rows if row["what"] == "prefill in turns"),
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+")
    print("\n\n".join(tables(*parser.parse_args().files)))


if __name__ == "__main__":
    main()
