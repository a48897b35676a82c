"""Verdicts on planted rows: each of the four, for a reason that was planted."""

from dataclasses import replace

import pytest

from study.results import paper_claims
from study.results.claims import FAILS, HOLDS, NOT_RUN, UNKNOWN, Comparison, verdict
from study.results.contrasts import Estimate
from study.results.load import read_rows
from study.results.studies import STUDIES, Results
from tests.helpers.study_rows import GROUPS, TWELVE, percents, planted, write

CLAIMS = {claim.text: claim for claim in (*paper_claims.PAPER, *paper_claims.SECOND_PAPER, *paper_claims.OWN)}


def found(text, results):
    comparisons = CLAIMS[text].compare(results)
    return verdict(comparisons), [None if each.found is None else each.found.value for each in comparisons]


def estimate(low, high):
    return Comparison("x", Estimate((low + high) / 2, low, high, 3, 12))


@pytest.mark.parametrize(
    ("comparisons", "expected"),
    [
        ([estimate(1, 2)], HOLDS),
        ([estimate(-1, 2)], UNKNOWN),
        ([estimate(0, 2)], UNKNOWN),
        ([estimate(-2, -1)], FAILS),
        ([estimate(1, 2), estimate(-1, 2)], UNKNOWN),
        ([estimate(1, 2), estimate(-2, -1)], FAILS),
        ([estimate(1, 2), Comparison("x", None)], NOT_RUN),
        ([estimate(-2, -1), Comparison("x", None)], FAILS),
        ([], NOT_RUN),
    ],
)
def test_the_verdict_follows_from_the_intervals(comparisons, expected):
    assert verdict(comparisons) == expected


# Differences of the means that are planted in `world`, by hand.
COVFT = 50 + 20 * 5 / 12


@pytest.mark.parametrize(
    ("text", "expected", "values"),
    [
        ("CoVFT is above the frozen tower", HOLDS, [COVFT - 40]),
        ("CoVFT is above full fine-tuning", HOLDS, [COVFT - 45]),
        ("CoVFT is above every other method", HOLDS, [COVFT - 40, COVFT - 40, COVFT - 45, COVFT - 35]),
        ("Its gain is largest in the vision-centric group", HOLDS, [20, 20]),
        ("Full fine-tuning is above the frozen tower", HOLDS, [5]),
        ("BitFit is above the frozen tower", UNKNOWN, [0]),
        ("LoRA is above the frozen tower", FAILS, [-5]),
        ("VPT and SVPT are below the frozen tower", NOT_RUN, [None, None]),
        ("Any context is above none: the image alone is above full fine-tuning", UNKNOWN, [5 * 5 / 12]),
        ("The text guides: text alone as context is above the image alone", HOLDS, [5 + 5 * 5 / 12]),
        ("Image and text together are above the text alone", HOLDS, [10 * 5 / 12]),
        ("Cross-attention is above concatenation", NOT_RUN, [None]),
        ("Dense routing is above sparse", HOLDS, [10 * 5 / 12]),
        ("Sparse routing is above random", HOLDS, [10 + 10 * 5 / 12]),
        ("It is not the parameters: dense routing is above uniform", HOLDS, [COVFT - 45]),
        ("The later blocks are a better place than the first", HOLDS, [COVFT - 45]),
        ("The later blocks are a better place than all", FAILS, [COVFT - 65]),
        ("Four experts are best", UNKNOWN, [10 * 5 / 12, 5 - 10 * 5 / 12]),
        ("The more kinds of task, the more experts help", HOLDS, [75 - 60 - 55 + 65]),  # on pairs, photo and count
        ("With as many parameters, CoVFT is above other methods", HOLDS, [COVFT - 45]),
        ("CoVFT with 75 percent of the data is above frozen with all of it", NOT_RUN, [None]),
        ("CoVFT is above frozen with another tower", HOLDS, [10]),
        ("CoVFT is above full fine-tuning with another tower", HOLDS, [5]),
        ("LoRA forgets less than full tuning", HOLDS, [15 - 5]),
        ("LoRA is the better balance of both", UNKNOWN, [50 - 47.5]),
        ("Full tuning gains most on the downstream tasks", UNKNOWN, [5]),
        ("DoRA forgets less than full tuning", NOT_RUN, [None]),
        ("Tuning the projector matters", NOT_RUN, []),
        ("The question matters in training: above shuffled texts", HOLDS, [5 + 10 * 5 / 12]),
        ("The question says more than the name of its task", UNKNOWN, [0]),
        ("A text matters: above no text", NOT_RUN, [None]),
        ("Features that mean something matter: above random ones", HOLDS, [COVFT - 45]),
    ],
)
def test_planted_answers_are_found(planted_world, text, expected, values):
    assert found(text, planted_world) == (expected, pytest.approx(values))


def test_every_share_of_the_data_is_compared(planted_world):
    outcome, values = found("CoVFT is above frozen and full at every share of the data", planted_world)
    assert (outcome, values) == (HOLDS, pytest.approx([COVFT - 40, COVFT - 45, 10, 5, 10, 5]))


