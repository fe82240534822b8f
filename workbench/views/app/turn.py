"""One question at a time, first come, first served, and none that was given up in the way."""

from collections.abc import Iterator
from dataclasses import dataclass
from threading import RLock
from time import monotonic, sleep
from typing import TypeVar

GIVEN_UP = 2.0  # seconds in which nobody asks a question to go on; the page asks at once
PATIENCE = 0.02  # seconds between two looks whether it is one's turn

Step = TypeVar("Step")


class Stopped(Exception):
    """Whoever asked has taken the question back; quietly, if the page shows something else now."""

    def __init__(self, quietly: bool) -> None:
        super().__init__()
        self.quietly = quietly


@dataclass(eq=False)
class _Place:
    who: str | None
    seen: float  # when it last went on, or looked whether it may
    stopped: bool = False
    quietly: bool = False


class Turn:
    """A line before the engines, each of which has one cache.

    A question has its turn until it ends, is stopped or closed, or is not asked to go on any more:
    Gradio does not always close what a reader left.
    """

    def __init__(self) -> None:
        # The garbage collector may close a question in the very thread that has the lock.
        self._lock = RLock()
        self._line: list[_Place] = []

    def taken(self) -> bool:
        """Tell whether a question has its turn."""
        return bool(self._line)

    def take(self, steps: Iterator[Step], who: str | None = None) -> Iterator[Step]:
        """Wait for the turn, then go through steps; they end early if another took it over.

        Args:
            steps: what is done.
            who: may stop it.

        Raises:
            Stopped: `stop` was called for this question, before its turn or amid its steps.
        """
        me = _Place(who, monotonic())
        with self._lock:
            self._line.append(me)
        try:
            while not self._comes_to(me):
                sleep(PATIENCE)
            while True:
                with self._lock:
                    if me.stopped:
                        raise Stopped(me.quietly)
                    if self._line[:1] != [me]:
                        return
                    try:
                        step = next(steps)
                    except StopIteration:
                        return
                    me.seen = monotonic()
                yield step
        finally:
            self._leave(me)

    def stop(self, who: str | None, quietly: bool = False) -> None:
        """Stop what somebody asked, at its next step."""
        for place in tuple(self._line):  # without the lock, which a step may hold for long
            if place.who == who:
                place.stopped, place.quietly = True, quietly

    def end(self, who: str | None) -> None:
        """Stop what somebody asked, quietly, and wait until it has ended, or is given up."""
        self.stop(who, quietly=True)
        until = monotonic() + GIVEN_UP
        while any(place.who == who for place in tuple(self._line)) and monotonic() < until:
            sleep(PATIENCE)

    def _comes_to(self, me: _Place) -> bool:
        with self._lock:
            if me.stopped:
                raise Stopped(me.quietly)
            me.seen = monotonic()
            first = self._line[0]
            if me.seen - first.seen > GIVEN_UP:
                self._leave(first)
            return first is me

    def _leave(self, place: _Place) -> None:
        with self._lock:
            if place in self._line:
                self._line.remove(place)
            if self._line:  # while the lock was held it could not look
                self._line[0].seen = monotonic()
