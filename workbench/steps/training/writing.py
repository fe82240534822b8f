"""A conversation as the text that a model trains on."""

from __future__ import annotations

from workbench.data import Sample
from workbench.models.generation import end_tokens
from workbench.models.prompts import build_prompt
from workbench.models.teacher import VLM


def write_conversation(vlm: VLM, sample: Sample) -> tuple[str, list[tuple[int, int]]]:
    """Write every turn of a sample, by the model's chat template where it has one.

    Returns:
        The text, and where in it the answers stand: first and last character of each, the token
        that ends it included.
    """
    end, spans = _end_of_answer(vlm), []
    text, answer = build_prompt(vlm, len(sample.images), sample.question), sample.answer
    for question, following in (*sample.more, (None, "")):
        start = len(text)
        text += f"{answer}{end}" if text[-1].isspace() else f" {answer}{end}"
        spans.append((start, len(text)))
        if question is not None:
            text, answer = text + _after_answer(vlm, question).removeprefix(end), following
    return text, spans


def _end_of_answer(vlm: VLM) -> str:
    """Tell the token that ends an answer; "" where the tokenizer has none.

    Some templates end a turn by a token of their own, at which the model stops, too: Gemma's
    <end_of_turn> is not its <eos>.
    """
    tokenizer = vlm.tokenizer
    others = sorted(end_tokens(vlm) - {tokenizer.eos_token_id})
    follows = _after_answer(vlm, "?") if others else ""
    for token in tokenizer.convert_ids_to_tokens(others):
        if token and follows.startswith(token):
            return token
    return tokenizer.eos_token or ""


def _after_answer(vlm: VLM, question: str) -> str:
    """Write what follows an answer when the conversation goes on, the end of its turn first."""
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
    return written.rpartition(mark)[2].lstrip(" ")
