"""The table of sizes that were tried: full tuning at its best rate against a frozen tower, on validation scenes."""

import pytest

from study.results.load import read_rows
from study.results.size import size_rows, size_table
from study.runs.settings import RunSettings
from tests.helpers.study_rows import percents, planted, write

CHOSEN = RunSettings()


def rows(folder, split="validation"):
    """At the study's size full tuning is 10 points above at one rate, 5 at another.

    Twice as long frozen is alone, and full tuning of another tower is better than any.
    """
    fields = {"split": split, "steps": CHOSEN.steps, "batch": CHOSEN.batch, "tokens": CHOSEN.tokens}
    found = []
    for method, score, rate in (("frozen", 40, None), ("full", 45, 1e-4), ("full", 50, 1e-3)):
        label = f"{method}, {rate}"
        found += planted(label, percents(score), [], seeds=(0,), method=method, vision_lr=rate, **fields)
    found += planted("longer", percents(50), [], seeds=(0,), method="frozen", **{**fields, "steps": 800})
    found += planted("tower", percents(90), [], seeds=(0,), method="full", vision_lr=2e-3, tower="backbone", **fields)
    for row in found:
        row["split"] = split
    return read_rows(write(found, folder))


def test_full_tuning_has_its_best_rate(tmp_path):
    table = size_table(rows(tmp_path))
    [row] = table.rows
    size = [str(CHOSEN.steps), str(CHOSEN.batch), str(CHOSEN.tokens)]
    assert row[:5] == [*size, "40.0", "50.0"]
    assert row[5].startswith("+10.0 [")
    assert table.strong == {(0, x) for x in range(6)}
    assert "it does (1 seed)" in table.notes[0]


def test_test_scenes_do_not_count(tmp_path):
    assert size_table(rows(tmp_path, split="test")).rows == []


@pytest.mark.long
def test_the_search_on_file_tried_several_sizes():
    table = size_table(size_rows())
    assert len(table.rows) >= 8
    assert table.strong
    assert "it does (" in table.notes[0]