def test_without_rows_nothing_was_run(nothing):
    assert {found(text, nothing)[0] for text in CLAIMS} == {NOT_RUN}


def test_one_task_that_falls_is_enough_to_refute_all_twelve(tmp_path):
    rows = [
        *planted("frozen", percents(30), ["methods"], method="frozen"),
        *planted("covft", percents(90, count=0), ["methods"]),
    ]
    results = Results.of("small", read_rows(write(rows, tmp_path)))
    outcome, values = found("CoVFT improves each of the twelve tasks over the frozen tower", results)
    assert outcome == FAILS
    assert values == pytest.approx([-30 if task == "count" else 60 for task in TWELVE])
    assert found("Its gain is largest in the vision-centric group", results)[0] == FAILS


def test_the_last_blocks_are_compared_with_as_many_of_the_first(tmp_path):
    rows = planted("covft", percents(50), ["methods", "placement"], layers=[2, 3, 4])
    for layers, mean in (([0, 1], 20), ([1, 2], 30), ([3, 4], 70), ([4], 35)):
        rows += planted(f"covft, layers={layers}", percents(mean), ["placement"], layers=layers)
    results = Results.of("small", read_rows(write(rows, tmp_path)))
    (comparison,) = CLAIMS["The later blocks are a better place than the first"].compare(results)
    assert (comparison.name, comparison.found.value) == ("blocks 3 to 4 − 0 to 1", pytest.approx(50))


def test_what_passes_through_the_tower(tmp_path):
    rows = [
        *planted("covft, question to the tower only", percents(45), ["controls"], control="tower_only"),
        *planted(
            "frozen, question to the tower only", percents(20), ["controls"], control="tower_only", method="frozen"
        ),
    ]
    results = Results.of("small", read_rows(write(rows, tmp_path)))
    text = "The question passes through the tower, where the language model does not see it"
    assert found(text, results) == (HOLDS, pytest.approx([25]))


def test_the_closest_in_size_is_compared_where_it_is_close(tmp_path):
    def sized(rows, size):
        return [{**row, "trained": {"tower": size, "all": 2 * size}} for row in rows]

    rows = [
        *sized(planted("covft", percents(80), ["methods"]), 3500),
        *sized(planted("covft, expert_rank=4", percents(60), ["matched"], options={"expert_rank": 4}), 500),
        *sized(planted("lora, r=64", percents(50), ["matched"], method="lora", options={"r": 64}), 600),
        *sized(planted("ffn", percents(50), ["matched"], method="ffn"), 3000),
        *sized(planted("full", percents(50), ["matched"], method="full"), 1000),
    ]
    results = Results.of("small", read_rows(write(rows, tmp_path)))
    comparisons = CLAIMS["With as many parameters, CoVFT is above other methods"].compare(results)
    assert {each.name: round(each.found.value) for each in comparisons} == {
        "covft, expert_rank=4 − lora, r=64": 10,
        "covft − ffn": 30,
    }


def test_a_claim_about_every_run_of_a_study_needs_them_all(tmp_path):
    rows = planted("covft", percents(60), ["methods"]) + planted("frozen", percents(40), ["methods"], method="frozen")
    rows = read_rows(write(rows, tmp_path))
    every, other = CLAIMS["CoVFT is above every other method"], CLAIMS["CoVFT is above the frozen tower"]
    for planned, expected in ((["frozen", "covft"], HOLDS), (["frozen", "ffn", "covft"], NOT_RUN)):
        results = replace(Results.of("small", rows), planned={"methods": planned})
        assert verdict(every.comparisons(results)) == expected
        assert verdict(other.comparisons(results)) == HOLDS
    assert [each.name for each in every.comparisons(results) if each.found is None] == ["ffn"]


def test_a_claim_that_is_refuted_needs_no_other_run(tmp_path):
    rows = planted("covft", percents(30), ["methods"]) + planted("frozen", percents(40), ["methods"], method="frozen")
    results = Results.of("small", read_rows(write(rows, tmp_path)))
    results = replace(results, planned={"methods": ["frozen", "ffn", "covft"]})
    assert verdict(CLAIMS["CoVFT is above every other method"].comparisons(results)) == FAILS


def test_the_rate_that_was_searched_for_another_tower_stands_for_a_method(tmp_path):
    rows = planted("full", percents(50), ["methods"], method="full")
    rows += planted("full, backbone", percents(20), ["tower"], method="full", tower="backbone")
    rows += planted("full, backbone, 3e-5", percents(45), ["tower"], method="full", tower="backbone", vision_lr=3e-5)
    results = Results.of("small", read_rows(write(rows, tmp_path)))
    groups = results.parts(STUDIES["tower"])["backbone"]
    assert {group.label for group in groups} == {"full, backbone", "full, backbone, 3e-5"}
    assert results.reference(STUDIES["tower"], groups, "full").label == "full, backbone, 3e-5"


def test_the_groups_of_tasks_are_those_of_the_helpers():
    from study.results.studies import GROUPS as KNOWN

    assert {name: tasks for name, tasks in KNOWN.items() if name != "conflict"} == GROUPS
