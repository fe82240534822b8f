"""What the buttons do: plain functions from what stands in the page to what shall stand there."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice
from time import monotonic
from typing import NamedTuple

import gradio as gr
import torch

from workbench.errors import WorkbenchError
from workbench.models.generation import Answer, stream_answer
from workbench.models.prompts import position_limit, sees
from workbench.models.teacher import VLM
from workbench.views.app import cards
from workbench.views.app.examples import examples, is_example
from workbench.views.app.models import Models, Ready, alike
from workbench.views.app.pictures import read_picture
from workbench.views.app.turn import Stopped, Turn
from workbench.views.figures import cache_figure

MAX_PICTURES = 4
MAX_QUESTION = 1000
SECONDS_BETWEEN_UPDATES = 0.25  # drawing the page takes time from the model that answers

log = logging.getLogger(__name__)
models = Models()
turn = Turn()


class Answers(NamedTuple):
    """The right-hand side of the page, in the order of its components."""

    alert: str
    teacher: str
    hybrid: str
    verdict: str
    figure: gr.Plot | dict


def ask(
    pictures: list[tuple[str, str | None]] | None,
    question: str,
    hybrid: str,
    max_new_tokens: int,
    *,
    teacher: str = "pocket",
    device: str = "cpu",
    who: str | None = None,
) -> Iterator[Answers]:
    """Ask the teacher, then the hybrid, and yield the page as it fills.

    Args:
        pictures: (path, caption) of one to four files, as gr.Gallery gives them; a teacher that
            reads text only is shown none.
        question: What is asked about them.
        hybrid: Name of the hybrid.
        max_new_tokens: Where an answer is cut off.
        teacher: Name of the teacher.
        device: Where both run.
        who: Asks, and may `stop` it.
    """
    shown = None
    try:
        first = models.get(teacher, device)
        images, notes = read_all(pictures) if sees(first.vlm) else ([], [])
        question, alert = checked(question), cards.alert(notes, "note")
        if not models.holds(hybrid, device):
            shown = _loading(first.vlm, hybrid)
            yield shown
        elif turn.taken():
            shown = _waiting(first.vlm, models.get(hybrid, device).vlm)
            yield shown
        answering = _both_answers(
            (teacher, hybrid), device, images, question, int(max_new_tokens), alert
        )
        for shown in turn.take(answering, who):
            yield shown
    except Stopped as stopped:
        if not stopped.quietly:
            yield _broken_off(shown, "")
    except Exception as error:  # whatever it was, the page must stay and take the next question
        yield _broken_off(shown, cards.alert([_told(error)]))


def _broken_off(shown: Answers | None, alert: str) -> Answers:
    """Say on the cards that stand there that they were stopped."""
    keep = gr.skip()
    both = [cards.stopped(card) for card in (shown.teacher, shown.hybrid)] if shown else [keep] * 2
    return Answers(alert, *both, keep, keep)


def _told(error: Exception) -> str:
    if isinstance(error, WorkbenchError):
        return str(error)
    log.error("A question could not be answered", exc_info=error)
    return f"The model stopped with an error of its own ({error}). Ask again, or ask differently."


def _waiting(teacher: VLM, hybrid: VLM) -> Answers:
    said = cards.alert(["Another question is being answered: yours waits for its turn."], "note")
    both = cards.card("Teacher", teacher, None, "next"), cards.card("Hybrid", hybrid, None, "next")
    return Answers(said, *both, "", _no_figure())


def _loading(teacher: VLM, hybrid: str) -> Answers:
    waiting = cards.card("Teacher", teacher, None, "next")
    return Answers("", waiting, cards.loading("Hybrid", hybrid, teacher), "", _no_figure())


def _both_answers(
    names: tuple[str, str],
    device: str,
    images: list,
    question: str,
    max_new_tokens: int,
    alert: str,
) -> Iterator[Answers]:
    """Let one model finish before the other begins, so that each has the machine for itself."""
    pair = alike(*(models.get(name, device) for name in names))
    teacher, hybrid = (ready.vlm for ready in pair)
    waiting = cards.card("Hybrid", hybrid, None, "next")
    no_figure = _no_figure()
    yield Answers(alert, cards.card("Teacher", teacher, None, "reading"), waiting, "", no_figure)
    of_teacher: list[Answer] = []
    for shown in _stream("Teacher", pair[0], images, question, max_new_tokens, of_teacher):
        yield Answers(alert, shown, waiting, "", no_figure)
    finished = cards.card("Teacher", teacher, of_teacher[-1], "done")
    yield Answers(alert, finished, cards.card("Hybrid", hybrid, None, "reading"), "", no_figure)
    of_hybrid: list[Answer] = []
    for shown in _stream("Hybrid", pair[1], images, question, max_new_tokens, of_hybrid):
        yield Answers(alert, finished, shown, "", no_figure)
    at = cards.parting_word(of_teacher[-1].text, of_hybrid[-1].text)
    last = Answers(
        alert,
        cards.card("Teacher", teacher, of_teacher[-1], "done", at),
        cards.card("Hybrid", hybrid, of_hybrid[-1], "done", at),
        cards.verdict(of_teacher, of_hybrid, pair[0].why_not),
        no_figure,
    )
    yield last
    longest = min(position_limit(vlm) for vlm in (teacher, hybrid))
    figure = cache_figure({teacher.name: of_teacher, hybrid.name: of_hybrid}, longest=longest)
    yield last._replace(figure=gr.Plot(value=figure, visible=True))  # words need not wait for it


def _stream(
    role: str, ready: Ready, images: list, question: str, max_new_tokens: int, heard: list[Answer]
) -> Iterator[str]:
    """Yield the card of one model as it answers, and put every answer so far into `heard`."""
    vlm, shown_at = ready.vlm, 0.0
    answers = stream_answer(
        vlm, images, question, max_new_tokens=max_new_tokens, engine=ready.engine
    )
    with _every_core():  # while a prompt is read there is nothing for the browser to draw
        first = list(islice(answers, 1))
    for answer in chain(first, answers):
        heard.append(answer)
        if monotonic() - shown_at > SECONDS_BETWEEN_UPDATES:
            yield cards.card(role, vlm, answer, "writing")
            shown_at = monotonic()
    if not heard:
        raise WorkbenchError(f"'{vlm.name}' gave no answer at all: ask differently.")


@contextmanager
def _every_core() -> Iterator[None]:
    """Let torch have the core that `app.py` keeps free for the browser."""
    few = torch.get_num_threads()
    torch.set_num_threads(min(few + 1, os.cpu_count() or 1))
    try:
        yield
    finally:
        torch.set_num_threads(few)


def read_all(pictures: list[tuple[str, str | None]] | None) -> tuple[list, list[str]]:
    """Read one to four pictures; return them and what is to be said about them.

    Raises:
        WorkbenchError: None, too many, or one that cannot be read.
    """
    if not pictures:
        raise WorkbenchError("There is no picture: drop one into the frame, or choose an example.")
    if len(pictures) > MAX_PICTURES:
        raise WorkbenchError(
            f"{len(pictures)} pictures are too many: ask about {MAX_PICTURES} at most."
        )
    images = [read_picture(path) for path, _ in pictures]
    return images, [image.info["note"] for image in images if "note" in image.info]


def checked(question: str) -> str:
    """Return the question without outer blanks.

    Raises:
        WorkbenchError: It is empty, or longer than `MAX_QUESTION`.
    """
    question = (question or "").strip()
    if not question:
        raise WorkbenchError("The question is empty: type one, or choose an example.")
    if len(question) > MAX_QUESTION:
        raise WorkbenchError(
            f"The question has {len(question):,} characters: shorten it to {MAX_QUESTION:,}."
        )
    return question


def take_pictures(pictures: list[tuple[str, str | None]] | None) -> tuple[gr.Gallery, str]:
    """Look at what was put into the frame: keep what is a picture, made small, name the rest.

    A picture of one's own takes the place of an example; further ones are put beside it.
    """
    images, wrong = [], []
    for path, _ in pictures or []:
        try:
            images.append(read_picture(path))
        except WorkbenchError as error:
            wrong.append(str(error))
    images = [image for image in images if not is_example(image)] or images
    if len(images) > MAX_PICTURES:
        wrong.append(f"{len(images)} pictures are too many: the first {MAX_PICTURES} were kept.")
        images = images[:MAX_PICTURES]
    notes = [image.info["note"] for image in images if "note" in image.info]
    return frame(images), cards.alert(wrong) + cards.alert(notes, "note")


def frame(images: list) -> gr.Gallery:
    """Fill the frame: one picture large, several beside each other."""
    return gr.Gallery(value=images, columns=1 if len(images) < 2 else 2)


def show_example(at: int, pictures: bool = True) -> tuple[gr.Gallery, str]:
    """Fill the frame and the question box by an example."""
    sample = examples(pictures)[at]
    return frame(list(sample.images)), sample.question


def clear(teacher: str, hybrid: str, device: str, who: str | None) -> Answers:
    """Show both models unasked: what they said was about something else.

    Args:
        teacher: Name of the teacher, which is there already.
        hybrid: Name of the hybrid, whose card stays while its weights are being read.
        device: Where both run.
        who: Whose question ends, if one is being answered.
    """
    turn.end(who)
    idle = [gr.skip(), gr.skip()]
    for at, (role, name) in enumerate((("Teacher", teacher), ("Hybrid", hybrid))):
        if models.holds(name, device):
            idle[at] = cards.card(role, models.get(name, device).vlm, None, "idle")
    return Answers("", *idle, "", _no_figure())


def choose_hybrid(
    name: str, shown: str, *, teacher: str = "pocket", device: str = "cpu"
) -> Iterator[Answers]:
    """Show another hybrid, unasked as yet; the teacher's answer stays.

    Args:
        name: Of the hybrid.
        shown: The card that stands there, and stays if there is no such hybrid.
        teacher: Whose hybrid it is.
        device: Where both run.
    """
    keep = gr.skip()
    try:
        if not models.holds(name, device):
            card = cards.loading("Hybrid", name, models.get(teacher, device).vlm)
            yield Answers("", keep, card, "", _no_figure())
        yield from turn.take(_idle(name, device))
    except Exception as error:
        yield Answers(cards.alert([_told(error)]), keep, shown, keep, keep)


def _idle(name: str, device: str) -> Iterator[Answers]:
    card = cards.card("Hybrid", models.get(name, device).vlm, None, "idle")
    yield Answers("", gr.skip(), card, "", _no_figure())


def _no_figure() -> gr.Plot:
    return gr.Plot(value=None, visible=False)


def stop(request: gr.Request) -> None:
    """Stop what this page has asked, within a token; `ask` then says so on its cards."""
    turn.stop(request.session_hash)
