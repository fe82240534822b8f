import json
import pickle
import subprocess
import sys

import pytest
import tiny
import torch
from torch.nn.attention.flex_attention import create_block_mask
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    StaticCache,
)
from transformers.cache_utils import StaticLayer

from workbench.errors import WorkbenchError
from workbench.models.cache import CACHE, SSMSlot, cache_bytes, real_positions
from workbench.models.families import decoder_layers, family_name
from workbench.models.hybrid import build_hybrid, mixers, plan_of
from workbench.models.plan import Plan

LAYERS = {"first": (0,), "some": (0, 2), "last": (3,), "all": (0, 1, 2, 3)}
PAPER, KEPT = {}, {"rope": True, "bias": True, "d_conv": 3, "chunk_size": 8}
GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 8}


def hybrid(family, layers, options=PAPER):
    return build_hybrid(tiny.language_model(family), Plan(tiny.N_LAYERS, layers), options)


def new_tokens(model, ids, **options):
    return model.generate(ids, **(GREEDY | options))[:, ids.shape[1] :]


def left_padded(ids, n_padding):
    """Rows of one batch: the first with padding on its left, the second without."""
    short = ids[:1, n_padding:]
    mask = torch.ones_like(ids)
    mask[0, :n_padding] = 0
    batch = ids.clone()
    batch[0, :n_padding] = 5  # not the padding token: the mask alone must tell
    return short, batch, mask


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("options", [PAPER, KEPT], ids=["paper", "kept"])
@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_generation_does_not_depend_on_cache_or_padding(layers, options):
    model, ids = hybrid("phi-norms", layers, options), tiny.token_ids()
    short, batch, mask = left_padded(ids, 4)
    cached = new_tokens(model, ids)
    alone = new_tokens(model, short)
    assert torch.equal(new_tokens(model, ids, use_cache=False), cached)
    assert torch.equal(new_tokens(model, batch, attention_mask=mask)[0], alone[0])
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(new_tokens(model, ids, **static), cached)
    assert torch.equal(new_tokens(model, batch, attention_mask=mask, **static)[0], alone[0])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_leaves_the_logits_alone(attention):
    model = hybrid("phi", (0, 2))
    model.set_attn_implementation(attention)
    short, batch, mask = left_padded(tiny.token_ids(), 4)
    expected = model(short).logits
    masked = model(batch, attention_mask=mask).logits[:1, 4:]
    torch.testing.assert_close(masked, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(batch).logits[:1, 4:], expected, atol=1e-2)


def test_without_its_state_the_cache_is_worth_nothing(monkeypatch):
    model, ids = hybrid("phi", (0, 2)), tiny.token_ids()
    expected = new_tokens(model, ids)
    monkeypatch.setattr(SSMSlot, "read", lambda self: None)
    assert not torch.equal(new_tokens(model, ids), expected)


@pytest.mark.parametrize("layers", [(0, 2), (0, 1, 2, 3)], ids=["some", "all"])
def test_beams_follow_their_states(layers):
    model, ids = hybrid("llama", layers), tiny.token_ids()
    beams = {"num_beams": 3}
    cached = new_tokens(model, ids, **beams)
    assert torch.equal(cached, new_tokens(model, ids, use_cache=False, **beams))


