"""What the lessons share: what they ran on, and checks that answer with a sentence."""

import platform
from collections.abc import Callable

import torch
import transformers


def versions() -> str:
    """Say what a lesson ran on, for whoever compares figures."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return (
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {device}, {torch.get_num_threads()} threads"
    )


def check(exercise: str, *claims: tuple[Callable[[], object], str]) -> None:
    """Check the answer to an exercise, claim after claim; print ✓, or how to mend the first gap.

    Nothing is raised, so "Run all" goes on to the end.

    Args:
        exercise: its name, such as "Exercise 1".
        claims: each a function that is true for a right answer, and a sentence that helps when it
            is not, or when it fails.
    """
    for holds, advice in claims:
        try:
            right, said = bool(holds()), ""
        except Exception as error:  # noqa: BLE001 - whatever a learner wrote
            right, said = False, f" ({_plain(error)})"
        if not right:
            print(f"✗ {exercise}: {advice}{said}")
            return
    print(f"✓ {exercise}: right.")


def _plain(error: Exception) -> str:
    """What went wrong, in a line; `...` is what stands where an answer belongs."""
    first = (str(error).splitlines() or [""])[0]
    if "ellipsis" in first:
        return "it still says ..."
    return f"{type(error).__name__}: {first}"
