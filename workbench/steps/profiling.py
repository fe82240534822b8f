"""How fast and how large: the same loop, the same questions, for every model.

The models take turns question by question, so that a busy moment of the machine hits all of them;
figures are medians over the repeats.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from workbench.data import Sample, load_data
from workbench.errors import WorkbenchError
from workbench.models.generation import Answer, answer
from workbench.models.teacher import VLM


@dataclass(frozen=True)
class ProfileRow:
    """One model at one prompt length. Times are medians; bytes are what the tensors hold."""

    model: str
    n_prompt_tokens: int
    n_new_tokens: int
    prefill_ms: float
    decode_tokens_per_s: float
    weight_bytes: int
    kv_bytes: int
    ssm_bytes: int

    @property
    def cache_bytes(self) -> int:
        """K/V cache and SSM state together."""
        return self.kv_bytes + self.ssm_bytes


@dataclass(frozen=True)
class Profile:
    """Speed and memory of several models on the same prompts."""

    rows: tuple[ProfileRow, ...]
    device: str

    def to_dict(self) -> dict:
        """Plain data for JSON."""
        return {"device": self.device, "rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        lines = [
            f"{'model':<14}{'prompt':>8}{'prefill ms':>12}{'tokens/s':>10}"
            f"{'weights MiB':>13}{'cache KiB':>11}"
        ]
        for r in self.rows:
            lines.append(
                f"{r.model:<14}{r.n_prompt_tokens:>8}{r.prefill_ms:>12.1f}"
                f"{r.decode_tokens_per_s:>10.1f}{r.weight_bytes / 2**20:>13.1f}"
                f"{r.cache_bytes / 2**10:>11.0f}"
            )
        return "\n".join(lines)


def profile(
    models: Sequence[VLM],
    samples: Sequence[Sample] | None = None,
    *,
    repeats: int = 3,
    max_new_tokens: int = 48,
) -> Profile:
    """Measure every model on every sample, one at a time.

    Args:
        models: teacher and hybrids, on one device.
        samples: the questions; by default one long description and one prompt of several pictures.
        repeats: measured rounds after one that is thrown away.
        max_new_tokens: tokens decoded at most.

    Returns:
        A `Profile` with a row per model and sample.

    Raises:
        WorkbenchError: no model, no sample, or repeats below 1.
    """
    if isinstance(models, VLM) or not models or repeats < 1:
        raise WorkbenchError("profile needs a list of at least one model, and at least one repeat.")
    chosen = list(samples) if samples is not None else _default_samples()
    if not chosen:
        raise WorkbenchError("profile needs at least one sample to ask.")
    rows: list[ProfileRow] = []
    for sample in chosen:
        rounds = [
            [
                answer(vlm, sample.images, sample.question, max_new_tokens=max_new_tokens)
                for vlm in models
            ]
            for _ in range(repeats + 1)
        ]
        for vlm, *measured in zip(models, *rounds[1:], strict=True):
            rows.append(_row(vlm, measured))
    return Profile(tuple(rows), str(models[0].model.device))


def _row(vlm: VLM, answers: Sequence[Answer]) -> ProfileRow:
    last = answers[-1]
    return ProfileRow(
        vlm.name,
        last.n_prompt_tokens,
        last.n_new_tokens,
        statistics.median(a.prefill_ms for a in answers),
        statistics.median(a.decode_tokens_per_s for a in answers),
        last.weight_bytes,
        last.kv_bytes,
        last.ssm_bytes,
    )


def _default_samples() -> list[Sample]:
    data = load_data("pocket", limit=64)
    describe = next(s for s in data if s.family == "describe")
    several = max((s for s in data if s.family == "several"), key=lambda s: len(s.images))
    return [describe, several]
