"""The table, and in plain words what it says about each question."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import mean, stdev

from benchmarks.ablation.rows import DEFAULT, PAPER

COLUMNS = ("group", "row", "Mamba-2 %", "seeds", "KL before", "KL after", "same token after %",
           "steps", "seconds: start", "training")  # fmt: skip
SCORES = ("right before %", "right after %", "of what was lost, back %")
BETTER, WORSE, ALIKE = "better", "worse", "no clear difference"


class Found:
    """Finished jobs, by row and ratio; `order` names the rows as the table has them."""

    def __init__(self, lines: list[dict], order: Sequence[str] = ()) -> None:
        self.good = [line for line in lines if "error" not in line]
        self.bad = [line for line in lines if "error" in line]
        self.rows: dict[str, dict] = {}
        place = {name: i for i, name in enumerate(order)}
        for line in sorted(lines, key=lambda line: place.get((line["row"] or {}).get("name"), -1)):
            if line["row"]:
                self.rows[line["row"]["name"]] = line["row"]
        rated = {line["percent"] for line in lines if line["row"]}
        self.ratios = sorted(rated)
        teacher = [line["score"] for line in self.good if line["kind"] == "teacher"]
        self.teacher_score = teacher[0] if teacher else None

    def values(self, name: str, percent: float, key: str) -> dict[int, float]:
        """A figure of a row at a ratio, by seed."""
        return {
            line["seed"]: line[key]
            for line in self.good
            if line["row"] and (line["row"]["name"], line["percent"]) == (name, percent)
            and line.get(key) is not None
        }  # fmt: skip

    def errors(self, name: str, percent: float) -> int:
        """How many jobs of a row at a ratio failed."""
        return sum(
            line["row"] is not None and (line["row"]["name"], line["percent"]) == (name, percent)
            for line in self.bad
        )


def spread(values: dict[int, float], factor: float = 1, digits: int = 3) -> str:
    """Mean, and the standard deviation over seeds where there are several."""
    some = [factor * value for value in values.values()]
    if not some:
        return ""
    if len(some) == 1:
        return f"{some[0]:.{digits}f}"
    return f"{mean(some):.{digits}f} ± {stdev(some):.{digits}f}"


def verdict(ours: dict[int, float], theirs: dict[int, float]) -> str:
    """Whether a KL is better or worse by more than the larger of both spreads over seeds."""
    both = sorted(ours.keys() & theirs.keys())
    a, b = [ours[seed] for seed in both], [theirs[seed] for seed in both]
    if not both:
        return ""
    times = f"{mean(a) / max(mean(b), 1e-12):.2f} x"
    if len(both) == 1:
        return f"{times}, one seed: spread unknown"
    beyond = abs(mean(a) - mean(b)) > max(stdev(a), stdev(b))
    return f"{times}, {(BETTER if mean(a) < mean(b) else WORSE) if beyond else ALIKE}"


def report(
    lines: list[dict], settings: dict, versions: dict, left: int, order: Sequence[str] = ()
) -> Iterator[str]:
    """Lines of Markdown: what was run, every row, the answers, and what failed."""
    found = Found(lines, order)
    yield (
        f"{settings['teacher']}: {settings['steps']} steps of {settings['batch']} sequences, "
        f"{settings['limit']} held-out sequences; "
        f"{', '.join(f'{k} {v}' for k, v in versions.items())}; mean ± standard deviation over "
        "seeds."
    )
    if found.teacher_score is not None:
        yield f"The teacher answers {found.teacher_score:.1%} of {settings['score']} questions."
    if left:
        yield f"{left} job(s) were not done: the time was over."
    yield ""
    yield from table(found)
    yield ""
    yield from answers(found)
    for line in found.bad:
        yield f"- Failed: {line['key']}: {line['error']}"


def table(found: Found) -> Iterator[str]:
    """One line for each row at each ratio, and how it stands to the row it is compared with."""
    scored = found.teacher_score is not None
    columns = [*COLUMNS, *(SCORES if scored else ()), "KL after, against"]
    yield f"| {' | '.join(columns)} |"
    yield "| --- | --- |" + " ---: |" * (len(columns) - 3) + " --- |"
    for percent in found.ratios:
        for name, row in found.rows.items():
            cells = _cells(found, name, row, percent, scored)
            if cells:
                yield f"| {' | '.join(cells)} |"


def _cells(found: Found, name: str, row: dict, percent: float, scored: bool) -> list[str]:
    def of(key: str) -> dict[int, float]:
        return found.values(name, percent, key)

    before, after, failed = of("kl_before"), of("kl_after"), found.errors(name, percent)
    if not before and not failed:
        return []
    start = [sum(parts) for parts in zip(*(of(f"{p}_seconds").values() for p in
                                           ("placement", "convert")), strict=True)]  # fmt: skip
    seeds = f"{len(after) or len(before)}" + (f", {failed} failed" if failed else "")
    cells = [
        row["group"], name, f"{percent:g}", seeds, spread(before), spread(after, digits=4),
        spread(of("agreement_after"), 100, 1), f"{min(of('steps').values(), default=0)}",
        f"{mean(start):.1f}" if start else "", spread(of("train_seconds"), digits=0),
    ]  # fmt: skip
    if scored:
        cells += [spread(of("score_before"), 100, 1), spread(of("score_after"), 100, 1)]
        cells.append(spread(_recovered(of, found.teacher_score), 100, 0))
    said = verdict(after, found.values(row["against"], percent, "kl_after"))
    return [*cells, f"{said} ({row['against']})" if said else ""]


def _recovered(of, best: float) -> dict[int, float]:
    before, after = of("score_before"), of("score_after")
    return {
        seed: (after[seed] - before[seed]) / (best - before[seed])
        for seed in after
        if best > before[seed]
    }


def answers(found: Found) -> Iterator[str]:
    """The two targets, ratio by ratio."""
    for percent in found.ratios:
        inits = {
            name: found.values(name, percent, "kl_before")
            for name, row in found.rows.items()
            if row["group"] == "init"
        }
        theirs = inits.pop("matvlm", {}) or found.values(PAPER, percent, "kl_before")
        inits = {name: values for name, values in inits.items() if values}
        if inits and theirs:
            best = min(inits, key=lambda name: mean(inits[name].values()))
            times = mean(inits[best].values()) / mean(theirs.values())
            yield (
                f"- {percent:g} %, zero-shot: the best init, {best}, has {times:.3f} x the KL of "
                f"matvlm (target 0.1: {_met(times <= 0.1)})."
            )
        ours = found.values(DEFAULT, percent, "kl_after")
        theirs = found.values(PAPER, percent, "kl_after")
        both = ours.keys() & theirs.keys()
        if both:
            times = mean(ours[s] for s in both) / mean(theirs[s] for s in both)
            yield (
                f"- {percent:g} %, trained: the default has {times:.3f} x the KL of {PAPER!r}, "
                f"{len(both)} seed(s) (target 0.5: {_met(times <= 0.5)})."
            )


def _met(yes: bool) -> str:
    return "met" if yes else "missed"
