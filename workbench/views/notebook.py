"""What the lessons show that is not a figure: several models answering side by side."""

from collections.abc import Sequence
from html import escape

from IPython.display import display
from PIL import Image

from workbench.models.generation import Answer, stream_answer
from workbench.models.teacher import VLM


def ask(
    models: Sequence[VLM],
    images: Sequence[Image.Image],
    question: str,
    *,
    max_new_tokens: int = 128,
) -> dict[str, list[Answer]]:
    """Ask all models the same, one after the other, in a table that fills while they write.

    Args:
        models: A column each.
        images: None, one or more pictures.
        question: In plain words.
        max_new_tokens: At most so many.

    Returns:
        The model's name to all that `stream_answer` yielded, the last one final; what
        `cache_figure` takes.

    Raises:
        WorkbenchError: As `stream_answer`.
    """
    streams: dict[str, list[Answer]] = {vlm.name: [] for vlm in models}
    shown = display(_table(streams), raw=True, display_id=True)
    for vlm in models:
        for answer in stream_answer(vlm, images, question, max_new_tokens=max_new_tokens):
            streams[vlm.name].append(answer)
            shown.update(_table(streams), raw=True)
    return streams


def _table(streams: dict[str, list[Answer]]) -> dict[str, str]:
    """What there is so far: as HTML, and as text for a page that shows none."""
    latest = {name: stream[-1] for name, stream in streams.items() if stream}
    width = f"{80 // len(streams)}%"
    left = 'style="text-align:left; vertical-align:top; white-space:normal'
    head = "".join(f'<th {left}; width:{width}">{escape(name)}</th>' for name in streams)
    rows = []
    for label in _cells(None):
        cells = (_cells(latest.get(name))[label] for name in streams)
        row = "".join(f'<td {left}">{escape(cell)}</td>' for cell in cells)
        rows.append(f'<tr><th {left}">{label}</th>{row}</tr>')
    table = f'<table style="width:100%"><tr><th></th>{head}</tr>{"".join(rows)}</table>'
    text = "\n".join(f"{name}: {answer}" for name, answer in latest.items())
    return {"text/html": table, "text/plain": text}


def _cells(answer: Answer | None) -> dict[str, str]:
    """The rows of one model's column; empty ones before its first token."""
    if answer is None:
        return dict.fromkeys(("answer", "prefill", "decode", "cache", "weights"), "")
    states = f" + {answer.ssm_bytes / 2**10:,.0f} KiB states" if answer.ssm_bytes else ""
    return {
        "answer": answer.text,
        "prefill": f"{answer.n_prompt_tokens:,} tokens in {answer.prefill_ms:,.0f} ms",
        "decode": f"{answer.n_new_tokens:,} tokens, {answer.decode_tokens_per_s:.1f} tokens/s",
        "cache": f"{answer.kv_bytes / 2**10:,.0f} KiB keys and values{states}",
        "weights": f"{answer.weight_bytes / 2**20:,.1f} MiB",
    }
