"""Load and save what every verb takes: a model, its processor, and its plan if it is a hybrid."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.utils import logging

from workbench.errors import WorkbenchError
from workbench.models import smollm2
from workbench.models.delta import load_delta
from workbench.models.families import decoder_layers, family_name
from workbench.models.hybrid import plan_of
from workbench.models.plan import Plan

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
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> VLM:
    """Load a model that is not a hybrid.

    Args:
        name_or_path: "pocket", which comes with the package; "smollm2-135m", a language model that
            `make smollm2` installs; a folder written by `save` or `save_pretrained`; or a Hugging
            Face id such as "llava-hf/llava-1.5-7b-hf".
        device: where the weights go.
        dtype: of the weights; stored weights of another dtype are converted.

    Raises:
        WorkbenchError: there is no such model, its files are incomplete, or it is a hybrid.
    """
    vlm = load(name_or_path, device=device, dtype=dtype)
    if vlm.plan is not None:
        raise WorkbenchError(
            f"{str(name_or_path)!r} is a hybrid, not a teacher; open it with load() instead."
        )
    return vlm


def load(
    name_or_path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> VLM:
    """Load a teacher or a hybrid; A_log, dt_bias and D of a hybrid stay float32.

    Args:
        name_or_path: what `load_teacher` takes, and also "pocket-12.5", "pocket-25", "pocket-50",
            "pocket-100", "smollm2-135m-12.5", "-25", "-50", or the folder of a hybrid.
        device: where the weights go.
        dtype: of the weights.

    Raises:
        WorkbenchError: there is no such model, or its files are incomplete or damaged.
    """
    name, place = str(name_or_path), _checked_device(device)
    if name == POCKET_TEACHER:
        return _load_pretrained(POCKET / "teacher", name, place, dtype)
    if name in POCKET_HYBRIDS:
        teacher = _load_pretrained(POCKET / "teacher", POCKET_TEACHER, place, dtype)
        student = load_delta(teacher.model, POCKET / POCKET_HYBRIDS[name])
        return VLM(name, student, teacher.processor, plan_of(student))
    if name == smollm2.TEACHER or name in smollm2.HYBRIDS:
        return _load_smollm2(name, place, dtype)
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return _load_pretrained(path, path.resolve().name, place, dtype)
    if _is_hub_id(name):
        return _load_pretrained(name, name.rpartition("/")[2], place, dtype)
    known = ", ".join((POCKET_TEACHER, *POCKET_HYBRIDS, smollm2.TEACHER, *smollm2.HYBRIDS))
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
    with _no_progress_bar():
        vlm.model.save_pretrained(folder)
        vlm.processor.save_pretrained(folder)
    return folder


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
        with _no_progress_bar():
            model, tokenizer = smollm2.read_gguf(path, dtype=dtype)
        teacher = VLM(smollm2.TEACHER, model.to(device), tokenizer)
    else:
        try:
            teacher = _load_pretrained(smollm2.HUB_ID, smollm2.TEACHER, device, dtype)
        except WorkbenchError as error:
            raise WorkbenchError(
                f"{name} needs the weights of SmolLM2, which are not here, and the hub does not "
                f"give them: {smollm2.HOW_TO_GET_IT}."
            ) from error
    if name == smollm2.TEACHER:
        return teacher
    student = load_delta(teacher.model, folder)
    return VLM(name, student, teacher.processor, plan_of(student))


def _load_pretrained(
    source: str | Path, name: str, device: torch.device, dtype: torch.dtype
) -> VLM:
    local = isinstance(source, Path)
    if local:
        _check_folder(source)
    common = {"local_files_only": local, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(source, **common)
        speaks_images = type(config) in AutoModelForImageTextToText._model_mapping
        auto = AutoModelForImageTextToText if speaks_images else AutoModelForCausalLM
        with _no_progress_bar() if local else nullcontext():  # a download should show its own
            model, report = auto.from_pretrained(
                source, dtype=dtype, use_safetensors=True, output_loading_info=True, **common
            )
        processor = AutoProcessor.from_pretrained(source, **common)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise WorkbenchError(f"The model {str(source)!r} cannot be loaded: {reason}") from error
    for kind in ("missing_keys", "mismatched_keys"):
        if report[kind]:
            first = sorted(map(str, report[kind]))[0]
            raise WorkbenchError(
                f"The weights in {source} do not fit its config.json: {kind.replace('_', ' ')}, "
                f"{len(report[kind])} of them, {first} first."
            )
    return VLM(name, model.to(device).eval(), processor, plan_of(model))


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Silence transformers' bars inside: what is on the disk is read and written in a moment."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise WorkbenchError(
            f"The folder {folder} holds no model: the file config.json is missing."
        )
    if not any(folder.glob("*.safetensors")):
        raise WorkbenchError(
            f"The folder {folder} holds no weights: no .safetensors file is there, "
            "and other formats are not read."
        )


def _checked_device(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise WorkbenchError(f"The device {str(device)!r} cannot be used here.") from error
    return place


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")
