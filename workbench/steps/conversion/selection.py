"""Which decoder layers become Mamba-2."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from numbers import Real

from workbench.errors import WorkbenchError
from workbench.models.families import check_family, decoder_layers
from workbench.models.plan import Plan
from workbench.models.teacher import VLM
from workbench.steps.conversion.scores import (
    SAME_AS,
    SCORES,
    Scores,
    greedy,
    open_probe,
    score_layers,
)

# The lists that MaTVLM ships for its 32-layer teacher. 12.5 % is not evenly spread over 32.
# Source: github.com/hustvl/MaTVLM, commit cac174f, mamba2_tinyllava/*.yaml, key `ssm_layers`.
_PAPER_LISTS = {
    (32, 4): (0, 6, 12, 18),
    (32, 8): tuple(range(0, 32, 4)),
    (32, 16): tuple(range(0, 32, 2)),
}
SEARCHES = {"greedy": 1, "beam": 3}  # choices that each round of the search follows
METHODS = ("even", "explicit", *SCORES, *SAME_AS, *SEARCHES)


def choose_layers(
    teacher: VLM,
    *,
    ratio: float | None = None,
    method: str = "even",
    layers: Sequence[int] | None = None,
    scores: Scores | None = None,
    data: Iterable | None = None,
    limit: int | None = 32,
    donor: VLM | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """Choose the decoder layers to replace.

    Args:
        teacher: the model to convert.
        ratio: share of the decoder layers that become Mamba-2, 0..1, rounded to whole layers; None
            is a quarter.
        method: "even" spreads them from layer 0 on, as MaTVLM does; at 32 layers and 12.5, 25 or
            50 % the lists are the paper's own. "explicit" takes `layers`. "skip-one", "replace-one"
            (or "kl") and "leave-one-in" replace the layers whose attention is worth least, one by
            one, as `score_layers` says. "greedy" and "beam" measure whole choices: each round
            replaces one more layer, the one that hurts least together with those before.
        layers: indices, for "explicit".
        scores: from `score_layers`, instead of measuring again.
        data: to measure with: what `distill` takes; None takes drawings of the workbench, or
            English texts.
        limit: at most this many sequences of it.
        donor: whose mixers stand in while measuring, from `align`; None calibrates some.
        on_progress: called with (steps done, all of them) while measuring.

    Returns:
        A `Plan`; `print(plan)` draws the stack.

    Raises:
        WorkbenchError: a ratio outside 0..1, one that rounds to no layer, an unknown method,
            layers or scores that do not go with the method or the teacher, a teacher of a family
            that cannot be converted.

    Source: MaTVLM, arXiv 2503.13440, section 4.1 and table "even" of its ablation.
    """
    method = scores.method if scores is not None and method == "even" else method
    if method not in METHODS:
        raise WorkbenchError(
            f"There is no selection method {method!r}. Choose {', '.join(METHODS)}."
        )
    check_family(teacher.model)
    n_layers = len(decoder_layers(teacher.model))
    if scores is not None:
        _check_scores(scores, n_layers, SAME_AS.get(method, method))
    if layers is not None or method == "explicit":
        return _explicit(n_layers, layers, ratio, method)
    n_mamba = _count(0.25 if ratio is None else ratio, n_layers)
    if method == "even":
        return Plan(n_layers, even_layers(n_layers, n_mamba), method, _reason(n_layers, n_mamba))
    if n_mamba in (0, n_layers):
        word = "nothing is replaced: the control" if n_mamba == 0 else "every layer is replaced"
        return Plan(n_layers, tuple(range(n_mamba)), method, word)
    if method in SEARCHES:
        probe = open_probe(teacher, donor, data, limit=limit)
        chosen, kl = greedy(probe, n_mamba, width=SEARCHES[method], on_progress=on_progress)
        reason = (
            f"replaced one by one, each the layer that hurts least; together {kl:.3g} nats per "
            f"answer token from the teacher ({probe.n_asked} choices measured)"
        )
        return Plan(n_layers, chosen, method, reason)
    if scores is None:
        scores = score_layers(
            teacher, method=method, data=data, limit=limit, donor=donor, on_progress=on_progress
        )
    return _lowest(scores, n_layers, n_mamba)


def even_layers(n_layers: int, n_mamba: int) -> tuple[int, ...]:
    """`n_mamba` of `n_layers` indices, evenly spread, layer 0 first."""
    if (n_layers, n_mamba) in _PAPER_LISTS:
        return _PAPER_LISTS[n_layers, n_mamba]
    return tuple(i * n_layers // n_mamba for i in range(n_mamba))


def _count(ratio: float, n_layers: int) -> int:
    if not (isinstance(ratio, Real) and 0 <= ratio <= 1):
        raise WorkbenchError(
            f"ratio={ratio!r} is not a share of layers: choose 0 to 1, such as 0.25."
        )
    n_mamba = round(ratio * n_layers)
    if ratio > 0 and n_mamba == 0:
        raise WorkbenchError(
            f"ratio={ratio} of {n_layers} layers rounds to none: "
            f"choose at least {1 / n_layers:.3g}."
        )
    return n_mamba


def _explicit(
    n_layers: int, layers: Sequence[int] | None, ratio: float | None, method: str
) -> Plan:
    if layers is None or method not in ("even", "explicit") or ratio is not None:
        raise WorkbenchError(
            "Layers named by hand go with method='explicit' alone: give layers=[...] and neither "
            "a ratio nor another method."
        )
    return Plan(n_layers, layers, "explicit", "the layers were named by hand")


def _check_scores(scores: Scores, n_layers: int, method: str) -> None:
    if len(scores.values) != n_layers or scores.method != method:
        raise WorkbenchError(
            f"These scores are of {len(scores.values)} layers by {scores.method!r}, but "
            f"{n_layers} layers by {method!r} are asked for."
        )


def _lowest(scores: Scores, n_layers: int, n_mamba: int) -> Plan:
    chosen = scores.order[:n_mamba]
    low, high = (scores.values[i] for i in (chosen[0], chosen[-1]))
    reason = f"their attention is worth least, {low:.3g} to {high:.3g} {scores.unit}"
    return Plan(n_layers, chosen, scores.method, reason)


def _reason(n_layers: int, n_mamba: int) -> str:
    if n_mamba == 0:
        return "nothing is replaced: the control"
    if (n_layers, n_mamba) in _PAPER_LISTS:
        return "MaTVLM's own list for 32 layers"
    return "evenly spread from layer 0 on, as in MaTVLM"
