"""convert: how mixers start, and what they start with; align."""

from pathlib import Path

import pytest
import tiny
import torch
from torch import nn
from trainees import PLAN, same, samples, stack, tensors

from workbench.data import Texts
from workbench.errors import WorkbenchError
from workbench.models.hybrid import mixers
from workbench.models.plan import Plan
from workbench.models.teacher import VLM
from workbench.steps.conversion import calibration, initialization
from workbench.steps.conversion.alignment import align
from workbench.steps.conversion.calibration import calibrate
from workbench.steps.conversion.initialization import convert, default_calibration
from workbench.steps.conversion.scores import score_layers
from workbench.steps.conversion.selection import choose_layers
from workbench.steps.quality.comparison import compare
from workbench.steps.quality.fidelity import layer_fit, token_fidelity

EVERY = Plan(tiny.N_LAYERS, tuple(range(tiny.N_LAYERS)))


@pytest.fixture(scope="module")
def teacher():
    return tiny.vlm()


@pytest.fixture
def student(teacher):
    return convert(teacher, PLAN, init="matvlm")


@pytest.fixture(scope="module")
def llama():
    """A language model with shared keys and values, and without biases."""
    return VLM("letters", tiny.language_model("llama"), tiny.tokenizer())


def test_convert_keeps_all_that_is_not_new(teacher):
    before = tensors(teacher)
    student = convert(teacher, PLAN, init="matvlm")
    assert same(tensors(teacher), before)
    assert student.name == "tiny-50"
    assert student.plan == PLAN
    assert student.processor is teacher.processor
    assert list(mixers(student.model)) == [0, 2]
    after = tensors(student)
    new = {name.split(".self_attn.")[1] for name in after.keys() - before.keys()}
    assert new == {
        "A_log",
        "D",
        "dt_bias",
        "dt_weight",
        "z_proj.weight",
        "conv1d.weight",
        "conv1d.bias",
        "norm.weight",
    }
    gone = before.keys() - after.keys()
    assert len(gone) == 2 * 4
    assert all(".self_attn." in name and name.endswith(".bias") for name in gone)
    for name in before.keys() & after.keys():  # the projections' weights among them
        assert torch.equal(before[name], after[name]), name


