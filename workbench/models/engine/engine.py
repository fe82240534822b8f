"""One engine for teacher and student: the same modes, the same loop, the same clock.

| mode     | what runs                                                                            |
| -------- | ------------------------------------------------------------------------------------ |
| eager    | the model's own forward on a cache that grows, as `generate` does it                 |
| static   | the decoder read into records (`decoder`), on a cache of fixed size                  |
| graph    | the same step recorded once as a CUDA graph and replayed: no Python between kernels  |
| compiled | its parts through torch.compile; on a GPU recorded as a graph on top                 |

Greedy answers are those of `generate` in each mode. Families whose layers cannot be read into
records run their own forward on a static cache instead; `Engine.reason` then says why. Prompts go
through the records, too; only batches that are padded take the model's own forward. What is made
once, kernels compiled and graphs recorded, is in no figure of `timed` and of `wb.profile`;
`warm_up_ms` has what is made before the first prompt, and by `timed` at the first of a class.
"""

import time
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.models.engine.decoder import read_decoder, why_not
from workbench.models.engine.operations import Compiled, Operations
from workbench.models.engine.packed import Packed
from workbench.models.engine.runners import Forward, Lean, check_left_padded
from workbench.models.engine.triton_operations import TritonOperations, has_triton
from workbench.models.generation import end_tokens, inference, wait
from workbench.models.teacher import VLM

MODES = ("eager", "static", "graph", "compiled")
STRIDE = 256  # a cache that must grow grows to a multiple of this
LARGEST_PACKED = 2**30  # bytes of decoder weights that are copied for the CPU at most


def fastest_mode(models: Iterable[VLM]) -> str:
    """Return the fastest mode that needs no compiler's minute and takes all of these models."""
    recorded = all(
        vlm.model.device.type == "cuda" and why_not(vlm.model) is None for vlm in models
    )
    return "graph" if recorded else "static"


