"""The ablation: its rows and their order, its shared data, its record, and what its table says."""

import json

import pytest
import torch

import workbench as wb
from benchmarks import recall
from benchmarks.ablation import run
from benchmarks.ablation.data import DrawnBatches, batches_of, begin_drawing
from benchmarks.ablation.record import Record
from benchmarks.ablation.rows import BY_NAME, DEFAULT, PAPER, ROWS, Job, Row, jobs_of, read_rows
from benchmarks.ablation.schedule import Schedule
from benchmarks.ablation.table import ALIKE, BETTER, report, verdict
from workbench.data.conversations import Encoder, TrainingBatches
from workbench.models.hybrid import MIXER_OPTIONS

SETTINGS = {"teacher": "pocket", "steps": 7, "batch": 4, "limit": 8, "score": 0}
TINY = ["--device", "cpu", "--steps", "1", "--batch", "4", "--limit", "1", "--seeds", "1"]


def rows_file(path, *rows):
    path.write_text(json.dumps(rows))
    return path


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# Rows and jobs


def test_every_row_can_be_made():
    for row in ROWS:
        assert set(row.options) <= set(MIXER_OPTIONS), row
        assert row.against in BY_NAME, row
    assert len(BY_NAME) == len(ROWS)


def test_what_matters_most_runs_first():
    jobs = jobs_of(run.parsed([]))
    pair = [job for job in jobs if job.kind == "train"][: 2 * 3 * 3]
    assert {job.row.name for job in pair} == {PAPER, DEFAULT}
    assert {(job.percent, job.seed) for job in pair} == {
        (p, s) for p in (25, 50, 100) for s in range(3)
    }
    assert len({job.key for job in jobs}) == len(jobs)
    for seed in range(3):
        of_seed = [job for job in jobs if job.seed == seed]
        donor = next(i for i, job in enumerate(of_seed) if job.kind == "donor")
        assert donor < min(i for i, job in enumerate(of_seed) if job.needs_donor)
    placed = {(j.row.name, j.percent) for j in jobs if j.row and j.row.group == "placement"}
    assert placed == {(n, p) for n in ("replace-one", "leave-one-in", "greedy") for p in (50, 75)}


def test_of_a_language_model_one_seed_of_each_ratio_comes_before_more():
    jobs = [j for j in jobs_of(run.parsed(["--teacher", "smollm2", "--corpus", "x"])) if j.row]
    first = [(job.percent, job.seed) for job in jobs if job.kind == "train"][:10]
    assert first == [(50, s) for s in (0, 0, 1, 1, 2, 2)] + [(25, 0)] * 2 + [(100, 0)] * 2
    placed = [job for job in jobs if job.row.group == "placement"]
    assert jobs.index(placed[0]) > jobs.index(Job("train", BY_NAME["random"], 50, 0))


def test_only_takes_rows_groups_and_single_jobs():
    args = run.parsed(["--only", "train/calibrated/50/1", "start/aligned/25/2"])
    assert [job.key for job in jobs_of(args)] == [
        "train/calibrated/50/1", "donor//0/2", "start/aligned/25/2",
    ]  # fmt: skip
    rows = {job.row.name for job in jobs_of(run.parsed(["--only", "mixer"]))}
    assert rows == {row.name for row in ROWS if row.group == "mixer"}
    with pytest.raises(wb.WorkbenchError, match="'calibratd' is no row"):
        jobs_of(run.parsed(["--only", "calibratd"]))


def test_rows_come_from_a_file(tmp_path):
    stage = {"name": "both", "steps": 4, "layer_weight": 0.5, "kl_weight": 1.0, "lr": 3e-3}
    path = rows_file(
        tmp_path / "rows.json", {"group": "mine", "name": "both", "stages": [stage], "batch": 8}
    )
    args = run.parsed(["--rows", str(path), "--ratios", "25", "--lr", "1e-4", "--cap", "3"])
    (row,) = read_rows(path)
    assert row.n_steps(args) == 3
    assert [(s.steps, s.lr, s.layer_weight) for s in row.planned(args)] == [(3, 3e-3, 0.5)]
    assert [job.key for job in jobs_of(args)] == [f"train/both/25/{seed}" for seed in range(3)]
    assert batches_of(jobs_of(args), args) == {(seed, 8): 3 for seed in range(3)}


