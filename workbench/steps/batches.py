"""From samples to the batches that a model trains on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from random import Random

import torch
from torch import Tensor

from workbench.data import Sample
from workbench.data.conversations import IGNORE
from workbench.errors import WorkbenchError
from workbench.models.generation import build_prompt
from workbench.models.teacher import VLM


def as_batches(vlm: VLM, data: Iterable, *, batch_size: int, seed: int) -> Iterator[Mapping[str, Tensor]]:
    """Endless batches: samples are shuffled anew each time round, ready batches pass through.

    Raises:
        WorkbenchError: samples that are none.
    """
    if not isinstance(data, Sequence):
        for batch in data:
            yield ready_batch(vlm, batch)
        return
    if len(data) == 0:
        raise WorkbenchError("There is no sample to train on: the data set is empty.")
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
    tokenizer = vlm.processor.tokenizer
    prompts = [build_prompt(vlm, len(s.images), s.question) for s in samples]
    full = [f"{p} {s.answer}{tokenizer.eos_token}" for p, s in zip(prompts, samples, strict=True)]
    images = [list(s.images) for s in samples] if any(s.images for s in samples) else None
    batch = vlm.processor(text=full, images=images, return_tensors="pt", padding=True, padding_side="right")
    labels = batch["input_ids"].clone()
    for row, (prompt, sample) in enumerate(zip(prompts, samples, strict=True)):
        alone = vlm.processor(text=prompt, images=list(sample.images) or None)["input_ids"][0]
        labels[row, : len(alone)] = IGNORE
    labels[batch["attention_mask"] == 0] = IGNORE
    keys = ("input_ids", "attention_mask", "pixel_values")
    return {k: batch[k] for k in keys if k in batch} | {"labels": labels}


def ready_batch(vlm: VLM, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A batch of `TrainingBatches` without its blank pictures, normalised as the processor does."""
    pictures = batch["pixel_values"]
    if pictures.dtype != torch.uint8:
        return batch
    n_image_tokens = int((batch["input_ids"] == vlm.model.config.image_token_id).sum())
    tower = vlm.model.config.vision_config
    n_pictures = n_image_tokens // (tower.image_size // tower.patch_size) ** 2
    normalised = pictures[:n_pictures].to(vlm.model.device, non_blocking=True).float() / 127.5 - 1
    return {**batch, "pixel_values": normalised}
