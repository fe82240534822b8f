"""The app without a browser: its handlers are plain functions, called here as such."""

import inspect
import threading
import time
import types
from dataclasses import dataclass, replace

import gradio as gr
import numpy as np
import pytest
import tiny
from PIL import Image

from workbench.errors import WorkbenchError
from workbench.models.engine import Engine
from workbench.models.generation import Answer, stream_answer
from workbench.models.plan import Plan
from workbench.models.teacher import VLM
from workbench.views import figures
from workbench.views.app import build_app, cards, handlers, models, turn
from workbench.views.app.pictures import MAX_SIDE, read_picture


@dataclass
class Config:
    num_hidden_layers: int

    def get_text_config(self):
        return self


def stand_in(name: str, mamba_layers: tuple[int, ...] | None = None, eyes: bool = True) -> VLM:
    plan = None if mamba_layers is None else Plan(16, mamba_layers, "even", "")
    processor = types.SimpleNamespace(image_processor=None) if eyes else types.SimpleNamespace()
    return VLM(name, types.SimpleNamespace(config=Config(16)), processor, plan)


MODELS = {
    "pocket": stand_in("pocket"),
    "pocket-25": stand_in("pocket-25", (3, 7, 11, 15)),
    "smollm2-135m": stand_in("smollm2-135m", eyes=False),
    "smollm2-135m-25": stand_in("smollm2-135m-25", (0, 8), eyes=False),
}
SAYS = {
    "pocket": "a red circle and a star",
    "pocket-25": "a red square and a star",
    "smollm2-135m": "one two",
    "smollm2-135m-25": "one three",
}


def answers_of(vlm: VLM) -> list[Answer]:
    words, hybrid = SAYS[vlm.name].split(), vlm.plan is not None
    first = Answer(
        words[0], 270, 1, 200.0, 0.0, 1024 * (205 if hybrid else 271), 3072 * hybrid, 1 << 20
    )
    return [
        replace(first, text=" ".join(words[: n + 1]), n_new_tokens=n + 1, decode_tokens_per_s=50.0,
                kv_bytes=first.kv_bytes + 1024 * n)
        for n in range(len(words))
    ]  # fmt: skip


@pytest.fixture
def heard(monkeypatch):
    """Replace the models by stand-ins; the list says which one was asked what, in order."""
    calls = []

    def load(name, *, device):
        if name not in MODELS:
            raise WorkbenchError(f"There is no model called '{name}': use pocket or pocket-25.")
        return MODELS[name]

    def stream_answer(vlm, images, question, *, max_new_tokens, engine):
        assert engine == f"engine of {vlm.name}"
        calls.append((vlm.name, len(images), question, max_new_tokens))
        yield from answers_of(vlm)

    def make_ready(vlm):
        return models.Ready(vlm, f"engine of {vlm.name}")

    handlers.models.clear()
    monkeypatch.setattr(models, "load", load)
    monkeypatch.setattr(models, "make_ready", make_ready)
    monkeypatch.setattr(models, "_weight_bytes", lambda vlm: 0)
    monkeypatch.setattr(handlers, "stream_answer", stream_answer)
    monkeypatch.setattr(handlers, "position_limit", lambda vlm: 400)
    monkeypatch.setattr(handlers, "SECONDS_BETWEEN_UPDATES", 0.0)
    yield calls
    handlers.models.clear()


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.new("RGB", (60, 40), "teal").save(path)
    return [(str(path), None)]


def ask(*args, **kwargs):
    return list(handlers.ask(*args, **kwargs))


# Asking


def test_both_models_answer_one_after_the_other(heard, picture):
    pages = ask(picture, " What is it? ", "pocket-25", 64)
    assert heard == [("pocket", 1, "What is it?", 64), ("pocket-25", 1, "What is it?", 64)]
    last = pages[-1]
    assert "pocket-25" in last.hybrid
    assert "<mark>circle</mark>" in last.teacher
    assert "<mark>square</mark>" in last.hybrid
    assert "They part at word 3" in last.verdict
    assert last.alert == ""
    begun = next(at for at, page in enumerate(pages) if 'data-state="writing"' in page.hybrid)
    assert all('data-state="done"' in page.teacher for page in pages[begun:])


