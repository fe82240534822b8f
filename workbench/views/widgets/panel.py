"""What all widgets share: a box of controls, data to read back, and a drawing that stands still."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from html import escape

import ipywidgets

from workbench.errors import WorkbenchError

WIDE = ipywidgets.Layout(width="100%")


class Panel(ABC):
    """Controls above a drawing.

    A page that can run widgets gets the live box; any other page gets `to_html()` and `str()`.
    """

    title = ""

    def __init__(self) -> None:
        self.picture = ipywidgets.HTML(layout=WIDE)
        self.said = ipywidgets.HTML()
        self._working: threading.Thread | None = None

    def build(self, *rows: ipywidgets.Widget) -> None:
        """Put the controls, the drawing and a line for messages into one box, and draw."""
        self.box = ipywidgets.VBox([*rows, self.said, self.picture], layout=WIDE)
        self.draw()

    def draw(self) -> None:
        """Renew the drawing."""
        self.picture.value = self.to_html()

    @abstractmethod
    def to_html(self) -> str:
        """Return the drawing as HTML that needs no script."""

    @property
    @abstractmethod
    def value(self) -> dict:
        """All that the widget shows, as plain data."""

    def say(self, text: str, *, wrong: bool = False) -> None:
        """Show a sentence above the drawing; screen readers read it out."""
        mark = "⚠ " if wrong else ""
        self.said.value = f'<span role="status">{mark}{escape(text)}</span>' if text else ""

    def in_background(self, work: Callable[[], None], *, busy: str) -> None:
        """Run `work` in a thread, so that the notebook stays usable; one at a time."""
        if self._working is not None and self._working.is_alive():
            self.say("One thing at a time: wait until this is done.")
            return
        self.say(busy)

        def run() -> None:
            try:
                work()
            except WorkbenchError as error:
                self.say(str(error), wrong=True)
            except Exception as error:  # noqa: BLE001 - a thread has nobody else to tell
                self.say(f"{type(error).__name__}: {error}", wrong=True)

        self._working = threading.Thread(target=run, daemon=True)
        self._working.start()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the background work is done; tell whether it is."""
        if self._working is not None:
            self._working.join(timeout)
        return self._working is None or not self._working.is_alive()

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        live = self.box._repr_mimebundle_()
        return {**live, "text/html": self.to_html(), "text/plain": str(self)}


def button(label: str, does: Callable[[], None], *, tip: str, icon: str = "") -> ipywidgets.Button:
    """Make a button that calls `does` without arguments."""
    made = ipywidgets.Button(description=label, tooltip=tip, icon=icon)
    made.on_click(lambda _: does())
    return made


def row(*widgets: ipywidgets.Widget) -> ipywidgets.HBox:
    """Set widgets side by side; they wrap on a narrow page."""
    layout = ipywidgets.Layout(width="100%", flex_flow="row wrap", align_items="center")
    return ipywidgets.HBox(widgets, layout=layout)
