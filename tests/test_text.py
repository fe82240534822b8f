import json
import math

import numpy as np
import pytest
import tiny
import torch

import workbench as wb
from workbench.data.conversations import IGNORE
from workbench.data.text import (
    Document,
    TextBatches,
    Texts,
    TokenIds,
    encode_chats,
    encode_documents,
    load_texts,
    read_ids,
)
from workbench.models.teacher import VLM

CHAT = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    made = tiny.tokenizer()
    made.chat_template = CHAT
    return made


def language_vlm(seed=0):
    return VLM("tiny", tiny.language_model("llama", seed), tiny.tokenizer())


def numbered(*lengths):
    """Documents whose ids tell where they are from: 1000 * document + position."""
    ids = np.concatenate([1000 * d + np.arange(n) for d, n in enumerate(lengths)])
    return TokenIds(ids, np.cumsum([0, *lengths[:-1]]))


# Files


def test_documents_are_read_from_files_and_folders(tmp_path):
    (tmp_path / "prose").mkdir()
    (tmp_path / "prose" / "a.txt").write_text("Once upon a time.")
    (tmp_path / "b.jsonl").write_text('"a string"\n\n{"text": "an object", "kind": "facts"}\n')
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "left.md").write_text("not read")
    texts = wb.load_data(str(tmp_path))
    assert list(texts) == [
        Document("a string", "b"), Document("an object", "facts"),
        Document("Once upon a time.", "prose"),
    ]  # fmt: skip
    assert texts.kinds == ("b", "facts", "prose")
    assert "3 documents, 34 characters" in str(texts)
    assert len(load_texts(tmp_path, limit=2)) == 2
    assert wb.load_data(tmp_path / "prose" / "a.txt")[0].kind == "prose"


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.txt", b"  ", "no text in"),
        ("a.txt", b"\xff\xfe\xff", "cannot be read"),
        ("a.jsonl", b"{torn", "Document 1 of .* is neither"),
        ("a.jsonl", b'"good"\n{"no": "text"}', "Document 2 of .* is neither"),
        ("a.jsonl", b'{"text": "good"}\n[1]', "Document 2 of .* is neither"),
        ("a.jsonl", b'{"text": null}', "Document 1 of .* is neither"),
        ("a.jsonl", b'"good"\n{"text": 5}', "Document 2 of .* is neither"),
    ],
)
def test_what_is_no_text_is_said(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(wb.WorkbenchError, match=said):
        wb.load_data(str(tmp_path / name))


def test_a_string_of_jsonl_may_hold_line_ends_of_unicode(tmp_path):
    texts = ["one\u2028two", "three\u0085four", "five"]
    rows = "\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    (tmp_path / "a.jsonl").write_bytes(rows.encode())
    assert [document.text for document in load_texts(tmp_path / "a.jsonl")] == texts


def test_a_kind_that_is_none_is_the_name_of_the_file(tmp_path):
    rows = [{"text": "which bar", "kind": None}, {"text": "how many", "kind": 3}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts = load_texts(tmp_path / "a.jsonl")
    assert texts.kinds == ("a", "3")
    assert "of a, 3" in str(texts)
    assert "3 " in str(wb.perplexity(language_vlm(), texts, context=8))


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(wb.WorkbenchError, match="cannot be read"):
        wb.load_data(str(tmp_path / "none.txt"))
    with pytest.raises(wb.WorkbenchError, match=r"no data set named 'pockets'.*\.txt"):
        wb.load_data("pockets")


# Encoding


def test_documents_end_with_the_end_token(tokenizer):
    tokens = encode_documents(tokenizer, ["the bar", "which colour is it"])
    assert tokens.ids[-1] == tokenizer.eos_token_id
    assert tokens.ids[tokens.starts[1] - 1] == tokenizer.eos_token_id
    assert tokenizer.decode(tokens.ids[: tokens.starts[1] - 1]) == "the bar"
    assert tokens.lengths.sum() == len(tokens.ids)


def test_without_an_end_token_none_is_added():
    made = tiny.tokenizer()
    made.eos_token, made.chat_template = None, CHAT
    assert made.decode(encode_documents(made, ["the bar", "two"]).ids) == "the bartwo"
    chat = encode_chats(made, [("which bar", "the tallest")])
    assert made.decode(chat.ids[chat.is_answer]) == "the tallest"
    with pytest.raises(wb.WorkbenchError, match="no text to encode"):
        encode_documents(made, [""])


def test_of_a_chat_only_the_answer_is_learnt(tokenizer):
    tokens = encode_chats(tokenizer, [("which bar", "the tallest"), ("how many", "two")])
    learnt = tokenizer.decode(tokens.ids[tokens.is_answer])
    assert learnt == "the tallest</s>two</s>"
    assert tokenizer.decode(tokens.ids[: tokens.starts[1]]) == (
        "<s>user\nwhich bar</s><s>assistant\nthe tallest</s>"
    )


def test_ids_come_from_a_file_of_two_bytes_each(tmp_path):
    np.save(tmp_path / "ids.npy", np.array([5, 6, 2, 7, 2], np.uint16))
    tokens = read_ids(tmp_path / "ids.npy", end=2)
    assert tokens.starts.tolist() == [0, 3]
    assert isinstance(tokens.ids, np.memmap)
    batch = TextBatches(tokens, batch_size=1, context=8).batch(0)
    assert sorted(batch["input_ids"][0].tolist()) == [0, 0, 0, 2, 2, 5, 6, 7]
    assert batch["real"][0].tolist() == [True] * 5 + [False] * 3
    np.save(tmp_path / "ids.npy", np.zeros((2, 2)))
    with pytest.raises(wb.WorkbenchError, match="not a row of token ids"):
        read_ids(tmp_path / "ids.npy", end=2)
    (tmp_path / "ids.npy").write_bytes(b"torn")
    with pytest.raises(wb.WorkbenchError, match="cannot be read"):
        read_ids(tmp_path / "ids.npy", end=2)


# Packing


def test_every_token_stands_in_one_sequence_and_long_documents_have_their_own():
    batches = TextBatches(numbered(25, 3, 4, 10, 2), batch_size=1, context=10, seed=3)
    n = len(batches.sequences)
    assert n == 5  # 10, 10 and 10, and 5, 3, 4, 2 share two
    rows = torch.cat([batches.batch(i)["labels"] for i in range(n)])
    seen = rows[rows != IGNORE]
    assert sorted(seen.tolist()) == sorted(batches.tokens.ids.tolist())
    for row in rows.tolist():
        row = [token for token in row if token != IGNORE]
        if row[0] % 1000 == 0 and row[0] // 1000 in (0, 3):
            assert len({token // 1000 for token in row}) == 1


def test_batches_are_the_same_for_a_seed_and_shuffled_anew_each_round():
    tokens = numbered(*[10] * 7)
    one, two = (TextBatches(tokens, batch_size=7, context=10, seed=1) for _ in range(2))
    other = TextBatches(tokens, batch_size=7, context=10, seed=2)
    for number in (3, 0, 1):
        assert torch.equal(one.batch(number)["input_ids"], two.batch(number)["input_ids"])
    assert not torch.equal(one.batch(0)["input_ids"], one.batch(1)["input_ids"])
    assert not torch.equal(one.batch(0)["input_ids"], other.batch(0)["input_ids"])
    first = one.batch(0)["input_ids"]
    assert sorted(first[:, 0].tolist()) == [1000 * d for d in range(7)]
    assert torch.equal(next(iter(one))["input_ids"], first)


def test_a_long_chat_is_cut_and_never_loses_its_question(tokenizer):
    tokens = encode_chats(tokenizer, [("which bar", "the tallest " * 30)])
    batches = TextBatches(tokens, batch_size=1, context=20)
    assert len(batches.sequences) == 1
    batch = batches.batch(0)
    assert batch["input_ids"][0, 0] == tokenizer.convert_tokens_to_ids("<s>")
    assert batch["labels"][0, 0] == IGNORE


@pytest.mark.parametrize("sizes", [dict(batch_size=0), dict(batch_size=1, context=1)])
def test_sizes_that_hold_nothing_are_refused(sizes):
    with pytest.raises(wb.WorkbenchError, match="at least 1 sequence of 2 tokens"):
        TextBatches(numbered(5), **sizes)


def test_a_language_model_is_distilled_on_text(tmp_path):
    (tmp_path / "a.txt").write_text("which colour is the tallest bar " * 40)
    texts = wb.load_data(str(tmp_path / "a.txt"))
    assert texts.context == 1024  # more than the 256 positions of the teacher
    teacher = language_vlm()
    student = wb.convert(teacher, wb.choose_layers(teacher, ratio=0.5), init="matvlm")
    run = wb.distill(student, teacher, texts, recipe="matvlm", steps=6, batch_size=2)
    assert run.rows[-1].kl_nats < run.rows[0].kl_nats


def test_plain_strings_are_texts_to_every_verb():
    teacher, strings = language_vlm(), ["which colour is the tallest bar " * 9, "how many"]
    student = wb.convert(teacher, wb.Plan(4, (0, 2)), calibration=strings)
    for data in (strings, [Document(text) for text in strings]):
        run = wb.distill(student, teacher, data, steps=1, batch_size=2)
        assert run.n_tokens > 50
        assert wb.compare(teacher, student, data).fidelity.n_tokens > 50


# Perplexity


def by_hand(vlm, text, context):
    """Nats and count of one text, a token at a time."""
    ids = vlm.tokenizer(text)["input_ids"]
    nats, n = 0.0, 0
    for start in range(0, len(ids), context):
        window = torch.tensor(ids[start : start + context])
        for at in range(1, len(window)):
            logits = vlm.model(input_ids=window[None, :at]).logits[0, -1]
            nats -= torch.log_softmax(logits.double(), -1)[window[at]].item()
            n += 1
    return nats, n


def test_perplexity_is_what_it_is_by_hand():
    vlm = language_vlm()
    texts = Texts("mine", [
        Document("which colour is the tallest bar, and how many", "long"),
        Document("the bar", "short"), Document("which", "short"), Document("t", "letter"),
    ])  # fmt: skip
    with torch.no_grad():
        sums = [by_hand(vlm, document.text, 7) for document in texts]
    total, n = sum(s for s, _ in sums), sum(n for _, n in sums)
    for batch_size in (1, 3):
        result = wb.perplexity(vlm, texts, context=7, batch_size=batch_size)
        assert result.n_tokens == n
        assert result.nats == pytest.approx(total / n, rel=1e-5)
        assert result.perplexity == pytest.approx(math.exp(total / n), rel=1e-4)
        short = result.rows[1]
        assert (short.kind, short.n_documents) == ("short", 2)
        assert short.nats == pytest.approx((sums[1][0] + sums[2][0]) / short.n_tokens, rel=1e-5)
    assert [row.kind for row in result.rows] == ["long", "short"]  # one token foretells nothing
    assert json.loads(json.dumps(result.to_dict()))["rows"][1]["kind"] == "short"
    assert "short" in str(result)


def test_perplexity_takes_strings_and_paths_and_tells_its_progress(tmp_path):
    vlm, text, told = language_vlm(), "which colour is the tallest bar", []
    (tmp_path / "a.txt").write_text(text)
    one = wb.perplexity(vlm, [text], context=9, batch_size=2, on_progress=lambda *n: told.append(n))
    two = wb.perplexity(vlm, str(tmp_path / "a.txt"), context=9)
    assert one.nats == pytest.approx(two.nats)
    assert told[-1][0] == told[-1][1]


def test_text_asks_nothing():
    with pytest.raises(wb.WorkbenchError, match=r"use wb\.perplexity"):
        wb.evaluate(language_vlm(), Texts("mine", ["the bar"]))


def test_what_cannot_be_scored_is_said():
    vlm = language_vlm()
    with pytest.raises(wb.WorkbenchError, match="takes 2 to 256"):
        wb.perplexity(vlm, ["the bar"])
    with pytest.raises(wb.WorkbenchError, match="takes 2 to 256"):
        wb.perplexity(vlm, ["the bar"], context=1)
    with pytest.raises(wb.WorkbenchError, match="no text to score"):
        wb.perplexity(vlm, ["", "t"], context=8)
    with pytest.raises(wb.WorkbenchError, match="batch_size"):
        wb.perplexity(vlm, ["the bar"], context=8, batch_size=0)
    for data in (wb.load_data("pocket", limit=8), ["the bar", None]):
        with pytest.raises(wb.WorkbenchError, match="must be a string .*, not (Sample|NoneType)"):
            wb.perplexity(vlm, data, context=8)