def test_the_text_streams(heard, picture):
    pages = ask(picture, "What is it?", "pocket-25", 64)
    shown = [page.teacher for page in pages if 'data-state="writing"' in page.teacher]
    assert ">a<" in shown[0]
    assert ">a red<" in shown[1]


def test_figures_stand_on_the_card(heard, picture):
    last = ask(picture, "What is it?", "pocket-25", 64)[-1]
    for figure in (
        "200 <span>ms",
        "– <span>tokens/s",
        "270 + 6 <span>tokens",
        "210 <span>KiB",
        "3 <span>KiB",
    ):
        assert figure in last.hybrid


def test_speed_is_shown_where_there_are_tokens_enough():
    vlm = MODELS["pocket"]
    for n, shown in ((7, "– <span>tokens/s"), (8, "50.0 <span>tokens/s")):
        answer = replace(answers_of(vlm)[-1], n_new_tokens=n)
        assert shown in cards.card("Teacher", vlm, answer, "done")


def test_the_card_shows_a_measured_peak_where_there_is_one():
    figures = {
        "text": "a", "n_prompt_tokens": 1, "n_new_tokens": 1, "prefill_ms": 1.0,
        "decode_tokens_per_s": 0.0, "kv_bytes": 0, "ssm_bytes": 0, "weight_bytes": 3 << 20,
    }  # fmt: skip
    held, measured = Answer(**figures), Answer(**figures, peak_bytes=5 << 20)
    assert "<dt>Weights and cache</dt><dd>3.0" in cards._figures(held)
    assert "<dt>Peak</dt><dd>5.0" in cards._figures(measured)


def test_several_pictures_reach_the_models(heard, picture):
    ask(picture * 3, "What differs?", "pocket-25", 64)
    assert [call[1] for call in heard] == [3, 3]


@pytest.mark.parametrize(
    "question, said",
    [
        ("", "The question is empty"),
        ("  \n", "The question is empty"),
        (None, "The question is empty"),
        ("x" * 20_000, "20,000 characters: shorten it to 1,000"),
    ],
    ids=["empty", "blank", "none", "long"],
)
def test_a_bad_question_is_told_and_the_next_one_answered(heard, picture, question, said):
    (page,) = ask(picture, question, "pocket-25", 64)
    assert said in page.alert
    assert heard == []
    assert "They part" in ask(picture, "What is it?", "pocket-25", 64)[-1].verdict


def test_no_picture_and_too_many_are_told(heard, picture):
    assert "There is no picture" in ask(None, "What?", "pocket-25", 64)[0].alert
    assert "There is no picture" in ask([], "What?", "pocket-25", 64)[0].alert
    assert "5 pictures are too many" in ask(picture * 5, "What?", "pocket-25", 64)[0].alert


def test_an_unknown_model_is_told(heard, picture):
    loading, page = ask(picture, "What?", "pocket-99", 64)
    assert 'data-state="loading"' in loading.hybrid
    assert 'data-state="stopped"' in page.hybrid
    assert "no model called &#x27;pocket-99&#x27;" in page.alert
    *_, chosen = handlers.choose_hybrid("pocket-99", "the card before")
    assert "no model called" in chosen.alert
    assert chosen.hybrid == "the card before"


