"""What was found so far: a line of JSON for each job, written as soon as it is done."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import workbench as wb
from benchmarks.ablation.rows import Job


class Record:
    """The file of a run; a killed one keeps all lines, and a later run goes on from them.

    Args:
        path: of the .jsonl, whose first line holds the settings.
        settings: plain data that must be the same when a run goes on.
        joined: files of earlier runs, whose results are taken over.

    Raises:
        WorkbenchError: results that were found under other settings.
    """

    def __init__(self, path: Path, settings: dict, joined: Iterable[Path] = ()) -> None:
        self.settings = json.loads(json.dumps(settings))
        self.found: dict[str, dict] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        earlier = [self._read(file) for file in (*joined, path) if file.exists()]
        self.path = path.with_suffix(".part")  # the old file stays until all of it is copied
        self.path.write_text(json.dumps({"settings": self.settings}) + "\n")
        for line in (line for lines in earlier for line in lines):
            self.add(line)
        self.path = self.path.replace(path)

    def _read(self, file: Path) -> list[dict]:
        lines = []
        for line in file.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                continue  # cut off when the run was killed
        first = lines[0].get("settings") if lines else self.settings
        for name, value in self.settings.items():
            if first.get(name) != value:
                raise wb.WorkbenchError(
                    f"{file.name} was made with {name}={first.get(name)!r}, not {value!r}: "
                    "name another run, or ask for what it was begun with."
                )
        return lines[1:]

    def add(self, line: dict) -> None:
        """Keep one job's result, or its error; an error never takes a result's place."""
        if "error" in line and "error" not in self.found.get(line["key"], {"error": ""}):
            return
        self.found[line["key"]] = line
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def has(self, job: Job) -> bool:
        """Whether the job was done before, and was the same job."""
        found = self.found.get(job.key)
        return found is not None and "error" not in found and found["row"] == job.facts()["row"]
