import pytest
import torch

from workbench.mamba.ssd import segsum, ssd_chunked, ssd_matrix, ssd_recurrent, ssd_step

BATCH, HEADS, GROUPS, HEADDIM, STATE, CHUNK = 2, 6, 3, 5, 7, 4
LENGTHS = (1, 3, 12, 13, 33)


def inputs(length, dtype=torch.float64, batch=BATCH):
    generator = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    x, B, C = (
        normal(batch, length, n, d) for n, d in ((HEADS, HEADDIM), (GROUPS, STATE), (GROUPS, STATE))
    )
    dt, A = normal(batch, length, HEADS).abs(), -3 * normal(HEADS).abs()
    state = normal(batch, HEADS, HEADDIM, STATE)
    return [t.detach().requires_grad_() for t in (x, dt, A, B, C, state)]


def stepped(x, dt, A, B, C, initial_state):
    outputs, state = [], initial_state
    for t in range(x.shape[1]):
        y, state = ssd_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], state=state)
        outputs.append(y)
    return torch.stack(outputs, 1), state


def gradients(results, given):
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in results]
    return torch.autograd.grad(results, given, weights)


@pytest.mark.parametrize("length", LENGTHS, ids=lambda n: f"length-{n}")
@pytest.mark.parametrize("form", ["chunked", "step"])
def test_every_form_equals_the_recurrence_in_output_state_and_gradients(form, length):
    *given, state = inputs(length)
    y, final = ssd_recurrent(*given, initial_state=state)
    if form == "chunked":
        y_too, final_too = ssd_chunked(*given, chunk_size=CHUNK, initial_state=state)
    else:
        y_too, final_too = stepped(*given, state)
    torch.testing.assert_close(y_too, y)
    torch.testing.assert_close(final_too, final)
    everything = [*given, state]
    for one, two in zip(
        gradients([y, final], everything), gradients([y_too, final_too], everything), strict=True
    ):
        torch.testing.assert_close(two, one)


@pytest.mark.parametrize("length", LENGTHS, ids=lambda n: f"length-{n}")
def test_the_matrix_does_what_the_recurrence_does(length):
    x, dt, A, B, C, _ = inputs(length)
    y, _ = ssd_recurrent(x, dt, A, B, C)
    matrix = ssd_matrix(dt, A, B, C)
    y_too = torch.einsum("bhij,bjhp->bihp", matrix, x)
    assert torch.equal(matrix, matrix.tril())
    torch.testing.assert_close(y_too, y)
    for one, two in zip(
        gradients([y], [x, dt, A, B, C]), gradients([y_too], [x, dt, A, B, C]), strict=True
    ):
        torch.testing.assert_close(two, one)


def test_a_sequence_in_two_parts_is_the_sequence_only_if_the_state_is_carried():
    *given, _ = inputs(13)
    x, dt, A, B, C = given
    y, final = ssd_chunked(*given, chunk_size=CHUNK)
    first = [x[:, :5], dt[:, :5], A, B[:, :5], C[:, :5]]
    rest = [x[:, 5:], dt[:, 5:], A, B[:, 5:], C[:, 5:]]
    _, state = ssd_chunked(*first, chunk_size=CHUNK)
    y_rest, final_too = ssd_chunked(*rest, chunk_size=CHUNK, initial_state=state)
    torch.testing.assert_close(y_rest, y[:, 5:])
    torch.testing.assert_close(final_too, final)
    y_forgetful, _ = ssd_chunked(*rest, chunk_size=CHUNK)
    assert not torch.allclose(y_forgetful, y[:, 5:])


@pytest.mark.parametrize("form", [ssd_recurrent, ssd_chunked], ids=["recurrent", "chunked"])
def test_a_position_with_dt_zero_changes_nothing(form):
    x, dt, A, B, C, state = inputs(9)
    kept = torch.tensor([1, 1, 0, 0, 1, 1, 0, 1, 0], dtype=torch.bool)
    y, final = form(x, dt * kept[:, None], A, B, C, initial_state=state)
    short = [t[:, kept] for t in (x, dt)], [t[:, kept] for t in (B, C)]
    y_too, final_too = form(*short[0], A, *short[1], initial_state=state)
    torch.testing.assert_close(y[:, kept], y_too)
    torch.testing.assert_close(final, final_too)


def test_decay_beyond_the_range_of_float32_gives_no_nan():
    x, dt, A, B, C, state = inputs(21, torch.float32)
    strong = dt * 1e4
    y, final = ssd_chunked(x, strong, A, B, C, chunk_size=CHUNK, initial_state=state)
    assert torch.isfinite(y).all()
    for gradient in gradients([y, final], [x, dt, A, B, C, state]):
        assert torch.isfinite(gradient).all()


def test_segsum_sums_each_segment_without_its_neighbours():
    a = torch.tensor([1e8, 2.0, 3.0])
    expected = torch.tensor(
        [[0, -torch.inf, -torch.inf], [2, 0, -torch.inf], [5, 3, 0]], dtype=torch.float32
    )
    assert torch.equal(segsum(a), expected)


def test_bfloat16_stays_bfloat16_with_a_float32_state():
    *given, state = inputs(13, torch.float32)
    x, dt, A, B, C = given
    y, final = ssd_chunked(x, dt, A, B, C, chunk_size=CHUNK, initial_state=state)
    low = [t.bfloat16() for t in (x, B, C)]
    y_low, final_low = ssd_chunked(low[0], dt, A, *low[1:], chunk_size=CHUNK, initial_state=state)
    assert (y_low.dtype, final_low.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(y_low.float(), y, rtol=0.1, atol=0.2)
    torch.testing.assert_close(final_low, final, rtol=0.1, atol=0.1)


def test_autocast_leaves_a_float32_scan_as_it_is():
    *given, _ = inputs(13, torch.float32)
    y, final = ssd_chunked(*given, chunk_size=CHUNK)
    with torch.autocast("cpu", torch.bfloat16):
        y_too, final_too = ssd_chunked(*given, chunk_size=CHUNK)
    assert torch.equal(y, y_too)
    assert torch.equal(final, final_too)


def test_the_chunked_form_compiles_into_one_graph():
    *given, _ = inputs(13, torch.float32)
    compiled = torch.compile(ssd_chunked, fullgraph=True, backend="aot_eager")
    y, final = compiled(*given, chunk_size=CHUNK)
    y_too, final_too = ssd_chunked(*given, chunk_size=CHUNK)
    torch.testing.assert_close(y, y_too)
    torch.testing.assert_close(final, final_too)
