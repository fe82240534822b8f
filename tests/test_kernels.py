"""Kernels are chosen by what is there, and say so; on a GPU each equals the naive recurrence."""

import pytest
import torch

from workbench.errors import WorkbenchError
from workbench.mamba import backends, kernels, ssd

GPU = torch.cuda.is_available()
SIZES = [(64, 1), (64, 3), (64, 500), (80, 1), (80, 3), (80, 500)]
TOLERANCE = {torch.float32: 3e-3, torch.bfloat16: 3e-2}  # relative; float32 may run as tf32


def inputs(headdim, length, dtype, device, padded=True):
    torch.manual_seed(length)
    x, B, C = (torch.randn(2, length, 4, headdim, device=device) for _ in range(3))
    dt = torch.rand(2, length, 4, device=device) * 0.2
    if padded:
        dt[1, : length // 2] = 0
    A = -torch.rand(4, device=device) * 4
    first = torch.randn(2, 4, headdim, headdim, device=device)
    B, C = B / headdim**0.5, C / headdim**0.5
    return x.to(dtype), dt, A, B.to(dtype), C.to(dtype), first


def results(scan, *tensors):
    tensors = [t.detach().requires_grad_() for t in tensors]
    y, state = scan(*tensors[:5], initial_state=tensors[5])
    yield from (y, state)
    yield from torch.autograd.grad((y.double().sum() + state.double().sum()), tensors)


@pytest.mark.parametrize("name", kernels.available())
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("headdim, length", SIZES)
def test_every_scan_is_the_recurrence_in_output_state_and_gradients(name, dtype, headdim, length):
    given = inputs(headdim, length, dtype, "cuda" if GPU else "cpu")
    expected = results(ssd.ssd_recurrent, *(t.double() for t in given))
    with kernels.use(name):
        found = results(kernels.ssd, *given)
        try:
            for one, other in zip(found, expected, strict=True):
                error = (one.double() - other).norm() / other.norm().clamp(min=1e-12)
                assert error <= TOLERANCE[dtype]
        except RuntimeError as refusal:
            if name != "fla" or "Please upgrade Triton" not in str(refusal):
                raise
            # With some versions of Triton fla's backward is wrong on Hopper, and fla knows it.
            pytest.skip(f"output and state are right; gradients: {refusal}")


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    kernels.missing.cache_clear()
    yield
    kernels.missing.cache_clear()


@pytest.mark.usefixtures("no_gpu")
def test_what_is_missing_has_a_reason():
    assert kernels.available() == ("torch",)
    assert kernels.missing() == dict.fromkeys(("mamba_ssm", "fla", "triton"), "there is no GPU")
    with pytest.raises(WorkbenchError, match="'fla' cannot run here: there is no GPU"):
        kernels.use("fla")
    with pytest.raises(WorkbenchError, match="no kernels called 'cobol'"):
        kernels.use("cobol")
    with kernels.use("auto"):
        pass


def test_a_package_that_does_not_load_is_an_import_error_that_names_it():
    with pytest.raises(ImportError, match="no_such_package: ModuleNotFoundError"):
        backends.load("no_such_package", "anything")
    with pytest.raises(ImportError, match="math: AttributeError"):
        backends.load("math", "no_such_function")


def test_kernels_hand_back_what_they_cannot_do():
    x, dt, A, B, C, first = inputs(8, 3, torch.float32, "cpu")
    assert backends.ssd_fla(x, dt, A, B, C, initial_state=None) is None
    assert backends.ssd_mamba_ssm(x, dt, A, B, C, initial_state=None) is None
    step = (x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0])
    assert backends.step_mamba_ssm(*step, state=first) is None
    flat = x.flatten(2)
    found = backends.conv_causal_conv1d(flat, torch.ones(32, 4), None, activation=None, state=None)
    assert found is None


def test_the_choice_is_measured_once_for_a_class_of_shapes(monkeypatch):
    given = inputs(8, 100, torch.bfloat16, "cpu")
    seconds, asked = {"torch": 3.0, "mamba_ssm": 2.0, "fla": 1.0}, []

    def timed(name, *unused):
        asked.append(name)
        if name == "fla" and len(asked) > 3:
            raise RuntimeError("does not compile")
        return seconds[name]

    monkeypatch.setattr(kernels, "_fastest", {})
    monkeypatch.setattr(kernels, "available", lambda: tuple(seconds))
    monkeypatch.setattr(kernels, "_time", timed)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert kernels._choose(*given[:5], None) == "fla"
    assert kernels._choose(*given[:5], None) == "fla"
    assert asked == ["torch", "mamba_ssm", "fla"]
    longer = inputs(8, 200, torch.bfloat16, "cpu")
    assert kernels._choose(*longer[:5], None) == "mamba_ssm"
    short = inputs(8, 3, torch.bfloat16, "cpu")
    assert kernels._choose(*short[:5], None) == "torch"
    precise, n_asked = inputs(8, 1000, torch.float32, "cpu"), len(asked)
    with torch.no_grad():  # a prompt
        assert kernels._choose(*precise[:5], None) == "torch"
    assert len(asked) == n_asked
