"""From a folder to a Hugging Face model and its processor, or to a sentence that says why not."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    __version__,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from workbench.errors import WorkbenchError
from workbench.models.families import decoder_layers, text_config
from workbench.models.plan import Plan
from workbench.models.sources import problems, tinyllava

DeviceMap = str | dict[str, Any] | None  # as accelerate takes it


@dataclass(frozen=True)
class Request:
    """How a model is to be loaded."""

    name: str
    device: torch.device
    dtype: torch.dtype
    device_map: DeviceMap = None  # in place of device
    trust_remote_code: bool = False


def read_folder(folder: Path, request: Request) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load what `save_pretrained` wrote, or one of the authors' checkpoints.

    Everything that can be known from names, headers and configs is checked before weights are read.

    Returns:
        The model, in evaluation, and its processor; for a language model that is its tokenizer.

    Raises:
        WorkbenchError: files are missing, damaged, of another form, or do not fit each other; the
            model is not of a class that the workbench knows; or memory is short.
    """
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    problems.check_names(f"The folder {folder}", names)
    needed = problems.bytes_needed(problems.check_weights(folder), request.dtype)
    values = problems.read_json(folder / problems.CONFIG)
    device_map = request.device_map
    if device_map is None:
        problems.check_memory(request.name, needed, request.dtype, request.device)
        if request.device.type != "cpu":
            device_map = {"": request.device}  # straight from the file to there
    placed = {"dtype": request.dtype, "device_map": device_map}
    with _explained(folder, needed, request), quiet():
        if values.get("model_type") == tinyllava.MODEL_TYPE:
            model, report, processor = tinyllava.load_tinyllava(folder, values, **placed)
        else:
            common = {
                "local_files_only": True,
                "trust_remote_code": request.trust_remote_code,
            }
            auto, config = _auto_class(folder, values, common)
            model, report = auto.from_pretrained(
                folder,
                config=config,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # the report below says more than the error would
                **placed,
                **common,
            )
            processor = AutoProcessor.from_pretrained(folder, **common)
    _check_report(folder, report)
    decoder_layers(model)  # refuses a model whose layers are not where a family has them
    return model.eval(), processor


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' bars and warnings inside: what matters is said by the workbench."""
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def _auto_class(
    folder: Path, values: Mapping[str, Any], common: Mapping[str, bool]
) -> tuple[type, PreTrainedConfig]:
    """Read the config, and choose the class of transformers that makes a model of it."""
    kind, auto_map = values.get("model_type"), values.get("auto_map") or {}
    known = kind in CONFIG_MAPPING
    if auto_map and not known and not common["trust_remote_code"]:
        raise WorkbenchError(_remote_code(folder))
    if not known and not auto_map:
        raise WorkbenchError(
            f"The model_type {kind!r} in {folder / problems.CONFIG} is unknown to transformers "
            f"{__version__}; a newer version may know it."
        )
    config = AutoConfig.from_pretrained(folder, **common)
    _check_plan(config)
    ends = ("ForCausalLM", "ForConditionalGeneration", "ForImageTextToText", "LMHeadModel")
    classes = config.architectures or []
    if known and (
        config.is_encoder_decoder or (classes and not any(c.endswith(ends) for c in classes))
    ):
        raise WorkbenchError(_no_decoder(kind, classes))
    for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
        if type(config) in auto._model_mapping or (not known and auto.__name__ in auto_map):
            return auto, config
    raise WorkbenchError(_no_decoder(kind, classes))


def _check_plan(config: PreTrainedConfig) -> None:
    """Insist that the plan of a hybrid is for as many layers as its config has."""
    text = text_config(config)
    hybrid = getattr(text, "ssm_hybrid", None)
    if hybrid:
        plan = Plan.from_dict(hybrid["plan"])
        if plan.n_layers != text.num_hidden_layers:
            raise WorkbenchError(
                f"The plan in config.json is for a model of {plan.n_layers} layers, "
                f"but this one has {text.num_hidden_layers}."
            )


def _check_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Insist that every parameter came from the files, in its shape."""
    where = f"The weights in {folder} do not fit its config.json"
    if report["mismatched_keys"]:
        (name, stored, expected), *more = sorted(report["mismatched_keys"], key=lambda key: key[0])
        others = f" (and {len(more)} others like it)" if more else ""
        raise WorkbenchError(
            f"{where}: {name!r} has shape {tuple(stored)} in the file, "
            f"and the model needs {tuple(expected)}{others}."
        )
    if report["missing_keys"]:
        missing = sorted(map(str, report["missing_keys"]))
        raise WorkbenchError(
            f"{where}: {len(missing)} tensors are missing, {missing[0]!r} is the first."
        )


@contextmanager
def _explained(folder: Path, needed: int, request: Request) -> Iterator[None]:
    """Turn what transformers and torch raise inside into a sentence."""
    try:
        yield
    except WorkbenchError:
        raise
    except Exception as error:  # tokenizers, for one, raises no subclass of it
        reason = " ".join(str(error).split())
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "not enough memory" in reason:
            reason = problems.out_of_memory(request.name, needed, request.dtype, request.device)
            raise WorkbenchError(reason) from error
        if "trust_remote_code" in reason:
            raise WorkbenchError(_remote_code(folder)) from error
        if library := re.search(r"requires the (\S+) library", reason):
            raise WorkbenchError(_package(folder, library[1])) from error
        reason = shorten(reason, 300, placeholder=" ...")  # some errors fill pages
        raise WorkbenchError(f"The model in {folder} cannot be loaded: {reason}") from error


def _package(folder: Path, name: str) -> str:
    return (
        f"The model in {folder} is read with the library {name}, which is not installed here: "
        f"try pip install {name.lower()}."
    )


def _remote_code(folder: Path) -> str:
    return (
        f"The model in {folder} comes with Python code of its own, which is not run unasked: "
        "read it, and where you trust it, pass trust_remote_code=True."
    )


def _no_decoder(kind: str | None, classes: list[str]) -> str:
    what = f"{', '.join(classes)} ({kind})" if classes else repr(kind)
    return (
        f"A model of the class {what} is not a decoder that writes text token by token; the "
        "workbench takes causal language models, and vision-language models around one."
    )
