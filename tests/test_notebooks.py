"""Each lesson is written as .py; the .ipynb beside it is made from that by `make notebooks`."""

import os
import time
from dataclasses import replace
from pathlib import Path

import jupytext
import nbformat
import pytest
import tiny
from nbclient import NotebookClient
from PIL import Image

from workbench.views import notebook as view

HOUSE = Path(__file__).resolve().parents[1]
LESSONS = sorted((HOUSE / "notebooks").glob("*.py"))
each_lesson = pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)

CELL_LIMIT_S = 180  # a lesson's cell should take less than 60 s, but not every machine is idle
FILE_LIMIT_KB = 300
PLOTLY = "application/vnd.plotly.v1+json"


def made_from(lesson: Path) -> nbformat.NotebookNode:
    path = lesson.with_suffix(".ipynb")
    assert path.is_file(), f"{path.name} is missing: run `make notebooks`"
    return nbformat.read(path, as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def test_ask_fills_one_table_and_returns_the_streams(monkeypatch):
    shown = []

    class Display:
        def __init__(self, bundle, **options):
            shown.append(bundle)

        def update(self, bundle, **options):
            shown.append(bundle)

    monkeypatch.setattr(view, "display", Display)
    models = [tiny.vlm(), replace(tiny.vlm((0, 2)), name="<hybrid>")]
    streams = view.ask(models, [Image.new("RGB", (16, 16))], "What?", max_new_tokens=3)
    assert list(streams) == ["tiny", "<hybrid>"]
    assert len(shown) == 1 + sum(map(len, streams.values()))
    table = shown[-1]["text/html"]
    assert table.count("&lt;hybrid&gt;") == 1
    assert table.count("tokens in") == 2
    assert table.count("states") == 1
    assert str(streams["tiny"][-1]) in shown[-1]["text/plain"]


def test_there_are_lessons():
    assert LESSONS
    assert not {p.stem for p in (HOUSE / "notebooks").glob("*.ipynb")} - {p.stem for p in LESSONS}


@each_lesson
def test_notebook_holds_the_cells_of_its_source(lesson):
    written = [(cell.cell_type, cell.source) for cell in jupytext.read(lesson).cells]
    made = [(cell.cell_type, cell.source) for cell in made_from(lesson).cells]
    assert made == written, "run `make notebooks`"


@each_lesson
def test_notebook_keeps_what_it_showed(lesson):
    notebook = made_from(lesson)
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1)), "run once, from top to bottom"
    shown = outputs(notebook)
    assert shown
    assert not [o for o in shown if o.output_type == "error" or o.get("name") == "stderr"]
    size = lesson.with_suffix(".ipynb").stat().st_size
    assert size < FILE_LIMIT_KB * 1024, f"{size / 1024:.0f} KB"


@each_lesson
def test_figures_show_where_no_script_runs(lesson):
    figures = [o.data for o in outputs(made_from(lesson)) if PLOTLY in o.get("data", {})]
    assert all("image/png" in data for data in figures), "made without `make notebooks`"


@pytest.mark.slow
@each_lesson
def test_lesson_runs_offline(lesson, capsys, monkeypatch):
    paths = [str(HOUSE), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("PLOTLY_RENDERER", raising=False)  # as in a reader's JupyterLab
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    notebook = jupytext.read(lesson)
    seconds, started = {}, {}
    NotebookClient(
        notebook,
        timeout=CELL_LIMIT_S,
        kernel_name="python3",
        resources={"metadata": {"path": str(lesson.parent)}},
        on_cell_execute=lambda cell, cell_index: started.update({cell_index: time.perf_counter()}),
        on_cell_executed=lambda cell, cell_index, execute_reply: seconds.update(
            {cell_index: time.perf_counter() - started[cell_index]}
        ),
    ).execute()
    slowest = max(seconds, key=seconds.get)
    with capsys.disabled():
        print(
            f"\n{lesson.stem}: {sum(seconds.values()):.0f} s, of which {seconds[slowest]:.0f} s in "
            f"{notebook.cells[slowest].source.splitlines()[0]!r}"
        )
