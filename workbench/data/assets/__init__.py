"""The pictures, flags, fonts and words that the generated data set is drawn from.

They come from public packages, named in NOTICE.md with their licences; build_assets.py makes them
again.
"""

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageFont

from workbench.errors import WorkbenchError

FOLDER = Path(__file__).parent
REBUILD = "python -m workbench.data.assets.build_assets"


@dataclass(frozen=True)
class Concept:
    """One thing that all drawings show. `plural` is None where counting it reads badly."""

    name: str
    plural: str | None
    category: str

    @property
    def with_article(self) -> str:
        """The name as it stands in a sentence: "a fox", "an owl", "some grapes"."""
        # A plural such as "bunches of grapes" for "grapes" marks a name that takes no article.
        measured = self.plural is None or (" of " in self.plural and " of " not in self.name)
        if measured:
            return f"some {self.name}"
        # By sound and not by letter: an hourglass, an umbrella, but a unicorn.
        vowel = self.name.startswith(("a", "e", "i", "o", "um", "hour"))
        return f"{'an' if vowel else 'a'} {self.name}"


@dataclass(frozen=True)
class Flag:
    """A country whose flag is in both flag drawings."""

    country: str
    capital: str
    continent: str


@dataclass(frozen=True)
class Atlas:
    """Everything in this folder, unpacked. Treat the pictures as read-only: they are shared."""

    concepts: tuple[Concept, ...]
    drawings: tuple[str, ...]
    flags: tuple[Flag, ...]
    words: tuple[str, ...]
    faces: tuple[str, ...]
    _sprites: tuple[tuple[Image.Image, ...], ...] = field(repr=False)
    _flags: tuple[tuple[Image.Image, ...], ...] = field(repr=False)

    def sprite(self, i: int, drawing: int) -> Image.Image:
        """Returns concept `i` as an RGBA picture of 64x64 pixels; `drawing` indexes `drawings`."""
        return self._sprites[drawing][i]

    def flag(self, i: int, drawing: int) -> Image.Image:
        """Returns flag `i` as an RGB picture, 64 wide and 48 high; `drawing` is 0 or 1."""
        return self._flags[drawing][i]

    def font(self, face: int, size: int) -> ImageFont.FreeTypeFont:
        """Returns a DejaVu face (0 sans, 1 sans bold, 2 serif, 3 mono) at `size` pixels."""
        return _font(self.faces[face], size)


def _locate(name: str) -> Path:
    """Returns the path of a file of this folder.

    Raises:
        WorkbenchError: if it is not there.
    """
    path = FOLDER / name
    if not path.is_file():
        raise WorkbenchError(f"The asset file {path} is missing: rebuild it with `{REBUILD}`.")
    return path


@functools.lru_cache(maxsize=256)
def _font(face: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(_locate(f"fonts/{face}.ttf")), size)


def _cut(name: str, count: int, columns: int, size: tuple[int, int]) -> tuple[Image.Image, ...]:
    """Cuts the first `count` tiles of `size` pixels out of the atlas `name`.webp."""
    width, height = size
    with Image.open(_locate(f"{name}.webp")) as atlas:
        atlas.load()
        corners = ((n % columns * width, n // columns * height) for n in range(count))
        return tuple(atlas.crop((x, y, x + width, y + height)) for x, y in corners)


@functools.lru_cache(maxsize=1)
def load_atlas() -> Atlas:
    """Reads this folder once; later calls return the same object.

    Raises:
        WorkbenchError: if a file is missing; it names the file and the command that rebuilds it.
    """
    index = json.loads(_locate("index.json").read_text("utf-8"))
    concepts = tuple(Concept(**row) for row in index["concepts"])
    flags = tuple(Flag(row["country"], row["capital"], row["continent"]) for row in index["flags"])
    columns, tile = index["columns"], (index["tile"], index["tile"])
    flag_size = tuple(index["flag_size"])
    return Atlas(
        concepts=concepts,
        drawings=tuple(index["drawings"]),
        flags=flags,
        words=tuple(_locate("words.txt").read_text("utf-8").split()),
        faces=tuple(index["faces"]),
        _sprites=tuple(_cut(d, len(concepts), columns, tile) for d in index["drawings"]),
        _flags=tuple(_cut(d, len(flags), columns, flag_size) for d in index["flag_drawings"]),
    )
