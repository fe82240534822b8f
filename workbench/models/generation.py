"""Ask a model and watch it answer: one greedy loop for teacher and student, in two timed phases.

*Prefill* reads the whole prompt, pictures included, and yields the first token; *decode* adds one
token at a time from the cache. Both models run the same code, so their figures can be compared.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from workbench.errors import WorkbenchError
from workbench.models.cache import CACHE, cache_bytes
from workbench.models.families import text_config
from workbench.models.prompts import position_limit, prepare_inputs
from workbench.models.teacher import VLM

if TYPE_CHECKING:
    from workbench.models.engine import Engine


class Question(Protocol):
    """What `answer_batch` reads of a sample."""

    images: Sequence[Image.Image]
    question: str


@dataclass(frozen=True)
class Answer:
    """An answer, whole or so far, and what it cost."""

    text: str
    n_prompt_tokens: int  # picture tokens included
    n_new_tokens: int  # the token that ends the answer included
    prefill_ms: float  # from the prepared inputs to the first token
    decode_tokens_per_s: float  # of the tokens after the first; 0 before the second
    kv_bytes: int  # keys and values that the cache holds
    ssm_bytes: int  # Mamba-2 states that the cache holds
    weight_bytes: int
    peak_bytes: int | None = None  # weights and all that came on top, as measured on a GPU
    reserved_bytes: int | None = None  # of an engine's cache, filled or not; None: it grows

    @property
    def cache_bytes(self) -> int:
        """All that the past takes up."""
        return self.kv_bytes + self.ssm_bytes

    def __str__(self) -> str:
        return (
            f"{self.text}\n"
            f"  {self.n_prompt_tokens} prompt tokens in {self.prefill_ms:.1f} ms, then "
            f"{self.n_new_tokens} new ones at {self.decode_tokens_per_s:.1f} tokens/s\n"
            f"  cache {self.cache_bytes / 2**10:,.0f} KiB (attention {self.kv_bytes / 2**10:,.0f}, "
            f"Mamba-2 {self.ssm_bytes / 2**10:,.0f}), "
            f"weights {self.weight_bytes / 2**20:,.1f} MiB"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold, `cache_bytes` among them."""
        return asdict(self) | {"cache_bytes": self.cache_bytes}


def stream_answer(
    vlm: VLM,
    images: Sequence[Image.Image],
    question: str,
    *,
    max_new_tokens: int = 128,
    engine: "Engine | None" = None,
) -> Iterator[Answer]:
    """Answer greedily, and yield the answer so far after every token.

    It ends at the end-of-sequence token, at max_new_tokens, or at the model's last position.

    Args:
        vlm: the model to ask.
        images: none, one or more pictures.
        question: in plain words.
        max_new_tokens: at most so many.
        engine: made of the same model, to answer faster; None: the model's own forward.

    Returns:
        An iterator over the text so far with the figures so far; the last one is final.

    Raises:
        WorkbenchError: at once, if the question is empty or does not fit the model, an image is not
            a PIL image, or max_new_tokens is below 1.
    """
    inputs = prepare_inputs(vlm, [images], [question], max_new_tokens)
    _check_engine(vlm, engine)
    room = position_limit(vlm) - inputs["input_ids"].shape[1]
    return _stream(vlm, inputs, min(max_new_tokens, room), engine)


def answer(
    vlm: VLM,
    images: Sequence[Image.Image],
    question: str,
    *,
    max_new_tokens: int = 128,
    engine: "Engine | None" = None,
) -> Answer:
    """Answer greedily: the last of what `stream_answer` yields, which see for the arguments."""
    *_, last = stream_answer(vlm, images, question, max_new_tokens=max_new_tokens, engine=engine)
    return last


def answer_batch(
    vlm: VLM,
    samples: Sequence[Question],
    *,
    max_new_tokens: int = 32,
    batch_size: int = 16,
    on_progress: Callable[[int, int], None] | None = None,
    engine: "Engine | None" = None,
) -> list[str]:
    """Answer many questions greedily, several at a time, padded on the left.

    Args:
        vlm: the model to ask.
        samples: each with `images` and a `question`.
        max_new_tokens: at most so many for each.
        batch_size: how many run together; it changes rounding, nothing else.
        on_progress: called with (answered, all) after each batch.
        engine: made of the same model, to answer faster; None: `generate` of transformers.

    Returns:
        One text for each sample, in their order.

    Raises:
        WorkbenchError: as `stream_answer`, or batch_size is below 1.
    """
    if batch_size < 1:
        raise WorkbenchError(f"batch_size must be at least 1, not {batch_size}.")
    _check_engine(vlm, engine)
    texts = []
    for start in range(0, len(samples), batch_size):
        some = samples[start : start + batch_size]
        inputs = prepare_inputs(
            vlm, [s.images for s in some], [s.question for s in some], max_new_tokens
        )
        n_prompt = inputs["input_ids"].shape[1]
        n_most = min(max_new_tokens, position_limit(vlm) - n_prompt)
        if engine is not None:
            steps = list(engine.generate(inputs, max_new_tokens=n_most))
            new = [list(row) for row in zip(*steps, strict=True)]
        else:
            with inference(vlm):
                tokens = vlm.model.generate(
                    **inputs,
                    do_sample=False,
                    num_beams=1,
                    max_new_tokens=n_most,
                    eos_token_id=sorted(end_tokens(vlm)) or None,
                    pad_token_id=vlm.tokenizer.pad_token_id,
                )
            new = tokens[:, n_prompt:].tolist()
        texts += [vlm.tokenizer.decode(t, skip_special_tokens=True).strip() for t in new]
        if on_progress is not None:
            on_progress(len(texts), len(samples))
    return texts


