"""From samples to the batches that a model trains on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count, islice
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from workbench.data import Document, Sample, Texts
from workbench.data.conversations import IGNORE
from workbench.errors import WorkbenchError
from workbench.models.prompts import position_limit, processed, reads_a_suffix, what_it_reads
from workbench.models.teacher import VLM
from workbench.steps.training.writing import write_conversation

Batch = Mapping[str, Tensor]  # and `n_cut`, an int, where samples were cut


def as_batches(
    vlm: VLM,
    data: Iterable,
    *,
    batch_size: int,
    seed: int,
    max_length: int | None = None,
    first: int = 0,
    stride: int = 1,
) -> Iterator[Batch]:
    """Batches of samples, shuffled anew each time round, or ready batches in their own order.

    Texts are packed into sequences. All are endless, but for ready batches from an iterator, which
    end when it does. Of batches 0, 1, 2, ... those are made that are asked for: `first`,
    `first + stride`, and so on.

    Args:
        vlm: whose processor reads the samples.
        data: samples; texts or strings; ready batches; or anything with `batch(number)`, which
            gives a ready one.
        batch_size: samples of a batch; the last of a round may have fewer.
        seed: of the order.
        max_length: tokens after which samples are cut; None is the model's own limit.
        first: the first batch.
        stride: from one batch to the next.

    Raises:
        WorkbenchError: samples that are none, an iterator over samples, the name of data, or a
            max_length below 1.
    """
    data, limit = checked_data(data), _length_limit(vlm, max_length)
    if isinstance(data, Texts):
        data = data.batches(vlm.tokenizer, batch_size=batch_size, seed=seed, most=limit)
    if hasattr(data, "batch"):
        yield from (ready_batch(vlm, data.batch(n)) for n in count(first, stride))
    if not isinstance(data, Sequence):
        yield from (ready_batch(vlm, batch) for batch in islice(iter(data), first, None, stride))
        return
    if len(data) == 0:
        raise WorkbenchError("There is no sample to train on: the data set is empty.")
    if isinstance(data[0], Mapping):
        yield from (ready_batch(vlm, data[n % len(data)]) for n in count(first, stride))
    chosen = islice(_shuffled(len(data), batch_size, seed), first, None, stride)
    for indices in chosen:
        yield collate(vlm, [data[i] for i in indices], max_length)


def checked_data(data: Iterable) -> Iterable:
    """Data as it is, or texts where it is a list of plain strings.

    Raises:
        WorkbenchError: it is only the name of data.
    """
    if isinstance(data, str | Path):
        name = str(data)
        raise WorkbenchError(
            f"{name!r} only names data: load it first, with wb.load_data({name!r})."
        )
    if isinstance(data, Sequence) and len(data) and isinstance(data[0], str | Document):
        return data if isinstance(data, Texts) else Texts("your texts", data)
    return data


def _length_limit(vlm: VLM, max_length: int | None) -> int:
    limit = position_limit(vlm)
    if max_length is not None and max_length < 1:
        raise WorkbenchError(f"max_length must be at least 1, not {max_length}.")
    return limit if max_length is None else min(max_length, limit)


def _shuffled(n: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Indices of the samples of batch after batch, without end."""
    rng = Random(seed)
    while True:
        order = rng.sample(range(n), n)
        for start in range(0, n, batch_size):
            yield order[start : start + batch_size]


