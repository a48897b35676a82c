"""Rows are read and grouped; what cannot be compared is refused."""

import json

import numpy as np
import pytest

from study.results.load import RowsError, groups_of, read_rows
from tests.helpers.study_rows import percents, planted, write


def test_rows_of_a_label_are_one_group_over_seeds(tmp_path):
    rows = [*planted("frozen", percents(40), ["methods"]), *planted("covft", percents(50), ["methods"], seeds=(2, 1))]
    groups = groups_of(read_rows(write(rows, tmp_path)))
    assert {group.label: list(group.rows) for group in groups} == {"covft": [1, 2], "frozen": [0, 1, 2]}
    frozen = groups[1]
    assert frozen.score("count") == 40
    assert frozen.rows[0].hits["count"].sum() == 8
    assert "seed" not in frozen.settings


def test_an_absent_folder_has_no_rows(tmp_path):
    assert read_rows(tmp_path / "nowhere") == []


def test_other_splits_are_left_out(tmp_path):
    rows = planted("frozen", percents(40), ["methods"])
    rows[0]["split"] = "validation"
    groups = groups_of(read_rows(write(rows, tmp_path)))
    assert list(groups[0].rows) == [1, 2]


def test_a_file_that_is_not_a_row_is_named(tmp_path):
    write(planted("frozen", percents(40), ["methods"]), tmp_path)
    (tmp_path / "half.json").write_text('{"name": "half"')
    with pytest.raises(RowsError, match=r"half\.json"):
        read_rows(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda row: row["scores"].update(count=41.0),  # not the mean of its hits
        lambda row: row["hits"].update(count=""),
        lambda row: row["hits"].update(count=[float("nan")] * 20),
        lambda row: row.update(losses=None),
        lambda row: row.pop("hits"),
    ],
)
def test_a_row_that_contradicts_itself_is_refused(tmp_path, change):
    rows = planted("frozen", percents(40), ["methods"], seeds=(0,))
    change(rows[0])
    with pytest.raises(RowsError, match="frozen-seed0"):
        read_rows(write(rows, tmp_path))


def test_scores_of_other_questions_are_not_paired(tmp_path):
    rows = [
        *planted("frozen", percents(40), ["methods"]),
        *planted("covft", percents(50), ["methods"], questions=40, held_out_questions=20),
    ]
    with pytest.raises(RowsError, match=r"same questions(.|\n)*questions of existence"):
        groups_of(read_rows(write(rows, tmp_path)))


def test_a_label_has_one_row_per_seed(tmp_path):
    rows = planted("frozen", percents(40), ["methods"], seeds=(0,))
    twin = {**rows[0], "name": "frozen-again-seed0"}
    with pytest.raises(RowsError, match=r"frozen-again-seed0"):
        groups_of(read_rows(write([*rows, twin], tmp_path)))


def test_a_label_stands_for_one_set_of_settings(tmp_path):
    rows = planted("covft", percents(40), ["methods"])
    rows[2]["settings"]["experts"] = 8
    with pytest.raises(RowsError, match=r"experts=4(.|\n)*experts=8"):
        groups_of(read_rows(write(rows, tmp_path)))


def test_rows_from_before_a_setting_was_there_belong_to_their_group(tmp_path):
    rows = planted("covft", percents(40), ["methods"])
    rows[2]["settings"]["something_new"] = "default"
    assert len(groups_of(read_rows(write(rows, tmp_path)))) == 1


def test_lists_of_scores_are_read_as_they_are(tmp_path):
    row = planted("frozen", percents(40), ["methods"], seeds=(0,))[0]
    row["hits"]["caption"] = [0.5, 1.5]
    row["scores"]["caption"] = 100.0
    (tmp_path / "row.json").write_text(json.dumps(row))
    np.testing.assert_array_equal(read_rows(tmp_path)[0].hits["caption"], [0.5, 1.5])


def test_fields_of_later_versions_are_kept(tmp_path):
    row = planted("frozen", percents(40), ["methods"], seeds=(0,))[0]
    assert read_rows(write([{**row, "something": "else"}], tmp_path))[0].more == {"something": "else"}


def test_scores_before_tuning_are_hits_or_one_score_for_all(tmp_path):
    row = planted("lora", percents(40), ["forgetting"], seeds=(0,))[0]
    row["before"] = {"count": "01" * 10, "size": 35.0, "never scored after": "01"}
    before = read_rows(write([row], tmp_path))[0].before
    assert {task: float(hits.mean()) for task, hits in before.items()} == {"count": 0.5, "size": pytest.approx(0.35)}
