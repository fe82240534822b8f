"""The generator says what it draws: its answers are checked against the pictures themselves."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from workbench.data import Sample, easy_vqa, load_data
from workbench.data.assets import Atlas, load_atlas
from workbench.data.drawing import COLOURS, SHAPES
from workbench.data.scenes import (
    FAMILIES,
    SPLITS,
    TRAIN_ONLY,
    UNSEEN_FAMILIES,
    make_scene,
    objects,
)
from workbench.data.scenes.scene import drawings, flag_drawings, words
from workbench.data.scenes.several import ORDINALS
from workbench.data.scenes.shapes import PLACES, read_facts, sentence, share_right
from workbench.errors import WorkbenchError
from workbench.models.teacher import POCKET

EVERY_FAMILY = (*FAMILIES, *TRAIN_ONLY)
FACTS = (
    ("top left", "red", "circle"),
    ("middle", "blue", "star"),
    ("bottom right", "gray", "moon"),
)


def drawn(scene):
    return [picture.tobytes() for picture in scene.images]


def pixels(picture):
    return np.asarray(picture).astype(int)


def is_drawn(picture):
    """Which pixels are not background: canvases are of one colour, and corners stay empty."""
    rgb = pixels(picture)
    return np.abs(rgb - rgb[-1, -1]).max(-1) > 12


def colour_name(rgb):
    return min(COLOURS, key=lambda name: np.abs(np.array(COLOURS[name]) - rgb).sum())


def answers(scene, pattern):
    """{what the question names: answer} of the turns whose whole question fits `pattern`."""
    found = ((re.fullmatch(pattern, turn.question), turn.answer) for turn in scene.turns)
    return {match.groups(): answer for match, answer in found if match}


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_a_scene_is_named_by_its_family_split_index_and_seed(family):
    for split in SPLITS:
        scene, again = (make_scene(family, split, 3, seed=5) for _ in range(2))
        assert drawn(scene) == drawn(again)
        assert scene.turns == again.turns
    named = [("train", 3, 5), ("test", 3, 5), ("unseen", 3, 5), ("train", 4, 5), ("train", 3, 6)]
    assert len({tuple(drawn(make_scene(family, *name))) for name in named}) == len(named)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_pictures_and_turns_are_well_formed(family):
    for index in range(20):
        scene = make_scene(family, "train", index)
        assert len(scene.images) in ((2, 3, 4) if family == "several" else (1,))
        for picture in scene.images:
            assert picture.size == (128, 128)
            assert picture.mode == "RGB"
            assert is_drawn(picture).mean() > 0.005
        for turn in scene.turns:
            assert turn.answer == turn.answer.strip() != ""
            assert turn.question[0].isupper()
            assert turn.question[-1] in "?."
            assert not set("{}") & set(turn.question)


def test_several_shows_two_three_and_four_pictures():
    assert {len(make_scene("several", "test", i).images) for i in range(30)} == {2, 3, 4}


def test_many_scenes_are_all_different():
    for family in FAMILIES:
        named = [(split, index) for split in ("train", "test") for index in range(30)]
        assert len({tuple(drawn(make_scene(family, *name))) for name in named}) == len(named)


def test_pools_are_disjoint_and_cover_everything():
    atlas = load_atlas()
    everything = {
        drawings: {(c, d) for c in range(len(atlas.concepts)) for d in range(3)},
        flag_drawings: {(f, d) for f in range(len(atlas.flags)) for d in range(2)},
        words: set(atlas.words),
    }
    for pool, whole in everything.items():
        seen, unseen = set(pool(False)), set(pool(True))
        assert not seen & unseen
        assert seen | unseen == whole
        assert 0.04 < len(unseen) / len(whole) < 0.2


@pytest.mark.parametrize("family", UNSEEN_FAMILIES)
def test_generators_draw_from_their_own_pool_only(family, monkeypatch):
    used = {"sprite": [], "flag": []}

    def spy_on(kind, real):
        def spy(self, i, drawing):
            used[kind].append((i, drawing))
            return real(self, i, drawing)

        monkeypatch.setattr(Atlas, kind, spy)

    spy_on("sprite", Atlas.sprite)
    spy_on("flag", Atlas.flag)
    for split in SPLITS:
        unseen = split == "unseen"
        read = set()
        for index in range(40):
            scene = make_scene(family, split, index)
            if family == "word":
                read.add(scene.turns[0].answer)
        assert set(used["sprite"]) <= set(drawings(unseen))
        assert set(used["flag"]) <= set(flag_drawings(unseen))
        assert read <= set(words(unseen))
        assert used["sprite"] or used["flag"] or read
        for kind in used:
            used[kind].clear()


def bars(picture):
    """{colour: value} read off the pixels: the axis lies at row 118, a unit is 11 rows."""
    rgb, there = pixels(picture), is_drawn(picture)
    row = there[116, 20:124]
    starts = [x for x in range(20, 124) if row[x - 20] and not (x > 20 and row[x - 21])]
    read = {}
    for start in starts:
        colour, top = rgb[116, start + 2], 116
        while (rgb[top - 1, start + 2] == colour).all():
            top -= 1
        read[colour_name(colour)] = round((118 - top) / 11)
    return read


def test_charts_answer_what_their_bars_show():
    asked = Counter()
    for index in range(40):
        scene = make_scene("chart", "test", index)
        values = bars(scene.images[0])
        by_value = sorted(values, key=values.get)
        for turn in scene.turns:
            named = [word for word in re.findall(r"\w+", turn.question) if word in COLOURS]
            if "value" in turn.question:
                kind, right = "value", str(values[named[0]])
            elif "How many" in turn.question:
                kind, right = "many", str(len(values))
            elif "taller" in turn.question:
                kind, right = "taller", max(named, key=values.get)
            else:
                kind = "tallest" if "tallest" in turn.question else "shortest"
                right = by_value[-1 if kind == "tallest" else 0]
            assert turn.answer == right, (index, turn, values)
            asked[kind] += 1
    assert set(asked) == {"value", "many", "taller", "tallest", "shortest"}


def test_counts_agree_with_each_other_and_with_the_picture():
    for index in range(60):
        scene = make_scene("count", "test", index)
        assert len(scene.turns) == 3
        *parts, whole = (int(turn.answer) for turn in scene.turns)
        assert "in all" in scene.turns[2].question
        assert sum(parts) == whole
        there = is_drawn(scene.images[0])
        cells = there.reshape(4, 32, 4, 32)[:, 6:26, :, 6:26]  # the middle of each
        assert (cells.mean((1, 3)) > 0.05).sum() == whole


def test_described_shapes_stand_where_and_in_the_colour_the_facts_say():
    for index in range(30):
        scene = make_scene("describe", "test", index)
        said = {place: colour for place, colour, _ in scene.turns[0].facts}
        rgb, there = pixels(scene.images[0]), is_drawn(scene.images[0])
        for place, (x, y) in PLACES.items():
            cell = np.s_[42 * y + 4 : 42 * y + 40, 42 * x + 4 : 42 * x + 40]
            inside = rgb[cell][there[cell]]
            if place in said:
                assert colour_name(np.median(inside, 0)) == said[place]
            else:
                assert len(inside) == 0


def test_what_is_named_is_what_is_pasted_there(monkeypatch):
    atlas, pasted = load_atlas(), []
    names = {id(atlas.sprite(c, d)): atlas.concepts[c] for c, d in drawings(False)}

    def spy(picture, sprite, centre, size, real=objects.paste, **options):
        pasted.append((names[id(sprite)], centre))
        real(picture, sprite, centre, size, **options)

    monkeypatch.setattr(objects, "paste", spy)
    for index in range(15):
        pasted.clear()
        thing, kind = (turn.answer for turn in make_scene("name", "test", index).turns)
        assert [(thing, kind)] == [(concept.name, concept.category) for concept, _ in pasted]
        pasted.clear()
        in_cell = answers(make_scene("grid", "test", index), r"(?:What|Name).* in the (.+)[?.]")
        rows, columns = ("top", "bottom"), ("left", "right")
        assert {cell: name for (cell,), name in in_cell.items()} == {
            f"{rows[y > 64]} {columns[x > 64]}": concept.name for concept, (x, y) in pasted
        }
        pasted.clear()
        count = r"(?:How many (.+) are there\?|Count the (.+)\.)"
        counted = answers(make_scene("count", "test", index), count)
        assert Counter({a or b: int(n) for (a, b), n in counted.items()}) == Counter(
            concept.plural for concept, _ in pasted
        )
        pasted.clear()
        shown = answers(make_scene("several", "test", index), r"What is in the (\w+) picture\?")
        in_order = [shown[(o,)] for o in ORDINALS if (o,) in shown]
        assert in_order == [concept.name for concept, _ in pasted]


def test_a_grid_says_the_same_in_every_turn():
    for index in range(30):
        scene = make_scene("grid", "test", index)
        things = answers(scene, r"(?:What is in|Name the object in) the (.+)[?.]")
        assert len(things) == 4
        at = {cell: name for (cell,), name in things.items()}
        where = answers(scene, r"Where is the (.+)\?")
        assert {cell: name for (name,), cell in where.items()} == at
        names = {c.name: c.with_article for c in load_atlas().concepts}
        yes_no = answers(scene, r"Is there (.+?)(?: in the picture)?\?")
        assert sorted(yes_no.values()) == ["no", "yes"]
        for (thing,), answer in yes_no.items():
            assert (thing in {names[name] for name in at.values()}) == (answer == "yes")
        neighbour = r"What is (to the left of|to the right of|above|below) the (.+)\?"
        (((side, anchor), name),) = answers(scene, neighbour).items()
        cells = {name: tuple(cell.split()) for cell, name in at.items()}
        (row, column), (other_row, other_column) = cells[anchor], cells[name]
        if side in ("above", "below"):
            assert column == other_column
            assert (row, other_row) == (("bottom", "top") if side == "above" else ("top", "bottom"))
        else:
            assert row == other_row
            assert (column, other_column) == (
                ("right", "left") if "left" in side else ("left", "right")
            )


def test_several_pictures_say_the_same_in_every_turn():
    kinds = {c.name: c.category for c in load_atlas().concepts}
    articles = {c.name: c.with_article for c in load_atlas().concepts}
    for index in range(60):
        scene = make_scene("several", "test", index)
        names = answers(scene, r"What is in the (\w+) picture\?")
        shown = {ordinal: name for (ordinal,), name in names.items()}
        assert set(shown) == set(ORDINALS[: len(scene.images)])
        which = {t: o for (t,), o in answers(scene, r"Which picture shows (.+)\?").items()}
        alone = {o: n for o, n in shown.items() if list(shown.values()).count(n) == 1}
        assert which == {articles[name]: ordinal for ordinal, name in alone.items()}
        same = answers(scene, r"Do the (\w+) and the (\w+) picture show the same thing\?")
        (((one, two), verdict),) = same.items()
        assert verdict == ("yes" if shown[one] == shown[two] else "no")
        (((kind,), n),) = answers(scene, r"How many .+ of the kind (.+)\?").items()
        assert int(n) == sum(kinds[name] == kind for name in shown.values()) > 0


@pytest.mark.parametrize("family", ["word", "letters"])
def test_what_is_written_is_spelled_by_the_other_turns(family):
    for index in range(20):
        scene = make_scene(family, "train", index)
        read, colour, first, last, length = (turn.answer for turn in scene.turns)
        assert (first, last, length) == (read[0], read[-1], str(len(read)))
        ink = pixels(scene.images[0])[is_drawn(scene.images[0])]
        darkest = ink[ink.sum(-1) <= np.percentile(ink.sum(-1), 20)]
        assert colour_name(np.median(darkest, 0)) == colour


def test_flags_belong_to_their_country():
    for index in range(20):
        country, capital, continent = (t.answer for t in make_scene("flag", "test", index).turns)
        flag = next(flag for flag in load_atlas().flags if flag.country == country)
        assert (flag.capital, flag.continent) == (capital, continent)


def test_descriptions_take_thirty_to_eighty_tokens():
    tokenizer = AutoTokenizer.from_pretrained(Path(POCKET) / "teacher")
    texts = [make_scene("describe", "test", index).turns[0].answer for index in range(120)]
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    assert min(lengths) >= 30
    assert max(lengths) <= 80


def test_reading_facts_is_the_inverse_of_writing_them():
    for index in range(50):
        turn = make_scene("describe", "train", index).turns[0]
        assert turn.answer == sentence(turn.facts)
        assert read_facts(turn.answer) == turn.facts
        assert 4 <= len(turn.facts) <= 8
    pairs = zip(PLACES, SHAPES, strict=True)
    everything = tuple((place, "orange", shape) for place, shape in pairs)
    assert read_facts(sentence(everything)) == everything
    assert "an orange circle in the top left" in sentence(everything)


def test_share_right_counts_colours_and_shapes_and_punishes_inventions():
    def share(*facts):
        return share_right(sentence(facts), FACTS)

    assert share(*FACTS) == 1.0
    assert share(*FACTS[::-1]) == 1.0
    wrong_colour = ("top left", "green", "circle")
    assert share(wrong_colour, *FACTS[1:]) == pytest.approx(5 / 6)
    both_wrong = ("top left", "green", "heart")
    assert share(both_wrong, *FACTS[1:]) == pytest.approx(4 / 6)
    assert share(*FACTS[:2]) == pytest.approx(4 / 6)
    invented = ("top right", "red", "circle")
    assert share(*FACTS, invented) == pytest.approx(6 / 8)
    assert share(*FACTS, FACTS[0]) == pytest.approx(6 / 8)
    everywhere = [(place, "red", "circle") for place in PLACES]
    assert share(*everywhere) == pytest.approx(2 / 18)
    assert share_right("", FACTS) == 0
    assert share_right("a red circle", FACTS) == 0


def test_scores_forgive_case_spaces_and_the_full_stop_and_nothing_else():
    sample = Sample((), "What is this?", "dog", "name")
    for reply in ("dog", "Dog", "  dog \n", "DOG.", "dog ."):
        assert sample.score(reply) == 1.0
    for reply in ("", "dogs", "a dog", "do g", "cat", "dog!"):
        assert sample.score(reply) == 0.0
    described = Sample((), "Describe.", sentence(FACTS), "describe", FACTS)
    assert described.score(f" {sentence(FACTS).upper()}\n") == 1.0
    assert described.score("dog") == 0.0


def test_a_data_set_is_a_sequence_that_is_made_alike_each_time():
    data = load_data("pocket", limit=20)
    assert len(data) == 20
    assert data[-1] == data[19]
    assert data[-20] == data[0]
    assert data[3] == data[3]
    assert data[3] is not data[3]
    assert data[2:11:3] == [data[2], data[5], data[8]]
    assert data[15:] == [data[i] for i in range(15, 20)]
    assert len(list(data)) == 20
    for index in (20, -21):
        with pytest.raises(IndexError):
            data[index]
    assert str(data).startswith("pocket/test: 20 samples of name, grid")


@pytest.mark.parametrize(
    "split, n, n_families", [("train", 80_000, 8), ("test", 2000, 8), ("unseen", 1500, 6)]
)
def test_any_limit_holds_a_fair_share_of_each_family(split, n, n_families):
    assert len(load_data("pocket", split=split)) == n
    assert len(load_data("pocket", split=split, limit=10**9)) == n
    data = load_data("pocket", split=split, limit=21)
    counts = Counter(sample.family for sample in data)
    assert set(counts) == set(data.families)
    assert len(counts) == n_families
    assert max(counts.values()) - min(counts.values()) <= 1


def test_splits_and_seeds_are_other_worlds_and_a_limit_is_not():
    def world(**options):
        return [sample.images for sample in load_data("pocket", **options)[:12]]

    assert world() == world(split="test", seed=0) == world(limit=12)
    worlds = [world(), world(seed=1), world(split="train"), world(split="unseen")]
    pictures = [{picture.tobytes() for images in one for picture in images} for one in worlds]
    assert sum(map(len, pictures)) == len(set.union(*pictures))


def test_samples_ask_what_their_scene_answers():
    for index, sample in enumerate(load_data("pocket", limit=16)):
        scene = make_scene(sample.family, "test", index // 8)
        assert [picture.tobytes() for picture in sample.images] == drawn(scene)
        assert sample.answer in [t.answer for t in scene.turns if t.question == sample.question]
        assert sample.score(sample.answer) == 1.0
        assert (sample.facts is not None) == (sample.family == "describe")
        if sample.family == "word":
            assert sample.answer == scene.turns[0].answer
    asked = {s.question.split()[0] for s in load_data("pocket", limit=240) if s.family == "count"}
    assert len(asked) > 1


def test_easy_vqa_is_whole_and_shuffled_by_the_seed():
    for split, n in (("test", 9673), ("train", 38_575)):
        data = load_data("easy-vqa", split=split)
        assert len(data) == n
        assert len(load_data("easy-vqa", split=split, limit=5)) == 5
    first = data[0]
    assert first.images[0].size == (64, 64)
    assert first.images[0].mode == "RGB"
    assert first.family == "easy-vqa"
    questions = [[s.question for s in load_data("easy-vqa", limit=12, seed=k)] for k in (0, 0, 1)]
    assert questions[0] == questions[1] != questions[2]
    rows = [load_data("easy-vqa", seed=2)[i] for i in range(5)]
    real = {(q, a) for q, a, _ in easy_vqa.questions("test")}
    assert all((s.question, s.answer) in real for s in rows)


def test_what_is_not_there_is_said_in_a_sentence():
    with pytest.raises(WorkbenchError, match=r"no data set named 'coco'. Choose 'pocket', "):
        load_data("coco")
    with pytest.raises(WorkbenchError, match=r"'pocket' has no split 'dev'.*train, test, unseen"):
        load_data("pocket", split="dev")
    with pytest.raises(WorkbenchError, match=r"'easy-vqa' has no split 'unseen'.*'train' or"):
        load_data("easy-vqa", split="unseen")
    for limit in (0, -3):
        with pytest.raises(WorkbenchError, match=f"limit={limit} leaves no sample"):
            load_data(limit=limit)
