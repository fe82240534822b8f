"""Plain text: documents from files, and endless batches of token ids packed from them.

A sequence that holds several documents lets the state of the first leak into the second, so a
document that is long enough fills sequences of its own, and only what is left over shares one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch

from workbench.data.conversations import IGNORE
from workbench.errors import WorkbenchError

SUFFIXES = (".txt", ".jsonl")


@dataclass(frozen=True)
class Document:
    """A text of its own, and what kind of text it is."""

    text: str
    kind: str = "text"


class Texts(Sequence[Document]):
    """Documents from files or strings; `distill` trains on them and `perplexity` reads them.

    Raises:
        WorkbenchError: what is given is neither, such as samples.
    """

    def __init__(self, name: str, documents: Iterable[Document | str], *, context: int = 1024):
        self.name, self.context = name, context
        self._documents = tuple(map(_as_document, documents))

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index):
        return self._documents[index]

    @property
    def kinds(self) -> tuple[str, ...]:
        """Every kind of document, in the order in which they come."""
        return tuple(dict.fromkeys(document.kind for document in self))

    def batches(
        self, tokenizer: object, *, batch_size: int, seed: int = 0, most: int | None = None
    ) -> TextBatches:
        """Endless training batches, `context` tokens a sequence or at most `most`."""
        tokens = encode_documents(tokenizer, [document.text for document in self])
        context = min(self.context, most or self.context)
        return TextBatches(tokens, batch_size=batch_size, context=context, seed=seed)

    def __str__(self) -> str:
        n = sum(len(document.text) for document in self)
        return f"{self.name}: {len(self):,} documents, {n:,} characters of {', '.join(self.kinds)}"


def _as_document(given: Document | str) -> Document:
    document = given if isinstance(given, Document) else Document(given)
    if not isinstance(document.text, str):
        raise WorkbenchError(
            f"A text must be a string or a Document, not {type(document.text).__name__}: "
            "samples are for wb.evaluate and wb.compare."
        )
    return document


def load_texts(path: str | Path, *, limit: int | None = None) -> Texts:
    """Read documents from a file, or from every .txt and .jsonl file of a folder and those in it.

    Args:
        path: .txt is one document, whose kind is the name of its folder; each line of .jsonl is
            one: a string, or an object with "text" and perhaps "kind"; else the kind is its name.
        limit: at most this many documents.

    Raises:
        WorkbenchError: nothing is there, no text is in it, or a file is no UTF-8 text or no JSON.
    """
    path = Path(path).expanduser()
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
    documents = [d for file in files for d in _documents(file) if d.text.strip()]
    if not documents:
        raise WorkbenchError(
            f"There is no text in {path}: give a .txt or .jsonl file, or a folder."
        )
    return Texts(path.name, documents[:limit])


def _documents(file: Path) -> Iterator[Document]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise WorkbenchError(f"The text in {file} cannot be read: {error}.") from error
    if file.suffix != ".jsonl":
        yield Document(text, file.resolve().parent.name)
        return
    # Not splitlines: a JSON string may hold U+2028 and others of its line ends as they are.
    for number, line in enumerate(filter(str.strip, text.split("\n")), 1):
        try:
            row = json.loads(line)
            row = {"text": row} if isinstance(row, str) else row
            kind = row.get("kind")
            document = Document(row["text"], file.stem if kind is None else str(kind))
            yield _as_document(document)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, WorkbenchError):
            raise WorkbenchError(
                f"Document {number} of {file} is neither a JSON string nor an object with 'text'."
            ) from None


@dataclass(frozen=True)
class TokenIds:
    """Documents as one long array of token ids."""

    ids: np.ndarray  # (n_tokens,), of any integer type; a file mapped into memory will do
    starts: np.ndarray  # (n_documents,) where each document begins, ascending from 0
    is_answer: np.ndarray | None = None  # (n_tokens,) bool: what is learnt; None for every token

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, (n_documents,)."""
        return np.diff(self.starts, append=len(self.ids))


def encode_documents(tokenizer: object, texts: Sequence[str]) -> TokenIds:
    """Encode each document and end it with the end-of-sequence token, where there is one."""
    rows = [plain_ids(tokenizer, text) + _end(tokenizer) for text in texts]
    return _joined(rows)


def encode_chats(tokenizer: object, chats: Sequence[tuple[str, str]]) -> TokenIds:
    """Encode (question, answer) pairs by the chat template; only answers are learnt.

    The end-of-sequence token after an answer belongs to it.
    """
    rows, learnt = [], []
    for question, reply in chats:
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        prompt = plain_ids(tokenizer, asked)
        answer = plain_ids(tokenizer, reply) + _end(tokenizer)
        rows.append(prompt + answer)
        learnt += [False] * len(prompt) + [True] * len(answer)
    tokens = _joined(rows)
    return TokenIds(tokens.ids, tokens.starts, np.array(learnt, bool))


