"""What can be wrong with a model's files, found before a byte of weights is read, in a sentence.

Folders and repositories of the hub are judged by the same rules: by the names of their files first,
then by the headers of the .safetensors files, which say names, dtypes and shapes of all tensors.
"""

import json
import math
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from workbench.errors import WorkbenchError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
# Formats that run code when they are read, or that belong to another program.
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
CONTROL_GROUP = Path("/sys/fs/cgroup")  # what bounds a container
GIB = 2**30


def check_names(where: str, names: Collection[str]) -> None:
    """Judge a model by the names of its files.

    Args:
        where: as the user called it.
        names: of the files, without folders.

    Raises:
        WorkbenchError: config.json or the weights are missing, or stand there in a form that is
            not read.
    """
    if {WEIGHTS, INDEX} & set(names):
        if CONFIG not in names:
            raise WorkbenchError(f"{where} holds no model: the file {CONFIG} is missing.")
        return
    if ADAPTER in names:
        problem = (
            "is an adapter, such as LoRA's, and no model: merge it into its base model "
            "(PeftModel.merge_and_unload), save that, and load the folder."
        )
    elif any(n.endswith(".gguf") for n in names):
        problem = (
            "has its weights as GGUF, which is quantised for other programs; "
            "load the model that it was made from, as .safetensors files."
        )
    elif any(n.endswith(PICKLED) for n in names):
        problem = (
            "has its weights in pickle files, which can run any code when they are opened; only "
            ".safetensors files are read: where you trust these, convert them with "
            "AutoModel.from_pretrained(...).save_pretrained(folder)."
        )
    elif CONFIG not in names:
        problem = f"holds no model: the file {CONFIG} is missing."
    else:
        problem = f"holds no weights: no .safetensors file is there, {WEIGHTS} or {INDEX}."
    raise WorkbenchError(f"{where} {problem}")


def weight_files(folder: Path) -> list[Path]:
    """List the files of weights in a folder, by its index where it has one.

    Raises:
        WorkbenchError: the index is damaged, or names a file that is not there.
    """
    if not (folder / INDEX).is_file():
        return [folder / WEIGHTS]
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not weight_map or not isinstance(weight_map, dict):
        raise WorkbenchError(f"The file {folder / INDEX} is damaged: it has no weight_map.")
    files = [folder / name for name in sorted(set(weight_map.values()))]
    for file in files:
        if not file.is_file():
            raise WorkbenchError(
                f"The folder {folder} is incomplete: its index names {file.name}, which is not "
                "there; download or copy that file again."
            )
    return files


def check_weights(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Read the headers of all weights in a folder, and insist that the files are whole.

    Returns:
        By tensor: its dtype as safetensors writes it ("F16"), and its shape.

    Raises:
        WorkbenchError: a file is missing, cut short or damaged.
    """
    tensors = {}
    for file in weight_files(folder):
        tensors |= _header(file)
    return tensors


def bytes_needed(tensors: Mapping[str, tuple[str, tuple[int, ...]]], dtype: torch.dtype) -> int:
    """Add up what tensors take in memory once floating point numbers have the given dtype."""
    total = 0
    for stored, shape in tensors.values():
        bits = int("".join(c for c in stored.partition("_")[0] if c.isdigit()) or 8)
        floats = stored in ("F64", "F32", "F16", "BF16")
        total += math.prod(shape) * (dtype.itemsize if floats else max(bits // 8, 1))
    return total


def check_memory(name: str, needed: int, dtype: torch.dtype, device: torch.device) -> None:
    """Insist that a model fits before it is loaded: on a CPU the kernel would end the program.

    Raises:
        WorkbenchError: it does not; with what is needed, what is there, and what to lower.
    """
    free = free_bytes(device)
    if free is not None and needed > free:
        raise WorkbenchError(out_of_memory(name, needed, dtype, device))


def out_of_memory(name: str, needed: int, dtype: torch.dtype, device: torch.device) -> str:
    """Say how much memory a model needs, how much there is, and what to lower."""
    free = free_bytes(device)
    there = "" if free is None else f", and {free / GIB:.1f} GiB are free"
    half = f"dtype=torch.bfloat16 ({needed * 2 / dtype.itemsize / GIB:.1f} GiB), "
    return (
        f"The model {name!r} needs {needed / GIB:.1f} GiB for its weights in "
        f"{str(dtype).removeprefix('torch.')} on {device}{there}: "
        f"pass {half if dtype.itemsize > 2 else ''}another device, or device_map='auto'."
    )


def free_bytes(device: torch.device) -> int | None:
    """Return how much memory can be had on a device; None where nobody tells."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    return min(psutil.virtual_memory().available, _container_limit())


def read_json(file: Path) -> dict[str, Any]:
    """Read an object from a JSON file.

    Raises:
        WorkbenchError: it is not one.
    """
    try:
        values = json.loads(file.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise WorkbenchError(f"The file {file} cannot be read: {error}.") from error
    if not isinstance(values, dict):
        raise WorkbenchError(f"The file {file} is damaged: it holds no object.")
    return values


def _header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Read the header of a .safetensors file: 8 bytes of length, then JSON, then the numbers."""
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > size - 8:
                raise ValueError("it ends within its header")
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        found = {n: (t["dtype"], tuple(t["shape"])) for n, t in header.items()}
        end = max((t["data_offsets"][1] for t in header.values()), default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WorkbenchError(
            f"The file {file} is cut short or damaged, and no .safetensors file ({error}); "
            "download or copy it again."
        ) from error
    if size != 8 + length + end:
        raise WorkbenchError(
            f"The file {file} is cut short or damaged: it has {size:,} bytes, and its header "
            f"promises {8 + length + end:,}; download or copy it again."
        )
    return found


def _container_limit() -> float:
    """Return what a container's control group leaves; page cache counts as free, it is given up."""
    try:
        most = int((CONTROL_GROUP / "memory.max").read_text())
        lines = (CONTROL_GROUP / "memory.stat").read_text().splitlines()
        return most - int(next(line for line in lines if line.startswith("anon ")).split()[1])
    except (OSError, ValueError, StopIteration):  # no group, or no limit
        return math.inf
