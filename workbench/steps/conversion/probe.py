"""Ask what a model would say with any choice of its layers as Mamba-2, without building it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from time import perf_counter

import torch
from torch import Tensor, nn

from workbench.errors import WorkbenchError
from workbench.models.families import decoder_layers
from workbench.models.hybrid import mixers
from workbench.models.teacher import VLM
from workbench.steps.conversion.initialization import check_donor
from workbench.steps.quality.fidelity import apart, finite_batches, hidden_states
from workbench.steps.training.objective import places


class Probe:
    """Measures choices of layers by KL to the teacher, on the tokens of the reference answers.

    Pictures are read once: what the teacher's decoder is called with is kept, and the donor's is
    called with the same.

    Args:
        teacher: the model to convert.
        donor: a hybrid of it with a mixer for every layer that is asked about.
        data: what `distill` takes.
        limit: at most this many sequences.
        batch_size: sequences read at once.

    Raises:
        WorkbenchError: no data, or none with an answer in it; a donor that is no hybrid of it.
    """

    def __init__(
        self, teacher: VLM, donor: VLM, data: Iterable, *, limit: int | None, batch_size: int = 8
    ) -> None:
        check_donor(donor, teacher)
        self.teacher, self.donor = teacher, donor
        self.mixers = mixers(donor.model)
        self.n_layers = len(decoder_layers(teacher.model))
        self.n_asked, self.seconds = 0, 0.0  # choices measured, and how long they took
        self._asked: list[tuple[tuple, dict, Tensor, Tensor, Tensor]] = []
        started = perf_counter()
        with torch.no_grad():
            for batch in finite_batches(teacher, data, limit=limit, batch_size=batch_size):
                self._keep(batch)
        self.pass_seconds = perf_counter() - started  # the teacher's own pass, pictures included
        self.n_tokens = sum(len(labels) for *_, labels in self._asked)
        if self.n_tokens == 0:
            raise WorkbenchError("There is no token of an answer in this data: nothing to score.")

    def _keep(self, batch: dict) -> None:
        calls = []
        hook = self.teacher.model.get_decoder().register_forward_pre_hook(
            lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
        )
        try:
            hidden = hidden_states(self.teacher, batch)
        finally:
            hook.remove()
        where = places(batch, "answers")
        at = where.at.to(hidden.device)
        self._asked.append((*calls[0], at, hidden.flatten(0, 1)[at], where.labels))

    def kl(self, replaced: Iterable[int] = (), skipped: Iterable[int] = ()) -> float:
        """Nats per answer token between the teacher and the model with these layers changed.

        Args:
            replaced: layers that mix with the donor's Mamba-2.
            skipped: layers whose attention adds nothing.
        """
        total, started = 0.0, perf_counter()
        with self._changed(set(replaced), set(skipped)), torch.no_grad():
            for args, kwargs, at, theirs, labels in self._asked:
                states = self.donor.model.get_decoder()(*args, **kwargs).last_hidden_state
                ours = states.flatten(0, 1)[at]
                total += apart(self.teacher, self.donor, theirs, ours, labels)[0].item()
        self.n_asked += 1
        self.seconds += perf_counter() - started
        return total / self.n_tokens

    def what_was_read(self) -> Iterator[Tensor]:
        """What tells this data from other data: the labels, and the teacher's states at them."""
        for _, _, at, theirs, labels in self._asked:
            yield from (at, labels, theirs[:, ::16])

    @contextmanager
    def _changed(self, replaced: set[int], skipped: set[int]) -> Iterator[None]:
        ours, theirs = (decoder_layers(vlm.model) for vlm in (self.donor, self.teacher))
        missing = sorted(replaced - set(self.mixers))
        if missing:
            raise WorkbenchError(
                f"{self.donor.name} has no mixer for layer {missing[0]}: align all layers first."
            )
        with ExitStack() as undo:
            for index, layer in enumerate(ours):
                mine = layer.self_attn
                undo.callback(setattr, layer, "self_attn", mine)
                if index not in replaced:
                    attention = theirs[index].self_attn
                    layer.self_attn = _Silent(attention) if index in skipped else attention
            yield


class _Silent(nn.Module):
    """An attention that adds nothing to the stream."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self._attention = (attention,)  # in a tuple: no submodule

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._attention[0], name)

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> tuple:
        return torch.zeros_like(hidden_states), None
