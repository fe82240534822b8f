"""What the lessons share: what they ran on, and checks that answer with a sentence."""

import inspect
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

    Nothing is raised, so "Run all" goes on to the end, and no advice is given before a try.

    Args:
        exercise: its name, such as "Exercise 1".
        claims: each a function that is true for a right answer, and a sentence that helps when it
            is not, or when it fails.
    """
    for holds, advice in claims:
        if untouched := _untouched(holds):
            print(f"○ {exercise}: not tried yet; {untouched[0]} still says ...")
            return
        try:
            right, said = bool(holds()), ""
        except Exception as error:  # noqa: BLE001 - whatever a learner wrote
            right, said = False, f" ({_plain(error)})"
        if not right:
            print(f"✗ {exercise}: {advice}{said}")
            return
    print(f"✓ {exercise}: right.")


def _untouched(holds: Callable[[], object]) -> list[str]:
    """Names that a claim reads, and that are still `...`, which stands where an answer belongs."""
    read = inspect.getclosurevars(holds)
    names = read.nonlocals | read.globals
    return [n for n, v in names.items() if v is ... or (isinstance(v, set) and ... in v)]


def _plain(error: Exception) -> str:
    """What went wrong, in a line; `...` is what stands where an answer belongs."""
    first = (str(error).splitlines() or [""])[0]
    if "ellipsis" in first:
        return "it still says ..."
    return f"{type(error).__name__}: {first}"
