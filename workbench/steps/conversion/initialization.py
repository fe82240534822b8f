"""From teacher and plan to a student whose mixers start from the teacher's attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from workbench.data import Sample, assets
from workbench.data.scenes import FAMILIES, Scene, make_scene
from workbench.data.text import load_texts
from workbench.errors import WorkbenchError
from workbench.models.hybrid import SSMAttention, build_hybrid, mixer_options_of, mixers
from workbench.models.plan import Plan
from workbench.models.teacher import VLM
from workbench.steps.conversion.calibration import calibrate
from workbench.steps.training.batches import as_batches

LICENCES = Path(assets.__file__).parent / "licences"
# Of B and C before their SiLU: the pair with the smallest KL, of a dozen that were tried on the
# pocket teacher with every layer replaced.
FACTOR, SHIFT = 3.0, 1.0
N_TALKS, N_FITTED = 32, 12  # sequences of the workbench's own, and those that mixers are fitted to


@dataclass(frozen=True)
class Init:
    """A named start: the options that mixers are built with, and how their parameters begin."""

    summary: str
    start: Callable[[SSMAttention, int], None]  # given the mixer and a seed
    options: dict = field(default_factory=dict)  # of MIXER_OPTIONS; the others keep the paper's
    calibrated: bool = False  # fitted to the teacher's attention on a few sequences


def _matvlm(mixer: SSMAttention, seed: int) -> None:
    mixer.reset_new_parameters(seed)


def _random(mixer: SSMAttention, seed: int) -> None:
    mixer.reset_new_parameters(seed)
    # A seed of its own: from that of z_proj, C would come out as the gate, shifted.
    generator = torch.Generator("cpu").manual_seed(seed + 500)
    for name in mixer.names.all():
        module = getattr(mixer, name)
        if isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            fresh = torch.empty(module.weight.shape).uniform_(-bound, bound, generator=generator)
            with torch.no_grad():
                module.weight.copy_(fresh)


def _linear(mixer: SSMAttention, seed: int) -> None:
    mixer.reset_to_linear_attention()


def _bent(mixer: SSMAttention, seed: int) -> None:
    """Let B and C pass their SiLU as 3 t + 1, which cuts off what is far below zero.

    Softmax gives next to nothing to keys that point away from a query. Products of features that
    are hardly ever negative do so too; plain products of queries and keys give less than nothing.
    """
    mixer.reset_to_pass_through()
    if mixer.config.conv_activation is not None:
        width = mixer.config.widths[0]  # of x, which stays as it is
        with torch.no_grad():
            mixer.conv1d.weight[width:, :, -1] = FACTOR
            mixer.conv1d.bias[width:] = SHIFT


# What `matvlm` drops of attention is kept: its biases and its rotation by position.
_KEPT = {"rope": True, "bias": True}
INITS = {
    # MaTVLM, arXiv 2503.13440, section 3.2: x <- W_V, B <- W_K, C <- W_Q, out <- W_O without their
    # biases and without RoPE; z, dt, conv1d, A_log, dt_bias at random, D and norm at one.
    "matvlm": Init("the paper's: attention's own projections, everything new at random", _matvlm),
    "random": Init("the control: every matrix of the mixer at random", _random),
    "linear": Init(
        "attention without its softmax, exactly: nothing forgets, convolves or gates yet",
        _linear,
        _KEPT | {"conv_activation": None, "norm": False, "scale": "attention"},
    ),
    "calibrated": Init(
        "B and C bent to be positive; decays and output fitted to the teacher's attention",
        _bent,
        _KEPT,
        calibrated=True,
    ),
}


def convert(
    teacher: VLM,
    plan: Plan,
    *,
    init: str | VLM = "calibrated",
    calibration: Iterable | None = None,
    options: dict | None = None,
    seed: int = 0,
    name: str | None = None,
) -> VLM:
    """Replace the planned layers' attention by Mamba-2; FFN, norms and all other layers are kept.

    Args:
        teacher: the model to convert; it is not changed.
        plan: from `choose_layers`.
        init: a key of `INITS`; or a hybrid of the same teacher with at least these Mamba-2 layers,
            whose mixers are copied (align all layers once, then take any subset).
        calibration: what `distill` takes, for "calibrated": 12 sequences of it, drawn by `seed`, or
            its first batch where it gives batches. None takes talks about the workbench's drawings,
            or for a language model its English texts.
        options: of `MIXER_OPTIONS`, in place of the init's own; not with a given hybrid.
        seed: of the parameters that start at random.
        name: of the student; None names it after the teacher and the ratio: "pocket-25".

    Returns:
        A new `VLM`.

    Raises:
        WorkbenchError: an unknown init, a plan that does not fit the teacher or the given hybrid,
            options beside a given hybrid, or no data to calibrate with.
    """
    _check_taken(teacher, plan, options or {})
    name = name or f"{teacher.name}-{100 * plan.ratio:g}"
    if isinstance(init, VLM):
        if options:
            raise WorkbenchError(
                f"The mixers of {init.name} have options already, and are copied as they are: "
                "leave out options=."
            )
        return _with_mixers_of(init, teacher, plan, name)
    if init not in INITS:
        raise WorkbenchError(f"There is no init {init!r}. Choose one of {', '.join(INITS)}.")
    how = INITS[init]
    model = build_hybrid(teacher.model, plan, how.options | (options or {}))
    for index, mixer in mixers(model).items():
        how.start(mixer, 1000 * seed + index)
    student = VLM(name, model, teacher.processor, plan)
    if how.calibrated and plan.mamba_layers:
        data = default_calibration(teacher) if calibration is None else calibration
        batch = next(as_batches(student, data, batch_size=N_FITTED, seed=seed), None)
        if batch is None:
            raise WorkbenchError("There is no batch to calibrate with: calibration= gives none.")
        calibrate(student, teacher, batch)
    return student


def _check_taken(teacher: VLM, plan: Plan, options: dict) -> None:
    if not isinstance(teacher, VLM):
        raise WorkbenchError("convert takes a loaded model: load it first, with wb.load_teacher.")
    if not isinstance(plan, Plan):
        raise WorkbenchError(
            "convert takes a plan: make one with wb.choose_layers, from a ratio or from layers."
        )
    scale = options.get("scale")
    if isinstance(scale, str) and scale != "attention":
        raise WorkbenchError(f"scale={scale!r} is none: give a number, None or 'attention'.")


def check_donor(donor: VLM, teacher: VLM) -> None:
    """Insist that a hybrid has its teacher's shapes, as far as both have the same parameters.

    Raises:
        WorkbenchError: it has not, or other parameters outside its mixers.
    """
    ours, theirs = (
        {name: p.shape for name, p in vlm.model.named_parameters()} for vlm in (donor, teacher)
    )
    other = {name for name in ours.keys() ^ theirs.keys() if ".self_attn." not in name}
    if other or any(ours[name] != theirs[name] for name in ours.keys() & theirs.keys()):
        raise WorkbenchError(
            f"{donor.name} is no hybrid of {teacher.name}: its layers are of another shape."
        )


def default_calibration(teacher: VLM) -> Sequence:
    """Return data that any teacher can read: talks about drawings, or plain English texts."""
    if not hasattr(teacher.model.config, "vision_config"):
        return load_texts(LICENCES)
    families = [name for name in FAMILIES if name != "several"]  # one picture each is cheaper
    scenes = (
        (family, make_scene(family, "train", number))
        for number in range(-(-N_TALKS // len(families)))
        for family in families
    )
    return [_talk(family, scene) for family, scene in islice(scenes, N_TALKS)]


def _talk(family: str, scene: Scene) -> Sample:
    """Every question of a scene, one after the other."""
    first, *more = scene.turns
    later = tuple((turn.question, turn.answer) for turn in more)
    return Sample(scene.images, first.question, first.answer, family, first.facts, later)


def _with_mixers_of(donor: VLM, teacher: VLM, plan: Plan, name: str) -> VLM:
    given = mixers(donor.model)
    missing = [i for i in plan.mamba_layers if i not in given]
    if missing:
        raise WorkbenchError(
            f"{donor.name} has no mixer for layer {missing[0]}: align a hybrid of all layers first."
        )
    check_donor(donor, teacher)
    model = build_hybrid(teacher.model, plan, mixer_options_of(donor.model))
    for index, mixer in mixers(model).items():
        mixer.load_state_dict(given[index].state_dict())
    return VLM(name, model, teacher.processor, plan)
