"""A whole distillation from one file of settings, for machines without a screen."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from workbench.data import load_data
from workbench.errors import WorkbenchError
from workbench.models.families import decoder_layers
from workbench.models.plan import Plan
from workbench.models.teacher import VLM, load, load_teacher, save
from workbench.steps.conversion.initialization import convert
from workbench.steps.conversion.selection import choose_layers
from workbench.steps.training.distillation import distill
from workbench.steps.training.parallel import Processes, own_device
from workbench.steps.training.runs import Run, StepRow
from workbench.steps.training.stages import stage_from_dict
from workbench.steps.training.trackers import track

# What a file of settings may say, and of what kind it is; `distill` says what most of it means.
WHERE_FROM = {"teacher": str, "student": str, "device": str}
LAYERS = {"ratio": float, "method": str, "layers": list, "init": str}
DATA = {"name": str, "split": str, "limit": int, "seed": int, "images": str}
TRAINING = {
    "recipe": str, "steps": int, "batch_size": int, "lr": float, "accumulate": int,
    "max_length": int, "seed": int, "compile_layers": bool, "graph_layers": bool, "bf16": bool,
    "log_every": int, "save_every": int, "folder": str, "resume": bool,
}  # fmt: skip
SETTINGS = WHERE_FROM | LAYERS | {"data": (str, dict), "stages": list, "track": str} | TRAINING
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
            change is said by `layers`, or by `ratio` and `method`; `student` takes a hybrid that is
            there already. `stages` stands for `recipe`. `track` is "tensorboard" or "trackio".
        on_step: as in `distill`.
        stop: as in `distill`.
        progress: as in `distill`.

    Raises:
        WorkbenchError: something is missing or contradicts itself, and what `distill` raises.
    """
    missing = [name for name in ("teacher", "data", "folder") if name not in settings]
    if missing:
        raise WorkbenchError(f"The settings need {' and '.join(missing)}.")
    given = {name: settings[name] for name in TRAINING if name in settings}
    if "stages" in settings:
        if "recipe" in settings:
            raise WorkbenchError("The settings have a recipe and stages: keep one of them.")
        given["recipe"] = [stage_from_dict(values) for values in settings["stages"]]
    device = settings.get("device", own_device())
    teacher = load_teacher(settings["teacher"], device=device)
    student = _student(settings, teacher, device)
    data = settings["data"]
    if isinstance(data, str):
        data = {"name": data}
    samples = load_data(**{"split": "train"} | data)
    watchers = [on_step] if on_step else []
    if "track" in settings and Processes().rank == 0:
        watchers.append(track(settings["track"], Path(settings["folder"]).expanduser()))
    run = distill(
        student, teacher, samples, stop=stop, progress=progress, **given,
        on_step=(lambda row: [watch(row) for watch in watchers]) if watchers else None,
    )  # fmt: skip
    if not run.stopped and Processes().rank == 0:
        save(student, Path(settings["folder"]).expanduser() / MODEL)
    return run


def _student(settings: Mapping[str, Any], teacher: VLM, device: str) -> VLM:
    if "student" in settings:
        chosen = [name for name in LAYERS if name in settings]
        if chosen:
            raise WorkbenchError(
                f"The settings have a student and {chosen[0]}: a student has its layers already."
            )
        return load(settings["student"], device=device)
    if "layers" in settings:
        if "ratio" in settings:
            raise WorkbenchError("The settings have layers and a ratio: keep one of them.")
        plan = Plan(len(decoder_layers(teacher.model)), tuple(settings["layers"]))
    else:
        options = {name: settings[name] for name in ("ratio", "method") if name in settings}
        plan = choose_layers(teacher, **options)
    options = {"init": settings["init"]} if "init" in settings else {}
    return convert(teacher, plan, seed=settings.get("seed", 0), **options)


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
