"""SmolLM2 as a teacher, by a miniature GGUF file; with the package, by the real one."""

import argparse
import copy
import json

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import workbench as wb
from benchmarks import timing
from benchmarks.smollm2 import corpus, evaluate, prompts, readers, sources, train_hybrids
from workbench.data.text import Document, Texts, TokenIds, load_texts
from workbench.models.delta import load_delta, save_delta
from workbench.models.hybrid import build_hybrid, hybrid_class, mixers, plan_of
from workbench.models.plan import Plan
from workbench.models.sources import smollm2
from workbench.models.teacher import VLM
from workbench.steps.training.stages import RECIPES

gguf = pytest.importorskip("gguf")
CHAT = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"


def small_llama(tied=True):
    torch.manual_seed(0)
    config = LlamaConfig(**(tiny.COMMON | {"tie_word_embeddings": tied}), num_key_value_heads=2)
    return tiny.shaken(LlamaForCausalLM(config), 0)


def write_gguf(path, model, architecture="llama"):
    """Store a model as llama.cpp does: its names, and a head's rows as neighbours."""
    tokenizer, config = json.loads(tiny.tokenizer().backend_tokenizer.to_str()), model.config
    vocab = tokenizer["model"]["vocab"] | {t["content"]: t["id"] for t in tokenizer["added_tokens"]}
    tokens = sorted(vocab, key=vocab.get)
    tokens += [f"<unused {i}>" for i in range(len(tokens), config.vocab_size)]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in tiny.SPECIAL_TOKENS else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT)
    theirs = {ours: name for name, ours in smollm2.LAYER_NAMES.items()}
    others = {ours: name for name, ours in smollm2.OTHER_NAMES.items()}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        stem, _, kind = name.rpartition(".")
        values = tensor.numpy()
        if stem == "lm_head" and config.tie_word_embeddings:
            continue
        if stem.startswith("model.layers."):
            number, inner = stem.removeprefix("model.layers.").split(".", 1)
            n = heads.get(inner.rpartition(".")[2])
            if n:
                rows = values.reshape(n, 2, values.shape[0] // n // 2, -1)
                values = np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(values.shape)
            writer.add_tensor(f"blk.{number}.{theirs[inner]}.{kind}", values)
        else:
            writer.add_tensor(f"{others[stem]}.{kind}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_becomes_an_ordinary_llama(tmp_path, tied):
    model = small_llama(tied)
    again, tokenizer = smollm2.read_gguf(write_gguf(tmp_path / "a.gguf", model))
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    shared = again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()
    assert shared == tied
    with torch.no_grad():
        ids = tiny.token_ids()
        assert torch.allclose(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert not again.training
    assert tokenizer("which bar")["input_ids"] == tiny.tokenizer()("which bar")["input_ids"]
    assert tokenizer.eos_token == "</s>"
    assert tokenizer.chat_template == CHAT
    again.save_pretrained(tmp_path / "saved")  # which a model that is marked as quantised refuses
    low, _ = smollm2.read_gguf(tmp_path / "a.gguf", dtype=torch.bfloat16)
    assert low.dtype == torch.bfloat16


def test_numbers_are_read_digit_by_digit(tmp_path):
    _, tokenizer = smollm2.read_gguf(write_gguf(tmp_path / "a.gguf", small_llama()))
    assert len(tokenizer("1234")["input_ids"]) == 4
    assert tokenizer.decode(tokenizer("the 12 bars")["input_ids"]) == "the 12 bars"


def test_what_is_no_such_file_is_said(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"torn")
    with pytest.raises(wb.WorkbenchError, match="cannot be read"):
        smollm2.read_gguf(tmp_path / "a.gguf")
    with pytest.raises(wb.WorkbenchError, match="architecture is 'gpt2'"):
        smollm2.read_gguf(write_gguf(tmp_path / "b.gguf", small_llama(), "gpt2"))
    with pytest.raises(wb.WorkbenchError, match="cannot be read"):
        smollm2.read_gguf(tmp_path / "none.gguf")


def test_without_the_package_and_a_hub_the_way_to_get_it_is_said(monkeypatch):
    monkeypatch.setattr(smollm2, "find_gguf", lambda: None)
    with pytest.raises(wb.WorkbenchError, match="make smollm2"):
        wb.load_teacher("smollm2-135m")
    monkeypatch.setattr(smollm2, "PACKAGE", "no-such-package-at-all")
    monkeypatch.undo()
    monkeypatch.setattr(smollm2, "PACKAGE", "no-such-package-at-all")
    assert smollm2.find_gguf() is None


def test_a_hybrid_is_its_delta_on_the_teacher(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "a.gguf", small_llama())
    monkeypatch.setattr(smollm2, "find_gguf", lambda: path)
    monkeypatch.setattr(smollm2, "FOLDER", tmp_path)
    with pytest.raises(wb.WorkbenchError, match="do not come with this copy"):
        wb.load("smollm2-135m-25")
    teacher = wb.load_teacher("smollm2-135m")
    assert teacher.name == "smollm2-135m"
    assert teacher.plan is None
    student = wb.convert(teacher, Plan(tiny.N_LAYERS, (0,)), init="matvlm")
    save_delta(student.model, teacher.model, tmp_path / "hybrid-25", bits=8)
    again = wb.load("smollm2-135m-25")
    assert again.name == "smollm2-135m-25"
    assert again.plan.mamba_layers == (0,)
    said = wb.answer(again, [], "which bar", max_new_tokens=3)
    assert said.ssm_bytes > 0
    assert said.kv_bytes > 0
    with pytest.raises(wb.WorkbenchError, match="reads text only"):
        wb.answer(again, [tiny.image()], "which bar")


# Deltas of eight bits


@pytest.fixture
def changed():
    """A teacher and a hybrid of it whose every matrix moved a little."""
    teacher = tiny.language_model("llama")
    student = build_hybrid(teacher, Plan(tiny.N_LAYERS, (0, 2)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for mixer in mixers(student).values():
            for parameter in mixer.parameters():
                parameter += 1e-3 * torch.randn(parameter.shape, generator=generator)
    return teacher, student


def test_eight_bits_round_a_change_by_at_most_half_a_step(tmp_path, changed):
    teacher, student = changed
    save_delta(student, teacher, tmp_path, bits=8)
    stored, before = load_file(tmp_path / "delta.safetensors"), teacher.state_dict()
    again = load_delta(teacher, tmp_path).state_dict()
    matrices = 0
    for name, tensor in student.state_dict().items():
        error = (again[name] - tensor).abs()
        if tensor.ndim == 2 and name in stored:
            matrices += 1
            assert stored[name].dtype == torch.int8
            change = tensor - before[name] if name in before else tensor
            bound = change.abs().amax(1, keepdim=True) / 254
            assert (error <= 1.001 * bound + 1e-7).all(), name
            if name in before:
                assert error.max() < 3e-5
        else:
            assert error.max() == 0, name
    assert matrices == 2 * 6  # q, k, v, o, z, dt
    eight = (tmp_path / "delta.safetensors").stat().st_size
    save_delta(student, teacher, tmp_path / "whole")
    assert eight < 0.5 * (tmp_path / "whole" / "delta.safetensors").stat().st_size


def test_an_unchanged_row_and_a_teacher_of_another_dtype_do_no_harm(tmp_path, changed):
    teacher, student = changed
    with torch.no_grad():
        mixers(student)[0].q_proj.weight[0] = teacher.model.layers[0].self_attn.q_proj.weight[0]
    save_delta(student, teacher, tmp_path, bits=8)
    again = load_delta(teacher, tmp_path)
    assert torch.equal(mixers(again)[0].q_proj.weight[0], mixers(student)[0].q_proj.weight[0])
    low = load_delta(teacher.to(torch.bfloat16), tmp_path)
    assert mixers(low)[0].q_proj.weight.dtype == torch.bfloat16
    assert mixers(low)[0].A_log.dtype == torch.float32
    gap = mixers(low)[0].q_proj.weight.float() - mixers(again)[0].q_proj.weight
    assert gap.abs().max() < 5e-3


def test_a_teacher_can_become_the_hybrid_itself(tmp_path, changed):
    teacher, student = changed
    save_delta(student, teacher, tmp_path, bits=8)
    beside = load_delta(teacher, tmp_path)
    before = copy.deepcopy(teacher)
    itself = load_delta(before, tmp_path, in_place=True)
    assert itself is before
    assert type(itself) is type(beside)
    assert plan_of(itself) == plan_of(beside)
    for name, tensor in beside.state_dict().items():
        assert torch.equal(itself.state_dict()[name], tensor), name
    ids = tiny.token_ids()
    with torch.no_grad():
        assert torch.equal(itself(input_ids=ids).logits, beside(input_ids=ids).logits)


def test_other_bits_and_a_lost_scale_are_refused(tmp_path, changed):
    teacher, student = changed
    with pytest.raises(wb.WorkbenchError, match="bits=4"):
        save_delta(student, teacher, tmp_path, bits=4)
    save_delta(student, teacher, tmp_path, bits=8)
    path = tmp_path / "delta.safetensors"
    stored = load_file(path)
    name = next(name for name in stored if name.endswith(".row_scale"))
    del stored[name]
    save_file(stored, path)
    with pytest.raises(wb.WorkbenchError, match="no scale for each row"):
        load_delta(teacher, tmp_path)


# The real ones

installed = pytest.mark.skipif(smollm2.find_gguf() is None, reason="make smollm2 installs it")
MAMBA_LAYERS = {"smollm2-135m-12.5": 4, "smollm2-135m-25": 8, "smollm2-135m-50": 15}  # of 30
SIZES = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.parametrize("name", smollm2.HYBRIDS)
def test_a_shipped_delta_has_what_its_plan_asks_for(name):
    folder = smollm2.FOLDER / smollm2.HYBRIDS[name]
    described = json.loads((folder / "plan.json").read_text())
    plan = Plan.from_dict(described["plan"])
    assert len(plan.mamba_layers) == MAMBA_LAYERS[name]
    with torch.device("meta"):
        student = hybrid_class(LlamaForCausalLM)(LlamaConfig(**SIZES, ssm_hybrid=described))
    expected = {
        f"model.layers.{i}.self_attn.{inner}": tuple(tensor.shape)
        for i, mixer in mixers(student).items()
        for inner, tensor in mixer.state_dict().items()
    }
    stored = load_file(folder / "delta.safetensors")
    scales = {key: tensor for key, tensor in stored.items() if key.endswith(".row_scale")}
    assert {k: tuple(t.shape) for k, t in stored.items() if k not in scales} == expected
    eight = {key for key, tensor in stored.items() if tensor.dtype == torch.int8}
    assert eight == {key.removesuffix(".row_scale") for key in scales}
    assert all(stored[key].shape[:1] == scales[f"{key}.row_scale"].shape for key in eight)
    assert all(tensor.isfinite().all() for tensor in stored.values())


def test_the_shipped_deltas_are_small():
    files = list(smollm2.FOLDER.glob("*/*"))
    assert len(files) == 2 * len(smollm2.HYBRIDS)
    assert sum(file.stat().st_size for file in files) <= 40e6


def test_the_kept_perplexities_are_of_one_text_and_in_order():
    report = json.loads((tiny.HOUSE / "benchmarks/results/smollm2_perplexity.json").read_text())
    rows = report["perplexity"]
    assert [row["model"] for row in rows] == [smollm2.TEACHER, *smollm2.HYBRIDS]
    assert {row["n_tokens"] for row in rows} == {167_007}
    assert sorted(row["perplexity"] for row in rows) == [row["perplexity"] for row in rows]
    readme = (tiny.HOUSE / "README.md").read_text()
    for cells in zip(*([kind["perplexity"] for kind in row["rows"]] for row in rows), strict=True):
        assert " | ".join(f"{value:.2f}" for value in cells) in readme


@pytest.mark.slow
@installed
@pytest.mark.parametrize("name", smollm2.HYBRIDS)
def test_a_shipped_hybrid_reads_almost_like_its_teacher(name):
    teacher, hybrid = wb.load_teacher(smollm2.TEACHER), wb.load(name)
    assert len(hybrid.plan.mamba_layers) == MAMBA_LAYERS[name]
    assert "Paris" in wb.answer(hybrid, [], "What is the capital of France?").text
    texts = load_texts(corpus.HELDOUT)
    some = Texts("some", [Document(document.text[:1500]) for document in list(texts)[::8]])
    before, after = (wb.perplexity(vlm, some, batch_size=1).perplexity for vlm in (teacher, hybrid))
    assert before < after < 1.4 * before


@pytest.mark.slow
@installed
def test_the_real_model_knows_a_capital():
    teacher = wb.load_teacher("smollm2-135m")
    assert sum(p.numel() for p in teacher.model.parameters()) == 134_515_008
    assert "Paris" in wb.answer(teacher, [], "What is the capital of France?").text
    assert isinstance(teacher, VLM)
    words = teacher.tokenizer.convert_ids_to_tokens(teacher.tokenizer("in  1234")["input_ids"])
    assert words == ["in", "ĠĠ", "1", "2", "3", "4"]


# The benchmarks


class Slow:
    """A clock, and training whose every step takes a second, the first of a run ten more."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def train(self, student, *, recipe, steps, log_every):
        began = self.now
        self.now += 10 + steps
        seconds = [10 + n for n in range(log_every, steps + 1, log_every)]
        if steps % log_every:
            seconds.append(self.now - began)
        return argparse.Namespace(rows=[argparse.Namespace(seconds=s) for s in seconds])


def test_seconds_that_compiling_uses_up_are_refused(monkeypatch):
    clock, stages = Slow(monkeypatch), RECIPES["workbench"]
    student = argparse.Namespace(name="tiny-50")
    spent = len(stages) * (10 + timing.WARM_UP + timing.TIMED)
    assert timing.steps_in(spent + 100, stages, lambda: student, clock.train) == 100
    with pytest.raises(wb.WorkbenchError, match=f"took {spent}.* 5 steps would be left") as told:
        timing.steps_in(spent + 5, stages, lambda: student, clock.train)
    assert "Give 143 seconds for 67 steps" in str(told.value)  # 30 % of 67 are 20
    assert timing.steps_in(143, stages, lambda: student, clock.train) == 67


def test_a_refused_hybrid_does_not_keep_the_next_from_its_turn():
    def train(percent, seconds):
        if seconds < 10:
            raise wb.WorkbenchError(f"{percent:g} is refused")
        return percent

    made, refused = timing.train_each(["12.5:5", "25:50"], train)
    assert (made, refused) == ([25.0], ["12.5 is refused"])


def test_the_training_script_makes_a_hybrid_and_scores_it(tmp_path, monkeypatch, capsys):
    path = write_gguf(tmp_path / "a.gguf", small_llama())
    ids = np.random.default_rng(0).integers(6, 290, 3000).astype(np.uint16)
    ids[::300] = 2
    np.save(tmp_path / "tokens.npy", ids)
    asked = ["which bar", "how many", "which colour is the bar", "the tallest", "and"]
    (tmp_path / "prompts.json").write_text(json.dumps(asked))
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "a.txt").write_text("which colour is the tallest bar " * 8)
    options = {
        "corpus": tmp_path, "gguf": path, "heldout": tmp_path / "held", "out": tmp_path / "out",
        "steps": 2, "batch": 4, "context": 32, "chat-share": 0.5, "answer-tokens": 5,
        "chat-batch": 2, "log-every": 1, "align": 3, "method": "greedy",
    }  # fmt: skip
    line = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr("sys.argv", ["train_hybrids", "25:1", "50:1", *line])
    train_hybrids.main()
    for share, n in (("25", 1), ("50", 2)):
        folder = tmp_path / "out" / f"hybrid-{share}"
        assert {file.name for file in folder.iterdir()} == {
            "delta.safetensors", "plan.json", "curve.json",
        }  # fmt: skip
        assert len(json.loads((folder / "plan.json").read_text())["plan"]["mamba_layers"]) == n
        curve = json.loads((folder / "curve.json").read_text())
        assert len(curve["rows"]) == 2
        assert [stage["name"] for stage in curve["stages"]] == ["distill"]  # aligned before
    assert len(json.loads((tmp_path / "out" / "align.json").read_text())["rows"]) == 3
    results = json.loads((tmp_path / "out" / "perplexity.json").read_text())
    assert [row["model"] for row in results] == [
        "smollm2-135m", "smollm2-135m-25", "smollm2-135m-50",
    ]  # fmt: skip
    assert str(tmp_path) not in (folder / "curve.json").read_text()
    assert "smollm2-135m-50 on held: perplexity" in capsys.readouterr().out


def test_a_mixture_holds_text_and_chats_in_their_shares(tmp_path):
    tokens = TokenIds(np.arange(100, 400), np.array([0]))
    chats = TokenIds(np.arange(1, 21), np.array([0, 10]), np.arange(20) % 10 > 5)
    args = argparse.Namespace(chat_share=0.25, batch=4, context=10, seed=0)
    batch = next(iter(train_hybrids.Mixture(tokens, chats, args)))
    assert batch["input_ids"].shape == (4, 10)
    assert (batch["input_ids"][:3] >= 100).all()
    assert (batch["labels"][:3] == batch["input_ids"][:3]).all()
    assert (batch["labels"][3] != -100).sum() == 4


def test_prompts_are_many_and_varied(tmp_path):
    lines = [
        f"{stem}{kind}%1:{file}:00:: 00001740 1 {n_seen}"
        for kind, (file, _) in prompts.ASKING.items()
        for stem, n_seen in (("big", 9), ("small", 2), ("old", 5), ("rare", 0))
    ]
    lines.append("bigverb%2:05:00:: 00001740 1 9")
    (tmp_path / "index.sense").write_text("\n".join(lines))
    asked = prompts.write_prompts(tmp_path, n=200, seed=0)
    assert len(set(asked)) == 200
    assert asked == prompts.write_prompts(tmp_path, n=200, seed=0)
    assert asked != prompts.write_prompts(tmp_path, n=200, seed=1)
    assert prompts.common_nouns(tmp_path, "05") == ["biganimal", "smallanimal", "oldanimal"]


def test_the_evaluation_puts_all_models_side_by_side(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "a.gguf", small_llama())
    model, _ = smollm2.read_gguf(path)
    save_delta(build_hybrid(model, Plan(4, (0,))), model, tmp_path / "hybrid-25", bits=8)
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "a.jsonl").write_text('{"text": "which bar", "kind": "bars"}\n"and how"')
    options = {
        "gguf": path, "hybrids": tmp_path, "heldout": tmp_path / "held", "context": 32,
        "answer-tokens": 3, "characters": 6, "out": tmp_path / "report",
    }  # fmt: skip
    line = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr("sys.argv", ["evaluate", *line])
    evaluate.main()
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["chats"]) == ["smollm2-135m", "smollm2-135m-25"]
    assert all(len(said) == 5 for said in report["chats"].values())
    written = (tmp_path / "report.md").read_text()
    assert "| perplexity | tokens | smollm2-135m | smollm2-135m-25 |" in written
    assert "| bars |" in written
    assert written.count("### ") == 5


def test_readers_turn_markup_into_plain_text(tmp_path):
    page = (
        "<html class='sidebar-visible'><head><title>no</title></head><body><nav>no</nav>"
        "<div class='navheader'>no<br>no</div><h1>Yes</h1><p>one\n two &amp; three"
        "<ul><li>four<li>five</ul><pre>a\n  b</pre><script>no</script></body></html>"
    )
    (tmp_path / "a.html").write_text(page)
    ((name, text),) = readers.html(tmp_path / "a.html")
    assert name == "a.html"
    assert "no" not in text.split()
    assert "one two & three" in text
    assert "a\n  b" in text
    (tmp_path / "b.pod").write_text("=head1 NAME\n\nB<bold> and C<< $a->b >> L<see|perl> E<lt>\n")
    ((_, text),) = readers.pod(tmp_path / "b.pod")
    assert text == "NAME\n\nbold and $a->b perl <"
    (tmp_path / "c.rst").write_text(
        ".. index:: no\n   no\n\n:func:`open` and :ref:`a page <x>`, ``b``\n"
    )
    ((_, text),) = readers.rst(tmp_path / "c.rst")
    assert text == "open and a page, `b`"


def test_held_out_text_is_kept_out_of_the_training_text():
    source = sources.SOURCES[0]
    words = " ".join(f"word{i}" for i in range(30))
    held = {"python": [{"text": f"before it {words} after it"}]}
    clean = "Quite another paragraph that says nothing of the kind. " * 10
    rest = [
        (source, "a", f"{clean}\n\n{words.upper()}!\n\nThe end, {clean}"),
        (source, "b", f"{clean}\n\nThe end, {clean}"),  # the same again
        (source, "c", "too short"),
    ]
    report = {}
    (text,) = corpus.training_texts(held, rest, report)
    assert "WORD" not in text
    assert text.startswith(clean.strip())
    assert report["python3.11-doc"]["documents"] == 1


def test_the_held_out_text_is_there_and_small():
    texts = wb.load_data(str(corpus.HELDOUT))
    assert set(texts.kinds) == {"licence", "manual", "perl", "prose", "python", "wordnet"}
    assert sum(len(document.text) for document in texts) < 1e6