def test_a_second_turn_continues_on_the_same_cache():
    model, ids = hybrid("qwen2", (0, 3)), tiny.token_ids(length=17)
    expected = model(ids).logits
    cache = DynamicCache()  # made without a config: it has no slots yet
    for start, stop in ((0, 6), (6, 7), (7, 13), (13, 17)):
        logits = model(ids[:, start:stop], **{CACHE: cache}, use_cache=True).logits
        torch.testing.assert_close(logits, expected[:, start:stop], rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 17
    with pytest.raises(WorkbenchError, match="cannot be cropped"):
        cache.crop(-1)


@pytest.mark.parametrize("layers", [(0, 2), (0, 1, 2, 3)], ids=["some", "all"])
def test_a_reset_cache_starts_anew(layers):
    model, ids = hybrid("qwen2", layers), tiny.token_ids()
    cache = StaticCache(model.config, max_cache_len=32)
    expected = model(ids, **{CACHE: cache}).logits
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(model(ids, **{CACHE: cache}).logits, expected)


def test_padding_is_read_from_every_kind_of_mask():
    real = torch.ones(2, 6, dtype=torch.bool)
    real[0, :2] = False
    order = torch.arange(6)
    sees = (order[:, None] >= order) & real[:, None]  # (batch, queries, keys)
    soft = torch.zeros(2, 6, 6).masked_fill(~sees, torch.finfo(torch.float32).min)

    def flex(n_new, shift):
        def mask_mod(b, h, q, k):
            return (q + shift >= k) & real[b, k]

        return create_block_mask(mask_mod, 2, None, n_new, 6, device="cpu")

    static = SSMSlot(StaticLayer(6), StaticLayer(6))
    for new in (6, 2, 1):
        expected = real[:, -new:]
        masks = (real, sees[:, None, -new:], soft[:, None, -new:], flex(new, 6 - new))
        for mask in masks:
            assert torch.equal(real_positions(mask, new, None), expected)
        for mask in masks[1:]:
            assert torch.equal(real_positions(mask, new, static), expected)
    assert real_positions(None, 6, None) is None


def test_padding_in_a_block_that_sees_itself_is_still_padding():
    real = torch.ones(2, 6, dtype=torch.bool)
    real[0, :2] = False
    sees = real[:, None, :].expand(2, 6, 6)  # every query sees all that is real
    free = torch.zeros(2, 6, 3, dtype=torch.bool)  # places of a static cache
    static = SSMSlot(StaticLayer(9), StaticLayer(9))
    assert torch.equal(real_positions(sees[:, None], 6, None), real)
    assert torch.equal(real_positions(torch.cat([sees, free], -1)[:, None], 6, static), real)


def test_another_models_cache_is_refused():
    teacher, student = tiny.language_model("phi"), hybrid("phi", (0, 2))
    ids = tiny.token_ids()
    for first, second in ((teacher, student), (student, teacher)):
        cache = first(ids, use_cache=True)[CACHE]
        with pytest.raises(WorkbenchError, match="start a new cache"):
            second(ids, **{CACHE: cache})


def test_other_layers_and_the_teacher_stay_as_they_are():
    teacher = tiny.llava()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    text = teacher.config.text_config.to_dict()
    student = build_hybrid(teacher, Plan(4, (1, 2)))
    after = student.state_dict()
    assert list(mixers(student)) == [1, 2]
    assert not mixers(teacher)
    assert plan_of(teacher) is None
    assert teacher.config.text_config.to_dict() == text
    assert type(teacher).__name__ == "LlavaForConditionalGeneration"
    for name, tensor in before.items():
        assert torch.equal(teacher.state_dict()[name], tensor)
        gone = name.endswith("_proj.bias") or name.endswith("dense.bias")
        if not (gone and ("layers.1.self" in name or "layers.2.self" in name)):
            assert torch.equal(after[name], tensor)
    mixers(student)[1].q_proj.weight.add_(1)
    assert torch.equal(teacher.state_dict()["lm_head.weight"], before["lm_head.weight"])
    attention = decoder_layers(teacher)[1].self_attn
    assert not torch.equal(attention.q_proj.weight, mixers(student)[1].q_proj.weight)


def test_layers_differ_in_their_draw_and_a_student_is_made_alike_each_time():
    one, other = (hybrid("phi", (0, 2)) for _ in range(2))
    assert not torch.equal(mixers(one)[0].A_log, mixers(one)[2].A_log)
    assert torch.equal(mixers(one)[2].A_log, mixers(other)[2].A_log)


@pytest.mark.parametrize("family", ["phi-norms", "llava"])
def test_save_and_load_change_no_bit(family, tmp_path):
    images = {}
    if family == "llava":
        vlm, auto = tiny.vlm((0, 3), KEPT), AutoModelForImageTextToText
        images = {"pixel_values": torch.randn(2, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)}
        student, ids = vlm.model, tiny.token_ids(length=22)
        ids[:, 2:18] = tiny.IMAGE_TOKEN
    else:
        student, auto, ids = hybrid(family, (0, 3)), AutoModelForCausalLM, tiny.token_ids()
    student.save_pretrained(tmp_path)
    loaded, report = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert type(loaded) is type(student)
    assert plan_of(loaded) == plan_of(student)
    assert torch.equal(loaded(ids, **images).logits, student(ids, **images).logits)
    low = auto.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for mixer in mixers(low).values():
        assert mixer.A_log.dtype == torch.float32
        assert mixer.z_proj.weight.dtype == torch.bfloat16
    copied = pickle.loads(pickle.dumps(auto.from_pretrained(tmp_path)))
    assert torch.equal(copied(ids, **images).logits, loaded(ids, **images).logits)


def test_a_student_of_a_teacher_read_from_a_file_can_be_saved_and_read(tmp_path):
    tiny.llava().save_pretrained(tmp_path / "teacher")
    teacher = AutoModelForImageTextToText.from_pretrained(tmp_path / "teacher")
    student = build_hybrid(teacher, Plan(4, (0, 2)))
    assert student.config.model_type == "ssm_hybrid-llava"
    student.save_pretrained(tmp_path / "student")
    again, report = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "student", output_loading_info=True
    )
    assert not any(report.values())
    for name, tensor in student.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_a_fresh_process_reads_a_hybrid_once_the_workbench_is_imported(tmp_path):
    hybrid("phi", (0, 2)).save_pretrained(tmp_path)
    code = (
        "import sys, workbench.models\n"
        "from transformers import AutoModelForCausalLM\n"
        "print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)"
    )
    run = [sys.executable, "-c", code, str(tmp_path)]
    shown = subprocess.run(run, capture_output=True, text=True, check=True, cwd=tiny.HOUSE)
    assert shown.stdout.strip() == "SSMHybridPhiForCausalLM"


