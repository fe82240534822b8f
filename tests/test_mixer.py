import pytest
import torch
from torch import nn
from transformers import Mamba2Config as ReferenceConfig
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer as ReferenceMixer

from workbench.errors import WorkbenchError
from workbench.mamba import kernels
from workbench.mamba.config import Mamba2Config, ProjectionNames
from workbench.mamba.layout import pack, unpack
from workbench.mamba.mixer import Mamba2Mixer, MixerState
from workbench.mamba.parts import Projected

SIZES = {"d_model": 24, "n_heads": 4, "headdim": 6, "d_state": 10, "chunk_size": 8}


def mixer(n_kv_heads=4, seed=0, **options):
    torch.manual_seed(seed)
    return Mamba2Mixer(Mamba2Config(n_kv_heads=n_kv_heads, **SIZES, **options), seed=seed)


def hidden(batch=2, length=13):
    generator = torch.Generator().manual_seed(length)
    return torch.randn(batch, length, SIZES["d_model"], generator=generator)


def rotary(positions, width=4):
    angle = positions[:, None] * torch.tensor([1.0, 0.1])[: width // 2]
    angle = torch.cat([angle, angle], -1)[None]
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("n_kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
def test_transformers_own_mixer_computes_the_same_from_the_packed_weights(n_kv_heads, bias):
    config = ReferenceConfig(
        hidden_size=24, num_heads=4, head_dim=6, state_size=10, expand=1, n_groups=4,
        conv_kernel=4, chunk_size=8, use_bias=bias, num_hidden_layers=1,
    )  # fmt: skip
    theirs = ReferenceMixer(config, 0).eval()
    # Up to transformers 5.17 its norm knew no groups.
    ours = mixer(n_kv_heads, bias=bias, norm_group_size=getattr(theirs.norm, "group_size", 24))
    theirs.load_state_dict(pack(ours), strict=True)
    torch.testing.assert_close(ours(hidden())[0], theirs(hidden()))


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("n_kv_heads", [4, 2], ids=["mha", "gqa"])
def test_unpack_reads_what_pack_wrote(n_kv_heads, bias):
    one, other = mixer(n_kv_heads, bias=bias), mixer(n_kv_heads, seed=1, bias=bias)
    unpack(pack(one), other)
    for name, tensor in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_unpack_refuses_what_does_not_fit():
    packed = pack(mixer())
    with pytest.raises(WorkbenchError, match="cannot hold in_proj.weight: its heads share"):
        unpack(packed, mixer(2))
    with pytest.raises(WorkbenchError, match=r"missing \['D'\]"):
        unpack({n: t for n, t in packed.items() if n != "D"}, mixer())
    one_sided = mixer(bias=True)
    one_sided.o_proj.bias = None
    with pytest.raises(WorkbenchError, match="cannot hold out_proj.bias"):
        unpack(pack(mixer(bias=True)), one_sided)


@pytest.mark.parametrize(
    "option",
    [{"rope": True}, {"gate": False}, {"norm": False}, {"conv_activation": None}, {"scale": 0.5}],
    ids=lambda option: next(iter(option)),
)
def test_what_the_packed_layout_cannot_say_is_refused(option):
    with pytest.raises(WorkbenchError, match="layout of mamba_ssm has no place for"):
        pack(mixer(**option))


def test_a_fused_projection_is_three_projections_in_one():
    apart = mixer(2, bias=True)
    C, B, x = (getattr(apart, n) for n in ("q_proj", "k_proj", "v_proj"))
    fused = nn.Linear(24, len(C.bias) + len(B.bias) + len(x.bias))
    fused.weight.data = torch.cat([C.weight, B.weight, x.weight]).detach()
    fused.bias.data = torch.cat([C.bias, B.bias, x.bias]).detach()
    modules = {"qkv_proj": fused, "o_proj": apart.o_proj}
    together = Mamba2Mixer(apart.config, modules, ProjectionNames(fused="qkv_proj"))
    torch.testing.assert_close(together(hidden())[0], apart(hidden())[0])
    assert all(torch.equal(pack(apart)[n], t) for n, t in pack(together).items())


@pytest.mark.parametrize("d_conv", [1, 2, 4])
@pytest.mark.parametrize("cut", [1, 2, 7])
def test_prefill_and_steps_equal_one_pass(cut, d_conv):
    mix = mixer(2, d_conv=d_conv, rope=True)
    positions, h = torch.arange(13.0), hidden()
    expected, final = mix(h, rotary=rotary(positions))
    outputs, state = [], None
    for start, stop in ((0, cut), *((t, t + 1) for t in range(cut, 11)), (11, 13)):
        part = rotary(positions[start:stop])
        output, state = mix(h[:, start:stop], rotary=part, state=state)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, 1), expected)
    torch.testing.assert_close(state.ssm, final.ssm)
    torch.testing.assert_close(state.conv, final.conv)


