"""Each widget is one call, can be read back as data, and stands still where no widget lives."""

import dataclasses
import json
import re
import time
from xml.etree import ElementTree

import pytest
import tiny

import workbench as wb
from workbench.data import Sample
from workbench.models.plan import Plan
from workbench.steps.efficiency.budget import budget
from workbench.steps.efficiency.profiling import Profile, ProfileRow
from workbench.steps.quality.together import mean_kl, read_together
from workbench.steps.training.stages import Stage
from workbench.views import widgets
from workbench.views.charts import bars_figure
from workbench.views.widgets.drawing import Bar, Line, bars, cells, lines, table

WIDGET = "application/vnd.jupyter.widget-view+json"
SAMPLES = [
    Sample((tiny.image(i),), "which colour is it", "the tallest bar", "chart") for i in range(2)
]


@pytest.fixture(scope="module")
def teacher():
    return tiny.vlm()


@pytest.fixture
def student(teacher):
    return wb.convert(teacher, Plan(tiny.N_LAYERS, (0, 2)), init="matvlm")


def check_panel(panel):
    bundle = panel._repr_mimebundle_()
    assert {WIDGET, "text/html", "text/plain"} <= bundle.keys()
    for svg in re.findall(r"<svg.*?</svg>", bundle["text/html"], re.S):
        assert "aria-label" in ElementTree.fromstring(svg).attrib
    assert "<script" not in bundle["text/html"]
    json.dumps(panel.value)
    return bundle["text/html"]


@pytest.mark.parametrize("layers", [None, (0, 2), (0, 1, 2, 3)])
def test_a_budget_is_what_an_answer_holds(teacher, layers):
    plan = layers and Plan(tiny.N_LAYERS, layers)
    vlm = wb.convert(teacher, plan, init="matvlm") if plan else teacher
    said = wb.answer(vlm, [tiny.image()], "which colour", max_new_tokens=3)
    computed = budget(teacher, plan, length=said.n_prompt_tokens + said.n_new_tokens - 1)
    assert computed.weight_bytes == said.weight_bytes
    assert computed.kv_bytes == said.kv_bytes
    assert computed.ssm_bytes == said.ssm_bytes
    assert "computed" in str(computed)


def test_a_budget_counts_grouped_queries_and_takes_no_memory():
    model = tiny.language_model("llama")
    vlm = wb.VLM("tiny", model, tiny.tokenizer())
    plan = Plan(tiny.N_LAYERS, (1,))
    assert budget(vlm, length=10).kv_bytes == 10 * tiny.N_LAYERS * 2 * 24 * 4
    student = wb.convert(vlm, plan, init="matvlm")
    whole = sum(p.nbytes for p in student.model.parameters())
    assert budget(vlm, plan).weight_bytes == whole
    assert not any(p.is_meta for p in model.parameters())
    with pytest.raises(wb.WorkbenchError):
        budget(vlm, Plan(3, (1,)))


def test_models_that_are_the_same_expect_the_same(teacher, student):
    same = read_together(teacher, teacher, SAMPLES)
    assert [len(a) for a in same] == [len(a) for a in read_together(teacher, student, SAMPLES)]
    assert all(t.kl_nats < 1e-5 and t.agree for answer in same for t in answer)
    assert "".join(t.text for t in same[0]).startswith(" the tallest bar")
    assert mean_kl(teacher, student, SAMPLES) > 1e-3
    with pytest.raises(wb.WorkbenchError):
        read_together(teacher, student, [])


def test_the_layer_picker_follows_slider_and_clicks(teacher):
    picker = widgets.layer_picker(teacher, ratio=0.25, length=64, scores=[4, 1, 2, 3])
    assert picker.plan.mamba_layers == (0,)
    before = check_panel(picker)
    picker.ratio.value = 2
    assert picker.plan.mamba_layers == (0, 2)
    picker.spread.value = "by score"
    assert picker.plan.mamba_layers == (1, 2)
    assert picker.value["estimated_kl_nats"] == 3
    picker.buttons[3].value = True
    assert picker.ratio.value == 3
    assert picker.plan.mamba_layers == (1, 2, 3)
    assert picker.picture.value != before
    for spread, layers in (("first", (0, 1, 2)), ("last", (1, 2, 3)), ("even", (0, 1, 2))):
        picker.spread.value = spread
        assert picker.plan.mamba_layers == layers
    picker.ratio.value = 0
    assert picker.value["computed"]["ssm_bytes"] == 0