def read_ids(path: str | Path, end: int) -> TokenIds:
    """Map a .npy file of token ids into memory; the token `end` ends each document in it.

    Raises:
        WorkbenchError: it is not a file of one long row of whole numbers.
    """
    try:
        ids = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise WorkbenchError(f"The token ids in {path} cannot be read: {error}.") from error
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer) or not len(ids):
        raise WorkbenchError(f"{path} holds {ids.dtype} {ids.shape}, not a row of token ids.")
    after = np.flatnonzero(ids == end) + 1
    return TokenIds(ids, np.concatenate(([0], after[after < len(ids)])))


def plain_ids(tokenizer: object, text: str) -> list[int]:
    """Ids of a text and nothing added, however long it is."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _end(tokenizer: object) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _joined(rows: list[list[int]]) -> TokenIds:
    if not any(rows):
        raise WorkbenchError("There is no text to encode.")
    ends = np.cumsum([len(row) for row in rows])
    ids = np.concatenate([np.asarray(row, np.int64) for row in rows])
    return TokenIds(ids, np.concatenate(([0], ends[:-1])))


class TextBatches:
    """Endless batches of packed text; batch `number` is always the same one for a seed.

    Each is a dict of `input_ids` and `labels` (batch_size, context) int64, right-padded with id 0
    and `IGNORE`, which a causal model may read without a mask; `real` (batch_size, context) bool
    tells what is no padding. Every token is learnt, or with `is_answer` those of answers. Sequences
    come in a new order each time round.

    Args:
        tokens: the documents.
        batch_size: sequences of a batch.
        context: tokens of a sequence.
        seed: of the order, and of which short documents share a sequence.

    Raises:
        WorkbenchError: a batch size or a context that is too small.
    """

    def __init__(self, tokens: TokenIds, *, batch_size: int, context: int = 1024, seed: int = 0):
        if batch_size < 1 or context < 2:
            raise WorkbenchError(
                f"batch_size={batch_size} and context={context} hold nothing to learn: "
                "ask for at least 1 sequence of 2 tokens."
            )
        self.tokens, self.batch_size, self.context, self.seed = tokens, batch_size, context, seed
        self.sequences = self._pack(Random(f"{seed}/packing"))
        self._order: tuple[int, list[int]] | None = None

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        number = 0
        while True:
            yield self.batch(number)
            number += 1

    def batch(self, number: int) -> dict[str, torch.Tensor]:
        """Batch `number` as (batch_size, context) `input_ids`, `labels` and `real`."""
        ids = np.zeros((self.batch_size, self.context), np.int64)
        labels, real = np.full_like(ids, IGNORE), np.zeros(ids.shape, bool)
        for row in range(self.batch_size):
            at = 0
            for start, stop in self._sequence(number * self.batch_size + row):
                place = slice(at, at + stop - start)
                ids[row, place] = self.tokens.ids[start:stop]
                learnt = ids[row, place]
                if self.tokens.is_answer is not None:
                    learnt = np.where(self.tokens.is_answer[start:stop], learnt, IGNORE)
                labels[row, place] = learnt
                at = place.stop
            real[row, :at] = True
        arrays = {"input_ids": ids, "labels": labels, "real": real}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _sequence(self, place: int) -> list[tuple[int, int]]:
        """The pieces of the sequence at a place in the endless row of them."""
        n = len(self.sequences)
        round_, at = divmod(place, n)
        if self._order is None or self._order[0] != round_:
            self._order = round_, Random(f"{self.seed}/order/{round_}").sample(range(n), n)
        return self.sequences[self._order[1][at]]

    def _pack(self, rng: Random) -> list[list[tuple[int, int]]]:
        """Cut documents into whole sequences, and let what is left over share sequences."""
        whole: list[list[tuple[int, int]]] = []
        rests: list[tuple[int, int]] = []
        ends = self.tokens.starts + self.tokens.lengths
        for start, end in zip(self.tokens.starts.tolist(), ends.tolist(), strict=True):
            if self.tokens.is_answer is not None:
                end = min(end, start + self.context)  # an answer without its question says little
            cuts = range(start, end, self.context)
            pieces = [(cut, min(cut + self.context, end)) for cut in cuts]
            whole += [[piece] for piece in pieces if piece[1] - piece[0] == self.context]
            rests += [piece for piece in pieces if piece[1] - piece[0] < self.context]
        rng.shuffle(rests)
        return whole + _share(rests, self.context)


def _share(pieces: list[tuple[int, int]], room: int) -> list[list[tuple[int, int]]]:
    """Put each piece into the first of the open sequences that has room for it."""
    done: list[list[tuple[int, int]]] = []
    opened: list[tuple[list[tuple[int, int]], int]] = []
    for piece in pieces:
        length = piece[1] - piece[0]
        at = next((i for i, (_, used) in enumerate(opened) if used + length <= room), None)
        if at is None:
            opened.append(([piece], length))
        else:
            opened[at][0].append(piece)
            opened[at] = opened[at][0], opened[at][1] + length
        if len(opened) > 32:  # the fullest is as good as full
            fullest = max(range(len(opened)), key=lambda i: opened[i][1])
            done.append(opened.pop(fullest)[0])
    return done + [pieces for pieces, _ in opened]
