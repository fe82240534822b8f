"""Conversations from files and from the hub, and the teacher's own answers."""

import json
import sys
from types import SimpleNamespace

import pytest
import tiny
from trainees import PLAN, samples

from workbench.data import Sample, load_data
from workbench.data.conversations import IGNORE
from workbench.data.conversations_json import load_conversations
from workbench.data.samples import first_of
from workbench.errors import WorkbenchError
from workbench.models.generation import answer_batch
from workbench.models.prompts import build_prompt
from workbench.models.teacher import VLM
from workbench.steps.conversion.initialization import convert
from workbench.steps.quality.evaluation import evaluate
from workbench.steps.training.answers import answers_of
from workbench.steps.training.batches import collate
from workbench.steps.training.distillation import distill
from workbench.steps.training.writing import write_conversation


@pytest.fixture(scope="module")
def teacher():
    return tiny.vlm()


def talk(*turns):
    speakers = ("human", "gpt")
    return [{"from": speakers[i % 2], "value": text} for i, text in enumerate(turns)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    for n in range(3):
        tiny.image(n).save(tmp_path / "pictures" / f"{n}.png")
    (tmp_path / "pictures" / "broken.png").write_bytes(b"\x89PNG no picture")
    good = (tmp_path / "pictures" / "0.png").read_bytes()
    (tmp_path / "pictures" / "cut.png").write_bytes(good[: len(good) // 2])
    records = [
        {"id": "a", "image": "0.png", "conversations": talk("<image>\nwhich?", "red", "and?", "y")},
        {"id": "b", "image": "gone.png", "conversations": talk("which?", "red")},
        {"id": "c", "image": "broken.png", "conversations": talk("which?", "red")},
        {"id": "d", "image": "cut.png", "conversations": talk("which?", "red")},
        {"id": "e", "conversations": talk("how many?", "two", "unanswered")},
        {"id": "f", "image": "1.png", "conversations": []},
        {"id": "g", "image": ["1.png", "2.png"], "conversations": talk("<image>same?", "no")},
        {"id": "h", "image": "1.png", "conversations": talk("which?", "red")[::-1]},
        {"id": "i", "image": "1.png"},
        "nonsense",
    ]
    (tmp_path / "talk.json").write_text(json.dumps(records))
    return tmp_path


def test_what_cannot_be_read_is_named_and_skipped(folder):
    data = load_conversations(folder / "talk.json", images=folder / "pictures")
    names = {one.id: one.reason for one in data.skipped}
    assert set(names) == {"b", "f", "h", "i", "9"}
    assert "gone.png is missing" in names["b"]
    assert "do not alternate" in names["h"]
    assert len(data) == 5
    found = list(data)
    assert {one.id for one in data.skipped} == {*names, "c", "d"}
    assert "7 skipped:" in str(data)
    assert "c: a picture is broken" in data.report()
    assert len(data.skipped) == len({one.id for one in data.skipped})
    list(data)
    assert len(data.skipped) == 7  # each is told once
    by_question = {sample.question: sample for sample in found}
    assert by_question["which?"].answer == "red"
    assert by_question["which?"].more == (("and?", "y"),)
    assert by_question["how many?"].images == ()
    assert by_question["how many?"].more == ()
    assert [image.mode for image in by_question["same?"].images] == ["RGB", "RGB"]
    # A broken picture's place is taken by the next good sample: no step is lost.
    assert found[1] == found[2] == found[3]


def test_files_that_hold_no_conversations_are_said_in_a_sentence(tmp_path, folder):
    def told(words, text=None, **options):
        path = tmp_path / "some.json"
        if text is not None:
            path.write_text(text)
        with pytest.raises(WorkbenchError, match=words):
            load_data(path, **options)

    told("cannot be read")
    told("cannot be read", text="{no json")
    told("holds no list of conversations", text="{}")
    told("has no sample that can be read", text="[1, 2]")
    told("limit=0 leaves no sample", text="[]", limit=0)
    only_broken = [{"id": "c", "image": "broken.png", "conversations": talk("which?", "red")}]
    (tmp_path / "some.json").write_text(json.dumps(only_broken))
    data = load_data(tmp_path / "some.json", images=folder / "pictures")
    with pytest.raises(WorkbenchError, match="no sample that can be read"):
        data[0]
    for seed in (0, 1):
        some = load_data(folder / "talk.json", images=folder / "pictures", limit=2, seed=seed)
        assert len(some) == 2
    with pytest.raises(WorkbenchError, match="no data set named 'vqa'"):
        load_data("vqa")


def test_a_broken_picture_is_left_out_of_a_slice_and_of_scores(tmp_path):
    good = tiny.image()
    good.save(tmp_path / "good.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "good.png").read_bytes()[:200])
    records = [
        {"id": name, "image": f"{name}.png", "conversations": talk(f"{number}?", "red")}
        for number, name in enumerate(("good", "half", "good"))
    ]
    (tmp_path / "some.json").write_text(json.dumps(records))
    data = load_conversations(tmp_path / "some.json")
    assert [sample.question for sample in data[:]] == ["0?", "2?"]
    assert [sample.question for sample in data[:2]] == ["0?"]
    assert data[1].question == "2?"  # one sample is asked for: another takes its place
    records = evaluate(tiny.vlm(), data, max_new_tokens=2).records
    assert [record.question for record in records] == ["0?", "2?"]
    assert len(data.skipped) == 1
    data = load_conversations(tmp_path / "some.json")
    assert [sample.question for sample in first_of(data, 2)] == ["0?", "2?"]
    assert [len(first_of(data, limit)) for limit in (0, 1, 9, None)] == [0, 1, 2, 2]
    answered = answers_of(tiny.vlm(), data, max_new_tokens=2)
    assert [sample.question for sample in answered] == ["0?", "2?"]
    data = load_conversations(tmp_path / "some.json")
    answered = answers_of(tiny.vlm(), data, limit=2, max_new_tokens=2)
    assert [sample.question for sample in answered] == ["0?", "2?"]


TEMPLATE = (
    "{{ 'Be kind.' }}{% for m in messages %}{{ '[' + m['role'] + ']\n' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}</s>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


GEMMAS = TEMPLATE.replace(
    "{% if m['role'] == 'assistant' %}</s>{% endif %}{{ '\n' }}", "{{ '<pad>\n' }}"
)


@pytest.mark.parametrize("end", ["</s>", "<pad>"])
def test_an_answer_ends_as_the_template_ends_it_if_the_model_stops_there(end):
    chat = VLM("chat", tiny.language_model("llama"), tiny.tokenizer())
    chat.processor.chat_template = GEMMAS
    stops = ["</s>"] if end == "</s>" else ["</s>", end]
    chat.model.generation_config.eos_token_id = chat.tokenizer.convert_tokens_to_ids(stops)
    text, spans = write_conversation(chat, Sample((), "q?", "red", "f", more=(("and?", "no"),)))
    assert [text[a:b].strip() for a, b in spans] == [f"red{end}", f"no{end}"]
    assert text.count("<pad>") == (3 if end == "</s>" else 4)  # the last turn's is not written


def test_without_an_end_token_nothing_is_written_for_it():
    words = VLM("words", tiny.language_model("llama"), tiny.tokenizer())
    words.tokenizer.eos_token = words.model.generation_config.eos_token_id = None
    text, spans = write_conversation(words, Sample((), "q?", "red", "f"))
    assert [text[a:b].strip() for a, b in spans] == ["red"]


def test_every_turn_is_written_and_every_answer_learnt(folder):
    data = load_conversations(folder / "talk.json", images=folder / "pictures")
    vlm = tiny.vlm()
    words = VLM("words", tiny.language_model("llama"), tiny.tokenizer())
    chat = VLM("chat", tiny.language_model("llama"), tiny.tokenizer())
    chat.processor.chat_template = TEMPLATE
    for who, some in ((vlm, [data[0], data[4]]), (words, [data[3]]), (chat, [data[3]])):
        sample = some[0]
        if who is not vlm:
            more = (("and?", "no"), ("x?", "y"))
            sample = some[0] = Sample((), "q?", "red", "f", more=more)
        batch = collate(who, some)
        learnt = batch["labels"][0]
        text = who.tokenizer.decode(learnt[learnt != IGNORE])
        answers = (sample.answer, *(answer for _, answer in sample.more))
        expected = "".join(f"{answer}</s>" for answer in answers)
        assert text.replace(" ", "") == expected.replace(" ", "")
        whole = who.tokenizer.decode(batch["input_ids"][0])
        assert whole.count("Be kind.") == (who is chat)
        if who is chat:
            assert whole.startswith(
                "Be kind.[user]\nq?\n[assistant]\nred</s>\n[user]\nand?\n[assistant]\nno</s>\n[us"
            )
            assert whole.startswith(build_prompt(who, 0, "q?"))


def test_a_student_trains_on_conversations(teacher, folder):
    data = load_conversations(folder / "talk.json", images=folder / "pictures")
    student = convert(teacher, PLAN, init="matvlm")
    run = distill(student, teacher, data, steps=3, batch_size=2)
    assert run.steps == 3


def test_the_teachers_own_answers_become_the_targets(teacher, monkeypatch):
    some = samples(5)
    told = []
    data = answers_of(
        teacher, some, batch_size=2, max_new_tokens=4, on_progress=lambda *n: told.append(n)
    )
    replies = answer_batch(teacher, some, max_new_tokens=4, batch_size=2)
    assert [sample.answer for sample in data] == [reply for reply in replies if reply]
    assert data[0].images == some[0].images
    assert told[-1] == (5, 5)
    assert data.name == "samples, answered by tiny"
    distill(convert(teacher, PLAN, init="matvlm"), teacher, data, steps=2)
    with pytest.raises(WorkbenchError, match="no sample to ask"):
        answers_of(teacher, [])
    monkeypatch.setattr("workbench.steps.training.answers.answer_batch", lambda *_, **__: [""] * 5)
    with pytest.raises(WorkbenchError, match="tiny gave no reply to any of 5 samples"):
        answers_of(teacher, some)


def test_the_hub_needs_its_package_and_columns_that_are_known(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(WorkbenchError, match="pip install datasets"):
        load_data("hub:some/set")
    rows = [{"question": "which?", "answer": ["red", "dark red"], "image": tiny.image(0)}]
    shown = []

    def load_dataset(name, split):
        shown.append((name, split))
        if split == "validation":
            raise ValueError("no such\nsplit")
        return Rows(rows)

    class Rows(list):
        def shuffle(self, seed):
            return self

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    data = load_data("hub:some/set", split="train")
    assert (data[0].question, data[0].answer, len(data[0].images)) == ("which?", "red", 1)
    assert shown == [("some/set", "train")]
    with pytest.raises(WorkbenchError, match=r"'some/set' \(validation\) cannot be read: no"):
        load_data("hub:some/set", split="validation")
    said = (("user", "a?"), ("assistant", "b"))
    rows[0] = {"messages": [{"role": role, "content": text} for role, text in said]}
    assert load_data("hub:some/set")[0].answer == "b"
    rows[0] = {"picture": 1, "words": 2}
    with pytest.raises(WorkbenchError, match="columns of 'some/set' are picture, words"):
        load_data("hub:some/set")