def test_the_layer_picker_tells_measured_from_computed(teacher):
    picker = widgets.layer_picker(teacher, samples=SAMPLES, length=64)
    assert picker.value["measured"] is None
    picker.button.click()
    assert picker.wait(60)
    found = picker.value["measured"]
    plan = picker.plan
    assert found["student_cache_bytes"] == (
        budget(teacher, plan, length=found["n_tokens"]).cache_bytes
    )
    assert "plan, measured" in check_panel(picker)
    picker.choose([1])
    assert picker.value["measured"] is None, "another plan has not been measured"


def test_the_init_bench_keeps_its_rows(teacher):
    bench = widgets.init_bench(teacher, Plan(tiny.N_LAYERS, (1,)), samples=SAMPLES)
    assert [r["init"] for r in bench.value["rows"]] == ["matvlm"]
    bench.init.value = "linear"
    assert bench.switches["rope"].value
    assert not bench.switches["norm"].value
    bench.switches["rope"].value = False
    bench.button.click()
    assert bench.wait(60)
    assert bench.value["rows"][-1]["options"] == {"rope": False}
    assert "linear, rope=False" in check_panel(bench)
    bench.measure("linear", rope=False)
    assert len(bench.value["rows"]) == 2, "the same start is measured anew, not twice"


def test_what_goes_wrong_in_a_thread_is_said(teacher):
    bench = widgets.init_bench(teacher, Plan(tiny.N_LAYERS, (1,)), samples=SAMPLES, inits=())
    bench.in_background(lambda: bench.measure("best"), busy="…")
    bench.wait(60)
    assert "There is no init &#x27;best&#x27;" in bench.said.value


def slow_stage(steps):
    return [Stage("slow", steps, layer_weight=1.0, kl_weight=1.0, lr=1e-4, lr_new=1e-4)]


def wait_until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    assert true()


def test_the_dashboard_starts_pauses_goes_on_and_stops(teacher, student):
    panel = widgets.distill_dashboard(
        student, teacher, SAMPLES, recipe=slow_stage(2000), batch_size=2
    )
    assert "nothing yet" in check_panel(panel)
    panel.start_button.click()
    wait_until(lambda: len(panel.rows) >= 2)
    assert panel.value["state"] == "running"
    panel.pause_button.click()
    assert panel.state == "paused"
    time.sleep(0.3)
    n = len(panel.rows)
    time.sleep(0.3)
    assert len(panel.rows) == n, "it goes on while it is paused"
    assert "Paused." in panel.said.value, "the step that was under way talks over the pause"
    panel.pause_button.click()
    wait_until(lambda: len(panel.rows) > n)
    panel.pause()
    panel.stop_button.click()
    assert panel.wait(60)
    assert panel.state == "stopped"
    assert panel.run.stopped
    assert panel.value["rows"][-1]["step"] == panel.run.steps
    assert "layer loss at step" in check_panel(panel)


def test_the_dashboard_resumes_from_its_folder(teacher, student, tmp_path):
    panel = widgets.distill_dashboard(
        student, teacher, SAMPLES, recipe=slow_stage(400), batch_size=2, folder=tmp_path / "run"
    )
    panel.start()
    wait_until(lambda: len(panel.rows) >= 2)
    panel.stop()
    assert panel.wait(60)
    steps = panel.run.steps
    panel.start()
    wait_until(lambda: panel.rows[-1].step > steps)
    panel.stop()
    assert panel.wait(60)
    assert [r.step for r in panel.rows] == list(range(1, panel.run.steps + 1))


def test_the_dashboard_says_what_failed(teacher, student):
    panel = widgets.distill_dashboard(student, teacher, [], steps=2)
    panel.start()
    assert panel.wait(60)
    assert panel.state == "failed"
    assert "the data set is empty" in panel.said.value
    with pytest.raises(wb.WorkbenchError, match="sets stop itself"):
        widgets.distill_dashboard(student, teacher, SAMPLES, stop=lambda: True)


