"""What a distillation did, step by step."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from workbench.steps.training.stages import Stage


@dataclass(frozen=True)
class StepRow:
    """What happened since the row before: means over its steps, of one stage.

    Losses in the units of `Stage`, None where the stage does not ask for them; seconds since the
    run began, and until it will have ended at this pace; tokens with those of pictures and prompts.
    """

    step: int
    stage: str
    loss: float
    layer_loss: float | None
    kl_nats: float | None
    ce_nats: float | None
    hidden_loss: float | None
    lr: float
    lr_new: float
    seconds: float
    eta_s: float
    tokens_per_s: float
    layer_losses: tuple[float, ...] = ()

    @classmethod
    def from_dict(cls, values: dict) -> StepRow:
        """Read a row of metrics.jsonl back."""
        known = {field.name for field in fields(cls)}
        row = {"hidden_loss": None}  # which older runs did not write
        row |= {name: value for name, value in values.items() if name in known}
        return cls(**row | {"layer_losses": tuple(row.get("layer_losses", ()))})

    def __str__(self) -> str:
        parts = {
            "layer loss": self.layer_loss, "KL": self.kl_nats, "CE": self.ce_nats,
            "hidden loss": self.hidden_loss,
        }  # fmt: skip
        said = [f"{name} {value:.4f}" for name, value in parts.items() if value is not None]
        return (
            f"step {self.step} ({self.stage}): {', '.join(said)};"
            f" {self.tokens_per_s:,.0f} tokens/s, {self.eta_s:.0f} s left"
        )


@dataclass(frozen=True)
class Run:
    """What a distillation did."""

    student: str
    rows: tuple[StepRow, ...]
    n_trainable: int
    stages: tuple[Stage, ...] = ()
    steps: int = 0  # done
    seconds: float = 0.0  # of wall time, with those before a resumption
    n_tokens: int = 0
    n_cut: int = 0  # samples that were longer than the model or `max_length` allows
    stopped: bool = False  # it was asked to stop before its last step

    @property
    def tokens_per_s(self) -> float:
        """Tokens read a second, those of pictures and prompts among them."""
        return self.n_tokens / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict:
        """Plain data for JSON."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        plain["stages"] = [stage.to_dict() for stage in self.stages]
        plain["rows"] = [asdict(row) for row in self.rows]
        return plain | {"tokens_per_s": self.tokens_per_s}

    def __str__(self) -> str:
        whole = sum(stage.steps for stage in self.stages)
        ended = f", stopped before step {self.steps + 1} of {whole}" if self.stopped else ""
        cut = f", {self.n_cut} samples cut to length" if self.n_cut else ""
        lines = [
            f"{self.student}: {self.steps} steps in {self.seconds:.0f} s{ended},"
            f" {self.n_trainable:,} parameters trained, {self.tokens_per_s:,.0f} tokens/s{cut}"
        ]
        for stage in self.stages:
            rows = [row for row in self.rows if row.stage == stage.name]
            if rows:
                lines.append(f"  {stage.name}: {_fall(rows[0], rows[-1])}")
        return "\n".join(lines)


def _fall(first: StepRow, last: StepRow) -> str:
    said = []
    for name, value, unit in (
        ("layer loss", "layer_loss", ""),
        ("KL", "kl_nats", " nats a token"),
        ("CE", "ce_nats", " nats a token"),
        ("hidden loss", "hidden_loss", ""),
    ):
        before, after = getattr(first, value), getattr(last, value)
        if before is not None:
            said.append(f"{name} {before:.3f} -> {after:.3f}{unit}")
    return f"step {last.step}, {', '.join(said)}"
