"""Load and save what every verb takes: a model, its processor, and its plan if it is a hybrid."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from workbench.errors import WorkbenchError
from workbench.models.delta import load_delta
from workbench.models.families import decoder_layers, family_name
from workbench.models.hybrid import plan_of
from workbench.models.plan import Plan
from workbench.models.sources import smollm2
from workbench.models.sources.hub import fetch, is_hub_id
from workbench.models.sources.loading import DeviceMap, Request, quiet, read_folder

# The teacher that travels with the package, and its hybrids, named by their percentage of Mamba-2.
POCKET = Path(__file__).parent / "pocket"
POCKET_TEACHER = "pocket"
POCKET_HYBRIDS = {f"pocket-{share}": f"hybrid-{share}" for share in ("12.5", "25", "50", "100")}


@dataclass(frozen=True)
class VLM:
    """A vision-language model, teacher or hybrid, ready to be asked."""

    name: str
    model: PreTrainedModel = field(repr=False)  # its repr fills a screen
    processor: ProcessorMixin = field(repr=False)  # or a bare tokenizer, for a language model
    plan: Plan | None = None  # None for a teacher

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer inside the processor."""
        return getattr(self.processor, "tokenizer", self.processor)

    def __str__(self) -> str:
        n_layers = len(decoder_layers(self.model))
        n_parameters = sum(p.numel() for p in self.model.parameters())
        text = (
            f"{self.name}: a model of the family {family_name(self.model)} with {n_layers} decoder "
            f"layers\n  and {n_parameters / 1e6:,.1f} million parameters "
            f"({str(self.model.dtype).removeprefix('torch.')}, {self.model.device})."
        )
        if self.plan is None:
            return f"{text} Every layer attends."
        layers = ", ".join(map(str, self.plan.mamba_layers)) or "none"
        return f"{text} Mamba-2 layers: {layers} ({self.plan.ratio:.1%})."


def load_teacher(
    name_or_path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = torch.float32,
    device_map: DeviceMap = None,
    trust_remote_code: bool = False,
) -> VLM:
    """Load a model that is not a hybrid.

    Args:
        name_or_path: "pocket", which comes with the package; "smollm2-135m", a language model that
            `make smollm2` installs; a folder written by `save` or `save_pretrained`, or of the
            authors' TinyLLaVA-Phi-2-SigLIP-3.1B; or a Hugging Face id such as
            "llava-hf/llava-1.5-7b-hf".
        device: where the weights go; the CPU if neither it nor device_map is given.
        dtype: of the weights, or its name, such as "bfloat16"; stored weights of another dtype are
            converted.
        device_map: in place of device, spreads the weights as accelerate does: "auto", or a dict
            from module to device.
        trust_remote_code: run the Python files that come with the model.

    Raises:
        WorkbenchError: there is no such model, its files are incomplete or of a form that is not
            read, it does not fit into memory, or it is a hybrid.
    """
    vlm = load(
        name_or_path,
        device=device,
        dtype=dtype,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
    )
    if vlm.plan is not None:
        raise WorkbenchError(
            f"{str(name_or_path)!r} is a hybrid, not a teacher; open it with load() instead."
        )
    return vlm


