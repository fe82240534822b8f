"""What a model trains on is what it will read when it is asked."""

from collections import Counter
from itertools import islice
from random import Random
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from workbench.data import conversations, easy_vqa
from workbench.data.conversations import (
    IGNORE,
    MIXTURE,
    Encoder,
    TrainingBatches,
    asking_order,
    pixels,
)
from workbench.data.scenes import FAMILIES, TRAIN_ONLY, Turn, make_scene
from workbench.errors import WorkbenchError
from workbench.models.prompts import build_prompt
from workbench.models.teacher import POCKET, VLM

N_IMAGE_TOKENS = 256


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(POCKET / "teacher")


@pytest.fixture(scope="module")
def encoder(processor):
    return Encoder(processor.tokenizer)


def training_scene(family, index):
    if family == "easy-vqa":
        return easy_vqa.training_scene(Random(index))
    return make_scene(family, "train", index)


@pytest.mark.parametrize("family", [*FAMILIES, *TRAIN_ONLY, "easy-vqa"])
def test_ids_are_those_that_the_processor_gives(family, processor, encoder):
    vlm = VLM("pocket", None, processor)
    for index in range(4):
        scene = training_scene(family, index)
        n_images = len(scene.images)
        for turn in scene.turns:
            prompt = build_prompt(vlm, n_images, turn.question)
            options = {"images": [list(scene.images)]}
            asked = processor(text=[prompt], **options)["input_ids"][0]
            expected = processor(text=[f"{prompt} {turn.answer}</s>"], **options)["input_ids"][0]
            ids, labels = encoder.conversation([turn], n_images, 200)
            assert ids == expected
            assert ids[: len(asked)] == asked
            assert labels == [IGNORE] * len(asked) + expected[len(asked) :]
            assert ids.count(encoder.special("<image>")) == N_IMAGE_TOKENS * n_images


def test_several_turns_read_as_the_chat_template_writes_them(processor, encoder):
    scene = make_scene("grid", "train", 0)
    messages = []
    for number, turn in enumerate(scene.turns):
        seen = [] if number else [{"type": "image"}]
        asked = [*seen, {"type": "text", "text": turn.question}]
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": turn.answer})
    text = processor.apply_chat_template(messages, tokenize=False)
    expected = processor(text=[text], images=[list(scene.images)])["input_ids"][0]
    ids, labels = encoder.conversation(scene.turns, 1, 1000)
    assert ids == expected
    spoken = processor.tokenizer.decode([label for label in labels if label != IGNORE])
    assert [part.strip() for part in spoken.split("</s>")] == [t.answer for t in scene.turns] + [""]
    assert all(label in (IGNORE, one) for label, one in zip(labels, ids, strict=True))


def test_turns_that_do_not_fit_are_left_out_whole(encoder):
    short = Turn("What is this?", "a dog")
    long = Turn("Describe the picture.", "There is a red circle in the top left and more. " * 3)
    n_short, n_long = (len(encoder.conversation([t], 0, 999)[0]) for t in (short, long))
    one, two = (encoder.conversation([t], 1, 999) for t in (short, long))
    room = 2 * n_short
    ids, labels = encoder.conversation([short, long, short], 1, room)
    assert len(ids) == len(labels) == N_IMAGE_TOKENS + room
    assert ids[: len(one[0])] == one[0]
    assert ids[len(one[0]) :] == encoder.conversation([short], 0, 999)[0]
    assert encoder.conversation([short, short], 1, room - 1) == one
    ids, labels = encoder.conversation([long, short], 1, n_long - 5)
    assert ids == two[0][:-5]
    assert labels == two[1][:-5]


def test_an_encoder_reads_each_piece_of_text_once():
    calls = Counter()

    def encode(text, add_special_tokens):
        assert not add_special_tokens
        calls[text] += 1
        return [7, 8]

    encoder = Encoder(SimpleNamespace(encode=encode, convert_tokens_to_ids=lambda token: 1), 3)
    turn = Turn("What?", "this")
    for _ in range(3):
        ids, labels = encoder.conversation([turn], 2, 50)
    assert ids == [1] * 7 + [7, 8, 1] + [7, 8, 1]
    assert labels == [IGNORE] * 10 + [7, 8, 1]
    assert calls == {"What?": 1, "this": 1}


def test_any_question_opens_a_conversation_and_none_is_lost():
    main, *rest = turns = make_scene("grid", "train", 1).turns
    orders = [asking_order(Random(seed), turns) for seed in range(400)]
    assert all(Counter(order) == Counter(turns) for order in orders)
    first = Counter(order[0] for order in orders)
    assert set(first) == set(turns)
    assert 0.4 < first[main] / len(orders) < 0.6
    assert len({order.index(main) for order in orders}) == len(turns)
    assert asking_order(Random(5), turns) == asking_order(Random(5), turns)
    assert asking_order(Random(1), [main]) == [main]
    assert turns == (main, *rest)


