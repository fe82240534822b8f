"""The models that the app holds, each with the one engine that answers for it.

An engine is made and warmed up when its model is loaded, so that no question waits for that and no
figure contains it. It has one cache, so one question at a time may use it: `handlers.ask` sees to
that.
"""

import gc
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from workbench.models.engine import Engine, fastest_mode
from workbench.models.prompts import position_limit
from workbench.models.teacher import VLM, load

ROOM = 512  # tokens at first: a picture, its question and its answer; for more the engine grows
LARGEST = 2**30  # bytes of weights beyond which the hybrids unused for longest are let go
FEWEST = 2  # models that stay, however large: a teacher and its hybrid

log = logging.getLogger(__name__)


class Ready(NamedTuple):
    """A model, and what answers for it."""

    vlm: VLM
    engine: Engine | None  # None: the model's own forward answers
    why_not: str = ""  # there is no engine


class Models:
    """What is loaded, each once.

    Args:
        largest: bytes of weights that are kept; `FEWEST` models stay in any case.
    """

    def __init__(self, largest: int = LARGEST) -> None:
        self.largest = largest
        self._held: dict[tuple[str, str], Ready] = {}  # the one asked for last stands last
        # One thread loads all: memory that a thread gives back is there for its next model only.
        self._loader = ThreadPoolExecutor(1)

    def holds(self, name: str, device: str) -> bool:
        """Tell whether a model is there already."""
        return (name, device) in self._held

    def get(self, name: str, device: str) -> Ready:
        """Load a model with its engine; whoever asks for it later gets the same objects.

        Raises:
            WorkbenchError: as `load`.
        """
        return self._loader.submit(self._get, name, device).result()

    def clear(self) -> None:
        """Let go of all."""
        self._held.clear()

    def _get(self, name: str, device: str) -> Ready:
        ready = self._held.pop((name, device), None)
        if ready is None:
            self._make_room()
            ready = make_ready(load(name, device=device))
        self._held[name, device] = ready
        return ready

    def _make_room(self) -> None:
        """Let go of the oldest models, before there is one more that may be as large as any."""
        sizes = [_weight_bytes(ready.vlm) for ready in self._held.values()]
        while len(sizes) >= FEWEST and sum(sizes) + max(sizes) > self.largest:
            del self._held[next(iter(self._held))], sizes[0]
            gc.collect()


def make_ready(vlm: VLM) -> Ready:
    """Make a model's engine and warm it up; a model that it cannot take goes without.

    On a GPU the step is recorded as a CUDA graph, which takes seconds once.
    """
    try:
        engine = Engine(vlm, fastest_mode([vlm]))
        if engine.reason is None:
            engine.ready(1, min(ROOM, position_limit(vlm)))
        return Ready(vlm, None if engine.reason else engine, engine.reason or "")
    except Exception as error:  # anybody's model may come: what an engine trips over, it may take
        log.warning("%s goes without an engine: %s", vlm.name, error)
        return Ready(vlm, None, f"its engine could not be made: {error}")


def alike(one: Ready, other: Ready) -> tuple[Ready, Ready]:
    """Let engines answer for both or for neither; otherwise their figures cannot be compared."""
    without = [ready for ready in (one, other) if ready.engine is None]
    if not without:
        return one, other
    why = f"{without[0].vlm.name}: {without[0].why_not}"
    return Ready(one.vlm, None, why), Ready(other.vlm, None, why)


def _weight_bytes(vlm: VLM) -> int:
    return sum(p.nbytes for p in vlm.model.parameters())
