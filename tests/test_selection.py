"""choose_layers and score_layers: by rule, by hand, by measuring."""

import json
import math

import pytest
import tiny
import torch
from trainees import PLAN, same, samples, stack, tensors

from workbench.errors import WorkbenchError
from workbench.models.plan import Plan
from workbench.steps.conversion import scores as scoring
from workbench.steps.conversion.initialization import convert
from workbench.steps.conversion.probe import Probe
from workbench.steps.conversion.scores import Scores, greedy, score_layers
from workbench.steps.conversion.selection import choose_layers
from workbench.steps.quality.comparison import token_fidelity

EVERY = Plan(tiny.N_LAYERS, tuple(range(tiny.N_LAYERS)))


@pytest.fixture(scope="module")
def teacher():
    return tiny.vlm()


@pytest.fixture(scope="module")
def donor(teacher):
    return convert(teacher, EVERY, init="calibrated", calibration=samples(4))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.parametrize(
    "n_layers, ratio, expected",
    [
        (32, 0.125, (0, 6, 12, 18)),
        (32, 0.25, (0, 4, 8, 12, 16, 20, 24, 28)),
        (32, 0.5, tuple(range(0, 32, 2))),
        (32, 1.0, tuple(range(32))),
        (16, 0.125, (0, 8)),
        (16, 0.25, (0, 4, 8, 12)),
        (16, 0.5, tuple(range(0, 16, 2))),
        (16, 1, tuple(range(16))),
        (10, 0.3, (0, 3, 6)),
        (16, 0, ()),
    ],
)
def test_layers_are_the_papers_or_evenly_spread(n_layers, ratio, expected):
    plan = choose_layers(stack(n_layers), ratio=ratio)
    assert plan.mamba_layers == expected
    assert plan.n_layers == n_layers
    assert plan.method == "even"
    assert ("MaTVLM's own list" in plan.reason) == (n_layers == 32 and 0 < ratio < 1)


def test_a_quarter_is_chosen_where_nothing_is_said():
    assert choose_layers(stack(32)) == choose_layers(stack(32), ratio=0.25)


def test_ratios_and_methods_that_do_not_exist_are_refused():
    for ratio in (-0.1, 1.01, math.nan, "0.5"):
        with pytest.raises(WorkbenchError, match=f"ratio={ratio!r} is not a share of layers"):
            choose_layers(stack(16), ratio=ratio)
    with pytest.raises(WorkbenchError, match=r"ratio=0.03 of 16 layers rounds to none.* 0.0625"):
        choose_layers(stack(16), ratio=0.03)
    assert choose_layers(stack(16), ratio=0.0625).mamba_layers == (0,)
    with pytest.raises(WorkbenchError, match="no selection method 'best'. Choose even, explicit"):
        choose_layers(stack(16), method="best")


def test_layers_named_by_hand_are_taken_as_they_are():
    plan = choose_layers(stack(16), layers=[5, 2])
    assert plan.mamba_layers == (2, 5)
    assert plan.method == "explicit"
    assert plan == choose_layers(stack(16), method="explicit", layers=(2, 5))
    for wrong in (
        {"layers": [1], "ratio": 0.5},
        {"method": "explicit"},
        {"layers": [1], "method": "kl"},
    ):
        with pytest.raises(WorkbenchError, match="give layers=.* and neither a ratio"):
            choose_layers(stack(16), **wrong)
    with pytest.raises(WorkbenchError, match="names layer 16, but the model has 16 layers"):
        choose_layers(stack(16), layers=[16])
    for wrong in (2, [0.7], ["a"], [[0]]):
        with pytest.raises(WorkbenchError, match="a list of whole numbers, such as"):
            choose_layers(stack(16), layers=wrong)


@pytest.mark.parametrize("method", ["kl", "skip-one", "leave-one-in", "greedy", "beam"])
def test_none_and_all_are_chosen_without_measuring(method):
    assert choose_layers(stack(16), ratio=0, method=method).mamba_layers == ()
    assert choose_layers(stack(16), ratio=1, method=method).mamba_layers == tuple(range(16))


@pytest.mark.parametrize("layers", [(), (1,), (0, 3), (0, 1, 2, 3)])
def test_a_probe_measures_what_the_model_built_would_say(layers, teacher, donor):
    probe = Probe(teacher, donor, samples(5), limit=None, batch_size=2)
    before = tensors(donor)
    built = convert(teacher, Plan(tiny.N_LAYERS, layers), init=donor)
    expected = token_fidelity(teacher, built, samples(5), batch_size=5)
    assert probe.kl(layers) == pytest.approx(expected.kl, rel=1e-4, abs=1e-6)
    assert probe.n_tokens == expected.n_tokens
    assert same(tensors(donor), before)


def test_a_skipped_layer_adds_nothing(teacher, donor):
    silent = tiny.vlm()
    attention = silent.model.get_decoder().layers[2].self_attn
    with torch.no_grad():
        attention.dense.weight.zero_()
        attention.dense.bias.zero_()
    expected = token_fidelity(teacher, silent, samples(4)).kl
    scores = score_layers(teacher, method="skip-one", data=samples(4), donor=donor)
    assert scores.values[2] == pytest.approx(expected, rel=1e-4)
    assert len(scores.values) == tiny.N_LAYERS
    assert scores.unit == "nats per answer token"


