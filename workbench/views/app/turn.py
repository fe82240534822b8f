"""One question at a time, and none that was given up in the way of the next."""

from collections.abc import Iterator
from threading import RLock
from time import monotonic, sleep
from typing import TypeVar

GIVEN_UP = 2.0  # seconds in which nobody asks a question to go on; the page asks at once
PATIENCE = 0.02  # seconds between two looks whether it is one's turn

Step = TypeVar("Step")


class Turn:
    """Who may use the engines, each of which has one cache.

    The page's queue lets one question in at a time, but one that was stopped may be computing its
    last token still when the next one comes, and Gradio does not always close it. So a question
    has its turn until it ends, is closed, or is not asked to go on any more.
    """

    def __init__(self) -> None:
        # The garbage collector may close a question in the very thread that has the lock.
        self._lock = RLock()
        self._owner: object | None = None
        self._seen = 0.0

    def taken(self) -> bool:
        """Tell whether a question has its turn."""
        return self._owner is not None

    def take(self, steps: Iterator[Step]) -> Iterator[Step]:
        """Wait for the turn, then go through steps; they end early if another took it over."""
        me = object()
        while not self._begin(me):
            sleep(PATIENCE)
        try:
            while True:
                with self._lock:
                    if self._owner is not me:
                        return
                    try:
                        step = next(steps)
                    except StopIteration:
                        return
                    self._seen = monotonic()
                yield step
        finally:
            with self._lock:
                if self._owner is me:
                    self._owner = None

    def _begin(self, me: object) -> bool:
        with self._lock:
            free = self._owner is None or monotonic() - self._seen > GIVEN_UP
            if free:
                self._owner, self._seen = me, monotonic()
            return free
