"""Each lesson is written as .py; the .ipynb beside it is made from that by `make notebooks`."""

import os
import time
from dataclasses import replace
from pathlib import Path

import jupytext
import nbformat
import pytest
import tiny
from PIL import Image

from notebooks import build
from workbench.views import notebook as view
from workbench.views.lessons import check

HOUSE = Path(__file__).resolve().parents[1]
LESSONS = build.sources()
EXERCISES = [path for path in LESSONS if build.has_exercises(path)]
NOTEBOOKS = [(path, build.EXERCISE) for path in LESSONS] + [
    (path, build.SOLUTION) for path in EXERCISES
]
each_lesson = pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
each_notebook = pytest.mark.parametrize(
    "lesson, version", NOTEBOOKS, ids=[f"{path.stem}-{version}" for path, version in NOTEBOOKS]
)

CELL_LIMIT_S = 180  # a lesson's cell should take less than 60 s, but not every machine is idle
FILE_LIMIT_KB = 400
PLOTLY = "application/vnd.plotly.v1+json"
RIGHT, WRONG, OPEN = "✓ Exercise", "✗ Exercise", "○ Exercise"


def made_from(lesson: Path, version: str = build.EXERCISE) -> nbformat.NotebookNode:
    path = build.place(lesson, version)
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


def verdicts(cells: list[nbformat.NotebookNode]) -> list[str]:
    """What the checks of some cells printed, a line each."""
    lines = [
        line for cell in cells for output in cell.get("outputs", [])
        for line in output.get("text", "").splitlines()
    ]  # fmt: skip
    return [line for line in lines if line.startswith((RIGHT, WRONG, OPEN))]


def test_there_are_lessons():
    assert [path.stem.split("_")[0] for path in LESSONS] == list("01234567")
    assert LESSONS[1:] == EXERCISES, "the tour has nothing to solve, the lessons have"
    for version in (build.EXERCISE, build.SOLUTION):
        folder = build.place(LESSONS[0], version).parent
        known = {path.stem for path, its in NOTEBOOKS if its == version}
        assert {path.stem for path in folder.glob("*.ipynb")} == known


@pytest.mark.parametrize("lesson", EXERCISES, ids=lambda path: path.stem)
def test_each_exercise_has_its_solution_and_its_check(lesson):
    cells = jupytext.read(lesson).cells
    places = [i for i, cell in enumerate(cells) if build.EXERCISE in build.tags(cell)]
    assert len(places) >= 2
    for place in places:
        exercise, solution, *after = cells[place:]
        assert build.tags(solution) == [build.SOLUTION]
        assert "your turn" in exercise.source
        assert "check(" in next(c for c in after if c.cell_type == "code").source


@pytest.mark.parametrize("lesson", EXERCISES, ids=lambda path: path.stem)
def test_a_lesson_opens_with_versions_and_ends_with_its_claims(lesson):
    code = [cell.source for cell in jupytext.read(lesson).cells if cell.cell_type == "code"]
    assert "print(versions())" in code[0]
    assert "assert " in code[-1]


@each_notebook
def test_notebook_holds_the_cells_of_its_source(lesson, version):
    written = [(cell.cell_type, cell.source) for cell in build.write(lesson, version).cells]
    made = [(cell.cell_type, cell.source) for cell in made_from(lesson, version).cells]
    assert made == written, "run `make notebooks`"


@each_notebook
def test_notebook_keeps_what_it_showed(lesson, version):
    notebook = made_from(lesson, version)
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1)), "run once, from top to bottom"
    shown = outputs(notebook)
    assert shown
    assert not [o for o in shown if o.output_type == "error" or o.get("name") == "stderr"]
    assert not [o for o in shown if build.WIDGET in o.get("data", {})], "its live state is not here"
    size = build.place(lesson, version).stat().st_size
    assert size < FILE_LIMIT_KB * 1024, f"{size / 1024:.0f} KB"


@each_notebook
def test_figures_show_where_no_script_runs(lesson, version):
    figures = [o.data for o in outputs(made_from(lesson, version)) if PLOTLY in o.get("data", {})]
    assert all("image/png" in data for data in figures), "made without `make notebooks`"


@each_notebook
def test_exercises_are_open_and_solutions_are_right(lesson, version):
    said = verdicts(code_cells(made_from(lesson, version)))
    wanted = RIGHT if version == build.SOLUTION else (OPEN, WRONG)
    assert len(said) == len(solved(lesson)) // 2
    assert all(line.startswith(wanted) for line in said), said


def solved(lesson: Path) -> list[nbformat.NotebookNode]:
    """The cells that solve a lesson: each solution, and the check after it."""
    cells = [cell for cell in jupytext.read(lesson).cells if cell.cell_type == "code"]
    places = [i for i, cell in enumerate(cells) if build.SOLUTION in build.tags(cell)]
    return [cells[i + more] for i in places for more in (0, 1)]


@each_lesson
def test_lesson_imports_the_workbench_before_torch(lesson):
    lines = lesson.read_text().splitlines()  # OpenMP is told how to wait before it is loaded
    first = [line for line in lines if line.startswith(("import workbench", "import torch"))][0]
    assert first.startswith("import workbench")


@pytest.mark.slow
@each_lesson
def test_lesson_runs_offline_first_open_then_solved(lesson, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("PLOTLY_RENDERER", raising=False)  # as in a reader's JupyterLab
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))  # the client sets both
    monkeypatch.setenv("OMP_WAIT_POLICY", os.environ.get("OMP_WAIT_POLICY", "PASSIVE"))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    notebook = build.write(lesson)
    given = len(notebook.cells)
    notebook.cells += solved(lesson)  # in the same kernel, which is half the time
    seconds, started = {}, {}
    client = build.client(
        notebook,
        timeout=CELL_LIMIT_S,
        on_cell_execute=lambda cell, cell_index: started.update({cell_index: time.perf_counter()}),
        on_cell_executed=lambda cell, cell_index, execute_reply: seconds.update(
            {cell_index: time.perf_counter() - started[cell_index]}
        ),
    )
    client.execute()
    said = verdicts(notebook.cells[:given]), verdicts(notebook.cells[given:])
    n = len(solved(lesson)) // 2
    assert [len(s) for s in said] == [n, n]
    assert all(line.startswith((OPEN, WRONG)) for line in said[0]), said[0]
    assert all(line.startswith(RIGHT) for line in said[1]), said[1]
    slowest = max(seconds, key=seconds.get)
    with capsys.disabled():
        print(
            f"\n{lesson.stem}: {sum(seconds.values()):.0f} s, of which {seconds[slowest]:.0f} s in "
            f"{notebook.cells[slowest].source.splitlines()[0]!r}"
        )


def test_check_says_what_is_missing_and_never_raises(capsys):
    check("Exercise 1", (lambda: True, "no"), (lambda: 1 / 0, "do not divide by nothing."))
    check("Exercise 2", (lambda: ... > 1, "a number, please."))
    check("Exercise 3", (lambda: 1, "no"))
    answer, names = ..., {...}
    check("Exercise 4", (lambda: answer in (1, 2), "one or two."))
    check("Exercise 5", (lambda: names == {"a"}, "a."))
    assert capsys.readouterr().out.splitlines() == [
        "✗ Exercise 1: do not divide by nothing. (ZeroDivisionError: division by zero)",
        "✗ Exercise 2: a number, please. (it still says ...)",
        "✓ Exercise 3: right.",
        "○ Exercise 4: not tried yet; answer still says ...",
        "○ Exercise 5: not tried yet; names still says ...",
    ]
