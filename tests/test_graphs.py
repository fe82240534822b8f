"""Decoder layers as CUDA graphs: they train as layers do that are launched kernel by kernel."""

import threading
from contextlib import nullcontext

import pytest
import tiny
import torch
from torch import nn
from trainees import PLAN, samples, tensors

from workbench.errors import WorkbenchError
from workbench.steps.conversion.initialization import convert
from workbench.steps.training import graphs
from workbench.steps.training.distillation import Stage, distill

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

STAGES = [
    Stage("align", 2, layer_weight=1.0, trains="mixers"),
    Stage("both", 3, layer_weight=1.0, layer_kind="norm", kl_weight=1.0, hidden_weight=1.0),
]


class Layer(nn.Module):
    """Takes tensors nested and by name, beside what is none."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, hidden, rotary=None, use_cache=False):
        cos, sin = rotary
        return (self.proj(hidden) * cos + sin, use_cache)


@pytest.fixture
def recorded(monkeypatch):
    """The calls for which graphs were made, run as they are."""
    made = []

    def graphed(call, given, **options):
        made.append(call)
        return call

    monkeypatch.setattr(graphs, "_recording", nullcontext)  # it asks for a GPU
    monkeypatch.setattr(graphs.torch.cuda, "make_graphed_callables", graphed)
    return made


def test_a_graph_is_recorded_once_a_situation_and_says_what_the_layer_says(recorded):
    layer = Layer()
    graphed = graphs.LayerGraphs(layer, layer.forward)
    hidden, rotary = torch.randn(2, 3, 4), (torch.randn(4), torch.randn(4))
    for _ in range(2):
        said = graphed(hidden, rotary=rotary, use_cache=False)
        assert torch.equal(said[0], layer(hidden, rotary)[0])
        assert said[1] is False
    assert len(recorded) == 1
    graphed(hidden[:1], rotary=rotary)
    graphed(hidden.requires_grad_(), rotary=rotary)
    with graphed.another_call():
        graphed(hidden, rotary=rotary)
    with torch.no_grad():
        graphed(hidden, rotary=rotary)
    layer.proj.bias.requires_grad_(False)
    graphed(hidden, rotary=rotary)
    assert len(recorded) == 6


def test_a_layer_that_cannot_be_recorded_is_named(monkeypatch):
    def refuse(*args, **options):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graphs, "_recording", nullcontext)
    monkeypatch.setattr(graphs.torch.cuda, "make_graphed_callables", refuse)
    layer = Layer()
    with pytest.raises(WorkbenchError, match=r"Layer .*capturing\): distil with graph_layers=Fal"):
        graphs.LayerGraphs(layer, layer.forward)(torch.ones(1, 4), (torch.ones(4), torch.ones(4)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_graphs_are_refused():
    teacher = tiny.vlm()
    with pytest.raises(WorkbenchError, match="needs a GPU"):
        distill(convert(teacher, PLAN, init="matvlm"), teacher, samples(2), graph_layers=True)


@needs_gpu
def test_another_thread_may_pin_memory_meanwhile():
    done, pinned = threading.Event(), []

    def pin():  # what is kept cannot be handed out again, so that each asks CUDA
        while not done.is_set():
            pinned.append(torch.empty(2**10).pin_memory())

    beside = threading.Thread(target=pin)
    beside.start()
    try:
        for _ in range(30):
            layer = nn.Linear(64, 64).cuda()
            hidden = torch.randn(8, 64, device="cuda", requires_grad=True)
            said = graphs.LayerGraphs(layer, layer.forward)(hidden)
            assert torch.allclose(said, layer(hidden), atol=1e-5)
    finally:
        done.set()
        beside.join()
    assert len(pinned) > 30


@needs_gpu
def test_after_a_layer_that_cannot_be_recorded_the_gpu_goes_on():
    class Reads(nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden) * nn.functional.dropout(hidden, 0.5).sum().item()

    layer, stream = Reads(64, 64).cuda(), torch.cuda.current_stream()
    hidden = torch.randn(8, 64, device="cuda")
    with pytest.raises(WorkbenchError, match="cannot be recorded"):
        graphs.LayerGraphs(layer, layer.forward)(hidden)
    assert torch.cuda.current_stream() == stream
    assert len(torch.randn(9, device="cuda").unique()) > 1
    assert torch.isfinite(layer(hidden)).all()


@needs_gpu
@pytest.mark.parametrize("accumulate", [1, 2])
def test_graphs_train_each_tensor_the_same_way(accumulate):
    teacher = tiny.vlm()
    teacher.model.cuda()
    start = tensors(convert(teacher, PLAN, init="matvlm"))
    runs = []
    for graphed in (False, True):
        student = convert(teacher, PLAN, init="matvlm")
        run = distill(
            student, teacher, samples(4), recipe=STAGES, batch_size=2, accumulate=accumulate,
            graph_layers=graphed,
        )  # fmt: skip
        runs.append((run.rows[-1].loss, tensors(student)))
    (eager_loss, eager), (loss, found) = runs
    assert loss == pytest.approx(eager_loss, rel=2e-2)
    # AdamW's first steps are signs: an element whose gradient is rounding may go either way, so
    # what is compared is where each tensor went.
    for name, tensor in eager.items():
        went, ours = ((at[name] - start[name]).float().flatten() for at in (eager, found))
        if went.norm() > 0:
            assert torch.cosine_similarity(went, ours, dim=0) > 0.9, name
        else:
            assert torch.equal(found[name], tensor), name
