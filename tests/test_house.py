import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from benchmarks.pocket import table as pocket_table
from benchmarks.speed import table as speed_table

HOUSE = Path(__file__).resolve().parents[1]
# A room imports rooms to its left; "steps" is what stands in no room of its own there.
ROOMS = ["errors", "mamba", "models", "data", "steps.training", "steps.efficiency", "steps.quality",
         "steps.conversion", "steps", "views"]  # fmt: skip
MODULES = sorted((HOUSE / "workbench").rglob("*.py"))


def project() -> dict:
    return tomllib.loads((HOUSE / "pyproject.toml").read_text())["project"]


def imported_names(path: Path) -> set[str]:
    """Every module that a file names in an import, relative ones resolved."""
    package = path.relative_to(HOUSE).with_suffix("").parts[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return names


def room_of(module: str) -> str | None:
    house, *parts = module.split(".")
    names = [".".join(parts[:depth]) for depth in (2, 1)] if house == "workbench" else []
    return next((name for name in names if name in ROOMS), None)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(HOUSE)))
def test_a_room_imports_only_rooms_below_it(path):
    if path.parent == HOUSE / "workbench" and path.name in ("__init__.py", "__main__.py"):
        return  # the hall, and the door for machines: they open on every room
    room = room_of(".".join(path.relative_to(HOUSE).with_suffix("").parts))
    names = imported_names(path)
    assert "workbench" not in {n for n in names if room_of(n) is None and "." not in n}, (
        f"{path.name} imports the package itself, which imports {path.name}"
    )
    above = {n for n in names if room_of(n) and ROOMS.index(room_of(n)) > ROOMS.index(room)}
    assert not above, f"{room} stands below {above}"


def test_import_workbench_brings_no_screen():
    screens = ("gradio", "plotly", "ipywidgets")
    code = f"import sys, workbench; print([name for name in {screens} if name in sys.modules])"
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=HOUSE, capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == "[]"


def test_conda_environment_says_what_pyproject_says():
    environment = yaml.safe_load((HOUSE / "environment.yml").read_text())
    assert environment["name"] == project()["name"]
    python, *rest = environment["dependencies"]
    assert project()["requires-python"] == f">={python.removeprefix('python=')}"
    assert rest[0] == "pip"
    assert rest[1] == {"pip": ["-c constraints.txt", "-e .[dev]"]}, (
        "dependencies stand once, in pyproject.toml: conda installs them from there"
    )
    assert "dev" in project()["optional-dependencies"]


def test_every_dependency_has_its_tested_version():
    wanted = project()["dependencies"] + project()["optional-dependencies"]["dev"]
    names = {re.split(r"[><=! ]", line)[0].lower().replace("_", "-") for line in wanted}
    lines = (HOUSE / "constraints.txt").read_text().splitlines()
    pinned = dict(
        line.lower().replace("_", "-").split("==") for line in lines if line[:1] not in "#"
    )
    assert names <= set(pinned)
    makefile = (HOUSE / "Makefile").read_text()
    assert f"torch=={pinned['torch']}" in makefile, (
        "the Makefile installs torch by that exact version"
    )
    assert "torchvision" not in pinned, "it does not import beside a torch for CPUs"


def test_every_path_of_the_readme_tree_exists():
    readme = (HOUSE / "README.md").read_text()
    blocks = re.findall(r"```\w*\n(.*?)```", readme, re.S)
    tree = next((block for block in blocks if re.search(r"^workbench/\s", block, re.M)), None)
    assert tree, "README.md draws the tree in a fenced block that has workbench/"
    missing = [path for path in tree_paths(tree) if not (HOUSE / path).exists()]
    assert not missing


def tree_paths(tree: str) -> list[str]:
    """Read an indented tree: a path a line, deeper ones further right, then words about it."""
    paths, above = [], []
    for line in tree.splitlines():
        found = re.match(r"^([\s│├└─]*)([\w.\-/]+)", line)
        if not found:
            continue
        indent, name = len(found[1]), found[2]
        while above and above[-1][0] >= indent:
            above.pop()
        paths.append("/".join([*(folder for _, folder in above), name.rstrip("/")]))
        if name.endswith("/"):
            above.append((indent, name.rstrip("/")))
    return paths


def test_the_readmes_say_what_the_measurements_say():
    pages = (HOUSE / "README.md", HOUSE / "benchmarks" / "speed" / "README.md")
    written_down, results = [page.read_text() for page in pages], HOUSE / "benchmarks" / "results"
    scores = pocket_table.read([str(path) for path in results.glob("scores_*.json")])
    speed = [results / "speed_h200.json", results / "prefill_turns_h200.json"]
    written = [pocket_table.table(scores), *speed_table.tables(*speed)]
    missing = [
        table.partition("\n")[0]
        for table in written
        if not any(table in page for page in written_down)
    ]
    assert not missing, "these tables are not what benchmarks/ would print"


def test_tree_paths_reads_both_ways_of_drawing():
    plain = "app.py         the door\nworkbench/\n  mamba/\n    ssd.py   words\n  errors.py\ntests/"
    drawn = "app.py\nworkbench/\n├── mamba/\n│   └── ssd.py   words\n└── errors.py\ntests/"
    expected = ["app.py", "workbench", "workbench/mamba", "workbench/mamba/ssd.py",
                "workbench/errors.py", "tests"]  # fmt: skip
    assert tree_paths(plain) == tree_paths(drawn) == expected


def test_no_file_knows_the_machine_it_was_written_on():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=HOUSE, capture_output=True, text=True,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("not a git checkout: there is no list of the project's files")
    texts = {".py", ".md", ".toml", ".yml", ".txt", ".css", ".ipynb", ".json", ""}
    home = re.compile(r"(?<![\w.])/(?:work|root|home|Users|tmp)/[\w.]")
    guilty = []
    for name in filter(None, listed.stdout.split("\0")):
        path = HOUSE / name
        if path.suffix in texts and path.is_file() and path != Path(__file__).resolve():
            found = home.search(path.read_text(errors="ignore"))
            guilty += [f"{name}: {found[0]}"] if found else []
    assert not guilty


def test_a_python_that_is_too_old_is_told_so(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((HOUSE / name).read_bytes())
    told = subprocess.run(
        ["make", "app", "PYTHON=false"], cwd=tmp_path, capture_output=True, text=True
    )
    assert told.returncode != 0
    assert "needs Python 3.11 or newer" in told.stdout
    assert not (tmp_path / ".venv").exists()