def test_a_description_comes_first_or_second():
    turns = make_scene("describe", "train", 1).turns
    places = Counter(asking_order(Random(seed), turns).index(turns[0]) for seed in range(200))
    assert set(places) == {0, 1}
    assert 0.4 < places[0] / 200 < 0.6


def test_pictures_become_what_the_processor_makes_of_them(processor):
    pictures = [
        easy_vqa.training_scene(Random(0)).images[0],
        make_scene("name", "train", 0).images[0],
    ]
    out = pixels(pictures, 3)
    assert out.shape == (3, 3, 128, 128)
    assert out.dtype == torch.uint8
    assert not out[2].any()
    expected = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(out[:2] / 127.5 - 1, expected, atol=1e-6, rtol=0)
    assert pixels([Image.new("RGB", (128, 128), (1, 2, 3))], 1)[0, :, 5, 5].tolist() == [1, 2, 3]


@pytest.mark.parametrize("number", [0, 2])
def test_a_batch_has_its_shapes_and_is_always_the_same(encoder, number):
    def make(seed=0):
        return TrainingBatches(encoder, 8, several_every=3, seed=seed).batch(number)

    batch, again, other = make(), make(), make(seed=1)
    several = number == 2
    rows, length = (2, 4 * N_IMAGE_TOKENS + 80) if several else (8, N_IMAGE_TOKENS + 80)
    assert batch["pixel_values"].shape == (8, 3, 128, 128)
    assert batch["input_ids"].shape == batch["labels"].shape == (rows, length)
    assert batch["text_tokens"] == (80 + 2 * N_IMAGE_TOKENS if several else 80)
    for key in ("pixel_values", "input_ids", "labels"):
        assert torch.equal(batch[key], again[key])
        assert not torch.equal(batch[key], other[key])
    wanted = batch["labels"] != IGNORE
    assert wanted.any(1).all()
    assert torch.equal(batch["labels"][wanted], batch["input_ids"][wanted])
    assert not wanted[:, : -batch["text_tokens"]].any()
    assert not wanted[~batch["real"]].any()
    assert not batch["input_ids"][~batch["real"]].any()
    real = batch["pixel_values"].flatten(1).any(1)
    n_pictures = int(real.sum())
    assert real[:n_pictures].all()
    image_tokens = batch["input_ids"] == encoder.special("<image>")
    assert image_tokens.sum() == n_pictures * N_IMAGE_TOKENS
    assert set((image_tokens.sum(1) // N_IMAGE_TOKENS).tolist()) <= ({2, 3, 4} if several else {1})


def test_pictures_stand_in_the_order_of_their_rows(encoder, monkeypatch):
    scenes = []
    original = TrainingBatches._scene

    def spy(self, rng, family):
        scenes.append(original(self, rng, family))
        return scenes[-1]

    monkeypatch.setattr(TrainingBatches, "_scene", spy)
    batch = TrainingBatches(encoder, 16, several_every=1).batch(0)
    assert len(scenes) == 4
    assert torch.equal(batch["pixel_values"], pixels([p for s in scenes for p in s.images], 16))
    for row, scene in zip(batch["input_ids"], scenes, strict=True):
        assert (row == encoder.special("<image>")).sum() == N_IMAGE_TOKENS * len(scene.images)
        first = row[1 + N_IMAGE_TOKENS * len(scene.images) :].tolist()
        asked = [encoder.text(turn.question) for turn in scene.turns]
        assert any(first[: len(question)] == question for question in asked)


def test_the_mixture_is_what_is_drawn(encoder, monkeypatch):
    drawn = Counter()
    scene = make_scene("name", "train", 0)

    def count(self, rng, family):
        drawn[family] += 1
        return scene

    monkeypatch.setattr(TrainingBatches, "_scene", count)
    batches = TrainingBatches(encoder, 64, several_every=10**6)
    for number in range(30):
        batches.batch(number)
    total = sum(MIXTURE.values())
    assert set(drawn) == set(MIXTURE)
    for family, weight in MIXTURE.items():
        assert drawn[family] / (30 * 64) == pytest.approx(weight / total, rel=0.3)
    drawn.clear()
    TrainingBatches(encoder, 8, mixture={"flag": 1.0}).batch(0)
    assert drawn == {"flag": 8}


def test_workers_draw_disjoint_batches_and_leave_none_out(encoder, monkeypatch):
    monkeypatch.setattr(TrainingBatches, "batch", lambda self, number: number)
    batches = TrainingBatches(encoder, 8)
    assert list(islice(batches, 5)) == [0, 1, 2, 3, 4]
    seen = []
    for worker in range(3):
        info = SimpleNamespace(id=worker, num_workers=3)
        monkeypatch.setattr(conversations, "get_worker_info", lambda info=info: info)
        seen += islice(batches, 4)
    assert sorted(seen) == list(range(12))


def test_a_batch_too_small_for_four_pictures_is_refused(encoder):
    with pytest.raises(WorkbenchError, match="batch_size=3 is too small: ask for 4"):
        TrainingBatches(encoder, 3)
    assert TrainingBatches(encoder, 4, several_every=1).batch(0)["input_ids"].shape[0] == 1
