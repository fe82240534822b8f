"""The Triton kernels of a whole prompt against plain torch: on a GPU, or interpreted on a CPU.

Without a GPU they run, slowly, with TRITON_INTERPRET=1 in the environment, if Triton is there.
"""

import importlib.util
import os
from functools import partial

import pytest
import torch
from test_engine import words
from torch import nn

from workbench.errors import WorkbenchError
from workbench.mamba import backends, fused, kernels, ssd
from workbench.mamba.config import Mamba2Config, ProjectionNames
from workbench.mamba.mixer import Mamba2Mixer, MixerState
from workbench.mamba.parts import Projected
from workbench.models.engine.decoder import read_decoder
from workbench.models.engine.decoding import State
from workbench.models.engine.operations import Operations, rotate
from workbench.models.engine.prompt import read

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not (GPU or INTERPRETED),
    reason="needs Triton, and a GPU or TRITON_INTERPRET=1",
)
DEVICE = "cuda" if GPU and not INTERPRETED else "cpu"
# Interpreted products are numpy's, which has no bfloat16.
SMALL = torch.bfloat16 if DEVICE == "cuda" else torch.float16
TOLERANCE = {torch.float32: 3e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # relative
GPU_KERNELS = "triton" if DEVICE == "cuda" else "torch"
DTYPES = [torch.float32, SMALL]
SHAPES = {  # batch, seqlen, n_heads, heads of x, heads of B, heads of C, headdim, d_state
    "phi": (1, 130, 2, 2, 2, 2, 80, 80),
    "llama": (1, 130, 2, 2, 1, 1, 64, 64),
    "long": (2, 500, 2, 1, 1, 2, 16, 16),
    "odd": (2, 130, 4, 2, 2, 4, 6, 10),
    "wide": (1, 70, 1, 1, 1, 1, 40, 128),
    "short": (2, 3, 2, 2, 2, 2, 24, 80),
}


@pytest.fixture(autouse=True)
def bounds(monkeypatch):
    """Interpreted, a load or store outside the tensors that a kernel was given is an error."""
    if not INTERPRETED:
        return
    import numpy as np
    from triton.runtime import interpreter

    given = []  # first byte and end of the storage of each tensor

    def prepared(self, *args):
        on_host, named = prepare(self, *args)
        tensors = [t for t in (*on_host, *named.values()) if isinstance(t, torch.Tensor)]
        storages = [t.untyped_storage() for t in tensors]
        given[:] = {(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages}
        return on_host, named

    def check(pointers, mask):
        size = pointers.get_element_ty().primitive_bitwidth // 8
        used = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
        known = np.zeros(used.shape, bool)
        for first, end in given:
            known |= (used >= first) & (used + size <= end)
        if not known.all():
            raise IndexError(f"{(~known).sum()} of {known.size} addresses belong to no tensor")

    def load(self, pointers, mask, *others):
        check(pointers, mask)
        return loads(self, pointers, mask, *others)

    def store(self, pointers, value, mask, *others):
        check(pointers, mask)
        return stores(self, pointers, value, mask, *others)

    prepare = interpreter.GridExecutor._init_args_hst
    builder = interpreter.InterpreterBuilder
    loads, stores = builder.create_masked_load, builder.create_masked_store
    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", prepared)
    monkeypatch.setattr(builder, "create_masked_load", load)
    monkeypatch.setattr(builder, "create_masked_store", store)


def error(found, expected):
    expected = expected.double()
    return ((found.double() - expected).norm() / expected.norm().clamp(min=1e-12)).item()


def scan_inputs(batch, seqlen, n_heads, x_heads, B_heads, C_heads, headdim, d_state):
    torch.manual_seed(seqlen)
    draw = partial(torch.randn, device=DEVICE)
    x = draw(batch, seqlen, x_heads, headdim)
    B, C = (draw(batch, seqlen, n, d_state) / d_state**0.5 for n in (B_heads, C_heads))
    dt = torch.rand(batch, seqlen, n_heads, device=DEVICE) * 0.2
    dt[-1, : seqlen // 3] = 0
    A = -4 * torch.rand(n_heads, device=DEVICE)
    return x, dt, A, B, C, draw(batch, n_heads, headdim, d_state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_scan_is_the_chunked_one(shape, dtype):
    from workbench.mamba.triton_scan import scan

    x, dt, A, B, C, first = scan_inputs(*shape)
    x, B, C = (t.to(dtype) for t in (x, B, C))
    y, state = scan(x, dt, A, B, C, initial_state=first)
    x = x.repeat_interleave(shape[2] // shape[3], dim=2)
    given = (t.double() for t in (x, dt, A, B, C))
    expected, final = ssd.ssd_chunked(*given, initial_state=first)
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
    assert error(y, expected) < TOLERANCE[dtype]
    assert error(state, final) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    "tiles",
    [
        {"chunk": 32, "state_chunk": 16, "programs": 99},
        {"chunk": 16, "state_chunk": 64, "programs": 1},
        {"chunk": 128, "state_chunk": 128, "split": False},
    ],
    ids=["many segments", "few segments", "one tile"],
)
def test_however_the_work_is_cut_the_numbers_are_the_same(tiles):
    from workbench.mamba.triton_scan import Tiles, scan

    x, dt, A, B, C, first = scan_inputs(1, 150, 2, 2, 2, 2, 48, 16)
    expected, final = ssd.ssd_chunked(x, dt, A, B, C, initial_state=first)
    y, state = scan(x, dt, A, B, C, initial_state=first, tiles=Tiles(stages=1, **tiles))
    assert error(y, expected) < TOLERANCE[torch.float32]
    assert error(state, final) < TOLERANCE[torch.float32]


@pytest.mark.skipif(not INTERPRETED, reason="a GPU does not tell")
def test_an_address_outside_is_found():
    from workbench.mamba.triton_scan import scan

    x, dt, A, B, C, first = scan_inputs(*SHAPES["short"])
    with pytest.raises(Exception, match="belong to no tensor"):
        scan(x, dt, A, B, C[-1:, 1:].clone(), initial_state=first)  # C is too short


@pytest.mark.parametrize("seqlen", [64, 500])
@pytest.mark.parametrize("goes_on", [False, True], ids=["new", "goes on"])
def test_inputs_that_end_where_their_memory_ends(seqlen, goes_on):
    from workbench.mamba.triton_scan import Tiles, scan

    *given, first = scan_inputs(1, seqlen, 2, 2, 2, 2, 80, 80)
    x, B, C = torch.stack([given[0], *given[3:]]).to(SMALL)  # as the benchmark cuts them
    first = first if goes_on else None
    expected, final = ssd.ssd_chunked(*given, initial_state=first)
    tiles = Tiles(programs=99)  # a segment for each chunk
    y, state = scan(x, *given[1:3], B, C, initial_state=first, tiles=tiles)
    assert error(y, expected) < TOLERANCE[SMALL]
    assert error(state, final) < TOLERANCE[SMALL]


def mixer(dtype=torch.float32, names=None, **options):
    sizes = {"d_model": 24, "n_heads": 4, "n_kv_heads": 2, "headdim": 6, "d_state": 10}
    made = Mamba2Mixer(Mamba2Config(**sizes | options), names=names)
    with torch.no_grad():
        made.D.normal_()
        if made.config.norm:
            made.norm.weight.normal_()
    return made.to(DEVICE, dtype)


def rotary(seqlen, width=6, batch=1):
    angle = torch.rand(batch, seqlen, width, device=DEVICE) * 3
    return angle.cos(), angle.sin()


def both(mix, monkeypatch, seqlen=11, batch=2, dtype=torch.float32, **given):
    torch.manual_seed(1)
    hidden = torch.randn(batch, seqlen, mix.config.d_model, device=DEVICE).to(dtype)
    calls = []

    def spied(*args):
        calls.append(fused.fits(*args))
        return calls[-1]

    with torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(fused, "suits", lambda *args: False)
            output, expected = mix(hidden, **given)
        with monkeypatch.context() as patch, kernels.use("auto"):
            patch.setattr(fused, "suits", spied)
            patch.setattr(kernels, "chosen", lambda: "triton")  # errors are not to be caught
            found, state = mix(hidden, **given)
    assert calls == [True]
    for one, other in ((found, output), *zip(state, expected, strict=True)):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert error(one, other) < TOLERANCE[dtype]
    return state


OPTIONS = {
    "paper": {},
    "warm": {"rope": True, "bias": True, "scale": 0.3, "n_kv_heads": 4},
    "interleaved": {"rope": True, "rope_interleaved": True},
    "bare": {"gate": False, "norm": False, "conv_activation": None, "d_conv": 2},
    "norm without gate": {"gate": False},
    "gate without norm": {"norm": False},
    "wide norm": {"norm_group_size": 12},
    "no taps": {"d_conv": 1},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
def test_a_mixer_is_the_one_in_parts_and_goes_on_where_it_stopped(options, masked, monkeypatch):
    mix = mixer(**options)
    mask = None
    if masked:
        mask = torch.arange(11, device=DEVICE) >= torch.tensor([[0], [5]], device=DEVICE)
    state = both(mix, monkeypatch, mask=mask, rotary=rotary(11))
    more = 2 if masked else 9  # fewer than the taps, or more
    both(mix, monkeypatch, seqlen=more, rotary=rotary(more, batch=2), state=state)


@pytest.mark.parametrize("goes_on", [False, True], ids=["new", "goes on"])
@pytest.mark.parametrize("end", [1, 2, 8, 11])
def test_what_stands_behind_the_end_leaves_nothing(end, goes_on):
    mix = mixer(rope=True, bias=True)
    hidden = torch.randn(2, 11, 24, device=DEVICE)
    like = MixerState(torch.randn(2, 72, 3, device=DEVICE), torch.randn(2, 4, 6, 10, device=DEVICE))
    given = {"mask": None, "rotary": rotary(11), "state": like if goes_on else None}
    with torch.no_grad():
        said = mix._project(hidden)
        cut = Projected(*(t[:, :end] for t in said))
        angles = [t[:, :end] for t in given["rotary"]]
        whole = mix.mix_in_parts(cut, end=None, **given | {"rotary": angles})
        into = MixerState(torch.full_like(like.conv, 9), torch.full_like(like.ssm, 9))
        place = torch.tensor([end], device=DEVICE)
        y, *state = fused._mix(mix, said, end=place, into=into, **given)
    assert state[0] is into.conv
    assert state[1] is into.ssm
    assert y.isfinite().all()
    for one, same in zip((y[:, :end], *state), whole, strict=True):
        assert error(one, same) < TOLERANCE[torch.float32]


def test_a_mixer_of_the_size_of_phi(monkeypatch):
    sizes = {"n_heads": 2, "n_kv_heads": 2, "headdim": 80, "d_state": 80}
    mix = mixer(SMALL, rope=True, bias=True, scale=80**-0.5, **sizes)
    both(mix, monkeypatch, 130, 1, SMALL, rotary=rotary(130, 32))


def test_a_fused_projection_is_read_where_it_stands(monkeypatch):
    apart = mixer(bias=True, rope=True)
    projections = [getattr(apart, n) for n in ("q_proj", "k_proj", "v_proj")]
    whole = nn.Linear(24, sum(len(p.bias) for p in projections), device=DEVICE)
    modules = {"qkv_proj": whole, "o_proj": apart.o_proj}
    together = Mamba2Mixer(apart.config, modules, ProjectionNames(fused="qkv_proj"))
    both(together, monkeypatch, rotary=rotary(11))


def test_a_mixer_that_rotates_asks_for_the_angles(monkeypatch):
    monkeypatch.setattr(fused, "suits", fused.fits)
    with pytest.raises(WorkbenchError, match="rotary"), torch.no_grad():
        mixer(rope=True)(torch.randn(1, 3, 24, device=DEVICE))


def test_a_kernel_that_fails_is_asked_once(monkeypatch):
    mix, hidden = mixer(), torch.randn(1, 3, 24, device=DEVICE)
    monkeypatch.setattr(fused, "_refused", set())
    monkeypatch.setattr(fused, "suits", fused.fits)

    def broken(*_, **__):
        raise RuntimeError("does not compile")

    monkeypatch.setattr(fused, "_mix", broken)
    with torch.no_grad():
        mix(hidden)
        assert fused._refused == {fused._like(mix, hidden)}
        monkeypatch.setattr(kernels, "chosen", lambda: "triton")
        with pytest.raises(RuntimeError, match="does not compile"):
            mix(hidden)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_what_needs_gradients_is_left_to_others():
    x, dt, A, B, C, first = scan_inputs(*SHAPES["phi"])
    assert "triton" in kernels.available()
    assert backends.ssd_triton(x, dt, A, B, C, initial_state=first) is not None
    assert backends.ssd_triton(x.requires_grad_(), dt, A, B, C, initial_state=first) is None
    mix, hidden = mixer(), torch.randn(2, 19, 24, device=DEVICE)
    projected = mix._project(hidden)
    with kernels.use("triton"):
        assert not fused.suits(mix, projected)
        assert mix(hidden)[0].requires_grad
        with torch.no_grad():
            assert fused.suits(mix, projected)
            assert not fused.suits(mix, Projected(*(t[:, :1] for t in projected)))
    with kernels.use("torch"), torch.no_grad():
        assert not fused.suits(mix, projected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "heads, kv_heads, headdim, width", [(4, 2, 6, 4), (2, 2, 80, 32), (3, 1, 64, 64), (2, 1, 10, 6)]
)
def test_a_prompt_is_rotated_and_kept(heads, kv_heads, headdim, width, dtype):
    from workbench.models.engine import triton_prompt

    batch, seqlen, places = 2, 21, 30
    torch.manual_seed(width)
    rows = [torch.randn(batch * seqlen, n * headdim + 3, device=DEVICE).to(dtype)[:, :-3]
            for n in (heads, kv_heads, kv_heads)]  # fmt: skip
    angle = torch.rand(seqlen, width // 2, device=DEVICE) * 3
    cos = torch.cat([angle.cos(), angle.cos()], -1).to(dtype)
    sin = torch.cat([-angle.sin(), angle.sin()], -1).to(dtype)
    q, k, v = (t.double().view(batch, seqlen, -1, headdim).transpose(1, 2) for t in rows)
    expected = [rotate(t.clone(), cos.double(), sin.double()) for t in (q, k)]
    keys, values = torch.full((2, batch, kv_heads, places, headdim), 7.0, device=DEVICE).to(dtype)
    triton_prompt.keep(*rows, cos, sin, keys, values)
    q, k = (t.view(batch, seqlen, -1, headdim).transpose(1, 2) for t in rows[:2])
    for found, same in zip((q, k, keys[:, :, :seqlen]), (*expected, expected[1]), strict=True):
        assert error(found, same) < TOLERANCE[dtype]
    assert torch.equal(values[:, :, :seqlen].double(), v)
    assert (keys[:, :, seqlen:] == 7).all()
    assert (values[:, :, seqlen:] == 7).all()


@pytest.mark.parametrize("layers", [None, (1, 2)], ids=["teacher", "hybrid"])
@pytest.mark.parametrize("family", ["phi", "llama", "phi-norms"])
def test_a_prompt_through_the_kernels_says_the_same(family, layers):
    from workbench.models.engine.triton_operations import TritonOperations

    vlm = words(family, layers, rope=True)
    vlm.model.to(DEVICE)
    decoder, found = read_decoder(vlm.model), []
    before, embedded = torch.randn(2, 2, 19, decoder.embedding.shape[1], device=DEVICE)
    end = torch.tensor([17], device=DEVICE)
    for operations, kind in ((Operations(), "torch"), (TritonOperations(decoder), GPU_KERNELS)):
        state = State(decoder, 2, 24, layers or ())
        with torch.no_grad(), kernels.use(kind):
            read(decoder, state, operations, before)  # of which nothing is to be left
            for slot in state.cache.layers:
                slot.forget()
            found.append([read(decoder, state, operations, embedded, end)])
        for slot in state.cache.layers:
            mixes = slot.keys is None
            kept = slot.tensors() if mixes else (slot.keys[:, :, :17], slot.values[:, :, :17])
            found[-1].extend(kept)
        assert state.cache.layers[0].get_seq_length() == 19
    for one, same in zip(*found, strict=True):
        torch.testing.assert_close(one, same, atol=2e-4, rtol=2e-4)
