"""What a profile found, as a table, as plain data, and as a file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from workbench.steps.efficiency.bounds import amdahl


@dataclass(frozen=True)
class ProfileRow:
    """One model on one prompt. Times are medians, ranges go from the fastest round to the slowest.

    Bytes are what the tensors hold at the end of the answer. A measurement that ran out of memory
    has None for its times, and a note.
    """

    model: str
    ratio: float  # share of the layers that are Mamba-2
    batch_size: int
    n_prompt_tokens: int
    n_new_tokens: int
    prefill_ms: float | None
    prefill_ms_range: tuple[float, float] | None
    prefill_bound_ms: float  # no machine with these rates is faster; pictures are not counted
    decode_tokens_per_s: float | None  # of all rows of a batch together
    decode_tokens_per_s_range: tuple[float, float] | None
    decode_bound_tokens_per_s: float
    prefill_mixing_share: float | None  # of attention in a teacher's time, measured without it
    decode_mixing_share: float | None
    decode_own_ms: float  # least a step spends on Mamba-2's gate and states; 0 of a teacher
    weight_bytes: int
    kv_bytes: int
    ssm_bytes: int
    peak_mib: float | None  # of a GPU: weights, cache and what came on top; None on a CPU
    warm_up_ms: float  # made once, in no other figure
    note: str = ""

    @property
    def cache_bytes(self) -> int:
        """K/V cache and SSM state together."""
        return self.kv_bytes + self.ssm_bytes


@dataclass(frozen=True)
class Profile:
    """Speed and memory of several models on the same prompts."""

    rows: tuple[ProfileRow, ...]
    device: str
    mode: str = "static"
    about: dict[str, str] | None = None
    finished: bool = True  # False: interrupted, with the rows so far

    def teacher_of(self, row: ProfileRow) -> ProfileRow | None:
        """Return the row of the teacher on the same prompt."""
        return next(
            (
                r
                for r in self.rows
                if not r.ratio
                and (r.batch_size, r.n_prompt_tokens) == (row.batch_size, row.n_prompt_tokens)
            ),
            None,
        )

    def decode_speed_up(self, row: ProfileRow) -> tuple[float | None, float | None]:
        """Return how much faster a row decodes than its teacher, and the most it could (Amdahl)."""
        teacher = self.teacher_of(row)
        if teacher is None or not row.ratio:
            return None, None
        most = teacher.decode_mixing_share
        bound = None if most is None else amdahl(most, row.ratio)
        if not (teacher.decode_tokens_per_s and row.decode_tokens_per_s):
            return None, bound
        return row.decode_tokens_per_s / teacher.decode_tokens_per_s, bound

    def decode_reachable(self, row: ProfileRow) -> float | None:
        """Return the most that a row could gain if it also pays for its own gate and states."""
        teacher, (_, bound) = self.teacher_of(row), self.decode_speed_up(row)
        if bound is None or not teacher.decode_tokens_per_s:
            return None
        step_ms = 1e3 * row.batch_size / teacher.decode_tokens_per_s
        return amdahl(teacher.decode_mixing_share, row.ratio, row.decode_own_ms / step_ms)

    def prefill_speed_up(self, row: ProfileRow) -> tuple[float | None, float | None]:
        """Return how much faster a row reads its prompt than its teacher, and the most it could."""
        teacher = self.teacher_of(row)
        if teacher is None or not row.ratio:
            return None, None
        most = teacher.prefill_mixing_share
        bound = None if most is None else amdahl(most, row.ratio)
        if not (teacher.prefill_ms and row.prefill_ms):
            return None, bound
        return teacher.prefill_ms / row.prefill_ms, bound

    def to_dict(self) -> dict:
        """Plain data for JSON."""
        rows = [
            asdict(row)
            | {
                "cache_bytes": row.cache_bytes,
                "decode_speed_up": self.decode_speed_up(row)[0],
                "decode_speed_up_bound": self.decode_speed_up(row)[1],
                "decode_speed_up_reachable": self.decode_reachable(row),
                "prefill_speed_up": self.prefill_speed_up(row)[0],
                "prefill_speed_up_bound": self.prefill_speed_up(row)[1],
            }
            for row in self.rows
        ]
        return {
            "device": self.device,
            "mode": self.mode,
            "about": self.about or {},
            "finished": self.finished,
            "rows": rows,
        }

    def save(self, path: str | Path) -> Path:
        """Write everything as JSON."""
        path = Path(path)
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        return path

    def __str__(self) -> str:
        peak = any(row.peak_mib is not None for row in self.rows)
        lines = [
            f"{'model':<14}{'batch':>6}{'prompt':>8}{'prefill ms':>12}{'tokens/s':>10}"
            f"{'of roof':>9}{'speed-up':>10}{'reachable':>11}{'at most':>9}{'weights MiB':>13}"
            f"{'cache KiB':>11}" + (f"{'peak MiB':>10}" if peak else "")
        ]
        for r in self.rows:
            reached, most = self.decode_speed_up(r)
            share = r.decode_tokens_per_s and r.decode_tokens_per_s / r.decode_bound_tokens_per_s
            lines.append(
                f"{r.model:<14}{r.batch_size:>6}{r.n_prompt_tokens:>8}"
                f"{_shown(r.prefill_ms, '.1f'):>12}{_shown(r.decode_tokens_per_s, '.1f'):>10}"
                f"{_shown(share, '.0%'):>9}{_shown(reached, '.2f'):>10}"
                f"{_shown(self.decode_reachable(r), '.2f'):>11}{_shown(most, '.2f'):>9}"
                f"{r.weight_bytes / 2**20:>13.1f}{r.cache_bytes / 2**10:>11.0f}"
                + (f"{_shown(r.peak_mib, '.0f'):>10}" if peak else "")
                + (f"  {r.note}" if r.note else "")
            )
        known = self.about or {"device": self.device}
        when_and_where = [known[name] for name in ("device", "date") if name in known]
        lines.append(", ".join([*when_and_where, f"mode {self.mode}"]))
        if not self.finished:
            lines.append("interrupted: these are the rows so far")
        return "\n".join(lines)


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