def test_scores_say_what_to_replace_first(teacher, donor):
    given = {"data": samples(4), "donor": donor}
    probe = Probe(teacher, donor, samples(4), limit=None)
    one = score_layers(teacher, method="kl", **given)
    assert one.method == "replace-one"
    assert one.values == pytest.approx([probe.kl({i}) for i in range(4)])
    kept = score_layers(teacher, method="leave-one-in", **given)
    everything = {0, 1, 2, 3}
    saved = [probe.kl(everything) - probe.kl(everything - {i}) for i in range(4)]
    assert kept.values == pytest.approx(saved)
    plan = choose_layers(teacher, ratio=0.5, method="kl", scores=one)
    assert plan.mamba_layers == tuple(sorted(one.order[:2]))
    assert plan == choose_layers(teacher, ratio=0.5, method="replace-one", **given)
    assert "worth least" in plan.reason
    assert "nats per answer token" in plan.reason
    assert json.loads(json.dumps(one.to_dict()))["order"] == list(one.order)
    assert len(str(one).splitlines()) == 5
    assert choose_layers(teacher, ratio=0.5, scores=kept).method == "leave-one-in"
    with pytest.raises(WorkbenchError, match="by 'leave-one-in', but 4 layers by 'skip-one'"):
        choose_layers(teacher, method="skip-one", scores=kept)
    with pytest.raises(WorkbenchError, match="no score 'best'. Choose skip-one"):
        score_layers(teacher, method="best")


def test_scores_are_measured_once_for_the_same_weights_data_and_method(teacher, donor, monkeypatch):
    given = {"method": "kl", "donor": donor}
    progress = []
    first = score_layers(
        teacher, data=samples(3), **given, on_progress=lambda *n: progress.append(n)
    )
    assert progress == [(n, 4) for n in (1, 2, 3, 4)]
    assert first.seconds > 0
    calls = []
    plain = Probe.kl
    monkeypatch.setattr(Probe, "kl", lambda *args, **kw: calls.append(1) or plain(*args, **kw))
    again = score_layers(teacher, data=samples(3), **given)
    assert again.values == first.values
    assert again.seconds == 0
    assert not calls
    other = convert(teacher, EVERY, init="matvlm")
    for change in (
        {"data": samples(2)},
        {"donor": other},
        {"method": "skip-one"},
        {"cache": False},
    ):
        calls.clear()
        score_layers(teacher, **{"data": samples(3)} | given | change)
        assert len(calls) == 4, change


def test_a_cost_is_told_before_it_is_paid(teacher, donor, monkeypatch):
    monkeypatch.setattr(Probe, "kl", None)
    for method, n_passes in (("skip-one", 4), ("leave-one-in", 5)):
        estimate = score_layers(teacher, method=method, data=samples(3), donor=donor, dry_run=True)
        assert estimate.n_passes == n_passes
        assert estimate.seconds > 0
        assert f"{n_passes} passes over" in str(estimate)


def test_a_disk_that_refuses_costs_only_the_time(teacher, donor, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert score_layers(teacher, data=samples(2), donor=donor).seconds > 0


class Landscape:
    """A probe of a made-up model: layers 0 and 1 cost little apart and much together."""

    n_layers, n_asked = 4, 0
    alone = (0.1, 0.11, 0.2, 0.3)

    def kl(self, replaced):
        self.n_asked += 1
        return sum(self.alone[i] for i in replaced) + 5.0 * ({0, 1} <= set(replaced))


def test_greedy_minds_what_layers_cost_together():
    scores = Scores("replace-one", Landscape.alone, "nats per answer token", "x", 1, 0.0)
    assert choose_layers(stack(4), ratio=0.5, scores=scores).mamba_layers == (0, 1)
    chosen, kl = greedy(Landscape(), 2)
    assert chosen == (0, 2)
    assert kl == pytest.approx(0.3)


@pytest.mark.parametrize(
    "options", [{"method": "greedy"}, {"method": "explicit", "layers": [0]}], ids=str
)
def test_scores_that_a_method_has_no_use_for_are_refused(options):
    scores = Scores("replace-one", Landscape.alone, "nats per answer token", "x", 1, 0.0)
    with pytest.raises(WorkbenchError, match="4 layers by 'replace-one', but 4 layers by"):
        choose_layers(stack(4), scores=scores, **options)


def test_a_beam_finds_what_greedy_misses():
    class Trap(Landscape):
        def kl(self, replaced):
            best = set(replaced) == {2, 3}
            return 0.01 if best else super().kl(replaced)

    assert greedy(Trap(), 2)[0] == (0, 2)
    assert greedy(Trap(), 2, width=3)[0] == (2, 3)


@pytest.mark.parametrize("method", ["greedy", "beam"])
def test_a_search_makes_a_plan_that_says_how_good_it_is(method, teacher, donor):
    plan = choose_layers(teacher, ratio=0.5, method=method, data=samples(3), donor=donor)
    probe = Probe(teacher, donor, samples(3), limit=None)
    assert len(plan.mamba_layers) == 2
    assert plan.method == method
    assert f"{probe.kl(plan.mamba_layers):.3g} nats" in plan.reason


def test_a_donor_that_lacks_a_layer_is_refused(teacher):
    with pytest.raises(WorkbenchError, match="has no mixer for layer 1: align all layers first"):
        score_layers(teacher, data=samples(2), donor=convert(teacher, PLAN, init="matvlm"))
    with pytest.raises(WorkbenchError, match="is no hybrid of tiny"):
        score_layers(teacher, data=samples(2), donor=teacher)
    with pytest.raises(WorkbenchError, match="no sample to read: the data set is empty"):
        score_layers(teacher, data=[], donor=convert(teacher, EVERY, init="matvlm"))


def test_scores_are_kept_where_caches_are(tmp_path):
    assert scoring.cache_folder() == tmp_path / "workbench" / "scores"