@pytest.mark.parametrize("goes_on", [False, True], ids=["new", "goes on"])
@pytest.mark.parametrize("end", [1, 2, 5, 9])
def test_what_stands_behind_an_end_leaves_nothing(end, goes_on):
    mix = mixer()
    state = mix(hidden(length=4))[1] if goes_on else None
    said = mix._project(hidden(length=9))
    expected = mix.mix(Projected(*(t[:, :end] for t in said)), state=state)
    y, *after = mix.mix(said, end=torch.tensor([end]), state=state)
    for one, same in zip((y[:, :end], *after), expected, strict=True):
        torch.testing.assert_close(one, same)


@pytest.mark.parametrize("lost", ["conv", "ssm"])
def test_a_step_needs_both_parts_of_the_state(lost):
    mix, h = mixer(), hidden()
    expected = mix(h)[0][:, -1:]
    _, state = mix(h[:, :-1])
    torch.testing.assert_close(mix(h[:, -1:], state=state)[0], expected)
    forgetful = state._replace(**{lost: torch.zeros_like(getattr(state, lost))})
    assert not torch.allclose(mix(h[:, -1:], state=forgetful)[0], expected, atol=1e-3)


def with_norms():
    names = ProjectionNames(C_norm="q_norm", B_norm="k_norm")
    plain = mixer(2, bias=True)
    modules = {n: getattr(plain, n) for n in ("q_proj", "k_proj", "v_proj", "o_proj")}
    for n in ("q_norm", "k_norm"):
        modules[n] = nn.LayerNorm(10)
        nn.init.normal_(modules[n].bias)
    return Mamba2Mixer(plain.config, modules, names)


@pytest.mark.parametrize(
    "make",
    [lambda: mixer(2), lambda: mixer(2, bias=True), with_norms],
    ids=["no-bias", "bias", "norms"],
)
def test_padding_on_the_left_changes_nothing_if_it_is_masked(make):
    mix, h = make(), hidden()
    expected, final = mix(h)
    padded = torch.cat([7 * hidden(2, 5), h], 1)
    mask = torch.arange(18).expand(2, -1) >= 5
    output, state = mix(padded, mask=mask)
    torch.testing.assert_close(output[:, 5:], expected)
    torch.testing.assert_close(state.ssm, final.ssm)
    assert not torch.allclose(mix(padded)[0][:, 5:], expected, atol=1e-3), "the mask is needed"


def test_rope_sees_distances_and_not_places():
    mix, h, positions = mixer(rope=True), hidden(), torch.arange(13.0)
    here, there = (mix(h, rotary=rotary(positions + shift))[0] for shift in (0, 100))
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)
    stretched = mix(h, rotary=rotary(2 * positions))[0]
    assert not torch.allclose(here, stretched, atol=1e-3)
    with pytest.raises(WorkbenchError, match="rotary"):
        mix(h)


def test_without_rope_positions_are_not_read():
    mix, h = mixer(), hidden()
    assert torch.equal(mix(h)[0], mix(h, rotary=rotary(torch.arange(13.0)))[0])


def test_the_norm_works_in_groups_of_the_chosen_size():
    per_head, over_all = mixer(), mixer(norm_group_size=24)
    assert not torch.allclose(per_head(hidden())[0], over_all(hidden())[0])
    y, z = hidden(), hidden(2, 13) + 1
    gated = y * nn.functional.silu(z)
    expected = gated * torch.rsqrt(gated.pow(2).mean(-1, keepdim=True) + 1e-5)
    torch.testing.assert_close(over_all.norm(y, z), expected)


LINEAR = {"norm": False, "conv_activation": None, "scale": 0.3}


