"""What the teacher itself answers, as targets to train on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from workbench.data import Dataset, Sample, Texts
from workbench.errors import WorkbenchError
from workbench.models.generation import answer_batch
from workbench.models.teacher import VLM
from workbench.steps.training.batches import checked_data

AT_ONCE = 16  # batches whose pictures are in memory together


def answers_of(
    teacher: VLM,
    data: Sequence[Sample],
    *,
    limit: int | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 96,
    on_progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """The samples with the teacher's greedy reply in place of their answer.

    A student that learns from these hears its teacher's own words, which is what the divergence
    asks of it, and no data set's. Later turns fall away; so do samples with an empty reply.

    Args:
        teacher: who is asked.
        data: samples, such as a `Dataset`.
        limit: at most this many.
        batch_size: questions answered at once.
        max_new_tokens: a reply ends here at the latest.
        on_progress: called with (answered, all).

    Raises:
        WorkbenchError: there is no sample, only the name of some, or no reply; or batch_size is
            below 1.
    """
    if isinstance(checked_data(data), Texts):
        raise WorkbenchError("Plain text asks nothing: give samples.")
    if batch_size < 1:
        raise WorkbenchError(f"batch_size must be at least 1, not {batch_size}.")
    n = len(data) if limit is None else min(limit, len(data))
    if n < 1:
        raise WorkbenchError("There is no sample to ask: the data set is empty.")
    at, replies = 0, {}
    while len(replies) < n and at < len(data):
        end = min(len(data), at + min(n - len(replies), AT_ONCE * batch_size))
        read = {i: data[i] for i in range(at, end)}
        # Where a picture is broken another sample stands in, which has a place of its own.
        some = {i: s for i, s in read.items() if i not in getattr(data, "broken", ())}
        options = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
        said = answer_batch(teacher, list(some.values()), **options)
        replies |= zip(some, said, strict=True)
        at = end
        if on_progress is not None:
            on_progress(len(replies), n)
    answered = [i for i, reply in replies.items() if reply]
    if not answered:
        raise WorkbenchError(f"{teacher.name} gave no reply to any of {len(replies)} samples.")

    def make(index: int) -> Sample:
        place = answered[index]
        return replace(data[place], answer=replies[place], facts=None, more=())

    name = f"{getattr(data, 'name', 'samples')}, answered by {teacher.name}"
    return Dataset(name, getattr(data, "families", ()), make, len(answered))
