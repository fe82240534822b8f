"""A whole distillation from one file of settings, for machines without a screen."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from workbench.data import load_data
from workbench.errors import WorkbenchError
from workbench.models.plan import Plan
from workbench.models.teacher import VLM, load, load_teacher, save
from workbench.steps.conversion.alignment import align
from workbench.steps.conversion.initialization import convert
from workbench.steps.conversion.selection import choose_layers
from workbench.steps.training.checkpoints import Checkpoints, layers_of
from workbench.steps.training.distillation import distill
from workbench.steps.training.loop import Options
from workbench.steps.training.parallel import Processes, own_device
from workbench.steps.training.runs import Run, StepRow
from workbench.steps.training.stages import plan_stages, stage_from_dict
from workbench.steps.training.trackers import track

# What a file of settings may say, and of what kind it is; `distill` says what most of it means.
WHERE_FROM = {"teacher": str, "student": str, "device": str}
LAYERS = {"ratio": float, "method": str, "layers": list, "init": str, "align": int}
DATA = {"name": str, "split": str, "limit": int, "seed": int, "images": str}
TRAINING = {
    "recipe": str, "steps": int, "batch_size": int, "lr": float, "accumulate": int,
    "max_length": int, "seed": int, "compile_layers": bool, "graph_layers": bool, "bf16": bool,
    "log_every": int, "save_every": int, "folder": str, "resume": bool,
}  # fmt: skip
SETTINGS = WHERE_FROM | LAYERS | {"data": (str, dict), "stages": list, "track": str} | TRAINING
ALIGNING = (
    "init", "batch_size", "accumulate", "max_length", "lr", "seed", "compile_layers",
    "graph_layers", "bf16",
)  # fmt: skip
MODEL = "model"  # where in the run's folder the finished hybrid goes


def read_settings(path: str | Path) -> dict[str, Any]:
    """Read a .json or .toml file of settings.

    Raises:
        WorkbenchError: it cannot be read, has a key that means nothing, or a value of another kind.
    """
    path = Path(path).expanduser()
    readers: dict[str, Callable] = {".json": json.loads, ".toml": tomllib.loads}
    if path.suffix not in readers:
        raise WorkbenchError(f"{path} is no file of settings: give a .json or a .toml file.")
    try:
        settings = readers[path.suffix](path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WorkbenchError(f"The settings in {path} cannot be read: {error}.") from error
    _check(settings, SETTINGS, str(path))
    if isinstance(settings.get("data"), dict):
        _check(settings["data"], DATA, f"data in {path}")
    return settings


def distill_from(
    settings: Mapping[str, Any],
    *,
    on_step: Callable[[StepRow], None] | None = None,
    stop: Callable[[], bool] | None = None,
    progress: bool = False,
) -> Run:
    """Load, convert, distil, and save the hybrid in `folder`/model.

    Args:
        settings: from `read_settings`. `teacher`, `data` and `folder` must be there. Which layers
            change is said by `layers`, or by `ratio` and `method`, which measures on `data`;
            `student` takes a hybrid that is there already. `align` is steps in which a mixer for
            every layer is aligned first, to search with and to start from. `stages` stands for
            `recipe`. `track` is "tensorboard" or "trackio".
        on_step: as in `distill`.
        stop: as in `distill`.
        progress: as in `distill`.

    Raises:
        WorkbenchError: something is missing or contradicts itself, and what `distill` raises.
    """
    missing = [name for name in ("teacher", "data", "folder") if name not in settings]
    if missing:
        raise WorkbenchError(f"The settings need {' and '.join(missing)}.")
    data = settings["data"]
    data = {"name": data} if isinstance(data, str) else data
    if "name" not in data:
        raise WorkbenchError("The data in the settings needs a name: 'pocket', or a file.")
    given = {name: settings[name] for name in TRAINING if name in settings}
    if "stages" in settings:
        if "recipe" in settings:
            raise WorkbenchError("The settings have a recipe and stages: keep one of them.")
        given["recipe"] = [stage_from_dict(values) for values in settings["stages"]]
    _check_ahead(given)
    device = settings.get("device", own_device())
    teacher = load_teacher(settings["teacher"], device=device)
    samples = load_data(**{"split": "train"} | data)
    watchers = [on_step] if on_step else []
    if "track" in settings and Processes().rank == 0:
        watchers.append(track(settings["track"], Path(settings["folder"]).expanduser()))
    student = _student(settings, teacher, samples, device, stop)
    run = distill(
        student, teacher, samples, stop=stop, progress=progress, **given,
        on_step=(lambda row: [watch(row) for watch in watchers]) if watchers else None,
    )  # fmt: skip
    if not run.stopped and Processes().rank == 0:
        save(student, Path(settings["folder"]).expanduser() / MODEL)
    return run


def _check_ahead(given: Mapping[str, Any]) -> None:
    """Refuse at once what `distill` would refuse only after an alignment or a search."""
    plan_stages(given.get("recipe", "workbench"), given.get("steps"), given.get("lr"))
    known = {name: value for name, value in given.items() if value is not None}
    # Made to be refused, if at all; 1 stands for what is not given.
    Options(**{field.name: known.get(field.name, 1) for field in fields(Options)})
    store = Checkpoints(given["folder"], {}, writes=False)
    if not given.get("resume"):
        store.open(resume=False)


def _student(
    settings: Mapping[str, Any], teacher: VLM, samples: Iterable, device: str,
    stop: Callable[[], bool] | None,
) -> VLM:  # fmt: skip
    if "student" in settings:
        chosen = [name for name in LAYERS if name in settings]
        if chosen:
            raise WorkbenchError(
                f"The settings have a student and {chosen[0]}: a student has its layers already."
            )
        return load(settings["student"], device=device)
    like, donor = _unmeasured(settings, teacher), None
    plan = like if "layers" in settings else None
    begun = _begun(settings, like) if settings.get("resume") and _prepared(settings) else None
    if begun:
        plan = plan or begun  # what has been trained is in the checkpoint
    elif "align" in settings:
        options = {name: settings[name] for name in ALIGNING if name in settings}
        donor = align(teacher, samples, steps=settings["align"], stop=stop, **options)
    plan = plan or _chosen(settings, teacher, samples, donor)
    init = {"init": donor} if donor else {k: settings[k] for k in ("init",) if k in settings}
    return convert(teacher, plan, seed=settings.get("seed", 0), **init)


def _prepared(settings: Mapping[str, Any]) -> bool:
    """Whether something was measured or trained before the run began."""
    return "align" in settings or settings.get("method", "even") != "even"


def _unmeasured(settings: Mapping[str, Any], teacher: VLM) -> Plan:
    """The layers named by hand, or as many that nothing was measured for; refuses what is wrong."""
    options = {name: settings[name] for name in ("ratio", "method", "layers") if name in settings}
    if "layers" not in settings:
        choose_layers(teacher, **options | {"ratio": 0})  # of none, no method measures anything
        options.pop("method", None)
    plan = choose_layers(teacher, **options)
    if not plan.mamba_layers:
        raise WorkbenchError("The settings leave no layer to train: ask for at least one.")
    return plan


def _begun(settings: Mapping[str, Any], like: Plan) -> Plan | None:
    """The plan of the run that is there, which is neither aligned for nor searched again."""
    layers = Processes().first(layers_of(settings["folder"]))
    if layers is None:
        return None
    if "layers" not in settings and len(layers) != len(like.mamba_layers):
        raise WorkbenchError(
            f"{settings['folder']} holds a run with {len(layers)} Mamba-2 layers, and the ratio "
            f"asks for {len(like.mamba_layers)}: name another folder, or keep the ratio."
        )
    method = settings.get("method", "even")
    return Plan(like.n_layers, layers, method, "as when the run was begun")


def _chosen(
    settings: Mapping[str, Any], teacher: VLM, samples: Iterable, donor: VLM | None
) -> Plan:
    options = {name: settings[name] for name in ("ratio", "method") if name in settings}
    plan = choose_layers(teacher, data=samples, donor=donor, **options)
    # On GPUs two processes may measure two things.
    return replace(plan, mamba_layers=tuple(Processes().first(list(plan.mamba_layers))))


def _check(settings: object, known: Mapping[str, Any], where: str) -> None:
    if not isinstance(settings, dict):
        raise WorkbenchError(f"{where} holds no settings: it must be an object with keys.")
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise WorkbenchError(
            f"{where} has {unknown[0]!r}, which means nothing here; there are {', '.join(known)}."
        )
    for name, value in settings.items():
        kinds = known[name] if isinstance(known[name], tuple) else (known[name],)
        kinds += (int,) if float in kinds else ()
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise WorkbenchError(f"{name} in {where} is {value!r}: it must be of kind {wanted}.")
