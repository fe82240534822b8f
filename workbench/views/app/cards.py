"""The pieces of the page as HTML: an answer card, the verdict under two of them, an alert."""

import re
from collections.abc import Sequence
from html import escape
from itertools import zip_longest
from pathlib import Path

from workbench.models.generation import Answer
from workbench.models.teacher import VLM

STATES = {
    "idle": "",
    "loading": "loading…",
    "next": "next",
    "reading": "reading…",
    "writing": "writing…",
    "done": "done",
    "stopped": "stopped",
}
KIB = 1024
MIB = 1024 * 1024
FEWEST_TOKENS = 8  # whose pace is a speed
LONGEST_WORD = 40  # of a word quoted under the cards
MOST_CELLS = 16  # layers in one row of a stack


def card(
    role: str, vlm: VLM, answer: Answer | None, state: str, parts_at: int | None = None
) -> str:
    """Draw one model: its name, its layers, its answer so far and its figures so far.

    Args:
        role: "Teacher" or "Hybrid".
        vlm: The model.
        answer: What it has said so far, or None before its first token.
        state: A key of `STATES`.
        parts_at: Index of the word from which the two answers differ, to be marked.
    """
    said = _answer_text(answer.text if answer else "", state, parts_at)
    return _framed(role, vlm.name, state, stack(vlm), said, _figures(answer))


def loading(role: str, name: str, like: VLM) -> str:
    """Draw a model that is still being loaded: its name, and room for what will stand there.

    Args:
        role: As for `card`.
        name: Of the model, or its folder.
        like: A model with as many layers: the teacher of a hybrid.
    """
    n_layers = like.model.config.get_text_config().num_hidden_layers
    layers = _stack("<i>&nbsp;</i>" * n_layers, n_layers, "its weights are being read")
    return _framed(role, Path(name).name, "loading", layers, "", _figures(None))


def stopped(card_html: str) -> str:
    """Return an unfinished card as one that was stopped, and a finished one as it is."""
    for state in ("loading", "next", "reading", "writing"):
        card_html = card_html.replace(f'data-state="{state}"', 'data-state="stopped"').replace(
            f'<span class="state">{STATES[state]}</span>',
            f'<span class="state">{STATES["stopped"]}</span>',
        )
    return card_html


def stack(vlm: VLM) -> str:
    """Draw the decoder's layers as numbered cells, the Mamba-2 ones filled."""
    n_layers = vlm.model.config.get_text_config().num_hidden_layers
    mamba = set(vlm.plan.mamba_layers) if vlm.plan else set()
    cells = "".join(
        f'<i class="{"mamba" if layer in mamba else "attention"}" '
        f'title="layer {layer}: {"Mamba-2" if layer in mamba else "attention"}">{layer}</i>'
        for layer in range(n_layers)
    )
    return _stack(cells, n_layers, _layers_sentence(n_layers, sorted(mamba)))


def verdict(teachers: Sequence[Answer], hybrids: Sequence[Answer], why_not: str = "") -> str:
    """Say whether the answers agree, where they part, and how large both caches became.

    Args:
        teachers: The answer after each of its tokens.
        hybrids: Likewise. Caches are compared where the shorter answer ends, since a longer one
            fills more of any cache.
        why_not: There is no engine, if there is none.
    """
    teacher, hybrid = teachers[-1], hybrids[-1]
    at = parting_word(teacher.text, hybrid.text)
    if at is None:
        agreement = "<strong>Both give the same answer</strong>, word for word."
    else:
        agreement = _parting(teacher.text.split(), hybrid.text.split(), at)
    shared = min(len(teachers), len(hybrids))
    cache = _caches(teachers[shared - 1], hybrids[shared - 1])
    how = _how_answered(teacher, hybrid, why_not)
    return (
        f'<div role="status"><p class="verdict">{agreement} {cache}</p>'
        f'<p class="caption">{how}</p></div>'
    )


def parting_word(first: str, second: str) -> int | None:
    """Return the index of the first word in which two texts differ, or None for equal texts."""
    pairs = zip_longest(first.split(), second.split())
    return next((at for at, (a, b) in enumerate(pairs) if a != b), None)


def alert(sentences: list[str], kind: str = "error") -> str:
    """Draw what went wrong, or with kind "note" what to know; no sentences draw nothing."""
    if not sentences:
        return ""
    lines = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)
    return f'<div class="alert {kind}" role="alert">{lines}</div>'


def _framed(role: str, name: str, state: str, layers: str, said: str, figures: str) -> str:
    return (
        f'<article class="card {role.lower()}" data-state="{state}" aria-label="{role}">'
        f'<header><span class="role">{role}</span><h2>{escape(name)}</h2>'
        f'<span class="state">{STATES[state]}</span></header>'
        f'{layers}<div class="answer">{said}</div>{figures}</article>'
    )