def test_an_error_of_the_model_leaves_the_page_alive(heard, picture, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("out of memory")
        yield

    with monkeypatch.context() as patched:
        patched.setattr(handlers, "stream_answer", broken)
        assert "out of memory" in ask(picture, "What?", "pocket-25", 64)[-1].alert
    assert ask(picture, "What?", "pocket-25", 64)[-1].verdict


def test_a_model_is_loaded_once(heard, picture, monkeypatch):
    loads = []
    once = models.load
    monkeypatch.setattr(
        models, "load", lambda name, device: loads.append(name) or once(name, device=device)
    )
    for _ in range(2):
        ask(picture, "What?", "pocket-25", 64)
    assert loads == ["pocket", "pocket-25"]


def press_stop(who):
    handlers.stop(types.SimpleNamespace(session_hash=who))


def test_stop_marks_only_what_was_not_finished(heard, picture):
    pages = handlers.ask(picture, "What is it?", "pocket-25", 64, who="me")
    page = next(page for page in pages if 'data-state="writing"' in page.hybrid)
    press_stop("another")
    press_stop("me")
    (last,) = pages
    assert last.teacher == page.teacher
    assert 'data-state="stopped"' in last.hybrid
    assert '<span class="state">stopped</span>' in last.hybrid
    assert last.alert == ""
    assert not handlers.turn.taken()
    assert ask(picture, "What is it?", "pocket-25", 64, who="me")[-1].verdict


def test_another_example_ends_what_is_answered_and_leaves_nothing_of_it(heard, picture):
    pages = handlers.ask(picture, "What is it?", "pocket-25", 64, who="me")
    next(page for page in pages if 'data-state="writing"' in page.hybrid)
    rest = []
    reader = threading.Timer(0.1, lambda: rest.extend(pages))
    reader.start()
    page = handlers.clear("pocket", "pocket-25", "cpu", "me")
    reader.join()
    assert rest == []
    assert not handlers.turn.taken()
    assert 'data-state="idle"' in page.teacher
    assert 'data-state="idle"' in page.hybrid
    assert (page.alert, page.verdict) == ("", "")
    assert handlers.clear("pocket", "pocket-99", "cpu", "me").hybrid == gr.skip()


def test_a_question_that_waits_says_so_and_can_be_stopped(heard, picture):
    ask(picture, "What is it?", "pocket-25", 64)  # the models are there now
    before = handlers.ask(picture, "What is it?", "pocket-25", 64, who="before")
    next(before)
    pages = handlers.ask(picture, "What is it?", "pocket-25", 64, who="me")
    waiting = next(pages)
    assert "yours waits for its turn" in waiting.alert
    assert 'data-state="next"' in waiting.teacher
    threading.Timer(0.1, press_stop, ["me"]).start()
    (last,) = pages
    assert 'data-state="stopped"' in last.teacher
    assert list(before)[-1].verdict


def test_who_came_first_is_served_first():
    line, served = turn.Turn(), []
    first = line.take(iter("ab"))
    next(first)
    threads = []
    for name in "123":
        threads.append(threading.Thread(target=lambda n=name: served.extend(line.take(iter([n])))))
        threads[-1].start()
        while len(line._line) < len(threads) + 1:
            time.sleep(0.001)
    assert list(first) == ["b"]
    for thread in threads:
        thread.join(10)
    assert served == ["1", "2", "3"]


def test_an_error_amid_an_answer_stops_its_card(heard, picture, monkeypatch):
    def breaks_off(vlm, *args, **kwargs):
        yield answers_of(vlm)[0]
        raise RuntimeError("out of memory")

    monkeypatch.setattr(handlers, "stream_answer", breaks_off)
    last = ask(picture, "What?", "pocket-25", 64)[-1]
    assert "out of memory" in last.alert
    assert 'data-state="stopped"' in last.teacher
    assert 'data-state="stopped"' in last.hybrid


def test_choosing_a_hybrid_says_that_it_is_loaded_and_draws_it(heard):
    loading, page = handlers.choose_hybrid("pocket-25", "the card before")
    assert 'data-state="loading"' in loading.hybrid
    assert "<h2>pocket-25</h2>" in loading.hybrid
    assert loading.hybrid.count("<i>&nbsp;</i>") == 16
    assert len(list(handlers.choose_hybrid("pocket-25", ""))) == 1
    assert "12 attention layers, 4 Mamba-2" in page.hybrid
    assert page.hybrid.count('class="mamba"') == 4


# One engine a model


@pytest.fixture
def pair(monkeypatch):
    """A tiny teacher and its hybrid, whose answers never end by themselves, for the app to load."""
    vlms = {}
    for name, layers in (("teacher", None), ("hybrid", (0, 2))):
        vlm = replace(tiny.vlm(layers), name=name)
        vlm.model.generation_config.eos_token_id = vlm.tokenizer.eos_token = None
        vlms[name] = vlm
    monkeypatch.setattr(models, "load", lambda name, *, device: vlms[name])
    handlers.models.clear()
    yield vlms
    handlers.models.clear()


def said(picture, question, n=12):
    last = ask(picture, question, "hybrid", n, teacher="teacher")[-1]
    assert last.alert == ""
    return [answer_on(card) for card in (last.teacher, last.hybrid)]


def answer_on(card: str) -> str:
    text = card.partition('<div class="answer">')[2].partition("</div>")[0]
    return text.replace("<mark>", "").replace("</mark>", "")


def plainly(pair, picture, question, n=12):
    image = read_picture(picture[0][0])
    lasts = [list(stream_answer(v, [image], question, max_new_tokens=n))[-1] for v in pair.values()]
    return [cards._answer_text(last.text, "done", None) for last in lasts]


def test_answers_are_those_of_plain_greedy_decoding(pair, picture):
    for question in ("which colour is the bar?", "how many?"):
        assert said(picture, question) == plainly(pair, picture, question)


def test_an_engine_is_made_once_and_grows_for_a_longer_answer(pair, picture, monkeypatch):
    made, once = [], models.Engine
    monkeypatch.setattr(models, "Engine", lambda *args: made.append(args) or once(*args))
    monkeypatch.setattr(models, "ROOM", 16)
    assert said(picture, "how many?", 240) == plainly(pair, picture, "how many?", 240)
    engines = [handlers.models.get(name, "cpu").engine for name in pair]
    said(picture, "which colour?")
    assert [handlers.models.get(name, "cpu").engine for name in pair] == engines
    assert [vlm.name for vlm, _ in made] == ["teacher", "hybrid"]
    assert len({mode for _, mode in made}) == 1


def test_two_who_ask_at_once_both_get_their_own_answers(pair, picture):
    questions = ["which colour is the bar?", "how many?"] * 2
    heard = [None] * len(questions)

    def go(at):
        heard[at] = said(picture, questions[at], 24)

    threads = [threading.Thread(target=go, args=(at,)) for at in range(len(questions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert heard == [plainly(pair, picture, question, 24) for question in questions]


def test_a_question_that_was_broken_off_makes_room_for_the_next(pair, picture):
    pages = handlers.ask(picture, "how many?", "hybrid", 40, teacher="teacher")
    next(page for page in pages if 'data-state="writing"' in page.teacher)
    assert handlers.turn.taken()
    pages.close()  # as Gradio does for a stop, and for a page that was closed
    assert not handlers.turn.taken()
    assert said(picture, "which colour?") == plainly(pair, picture, "which colour?")


def test_a_question_that_nobody_goes_on_with_loses_its_turn(pair, picture, monkeypatch):
    monkeypatch.setattr(turn, "GIVEN_UP", 0.1)
    pages = handlers.ask(picture, "how many?", "hybrid", 40, teacher="teacher")
    next(page for page in pages if 'data-state="writing"' in page.teacher)
    assert said(picture, "which colour?") == plainly(pair, picture, "which colour?")
    assert list(pages) == []  # it does not come back into another's cache


@pytest.mark.parametrize("without", ["teacher", "hybrid"])
def test_without_an_engine_for_one_the_other_goes_without(pair, picture, monkeypatch, without):
    used, once = [], handlers.stream_answer

    def stream(vlm, *args, engine, **options):
        used.append(engine)
        return once(vlm, *args, engine=engine, **options)

    def fails(vlm, mode):
        if vlm.name == without:
            raise RuntimeError("no kernel for this")
        return Engine(vlm, mode)

    monkeypatch.setattr(handlers, "stream_answer", stream)
    monkeypatch.setattr(models, "Engine", fails)
    assert said(picture, "how many?") == plainly(pair, picture, "how many?")
    assert used == [None, None]
    last = ask(picture, "how many?", "hybrid", 3, teacher="teacher")[-1]
    assert f"without an engine ({without}: its engine could not be made: no kernel" in last.verdict


def test_a_family_without_records_goes_without_an_engine():
    model = tiny.language_model("llama")
    model.config.rope_parameters["rope_type"] = "dynamic"
    ready = models.make_ready(VLM("own", model, tiny.tokenizer()))
    assert ready.engine is None
    assert "depends on the length" in ready.why_not


def test_what_the_engines_set_aside_is_said_beside_what_is_filled(pair, picture):
    last = ask(picture, "how many?", "hybrid", 3, teacher="teacher")[-1]
    room = sum(handlers.models.get("teacher", "cpu").engine.bytes_reserved())
    assert f"{room / 1024:,.0f}&nbsp;KiB for the teacher" in last.verdict
    answer = next(stream_answer(pair["teacher"], [], "how many?"))
    assert answer.reserved_bytes is None
    engine = handlers.models.get("teacher", "cpu").engine
    answer = next(stream_answer(pair["teacher"], [], "how many?", engine=engine))
    assert answer.reserved_bytes == room > answer.cache_bytes


def test_hybrids_do_not_pile_up(monkeypatch):
    loads = []
    monkeypatch.setattr(models, "load", lambda name, *, device: loads.append(name) or name)
    monkeypatch.setattr(models, "make_ready", lambda vlm: models.Ready(vlm, None))
    monkeypatch.setattr(models, "_weight_bytes", lambda vlm: 100)
    shelf = models.Models(largest=300)
    for hybrid in ("a", "b", "c"):
        shelf.get("teacher", "cpu")
        shelf.get(hybrid, "cpu")
    assert loads == ["teacher", "a", "b", "c"]
    assert [name for name in ("teacher", "a", "b", "c") if shelf.holds(name, "cpu")] == [
        "teacher", "b", "c",
    ]  # fmt: skip
    small = models.Models(largest=0)
    small.get("teacher", "cpu")
    small.get("a", "cpu")
    assert small.holds("teacher", "cpu")


# A teacher that reads text only


def test_a_language_model_is_asked_without_pictures(heard, picture):
    for frame in (None, [], picture):
        pages = ask(frame, "What is it?", "smollm2-135m-25", 200, teacher="smollm2-135m")
        assert "They part at word 2" in pages[-1].verdict
    assert heard[0] == ("smollm2-135m", 0, "What is it?", 200)
    assert {call[1] for call in heard} == {0}


def test_lines_of_an_answer_stay_lines():
    answer = replace(answers_of(MODELS["pocket"])[0], text="one\n\ntwo three\n")
    drawn = cards.card("Hybrid", MODELS["pocket-25"], answer, "done", parts_at=2)
    assert "one\n\ntwo <mark>three</mark></div>" in drawn


def test_its_page_has_no_frame_and_text_for_examples(heard):
    app = build_app(teacher="smollm2-135m", hybrid="smollm2-135m-25")
    gallery = next(b for b in app.blocks.values() if isinstance(b, gr.Gallery))
    assert not gallery.visible
    buttons = [b for b in app.blocks.values() if isinstance(b, gr.Button)]
    assert {"story", "code"} <= {button.value for button in buttons}
    chosen = next(b for b in app.blocks.values() if isinstance(b, gr.Radio))
    assert chosen.value == "smollm2-135m-25"
    assert "smollm2-135m-25" in [value for _, value in chosen.choices]
    longest = next(b for b in app.blocks.values() if isinstance(b, gr.Slider))
    assert longest.value == 200
    assert not any("pocket" in str(b.value) for b in app.blocks.values() if isinstance(b, gr.HTML))
    _, question = handlers.show_example(2, False)
    assert "story" in question


# The frame


def test_bad_uploads_are_named_and_good_ones_kept(picture, tmp_path, monkeypatch):
    monkeypatch.setattr(handlers, "is_example", lambda image: False)
    bad = tmp_path / "letter.png"
    bad.write_text("Dear reader")
    gallery, alert = handlers.take_pictures([*picture, (str(bad), None)])
    assert len(gallery.value) == 1
    assert "letter.png&#x27; is not a picture" in alert


def test_more_than_four_pictures_are_cut(picture, monkeypatch):
    monkeypatch.setattr(handlers, "is_example", lambda image: False)
    _, alert = handlers.take_pictures(picture * 6)
    assert "6 pictures are too many: the first 4 were kept" in alert


def test_a_picture_of_ones_own_takes_the_place_of_an_example(picture, tmp_path, monkeypatch):
    example = tmp_path / "example.png"
    Image.new("RGB", (8, 8), "red").save(example)
    monkeypatch.setattr(handlers, "is_example", lambda image: image.size == (8, 8))
    kept = []
    monkeypatch.setattr(handlers, "frame", lambda images: kept.append([i.size for i in images]))
    handlers.take_pictures([(str(example), None), *picture])
    handlers.take_pictures([(str(example), None)])
    assert kept == [[(60, 40)], [(8, 8)]]


# Reading pictures


def save(image: Image.Image, path, **options):
    image.save(path, **options)
    return path


def test_transparency_lies_on_white(tmp_path):
    clear = Image.new("RGBA", (9, 7), (255, 0, 0, 0))
    assert read_picture(save(clear, tmp_path / "a.png")).getpixel((0, 0)) == (255, 255, 255)
    grey = Image.new("LA", (9, 7), (0, 0))
    assert read_picture(save(grey, tmp_path / "b.png")).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (9, 7), 3)
    palette.putpalette([0] * 768)
    path = save(palette, tmp_path / "c.png", transparency=3)
    assert read_picture(path).getpixel((0, 0)) == (255, 255, 255)


def test_other_modes_become_rgb(tmp_path):
    for mode, name, colour in [
        ("CMYK", "a.jpg", (0, 255, 255, 0)),
        ("CMYK", "b.tif", (0, 255, 255, 0)),
        ("P", "c.gif", None),
        ("1", "d.png", 1),
        ("L", "e.bmp", 200),
    ]:
        image = (
            Image.new("RGB", (9, 7), "red").convert("P")
            if mode == "P"
            else Image.new(mode, (9, 7), colour)
        )
        read = read_picture(save(image, tmp_path / name))
        assert (read.mode, read.size) == ("RGB", (9, 7))
        if mode in ("CMYK", "P"):
            red, green, blue = read.getpixel((4, 3))
            assert red > 180
            assert max(green, blue) < 90


def test_sixteen_bits_keep_their_shades(tmp_path):
    ramp = np.linspace(0, 65535, 63 * 5).reshape(5, 63).astype(np.uint16)
    read = np.asarray(read_picture(save(Image.fromarray(ramp), tmp_path / "a.png")))
    np.testing.assert_array_equal(read[..., 0], ramp >> 8)
    floats = read_picture(save(Image.fromarray(ramp.astype(np.float32) / 7), tmp_path / "b.tif"))
    assert np.asarray(floats)[..., 0].std() > 60


def test_a_turned_photograph_stands_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(Image.new("RGB", (40, 20), "navy"), tmp_path / "a.jpg", exif=exif)
    assert read_picture(path).size == (20, 40)


def test_an_animation_gives_its_first_frame_and_says_so(tmp_path):
    frames = [Image.new("RGB", (30, 20), colour) for colour in ("red", "blue", "lime")]
    path = save(frames[0], tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    read = read_picture(path)
    assert read.getpixel((5, 5)) == (255, 0, 0)
    assert "3 frames" in read.info["note"]


def test_forty_megapixels_are_taken_and_made_small(tmp_path):
    large = Image.new("RGB", (8000, 5000), "olive")
    for name in ("a.png", "b.jpg"):
        read = read_picture(save(large, tmp_path / name))
        assert max(read.size) <= MAX_SIDE
        assert read.size[0] / read.size[1] == pytest.approx(1.6, rel=0.01)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(11_000, 10_000), (30_000, 20_000)], ids=["110 MP", "600 MP"])
def test_more_than_a_hundred_megapixels_are_refused(tmp_path, size):
    path = save(Image.new("1", size), tmp_path / "wall.png")
    with pytest.raises(WorkbenchError, match="more than 100 million pixels: scale it down"):
        read_picture(path)


def test_what_is_not_a_picture_is_told(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    nothing = tmp_path / "empty.png"
    nothing.touch()
    for path in (text, nothing):
        with pytest.raises(WorkbenchError, match="is not a picture: choose a PNG"):
            read_picture(path)
    with pytest.raises(WorkbenchError, match="no longer there"):
        read_picture(tmp_path / "gone.png")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.webp", "a.tif"])
def test_a_broken_picture_is_told(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    path = save(Image.fromarray(noise), tmp_path / name)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(WorkbenchError, match="damaged|not a picture"):
        read_picture(path)


# The page and its pieces


def test_text_of_a_model_is_never_markup():
    answer = replace(answers_of(MODELS["pocket"])[0], text="<script>alert(1)</script> & more")
    assert "<script>" not in cards.card("Teacher", MODELS["pocket"], answer, "done")
    assert "<script>" not in cards.verdict([answer], [replace(answer, text="<b>")])
    assert "<b>" not in cards.alert(["<b>"])


def test_caches_are_compared_after_the_same_number_of_tokens():
    def after(n_tokens, kv, ssm):
        return Answer("a", 10, n_tokens, 1.0, 1.0, kv * 1024, ssm * 1024, 0)

    teacher = [after(n, 10 * n, 0) for n in (1, 2, 3)]
    hybrid = [after(n, 5 * n, 3) for n in (1, 2, 3, 4, 5, 6)]
    said = cards.verdict(teacher, hybrid)
    assert "same 13 tokens" in said
    assert "holds 18&nbsp;KiB, the teacher's 30&nbsp;KiB: 40% smaller" in said
    assert "20% larger" not in said


@pytest.mark.parametrize(
    "first, second, at",
    [("a b", "a b", None), ("a b", "a c", 1), ("a", "a b", 1), ("", "a", 0), ("", "", None)],
)
def test_parting_word(first, second, at):
    assert cards.parting_word(first, second) == at


def test_figures_keep_their_colours():
    streams = {name: answers_of(MODELS[name]) for name in ("pocket", "pocket-25")}
    drawn = figures.cache_figure(streams)
    measured = [trace for trace in drawn.data if trace.showlegend is not False]
    assert [trace.line.color for trace in measured] == [figures.TEACHER, figures.HYBRID]
    assert list(measured[1].y) == pytest.approx([208, 209, 210, 211, 212, 213])
    furthest = [max(figures.cache_figure(streams, longest=n).data[1].x) for n in (300, 5)]
    assert furthest == [300, 276]  # no further than the models go, nor back
    one_token = figures.cache_figure({name: stream[:1] for name, stream in streams.items()})
    assert [trace.mode for trace in one_token.data] == ["markers", "markers"]
    bars = figures.stack_figure(MODELS["pocket-25"].plan)
    assert {bar.name: list(bar.x) for bar in bars.data}["Mamba-2"] == [3, 7, 11, 15]


def test_waiting_questions_leave_threads_and_the_page_calls_nobody(heard):
    app = build_app()
    assert isinstance(app, gr.Blocks)
    assert app.title == "MaTVLM Workbench"
    assert not app.analytics_enabled
    asking = next(fn for fn in app.fns.values() if fn.api_name == "ask")
    threads = inspect.signature(app.launch).parameters["max_threads"].default
    assert 1 < asking.concurrency_limit < threads
