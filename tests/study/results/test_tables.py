"""Tables have the planted numbers, and say so where nothing was run."""

import re

import pytest
from typer.testing import CliRunner

from covft.metrics import forgetting
from study.cli import app, main
from study.results.forgetting import forgetting_of, sides, tuned
from study.results.formats import Table, interval, p_value, signed
from study.results.load import read_rows
from study.results.settings_shown import tasks_table
from study.results.studies import STUDIES, Results
from study.results.tables import NOT_RUN, all_tables, tables_of
from tests.helpers.study_rows import percents, planted, write


def cells(table, label, part=None):
    """Return the cells of a row, the first of each column's name."""
    found = [row for row in table.rows if row[0] == label and part in (None, row[1])]
    assert len(found) == 1, (label, [row[0] for row in table.rows])
    return dict(reversed(list(zip(table.header, found[0], strict=True))))


def first(cell):
    return float(cell.split()[0].replace("−", "-").rstrip("%"))


def test_methods_are_compared_with_frozen_and_full(planted_world):
    table, tasks = tables_of(planted_world, STUDIES["methods"])
    covft = cells(table, "covft")
    assert (covft["General"], covft["Knowledge"], covft["Vision"]) == ("50.0", "50.0", "70.0")
    assert [first(covft[name]) for name in ("mean", "minus frozen", "minus full")] == [58.3, 18.3, 13.3]
    assert re.fullmatch(r"\+18\.3 \[\+\d\d\.\d,\xa0\+\d\d\.\d\]", covft["minus frozen"])
    assert covft["wins"] == "12/12"
    assert cells(table, "bitfit")["minus full"].startswith("−5.0 [−")
    assert cells(table, "frozen")["minus frozen"] == ""
    assert {row[0] for y, row in enumerate(table.rows) if (y, table.header.index("mean")) in table.strong} == {"covft"}
    assert "**58.3 [" in table.markdown()
    assert [row[0] for row in table.rows] == ["frozen", "full", "covft", "bitfit", "lora, r=8"]
    assert cells(tasks, "covft")["count"] == "70.0"


def test_p_values_are_corrected_over_the_methods(planted_world):
    table = tables_of(planted_world, STUDIES["methods"])[0]
    # four methods beside the frozen one, three of which differ on all tasks
    assert [cells(table, label)["p"] for label in ("covft", "lora, r=8", "bitfit")] == [p_value(8 / 2**12)] * 2 + [
        "1.000"
    ]


def test_controls_say_what_remains_of_the_gain(planted_world):
    table = tables_of(planted_world, STUDIES["controls"])[0]
    kept = {row[0]: row[table.header.index("of the gain")] for row in table.rows}
    assert kept["covft, texts shuffled"].startswith("50% [")  # 5 + 10 * 5 / 12 of twice as much
    assert kept["covft, uniform routing"].startswith("27% [")  # 5 of 18.3
    assert kept["covft, text = name of the task"].startswith("100% [")
    assert kept["covft"] == "100% [100,\u00a0100]"
    assert kept["frozen"] == ""


def test_parts_have_references_of_their_own(planted_world):
    table = tables_of(planted_world, STUDIES["fraction"])[0]
    assert [row[1] for row in table.rows] == ["100%"] * 3 + ["50%"] * 3 + ["25%"] * 3
    half = cells(table, "covft, 50% of the data")
    assert [first(half[name]) for name in ("minus frozen", "minus full")] == [10, 5]
    diversity = tables_of(planted_world, STUDIES["diversity"])[0]
    assert first(cells(diversity, "covft, experts=8, 6 tasks")["minus full"]) == 10
    assert first(cells(diversity, "covft, experts=8")["minus full"]) == 12.5  # 30 * 5 / 12
    assert any("tasks 3 are over 3 tasks: pairs, photo, count." in note for note in diversity.notes)