def end_tokens(vlm: VLM) -> set[int]:
    """Return the ids of the tokens that end an answer."""
    ids = vlm.model.generation_config.eos_token_id
    if ids is None:
        ids = vlm.tokenizer.eos_token_id
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)


def _stream(
    vlm: VLM, inputs: dict[str, Tensor], n_most: int, engine: "Engine | None"
) -> Iterator[Answer]:
    stop, weight_bytes = end_tokens(vlm), sum(p.nbytes for p in vlm.model.parameters())
    n_prompt, new = inputs["input_ids"].shape[1], []
    steps = _plain_steps(vlm, inputs) if engine is None else engine.timed(inputs, n_most)
    # An engine's cache is there before the first step, and belongs to what came on top.
    there = 0 if engine is None else sum(engine.ready(1, n_prompt + n_most).bytes_reserved())
    peak = Peak(vlm, there)
    prefill_s = decode_s = 0.0
    for token, seconds, (kv_bytes, ssm_bytes) in steps:
        prefill_s, decode_s = (prefill_s, decode_s + seconds) if new else (seconds, 0.0)
        new.append(token)
        final = token in stop or len(new) >= n_most
        text = vlm.tokenizer.decode(new, skip_special_tokens=True)
        yield Answer(
            # A character whose bytes have not all come yet is held back.
            text=(text if final else text.rstrip("\ufffd")).strip(),
            n_prompt_tokens=n_prompt,
            n_new_tokens=len(new),
            prefill_ms=prefill_s * 1e3,
            decode_tokens_per_s=(len(new) - 1) / decode_s if decode_s else 0.0,
            kv_bytes=kv_bytes,
            ssm_bytes=ssm_bytes,
            weight_bytes=weight_bytes,
            peak_bytes=_most(peak, engine, n_prompt),
            reserved_bytes=None if engine is None else sum(engine.bytes_reserved()),
        )
        if final:
            return


# One step: the token, the seconds it took, and the bytes that the cache then holds.
Step = tuple[int, float, tuple[int, int]]


def _plain_steps(vlm: VLM, inputs: dict[str, Tensor]) -> Iterator[Step]:
    cache = DynamicCache(config=text_config(vlm.model))
    while True:
        token, seconds = _timed_step(vlm, cache, **inputs)
        yield token.item(), seconds, cache_bytes(cache)
        inputs = {"input_ids": token}


class Peak:
    """The most memory that one model needs from now on, on a GPU that may hold others, too.

    Args:
        vlm: the model.
        reserved: bytes of its cache that are there already.
    """

    def __init__(self, vlm: VLM, reserved: int) -> None:
        self.device = vlm.model.device
        self.own = sum(p.nbytes for p in vlm.model.parameters()) + reserved
        self.before = _memory_now(self.device)

    def n_bytes(self) -> int | None:
        """Return its weights, its cache, and what came on top; None where that is not counted."""
        if self.before is None:
            return None
        return self.own + _memory_peak(self.device) - self.before


def _most(peak: Peak, engine: "Engine | None", n_prompt: int) -> int | None:
    return peak.n_bytes() if engine is None else engine.largest(peak.n_bytes(), n_prompt)


def _memory_now(device: torch.device) -> int | None:
    """Bytes that tensors hold, from which `_memory_peak` counts on; None where none are counted."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _memory_peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device)


def _check_engine(vlm: VLM, engine: "Engine | None") -> None:
    if engine is not None and engine.vlm is not vlm:
        raise WorkbenchError(
            f"This engine was made of {engine.vlm.name}, not of {vlm.name} as it was passed."
        )


def _timed_step(vlm: VLM, cache: Cache, **inputs: Tensor) -> tuple[Tensor, float]:
    """Run the model once; return the likeliest next token (1, 1) and the seconds it took."""
    device = vlm.model.device
    with inference(vlm):
        wait(device)
        start = time.perf_counter()
        output = vlm.model(**inputs, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1].argmax(-1, keepdim=True)
        wait(device)
        return token, time.perf_counter() - start


@contextmanager
def inference(vlm: VLM) -> Iterator[None]:
    """No gradients and no dropout inside; modules in training go on training afterwards."""
    training = [module for module in vlm.model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def wait(device: torch.device) -> None:
    """Wait until a GPU has done all it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
