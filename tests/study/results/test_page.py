"""The page and its figures, from planted rows and from none."""

import re
import xml.etree.ElementTree as ET

import pytest
from typer.testing import CliRunner

from study.cli import app
from study.results.claims import FAILS, HOLDS, NOT_RUN
from study.results.load import read_rows
from study.results.page import compared, page
from study.results.paper_claims import OWN, PAPER, SECOND_PAPER
from study.results.plots import PLOTS, write_plots
from study.results.studies import STUDIES, Results
from tests.helpers.study_rows import percents, planted, write


@pytest.fixture(scope="module")
def written(planted_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    done = CliRunner().invoke(app, ["page", "--rows", str(planted_folder), "--output", str(folder)])
    assert done.exit_code == 0, done.output
    return folder


@pytest.mark.long
def test_the_page_has_every_study_figure_and_claim(written):
    text = (written / "index.md").read_text()
    for study in STUDIES.values():
        assert f"\n## {study.title}\n" in text
    for plot in PLOTS:
        assert f"]({plot.name}.svg)" in text
        assert (written / f"{plot.name}.svg").is_file()
    for claim in (*PAPER, *SECOND_PAPER, *OWN):
        assert re.search(rf"^\| {re.escape(claim.text)} \|.*\*\*.*\*\* \|$", text, re.MULTILINE)
    assert re.search(rf"^\| LoRA is above the frozen tower \| Table 1 \|.*\*\*{FAILS}\*\* \|$", text, re.MULTILINE)
    assert f"- CoVFT is above the frozen tower: **{HOLDS}** (+18.3 [" in text


@pytest.mark.long
def test_tables_are_rectangular(written):
    text = (written / "index.md").read_text()
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in block.splitlines()}) == 1, block


@pytest.mark.long
def test_figures_are_transparent_and_written_the_same_way_twice(written, planted_world, tmp_path):
    assert [plot.name for plot in write_plots(planted_world, tmp_path)] == [plot.name for plot in PLOTS]
    for plot in PLOTS:
        text = (tmp_path / f"{plot.name}.svg").read_text()
        assert text == (written / f"{plot.name}.svg").read_text()
        root = ET.fromstring(text)
        background = root.find(".//{*}g[@id='patch_1']/{*}path")
        assert background is None or "fill: none" in background.get("style") or "opacity: 0" in background.get("style")


def test_without_rows_the_page_says_so(nothing, tmp_path):
    assert write_plots(nothing, tmp_path) == []
    text = page(nothing, [])
    assert "No rows are on file" in text
    assert text.count("\nNot run.\n") == len(STUDIES) + 1  # and the settings
    assert not re.search(r"\*\*(holds|does not hold|cannot be told)", text)
    assert f"**{NOT_RUN}**" in text
    assert ".svg" not in text
    assert "61.08 for CoVFT at 7B" in text


def test_a_figure_whose_runs_are_gone_is_removed(nothing, tmp_path):
    (tmp_path / "methods.svg").write_text("old")
    write_plots(nothing, tmp_path)
    assert not (tmp_path / "methods.svg").exists()


def test_one_run_makes_a_page(tmp_path):
    rows = planted("frozen", percents(40), ["methods"], seeds=(0,), method="frozen")
    results = Results.of("small", read_rows(write(rows, tmp_path)))
    text = page(results, write_plots(results, tmp_path / "page"))
    assert "from 1 row," in text
    assert re.search(
        r"^\| frozen \| \*?\*?40\.0 \[.*\| 40\.0 \| 40\.0 \| 40\.0 \|  \| 1 \| 1,000 \|$", text, re.MULTILINE
    )


def test_many_comparisons_are_counted(planted_world):
    claim = next(claim for claim in PAPER if "each of the twelve" in claim.text)
    told = compared(claim.compare(planted_world))
    assert re.match(r"of 12: \d+ above 0, 0 below, \d+ neither<br>least: \w+: \+10\.0 \[", told)
