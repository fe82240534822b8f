"""Test every family of the table, and print the README's table of what passed.

python -m benchmarks.families            prints it
python -m benchmarks.families --write    puts it into README.md, between its markers
"""

from __future__ import annotations

import argparse
import datetime
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import torch
import transformers

from workbench.models.families import LANGUAGE_MODELS, VISION_LANGUAGE_MODELS

HOUSE = Path(__file__).resolve().parents[1]
TESTS = "tests/test_families.py"
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"
# What a column is called, and the tests that have to pass for its mark.
COLUMNS = {
    "transfer": "test_family_transfer",
    "cache": "test_family_cache",
    "padding": "test_family_padding",
    "save/load": "test_family_save_and_load",
    "beam": "test_family_beam_and_sampling",
    "bf16": "test_family_bf16",
    "training": "test_family_gradient_checkpointing",
}


def run_tests() -> dict[tuple[str, str], bool]:
    """Run the tests; (test, family) -> whether it passed, for all of its variants."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", TESTS, "-k", "family"]
        subprocess.run([*command, f"--junitxml={report}"], cwd=HOUSE, stdout=sys.stderr)
        cases = ElementTree.parse(report).iter("testcase")
        passed: dict[tuple[str, str], bool] = {}
        for case in cases:
            found = re.fullmatch(r"(\w+)\[([^-\]]+).*\]", case.get("name", ""))
            if found:
                good = all(case.find(tag) is None for tag in ("failure", "error", "skipped"))
                passed[found.groups()] = passed.get(found.groups(), True) and good
    return passed


def table(passed: dict[tuple[str, str], bool]) -> str:
    """Markdown: a row for each family, a column for each part of the contract."""
    alone = [name for name, family in LANGUAGE_MODELS.items() if family.model_class]
    rows = [["family", *COLUMNS], ["---", *[":---:"] * len(COLUMNS)]]
    for name in (*alone, *VISION_LANGUAGE_MODELS):
        marks = ("✓" if passed.get((test, name)) else "✗" for test in COLUMNS.values())
        rows.append([name, *marks])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    made = (
        f"Made {datetime.date.today()} by `python -m benchmarks.families`, on a CPU, with "
        f"torch {torch.__version__.partition('+')[0]} and transformers {transformers.__version__}."
    )
    return "\n".join([*lines, "", made])


def write(text: str) -> None:
    """Put a table between the README's markers."""
    readme = HOUSE / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    _, after = rest.split(END)
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    arguments = parser.parse_args()
    text = table(run_tests())
    print(text)
    if arguments.write:
        write(text)


if __name__ == "__main__":
    main()
