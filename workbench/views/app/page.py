"""The page: what stands where, and which function answers which button."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import gradio as gr

from workbench.data import Sample
from workbench.models.prompts import sees
from workbench.models.sources import smollm2
from workbench.models.teacher import POCKET_HYBRIDS, POCKET_TEACHER, VLM
from workbench.views.app import cards
from workbench.views.app.examples import examples, thumbnail
from workbench.views.app.handlers import (
    ask,
    choose_hybrid,
    clear,
    models,
    show_example,
    stop,
    take_pictures,
)

TITLE = "MaTVLM Workbench"

LEDE = """
<header class="lede"><h1>MaTVLM Workbench</h1>
<p>{what}, two models: a teacher that is all attention, and a hybrid made from it
that is partly <span class="whole">Mamba-2</span>.</p></header>
"""
HOW_MEASURED = """
<p class="caption">Each model is measured alone: the teacher answers first, then the hybrid, through
the same code with the same settings, and questions wait in one line for their turn. What is made
once, before the first question, takes no time in these figures; on a CPU an engine also keeps a
second copy of the decoder's weights, which they leave out. Speed is shown from the eighth token
on.</p>
"""
WHAT_POCKET_KNOWS = """
<p class="caption">The pocket models were trained from scratch on drawings that this project
generates, so they know the families of these examples and nothing of photographs. The README has
their scores.</p>
"""
WHAT_SMOLLM2_KNOWS = """
<p class="caption">SmolLM2-135M-Instruct is a real language model, and a very small one: its English
is fluent, its facts are often wrong. Its hybrids are wrong more often, and sooner go round in
circles. None remembers the question before.</p>
"""
ENABLE = "() => ({{__type__: 'update', interactive: {}}})"
LINE = 32  # questions that may wait for their turn, each in one of Gradio's 40 threads
KNOWN = {POCKET_TEACHER: WHAT_POCKET_KNOWS, smollm2.TEACHER: WHAT_SMOLLM2_KNOWS}


class Asking(NamedTuple):
    """The left side of the page."""

    pictures: gr.Gallery
    question: gr.Textbox
    ask: gr.Button
    stop: gr.Button
    chips: list[gr.Button]
    max_new_tokens: gr.Slider


class Answering(NamedTuple):
    """The right side of the page."""

    alert: gr.HTML
    chosen: gr.Radio
    teacher: gr.HTML
    hybrid: gr.HTML
    verdict: gr.HTML
    figure: gr.Plot
    caption: gr.HTML


def build_app(
    *, teacher: str = "pocket", hybrid: str = "pocket-25", device: str = "cpu"
) -> gr.Blocks:
    """Lay out the page and say which function answers which button.

    Args:
        teacher: Name, Hugging Face id or folder of the teacher.
        hybrid: Name or folder of the hybrid that stands beside it at first.
        device: Where both run, such as "cpu" or "cuda".

    Raises:
        WorkbenchError: One of the two cannot be loaded; that is tried here, so that the first
            question need not wait for it.
    """
    pair = models.get(teacher, device).vlm, models.get(hybrid, device).vlm
    seeing = sees(pair[0])
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 86400)) as app:
        gr.HTML(LEDE.format(what="One picture, one question" if seeing else "One question"))
        with gr.Row(elem_id="desk"):
            with gr.Column(scale=4, min_width=320):
                left = _asking(examples(seeing), KNOWN.get(teacher, ""))
            with gr.Column(scale=7, min_width=320):
                right = _answering(pair, teacher, hybrid)
        _wire(left, right, teacher, device, seeing)
    return app


def _asking(samples: tuple[Sample, ...], caption: str) -> Asking:
    """Lay out pictures, question, buttons and examples; the first example stands there already.

    Examples without pictures hide the frame: their model reads text only.
    """
    seeing = bool(samples[0].images)
    pictures = gr.Gallery(
        visible=seeing,
        label="Pictures, one to four",
        value=list(samples[0].images),
        columns=min(len(samples[0].images), 2),
        height=250,
        object_fit="contain",
        format="png",
        interactive=True,
        sources=["upload", "clipboard"],
        file_types=["file"],  # anything may come in, so that a sentence can say what is wrong
        buttons=[],
        elem_id="pictures",
    )
    question = gr.Textbox(
        label="Question",
        value=samples[0].question,
        placeholder="What do you want to know?",
        lines=1,  # with one line, Enter asks
        max_lines=4,
        elem_id="question",
    )
    with gr.Row():
        ask_button = gr.Button("Ask", variant="primary", scale=3, elem_id="ask")
        stop_button = gr.Button("Stop", scale=1, min_width=80, elem_id="stop")
    with gr.Column(elem_id="more"):
        gr.HTML("<h2 class='section'>Examples</h2>")
        with gr.Row(elem_id="examples"):
            chips = [_chip(sample) for sample in samples]
        gr.HTML(caption)
        with gr.Accordion("Options", open=False):
            longest = 128 if seeing else 200
            max_new_tokens = gr.Slider(8, 256, longest, step=8, label="Longest answer, in tokens")
    return Asking(pictures, question, ask_button, stop_button, chips, max_new_tokens)


def _chip(sample: Sample) -> gr.Button:
    """Make a button of an example: its picture, if it has one, over the name of its family."""
    icon = thumbnail(sample) if sample.images else None
    return gr.Button(sample.family, icon=icon, size="sm", min_width=60, elem_classes="chip")


def _answering(pair: tuple[VLM, VLM], teacher: str, chosen: str) -> Answering:
    """Lay out the choice of the hybrid, the two cards and what compares them, top to bottom."""
    return Answering(
        alert=gr.HTML(elem_id="alert"),
        chosen=gr.Radio(
            label="Share of the hybrid's layers that are Mamba-2",
            choices=_choices(teacher, chosen),
            value=chosen,
            elem_id="hybrid",
        ),
        **_two_cards(*pair),
        verdict=gr.HTML(elem_id="verdict"),
        figure=gr.Plot(show_label=False, visible=False, elem_id="figure"),
        caption=gr.HTML(HOW_MEASURED, elem_id="caption"),
    )


def _two_cards(teacher: VLM, hybrid: VLM) -> dict[str, gr.HTML]:
    with gr.Row(elem_id="answers"):
        return dict(
            teacher=gr.HTML(cards.card("Teacher", teacher, None, "idle")),
            hybrid=gr.HTML(cards.card("Hybrid", hybrid, None, "idle")),
        )


def _choices(teacher: str, hybrid: str) -> list[tuple[str, str]]:
    """Label the teacher's own hybrids by their share, and one from elsewhere by its name."""
    shipped = [(f"{name.removeprefix(f'{teacher}-')}%", name) for name in _shipped(teacher)]
    if hybrid in dict(shipped).values():
        return shipped
    return [*shipped, (Path(hybrid).name, hybrid)]