class Engine:
    """A model made ready to answer.

    Args:
        vlm: the model; its weights are read where they are.
        mode: one of `MODES`.
        max_length: positions for prompt and answer together; None: as many as a prompt needs,
            rounded up, and more when a longer one comes.
        batch_size: sequences that the engine is made ready for; others are made when they come.
        backend: of torch.compile, in mode "compiled".
        wrap: put around the operations of a step, to watch or to leave out some of them.

    Raises:
        WorkbenchError: the mode does not exist, or cannot run here.
    """

    def __init__(
        self,
        vlm: VLM,
        mode: str = "static",
        *,
        max_length: int | None = None,
        batch_size: int = 1,
        backend: str = "inductor",
        wrap: Callable[[Operations], Operations] | None = None,
    ) -> None:
        if mode not in MODES:
            raise WorkbenchError(f"There is no mode {mode!r}; there are {', '.join(MODES)}.")
        if max_length is not None and max_length < 2:
            raise WorkbenchError(f"max_length must be at least 2, not {max_length}.")
        if batch_size < 1:
            raise WorkbenchError(f"batch_size must be at least 1, not {batch_size}.")
        self.vlm, self.mode, self.backend, self.wrap = vlm, mode, backend, wrap
        self.device = vlm.model.device
        if mode == "graph" and self.device.type != "cuda":
            raise WorkbenchError(
                f"A CUDA graph needs a GPU, and {vlm.name} is on {self.device}: take mode='static'."
            )
        self.reason = why_not(vlm.model)
        self.max_length, self.warm_up_ms = max_length, 0.0
        self.runner: Lean | Forward | None = None  # that read the last prompt
        self._runners: dict[int, Lean | Forward] = {}
        self._met: set[int] = set()  # classes of prompts
        self._peaks: dict[int, int] = {}  # bytes, by class of prompts
        self._weights: tuple[int, ...] = ()
        if max_length is not None:
            self.ready(batch_size, max_length)

    def __str__(self) -> str:
        how = f" ({self.reason}: the model's own forward)" if self.reason else ""
        return f"{self.vlm.name}, {self.mode}{how}"

    def ready(self, batch_size: int, length: int) -> Lean | Forward:
        """Make sure that so many sequences of so many positions can run; timed as warm-up.

        Raises:
            WorkbenchError: length is more than the engine's max_length.
        """
        if self.max_length is not None and length > self.max_length:
            raise WorkbenchError(
                f"Prompt and answer take {length} positions together, and this engine was made "
                f"for {self.max_length}: make one with a larger max_length."
            )
        runner = self._runners.get(batch_size)
        stale = self.mode != "eager" and self.reason is None and self._stale()
        if runner is not None and not stale and (runner.max_length or length) >= length:
            return runner
        if stale:
            self._runners.clear()
        if self._runners.pop(batch_size, None) is self.runner:
            runner = self.runner = None  # two caches need not stand side by side
        room = self.max_length or -(-length // STRIDE) * STRIDE
        start = time.perf_counter()
        with inference(self.vlm):
            runner = self._runners[batch_size] = self._make(batch_size, room)
            self._met.clear()
            self._peaks.clear()
            wait(self.device)
        self.warm_up_ms += (time.perf_counter() - start) * 1e3
        return runner

    def prefill(self, inputs: dict[str, Tensor], *, max_new_tokens: int = 1) -> Tensor:
        """Read a prompt, and put the likeliest next token where the first step reads it.

        Args:
            inputs: as `prepare_inputs` makes them, padded on the left.
            max_new_tokens: tokens that will follow at most.

        Returns:
            The logits after the prompt, (batch, vocabulary).
        """
        batch, length = inputs["input_ids"].shape
        runner = self.runner = self.ready(batch, length + max_new_tokens)
        inputs, mask, start = dict(inputs), inputs.get("attention_mask"), None
        if mask is not None:
            start = check_left_padded(mask)
            if start is None:
                del inputs["attention_mask"]
            elif not hasattr(runner, "counts") or runner.counts:
                inputs["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
        with inference(self.vlm):
            logits = runner.prefill(inputs, start)
            runner.token.copy_(logits.argmax(-1))
        return logits

    def step(self) -> Tensor:
        """Read one token: `token` moves on to the likeliest next one; returns the logits."""
        with inference(self.vlm) if isinstance(self.runner, Forward) else torch.no_grad():
            return self.runner.step()

    @property
    def token(self) -> Tensor:
        """The newest token of each row, (batch,): the likeliest, unless it is written over."""
        return self.runner.token

    def generate(
        self,
        inputs: dict[str, Tensor],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[list[int]]:
        """Answer, and yield the newest token of every row, until all rows have ended.

        Args:
            inputs: as `prepare_inputs` makes them, padded on the left.
            max_new_tokens: at most so many.
            temperature: 0 takes the likeliest token; above, it is drawn.
            top_p: drawn from the likeliest tokens that together have this probability.
            seed: of the draws.

        Raises:
            WorkbenchError: temperature below 0, top_p outside (0, 1], or no room.
        """
        if temperature < 0 or not 0 < top_p <= 1:
            raise WorkbenchError(
                f"temperature is 0 or more and top_p above 0 and at most 1, "
                f"not {temperature} and {top_p}."
            )
        stop = end_tokens(self.vlm)
        pad = self.vlm.tokenizer.pad_token_id or 0
        draws = torch.Generator(self.device).manual_seed(seed)
        logits = self.prefill(inputs, max_new_tokens=max_new_tokens)
        ended = [False] * len(logits)
        for n in range(max_new_tokens):
            if temperature:
                self.token.copy_(draw(logits, temperature, top_p, draws))
            said = self.token.tolist()
            yield [pad if over else token for token, over in zip(said, ended, strict=True)]
            ended = [over or token in stop for token, over in zip(said, ended, strict=True)]
            if all(ended) or n + 1 == max_new_tokens:
                return
            logits = self.step()

    def timed(
        self, inputs: dict[str, Tensor], max_new_tokens: int
    ) -> Iterator[tuple[int, float, tuple[int, int]]]:
        """Answer one question greedily without end, and time each step apart.

        Yields:
            The token, the seconds it took, and bytes of keys and values and of states by then.
        """
        length = inputs["input_ids"].shape[1]
        runner = self.ready(1, length + max_new_tokens)  # before the clock runs
        kind = runner.prompt_class(length)
        if self.device.type == "cuda" and kind not in self._met:
            self._met.add(kind)  # at the first of a class kernels compile, or a graph is recorded
            start = time.perf_counter()
            self.prefill(inputs, max_new_tokens=max_new_tokens)
            wait(self.device)
            self.warm_up_ms += (time.perf_counter() - start) * 1e3
        wait(self.device)
        start = time.perf_counter()
        self.prefill(inputs, max_new_tokens=max_new_tokens)
        while True:
            token = self.token.item()
            yield token, time.perf_counter() - start, self.bytes_held()
            start = time.perf_counter()
            self.step()

    def pretend(self, batch_size: int, length: int, *, max_new_tokens: int) -> None:
        """Stand behind a prompt that was never read: for timing steps at any length.

        Raises:
            WorkbenchError: the model runs its own forward, which cannot pretend.
        """
        self.runner = self.ready(batch_size, length + max_new_tokens)
        if isinstance(self.runner, Forward):
            raise WorkbenchError(f"{self} must read a prompt before it can go on.")
        with inference(self.vlm):
            self.runner.pretend(length)

    @property
    def without_graphs(self) -> bool:
        """Whether prompts were to be recorded, and could not be."""
        recorded = getattr(self.runner, "recorded", None)
        return recorded is not None and recorded.failed

    def largest(self, n_bytes: int | None, n_prompt: int) -> int | None:
        """Return the most memory that prompts like the last have needed, this one's included.

        What graphs work in is counted only while they are recorded.

        Args:
            n_bytes: what was counted now, or None if nothing is.
            n_prompt: tokens of the prompt.
        """
        if n_bytes is None:
            return None
        like = self.runner.prompt_class(n_prompt)
        self._peaks[like] = max(n_bytes, self._peaks.get(like, 0))
        return self._peaks[like]

    def bytes_held(self) -> tuple[int, int]:
        """Return bytes of keys and values that are filled, and of Mamba-2 states."""
        return self.runner.bytes_held()

    def bytes_reserved(self) -> tuple[int, int]:
        """Return bytes of all places for keys and values, filled or free, and of states."""
        return self.runner.bytes_reserved()

    def _make(self, batch_size: int, room: int) -> Lean | Forward:
        if self.mode == "eager":
            return Forward(self.vlm, batch_size, None)
        if self.reason is None:
            decoder = read_decoder(self.vlm.model)
            self._weights = self._versions()
            on_gpu = self.device.type == "cuda"
            graph = on_gpu and self.mode in ("graph", "compiled")
            return Lean(
                self.vlm, decoder, self._choose(decoder, graph), batch_size, room, graph
            )
        if self.mode == "graph":
            raise WorkbenchError(
                f"{self.vlm.name} cannot be recorded as a CUDA graph, because {self.reason}: take "
                "mode='compiled' or mode='static'."
            )
        if self.mode == "static":
            return Forward(self.vlm, batch_size, room)
        options = {"fullgraph": True, "dynamic": False, "backend": self.backend}
        if self.device.type == "cuda" and self.backend == "inductor":
            options["mode"] = "reduce-overhead"
        return Forward(self.vlm, batch_size, room, lambda f: torch.compile(f, **options))

    def _choose(self, decoder, graph: bool) -> Operations:
        if self.device.type == "cuda":
            operations = TritonOperations(decoder) if has_triton() else Operations(by_place=graph)
        elif self._copies():
            operations = Packed(decoder)
        else:
            operations = Operations()
        if self.mode == "compiled":
            operations = Compiled(operations, self.backend)
        return operations if self.wrap is None else self.wrap(operations)

    def _versions(self) -> tuple[int, ...]:
        """Tell weights apart from what they were: moved, or, where they were copied, changed."""
        parameters = list(self.vlm.model.parameters())
        addresses = tuple(p.data_ptr() for p in parameters)
        if not self._copies():
            return addresses
        return addresses + tuple(0 if p.is_inference() else p._version for p in parameters)

    def _copies(self) -> bool:
        small = _decoder_bytes(self.vlm) <= LARGEST_PACKED
        return self.device.type == "cpu" and self.mode == "static" and small

    def _stale(self) -> bool:
        return bool(self._runners) and self._versions() != self._weights


def draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """Draw one token a row from (batch, vocabulary), as `generate` warps its logits."""
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    if top_p < 1:
        ordered, places = probabilities.sort(dim=-1, descending=True)
        # A token stays while those before it have less than top_p: one always does.
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0)
        probabilities = torch.zeros_like(ordered).scatter(-1, places, ordered)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def _decoder_bytes(vlm: VLM) -> int:
    return sum(p.nbytes for p in vlm.model.get_decoder().parameters())
