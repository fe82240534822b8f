"""The Triton kernels of decoding against plain torch: on a GPU, or interpreted on a CPU.

Without a GPU they run, slowly, with TRITON_INTERPRET=1 in the environment, if Triton is there.
"""

import importlib.util
import os

import pytest
import tiny
import torch
from test_engine import endless, words

from workbench.models.cache import CACHE
from workbench.models.engine.decoder import Matrix, Norm, read_decoder
from workbench.models.engine.decoding import State, step
from workbench.models.engine.operations import Operations

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not (GPU or INTERPRETED),
    reason="needs Triton, and a GPU or TRITON_INTERPRET=1",
)
DEVICE = "cuda" if GPU and not INTERPRETED else "cpu"
# The interpreter multiplies the bits of bfloat16 as if they were whole numbers.
HALF = torch.float16 if INTERPRETED else torch.bfloat16
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
OPTIONS = {
    "paper": {},
    "warm": {"rope": True, "bias": True, "scale": "attention"},
    "bare": {"gate": False, "norm": False, "conv_activation": None, "d_conv": 2},
    "wide norm": {"norm_group_size": 48},
    "no taps": {"d_conv": 1},
}


def run(vlm, operations, batch, start, n=5):
    decoder = read_decoder(vlm.model)
    state = State(decoder, batch, 40, vlm.plan.mamba_layers if vlm.plan else ())
    ids = tiny.token_ids(batch, 7).to(DEVICE)
    start = torch.tensor(start, device=DEVICE)
    mask = (torch.arange(7, device=DEVICE) >= start[:, None]).long()
    logits = []
    with torch.no_grad():
        state.begin(start)
        vlm.model(
            input_ids=ids, attention_mask=mask if state.padded else None,
            **{CACHE: state.cache}, use_cache=True,
        )  # fmt: skip
        state.follow(7)
        for i in range(n):
            state.token.copy_(ids[:, i])
            logits.append(step(decoder, state, operations(decoder)))
            state.length += 1
    states = [
        t.clone()
        for slot in state.cache.layers
        for t in (
            (slot.keys, slot.values)
            if slot.keys is not None
            else (slot.conv_states[0], slot.recurrent_states[0])
        )
    ]
    return torch.stack(logits), states


def both(vlm, batch, start):
    from workbench.models.engine.triton_operations import TritonOperations

    vlm.model.to(DEVICE)
    expected, states = run(vlm, lambda _: Operations(), batch, start)
    logits, others = run(vlm, TritonOperations, batch, start)
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=2e-4)
    for one, other in zip(others, states, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("batch, start", [(1, [0]), (2, [0, 3])], ids=["one", "padded"])
def test_a_step_of_phi(options, batch, start):
    both(endless(tiny.vlm((0, 2), options)), batch, start)


@pytest.mark.parametrize("family", ["llama", "phi-norms"])
@pytest.mark.parametrize("batch, start", [(1, [0]), (2, [0, 3])], ids=["one", "padded"])
def test_a_step_of_other_families(family, batch, start):
    vlm = words(family, (1, 2), rope=True)
    both(vlm, batch, start)


@pytest.mark.parametrize("family", ["phi", "llama"])
def test_a_step_of_a_few_rows(family):
    from workbench.models.engine.triton_operations import TritonOperations

    vlm = endless(tiny.vlm((0, 2))) if family == "phi" else words(family, (1, 2))
    vlm.model.to(DEVICE, HALF)
    expected, _ = run(vlm, lambda _: Operations(), 3, [0, 3, 0], n=2)
    logits, _ = run(vlm, TritonOperations, 3, [0, 3, 0], n=2)
    assert error(logits, expected) < 2 * TOLERANCE[HALF]


def test_a_few_rows_take_their_own_kernels_unless_in_float32():
    from workbench.models.engine.triton_operations import TritonOperations

    vlm = endless(tiny.vlm((0, 2)))
    operations = TritonOperations(read_decoder(vlm.model.to(DEVICE, HALF)))
    fits = [operations._fits(torch.zeros(rows, 48, dtype=HALF)) for rows in (1, 2, 16, 17)]
    assert fits == [False, True, True, False]
    assert not operations._fits(torch.zeros(2, 48))


def error(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def matrix(n_out, n_in, dtype, bias=True):
    b = torch.randn(n_out, device=DEVICE, dtype=dtype) if bias else None
    return Matrix(torch.randn(n_out, n_in, device=DEVICE, dtype=dtype) / n_in**0.5, b)


def few_rows(rows, width, dtype, centred):
    """Tokens of the residual stream, and a norm of them."""
    torch.manual_seed(rows)
    weight, bias = torch.randn(2, width, device=DEVICE, dtype=dtype)
    norm = Norm(weight, bias if centred else None, 1e-5, centred)
    return torch.randn(rows, width, device=DEVICE, dtype=dtype) + 1, norm


ROWS = pytest.mark.parametrize(
    "rows, width, centred", [(2, 48, True), (3, 70, False), (16, 131, True)]
)


@ROWS
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=["float32", "half"])
def test_project_a_few_rows(rows, width, centred, dtype):
    from workbench.models.engine import triton_rows

    h, norm = few_rows(rows, width, dtype, centred)
    x = triton_rows.normalise(h, norm)
    assert error(x, norm(h)) < TOLERANCE[dtype]
    shapes = ((40, True), (5, False), (70, True), (16, True), (1, True), (33, False))
    some = tuple(matrix(n, width, dtype, bias) for n, bias in shapes)
    stream = triton_rows.PROJECT._replace(rows=32, columns=32, programs=8)
    for n_matrices, active, name, activation in (
        (6, 2, "gelu_new", lambda t: torch.nn.functional.gelu(t, approximate="tanh")),
        (1, 0, "silu", torch.nn.functional.silu),
        (2, -1, "", None),
    ):
        found = triton_rows.project(x, some[:n_matrices], active, name, stream)
        assert len(found) == n_matrices
        for i, one in enumerate(found):
            expected = some[i](x)
            expected = activation(expected) if i == active else expected
            assert error(one, expected) < TOLERANCE[dtype]


@ROWS
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=["float32", "half"])
def test_add_a_few_rows(rows, width, centred, dtype):
    from workbench.models.engine import triton_rows

    h, norm = few_rows(rows, width, dtype, centred)
    out, down = matrix(width, 40, dtype, bias=centred), matrix(width, 90, dtype)
    # Rows of a wider tensor, as `project` leaves them.
    x, y, by = torch.randn(rows, 220, device=DEVICE, dtype=dtype).split([40, 90, 90], dim=1)
    stream = triton_rows.ADD._replace(rows=16, columns=32, programs=12)
    for given, expected in (
        ((out, x), h + out(x)),
        ((out, x, down, y), h + out(x) + down(y)),
        ((out, x, down, y, by), h + out(x) + down(y * by)),
    ):
        found, normed = triton_rows.add(h, *given, norm=norm, stream=stream)
        assert error(found, expected) < TOLERANCE[dtype]
        assert error(normed, norm(found)) < TOLERANCE[dtype]
    assert triton_rows.add(h, out, x)[1] is None