@pytest.mark.parametrize("init", ["matvlm", "random"])
def test_a_seed_fixes_a_student(init, teacher):
    one, again, other = (tensors(convert(teacher, PLAN, init=init, seed=k)) for k in (3, 3, 4))
    assert same(one, again)
    differ = {name for name in one if not torch.equal(one[name], other[name])}
    drawn = ["A_log", "conv1d.bias", "conv1d.weight", "dt_bias", "dt_weight", "z_proj.weight"]
    if init == "random":
        drawn += [f"{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "dense")]
    assert sorted(name.split("self_attn.")[1] for name in differ) == sorted(2 * drawn)
    first, second = (name for name in sorted(one) if name.endswith("A_log"))
    assert not torch.equal(one[first], one[second])


def test_random_is_a_control_without_attention(teacher):
    matvlm, control = (convert(teacher, PLAN, init=init) for init in ("matvlm", "random"))
    for index in PLAN.mamba_layers:
        ours, theirs = mixers(matvlm.model)[index], mixers(control.model)[index]
        drawn = {}
        for name in ("q_proj", "k_proj", "v_proj", "dense"):
            weight = drawn[name] = getattr(theirs, name).weight.detach()
            assert not torch.equal(weight, getattr(ours, name).weight)
            assert weight.abs().max() <= weight.shape[1] ** -0.5
        assert torch.equal(ours.z_proj.weight, theirs.z_proj.weight)
        # Independent draws: no matrix repeats another's numbers, wherever they stand in it.
        drawn["z_proj"] = theirs.z_proj.weight.detach()
        numbers = torch.cat([weight.flatten() for weight in drawn.values()])
        steps = numbers.sort().values.diff()
        assert (steps < 1e-7).float().mean() < 0.1
    changed = {n for n, t in tensors(control).items() if not torch.equal(t, tensors(matvlm)[n])}
    assert len(changed) == 2 * 4
    assert all(".self_attn." in name for name in changed)


def test_an_unknown_init_or_a_strange_plan_is_refused(teacher, student):
    with pytest.raises(WorkbenchError, match=r"no init 'zeros'. Choose one of matvlm, random"):
        convert(teacher, PLAN, init="zeros")
    with pytest.raises(WorkbenchError, match="for a model of 32 layers, but this one has 4"):
        convert(teacher, choose_layers(stack(32)))
    with pytest.raises(WorkbenchError, match="hybrid already"):
        convert(student, PLAN)


def test_what_is_no_model_no_plan_or_no_scale_is_said(teacher):
    for plan in ([0, 2], 0.5):
        with pytest.raises(WorkbenchError, match=r"takes a plan: make one with wb\.choose_layers"):
            convert(teacher, plan)
    with pytest.raises(WorkbenchError, match=r"load it first, with wb\.load_teacher"):
        convert("pocket", PLAN)
    with pytest.raises(WorkbenchError, match="scale='attn' is none"):
        convert(teacher, PLAN, init="matvlm", options={"scale": "attn"})


def test_an_empty_plan_is_the_teacher_again(teacher):
    student = convert(teacher, choose_layers(teacher, ratio=0))
    assert student.name == "tiny-0"
    assert same(tensors(student), tensors(teacher))
    comparison = compare(teacher, student, samples(5))
    assert comparison.agreement == 1.0
    assert comparison.partings == ()


def errors(student, teacher, data):
    return [row.relative_error for row in layer_fit(student, teacher, data).rows]


@pytest.mark.parametrize("layers", [(0, 2), (0, 1, 2, 3)])
def test_calibrated_starts_nearer_than_the_papers(layers, teacher):
    plan, fitted, unseen = Plan(tiny.N_LAYERS, layers), samples(8), samples(6, n_images=2)
    calibrated = convert(teacher, plan, init="calibrated", calibration=fitted)
    matvlm = convert(teacher, plan, init="matvlm")
    for data in (fitted, unseen):
        ours, theirs = (errors(vlm, teacher, data)[0] for vlm in (calibrated, matvlm))
        assert ours < 0.7 * theirs
        assert ours < 1  # than to say nothing
        kl = [token_fidelity(teacher, vlm, data).kl for vlm in (calibrated, matvlm)]
        assert kl[0] < 0.5 * kl[1]


def test_shared_keys_no_biases_and_the_houses_own_texts(llama):
    calibrated, matvlm = (convert(llama, PLAN, init=i) for i in ("calibrated", "matvlm"))
    texts = Texts("words", ["which colour is the tallest bar, and how many? " * 20], context=64)
    ours, theirs = (errors(vlm, llama, texts) for vlm in (calibrated, matvlm))
    assert sum(ours) < sum(theirs)
    assert all(mixer.o_proj.bias is None for mixer in mixers(calibrated.model).values())


def test_calibration_leaves_no_trace_on_the_teacher(teacher, monkeypatch):
    before, n_hooks = tensors(teacher), hooks_of(teacher)
    convert(teacher, PLAN, init="calibrated", calibration=samples(2))
    assert hooks_of(teacher) == n_hooks
    monkeypatch.setattr(calibration, "_fold", None)  # fails in the middle of the first layer
    student = convert(teacher, PLAN, init="linear")
    before_fit = hooks_of(student)
    with pytest.raises(TypeError):
        convert(teacher, PLAN, init="calibrated", calibration=samples(2))
    batch = next(initialization.as_batches(teacher, samples(2), batch_size=2, seed=0))
    with pytest.raises(TypeError):
        calibrate(student, teacher, batch)
    assert hooks_of(teacher) == n_hooks
    assert hooks_of(student) == before_fit
    assert all("_scan" not in vars(mixer) for mixer in mixers(student.model).values())
    assert same(tensors(teacher), before)


def hooks_of(vlm):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in vlm.model.modules())


def test_calibration_changes_decays_features_and_output_only(teacher):
    start = convert(teacher, PLAN, init="matvlm", options={"rope": True, "bias": True})
    for mixer in mixers(start.model).values():
        mixer.reset_to_pass_through()
    before = tensors(start)
    after = tensors(convert(teacher, PLAN, init="calibrated", calibration=samples(4)))
    changed = {n.split("self_attn.")[1] for n in before if not torch.equal(before[n], after[n])}
    assert changed == {"A_log", "conv1d.weight", "conv1d.bias", "dense.weight", "dense.bias"}
    rates = [r for n, t in after.items() if n.endswith("A_log") for r in t.exp().tolist()]
    assert all(min(abs(r - known) for known in calibration.RATES) < 1e-6 for r in rates)


def test_a_later_mixer_is_fitted_to_what_the_student_gives_it(teacher):
    alone, after = (
        tensors(convert(teacher, Plan(4, layers), init="calibrated", calibration=samples(4)))
        for layers in ((3,), (0, 3))
    )
    name = next(n for n in alone if "layers.3.self_attn.dense.weight" in n)
    assert not torch.allclose(alone[name], after[name], atol=1e-4)


