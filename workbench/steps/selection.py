"""Which decoder layers become Mamba-2."""

from __future__ import annotations

from workbench.errors import WorkbenchError
from workbench.models.families import check_family, decoder_layers
from workbench.models.plan import Plan
from workbench.models.teacher import VLM

# The lists that MaTVLM ships for its 32-layer teacher. 12.5 % is not evenly spread over 32.
# Source: github.com/hustvl/MaTVLM, commit cac174f, mamba2_tinyllava/*.yaml, key `ssm_layers`.
_PAPER_LISTS = {
    (32, 4): (0, 6, 12, 18),
    (32, 8): tuple(range(0, 32, 4)),
    (32, 16): tuple(range(0, 32, 2)),
}


def choose_layers(teacher: VLM, *, ratio: float = 0.25, method: str = "even") -> Plan:
    """Choose the decoder layers to replace.

    Args:
        teacher: the model to convert.
        ratio: share of the decoder layers that become Mamba-2, 0..1; rounded to whole layers.
        method: "even" spreads them from layer 0 on, as MaTVLM does; at 32 layers and 12.5, 25 or
            50 % the lists are the paper's own.

    Returns:
        A `Plan`; `print(plan)` draws the stack.

    Raises:
        WorkbenchError: a ratio outside 0..1, one that rounds to no layer, an unknown method, a
            teacher of a family that cannot be converted.

    Source: MaTVLM, arXiv 2503.13440, section 4.1 and table "even" of its ablation.
    """
    if method != "even":
        raise WorkbenchError(f"There is no selection method {method!r}. Choose 'even'.")
    if not 0 <= ratio <= 1:
        raise WorkbenchError(
            f"ratio={ratio} is not a share of layers: choose 0 to 1, such as 0.25."
        )
    check_family(teacher.model)
    n_layers = len(decoder_layers(teacher.model))
    n_mamba = round(ratio * n_layers)
    if ratio > 0 and n_mamba == 0:
        raise WorkbenchError(
            f"ratio={ratio} of {n_layers} layers rounds to none: "
            f"choose at least {1 / n_layers:.3g}."
        )
    return Plan(n_layers, even_layers(n_layers, n_mamba), method, _reason(n_layers, n_mamba))


def even_layers(n_layers: int, n_mamba: int) -> tuple[int, ...]:
    """`n_mamba` of `n_layers` indices, evenly spread, layer 0 first."""
    if (n_layers, n_mamba) in _PAPER_LISTS:
        return _PAPER_LISTS[n_layers, n_mamba]
    return tuple(i * n_layers // n_mamba for i in range(n_mamba))


def _reason(n_layers: int, n_mamba: int) -> str:
    if n_mamba == 0:
        return "nothing is replaced: the control"
    if (n_layers, n_mamba) in _PAPER_LISTS:
        return "MaTVLM's own list for 32 layers"
    return "evenly spread from layer 0 on, as in MaTVLM"
