"""From a Hugging Face id to a folder, and a sentence for each way in which that can fail."""

from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from workbench.errors import WorkbenchError
from workbench.models.sources.problems import check_names

# Configs, tokenizers and weights at the top of a repository; no pickles, no second set of weights.
WANTED = ["*.json", "*.jinja", "*.txt", "*.model", "model*.safetensors"]
UNWANTED = ["*/*", "*.fp16*", "*.bf16*"]


def is_hub_id(name: str) -> bool:
    """Tell whether a name has the form organisation/model."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")


def fetch(name: str, *, with_code: bool = False) -> Path:
    """Download a model into the cache of Hugging Face, or find it there.

    Args:
        name: organisation/model.
        with_code: fetch the repository's Python files, too.

    Returns:
        The folder with its files.

    Raises:
        WorkbenchError: there is no such model, it asks for a login or a licence, the hub is out of
            reach, or its files are not in a form that is read.
    """
    wanted = [*WANTED, *(["*.py"] if with_code else [])]
    try:
        folder = Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=UNWANTED))
    except Exception as error:  # its own, and those of the HTTP library, which it has changed twice
        raise WorkbenchError(_explained(name, error)) from error
    try:
        names = HfApi().list_repo_files(name)
    except Exception:  # the same; the files came from the cache then
        names = [file.name for file in folder.iterdir()]
    check_names(f"The model {name!r}", names)
    return folder


def _explained(name: str, error: Exception) -> str:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, GatedRepoError) or (
        status in (401, 403) and not isinstance(error, RepositoryNotFoundError)
    ):
        return (
            f"The model {name!r} is gated: accept its licence at huggingface.co/{name}, "
            "then log in with 'hf auth login' or set HF_TOKEN."
        )
    if isinstance(error, (RepositoryNotFoundError, HFValidationError)):
        return (
            f"There is no model {name!r} on the Hugging Face hub, or it is private: check the "
            "spelling, or log in with 'hf auth login'."
        )
    if isinstance(error, (LocalEntryNotFoundError, ConnectionError)):
        return (
            f"The model {name!r} is not on this machine and the Hugging Face hub cannot be reached "
            f"(or HF_HUB_OFFLINE is set): where there is a network, say 'hf download {name} "
            "--local-dir FOLDER', bring the folder here and pass its path instead."
        )
    reason = " ".join(f"{type(error).__name__} {error}".split())[:200]
    return f"The model {name!r} cannot be downloaded: {reason}"