@pytest.mark.parametrize(
    "row, said",
    [
        ({"inti": "matvlm"}, "'inti'"),
        ({"init": "none"}, "init='none'"),
        ({"stages": [{"name": "a", "steps": 1, "layer_wait": 1}]}, "'layer_wait'"),
    ],
)
def test_a_row_that_makes_no_sense_is_refused(tmp_path, row, said):
    path = rows_file(tmp_path / "rows.json", {"group": "g", "name": "n", **row})
    with pytest.raises(wb.WorkbenchError, match=said):
        read_rows(path)


# Data


def test_drawn_batches_are_those_of_the_library(tmp_path):
    tokenizer = wb.load_teacher("pocket").tokenizer
    args = run.parsed(["--cores", "2", "--workers", "0"])
    drawing = begin_drawing(tokenizer, {(0, 4): 3, (1, 4): 1}, tmp_path, args)
    made = TrainingBatches(Encoder(tokenizer), 4, seed=2000, several_every=10**9)
    drawn = DrawnBatches(tmp_path / "batches-0-4")
    for number, batch in enumerate(drawn):
        wanted = made.batch(number)
        for name, value in batch.items():
            assert value.dtype == wanted[name].dtype
            assert torch.equal(value, wanted[name]), name
    with pytest.raises(wb.WorkbenchError, match="Batch 3 was not drawn"):
        drawn.batch(3)
    for process in drawing:
        process.join()


# The record, and what is begun


def test_a_record_goes_on_and_joins_another(tmp_path):
    job, other = (Job("train", ROWS[0], 25, seed) for seed in (0, 1))
    Record(tmp_path / "a.jsonl", SETTINGS).add(job.facts() | {"seconds": 1.0})
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"key": "cut o')
    Record(tmp_path / "b.jsonl", SETTINGS).add(other.facts() | {"seconds": 2.0})
    record = Record(tmp_path / "b.jsonl", SETTINGS, [tmp_path / "a.jsonl"])
    assert record.has(job)
    assert record.has(other)
    record.add(job.facts() | {"error": "later"})
    assert record.has(job)
    changed = Row(ROWS[0].group, ROWS[0].name, "random")
    assert not record.has(Job("train", changed, 25, 0))
    with pytest.raises(wb.WorkbenchError, match="steps=7, not 8"):
        Record(tmp_path / "b.jsonl", SETTINGS | {"steps": 8})


def test_nothing_is_begun_that_would_not_end_in_time(tmp_path):
    args, left = run.parsed(["--steps", "1000"]), [100.0]
    long, short = Job("train", BY_NAME[PAPER], 25), Job("start", BY_NAME["random"], 25)
    taken = Schedule([long, short], Record(tmp_path / "r", SETTINGS), args, lambda: left[0])
    taken.begun = True
    taken.took.append(("train", 1020, 60.0))
    left[0] = 65
    assert taken.next() == short
    left[0] = 75
    assert taken.next() == long
    assert taken.next() is None


def test_what_an_earlier_run_took_is_expected_again_and_not_what_a_donor_takes(tmp_path):
    args = run.parsed(["--steps", "1000"])
    record = Record(tmp_path / "r", SETTINGS)
    row = Job("train", BY_NAME["random"], 25)
    assert Schedule([row], record, args, lambda: 1.0).estimate(row) == 0
    record.add(Job("train", BY_NAME["linear"], 25).facts() | {"steps": 1000, "seconds": 100.0})
    schedule = Schedule([row], record, args, lambda: 1.0)
    assert schedule.estimate(row) == pytest.approx(115)
    schedule.done(Job("donor", seed=1), {"steps": 333, "seconds": 353.0})
    assert schedule.estimate(row) == pytest.approx(115)  # and not 1,020 steps of a donor
    schedule.done(Job("train", BY_NAME["matvlm"], 25), {"steps": 1000, "seconds": 300.0})
    assert schedule.estimate(row) == pytest.approx(345)
    assert schedule.next() == row  # or a run that knows of a slower one would never begin


def test_rows_wait_for_their_donor_and_fail_with_it(tmp_path):
    args = run.parsed([])
    donor, aligned = Job("donor", seed=1), Job("train", BY_NAME["aligned"], 25, 1)
    schedule = Schedule(
        [donor, aligned], Record(tmp_path / "r", SETTINGS), args, lambda: float("inf")
    )
    assert schedule.next() == donor
    assert schedule.next() is None
    schedule.done(donor, {"error": "no memory"})
    assert schedule.record.found[aligned.key]["error"] == "its donor failed: no memory"
    assert not schedule.pending


