"""A hybrid stored as what differs from its teacher: `delta.safetensors` and `plan.json`."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from workbench.errors import WorkbenchError
from workbench.mamba.mixer import Mamba2Mixer
from workbench.models.families import text_config
from workbench.models.hybrid import build_hybrid, plan_of
from workbench.models.plan import Plan

WEIGHTS, PLAN = "delta.safetensors", "plan.json"
SCALE = ".row_scale"  # beside a matrix of int8: what one unit of each row is worth


def save_delta(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    bits: int | None = None,
) -> Path:
    """Write the tensors of a hybrid that its teacher does not have, or has with other values.

    Args:
        student: a hybrid of the teacher.
        teacher: the model that it was built from.
        folder: made if it is not there.
        dtype: of the stored tensors; None keeps the student's. A_log, dt_bias and D stay float32.
        bits: 8 stores matrices as int8 with a scale for each row: of the difference where the
            teacher has the matrix, too, so that its rounding error is at most 1/254 of the row's
            largest *change*, and of the values where it is new.

    Returns:
        The folder.

    Raises:
        WorkbenchError: the student is not a hybrid, or bits is neither 8 nor None.
    """
    if bits not in (None, 8):
        raise WorkbenchError(f"bits={bits} is not to be had: choose 8, or None for whole floats.")
    plan = plan_of(student)
    if plan is None:
        raise WorkbenchError("Only a hybrid can be stored as a difference from its teacher.")
    before = teacher.state_dict()
    changed: dict[str, Tensor] = {}
    for name, tensor in student.state_dict().items():
        if name in before and _same(tensor, before[name]):
            continue
        if bits == 8 and tensor.ndim == 2:
            changed[name], changed[name + SCALE] = _in_int8(tensor, before.get(name))
        else:
            changed[name] = _stored(name, tensor, dtype)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(changed, folder / WEIGHTS, metadata={"format": "pt"})
    described = {"plan": plan.to_dict(), "options": text_config(student).ssm_hybrid["options"]}
    (folder / PLAN).write_text(json.dumps(described, indent=2) + "\n")
    return folder


def load_delta(
    teacher: PreTrainedModel, folder: str | Path, *, in_place: bool = False
) -> PreTrainedModel:
    """Build the hybrid that `save_delta` wrote, beside its teacher, which is not touched.

    Args:
        teacher: the model that the hybrid was built from.
        folder: holds delta.safetensors and plan.json.
        in_place: turn the teacher itself into the hybrid, which saves the memory of a copy.

    Returns:
        The hybrid, on the device and in the dtype of the teacher.

    Raises:
        WorkbenchError: a file is missing or damaged, or its tensors do not fit the plan.
    """
    folder = Path(folder)
    for name in (PLAN, WEIGHTS):
        if not (folder / name).is_file():
            raise WorkbenchError(f"{folder} holds no hybrid: the file {name} is missing.")
    try:
        described = json.loads((folder / PLAN).read_text())
        plan, options = Plan.from_dict(described["plan"]), described["options"]
        changed = load_file(folder / WEIGHTS)
    except (json.JSONDecodeError, KeyError, TypeError, SafetensorError) as error:
        raise WorkbenchError(f"The hybrid in {folder} cannot be read: {error}.") from error
    before = teacher.state_dict()
    student = build_hybrid(teacher, plan, options, in_place=in_place)
    changed = _in_floats(folder, changed, before)
    student_tensors = student.state_dict()
    _check_fit(folder, changed, student_tensors, student_tensors.keys() - before.keys())
    with torch.no_grad():
        for name, tensor in changed.items():
            student_tensors[name].copy_(tensor)
    return student


def _check_fit(
    folder: Path, changed: dict[str, Tensor], expected: dict[str, Tensor], new: set[str]
) -> None:
    """Insist that every new tensor is there, none is strange, and each has its shape."""
    where = f"The weights in {folder / WEIGHTS} do not fit their plan or this teacher"
    missing, strange = sorted(new - changed.keys()), sorted(changed.keys() - expected.keys())
    if missing:
        raise WorkbenchError(f"{where}: {len(missing)} tensors are missing, {missing[0]!r} first.")
    if strange:
        raise WorkbenchError(f"{where}: {len(strange)} tensors are unknown, {strange[0]!r} first.")
    for name, tensor in changed.items():
        if tensor.shape != expected[name].shape:
            raise WorkbenchError(
                f"{where}: {name!r} has shape {tuple(tensor.shape)}, "
                f"not {tuple(expected[name].shape)}."
            )


def _in_int8(tensor: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
    """Round a (rows, columns) matrix, less the teacher's where it has one, to 255 steps a row.

    Returns:
        (rows, columns) int8 and (rows,) float32, whose product is the matrix again.
    """
    values = tensor.detach().float().cpu()
    if before is not None:
        values = values - before.detach().float().cpu()
    scale = (values.abs().amax(dim=1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return (values / scale[:, None]).round().to(torch.int8), scale


def _in_floats(folder: Path, stored: dict[str, Tensor], before: dict[str, Tensor]) -> dict:
    """Undo `_in_int8` for every matrix of int8 among the stored tensors."""
    values = {name: t for name, t in stored.items() if not name.endswith(SCALE)}
    for name, tensor in values.items():
        if tensor.dtype != torch.int8:
            continue
        scale = stored.get(name + SCALE)
        if scale is None or scale.shape != tensor.shape[:1]:
            raise WorkbenchError(
                f"The weights in {folder / WEIGHTS} cannot be read: "
                f"{name!r} is of int8 and has no scale for each row."
            )
        whole = tensor.float() * scale[:, None]
        if name in before and before[name].shape == whole.shape:
            whole += before[name].detach().float().cpu()
        values[name] = whole
    return values


def _same(tensor: Tensor, before: Tensor) -> bool:
    """Compare in the student's dtype: a teacher loaded in another one has not changed."""
    return tensor.shape == before.shape and torch.equal(tensor, before.to(tensor))


def _stored(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    keep = dtype is None or name.rpartition(".")[2] in Mamba2Mixer.float32_parameters
    return tensor.detach().to("cpu", None if keep else dtype).contiguous()
