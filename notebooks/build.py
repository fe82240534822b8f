"""Make the notebooks from the .py files beside this one, run them, and keep what they show.

    python notebooks/build.py            # all of them
    python notebooks/build.py 2 5        # those whose names begin so

Each lesson is written once. A cell tagged `exercise` is what a learner gets; the cell tagged
`solution` after it is what stands there in solutions/. All other cells are the same in both.
Figures become PNGs too (by Chromium), for pages that run no script, and of a widget the drawing is
kept and its live state left out.
"""

import base64
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).resolve().parent
HOUSE = HERE.parent
WIDGET = "application/vnd.jupyter.widget-view+json"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
LOOK = "color:#7d828b;font:13px system-ui,sans-serif;padding:4px"
CLEAR = "<style>text {fill-opacity: 1}</style>"  # that grey is faint enough on any page
EXERCISE, SOLUTION = "exercise", "solution"
CELL_LIMIT_S = 600  # a lesson's cell should take less than 60 s, but not every machine is idle


def sources() -> list[Path]:
    """Every lesson, the tour first."""
    return sorted(path for path in HERE.glob("[0-9]*.py"))


def has_exercises(source: Path) -> bool:
    """Whether there is anything to solve, and so a second file."""
    return any(EXERCISE in tags(cell) for cell in jupytext.read(source).cells)


def tags(cell: NotebookNode) -> list[str]:
    """The tags of a cell."""
    return cell.metadata.get("tags", [])


def write(source: Path, version: str = EXERCISE) -> NotebookNode:
    """The notebook of a lesson without outputs: with its exercises, or with their solutions."""
    notebook = jupytext.read(source)
    other = {EXERCISE: SOLUTION, SOLUTION: EXERCISE}[version]
    notebook.cells = [cell for cell in notebook.cells if other not in tags(cell)]
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # the same at every run
    notebook.metadata.pop("jupytext", None)
    return notebook


def place(source: Path, version: str) -> Path:
    """Where the notebook of a lesson stands."""
    folder = HERE if version == EXERCISE else HERE / "solutions"
    return folder / source.with_suffix(".ipynb").name


def client(notebook: NotebookNode, **options: object) -> NotebookClient:
    """What runs a notebook in the folder of the lessons, with this checkout's workbench."""
    paths = [str(HOUSE), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    # Threads that wait in a loop, as is their custom, make a busy machine ten times as slow.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    fixed = {"timeout": CELL_LIMIT_S, "kernel_name": "python3", "store_widget_state": False}
    return NotebookClient(notebook, resources={"metadata": {"path": str(HERE)}}, **fixed | options)


def still(notebook: NotebookNode) -> None:
    """Keep a picture of each widget, and leave out what needs its live twin, and warnings.

    The picture is a PNG: pages that do not trust a notebook, GitHub's among them, take the SVG out
    of its HTML.
    """
    with photographer() as picture_of:
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)
            outputs = [o for o in cell.get("outputs", []) if o.get("name") != "stderr"]
            for data in (o.data for o in outputs if "data" in o):
                if data.pop(WIDGET, None) is not None and "text/html" in data:
                    data["image/png"] = picture_of(data.pop("text/html"))
            if "outputs" in cell:
                cell["outputs"] = [o for o in outputs if o.output_type == "stream" or o.get("data")]


@contextmanager
def photographer() -> Iterator[Callable[[str], str]]:
    """What turns HTML into a PNG in base64, legible on a white page and on a dark one."""
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, CHROMIUM)), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 940, "height": 600})

        def picture_of(html: str) -> str:
            page.set_content(f'<!DOCTYPE html>{CLEAR}<div id="all" style="{LOOK}">{html}</div>')
            taken = page.locator("#all").screenshot(omit_background=True)
            return base64.b64encode(taken).decode()

        yield picture_of
        browser.close()


class Watch:
    """How long each cell of a notebook took, read as the client's two hooks tell it."""

    def __init__(self) -> None:
        self.started: dict[int, float] = {}
        self.seconds: dict[int, float] = {}
        self.hooks = {"on_cell_execute": self.start, "on_cell_executed": self.end}

    def start(self, cell: NotebookNode, cell_index: int) -> None:
        """A cell begins."""
        self.started[cell_index] = time.perf_counter()

    def end(self, cell: NotebookNode, cell_index: int, execute_reply: object) -> None:
        """A cell has ended."""
        self.seconds[cell_index] = time.perf_counter() - self.started[cell_index]

    def slowest(self, notebook: NotebookNode) -> str:
        """The slowest cell, by its seconds and its first line."""
        index = max(self.seconds, key=self.seconds.__getitem__)
        line = notebook.cells[index].source.splitlines()[0]
        return f"slowest cell {self.seconds[index]:.1f} s, {line!r}"


def build(source: Path, version: str) -> tuple[Path, str]:
    """Make one notebook and run it; where it stands, and its slowest cell."""
    notebook, path, watch = write(source, version), place(source, version), Watch()
    client(notebook, **watch.hooks).execute()
    still(notebook)
    path.parent.mkdir(exist_ok=True)
    nbformat.write(notebook, path)
    return path, watch.slowest(notebook)


def main(beginnings: list[str]) -> None:
    """Build those lessons whose names begin so, or all."""
    os.environ.setdefault("PLOTLY_RENDERER", "plotly_mimetype+png")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for source in sources():
        if beginnings and not source.name.startswith(tuple(beginnings)):
            continue
        for version in (EXERCISE, SOLUTION) if has_exercises(source) else (EXERCISE,):
            start = time.perf_counter()
            path, slowest = build(source, version)
            took, size = time.perf_counter() - start, path.stat().st_size / 1024
            print(f"{path.relative_to(HERE)}: {took:.0f} s, {size:.0f} KB, {slowest}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