# The whole


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two processes, three rows, one of which fails."""
    folder = tmp_path_factory.mktemp("ablation")
    stage = {"name": "kl", "steps": 1, "kl_weight": 1.0}
    rows = rows_file(
        folder / "rows.json",
        {"group": "g", "name": "good", "init": "matvlm", "stages": [stage]},
        {"group": "g", "name": "other", "init": "random", "stages": [stage], "against": "good"},
        {"group": "g", "name": "bad", "init": "matvlm", "options": {"nonsense": 1}},
    )
    words = ["--rows", str(rows), "--ratios", "25", "--out", str(folder), *TINY]
    run.main([*words, "--workers", "2", "--cores", "2"])
    return folder, words


def test_two_processes_measure_and_a_failure_is_told(finished):
    folder, _ = finished
    settings, *lines = lines_of(folder / "ablation_pocket.jsonl")
    assert settings["settings"]["steps"] == 1
    by_name = {line["row"]["name"]: line for line in lines}
    assert "nonsense" in by_name["bad"]["error"]
    for name in ("good", "other"):
        assert by_name[name]["steps"] == 1
        assert by_name[name]["kl_before"] != by_name[name]["kl_after"]
    text = (folder / "ablation_pocket.md").read_text()
    assert "- Failed: train/bad/25/0" in text
    assert "| g | bad | 25 | 0, 1 failed |" in text
    assert "one seed: spread unknown (good)" in text


def test_a_second_run_does_only_what_is_missing(finished, capsys):
    folder, words = finished
    before = lines_of(folder / "ablation_pocket.jsonl")
    run.main([*words, "--workers", "0", "--cores", "1"])
    assert "1 jobs, 0 worker(s)" in capsys.readouterr().out
    after = lines_of(folder / "ablation_pocket.jsonl")
    assert [line for line in after if "error" not in line] == [
        line for line in before if "error" not in line
    ]


# The table


def line(name, seed, before, after=None, percent=25, **more):
    found = Job("train" if after else "start", BY_NAME[name], percent, seed).facts()
    found |= {"kl_before": before, "placement_seconds": 0.5, "convert_seconds": 1.0}
    if after:
        found |= {"kl_after": after, "agreement_after": 0.5, "steps": 7, "train_seconds": 3.0}
    return found | more


def test_the_table_has_the_mean_and_the_spread_over_seeds():
    lines = [line("matvlm", 0, 2.0, 0.5), line("matvlm", 1, 2.0, 1.5)]
    lines += [line(PAPER, seed, 2.0, 4.0) for seed in (0, 1)]
    lines += [line(DEFAULT, seed, 0.1, 1.0) for seed in (0, 1)]
    text = list(report(lines, SETTINGS, {"torch": "2"}, 3, [row.name for row in ROWS]))
    assert "7 steps of 4 sequences, 8 held-out sequences; torch 2;" in text[0]
    assert text[1] == "3 job(s) were not done: the time was over."
    cells = [cell.strip() for cell in text[7].strip("|").split("|")]
    assert cells[1:6] == ["matvlm", "25", "2", "2.000 ± 0.000", "1.0000 ± 0.7071"]
    assert cells[6:] == ["50.0 ± 0.0", "7", "1.5", "3 ± 0", f"0.25 x, better ({PAPER})"]
    assert "calibrated, has 0.050 x the KL of matvlm (target 0.1: met)" in text[-2]
    assert f"0.250 x the KL of {PAPER!r}, 2 seed(s) (target 0.5: met)" in text[-1]


def test_a_difference_counts_only_beyond_the_spread_over_seeds():
    theirs = {0: 1.0, 1: 1.2, 2: 0.8}
    assert verdict({0: 0.5, 1: 0.5, 2: 0.5}, theirs) == f"0.50 x, {BETTER}"
    assert verdict({0: 0.9, 1: 0.9, 2: 0.9}, theirs) == f"0.90 x, {ALIKE}"
    assert verdict({}, theirs) == ""


# Recall


def test_recall_of_pictures_knows_how_far_back_each_one_is():
    data = recall.pictures(limit=8, seed=0)
    assert [sample.family for sample in data] == ["1024", "768", "512", "256"] * 2
    for place, sample in enumerate(data):
        assert len(sample.images) == 4
        assert recall.ORDINALS[place % 4] in sample.question


def test_recall_is_a_table_of_models_by_distance(tmp_path, capsys):
    out = tmp_path / "recall.json"
    recall.main(["pocket-25", "--limit", "4", "--accuracy", "1", "--out", str(out)])
    (found,) = json.loads(out.read_text())["models"]
    assert found["by_distance"].keys() == {"256", "512", "768", "1024"}
    assert "| pocket-25 |" in capsys.readouterr().out