def load(
    name_or_path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = torch.float32,
    device_map: DeviceMap = None,
    trust_remote_code: bool = False,
) -> VLM:
    """Load a teacher or a hybrid; A_log, dt_bias and D of a hybrid stay float32.

    Args:
        name_or_path: what `load_teacher` takes, and also "pocket-12.5", "pocket-25", "pocket-50",
            "pocket-100", "smollm2-135m-12.5", "-25", "-50", or the folder of a hybrid, the authors'
            MaTVLM_0_25_Mamba2 among them.
        device: where the weights go; the CPU if neither it nor device_map is given.
        dtype: as for `load_teacher`.
        device_map: as for `load_teacher`.
        trust_remote_code: as for `load_teacher`.

    Raises:
        WorkbenchError: there is no such model, device or dtype, its files are incomplete, damaged
            or of a form that is not read, or it does not fit into memory.
    """
    dtype = _checked_dtype(dtype)
    if device is not None and device_map is not None:
        raise WorkbenchError("Pass device or device_map, not both: each says where the weights go.")
    name, place = str(name_or_path), _checked_device("cpu" if device is None else device)
    if name in BUILT_IN:
        if device_map is not None:
            raise WorkbenchError(f"{name!r} is small: pass device instead of device_map.")
        return BUILT_IN[name](name, place, dtype)
    request = Request(name, place, dtype, device_map, trust_remote_code)
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return _load_folder(path, replace(request, name=path.resolve().name))
    if is_hub_id(name):
        folder = fetch(name, with_code=trust_remote_code)
        vlm = _load_folder(folder, replace(request, name=name.rpartition("/")[2]))
        vlm.model.name_or_path = name  # not its place in the cache
        return vlm
    known = ", ".join(BUILT_IN)
    raise WorkbenchError(
        f"There is no model or folder called {name!r}; the models that come with the workbench are "
        f"{known}, and a Hugging Face id has the form 'organisation/model'."
    )


def save(vlm: VLM, folder: str | Path) -> Path:
    """Write model and processor so that `load` and AutoModel...from_pretrained read them back.

    Returns:
        The folder.

    Raises:
        WorkbenchError: a file stands where the folder should be.
    """
    folder = Path(folder).expanduser()
    if folder.exists() and not folder.is_dir():
        raise WorkbenchError(f"{folder} is a file; name a folder to save into.")
    with quiet():
        vlm.model.save_pretrained(folder)
        vlm.processor.save_pretrained(folder)
    return folder


def _load_folder(folder: Path, request: Request) -> VLM:
    model, processor = read_folder(folder, request)
    return VLM(request.name, model, processor, plan_of(model))


def _load_smollm2(name: str, device: torch.device, dtype: torch.dtype) -> VLM:
    """The teacher from its package, or else from the hub; a hybrid is a delta on top of it."""
    folder = smollm2.FOLDER / smollm2.HYBRIDS.get(name, "")
    if name in smollm2.HYBRIDS and not folder.is_dir():
        raise WorkbenchError(
            f"The weights of {name} do not come with this copy of the workbench: "
            f"make them with benchmarks/smollm2, or use {smollm2.TEACHER}."
        )
    path = smollm2.find_gguf()
    if path is not None:
        with quiet():
            model, tokenizer = smollm2.read_gguf(path, dtype=dtype)
        teacher = VLM(smollm2.TEACHER, model.to(device), tokenizer)
    else:
        try:
            teacher = _load_folder(fetch(smollm2.HUB_ID), Request(smollm2.TEACHER, device, dtype))
        except WorkbenchError as error:
            raise WorkbenchError(
                f"{name} needs the weights of SmolLM2, which are not here, and the hub does not "
                f"give them: {smollm2.HOW_TO_GET_IT}."
            ) from error
    if name == smollm2.TEACHER:
        return teacher
    student = load_delta(teacher.model, folder, in_place=True)
    return VLM(name, student, teacher.processor, plan_of(student))


def _load_pocket(name: str, device: torch.device, dtype: torch.dtype) -> VLM:
    teacher = _load_folder(POCKET / "teacher", Request(POCKET_TEACHER, device, dtype))
    if name == POCKET_TEACHER:
        return teacher
    student = load_delta(teacher.model, POCKET / POCKET_HYBRIDS[name])
    return VLM(name, student, teacher.processor, plan_of(student))


# Models with a name of their own, and what loads them: (name, device, dtype) -> VLM.
BUILT_IN: dict[str, Callable[[str, torch.device, torch.dtype], VLM]] = {
    POCKET_TEACHER: _load_pocket,
    **dict.fromkeys(POCKET_HYBRIDS, _load_pocket),
    **dict.fromkeys((smollm2.TEACHER, *smollm2.HYBRIDS), _load_smollm2),
}


def _checked_dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise WorkbenchError(
            f"dtype={dtype!r} is no type of weights: choose torch.float32, torch.bfloat16 or "
            "torch.float16, or the name of one."
        )
    return found


def _checked_device(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise WorkbenchError(f"The device {str(device)!r} cannot be used here.") from error
    return place
