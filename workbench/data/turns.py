"""Conversations as LLaVA writes them down: a list of turns from "human" and "gpt"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from workbench.errors import WorkbenchError

IMAGE = "<image>"
ASKS, ANSWERS = ("human", "user"), ("gpt", "assistant")


def read_turns(conversation: object) -> tuple[tuple[str, str], ...]:
    """Pairs of question and answer; a question that nobody answered ends the conversation.

    Args:
        conversation: a list of {"from": "human" or "gpt", "value": text}, or of {"role": "user" or
            "assistant", "content": text}; `<image>` marks fall away: pictures come first.

    Raises:
        WorkbenchError: it is something else, or holds no answer.
    """
    if not isinstance(conversation, Sequence) or isinstance(conversation, str):
        raise WorkbenchError("its conversation is no list of turns")
    said: list[tuple[str, str]] = []
    for turn in conversation:
        if not isinstance(turn, Mapping):
            raise WorkbenchError("a turn is no object with 'from' and 'value'")
        who, text = (turn.get(a, turn.get(b)) for a, b in (("from", "role"), ("value", "content")))
        if not isinstance(text, str) or who not in (*ASKS, *ANSWERS, "system"):
            raise WorkbenchError(f"a turn is from {who!r} and says {type(text).__name__}")
        if who != "system":
            said.append(("asks" if who in ASKS else "answers", text.replace(IMAGE, "").strip()))
    pairs = []
    for (first, question), (second, answer) in zip(said[::2], said[1::2], strict=False):
        if (first, second) != ("asks", "answers"):
            raise WorkbenchError("its turns do not alternate, beginning with a question")
        pairs.append((question, answer))
    if not pairs or not all(question and answer for question, answer in pairs):
        raise WorkbenchError("a question or an answer is empty or missing")
    return tuple(pairs)