def _stack(cells: str, n_layers: int, said: str) -> str:
    n_rows = -(-n_layers // MOST_CELLS)
    columns = f"grid-template-columns: repeat({-(-n_layers // n_rows)}, 1fr)"
    return (
        f'<div class="stack" style="{columns}" role="img" aria-label="{said}">{cells}</div>'
        f'<p class="layers" aria-hidden="true">{said}</p>'
    )


def _layers_sentence(n_layers: int, mamba: list[int]) -> str:
    if not mamba:
        return f"{n_layers} layers, all of them attention"
    if len(mamba) == n_layers:
        return f"{n_layers} layers, all of them Mamba-2"
    return f"{n_layers - len(mamba)} attention layers, {len(mamba)} Mamba-2"


def _answer_text(text: str, state: str, parts_at: int | None) -> str:
    # Words stand at even places, and between them the blanks and new lines that part them.
    pieces = [escape(piece) for piece in re.split(r"(\s+)", text.strip())]
    if parts_at is not None and 2 * parts_at < len(pieces) and pieces[0]:
        pieces[2 * parts_at] = f"<mark>{pieces[2 * parts_at]}</mark>"
    if not pieces[0] and state in ("done", "stopped"):
        return '<span class="quiet">no words</span>'
    return "".join(pieces)


def _parting(teacher: list[str], hybrid: list[str], at: int) -> str:
    start = f"<strong>They part at word {at + 1}</strong>"
    if at >= len(teacher):
        return f"{start}: the teacher ends there, the hybrid goes on."
    if at >= len(hybrid):
        return f"{start}: the hybrid ends there, the teacher goes on."
    said = [escape(words[at][:LONGEST_WORD]) for words in (teacher, hybrid)]
    return f"{start}: the teacher says <mark>{said[0]}</mark>, the hybrid <mark>{said[1]}</mark>."


def _memory(answer: Answer | None) -> tuple[str, str | None, str]:
    """The peak where it can be measured for one model, else what must stand in memory."""
    if answer is not None and answer.peak_bytes is not None:
        return "Peak", f"{answer.peak_bytes / MIB:,.1f}", "MiB"
    held = answer and answer.weight_bytes + answer.cache_bytes
    return "Weights and cache", held and f"{held / MIB:,.1f}", "MiB"


def _caches(teacher: Answer, hybrid: Answer) -> str:
    saved = 1 - hybrid.cache_bytes / teacher.cache_bytes if teacher.cache_bytes else 0.0
    size = "smaller" if saved >= 0 else "larger"
    n_tokens = teacher.n_prompt_tokens + teacher.n_new_tokens
    return (
        f"After the same {n_tokens:,} tokens the hybrid's cache holds "
        f"{hybrid.cache_bytes / KIB:,.0f}&nbsp;KiB, the teacher's "
        f"{teacher.cache_bytes / KIB:,.0f}&nbsp;KiB: {abs(saved):.0%} {size}."
    )


def _how_answered(teacher: Answer, hybrid: Answer, why_not: str) -> str:
    if why_not:
        return f"Both answered through their own forward, without an engine ({escape(why_not)})."
    rooms = [answer.reserved_bytes for answer in (teacher, hybrid)]
    if None in rooms:
        return ""
    sizes = [f"{room / KIB:,.0f}&nbsp;KiB" for room in rooms]
    return (
        "The engines have set aside room, for the longest question so far or more, of which the "
        "figures count what is filled: "
        f"{sizes[0]} for the teacher, {sizes[1]} for the hybrid."
    )


def _figures(answer: Answer | None) -> str:
    """Lay out the figures as a list of terms; a dash stands where there is none yet."""
    rows = [
        ("First token", answer and f"{answer.prefill_ms:,.0f}", "ms"),
        (
            "Speed",
            answer
            and answer.n_new_tokens >= FEWEST_TOKENS
            and f"{answer.decode_tokens_per_s:,.1f}",
            "tokens/s",
        ),
        (
            "Prompt + answer",
            answer and f"{answer.n_prompt_tokens:,} + {answer.n_new_tokens:,}",
            "tokens",
        ),
        ("Keys, values", answer and f"{answer.kv_bytes / KIB:,.0f}", "KiB"),
        ("States", answer and f"{answer.ssm_bytes / KIB:,.0f}", "KiB"),
        ("Weights", answer and f"{answer.weight_bytes / MIB:,.1f}", "MiB"),
        _memory(answer),
    ]
    items = "".join(
        f"<div><dt>{name}</dt><dd>{value or '–'} <span>{unit}</span></dd></div>"
        for name, value, unit in rows
    )
    return f'<dl class="figures">{items}</dl>'