@pytest.mark.parametrize("gate", [{"gate": False}, {"bias": True}], ids=["no-gate", "gate-of-1"])
@pytest.mark.parametrize("d_conv", [1, 4])
@pytest.mark.parametrize("n_kv_heads", [4, 2], ids=["mha", "gqa"])
def test_reset_to_linear_attention_leaves_attention_without_softmax(n_kv_heads, d_conv, gate):
    mix, h = mixer(n_kv_heads, d_conv=d_conv, rope=True, **LINEAR, **gate), hidden()
    mix.reset_to_linear_attention()
    C, B, x = (p(h).unflatten(-1, (-1, w)) for p, w in
               ((mix.q_proj, 10), (mix.k_proj, 10), (mix.v_proj, 6)))  # fmt: skip
    cos, sin = (r[:, :, None] for r in rotary(torch.arange(13.0)))
    turn = torch.tensor([[0, 0, -1, 0], [0, 0, 0, -1], [1, 0, 0, 0], [0, 1, 0, 0.0]])
    B, C = (torch.cat([t[..., :4] * cos + t[..., :4] @ turn.T * sin, t[..., 4:]], -1)
            for t in (B, C))  # fmt: skip
    B, x = (t.repeat_interleave(4 // n_kv_heads, 2) for t in (B, x))
    scores = 0.3 * torch.einsum("bihn,bjhn->bhij", C, B).tril()
    expected = mix.o_proj(torch.einsum("bhij,bjhp->bihp", scores, x).flatten(2))
    torch.testing.assert_close(mix(h, rotary=rotary(torch.arange(13.0)))[0], expected)


def test_only_a_mixer_with_nothing_in_the_way_becomes_linear_attention():
    with pytest.raises(WorkbenchError, match=r"norm=False and conv_.*=None and gate=False \(or"):
        mixer().reset_to_linear_attention()


def test_without_gate_norm_and_activation_those_parts_are_not_there():
    mix, h = mixer(gate=False, norm=False, conv_activation=None), hidden()
    assert not {"z_proj.weight", "norm.weight"} & set(mix.state_dict())
    state = mix(h[:, :-1])[1]
    torch.testing.assert_close(mix(h[:, -1:], state=state)[0], mix(h)[0][:, -1:])
    plain_norm = mixer(gate=False)
    y = hidden()
    expected = y.unflatten(-1, (4, 6))
    expected = expected * torch.rsqrt(expected.pow(2).mean(-1, keepdim=True) + 1e-5)
    torch.testing.assert_close(plain_norm.norm(y, None), expected.flatten(-2))
    for option in ({"gate": False}, {"norm": False}, {"gate": False, "norm": False}):
        output, _ = mixer(**option).to(torch.bfloat16)(h.bfloat16())
        assert output.dtype == torch.bfloat16


def test_the_scale_multiplies_what_comes_out_of_the_state():
    one, other = mixer(norm=False), mixer(norm=False, scale=2.0)
    one.D.data.zero_(), other.D.data.zero_()
    torch.testing.assert_close(other(hidden())[0], 2 * one(hidden())[0])


def test_new_parameters_are_drawn_as_the_paper_draws_them_and_always_the_same():
    one, other, third = mixer(seed=3), mixer(seed=3), mixer(seed=4)
    for name in ("A_log", "dt_bias", "dt_weight", "z_proj.weight", "conv1d.weight"):
        assert torch.equal(one.get_parameter(name), other.get_parameter(name))
        assert not torch.equal(one.get_parameter(name), third.get_parameter(name))
    A, dt = one.A_log.exp(), nn.functional.softplus(one.dt_bias)
    assert A.min() >= 1
    assert A.max() <= 16
    assert dt.min() > 0.999e-3
    assert dt.max() < 0.1001
    assert torch.equal(one.D, torch.ones(4))
    assert one.z_proj.weight.abs().max() <= 24**-0.5
    assert one.conv1d.weight.abs().max() <= 0.5


def test_a_lower_precision_spares_decay_step_and_skip():
    mix = mixer()
    mix(hidden())[0].sum().backward()
    before = {n: getattr(mix, n).detach().clone() for n in mix.float32_parameters}
    mix.to(torch.bfloat16)
    for name, tensor in before.items():
        assert torch.equal(getattr(mix, name), tensor)
        assert getattr(mix, name).grad.dtype == torch.float32
    assert mix.z_proj.weight.dtype == mix.norm.weight.dtype == torch.bfloat16
    output, state = mix(hidden().bfloat16())
    assert (output.dtype, state.ssm.dtype) == (torch.bfloat16, torch.float32)
    assert mix.double().A_log.dtype == torch.float64


def test_the_projections_are_moved_in_and_lose_their_bias_if_told_so():
    plain = mixer(bias=True)
    modules = {n: getattr(plain, n) for n in ("q_proj", "k_proj", "v_proj", "o_proj")}
    kept = Mamba2Mixer(plain.config, modules)
    assert kept.q_proj is plain.q_proj
    assert kept.q_proj.bias is not None
    dropped = Mamba2Mixer(mixer().config, modules)
    assert dropped.q_proj is plain.q_proj
    assert dropped.q_proj.bias is dropped.o_proj.bias is None


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(WorkbenchError, match=r"n_heads \(4\) must be a multiple"):
        mixer(3)
    with pytest.raises(WorkbenchError, match=r"norm_group_size \(7\)"):
        mixer(norm_group_size=7)
    with pytest.raises(WorkbenchError, match=r"chunk_size \(8\) must be at least 1"):
        mixer(d_conv=0)
    with pytest.raises(WorkbenchError, match="'silu' or None, but not 'relu'"):
        mixer(conv_activation="relu")


def test_kernels_are_chosen_in_one_place():
    assert "torch" in kernels.available()
    with kernels.use("torch"):
        assert isinstance(mixer()(hidden())[1], MixerState)
    with pytest.raises(WorkbenchError, match="no kernels called 'cobol'"):
        kernels.use("cobol")
