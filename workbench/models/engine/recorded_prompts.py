"""Short prompts as CUDA graphs: at a thousand tokens a GPU waits longer for launches than it works.

One graph serves all lengths of a stride: a prompt is filled up with positions behind its end, which
leave nothing that is read. Longer prompts keep a GPU busy by themselves.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch
from torch import Tensor

from workbench.models.engine.decoder import Decoder
from workbench.models.engine.decoding import State
from workbench.models.engine.operations import Operations
from workbench.models.engine.prompt import read

STRIDE, LONGEST = 128, 2048  # positions; of all sequences together
RECORDING = Lock()  # a process can record one CUDA graph at a time

log = logging.getLogger(__name__)


@contextmanager
def recording() -> Iterator[None]:
    """One graph at a time; should it fail, the GPU stays usable."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    kept = generator.clone_state()
    with RECORDING, torch.cuda.stream(torch.cuda.current_stream()):
        try:
            yield
        except RuntimeError:
            generator.graphsafe_set_state(kept)  # else it goes on believing that it is recorded
            raise


class RecordedPrompts:
    """What reads prompts of one state, recorded when a length of a stride comes first.

    Args:
        decoder: what the model was read into.
        state: that all graphs fill; its cache has its tensors already.
        operations: how the parts of a layer are computed.
    """

    def __init__(self, decoder: Decoder, state: State, operations: Operations) -> None:
        self.decoder, self.state, self.operations = decoder, state, operations
        self.beside = torch.cuda.Stream(decoder.embedding.device)
        self.pool = torch.cuda.graph_pool_handle()  # no two run at once, so they share memory
        self.recorded: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self.failed = False

    def room(self, seqlen: int) -> int | None:
        """Positions of the graph that reads so many, or None if no graph will."""
        room = min(-(-seqlen // STRIDE) * STRIDE, self.state.max_length)
        return None if self.failed or room * len(self.state.token) > LONGEST else room

    def read(self, embedded: Tensor) -> Tensor:
        """As `prompt.read`."""
        seqlen = embedded.shape[1]
        room = self.room(seqlen)
        if room is not None and room not in self.recorded:
            self._record(room, embedded)
        if room not in self.recorded:
            return read(self.decoder, self.state, self.operations, embedded)
        graph, given, logits = self.recorded[room]
        given[:, :seqlen] = embedded
        given[:, seqlen:] = 0
        self.state.follow(seqlen)
        graph.replay()
        return logits.clone()

    def _record(self, room: int, embedded: Tensor) -> None:
        given = embedded.new_zeros(embedded.shape[0], room, embedded.shape[2])
        self.state.follow(embedded.shape[1])
        beside = torch.cuda.Stream(given.device)
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):  # kernels compile and are chosen
            self._read(given)
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        options = {"pool": self.pool, "capture_error_mode": "thread_local"}
        try:
            with recording(), torch.cuda.graph(graph, **options):
                logits = self._read(given)
        except RuntimeError as error:  # out of memory, too: a graph needs some of its own
            log.warning("Prompts are read without graphs from now on: %s", error)
            self.failed = True
        else:
            self.recorded[room] = graph, given, logits
        self.state.begin(None)

    def _read(self, given: Tensor) -> Tensor:
        for slot in self.state.cache.layers:  # else keys would be put behind those of before
            slot.forget()
        operations, place = self.operations, self.state.place
        return read(self.decoder, self.state, operations, given, place, self.beside)
