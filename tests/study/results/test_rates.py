"""The table of learning rates that were tried, on validation scenes."""

import pytest

from study.results.load import read_rows
from study.results.rates import rates_table
from study.results.size import SEARCH
from study.runs.settings import RunSettings
from tests.helpers.study_rows import percents, planted, write

CHOSEN = RunSettings()
USUAL = CHOSEN.to_dict()


def tried(folder, found, split="validation"):
    rows = []
    for number, (score, fields) in enumerate(found):
        rows += planted(f"run {number}", percents(score), [], seeds=(0,), **{**USUAL, **fields, "split": split})
    for row in rows:
        row["split"] = split
    return read_rows(write(rows, folder))


def test_the_best_rate_of_a_line_is_bold_and_one_at_an_end_is_named(tmp_path):
    found = [
        *((score, {"method": "full", "vision_lr": rate}) for rate, score in ((1e-4, 40), (3e-4, 50), (1e-3, 45))),
        *((score, {"method": "ffn", "vision_lr": rate}) for rate, score in ((3e-4, 30), (1e-3, 35))),
        *((score, {"method": "bitfit", "vision_lr": rate}) for rate, score in ((3e-4, 30), (1e-3, 25))),
    ]
    table = rates_table(tried(tmp_path, found))
    assert table.header == ["", "0.0001", "0.0003", "0.001"]
    assert table.rows == [
        ["bitfit", "", "30.0", "25.0"],
        ["ffn", "", "30.0", "35.0"],
        ["full", "40.0", "50.0", "45.0"],
    ]
    assert table.strong == {(0, 2), (1, 3), (2, 2)}
    assert [note.partition(" that was tried")[0] for note in table.notes] == [
        "Best at the lowest rate", "Best at the highest rate",
    ]  # fmt: skip
    assert [note.rpartition(": ")[2] for note in table.notes] == ["bitfit.", "ffn."]


def test_one_rate_other_sizes_and_test_scenes_are_no_line(tmp_path):
    other = [{"method": "full", "vision_lr": rate, "steps": 2 * CHOSEN.steps} for rate in (1e-4, 1e-3)]
    found = [(40, {"method": "ffn", "vision_lr": 1e-3}), *((40, fields) for fields in other)]
    assert rates_table(tried(tmp_path / "a", found)).rows == []
    found = [(40, {"method": "full", "vision_lr": rate}) for rate in (1e-4, 1e-3)]
    assert rates_table(tried(tmp_path / "b", found, "test")).rows == []


def test_variants_and_towers_have_lines_of_their_own(tmp_path):
    found = [
        (40, {"method": "full", "tower": tower, "vision_lr": rate})
        for tower in ("small_vit", "backbone")
        for rate in (1e-4, 1e-3)
    ]
    assert [row[0] for row in rates_table(tried(tmp_path, found)).rows] == ["full", "full, tower backbone"]


@pytest.mark.long
def test_full_tuning_and_covft_are_not_best_at_an_end_of_the_search_on_file():
    table = rates_table(read_rows(SEARCH))
    ends = {label for note in table.notes for label in note.rpartition(": ")[2].rstrip(".").split("; ")}
    assert {row[0] for row in table.rows} >= {"full", "covft"}
    assert not ends & {"full", "covft"}
