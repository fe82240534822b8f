"""How fast and how large: the same engine, the same prompts, for every model, beside its bounds.

On a CPU the models take turns round by round, so that a busy moment of the machine hits all of
them; on a GPU each is made, measured and dropped before the next, so that its memory is its own.
What compiles, compiles before the clock runs. Figures are medians over the rounds.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import index
from pathlib import Path

import torch
from torch import Tensor

from workbench.data import Sample, load_data
from workbench.errors import WorkbenchError
from workbench.models.engine import Engine, fastest_mode
from workbench.models.generation import Peak, inference, wait
from workbench.models.prompts import position_limit, prepare_inputs, sees
from workbench.models.teacher import VLM
from workbench.steps.efficiency.bounds import Idle, idle_attention, out_of_memory, ratio, sizes
from workbench.steps.efficiency.machine import about, machine
from workbench.steps.efficiency.rows import Profile, ProfileRow

OUT_OF_MEMORY = "out of memory"
WITHOUT_GRAPHS = "prompts without graphs"
_TRACED_STEPS = 8
_WORDS = (256, 1024)  # what a language model is asked by default


@dataclass(frozen=True)
class _Prompt:
    """One prompt, for every model alike."""

    batch: int
    length: int | None  # of random words; None: a sample
    sample: Sample | None = None

    def inputs(self, vlm: VLM, max_new_tokens: int) -> dict[str, Tensor]:
        if self.sample is not None:
            return prepare_inputs(vlm, [self.sample.images], [self.sample.question], max_new_tokens)
        generator = torch.Generator().manual_seed(0)
        words = len(vlm.tokenizer) // 2 if vlm.tokenizer is not None else 100
        ids = torch.randint(words // 2, words, (self.batch, self.length), generator=generator)
        return {"input_ids": ids.to(vlm.model.device)}


def profile(
    models: Sequence[VLM],
    samples: Sequence[Sample] | None = None,
    *,
    lengths: Sequence[int] | None = None,
    batch_sizes: Sequence[int] = (1,),
    mode: str | None = None,
    repeats: int = 3,
    max_new_tokens: int = 48,
    trace: str | Path | None = None,
) -> Profile:
    """Measure every model on every prompt, one at a time.

    Answers go on to max_new_tokens, whatever they say: every model decodes equally many tokens.
    Ctrl-C and a full memory end a measurement, not the profile: what is known by then is returned.

    Args:
        models: teacher and hybrids, on one device.
        samples: the questions; by default one long description and one prompt of several pictures,
            or, if any model reads text only, prompts of 256 and 1,024 random words, or of as many
            as its positions leave room for.
        lengths: instead of samples, prompts of so many random words, up to any length.
        batch_sizes: with lengths: so many prompts side by side.
        mode: of the engine, the same for all models; None: "graph" on a GPU, if all of them can be
            recorded, else "static".
        repeats: measured rounds after one that is thrown away.
        max_new_tokens: tokens decoded.
        trace: a file to write, which https://ui.perfetto.dev draws: the last prompt, decoded by the
            last model.

    Returns:
        A `Profile` with a row per model and prompt.

    Raises:
        WorkbenchError: no model, no sample, batch sizes that no lengths go with, or a number below
            its least.
    """
    if isinstance(models, VLM) or not models or repeats < 1:
        raise WorkbenchError("profile needs a list of at least one model, and at least one repeat.")
    if max_new_tokens < 2:
        raise WorkbenchError(f"max_new_tokens must be at least 2, not {max_new_tokens}.")
    mode = mode or fastest_mode(models)
    if samples is None and lengths is None and not all(sees(vlm) for vlm in models):
        room = min(position_limit(vlm) for vlm in models) - max_new_tokens
        lengths = sorted({max(1, min(length, room)) for length in _WORDS})
    prompts = _prompts(samples, lengths, batch_sizes)
    device = models[0].model.device
    rows: list[ProfileRow] = []
    finished = False
    try:
        for prompt in prompts:
            rows += _measure(models, prompt, mode, repeats, max_new_tokens)
        if trace is not None:
            _trace(models[-1], prompts[-1], mode, max_new_tokens, Path(trace))
        finished = True
    except KeyboardInterrupt:
        pass
    return Profile(tuple(rows), str(device), mode, about(device), finished)


def _prompts(
    samples: Sequence[Sample] | None, lengths: Sequence[int] | None, batch_sizes: Sequence[int]
) -> list[_Prompt]:
    batches = _counts("batch_sizes", batch_sizes)
    if lengths is None:
        if batches != [1]:
            raise WorkbenchError("Only random words have batch sizes: give lengths=[...], too.")
        chosen = list(samples) if samples is not None else _default_samples()
        if not chosen:
            raise WorkbenchError("profile needs at least one sample to ask.")
        return [_Prompt(1, None, sample) for sample in chosen]
    if samples is not None:
        raise WorkbenchError("profile takes samples or lengths, not both.")
    return [_Prompt(b, length) for length in _counts("lengths", lengths) for b in batches]


def _counts(name: str, numbers: Sequence[int]) -> list[int]:
    try:
        counts = [index(n) for n in numbers]
    except TypeError:
        counts = []
    if not counts or min(counts) < 1:
        raise WorkbenchError(
            f"{name} must be a list of whole numbers of at least 1, not {numbers!r}."
        )
    return counts


def _measure(
    models: Sequence[VLM], prompt: _Prompt, mode: str, repeats: int, n_new: int
) -> Iterator[ProfileRow]:
    """Measure all models on one prompt, in turns on a CPU, one after the other on a GPU."""
    on_gpu = models[0].model.device.type == "cuda"
    for group in ([vlm] for vlm in models) if on_gpu else (models,):
        meters = [_Meter(vlm, prompt, mode, n_new) for vlm in group]
        for _ in range(repeats + 1):
            for meter in meters:
                meter.round()
        for meter in meters:
            yield meter.row()
        del meters
        _drop(group[0].model.device)


class _Meter:
    """One model on one prompt, round by round; a full memory is kept as what it is."""

    def __init__(self, vlm: VLM, prompt: _Prompt, mode: str, n_new: int) -> None:
        self.vlm, self.prompt, self.n_new = vlm, prompt, n_new
        self.prefill, self.decode = [], []
        self.idle_prefill, self.idle_decode = [], []
        self.engine = self.idle = None
        self.note, self.held, self.peak = "", (0, 0), None
        self.length = prompt.length or 0
        try:
            self.inputs = prompt.inputs(vlm, n_new)
            self.batch, self.length = self.inputs["input_ids"].shape
            self._prepare(mode)
        except Exception as error:
            self._give_up(error)

    def _prepare(self, mode: str) -> None:
        room = self.length + self.n_new
        self.engine = Engine(self.vlm, mode, max_length=room, batch_size=self.batch)
        if self.vlm.plan is None and self.engine.reason is None and mode != "eager":
            with self._spared():
                self.idle = Engine(
                    self.vlm, mode, max_length=room, batch_size=self.batch, wrap=Idle
                )
        if room > position_limit(self.vlm):
            self.note = f"speed only: the model has {position_limit(self.vlm)} positions"

    def round(self) -> None:
        """Measure once more."""
        if self.engine is None:
            return
        try:
            there = self.engine.ready(self.batch, self.length + self.n_new).bytes_reserved()
            peak = Peak(self.vlm, sum(there))
            prefill, decode = _once(self.engine, self.inputs, self.n_new)
            self.prefill.append(prefill)
            self.decode.append(decode)
            self.held = self.engine.bytes_held()
            if (n_bytes := peak.n_bytes()) is not None:  # a graph's shows when it is recorded
                self.peak = max(self.peak or 0, n_bytes / 2**20)
            if self.engine.without_graphs and WITHOUT_GRAPHS not in self.note:
                self.note = "; ".join(filter(None, (self.note, WITHOUT_GRAPHS)))
            if self.idle is not None:
                with self._spared(), idle_attention(self.vlm.model):
                    prefill, decode = _once(self.idle, self.inputs, self.n_new)
                    self.idle_prefill.append(prefill)
                    self.idle_decode.append(decode)
        except Exception as error:
            self._give_up(error)

    def row(self) -> ProfileRow:
        """Sum up all rounds but the first."""
        vlm, n_new = self.vlm, self.n_new
        like = sizes(vlm)
        best = machine(vlm.model.device, vlm.model.dtype)
        context = self.length + n_new // 2
        prefill, decode = self.prefill[1:], self.decode[1:]
        per_s = sorted(self.prompt.batch / s for s in decode)
        per_ms = sorted(s * 1e3 for s in prefill)
        weight_bytes = sum(p.nbytes for p in vlm.model.parameters())
        return ProfileRow(
            model=vlm.name,
            ratio=ratio(vlm),
            batch_size=self.prompt.batch,
            n_prompt_tokens=self.length,
            n_new_tokens=n_new if decode else 0,
            prefill_ms=statistics.median(per_ms) if per_ms else None,
            prefill_ms_range=(per_ms[0], per_ms[-1]) if per_ms else None,
            prefill_bound_ms=like.prefill_seconds(best, self.prompt.batch, self.length) * 1e3,
            decode_tokens_per_s=statistics.median(per_s) if per_s else None,
            decode_tokens_per_s_range=(per_s[0], per_s[-1]) if per_s else None,
            decode_bound_tokens_per_s=self.prompt.batch
            / like.decode_seconds(best, self.prompt.batch, context),
            prefill_mixing_share=_share(prefill, self.idle_prefill[1:]),
            decode_mixing_share=_share(decode, self.idle_decode[1:]),
            decode_own_ms=like.own_bytes(self.prompt.batch) / best.bandwidth * 1e3,
            weight_bytes=weight_bytes,
            kv_bytes=self.held[0],
            ssm_bytes=self.held[1],
            peak_mib=self.peak,
            warm_up_ms=0.0 if self.engine is None else self.engine.warm_up_ms,
            note=self.note,
        )

    @contextmanager
    def _spared(self) -> Iterator[None]:
        """Do without the share of mixing, rather than without all figures, if memory is too small.

        The second engine has a cache of its own.
        """
        try:
            yield
        except Exception as error:
            if not out_of_memory(error):
                raise
            self.idle, self.idle_prefill, self.idle_decode = None, [], []
            _drop(self.vlm.model.device)

    def _give_up(self, error: Exception) -> None:
        if not out_of_memory(error):
            raise error
        self.engine = self.idle = None
        self.prefill, self.decode, self.note = [], [], OUT_OF_MEMORY
        _drop(self.vlm.model.device)


def _once(engine: Engine, inputs: dict[str, Tensor], n_new: int) -> tuple[float, float]:
    """Return the seconds of a prompt, and of one step after it."""
    wait(engine.device)
    start = time.perf_counter()
    engine.prefill(inputs, max_new_tokens=n_new)
    wait(engine.device)
    middle = time.perf_counter()
    for _ in range(n_new - 1):
        engine.step()
    wait(engine.device)
    return middle - start, (time.perf_counter() - middle) / (n_new - 1)


def _share(whole: list[float], idle: list[float]) -> float | None:
    """Return which share of the time mixing takes, from rounds with and without it."""
    if not whole or not idle:
        return None
    return max(0.0, 1 - statistics.median(idle) / statistics.median(whole))


def _trace(vlm: VLM, prompt: _Prompt, mode: str, n_new: int, path: Path) -> None:
    inputs = prompt.inputs(vlm, n_new)
    engine = Engine(vlm, mode)
    engine.prefill(inputs, max_new_tokens=_TRACED_STEPS + 1)
    with torch.profiler.profile() as seen, inference(vlm):
        for _ in range(_TRACED_STEPS):
            engine.step()
        wait(engine.device)
    seen.export_chrome_trace(str(path))


def _drop(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _default_samples() -> list[Sample]:
    data = load_data("pocket", limit=64)
    describe = next(s for s in data if s.family == "describe")
    several = max((s for s in data if s.family == "several"), key=lambda s: len(s.images))
    return [describe, several]
