"""From samples to the batches that a model trains on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from random import Random

import torch
from PIL import Image
from torch import Tensor

from workbench.data import Sample, Texts
from workbench.data.conversations import IGNORE
from workbench.errors import WorkbenchError
from workbench.models.generation import build_prompt, position_limit
from workbench.models.teacher import VLM

Batch = Mapping[str, Tensor]


def as_batches(vlm: VLM, data: Iterable, *, batch_size: int, seed: int) -> Iterator[Batch]:
    """Batches of samples, shuffled anew each time round, or ready batches in their own order.

    Texts are packed into sequences. All are endless, but for ready batches from an iterator, which
    end when it does.

    Raises:
        WorkbenchError: samples that are none, or an iterator over samples.
    """
    if isinstance(data, Texts):
        limit = position_limit(vlm)
        data = data.batches(vlm.tokenizer, batch_size=batch_size, seed=seed, most=limit)
    if not isinstance(data, Sequence):
        yield from (ready_batch(vlm, batch) for batch in data)
        return
    if len(data) == 0:
        raise WorkbenchError("There is no sample to train on: the data set is empty.")
    while isinstance(data[0], Mapping):
        yield from (ready_batch(vlm, batch) for batch in data)
    rng = Random(seed)
    while True:
        order = rng.sample(range(len(data)), len(data))
        for start in range(0, len(order), batch_size):
            yield collate(vlm, [data[i] for i in order[start : start + batch_size]])


def collate(vlm: VLM, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Samples as model inputs with labels on the answers.

    Returns:
        `input_ids`, `attention_mask`, `labels` (batch, seqlen), right-padded, and `pixel_values`.
    """
    tokenizer = vlm.tokenizer
    prompts = [build_prompt(vlm, len(s.images), s.question) for s in samples]
    full = [f"{p} {s.answer}{tokenizer.eos_token}" for p, s in zip(prompts, samples, strict=True)]
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # As in `prepare_inputs`: a template that wrote the first token leaves none to be added.
    bos = tokenizer.bos_token
    plain = {"add_special_tokens": not (bos and prompts[0].startswith(bos))}
    images = [list(s.images) for s in samples]
    padded = {"padding": True, "padding_side": "right", "return_tensors": "pt"}
    batch = vlm.processor(text=full, **_pictures(images), **padded, **plain)
    labels = batch["input_ids"].clone()
    for row, (prompt, seen) in enumerate(zip(prompts, images, strict=True)):
        alone = vlm.processor(text=[prompt], **_pictures([seen]), **plain)["input_ids"][0]
        labels[row, : len(alone)] = IGNORE
    labels[batch["attention_mask"] == 0] = IGNORE
    keys = ("input_ids", "attention_mask", "pixel_values")
    return {k: batch[k] for k in keys if k in batch} | {"labels": labels}


def _pictures(images: list[list[Image.Image]]) -> dict:
    return {"images": images} if any(images) else {}


def ready_batch(vlm: VLM, batch: Batch) -> Batch:
    """A batch of `TrainingBatches` without its blank pictures, normalised as the processor does.

    Raises:
        WorkbenchError: it is no batch.
    """
    if not isinstance(batch, Mapping):
        raise WorkbenchError("An iterator must give batches: put samples into a list instead.")
    pictures = batch.get("pixel_values")
    if pictures is None or pictures.dtype != torch.uint8:
        return batch
    n_image_tokens = int((batch["input_ids"] == vlm.model.config.image_token_id).sum())
    tower = vlm.model.config.vision_config
    n_pictures = n_image_tokens // (tower.image_size // tower.patch_size) ** 2
    normalised = pictures[:n_pictures].to(vlm.model.device, non_blocking=True).float() / 127.5 - 1
    return {**batch, "pixel_values": normalised}