def test_side_by_side_the_student_runs_as_it_does_alone(teacher):
    student = convert(teacher, Plan(4, (1, 2)), init="matvlm")
    batch = next(initialization.as_batches(teacher, samples(3), batch_size=3, seed=0))
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    kept = []
    last = student.model.get_decoder().layers[-1]
    hook = last.register_forward_hook(lambda module, args, output: kept.append(output))
    with calibration.ExitStack() as undo, torch.no_grad():
        calibration._side_by_side(student, teacher, undo)
        teacher.model(**inputs, use_cache=False)
    with torch.no_grad():
        student.model(**inputs, use_cache=False)
    hook.remove()
    beside, alone = (calibration._hidden(output) for output in kept)
    assert torch.allclose(beside, alone, atol=1e-5)


def test_the_parts_of_a_scan_make_what_the_mixer_makes(teacher):
    student = convert(teacher, PLAN, init="matvlm", options={"bias": True, "rope": True})
    scans, wholes = [], []

    def listen(mixer, args, kwargs):
        scans.append(calibration._Scan(mixer, args, kwargs).again())

    for mixer in mixers(student.model).values():
        mixer.register_forward_pre_hook(listen, with_kwargs=True)
        mixer.dense.register_forward_pre_hook(lambda module, args: wholes.append(args[0]))
    batch = next(initialization.as_batches(teacher, samples(2), batch_size=2, seed=0))
    with torch.no_grad():
        student.model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False)
    assert len(scans) == 2
    for scan, whole in zip(scans, wholes[1::2], strict=True):  # the first of two is _Scan's own
        assert torch.allclose(scan, whole, atol=1e-6)


@pytest.mark.parametrize("intercept", [True, False])
def test_folding_a_map_into_the_output_is_exact(intercept):
    torch.manual_seed(0)
    out = nn.Linear(12, 9, bias=intercept).double().requires_grad_(False)
    y = torch.randn(50, 3, 4, dtype=torch.double)
    wanted = torch.randn(50, 3, 4, dtype=torch.double)
    maps = calibration._HeadMaps(3, intercept)
    maps.offer(0.1, y, wanted)
    solved = maps.maps
    expected = out(torch.cat([y[:, h] @ solved[h][:-1] + solved[h][-1] for h in range(3)], -1))
    calibration._fold(out, solved)
    assert torch.allclose(out(y.flatten(1)), expected, atol=1e-12)


def test_of_rates_each_head_keeps_its_best():
    torch.manual_seed(0)
    wanted = torch.randn(40, 2, 3, dtype=torch.double)
    noise = torch.randn(40, 2, 3, dtype=torch.double)
    maps = calibration._HeadMaps(2, True)
    maps.offer(0.1, torch.stack([wanted[:, 0], noise[:, 1]], 1), wanted)
    maps.offer(1.0, torch.stack([noise[:, 0], 3 * wanted[:, 1] + 1], 1), wanted)
    assert maps.rates == [0.1, 1.0]


def test_keys_and_queries_are_bent_and_values_are_not(llama):
    mixer = mixers(llama_like(llama, {}).model)[0]
    weights, biases = mixer.conv1d.weight[:, 0, -1], mixer.conv1d.bias
    width = mixer.config.widths[0]
    for tensor, plain, bent in ((weights, 1.0, 3.0), (biases, 0.0, 1.0)):
        assert (tensor[:width] == plain).all()
        assert (tensor[width:] == bent).all()
    straight = mixers(llama_like(llama, {"conv_activation": None}).model)[0].conv1d
    assert (straight.weight[:, 0, -1] == 1).all()
    assert (straight.bias == 0).all()


def llama_like(llama, options):
    texts = Texts("words", ["which colour is the tallest bar, and how many? " * 5], context=32)
    return convert(llama, PLAN, init="calibrated", calibration=texts, options=options)


def test_a_ridge_without_penalty_is_least_squares():
    torch.manual_seed(0)
    x, wanted = torch.randn(40, 5, dtype=torch.double), torch.randn(6, 3, dtype=torch.double)
    y = x @ wanted[:-1] + wanted[-1]
    assert torch.allclose(calibration._ridge(x, y, 0.0), wanted, atol=1e-6)
    shrunk = calibration._ridge(x, y, 10.0)
    assert shrunk[:-1].norm() < wanted[:-1].norm()
    assert torch.allclose(calibration._ridge(x, y, 0.0, False)[-1], torch.zeros(3).double())


def test_an_output_projection_that_is_no_plain_matrix_stays(teacher):
    class Odd(nn.Linear):
        """As a quantised or adapted projection would be."""

    odd = tiny.vlm()
    for layer in odd.model.get_decoder().layers:
        layer.self_attn.dense.__class__ = Odd
    before = tensors(odd)
    after = tensors(convert(odd, PLAN, init="calibrated", calibration=samples(2)))
    for name in before:
        if "dense" in name:
            assert torch.equal(before[name], after[name])
    assert any(
        "A_log" in n and not torch.allclose(t, torch.full_like(t, -30)) for n, t in after.items()
    )