def test_a_picture_is_seen_the_same_with_and_without_cache():
    model, ids = tiny.vlm((0, 2)).model, tiny.token_ids(length=22)
    ids[:, 2:18] = tiny.IMAGE_TOKEN
    pictures = torch.randn(2, 3, 16, 16)
    cached = new_tokens(model, ids, pixel_values=pictures)
    assert torch.equal(new_tokens(model, ids, pixel_values=pictures, use_cache=False), cached)
    assert not torch.equal(new_tokens(model, ids, pixel_values=-pictures), cached)


def test_bfloat16_runs_with_a_float32_state():
    model, ids = hybrid("llama", (0, 2)).to(torch.bfloat16), tiny.token_ids()
    cache = model(ids, use_cache=True)[CACHE]
    slot = cache.layers[0]
    assert slot.read().ssm.dtype == torch.float32
    assert slot.read().conv.dtype == torch.bfloat16
    kv = 2 * 2 * 2 * 2 * 11 * 12 * 2  # layers, K and V, batch, heads, tokens, head, bytes
    conv = 2 * 2 * (2 * 12 + 2 * 12 + 4 * 12) * 3 * 2  # layers, batch, x + B + C, taps, bytes
    assert cache_bytes(cache) == (kv, conv + 2 * 2 * 4 * 12 * 12 * 4)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_every_parameter_of_a_mixer_learns_and_padding_does_not_matter(checkpointing):
    model = hybrid("phi-norms", (0, 2), KEPT).train()
    if checkpointing:
        model.gradient_checkpointing_enable()  # its name in every version
    ids, mask = tiny.token_ids(), torch.ones(2, 11, dtype=torch.long)
    mask[0, :4] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 4] = -100  # or a padding position would have to predict it
    grads = []
    for filler in (5, 6):
        with torch.enable_grad():
            batch = ids.masked_fill(mask == 0, filler)
            loss = model(batch, attention_mask=mask, labels=labels, use_cache=False).loss
            names, values = zip(*mixers(model)[2].named_parameters(), strict=True)
            grads.append(torch.autograd.grad(loss, values))
    for name, one, two in zip(names, *grads, strict=True):
        assert one.abs().max() > 0, name
        torch.testing.assert_close(one, two)


def test_bad_plans_and_options_are_refused_in_words():
    teacher = tiny.language_model("phi")
    with pytest.raises(WorkbenchError, match="names layer 4, but the model has 4 layers"):
        Plan(4, (0, 4))
    with pytest.raises(WorkbenchError, match="twice"):
        Plan(4, (1, 1))
    with pytest.raises(WorkbenchError, match="for a model of 6 layers, but this one has 4"):
        build_hybrid(teacher, Plan(6, (0,)))
    with pytest.raises(WorkbenchError, match="hybrid already"):
        build_hybrid(hybrid("phi", (0,)), Plan(4, (1,)))
    with pytest.raises(WorkbenchError, match="no mixer option 'ropes'"):
        build_hybrid(teacher, Plan(4, (1,)), {"ropes": True})


def test_a_plan_shows_itself_and_round_trips():
    plan = Plan(4, (2, 0), "even", "Spread evenly.")
    assert plan.mamba_layers == (0, 2)
    assert plan.ratio == 0.5
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    rows = str(plan).splitlines()
    assert "2 of 4 layers" in rows[0]
    assert [("Mamba-2" in row) for row in rows[1:]] == [False, True, False, True]
    assert family_name(tiny.llava()) == family_name(tiny.vlm((0,)).model) == "llava (phi)"
