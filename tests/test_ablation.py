"""The ablation script: its rows can be made, and its table says what was measured."""

from argparse import Namespace

from benchmarks.ablation.run import ROWS, table
from workbench.models.hybrid import MIXER_OPTIONS
from workbench.steps.conversion.initialization import INITS
from workbench.steps.conversion.selection import METHODS
from workbench.steps.training.stages import RECIPES


def test_every_row_can_be_made():
    for row in ROWS:
        assert row.init in (*INITS, "aligned"), row
        assert set(row.options) <= set(MIXER_OPTIONS), row
        assert row.recipe in RECIPES, row
        assert row.placement in METHODS, row
        assert not (row.init == "aligned" and row.options), "aligned mixers have their options"
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_the_table_has_the_mean_and_the_spread_over_seeds():
    common = {"kl_before": 2.0, "agreement_after": 0.5, "steps": 7, "train_seconds": 3.0}
    common |= {"convert_seconds": 1.0, "placement_seconds": 0.5, "align_seconds": 0.0}
    runs = [common | {"name": "matvlm", "ratio": 0.25, "kl_after": kl} for kl in (0.5, 1.5)]
    args = Namespace(teacher="pocket", steps=7, batch=4, seeds=2, limit=8, ratios=[25, 50])
    lines = list(table(runs, args, {"torch": "2"}))
    assert "7 steps of 4 sequences, 2 seed(s), 8 held-out questions; torch 2." in lines[0]
    assert len(lines) == 5
    cells = [cell.strip() for cell in lines[-1].strip("|").split("|")]
    assert cells[1:5] == ["matvlm", "25", "2.000 ± 0.000", "1.000 ± 0.707"]
    assert cells[5:] == ["50.0 ± 0.0", "7", "1.5", "3.0"]
