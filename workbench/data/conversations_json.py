"""LLaVA-style conversations: one JSON file, and a folder with its pictures.

The file is what ShareGPT4V, LLaVA and MaTVLM train on: a list of {"id", "image" (a path inside the
folder, or a list of them; none for text alone), "conversations": [{"from", "value"}, ...]}.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random

from PIL import Image

from workbench.data.samples import Dataset, Sample
from workbench.data.turns import read_turns
from workbench.errors import WorkbenchError


@dataclass(frozen=True)
class Skipped:
    """A sample that cannot be read, and why."""

    id: str
    reason: str


class Conversations(Dataset):
    """Conversations whose pictures are opened when they are asked for.

    What is wrong with the file's text, or is missing from the folder, is left out at once. A
    picture that turns out broken is left out when it is met: a slice is shorter, and where one
    sample is asked for, the next takes its place.
    `skipped` names them all.
    """

    def __init__(self, name: str, records: list[dict], folder: Path, limit: int | None = None):
        self.folder, self.skipped = folder, []
        self.broken: set[int] = set()  # places of which a picture turned out broken
        self._records = self._whole(records, len(records) if limit is None else limit)
        super().__init__(name, ("conversation",), self._sample, len(self._records))

    def __str__(self) -> str:
        return f"{super().__str__()}\n{self.report()}"

    def __getitem__(self, index):
        if not isinstance(index, slice):
            return super().__getitem__(index)
        found = map(self._read, range(*index.indices(len(self))))
        return [sample for sample in found if sample is not None]

    def report(self) -> str:
        """What was skipped, in a few lines."""
        if not self.skipped:
            return "  nothing skipped"
        lines = [f"  {len(self.skipped):,} skipped:"]
        lines += [f"    {one.id}: {one.reason}" for one in self.skipped[:10]]
        if len(self.skipped) > 10:
            lines.append(f"    and {len(self.skipped) - 10:,} more")
        return "\n".join(lines)

    def _whole(self, records: list[dict], limit: int) -> list[dict]:
        """The first `limit` records that can be read."""
        good = []
        for number, record in enumerate(records):
            if len(good) == limit:
                break
            name = str(record.get("id", number)) if isinstance(record, dict) else str(number)
            try:
                if not isinstance(record, dict):
                    raise WorkbenchError("it is no object")
                turns = read_turns(record.get("conversations"))
                paths = _paths(record.get("image"), self.folder)
            except WorkbenchError as error:
                self.skipped.append(Skipped(name, str(error)))
                continue
            good.append({"id": name, "turns": turns, "paths": paths})
        return good

    def _sample(self, index: int) -> Sample:
        for step in range(len(self._records)):
            sample = self._read((index + step) % len(self._records))
            if sample is not None:
                return sample
        raise WorkbenchError(f"{self.name} has no sample that can be read.\n{self.report()}")

    def _read(self, place: int) -> Sample | None:
        """The sample of one record, or None if a picture of it is broken, which is noted once."""
        if place in self.broken:
            return None
        record = self._records[place]
        try:
            images = tuple(map(_opened, record["paths"]))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            self.broken.add(place)
            reason = f"a picture is broken: {' '.join(str(error).split())[:200]}"
            self.skipped.append(Skipped(record["id"], reason))
            return None
        (question, answer), *more = record["turns"]
        return Sample(images, question, answer, "conversation", more=tuple(more))


def load_conversations(
    path: str | Path,
    *,
    images: str | Path | None = None,
    limit: int | None = None,
    seed: int | None = None,
) -> Conversations:
    """Read a JSON file of conversations.

    Args:
        path: of the file.
        images: the folder that its "image" paths start from; None is the file's own.
        limit: at most this many; None for all.
        seed: shuffles them before that; None keeps the file's order.

    Raises:
        WorkbenchError: no such file, no list in it, or no sample that can be read.
    """
    path = Path(path).expanduser()
    folder = path.parent if images is None else Path(images).expanduser()
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WorkbenchError(f"The conversations in {path} cannot be read: {error}.") from error
    if not isinstance(records, list):
        raise WorkbenchError(f"{path} holds no list of conversations.")
    if seed is not None:
        Random(seed).shuffle(records)
    data = Conversations(path.name, records, folder, limit)
    if not len(data):
        raise WorkbenchError(f"{path} has no sample that can be read.\n{data.report()}")
    return data


def _paths(image: object, folder: Path) -> tuple[Path, ...]:
    names = [] if image is None or image == "" else image if isinstance(image, list) else [image]
    if not all(isinstance(name, str) for name in names):
        raise WorkbenchError("its image is no path")
    paths = tuple(folder / name for name in names)
    for path in paths:
        if not path.is_file():
            raise WorkbenchError(f"the picture {path} is missing")
    return paths


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")