def profile_of(lengths, batches=(1,)):
    rows = [
        ProfileRow(
            m, k - 1, batch, n, 4, prefill_ms=10.0 * n * k, prefill_ms_range=None,
            prefill_bound_ms=1.0, decode_tokens_per_s=5.0 / k, decode_tokens_per_s_range=(1, 9),
            decode_bound_tokens_per_s=9.0, prefill_mixing_share=None, decode_mixing_share=0.5,
            decode_own_ms=0.0,
            weight_bytes=1000, kv_bytes=100 * n, ssm_bytes=7 * k, peak_mib=None, warm_up_ms=1.0,
        )
        for k, m in enumerate(("teacher", "student"), 1) for batch in batches for n in lengths
    ]  # fmt: skip
    return Profile(tuple(rows), "cpu")


@pytest.mark.parametrize("lengths", [(8,), (8, 16)])
def test_the_profile_explorer_shows_any_figure(lengths):
    panel = widgets.profile_explorer(profile_of(lengths))
    assert "prefill, ms" in check_panel(panel)
    panel.figure.value = "cache_bytes"
    assert "cache, KiB" in check_panel(panel)
    panel.figure.value, panel.ratio.value = "prefill_ms", True
    assert "times teacher" in check_panel(panel)
    assert panel.value["in_proportion"]


def test_the_profile_explorer_keeps_batches_apart_and_bears_gaps():
    profile = profile_of((8, 16), batches=(1, 4))
    panel = widgets.profile_explorer(profile)
    assert "student, batch 4" in check_panel(panel)
    assert "peak, MiB" not in [label for label, _ in panel.figure.options], "nothing has it"
    panel.figure.value = "decode_bound_tokens_per_s"
    assert "stroke-dasharray" in check_panel(panel), "what is computed is drawn dotted"
    gap = dataclasses.replace(profile.rows[0], prefill_ms=None, note="out of memory")
    panel = widgets.profile_explorer(Profile((gap, *profile.rows[1:]), "cpu"))
    panel.ratio.value = True
    check_panel(panel)


def test_the_answer_viewer_colours_where_they_part(teacher, student):
    panel = widgets.answer_viewer(teacher, student, SAMPLES, max_new_tokens=4)
    html = check_panel(panel)
    assert list(panel.value["answers"]) == [teacher.name, student.name]
    assert html.count("nats; teacher") == sum(map(len, panel.answers))
    panel.question.value = "how many are there <b>"
    panel.button.click()
    assert panel.wait(60)
    assert panel.value["question"] == "how many are there <b>"
    with pytest.raises(wb.WorkbenchError):
        widgets.answer_viewer(teacher, student, [])


def test_drawings_bear_strange_numbers():
    for drawing in (
        lines([Line("a & b", [0], [0])], "x", "y"),
        lines([Line("a", [1, 2, 3], [1e-3, 0, 1e4])], "x", "y", log=True),
        lines([Line("a", range(500), range(500), measured=False)], "x", "y"),
        bars([Bar("<b>", 0, "0"), Bar("b", -1, "-1", measured=False)], "t"),
        bars([], "t"),
        cells((0, 2), 4, [0, 0, 0, 0]),
    ):
        assert "nan" not in drawing
        ElementTree.fromstring(drawing)


def test_bars_say_figures_without_powers_of_ten():
    large, small = (
        bars_figure({"a": 1.5, "b": 1e-5}, x=""),
        bars_figure({"a": 4e-3, "b": 7e-4}, x=""),
    )
    assert list(large.data[0].text) == ["1.5", "< 0.001"]
    assert list(small.data[0].text) == ["0.004", "0.0007"], "not small beside the longest bar"


def test_a_column_of_prose_stands_left_with_its_head():
    shown = table(["name", "what it is"], [["a", "short"], ["b", "a sentence of some length"]])
    assert "right" not in shown
    assert table(["name", "n"], [["a", "1"]]).count("text-align:right") == 2