def test_improvement_and_forgetting(planted_world):
    table = tables_of(planted_world, STUDIES["forgetting"])[0]
    found = {row[0].rpartition("=")[2]: [first(cell) for cell in row[3:]] for row in table.rows}
    assert found["full"] == [30, 15, (70 + 25) / 2]
    assert found["lora"] == [25, 5, (65 + 35) / 2]


def test_a_study_without_rows_was_not_run(nothing):
    for study in STUDIES.values():
        assert [table.markdown() for table in tables_of(nothing, study)] == [NOT_RUN]


def test_some_rows_are_enough(tmp_path):
    rows = [*planted("covft", percents(48), ["methods", "controls"]), *planted("full", percents(40), ["methods"], (5,))]
    for row in rows:
        row["hits"] = {"count": row["hits"]["count"]}
        row["scores"] = {"count": row["scores"]["count"]}
    assert len(all_tables(Results.of("small", read_rows(write(rows, tmp_path))))) == len(STUDIES) + 2


def test_floors_are_rows_of_their_own(tmp_path):
    rows = planted("frozen", percents(40), ["methods"], method="frozen")
    rows += planted("frozen, other tasks", percents(40), ["forgetting"], seeds=(0,), method="frozen")
    floors = (10, 20, 60, 99)  # the last is of a run with other settings, and has no say
    for row, score in zip(rows, floors, strict=True):
        row["floors"] = {"no_image": {"count": score}}
    table = tables_of(Results.of("small", read_rows(write(rows, tmp_path))), STUDIES["methods"])[1]
    assert cells(table, "floor: no image")["count"] == "30.0"
    assert cells(table, "floor: no image")["size"] == ""


def test_numbers_are_written_with_a_true_minus():
    assert [signed(value) for value in (1.25, -1.26, 0.04, -0.04)] == ["+1.2", "−1.3", "0.0", "0.0"]
    assert interval(None) == ""
    assert [p_value(p) for p in (None, 0.0004, 0.0123)] == ["", "<0.001", "0.012"]


def test_markdown_escapes_what_would_split_a_cell():
    table = Table("x", ["", "a"], [["1|2", "3"]], ["Note."], {(0, 1)})
    assert table.markdown() == "|  | a |\n|---|---:|\n| 1\\|2 | **3** |\n\nNote."


def test_the_command_prints_tables(planted_folder):
    done = CliRunner().invoke(
        app, ["table", "--study", "context,forgetting", "--rows", str(planted_folder), "--markdown"]
    )
    assert done.exit_code == 0, done.output
    assert re.findall(r"^## (.*)$", done.output, re.MULTILINE) == ["Context and routing", "Tuning against forgetting"]
    shown = CliRunner().invoke(
        app, ["table", "--study", "context", "--rows", str(planted_folder)], env={"COLUMNS": "200"}
    )
    assert "covft, routing=sparse" in shown.output


def test_an_unknown_study_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["table", "--study", "juggling"])
    assert "juggling" in capsys.readouterr().err


def test_improvement_and_forgetting_are_those_of_the_metrics(planted_world):
    for group in tuned(planted_world):
        downstream, upstream = sides(group)
        after = {task: group.score(task) for task in group.tasks}
        expected = forgetting(dict.fromkeys(after, 40.0), after, downstream=downstream, upstream=upstream)
        found = forgetting_of(group)
        for name in ("improvement", "forgotten", "overall"):
            assert getattr(found, name).value == pytest.approx(getattr(expected, name))


def test_tasks_near_their_floor_or_ceiling_are_named(tmp_path):
    scores = {**percents(40, size=100), "caption": 100}  # a CIDEr has no ceiling
    rows = planted("frozen", scores, ["methods"], method="frozen")
    for row in rows:
        row["floors"] = {"no_image": {"count": 36, "word": 34}}
    notes = tasks_table(Results.of("small", read_rows(write(rows, tmp_path)))).notes
    assert [note.partition(": ")[2] for note in notes[1:]] == [
        "`count` (of all runs, at most 40.0: frozen).",
        "`size` (of all runs, at most 100.0: frozen).",
    ]
