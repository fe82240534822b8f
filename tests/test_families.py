"""What every family must do; `python -m benchmarks.families` makes the README's table of these."""

import copy
import functools

import pytest
import tiny_families as tiny
import torch
from tiny import HOUSE, tokenizer
from transformers import (
    CONFIG_MAPPING,
    AttentionInterface,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
)

import workbench as wb
from benchmarks.families import BEGIN, COLUMNS, END
from workbench.errors import WorkbenchError
from workbench.models.cache import CACHE, SSMSlot
from workbench.models.families import (
    LANGUAGE_MODELS,
    REFUSED,
    VISION_LANGUAGE_MODELS,
    decoder_layers,
    text_config,
)
from workbench.models.hybrid import build_hybrid, mixers, plan_of
from workbench.models.plan import Plan
from workbench.models.teacher import VLM

ALL, SOME = (0, 1, 2, 3), (0, 3)  # where windows slide, they do in layers 0 and 2
KEPT = {"rope": True, "bias": True, "scale": "attention", "d_conv": 2, "gate": False, "norm": False}
LINEAR = {"bias": True, "scale": "attention", "gate": False, "norm": False, "conv_activation": None}
CASES = ((SOME, {}), ((0, 2), KEPT), (ALL, {"chunk_size": 8}))
STATIC = {"cache_implementation": "static", "disable_compile": True}
every_family = pytest.mark.parametrize("family", tiny.FAMILIES)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def generate(model, fed, **options):
    """Six token ids for each question, none of them special, and their logits."""
    options = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 6} | options
    special = list(range(tiny.N_SPECIAL))
    more = {"return_dict_in_generate": True, "output_logits": True}
    return model.generate(**fed, **options, **more, suppress_tokens=special)


def assert_same(answer, expected):
    assert torch.equal(answer.sequences[:, -6:], expected.sequences[:, -6:])
    one, other = (torch.stack(a.logits, 1) for a in (answer, expected))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@functools.cache
def needs_no_cache(family, layers):
    """Whether attention, run again over its own answer, comes to the same.

    In PaliGemma all of the question sees itself, and transformers 5.17 took the answer for a part
    of the question then, teacher or student.
    """
    if layers == ALL:
        return True
    model, fed = tiny.teacher(family), tiny.questions(family)
    cached, anew = (generate(model, fed, use_cache=use).sequences for use in (True, False))
    assert torch.equal(cached, anew) or family == "paligemma"
    return torch.equal(cached, anew)


