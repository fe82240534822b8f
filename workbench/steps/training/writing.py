"""A conversation as the text that a model trains on."""

from __future__ import annotations

from workbench.data import Sample
from workbench.models.prompts import build_prompt
from workbench.models.teacher import VLM


def write_conversation(vlm: VLM, sample: Sample) -> tuple[str, list[tuple[int, int]]]:
    """Write every turn of a sample, by the model's chat template where it has one.

    Returns:
        The text, and where in it the answers stand: first and last character of each, its
        end-of-sequence token included.
    """
    eos, spans = vlm.tokenizer.eos_token, []
    text, answer = build_prompt(vlm, len(sample.images), sample.question), sample.answer
    for question, following in (*sample.more, (None, "")):
        start = len(text)
        text += f"{answer}{eos}" if text[-1].isspace() else f" {answer}{eos}"
        spans.append((start, len(text)))
        if question is not None:
            text, answer = text + _next_question(vlm, question), following
    return text, spans


def _next_question(vlm: VLM, question: str) -> str:
    """Write what follows an answer and its end token when the conversation goes on."""
    sees = hasattr(vlm.processor, "image_processor") and bool(vlm.processor.chat_template)
    writer = vlm.processor if sees else vlm.tokenizer
    if not writer.chat_template:
        return f"USER: {question} ASSISTANT:"
    # What a template says between an answer and the next: all that follows the mark.
    mark, turns = "(an answer)", ("user", "assistant", "user")
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}] if sees else text}
        for role, text in zip(turns, ("?", mark, question), strict=True)
    ]
    written = writer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return written.rpartition(mark)[2].lstrip(" ").removeprefix(vlm.tokenizer.eos_token)
