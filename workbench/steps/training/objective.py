"""The losses of one batch as one module, so that every way of running several GPUs can wrap it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from workbench.data.conversations import IGNORE
from workbench.models.families import decoder_layers
from workbench.models.teacher import VLM
from workbench.steps.training.batches import Batch
from workbench.steps.training.graphs import LayerGraphs
from workbench.steps.training.losses import Divergence, at_once, divergence, token_losses
from workbench.steps.training.sharding import outside_layers
from workbench.steps.training.stages import Stage

# What a batch holds beside the model's inputs.
NO_INPUTS = ("labels", "real", "text_tokens")


class Places(NamedTuple):
    """Where the tokens of a batch stand, found on the CPU, so that no GPU is waited for."""

    at: Tensor  # (n,): where a wanted token is predicted, counted through the whole batch
    labels: Tensor  # (n,): the token that follows, `IGNORE` where it belongs to no answer
    real: Tensor | None  # (batch, seqlen) bool, False on padding; None: all are real
    counts: Tensor  # (3,) float: wanted tokens, real tokens, labels


def places(batch: Batch, tokens: str) -> Places:
    """Find the tokens that a stage with `tokens` reads."""
    labels = batch["labels"].cpu()
    real = batch.get("real", batch.get("attention_mask"))
    real = None if real is None else real.cpu().bool()
    if tokens == "answers":
        wanted = labels[:, 1:] != IGNORE
    elif real is None:
        wanted = torch.ones_like(labels[:, 1:], dtype=torch.bool)
    else:
        wanted = real[:, :-1] & real[:, 1:]
    rows, columns = wanted.nonzero(as_tuple=True)
    following = labels[rows, columns + 1]
    n_real = labels.numel() if real is None else int(real.sum())
    counts = torch.tensor([len(rows), n_real, int((following != IGNORE).sum())])
    return Places(rows * labels.shape[1] + columns, following, real, counts.float())


class Objective(nn.Module):
    """What a stage minimises, for the student inside. The teacher is used, but no part of it.

    Args:
        student: the hybrid that trains.
        teacher: on the same device.
        undo: takes hooks off again when the run ends.
        compiled: `torch.compile` every decoder layer of both.
        graphed: record every decoder layer of both as CUDA graphs.
        bf16: compute in bfloat16 where autocast allows it; None is on a GPU.
        sharded: each process holds a part of the student.
    """

    def __init__(
        self, student: VLM, teacher: VLM, undo: ExitStack, *, compiled: bool = False,
        graphed: bool = False, bf16: bool | None = None, sharded: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.student = student.model
        self.bf16 = self.student.device.type == "cuda" if bf16 is None else bf16
        self._teacher = (teacher.model,)  # in a tuple: no submodule, nothing to train or to move
        self.stage: Stage | None = None  # set before the first batch
        self.n_mamba = len(student.plan.mamba_layers)
        self._calls: dict[int, tuple] | None = None
        layers = decoder_layers(teacher.model)
        for index in student.plan.mamba_layers:
            hook = layers[index].register_forward_hook(self._keep(index), with_kwargs=True)
            undo.callback(hook.remove)
        self._tower = _SharedTower(student.model, teacher.model, undo)
        # The last chunk of tokens has a length of its own at every step.
        self._apart = torch.compile(divergence, dynamic=True) if compiled else divergence
        for layer in (*layers, *decoder_layers(self.student)) if compiled else ():
            layer.forward = torch.compile(layer.forward, dynamic=False)
            undo.callback(delattr, layer, "forward")
        self.graphed, self.sharded = graphed, sharded
        if graphed:
            self._graph_layers(layers, undo, forward_only=torch.cuda.graph_pool_handle())
            self._graph_layers(decoder_layers(self.student), undo)

    def _graph_layers(self, layers: nn.ModuleList, undo: ExitStack, forward_only: object = None):
        for layer in layers:
            compiled = "forward" in vars(layer)
            layer.forward = LayerGraphs(layer, layer.forward, forward_only)
            if not compiled:
                undo.callback(delattr, layer, "forward")

    def _keep(self, index: int):
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            if self._calls is not None:
                self._calls[index] = (args, kwargs, output)

        return hook

    def forward(self, batch: Batch, where: Places, per_token: Tensor) -> tuple[Tensor, Tensor]:
        """Losses of a batch.

        Args:
            batch: model inputs and labels.
            where: its `places`.
            per_token: (3,) weights of one wanted token, one real token and one label: the inverse
                of how many the whole step has, whatever it is split into.

        Returns:
            What to minimise, and for the record total, layer loss, KL, cross-entropy, hidden loss,
            and the loss of each Mamba layer; parts that the stage does not ask for are 0.
        """
        stage, device = self.stage, self.student.device
        inputs = {
            name: value.to(device, non_blocking=True)
            for name, value in batch.items()
            if name not in NO_INPUTS and isinstance(value, Tensor)
        }
        total, parts = torch.zeros((), device=device), torch.zeros(2, device=device)
        hidden, layers = total.clone(), torch.zeros(self.n_mamba, device=device)
        with torch.autocast(
            device.type, torch.bfloat16, enabled=self.bf16,
            # A graph casts for itself; kept casts would be a second student where it is sharded.
            cache_enabled=not (self.graphed or self.sharded),
        ):  # fmt: skip
            theirs = self._teacher_states(inputs)
            if stage.layer_weight:
                layers = self._layer_losses(where.real, per_token[1])
                total = total + stage.layer_weight * layers.mean()
            self._calls = None
            if stage.reads_logits:
                with self._tower.replayed(stage.trains != "all+vision"):
                    ours = self.student.base_model(**inputs, use_cache=False).last_hidden_state
                if stage.hidden_weight:
                    hidden = self._hidden_loss(ours, theirs, where.real, per_token[1])
                    total = total + stage.hidden_weight * hidden
                if stage.kl_weight or stage.ce_weight:
                    value, parts = self._token_losses(ours, theirs, where, per_token)
                    total = total + value
        record = torch.cat((torch.stack((total, layers.mean(), *parts, hidden)), layers))
        if self.sharded:  # all processes must reduce the same gradients, of zero if need be
            total = total + sum(0 * p.sum() for p in outside_layers(self.student))
        return total, record.detach()

    def _teacher_states(self, inputs: dict[str, Tensor]) -> Tensor:
        """The teacher's final hidden states; on the way, keep what its layers were given and gave.

        Without its head: the heads read the wanted positions only.
        """
        self._calls = {} if self.stage.layer_weight else None
        with torch.no_grad(), self._tower.kept():
            return self._teacher[0].base_model(**inputs, use_cache=False).last_hidden_state

    def _layer_losses(self, real: Tensor | None, per_token: Tensor) -> Tensor:
        """(n_mamba_layers,): each on the teacher's input against the teacher's output.

        One layer's graph at a time stands in memory; of a sharded student, all of them do.
        """
        layers = decoder_layers(self.student)
        if real is not None:
            real = real.to(self.student.device, torch.float32, non_blocking=True)
        losses = []
        for index, (args, kwargs, output) in sorted(self._calls.items()):
            layer, given = layers[index], args[0] if args else kwargs["hidden_states"]

            def loss(call=(args, kwargs), layer=layer, given=given, output=output) -> Tensor:
                args, kwargs = _with_gradient(*call) if self.sharded else call
                with layer.forward.another_call() if self.graphed else nullcontext():
                    got = _hidden(layer(*args, **kwargs))
                return self._layer_loss(given, got, _hidden(output), real, per_token)

            # A sharded layer has its parameters only while it runs: its graph stays until the end.
            losses.append(loss() if self.sharded else at_once(loss, layer.parameters()))
        return torch.stack(losses)

    def _layer_loss(
        self, given: Tensor, got: Tensor, wanted: Tensor, real: Tensor | None, per_token: Tensor
    ) -> Tensor:
        got, wanted = got.float(), wanted.float()
        if self.stage.layer_kind == "norm":
            distance = (got - wanted).norm(dim=-1) / wanted.shape[-1] ** 0.5
            return (distance if real is None else distance * real).sum() * per_token
        return _relative(got - wanted, wanted - given, real) * per_token

    def _hidden_loss(
        self, ours: Tensor, theirs: Tensor, real: Tensor | None, per_token: Tensor
    ) -> Tensor:
        ours, theirs = ours.float(), theirs.float()
        if real is not None:
            real = real.to(ours.device, torch.float32, non_blocking=True)
        return _relative(ours - theirs, theirs, real) * per_token

    def _token_losses(
        self, ours: Tensor, theirs: Tensor, where: Places, per_token: Tensor
    ) -> tuple[Tensor, Tensor]:
        stage, device = self.stage, ours.device
        at, labels = (t.to(device, non_blocking=True) for t in (where.at, where.labels))
        ours, theirs = (states.flatten(0, 1).index_select(0, at) for states in (ours, theirs))
        kl = Divergence(stage.kl_weight * per_token[0], stage.kl_kind, stage.temperature)
        losses = token_losses(
            self.student,
            self._teacher[0],
            (ours, theirs),
            labels,
            kl=kl if stage.kl_weight else None,
            ce=stage.ce_weight * per_token[2] if stage.ce_weight else None,
            apart=self._apart,
        )
        return losses.total, torch.stack((losses.kl * per_token[0], losses.ce * per_token[2]))


class _SharedTower:
    """The vision tower that trains in neither model, and is the same in both, sees pictures once.

    What it gave the teacher is given to the student again. Towers that end in the projector, as
    Qwen's do, have something that trains, and see the pictures for themselves.
    """

    NAMES = ("vision_tower", "vision_model")

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, undo: ExitStack):
        self.ours, theirs = (self._find(model) for model in (student, teacher))
        self._listens, self._output = False, None
        if self.ours is None or theirs is None or not _equal(self.ours, theirs):
            self.ours = None
        else:
            undo.callback(theirs.register_forward_hook(self._hook).remove)

    def _find(self, model: PreTrainedModel) -> nn.Module | None:
        found = (getattr(model.base_model, name, None) for name in self.NAMES)
        return next((tower for tower in found if tower is not None), None)

    def _hook(self, module: nn.Module, args: tuple, output: object) -> None:
        if self._listens:
            self._output = output

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep what the teacher's tower says inside."""
        self._listens, self._output = True, None
        try:
            yield
        finally:
            self._listens = False

    @contextmanager
    def replayed(self, allowed: bool) -> Iterator[None]:
        """Let the student's tower say it again inside."""
        output, self._output = self._output, None
        if not allowed or output is None or self.ours is None:
            yield
            return
        self.ours.forward = lambda *args, **kwargs: output
        try:
            yield
        finally:
            del self.ours.forward


def _equal(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return (
        type(one) is type(other)
        and ours.keys() == theirs.keys()
        and all(
            t.dtype == theirs[name].dtype and torch.equal(t, theirs[name])
            for name, t in ours.items()
        )
    )


def _relative(error: Tensor, whole: Tensor, real: Tensor | None) -> Tensor:
    """||error||^2 over ||whole||^2, both over all real tokens, times how many there are."""
    weight = torch.ones_like(whole[..., 0]) if real is None else real
    error, whole = ((t.square().sum(-1) * weight).sum() for t in (error, whole))
    return error / whole * weight.sum()


def _with_gradient(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The same call, whose input has a gradient: when that is there, FSDP lets go of the layer."""
    if args:
        return (args[0].detach().requires_grad_(), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": kwargs["hidden_states"].detach().requires_grad_()}


def _hidden(output: Tensor | tuple) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
