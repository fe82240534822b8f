"""What an engine drives: a prompt in, then one token at a time, always from the same tensors.

`Lean` reads the decoder into records, through which prompts and steps go; it can record the step as
a CUDA graph. `Forward` calls the model's own forward and takes any family, on a cache that grows or
a static one.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from workbench.errors import WorkbenchError
from workbench.models.cache import CACHE, SSMSlot, cache_bytes, install_slots
from workbench.models.engine.decoder import Decoder
from workbench.models.engine.decoding import State, StaticSlot, step
from workbench.models.engine.operations import Operations
from workbench.models.engine.prompt import embed, read
from workbench.models.engine.recorded_prompts import RecordedPrompts, recording
from workbench.models.families import text_config
from workbench.models.hybrid import plan_of
from workbench.models.teacher import VLM

IDLE_PROMPT, IDLE_STEPS = 2, 3  # what warms up, in tokens


class Lean:
    """A decoder's records, a state of fixed size, and a step.

    Args:
        vlm: the model; its own forward reads prompts that are padded.
        decoder: what it was read into.
        operations: how a step is computed.
        batch_size: sequences side by side.
        max_length: positions that there is room for.
        graph: record the step as a CUDA graph.
    """

    def __init__(
        self,
        vlm: VLM,
        decoder: Decoder,
        operations: Operations,
        batch_size: int,
        max_length: int,
        graph: bool,
    ) -> None:
        plan = plan_of(vlm.model)
        layers = () if plan is None else plan.mamba_layers
        self.vlm, self.decoder, self.operations = vlm, decoder, operations
        max_length = max(max_length, IDLE_PROMPT + IDLE_STEPS)
        self.state = State(decoder, batch_size, max_length, layers)
        self.batch_size, self.max_length = batch_size, max_length
        self.graph: torch.cuda.CUDAGraph | None = None
        self.recorded: RecordedPrompts | None = None
        self._warm_up(graph)
        if graph:
            self.recorded = RecordedPrompts(decoder, self.state, operations.for_prompts)

    @property
    def token(self) -> Tensor:
        """The token that the next step reads, (batch,)."""
        return self.state.token

    @property
    def length(self) -> int:
        """Positions read so far."""
        return self.state.length

    def prefill(self, inputs: dict[str, Tensor], start: Tensor | None) -> Tensor:
        """Read a prompt from the beginning; start: padding before each row.

        Returns:
            The logits after it, (batch, vocabulary).
        """
        self.state.begin(start)
        if start is None and "position_ids" not in inputs:
            embedded = embed(self.vlm.model, self.decoder, inputs)
            logits = self.read(embedded)
        else:  # padding needs masks, and positions of its own
            given = {**inputs, CACHE: self.state.cache}
            logits = self.vlm.model(**given, use_cache=True, logits_to_keep=1).logits[:, -1]
        self.state.follow(inputs["input_ids"].shape[1])
        return logits

    def read(self, embedded: Tensor) -> Tensor:
        """Read what was embedded, (batch, seqlen, d_model), by a graph if there may be one."""
        if self.recorded is not None:
            return self.recorded.read(embedded)
        return read(self.decoder, self.state, self.operations.for_prompts, embedded)

    def prompt_class(self, seqlen: int) -> int:
        """Tell prompts apart that need other kernels or graphs."""
        room = None if self.recorded is None else self.recorded.room(seqlen)
        return seqlen.bit_length() if room is None else room

    def step(self) -> Tensor:
        """Read `token`; put the likeliest next one in its place, and return all logits."""
        if self.graph is None:
            logits = self._step()
        else:
            self.graph.replay()
            logits = self.logits
        self.state.length += 1
        return logits

    def pretend(self, length: int) -> None:
        """Stand behind a prompt of noise that was never read."""
        self.state.begin(None)
        for slot in self.state.cache.layers:
            if isinstance(slot, StaticSlot):
                slot.keys.normal_()
                slot.values.normal_()
            else:
                slot.reset()
        self.state.follow(length)

    def bytes_held(self) -> tuple[int, int]:
        """Return bytes of keys and values that are filled, and of Mamba-2 states."""
        kv, ssm = self.bytes_reserved()
        return kv * self.length // self.max_length, ssm

    def bytes_reserved(self) -> tuple[int, int]:
        """Return bytes of all places for keys and values, and of Mamba-2 states."""
        slots = self.state.cache.layers
        kv = sum(s.keys.nbytes + s.values.nbytes for s in slots if isinstance(s, StaticSlot))
        ssm = sum(
            s.conv_states[0].nbytes + s.recurrent_states[0].nbytes
            for s in slots
            if isinstance(s, SSMSlot)
        )
        return kv, ssm

    def _step(self) -> Tensor:
        logits = step(self.decoder, self.state, self.operations)
        self.state.token.copy_(logits.argmax(-1))
        return logits

    def _warm_up(self, graph: bool) -> None:
        """Make every tensor, compile every kernel, and record the graph, on idle tokens."""
        ids = torch.zeros(
            self.batch_size, IDLE_PROMPT, dtype=torch.long, device=self.token.device
        )
        self.prefill({"input_ids": ids}, None)
        if not graph:
            self._step()
        else:
            beside = torch.cuda.Stream(self.token.device)
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                for _ in range(IDLE_STEPS):
                    self._step()
            torch.cuda.current_stream().wait_stream(beside)
            self.graph = torch.cuda.CUDAGraph()
            # Another thread may allocate and copy meanwhile, but not wait for the whole device.
            with recording(), torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.logits = self._step()
        self.state.begin(None)


class Forward:
    """The model's own forward, for every family.

    Args:
        vlm: the model.
        batch_size: sequences side by side.
        max_length: positions that there is room for; None: a cache that grows.
        compiled: a wrapper for the forward of a decode step, such as torch.compile.
    """

    def __init__(
        self,
        vlm: VLM,
        batch_size: int,
        max_length: int | None,
        compiled: Callable[[Callable], Callable] | None = None,
    ) -> None:
        self.vlm, self.batch_size, self.max_length = vlm, batch_size, max_length
        device = vlm.model.device
        self.token = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.forward = vlm.model.forward if compiled is None else compiled(vlm.model.forward)
        self.length, self.start, self.mask = 0, None, None
        self.cache = self._cache()
        # Models with positions in three dimensions find them by themselves.
        inner = getattr(vlm.model, "model", None)
        self.counts = not any(hasattr(m, "rope_deltas") for m in (vlm.model, inner))

    def prefill(self, inputs: dict[str, Tensor], start: Tensor | None) -> Tensor:
        """As `Lean.prefill`."""
        self.cache, self.start = self._cache(), start
        inputs = dict(inputs)
        if start is not None and self.max_length is not None:
            # The places that are still free may be seen: they lie in the future.
            given = inputs["attention_mask"]
            self.mask = given.new_ones(self.batch_size, self.max_length)
            self.mask[:, : given.shape[1]] = given
            inputs["attention_mask"] = self.mask
        else:
            self.mask = inputs.get("attention_mask")
        output = self.vlm.model(**inputs, **{CACHE: self.cache}, use_cache=True, logits_to_keep=1)
        self.length = inputs["input_ids"].shape[1]
        return output.logits[:, -1]

    def prompt_class(self, seqlen: int) -> int:
        """As `Lean.prompt_class`."""
        return seqlen.bit_length()

    def step(self) -> Tensor:
        """As `Lean.step`."""
        options = {}
        if self.start is not None:
            if self.max_length is None:
                self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
            options["attention_mask"] = self.mask
            if self.counts:
                options["position_ids"] = (self.length - self.start)[:, None]
        output = self.forward(
            input_ids=self.token[:, None],
            use_cache=True,
            logits_to_keep=1,
            **{CACHE: self.cache},
            **options,
        )
        self.length += 1
        logits = output.logits[:, -1]
        self.token.copy_(logits.argmax(-1))
        return logits

    def bytes_held(self) -> tuple[int, int]:
        """As `Lean.bytes_held`."""
        kv, ssm = cache_bytes(self.cache)
        return kv if self.max_length is None else kv * self.length // self.max_length, ssm

    def bytes_reserved(self) -> tuple[int, int]:
        """As `Lean.bytes_reserved`."""
        return cache_bytes(self.cache)

    def _cache(self) -> DynamicCache | StaticCache:
        config = text_config(self.vlm.model)
        if self.max_length is None:
            cache = DynamicCache(config=config)
        else:
            cache = StaticCache(config=config, max_cache_len=self.max_length)
        plan = plan_of(self.vlm.model)
        if plan is not None:
            install_slots(cache, plan.mamba_layers, plan.n_layers)
        return cache


def check_left_padded(mask: Tensor) -> Tensor | None:
    """Return how many positions of each row are padding, (batch,), or None if none is.

    Raises:
        WorkbenchError: padding stands elsewhere than at the left.
    """
    mask = mask.bool()
    if bool(mask.all()):
        return None
    if bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise WorkbenchError("An engine takes batches that are padded on the left only.")
    return (~mask).sum(1)