def test_padding_teaches_nothing(teacher):
    one, other = samples(2)
    ready = [initialization.as_batches(teacher, [s], batch_size=1, seed=0) for s in (one, other)]
    batch = dict(next(ready[0]))
    length = batch["input_ids"].shape[1]
    longer = {
        name: torch.nn.functional.pad(value, (0, 7)) if value.shape[-1] == length else value
        for name, value in batch.items()
    }
    plain, padded = (
        tensors(convert(teacher, EVERY, init="calibrated", calibration=[b]))
        for b in (batch, longer)
    )
    assert all(torch.allclose(plain[name], padded[name], atol=1e-4) for name in plain)


def test_the_houses_own_calibration_is_the_same_each_time(teacher):
    talks = default_calibration(teacher)
    assert len(talks) == 32
    assert talks[0].question == default_calibration(teacher)[0].question
    assert all(len(talk.images) == 1 for talk in talks)
    assert any(talk.more for talk in talks)
    one, again = (tensors(convert(teacher, PLAN, init="calibrated")) for _ in range(2))
    assert same(one, again)


def test_no_data_to_calibrate_with_is_said(teacher):
    with pytest.raises(WorkbenchError, match="the data set is empty"):
        convert(teacher, PLAN, init="calibrated", calibration=[])
    with pytest.raises(WorkbenchError, match="no batch to calibrate with"):
        convert(teacher, PLAN, init="calibrated", calibration=iter([]))
    for name in ("pocket", Path("pocket")):
        with pytest.raises(WorkbenchError, match=r"load it first, with wb\.load_data\('pocket'\)"):
            convert(teacher, PLAN, init="calibrated", calibration=name)


def test_mixers_of_a_hybrid_serve_every_smaller_plan(teacher):
    donor = convert(teacher, EVERY, init="calibrated", calibration=samples(3), name="donor")
    before = tensors(donor)
    taken = convert(teacher, Plan(tiny.N_LAYERS, (1, 3)), init=donor)
    assert taken.name == "tiny-50"
    ours = mixers(taken.model)
    assert list(ours) == [1, 3]
    for index, mixer in ours.items():
        assert same(mixer.state_dict(), mixers(donor.model)[index].state_dict())
        assert mixer.config == mixers(donor.model)[index].config
    with torch.no_grad():
        mixer.A_log.zero_()  # the copy, not the donor
    assert same(tensors(donor), before)
    assert all(
        torch.equal(t, tensors(teacher)[n])
        for n, t in tensors(taken).items()
        if n in tensors(teacher) and ".self_attn." not in n
    )
    with pytest.raises(WorkbenchError, match="tiny-50 has no mixer for layer 0: align a hybrid"):
        convert(teacher, PLAN, init=taken)
    with pytest.raises(WorkbenchError, match="donor have options already"):
        convert(teacher, PLAN, init=donor, options={"d_conv": 2})


@pytest.mark.parametrize("sizes", [{"hidden_size": 64}, {"intermediate_size": 44}])
def test_a_hybrid_of_another_teacher_is_no_donor(sizes, teacher, llama):
    other = VLM("other", tiny.llava(**sizes), teacher.processor)
    donor = convert(other, EVERY, init="matvlm", name="donor")
    for wrong in (teacher, llama):
        with pytest.raises(WorkbenchError, match=f"donor is no hybrid of {wrong.name}"):
            convert(wrong, PLAN, init=donor)
        data = samples(1) if wrong is teacher else ["which bar"]
        with pytest.raises(WorkbenchError, match=f"donor is no hybrid of {wrong.name}"):
            score_layers(wrong, donor=donor, data=data)


def test_aligned_mixers_stand_nearer_to_their_attention(teacher):
    before = tensors(teacher)
    some = samples(4)
    start = convert(teacher, EVERY, init="calibrated", calibration=some)
    rows = []
    aligned = align(teacher, some, steps=12, calibration=some, batch_size=4, on_step=rows.append)
    assert aligned.name == "tiny-aligned"
    assert aligned.plan.mamba_layers == (0, 1, 2, 3)
    assert len(rows) == 12
    assert all(
        one < other
        for one, other in zip(*(errors(v, teacher, some) for v in (aligned, start)), strict=True)
    )
    assert same(tensors(teacher), before)
    ours = convert(teacher, PLAN, init=aligned)
    assert (
        token_fidelity(teacher, ours, some).kl
        < token_fidelity(teacher, convert(teacher, PLAN, init="matvlm"), some).kl
    )