def collate(
    vlm: VLM, samples: Sequence[Sample], max_length: int | None = None
) -> dict[str, Tensor | int]:
    """Samples as model inputs with labels on the answers.

    Args:
        vlm: whose processor reads the samples.
        samples: of one batch.
        max_length: tokens after which a sample is cut; None is the model's own limit.

    Returns:
        `input_ids`, `attention_mask`, `labels` (batch, seqlen), right-padded; `token_type_ids`,
        where the model reads them; what the processor makes of the pictures; and `n_cut`, where
        samples were cut.

    Raises:
        WorkbenchError: pictures that alone are too long, or none where the model needs some; a
            max_length below 1.
    """
    tokenizer, limit = vlm.tokenizer, _length_limit(vlm, max_length)
    texts, answers = zip(*(write_conversation(vlm, s) for s in samples), strict=True)
    # As in `prepare_inputs`: a template that wrote the first token leaves none to be added.
    bos = tokenizer.bos_token
    plain = {"add_special_tokens": not (bos and texts[0].startswith(bos))}
    images = [list(s.images) for s in samples]
    given = {"text": list(texts)}
    if reads_a_suffix(vlm):
        given, texts, answers = _with_suffix(texts, answers, tokenizer.eos_token)
    batch = processed(vlm, images, **given, **plain, padding_side="right")
    if "suffix" in given:
        plain = {"add_special_tokens": False}
    labels = torch.full_like(batch["input_ids"], IGNORE)
    for row, (text, spans) in enumerate(zip(texts, answers, strict=True)):

        def n_tokens(upto: int, text: str = text) -> int:
            return len(tokenizer(text[:upto], **plain)["input_ids"])

        # Pictures stand before every answer, and take the same number of tokens before each.
        extra = int(batch["attention_mask"][row].sum()) - n_tokens(len(text))
        for start, end in spans:
            place = slice(n_tokens(start) + extra, n_tokens(end) + extra)
            labels[row, place] = batch["input_ids"][row, place]
    labels[batch["attention_mask"] == 0] = IGNORE
    made = what_it_reads(vlm, batch) | {"labels": labels}
    return _cut(vlm, made, limit)


def _with_suffix(
    texts: Sequence[str], answers: Sequence[list[tuple[int, int]]], eos: str
) -> tuple[dict[str, list[str]], list[str], list[list[tuple[int, int]]]]:
    """Part each text before its first answer.

    Returns:
        What the processor takes, which adds the last `eos` itself; the suffixes with it; and where
        in them the answers stand.
    """
    firsts = [spans[0][0] for spans in answers]
    begins = [at + (text[at] == " ") for text, at in zip(texts, firsts, strict=True)]
    suffixes = [text[at:] for text, at in zip(texts, begins, strict=True)]
    spans = [
        [(max(0, start - at), end - at) for start, end in some]
        for some, at in zip(answers, begins, strict=True)
    ]
    given = {
        "text": [text[:at] for text, at in zip(texts, firsts, strict=True)],
        "suffix": [text.removesuffix(eos) for text in suffixes],
    }
    return given, suffixes, spans


def _cut(vlm: VLM, batch: dict[str, Tensor], limit: int) -> dict[str, Tensor | int]:
    """Cut the ends of sequences that are too long."""
    shape = batch["input_ids"].shape
    n_cut = int((batch["attention_mask"].sum(1) > limit).sum())
    image_token = getattr(vlm.model.config, "image_token_id", None)
    if n_cut and image_token is not None and (batch["input_ids"][:, limit:] == image_token).any():
        raise WorkbenchError(
            f"A sample's pictures reach beyond token {limit}, where samples are cut: "
            "allow more tokens, or leave out samples with so many pictures."
        )
    cut = {k: v[:, :limit] if v.shape == shape else v for k, v in batch.items()}
    return cut | {"n_cut": n_cut} if n_cut else cut


def ready_batch(vlm: VLM, batch: Batch) -> Batch:
    """A batch of `TrainingBatches` without its blank pictures, normalised as the processor does.

    Raises:
        WorkbenchError: it is no batch, or longer than the model allows.
    """
    if not isinstance(batch, Mapping):
        raise WorkbenchError("An iterator must give batches: put samples into a list instead.")
    if not {"input_ids", "labels"} <= batch.keys():
        raise WorkbenchError("A ready batch needs input_ids and labels.")
    length, limit = batch["input_ids"].shape[1], position_limit(vlm)
    if length > limit:
        raise WorkbenchError(
            f"The batch has sequences of {length} tokens, but {vlm.name} sees {limit} at most: "
            "make shorter ones."
        )
    pictures = batch.get("pixel_values")
    if pictures is None or pictures.dtype != torch.uint8:
        return batch
    n_image_tokens = int((batch["input_ids"] == vlm.model.config.image_token_id).sum())
    tower = vlm.model.config.vision_config
    n_pictures = n_image_tokens // (tower.image_size // tower.patch_size) ** 2
    normalised = pictures[:n_pictures].to(vlm.model.device, non_blocking=True).float() / 127.5 - 1
    return {**batch, "pixel_values": normalised}
