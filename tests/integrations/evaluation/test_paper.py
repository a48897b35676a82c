"""The paper's table: its own figures against its own means, and the table of a model."""

import pytest

from covft.errors import ConfigError
from covft.integrations.evaluation.paper import PAPER_FIGURES, paper_table
from covft.metrics import averages
from tests.helpers.evaluations import EXPECTED, LMMS_VALUES, SOURCES, write_lmms

# The columns G., K., V. and Avg. of Table 1, and Mean of Table 3.
PRINTED = {
    "LLaVA-1.5-7B": (65.04, 60.07, 53.84, 59.13),
    "Freeze 7B": (66.23, 61.20, 51.71, 58.93),
    "Full fine-tuning 7B": (66.69, 61.29, 52.17, 59.29),
    "VPT 7B": (65.26, 60.43, 51.20, 58.19),
    "SVPT 7B": (64.83, 61.08, 52.37, 58.70),
    "LoRA 7B": (65.93, 60.86, 52.45, 59.04),
    "BitFit 7B": (66.14, 61.58, 53.10, 59.57),
    "CoVFT 7B": (67.04, 61.93, 55.81, 61.08),
    "LLaVA-1.5-13B": (67.79, 64.62, 52.75, 60.73),
    "Freeze 13B": (68.78, 64.27, 53.84, 61.43),
    "Full fine-tuning 13B": (68.66, 64.43, 53.54, 61.30),
    "BitFit 13B": (68.55, 64.23, 54.05, 61.43),
    "CoVFT 13B": (69.66, 65.11, 56.17, 62.90),
    "Freeze SigLIP-L/16 7B": (57.54,),
    "CoVFT SigLIP-L/16 7B": (59.74,),
    "Freeze DINOv3-L/16 7B": (52.25,),
    "CoVFT DINOv3-L/16 7B": (54.80,),
    "Full fine-tuning InternVL 2.0": (67.51,),
    "CoVFT InternVL 2.0": (70.11,),
}
# Means that the paper prints, and that are not those of its figures.
ITS_OWN = {("BitFit 13B", 0), ("BitFit 13B", 3), ("CoVFT 13B", 0), ("CoVFT 13B", 3)}


@pytest.mark.parametrize("row", PAPER_FIGURES)
def test_the_paper_s_figures_have_its_means(row):
    found = averages(PAPER_FIGURES[row])
    means = [*found.groups.values(), found.mean][-len(PRINTED[row]) :]
    for place, (mean, printed) in enumerate(zip(means, PRINTED[row], strict=True)):
        if (row, place) not in ITS_OWN:
            assert mean == pytest.approx(printed, abs=0.0065), place


def test_the_table_of_a_model(tmp_path):
    write_lmms(tmp_path, LMMS_VALUES, sources=SOURCES, asked={"gqa": 8})
    table = paper_table(tmp_path, beside=["CoVFT 7B"])
    assert table.groups == pytest.approx(
        {
            "general": (75 + 61 + 52 + 63) / 4,
            "knowledge and OCR": (74 + 55 + 50) / 3,
            "vision-centric": (30 + 57 + 75 + 25 + 65) / 5,
        }
    )
    assert table.mean == pytest.approx((75 + sum(EXPECTED.values()) - 1500) / 12)
    lines = str(table).splitlines()
    assert lines[1].split() == ["MME", "1500.0", "1525.2"]
    assert [line.split() for line in lines if line.startswith("  mean of twelve")] == [
        ["mean", "of", "twelve", "56.83", "61.08"]
    ]
    assert "partial   GQA: 8 of 100 questions" in lines
    assert sum(line.startswith("asked ") for line in lines) == 12


def test_a_missing_task_leaves_means_out_instead_of_counting_as_0(tmp_path):
    write_lmms(tmp_path, {**LMMS_VALUES, "mmvp": "N/A"}, sources=SOURCES)
    table = paper_table(tmp_path)
    assert set(table.groups) == {"general", "knowledge and OCR"}
    assert table.mean is None
    lines = {line.split("  ")[0].strip(): line for line in str(table).splitlines()}
    assert lines["MMVP"].split()[1:] == ["-", "28.00", "27.33", "36.67"]
    assert "missing   MMVP: mmvp_pair_accuracy of mmvp is 'N/A'" in str(table)


def test_rows_of_the_paper_that_it_does_not_have(tmp_path):
    with pytest.raises(ConfigError, match="no row 'CoVFT'"):
        paper_table(tmp_path, beside=["CoVFT"])