def without_softmax(module, query, key, value, attention_mask, scaling, **kwargs):
    """Causal linear attention on the queries, keys and values that a family itself has made."""
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    scores = (scaling * query @ key.mT).tril()
    return (scores @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("without_softmax", without_softmax)


def attention_calls(model, fed):
    """Run a teacher and keep, for each layer, its attention and what it was called with."""
    calls = []

    def keep(module, args, kwargs):
        assert not args
        calls.append((module, kwargs | {"attention_mask": None}))

    for layer in decoder_layers(model):
        layer.self_attn.register_forward_pre_hook(keep, with_kwargs=True)
    model(**fed, use_cache=False)
    for layer in decoder_layers(model):
        layer.self_attn._forward_pre_hooks.clear()
    return calls


@pytest.mark.parametrize("rope", [True, False], ids=["rope", "no-rope"])
@every_family
def test_family_transfer(family, rope):
    model = copy.deepcopy(tiny.teacher(family))
    calls = attention_calls(model, tiny.questions(family))
    student = mixers(tiny.student(family, ALL, rope=rope, **LINEAR))
    turned = 0
    for i, (attention, kwargs) in enumerate(calls):
        attention.config._attn_implementation = "without_softmax"
        cos, sin = kwargs["position_embeddings"]
        still = {"position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}
        with_rope, without = attention(**kwargs)[0], attention(**(kwargs | still))[0]
        turned += not torch.allclose(with_rope, without, atol=1e-2)
        student[i].reset_to_linear_attention()
        mixed = student[i](**kwargs)[0]
        torch.testing.assert_close(mixed, with_rope if rope else without, rtol=1e-4, atol=1e-4)
        assert mixed.abs().max() > 0.1
    assert turned >= 2, "RoPE must matter, or this test would not see it"


@every_family
def test_family_cache(family):
    fed = tiny.questions(family)
    for layers, options in CASES:
        model = tiny.student(family, layers, **options)
        cached = generate(model, fed)
        assert_same(generate(model, fed, **STATIC), cached)
        if needs_no_cache(family, layers):
            assert_same(generate(model, fed, use_cache=False), cached)


@every_family
def test_family_padding(family):
    for layers, options in CASES:
        model = tiny.student(family, layers, **options)
        alone = [generate(model, tiny.questions(family, (i,))) for i in (0, 1)]
        together = copy.copy(alone[0])
        together.sequences = torch.cat([answer.sequences[:, -6:] for answer in alone])
        both = zip(*(answer.logits for answer in alone), strict=True)
        together.logits = [torch.cat(pair) for pair in both]
        for cache in ({}, STATIC):
            for filler in (tiny.PAD, tiny.N_SPECIAL):  # the mask alone must tell
                batch = generate(model, tiny.questions(family, filler=filler), **cache)
                assert_same(batch, together)


@every_family
def test_family_save_and_load(family, tmp_path):
    auto = AutoModelForCausalLM if family in tiny.LANGUAGE else AutoModelForImageTextToText
    tiny.teacher(family).save_pretrained(tmp_path / "teacher")
    teacher, fed = auto.from_pretrained(tmp_path / "teacher"), tiny.questions(family)
    model = build_hybrid(teacher, Plan(tiny.N_LAYERS, SOME), KEPT)
    expected, folder = model(**fed).logits, tmp_path / "student"
    model.save_pretrained(folder)
    for where in ({}, {"device_map": "auto"}, {"device_map": {"": "cpu"}}):
        loaded, report = auto.from_pretrained(folder, output_loading_info=True, **where)
        assert not any(report.values())
        assert type(loaded) is type(model)
        assert plan_of(loaded) == plan_of(model)
        assert text_config(loaded).ssm_hybrid == text_config(model).ssm_hybrid
        assert torch.equal(loaded(**fed).logits, expected)
    low = auto.from_pretrained(folder, dtype=torch.bfloat16)
    for mixer in mixers(low).values():
        assert {mixer.A_log.dtype, mixer.dt_bias.dtype, mixer.D.dtype} == {torch.float32}
        assert mixer.dt_weight.dtype == torch.bfloat16


@every_family
def test_family_beam_and_sampling(family):
    for layers, options in CASES[1:]:
        model, fed = tiny.student(family, layers, **options), tiny.questions(family)
        caches = [{}, STATIC, {"use_cache": False}][: 2 + needs_no_cache(family, layers)]
        for how in ({"num_beams": 3}, {"do_sample": True, "top_k": 20}):
            answers = []
            for cache in caches:
                torch.manual_seed(0)
                answers.append(generate(model, fed, **how, **cache).sequences)
            assert all(torch.equal(answer, answers[0]) for answer in answers)


@every_family
def test_family_bf16(family):
    layers, fed = SOME if needs_no_cache(family, SOME) else ALL, tiny.questions(family)
    model = tiny.student(family, layers).to(torch.bfloat16)
    if "pixel_values" in fed:
        fed["pixel_values"] = fed["pixel_values"].to(torch.bfloat16)
    for mixer in mixers(model).values():
        assert {mixer.A_log.dtype, mixer.dt_bias.dtype, mixer.D.dtype} == {torch.float32}
    answer = generate(model, fed)
    state = answer[CACHE].layers[0].read()
    assert (state.ssm.dtype, state.conv.dtype) == (torch.float32, torch.bfloat16)
    cached = torch.stack(answer.logits, 1).float()
    whole = model(**tiny.longer(fed, answer.sequences), use_cache=False).logits[:, -7:-1].float()
    torch.testing.assert_close(cached, whole, rtol=0, atol=0.03 * whole.abs().max().item())
    assert whole.isfinite().all()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@every_family
def test_family_gradient_checkpointing(family):
    model, fed = tiny.student(family, SOME).train(), tiny.questions(family)
    labels = fed["input_ids"].masked_fill(fed["attention_mask"] == 0, -100)
    learned = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        with torch.enable_grad():
            loss = model(**fed, labels=labels, use_cache=False).loss
            loss.backward()
        learned.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad(set_to_none=True)
    torch.testing.assert_close(*learned)
    for mixer in mixers(model).values():
        for name, parameter in mixer.named_parameters():
            names = [n for n, p in model.named_parameters() if p is parameter]
            assert learned[0][names[0]].abs().max() > 0, name


@every_family
def test_family_keeps_what_is_not_replaced(family):
    teacher, fed = tiny.teacher(family), tiny.questions(family)
    untouched = build_hybrid(teacher, Plan(tiny.N_LAYERS, ()))
    assert torch.equal(untouched(**fed).logits, teacher(**fed).logits)
    student = tiny.student(family, (3,))
    before, after = (m(**fed, output_hidden_states=True).hidden_states for m in (teacher, student))
    assert all(torch.equal(a, b) for a, b in zip(before[:4], after[:4], strict=True))
    old, new = teacher.state_dict(), student.state_dict()
    for name, tensor in old.items():
        if name in new:  # a bias of the replaced layer is not
            assert torch.equal(new[name], tensor)
    lost = old.keys() - new.keys()
    assert all("layers.3.self_attn" in name and name.endswith("bias") for name in lost)


@every_family
def test_family_refuses_to_take_tokens_back(family):
    model, fed = tiny.student(family, SOME), tiny.questions(family, (0,))
    for how in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": tiny.teacher(family)}):
        with pytest.raises(WorkbenchError, match="Assisted decoding and prompt lookup"):
            generate(model, fed, **how)
    cache = DynamicCache(config=model.config)
    model(**fed, **{CACHE: cache})
    assert [isinstance(slot, SSMSlot) for slot in cache.layers] == [True, False, False, True]
    with pytest.raises(WorkbenchError, match="cannot be cropped"):
        cache.crop(-1)


REFUSALS = {
    "deepseek_v3": "one latent vector",
    "gemma4_text": "keys and values of another layer",
    "gpt2": "not a self_attn",
    "gpt_neox": "not a self_attn",
    "gpt_oss": "learned sink",
    "mamba2": "linear in the length already",
    "mllama": "cross-attention layers",
    "opt": "cannot be converted yet; those that can are cohere2, gemma, ",
    "qwen3_next": "linear in the length already",
}


@pytest.mark.parametrize("name, reason", REFUSALS.items(), ids=REFUSALS)
def test_what_cannot_be_converted_is_refused_by_name_with_the_reason(name, reason):
    config = CONFIG_MAPPING[name]()
    text = config.get_text_config(decoder=True)
    if name != "gemma4_text":  # whose layers share in a pattern
        text.num_hidden_layers = 2
    auto = AutoModelForImageTextToText if name == "mllama" else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    vlm = VLM(name, model, None)
    plan = Plan(text.num_hidden_layers, (0,))
    for verb in (wb.choose_layers, lambda vlm: wb.convert(vlm, plan)):
        with pytest.raises(WorkbenchError, match=f"family '{name}'.*{reason}"):
            verb(vlm)


def test_every_reason_for_a_refusal_is_seen():
    seen = {reason for reason in REFUSED for part in REFUSALS.values() if part in reason}
    assert seen == set(REFUSED)
    assert not set(LANGUAGE_MODELS) & {name for names in REFUSED.values() for name in names}


def test_an_attention_that_the_table_does_not_describe_is_refused():
    model = copy.deepcopy(tiny.teacher("llama"))
    attention = decoder_layers(model)[2].self_attn
    attention.sinks = torch.nn.Parameter(torch.zeros(6))
    with pytest.raises(WorkbenchError, match="of this llama has a sinks, which the table"):
        build_hybrid(model, Plan(4, (2,)))
    del attention.sinks, attention.k_proj
    with pytest.raises(WorkbenchError, match="of this llama has no k_proj"):
        build_hybrid(model, Plan(4, (2,)))


def test_a_family_in_a_body_that_is_not_in_the_table_is_refused():
    model = copy.deepcopy(tiny.teacher("llava"))
    model.config.__class__ = CONFIG_MAPPING["llava_next"]
    with pytest.raises(WorkbenchError, match=r"'llava_next' \(around 'llama'\) cannot .* yet"):
        build_hybrid(model, Plan(4, (2,)))


@pytest.mark.parametrize("family", ["qwen3", "qwen2_5_vl", "gemma3"])
def test_the_verbs_take_any_family(family, tmp_path):
    teacher = VLM(f"tiny-{family}", tiny.teacher(family), tokenizer())
    assert f"a model of the family {family} with 4 decoder layers" in str(teacher)
    plan = wb.choose_layers(teacher, ratio=0.5)
    assert plan.mamba_layers == (0, 2)
    student = wb.convert(teacher, plan, init="matvlm")
    assert student.name == f"tiny-{family}-50"
    again = wb.load(wb.save(student, tmp_path / "hybrid"))
    fed = tiny.questions(family)
    assert again.plan == plan
    assert torch.equal(again.model(**fed).logits, student.model(**fed).logits)


def test_the_readme_shows_every_family():
    text = (HOUSE / "README.md").read_text().split(BEGIN)[1].split(END)[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    alone = [name for name, family in LANGUAGE_MODELS.items() if family.model_class]
    assert rows[0] == ["family", *COLUMNS]
    assert [row[0] for row in rows[2:]] == [*alone, *VISION_LANGUAGE_MODELS] == [*tiny.FAMILIES]
    assert all(row[1:] == ["✓"] * len(COLUMNS) for row in rows[2:])
    for name in COLUMNS.values():
        assert name in globals()
