"""How well a model foretells real text: perplexity, kind by kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from workbench.data.text import Document, Texts, load_texts, plain_ids
from workbench.errors import WorkbenchError
from workbench.models.prompts import position_limit
from workbench.models.teacher import VLM


@dataclass(frozen=True)
class KindRow:
    """All documents of one kind."""

    kind: str
    n_documents: int
    n_tokens: int  # scored ones
    nats: float  # per scored token

    @property
    def perplexity(self) -> float:
        """The exponential of the nats per token."""
        return math.exp(self.nats)


@dataclass(frozen=True)
class Perplexity:
    """How surprised one model is by one set of texts."""

    model: str
    data: str
    context: int
    rows: tuple[KindRow, ...]

    @property
    def n_tokens(self) -> int:
        """Tokens that were scored."""
        return sum(row.n_tokens for row in self.rows)

    @property
    def nats(self) -> float:
        """Mean over all scored tokens of -ln p(token)."""
        return sum(row.nats * row.n_tokens for row in self.rows) / self.n_tokens

    @property
    def perplexity(self) -> float:
        """Between so many tokens the model is torn, on average: the exponential of `nats`."""
        return math.exp(self.nats)

    def to_dict(self) -> dict:
        """Plain data for JSON."""
        rows = [asdict(row) | {"perplexity": row.perplexity} for row in self.rows]
        return {
            "model": self.model,
            "data": self.data,
            "context": self.context,
            "n_tokens": self.n_tokens,
            "nats": self.nats,
            "perplexity": self.perplexity,
            "rows": rows,
        }

    def __str__(self) -> str:
        lines = [
            f"{self.model} on {self.data}: perplexity {self.perplexity:.2f}, "
            f"{self.nats:.4f} nats a token ({self.n_tokens:,} tokens, windows of {self.context})"
        ]
        for row in self.rows:
            lines.append(f"  {row.kind:<12} {row.perplexity:8.2f}  {row.n_tokens:>9,} tokens")
        return "\n".join(lines)


def perplexity(
    vlm: VLM,
    texts: str | Path | Texts | Sequence[Document | str],
    *,
    context: int = 1024,
    batch_size: int = 4,
    on_progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Score every token of `texts` but the first of each window, from what stands before it.

    Each document is cut into windows of `context` tokens that do not overlap and see no other
    document; nothing is added before the first token.

    Args:
        vlm: teacher or hybrid.
        texts: documents from `load_data`, strings, or the path of a file or folder.
        context: tokens of a window.
        batch_size: windows read at once.
        on_progress: called with (windows read, all of them) after each batch.

    Returns:
        A `Perplexity`: `.perplexity`, `.nats` a token, `.rows` by kind of document.

    Raises:
        WorkbenchError: no text, a batch size below 1, or a context that is below 2 or longer than
            the model's.
    """
    texts = _as_texts(texts)
    limit = position_limit(vlm)
    if not 2 <= context <= limit:
        raise WorkbenchError(f"context={context} is not to be had: {vlm.name} takes 2 to {limit}.")
    if batch_size < 1:
        raise WorkbenchError(f"batch_size must be at least 1, not {batch_size}.")
    windows = [  # (document, ids); a single token has nothing before it
        (number, ids[start : start + context])
        for number, document in enumerate(texts)
        for ids in [plain_ids(vlm.tokenizer, document.text)]
        for start in range(0, len(ids) - 1, context)
    ]
    if not windows:
        raise WorkbenchError("There is no text to score: each document has less than two tokens.")
    windows.sort(key=lambda window: -len(window[1]))  # like lengths share a batch
    nats, counts = [0.0] * len(texts), [0] * len(texts)
    for start in range(0, len(windows), batch_size):
        some = windows[start : start + batch_size]
        for (number, ids), total in zip(some, _surprise(vlm, [w for _, w in some]), strict=True):
            nats[number] += total
            counts[number] += len(ids) - 1
        if on_progress is not None:
            on_progress(start + len(some), len(windows))
    rows = tuple(_row(kind, texts, nats, counts) for kind in texts.kinds)
    return Perplexity(vlm.name, texts.name, context, tuple(row for row in rows if row.n_tokens))


def _as_texts(texts: str | Path | Texts | Sequence[Document | str]) -> Texts:
    if isinstance(texts, Texts):
        return texts
    if isinstance(texts, str | Path):
        return load_texts(texts)
    return Texts("your texts", texts)


def _surprise(vlm: VLM, windows: list[list[int]]) -> list[float]:
    """The nats of each window, summed over its tokens but the first.

    Right padding needs no mask: no token sees what comes after it.
    """
    longest = max(map(len, windows))
    ids = torch.zeros(len(windows), longest, dtype=torch.long)
    for row, window in enumerate(windows):
        ids[row, : len(window)] = torch.tensor(window)
    ids = ids.to(vlm.model.device)
    with torch.no_grad():
        logits: Tensor = vlm.model(input_ids=ids, use_cache=False).logits
        return [  # row by row, for float32 logits are large
            F.cross_entropy(
                logits[row, : len(window) - 1].float(), ids[row, 1 : len(window)], reduction="sum"
            ).item()
            for row, window in enumerate(windows)
        ]


def _row(kind: str, texts: Texts, nats: list[float], counts: list[int]) -> KindRow:
    mine = [number for number, document in enumerate(texts) if document.kind == kind]
    n_tokens = sum(counts[number] for number in mine)
    total = sum(nats[number] for number in mine)
    return KindRow(kind, len(mine), n_tokens, total / max(1, n_tokens))
