"""What a profile measures, counts, refuses, and keeps when it is cut short."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
from test_engine import endless
from trainees import PLAN, samples

from workbench.errors import WorkbenchError
from workbench.models import generation
from workbench.models.engine import Engine, engine, fastest_mode
from workbench.models.teacher import VLM
from workbench.steps.conversion.initialization import convert
from workbench.steps.efficiency import profiling
from workbench.steps.efficiency.bounds import Idle, amdahl, sizes
from workbench.steps.efficiency.machine import Machine
from workbench.steps.efficiency.profiling import profile
from workbench.views.figures import prefill_figure, speed_figure

# Of a Mamba-2 layer: z, dt, convolution and its bias, A_log with dt_bias and D, norm.
NEW = 48 * 48 + 48 * 4 + 3 * 48 * 4 + 3 * 48 + 3 * 4 + 48


@pytest.fixture(autouse=True)
def known_machine(monkeypatch):
    monkeypatch.setattr(profiling, "machine", lambda device, dtype: Machine(1e9, 1e10))


@pytest.fixture(scope="module")
def teacher():
    return tiny.vlm()


def test_a_profile_has_a_row_for_each_model_and_prompt_and_counts_bytes():
    layers = {"teacher": None, "half": (0, 2), "all": (0, 1, 2, 3)}
    models = [replace(endless(tiny.vlm(some)), name=name) for name, some in layers.items()]
    asked = [samples(1)[0], samples(1, n_images=3)[0]]
    result = profile(models, asked, repeats=1, max_new_tokens=5)
    assert result.device == "cpu"
    assert result.finished
    assert len(result.rows) == 6
    for row, vlm in zip(result.rows, 2 * models, strict=True):
        assert row.weight_bytes == sum(p.nbytes for p in vlm.model.parameters())
        n_mamba = len(vlm.plan.mamba_layers) if vlm.plan else 0
        read = row.n_prompt_tokens + row.n_new_tokens - 1
        assert row.kv_bytes == (4 - n_mamba) * 2 * read * 48 * 4
        assert row.ssm_bytes == n_mamba * (3 * 48 * 3 + 4 * 12 * 12) * 4
        assert row.cache_bytes == row.kv_bytes + row.ssm_bytes
        assert row.n_new_tokens == 5
        assert 0 < row.prefill_ms < 60_000
        assert row.decode_tokens_per_s > 0
        low, high = row.decode_tokens_per_s_range
        assert low <= row.decode_tokens_per_s <= high
        assert row.ratio == n_mamba / 4
    short, long = result.rows[:3], result.rows[3:]
    assert len({row.n_prompt_tokens for row in short}) == 1
    assert long[0].n_prompt_tokens == short[0].n_prompt_tokens + 2 * (16 + 1)
    assert long[2].cache_bytes == short[2].cache_bytes
    assert result.teacher_of(long[2]) is long[0]
    reached, most = result.decode_speed_up(long[2])
    assert reached > 0
    assert most == amdahl(long[0].decode_mixing_share, 1.0) >= 1
    assert result.decode_speed_up(long[0]) == (None, None)
    assert result.decode_reachable(long[0]) is None
    own_ms = 1e3 * (4 * 4 * NEW + 2 * long[2].ssm_bytes) / 1e9  # at the fixture's bandwidth
    assert long[2].decode_own_ms == pytest.approx(own_ms)
    assert long[0].decode_own_ms == 0
    added = own_ms / (1e3 / long[0].decode_tokens_per_s)
    reachable = 1 / (1 - long[0].decode_mixing_share + added)
    assert result.decode_reachable(long[2]) == pytest.approx(reachable)
    assert result.decode_reachable(long[0]) is None
    plain = json.loads(json.dumps(result.to_dict()))
    assert plain["rows"][5]["decode_speed_up"] == reached
    assert plain["about"]["torch"] == torch.__version__
    assert str(result).count("\n") == 7
    assert str(result).endswith(", mode static")
    for draw in (speed_figure, prefill_figure):
        assert len(draw(result).data) == 6


def test_the_bytes_and_operations_of_a_step_are_counted():
    vlm = tiny.vlm((0, 2))
    found = sizes(vlm)
    layers = vlm.model.get_decoder().layers
    assert found.layer_parameters == sum(p.numel() for p in layers.parameters())
    assert found.kv_bytes_a_token == 2 * 2 * 48 * 4
    assert found.ssm_bytes == 2 * (3 * 48 * 3 + 4 * 12 * 12) * 4
    assert found.new_parameters == 2 * NEW
    assert found.own_bytes(3) == 4 * 2 * NEW + 6 * found.ssm_bytes
    assert sizes(tiny.vlm()).own_bytes(3) == 0
    weights = 4 * (found.layer_parameters + 300 * 48)
    expected = weights + 3 * (10 * 768 + 2 * found.ssm_bytes)
    assert found.decode_bytes(3, 10) == expected
    slow_memory = Machine(1.0, 1e30)
    assert found.decode_seconds(slow_memory, 3, 10) == expected
    slow_unit = Machine(1e30, 1.0)
    dense = 2 * (7 * found.layer_parameters + 300 * 48)
    mixing = 2 * 49 * 96 + 6 * 7 * 2 * 4 * 12 * 12
    assert found.prefill_seconds(slow_unit, 1, 7) == dense + mixing


def test_a_sweep_goes_over_lengths_and_batches_and_beyond_the_models_positions(teacher, tmp_path):
    student = convert(teacher, PLAN)
    trace = tmp_path / "trace.json"
    result = profile(
        [teacher, student], lengths=[8, 300], batch_sizes=[1, 2], repeats=1, max_new_tokens=3,
        trace=trace,
    )  # fmt: skip
    shapes = [(r.n_prompt_tokens, r.batch_size) for r in result.rows]
    assert shapes == [(n, b) for n in (8, 300) for b in (1, 2) for _ in range(2)]
    assert [r.note for r in result.rows[:4]] == [""] * 4
    assert all("speed only: the model has 256 positions" in r.note for r in result.rows[4:])
    teachers, hybrid = result.rows[2], result.rows[3]  # of two prompts side by side
    step_ms = 2e3 / teachers.decode_tokens_per_s
    cost = 1 - hybrid.ratio * teachers.decode_mixing_share + hybrid.decode_own_ms / step_ms
    assert result.decode_reachable(hybrid) == pytest.approx(1 / cost)
    assert "traceEvents" in json.loads(trace.read_text())
    saved = json.loads(result.save(tmp_path / "profile.json").read_text())
    assert len(saved["rows"]) == 8


def test_a_full_memory_is_a_row_and_the_sweep_goes_on(teacher, monkeypatch):
    prefill = Engine.prefill

    def full(self, inputs, **options):
        if inputs["input_ids"].shape[1] == 20:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return prefill(self, inputs, **options)

    monkeypatch.setattr(Engine, "prefill", full)
    result = profile([teacher], lengths=[8, 20, 12], repeats=1, max_new_tokens=3)
    assert [r.note for r in result.rows] == ["", "out of memory", ""]
    assert result.rows[1].decode_tokens_per_s is None
    assert result.rows[1].n_prompt_tokens == 20
    assert "out of memory" in str(result)
    assert len(speed_figure(result).data[0].x) == 2


def test_no_room_for_the_share_of_mixing_costs_only_that_share(teacher, monkeypatch):
    prefill = Engine.prefill

    def full(self, inputs, **options):
        if self.wrap is not None:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return prefill(self, inputs, **options)

    monkeypatch.setattr(Engine, "prefill", full)
    (row,) = profile([teacher], lengths=[8], repeats=1, max_new_tokens=3).rows
    assert row.note == ""
    assert row.decode_tokens_per_s > 0
    assert row.decode_mixing_share is None


def test_a_prompt_that_could_not_be_recorded_is_said_to_be(teacher, monkeypatch):
    monkeypatch.setattr(Engine, "without_graphs", True)
    result = profile([teacher], lengths=[8], repeats=1, max_new_tokens=3)
    assert [row.note for row in result.rows] == ["prompts without graphs"]


def test_what_is_interrupted_keeps_the_rows_so_far(teacher, monkeypatch):
    prefill = Engine.prefill

    def stopped(self, inputs, **options):
        if inputs["input_ids"].shape[1] == 20:
            raise KeyboardInterrupt
        return prefill(self, inputs, **options)

    monkeypatch.setattr(Engine, "prefill", stopped)
    result = profile([teacher], lengths=[8, 20, 12], repeats=1, max_new_tokens=3)
    assert [r.n_prompt_tokens for r in result.rows] == [8]
    assert not result.finished
    assert "interrupted" in str(result)


def test_without_a_mode_a_gpu_records_if_all_models_can_be_recorded(monkeypatch):
    def vlm(device, reason=None):
        return SimpleNamespace(model=SimpleNamespace(device=torch.device(device), reason=reason))

    monkeypatch.setattr(engine, "why_not", lambda model: model.reason)
    assert fastest_mode([vlm("cuda"), vlm("cuda")]) == "graph"
    assert fastest_mode([vlm("cuda"), vlm("cuda", "odd layers")]) == "static"
    assert fastest_mode([vlm("cpu")]) == "static"


def test_a_peak_is_of_one_model_whatever_else_is_in_memory(teacher, monkeypatch):
    monkeypatch.setattr(generation, "_memory_now", lambda device: 5_000_000)  # of all that is there
    monkeypatch.setattr(generation, "_memory_peak", lambda device: 5_000_700)
    hybrid = endless(tiny.vlm((0, 2)))
    for mode in ("eager", "static"):
        result = profile([teacher, hybrid], lengths=[8], mode=mode, repeats=1, max_new_tokens=4)
        for row, vlm in zip(result.rows, (teacher, hybrid), strict=True):
            made = Engine(vlm, mode, max_length=12)
            ids = torch.ones(1, 8, dtype=torch.long)
            list(made.generate({"input_ids": ids}, max_new_tokens=4))
            expected = row.weight_bytes + sum(made.bytes_reserved()) + 700
            assert row.peak_mib == pytest.approx(expected / 2**20)


def test_models_take_turns_and_figures_are_medians_without_the_first_round(teacher, monkeypatch):
    student, calls = convert(teacher, PLAN), []

    def fake(engine, inputs, n_new):
        calls.append((engine.vlm.name, engine.wrap is not None))
        return float(len(calls)), 1.0 / len(calls)

    monkeypatch.setattr(profiling, "_once", fake)
    monkeypatch.setattr(Engine, "bytes_held", lambda engine: (1, 2))
    result = profile([teacher, student], samples(1), repeats=3)
    assert calls == 4 * [("tiny", False), ("tiny", True), ("tiny-50", False)]
    assert [row.prefill_ms for row in result.rows] == [7000, 9000]
    assert result.rows[0].decode_tokens_per_s == 7


def test_what_cannot_be_profiled_is_said_in_a_sentence(teacher):
    for models, options in (([], {}), (teacher, {}), ([teacher], {"repeats": 0})):
        with pytest.raises(WorkbenchError, match="a list of at least one model, and at least one"):
            profile(models, samples(1), **options)
    with pytest.raises(WorkbenchError, match="at least one sample"):
        profile([teacher], [])
    with pytest.raises(WorkbenchError, match="samples or lengths"):
        profile([teacher], samples(1), lengths=[8])
    for lengths in ([0], [], 8, [8.5], ["8"]):
        with pytest.raises(WorkbenchError, match="lengths must be a list of whole numbers of at"):
            profile([teacher], lengths=lengths)
    for batch_sizes in ([0], [], 4):
        with pytest.raises(WorkbenchError, match="batch_sizes must be a list of whole numbers"):
            profile([teacher], lengths=[8], batch_sizes=batch_sizes)
    with pytest.raises(WorkbenchError, match="Only random words have batch sizes: give lengths"):
        profile([teacher], batch_sizes=(4,))
    with pytest.raises(WorkbenchError, match="max_new_tokens must be at least 2"):
        profile([teacher], samples(1), max_new_tokens=1)


def test_the_profile_asks_for_a_description_and_for_several_pictures_by_itself():
    one, many = profiling._default_samples()
    assert one.family == "describe"
    assert len(many.images) == 4


def test_models_that_read_text_only_are_asked_random_words_by_themselves(teacher, monkeypatch):
    reader = VLM("reader", tiny.language_model("llama"), tiny.tokenizer())
    short = {"repeats": 1, "max_new_tokens": 3}
    for models in ([reader], [teacher, reader]):
        rows = profile(models, **short).rows
        assert [row.n_prompt_tokens for row in rows] == [256 - 3] * len(models)
        assert not any(row.note for row in rows)
    monkeypatch.setattr(profiling, "_WORDS", (8, 16))
    rows = profile([reader], batch_sizes=[2], **short).rows
    assert [(row.n_prompt_tokens, row.batch_size) for row in rows] == [(8, 2), (16, 2)]


def test_an_engine_whose_attention_idles_can_stand_behind_a_prompt():
    engine = Engine(tiny.vlm((0, 2)), "static", max_length=20, wrap=Idle)
    engine.pretend(1, 9, max_new_tokens=3)
    assert torch.isfinite(engine.step()).all()
    assert engine.bytes_held()[0] > 0
