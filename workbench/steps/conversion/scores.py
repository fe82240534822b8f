"""What each layer's attention is worth, in nats, measured before anything is replaced for good."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from workbench.errors import WorkbenchError
from workbench.models.families import check_family, decoder_layers
from workbench.models.fingerprint import fingerprint
from workbench.models.plan import Plan
from workbench.models.teacher import VLM
from workbench.steps.conversion.initialization import convert, default_calibration
from workbench.steps.conversion.probe import Probe

UNIT = "nats per answer token"
SCORES = {
    "skip-one": "KL to the teacher when this layer's attention adds nothing",
    "replace-one": "KL to the teacher when this layer alone mixes with Mamba-2",
    "leave-one-in": "KL to the teacher that this layer's attention saves when all others are gone",
}
SAME_AS = {"kl": "replace-one"}  # the name under which the literature sells it
VERSION = 1  # of how scores are measured: a new one forgets those on disk


@dataclass(frozen=True)
class Estimate:
    """What a measurement will cost, before it starts."""

    method: str
    n_passes: int  # of a whole model over the data
    n_tokens: int  # answer tokens that each pass is scored on
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.method}: {self.n_passes} passes over {self.n_tokens:,} answer tokens, "
            f"about {self.seconds:.0f} s"
        )


@dataclass(frozen=True)
class Scores:
    """What the attention of each layer is worth: replace the lowest first."""

    method: str
    values: tuple[float, ...]  # (n_layers,)
    unit: str
    teacher: str
    n_tokens: int
    seconds: float  # 0 where they were found on disk

    @property
    def order(self) -> tuple[int, ...]:
        """Layers from the one to replace first to the one to keep longest."""
        return tuple(sorted(range(len(self.values)), key=lambda i: (self.values[i], i)))

    def to_dict(self) -> dict:
        """Plain data for JSON."""
        return asdict(self) | {"values": list(self.values), "order": list(self.order)}

    def __str__(self) -> str:
        most = max(max(self.values), 1e-12)
        head = (
            f"{self.teacher}, {self.method}: {SCORES[self.method]} ({self.unit}, "
            f"{self.n_tokens:,} tokens); replace the lowest first"
        )
        rows = [
            f"  {i:3d}  {v:8.4f}  {'#' * round(30 * max(0.0, v) / most)}"
            for i, v in enumerate(self.values)
        ]
        return "\n".join([head, *rows])


def score_layers(
    teacher: VLM,
    *,
    method: str = "replace-one",
    data: Iterable | None = None,
    limit: int | None = 32,
    donor: VLM | None = None,
    batch_size: int = 8,
    dry_run: bool = False,
    cache: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> Scores | Estimate:
    """Measure what the attention of each layer is worth.

    Args:
        teacher: the model to convert.
        method: a key of `SCORES`, or "kl", another name of "replace-one".
        data: what `distill` takes; None takes drawings of the workbench, or English texts.
        limit: at most this many sequences.
        donor: whose mixers stand in, from `align` or `convert`, with one for every layer; None
            calibrates one.
        batch_size: sequences read at once.
        dry_run: return an `Estimate` instead, after one pass of the teacher.
        cache: read scores of the same weights, data and method from disk, and keep new ones there.
        on_progress: called with (passes done, all of them).

    Returns:
        `Scores`, (n_layers,) `.values` in nats per answer token: replace the lowest first.

    Raises:
        WorkbenchError: an unknown method, a donor that lacks a layer, or no data.
    """
    method = SAME_AS.get(method, method)
    if method not in SCORES:
        raise WorkbenchError(
            f"There is no score {method!r}. Choose {', '.join((*SCORES, *SAME_AS))}."
        )
    probe = open_probe(teacher, donor, data, limit=limit, batch_size=batch_size)
    every = set(range(probe.n_layers))
    if dry_run:
        n_passes = probe.n_layers + (method == "leave-one-in")
        return Estimate(method, n_passes, probe.n_tokens, n_passes * probe.pass_seconds)
    place = _place(probe, method)
    if cache and place.exists():
        values = json.loads(place.read_text())
        return Scores(method, tuple(values), UNIT, teacher.name, probe.n_tokens, 0.0)
    choices = {
        "skip-one": lambda i: {"skipped": {i}},
        "replace-one": lambda i: {"replaced": {i}},
        "leave-one-in": lambda i: {"replaced": every - {i}},
    }
    values = []
    for index in sorted(every):
        values.append(probe.kl(**choices[method](index)))
        if on_progress is not None:
            on_progress(index + 1, probe.n_layers + (method == "leave-one-in"))
    if method == "leave-one-in":
        without = probe.kl(every)
        values = [without - value for value in values]
    if cache:
        _write(place, values)
    return Scores(method, tuple(values), UNIT, teacher.name, probe.n_tokens, probe.seconds)


def open_probe(
    teacher: VLM,
    donor: VLM | None,
    data: Iterable | None,
    *,
    limit: int | None,
    batch_size: int = 8,
) -> Probe:
    """Make ready to measure choices of layers, with a calibrated donor where none is given."""
    check_family(teacher.model)
    n_layers = len(decoder_layers(teacher.model))
    if donor is None:
        plan = Plan(n_layers, tuple(range(n_layers)), "all", "mixers to measure with")
        donor = convert(teacher, plan, init="calibrated", name=f"{teacher.name}-calibrated")
    if donor.plan is None or donor.plan.n_layers != n_layers:
        raise WorkbenchError(f"{donor.name} is no hybrid of {teacher.name}: give one from align.")
    data = default_calibration(teacher) if data is None else data
    return Probe(teacher, donor, data, limit=limit, batch_size=batch_size)


def cache_folder() -> Path:
    """Where scores are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "workbench" / "scores"


def _place(probe: Probe, method: str) -> Path:
    """The file that scores of these weights, this data and this method are kept in."""
    models = fingerprint(probe.teacher.model, probe.donor.model)
    digest = hashlib.sha256(f"{VERSION}/{method}/{probe.n_layers}/{models}".encode())
    for tensor in probe.what_was_read():
        digest.update(tensor.float().cpu().numpy().tobytes())
    return cache_folder() / f"{digest.hexdigest()[:32]}.json"


def _write(place: Path, values: list[float]) -> None:
    """Keep scores on disk, whole or not at all; a disk that refuses costs only the time."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(values))
        part.replace(place)
    except OSError:
        return


def greedy(
    probe: Probe,
    n_mamba: int,
    *,
    width: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[tuple[int, ...], float]:
    """Replace the layer that hurts least, again and again, from all attention on.

    Args:
        probe: measures.
        n_mamba: how many layers to replace.
        width: choices that are followed at once: 1 is greedy, more a beam.
        on_progress: called with (rounds done, all of them).

    Returns:
        The layers, and the KL of the model with all of them replaced.
    """
    beam: list[tuple[float, frozenset[int]]] = [(0.0, frozenset())]
    for done in range(n_mamba):
        wider = {kept | {i} for _, kept in beam for i in range(probe.n_layers) if i not in kept}
        found = sorted(((probe.kl(some), some) for some in wider), key=_by_kl)
        beam = found[:width]
        if on_progress is not None:
            on_progress(done + 1, n_mamba)
    kl, best = beam[0]
    return tuple(sorted(best)), kl


def _by_kl(choice: tuple[float, frozenset[int]]) -> tuple[float, list[int]]:
    return choice[0], sorted(choice[1])
