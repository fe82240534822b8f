"""Which decoder layers become Mamba-2, and why: a plan is data, printed before anything runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from operator import index
from typing import Any

from workbench.errors import WorkbenchError


@dataclass(frozen=True)
class Plan:
    """The layers that mix with Mamba-2; all others keep their attention.

    Args:
        n_layers: decoder layers of the model that the plan is for.
        mamba_layers: their indices, from 0 at the bottom of the stack; kept sorted.
        method: how they were chosen, in a word.
        reason: why these, in a sentence.

    Raises:
        WorkbenchError: an index is no whole number, is out of range or stands there twice.
    """

    n_layers: int
    mamba_layers: tuple[int, ...]
    method: str = "given"
    reason: str = "The layers were named by hand."

    def __post_init__(self) -> None:
        try:
            layers = tuple(sorted(index(i) for i in self.mamba_layers))
        except TypeError:
            raise WorkbenchError(
                "The layers of a plan are a list of whole numbers, such as [0, 2], not "
                f"{self.mamba_layers!r}."
            ) from None
        object.__setattr__(self, "mamba_layers", layers)
        outside = [i for i in layers if not 0 <= i < self.n_layers]
        if outside:
            raise WorkbenchError(
                f"The plan names layer {outside[0]}, but the model has {self.n_layers} layers, "
                f"numbered 0 to {self.n_layers - 1}."
            )
        if len(set(layers)) < len(layers):
            raise WorkbenchError(f"The plan names a layer twice: {list(layers)}.")

    @property
    def ratio(self) -> float:
        """Share of the decoder layers that are Mamba-2, 0 to 1."""
        return len(self.mamba_layers) / self.n_layers

    def __str__(self) -> str:
        width = len(str(self.n_layers - 1))
        rows = [
            f"  {i:{width}d}  {'[M] Mamba-2' if i in self.mamba_layers else ' |  attention'}"
            for i in reversed(range(self.n_layers))
        ]
        head = (
            f"{len(self.mamba_layers)} of {self.n_layers} layers mix with Mamba-2 "
            f"({self.ratio:.1%}), chosen by {self.method!r}: {self.reason}"
        )
        return "\n".join([head, *rows])

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        return {
            "n_layers": self.n_layers,
            "mamba_layers": list(self.mamba_layers),
            "method": self.method,
            "reason": self.reason,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Plan":
        """Read what `to_dict` wrote.

        Raises:
            WorkbenchError: a value is missing.
        """
        try:
            return cls(
                values["n_layers"],
                tuple(values["mamba_layers"]),
                values["method"],
                values["reason"],
            )
        except KeyError as missing:
            raise WorkbenchError(f"This plan lacks its {missing.args[0]!r}.") from None
