"""From the files of documentation packages to plain text: one small reader for each format."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

Documents = Iterator[tuple[str, str]]  # (name, text)

BLOCKS = {
    "p", "div", "section", "article", "h1", "h2", "h3", "h4", "h5", "h6", "li", "dt", "dd", "tr",
    "pre", "blockquote", "br", "table", "title",
}  # fmt: skip
SKIPPED = {
    "script", "style", "nav", "header", "footer", "head", "form", "button", "select", "svg",
}  # fmt: skip
# Navigation that is marked by class only.
FURNITURE = re.compile(
    r"navheader|navfooter|sidebar|related|breadcrumb|toc\b|headerlink|menu|docnav|nosearch"
)


def content(path: Path) -> str:
    """The text of a file, unpacked; bytes that are no UTF-8 are replaced."""
    data = path.read_bytes()
    if path.suffix in (".gz", ".dz"):
        data = gzip.decompress(data)
    return data.decode("utf-8", "replace")


class _Html(HTMLParser):
    """Collects text, a line for each block; `<pre>` keeps its lines."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.open: list[tuple[str, bool]] = []  # tags, and whether what is inside is skipped
        self.pre = 0

    @property
    def skipping(self) -> bool:
        return bool(self.open) and self.open[-1][1]

    def handle_starttag(self, tag: str, attributes: list) -> None:
        if tag in BLOCKS:
            self.parts.append("\n" if tag in ("br", "tr", "li", "dt", "dd") else "\n\n")
        if tag in ("br", "img", "hr", "meta", "link", "input", "col", "p", "li", "dt", "dd"):
            return  # never closed, or not for sure
        classes = " ".join(value or "" for name, value in attributes if name in ("class", "id"))
        furniture = tag not in ("html", "body") and FURNITURE.search(classes)
        skip = self.skipping or tag in SKIPPED or bool(furniture)
        self.open.append((tag, skip))
        self.pre += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if not any(name == tag for name, _ in self.open):
            return
        while self.open:
            name, _ = self.open.pop()
            self.pre -= name == "pre"
            if name == tag:
                break
        if tag in BLOCKS:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            self.parts.append(data if self.pre else re.sub(r"\s+", " ", data))


def tidy(text: str) -> str:
    """No blanks around lines but where they indent, one empty line at most, and no pilcrows."""
    text = re.sub(r"[ \t\xa0]+\n", "\n", text.replace("\r", "").replace("¶", ""))
    text = re.sub(r"\n (?=\S)", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def html(path: Path) -> Documents:
    parser = _Html()
    parser.feed(content(path))
    yield path.name, tidy("".join(parser.parts))


def plain(path: Path) -> Documents:
    yield path.name, tidy(content(path))


def rst(path: Path) -> Documents:
    """Sphinx sources without index entries, labels and the names of roles."""
    unseen = r"index|_|sectionauthor|moduleauthor|module|currentmodule"
    text = re.sub(rf"^\.\. ({unseen}).*\n(?: {{3,}}.*\n)*", "", content(path), flags=re.M)
    text = re.sub(r":[a-z:+-]+:`~?([^`<]+?)(?: <[^`>]+>)?`", r"\1", text)
    yield path.name, tidy(text.replace("``", "`"))


def pod(path: Path) -> Documents:
    """Perl's documentation without its markup."""
    text = content(path)
    text = re.sub(r"^=(?:head\d|item|for|encoding|begin)\s*", "", text, flags=re.M)
    text = re.sub(r"^=(?:over|back|cut|pod|end).*$", "", text, flags=re.M)
    text = re.sub(r"[BCFIL]<<+ (.*?) >>+", r"\1", text)
    for _ in range(3):  # they may be nested
        text = re.sub(r"L<(?:[^<>|]*\|)?([^<>]*)>", r"\1", text)
        text = re.sub(r"[BCFISXZ]<([^<>]*)>", r"\1", text)
    yield path.name, tidy(text.replace("E<gt>", ">").replace("E<lt>", "<"))


def mallard(path: Path) -> Documents:
    """GNOME's pages: what stands after their head."""
    text = re.sub(r"<info>.*?</info>|<!--.*?-->", "", content(path), flags=re.S)
    text = re.sub(r"</(?:p|title|item|td)>", "\n\n", text)
    text = unescape(re.sub(r"<[^>]+>", "", text))
    blocks = (" ".join(block.split()) for block in text.split("\n\n"))
    yield path.name, "\n\n".join(filter(None, blocks))


def story(path: Path) -> Documents:
    """What is told and said in a scenario of Battle for Wesnoth."""
    said = re.findall(r'(?:message|story|description)\s*=\s*_\s*"((?:[^"]|"")*)"', content(path))
    lines = [" ".join(re.sub(r"<[^>]+>", "", line.replace('""', '"')).split()) for line in said]
    yield f"{path.parent.parent.name}/{path.name}", "\n\n".join(line for line in lines if line)


def dictionary(path: Path, before_entry: str = r"\n(?=\S)") -> Documents:
    """A dictionary for dictd, forty entries a document; what is not indented begins an entry."""
    entries = re.split(before_entry, content(path))[10:]  # the first ones are about the file
    entries = [re.sub(r"\{([^}]*)\}", r"\1", entry).rstrip() for entry in entries]
    entries = [entry for entry in entries if len(entry) > 60]
    for start in range(0, len(entries), 40):
        yield f"{path.stem}/{start}", "\n\n".join(entries[start : start + 40])


def devils_dictionary(path: Path) -> Documents:
    """Ambrose Bierce's, which indents verses only: an entry begins with a word in capitals."""
    return dictionary(path, before_entry=r"\n\s*\n(?=[A-Z][A-Z' -]+[,.])")


def glosses(path: Path) -> Documents:
    """WordNet's synsets, word and gloss a line, eighty neighbours a document."""
    rows = [line for line in content(path).splitlines() if not line.startswith("  ")]
    told = []
    for row in rows:
        head, _, gloss = row.partition(" | ")
        told.append(f"{head.split(' ')[4].replace('_', ' ')}: {gloss.strip()}")
    for start in range(0, len(told), 80):
        yield f"{path.name}/{start}", "\n".join(told[start : start + 80])