def _shipped(teacher: str) -> list[str]:
    """The hybrids of a teacher whose weights are there."""
    if teacher == smollm2.TEACHER:
        return [n for n, at in smollm2.HYBRIDS.items() if (smollm2.FOLDER / at).is_dir()]
    return list(POCKET_HYBRIDS) if teacher == POCKET_TEACHER else []


def _wire(left: Asking, right: Answering, teacher: str, device: str, seeing: bool) -> None:
    page = [right.alert, right.teacher, right.hybrid, right.verdict, right.figure]
    in_line = dict(concurrency_id="models", concurrency_limit=LINE)
    private = dict(api_visibility="private", show_progress="hidden")
    asked = [left.ask.click, left.question.submit]

    def answer(pictures, question, hybrid, max_new_tokens, request: gr.Request):
        options = dict(teacher=teacher, device=device, who=request.session_hash)
        yield from ask(pictures, question, hybrid, max_new_tokens, **options)

    # The page itself greys the button: it takes no click that would be lost.
    gr.on(asked, None, None, left.ask, js=ENABLE.format("false"), **private)
    asking = gr.on(
        asked,
        answer,
        [left.pictures, left.question, right.chosen, left.max_new_tokens],
        page,
        api_name="ask",
        show_progress_on=right.caption,
        **in_line,
    )
    for ended in (asking.then, asking.failure):
        ended(None, None, left.ask, js=ENABLE.format("true"), **private)
    left.stop.click(stop, queue=False, **private)
    right.chosen.change(stop, queue=False, **private)  # its answer would be the other hybrid's
    right.chosen.change(
        partial(choose_hybrid, teacher=teacher, device=device),
        [right.chosen, right.hybrid],
        page,
        **in_line,
        **private,
    )
    left.pictures.upload(take_pictures, left.pictures, [left.pictures, right.alert], **private)

    def cleared(hybrid, request: gr.Request):
        return clear(teacher, hybrid, device, request.session_hash)

    for at, chip in enumerate(left.chips):
        shown = [left.pictures, left.question]
        chip.click(partial(show_example, at, seeing), None, shown, **private)
        chip.click(cleared, right.chosen, page, queue=False, **private)
