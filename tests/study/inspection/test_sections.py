"""The sections about distance and audit, from planted numbers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from covft.metrics import bootstrap, paired_bootstrap
from study.inspection.conditioning import both_right, questions_of
from study.inspection.distance import halves_of
from study.inspection.sections import (
    audit_section,
    audit_table,
    distance_section,
    groups_of,
    told_of_audit,
    told_of_distance,
)
from study.runs.tables import load_part

TOWERS = [["grounding", 0], ["caption", 0], ["grounding", 1], ["caption", 1]]


def distances(two, one):
    """Pairs of towers that are as far apart as given, in each of two blocks; twice as far in the second step.

    Those of the second seed are 0.2 further apart, and have other cosines.
    """
    found = []
    for seed in range(2):
        pairs = {}
        for a, b in itertools.combinations(range(4), 2):
            apart = (one if TOWERS[a][0] == TOWERS[b][0] else two) + 0.1 * seed
            cosine = 0.5 if TOWERS[a][0] == TOWERS[b][0] else -0.1 - 0.2 * seed
            pairs[f"{a} {b}"] = [
                {"0": [n * apart, 0.1, cosine], "1": [n * apart + 1, 0.1, 0.25], "": [n * apart + 2, 0.1, cosine]}
                for n in (1, 2)
            ]
        found.append({
            "settings": {"steps": 20, "seed": seed}, "pictures": 30, "batch": 4, "towers": TOWERS, "steps": [10, 20],
            "pairs": pairs,
        })  # fmt: skip
    return found


def test_distances_of_two_tasks_stand_beside_those_of_one(tmp_path):
    text = "\n".join(distance_section(distances(3, 1), tmp_path)).replace("\u00a0", " ")
    two, one = "6.10 [6.00, 6.20]", "2.10 [2.00, 2.20]"
    cosines = "−0.20 [−0.30, −0.10] | +0.50 [+0.50, +0.50]"
    assert f"| 0 | {two} | {two} | {one} | 2.90 | {cosines} |" in text
    assert f"| all weights | 8.10 [8.00, 8.20] | 8.10 [8.00, 8.20] | 4.10 [4.00, 4.20] | 1.98 | {cosines} |" in text
    assert "two trainings on one task have 51% of the distance" in text
    assert "Of one task, grounding has 4.10 and caption has 4.10." in text
    assert "of one task have a cosine of +0.50 on average, those of two tasks −0.20" in text
    assert "The distance grows during training, as in the paper; so does that of one task." in text
    assert (
        "Of the blocks 0 to 1, it is largest in block 1, as in the paper; compared with that of one task, in block 0."
        in text
    )
    assert (tmp_path / "distance.svg").is_file()


@pytest.mark.parametrize(
    ("two", "one", "said"), [(3, 1, "are further apart"), (1, 3, "are less far"), (1, 1, "are not shown")]
)
def test_words_about_distances_follow_the_numbers(two, one, said):
    assert told_of_distance(distances(two, one)).startswith(f"**Towers of two tasks {said}")


def test_pairs_are_grouped_by_what_differs():
    same, other, control = groups_of(distances(1, 1)[0]).values()
    assert (same, other, control) == (["0 1", "2 3"], ["0 3", "1 2"], ["0 2", "1 3"])


def test_halves_have_other_pictures_and_both_tasks():
    one, other = halves_of(load_part("train", 40, None), 0)
    scenes = [{e.scene for e in part.examples} for part in (one, other)]
    assert not scenes[0] & scenes[1]
    assert len(scenes[0]) == len(scenes[1]) > 5
    for part in (one, other):
        asked = sorted((e.scene, e.task) for e in part.examples)
        assert asked == [(s, t) for s in sorted({e.scene for e in part.examples}) for t in ("caption", "grounding")]


def test_the_audit_chooses_two_questions_about_each_picture():
    asked = [(task, picture) for picture in range(9) for task in ("caption", "count", "size", "word")]
    asked += [("count", 20), ("caption", 20)]
    rows = questions_of(asked, 0)
    chosen = [asked[row] for row in rows]
    assert [picture for _, picture in chosen] == [picture for picture in range(9) for _ in range(2)]
    assert "caption" not in {task for task, _ in chosen}
    assert len(set(chosen)) == len(chosen)


@pytest.fixture
def audited():
    """200 questions about 100 pictures: the right text answers 160, another 100, and the others 160."""
    right = "1" * 160 + "0" * 40
    scores = {"right": right, "swapped": "10" * 60 + "1" * 40 + "0" * 40, "generic": right, "blank": right}
    pictures = [number // 2 for number in range(200)]
    return {"generic": "look", "tasks": ["count"] * 200, "pictures": pictures, "scores": scores}


def test_the_audit_is_tabulated_with_intervals(audited):
    right, swapped, generic, _ = audit_table(audited).rows
    hits = {name: np.array([float(hit) for hit in text]) for name, text in audited["scores"].items()}
    alone = bootstrap({0: {"x": hits["swapped"].tolist()}})
    assert swapped[1] == f"50.0 [{100 * alone.low:.1f},\u00a0{100 * alone.high:.1f}]"
    assert swapped[2].startswith("+30.0 [+2")
    assert generic[2:4] == ["0.0 [0.0,\u00a00.0]", "1.000"]
    pairs = {name: values.reshape(-1, 2).min(1) for name, values in hits.items()}
    assert both_right(audited)["swapped"] == pairs["swapped"].tolist()
    assert right[4].startswith("80.0 [")
    assert swapped[4].startswith("20.0 [")
    apart = paired_bootstrap({0: {"x": pairs["right"].tolist()}}, {0: {"x": pairs["swapped"].tolist()}})
    assert swapped[5] == f"+60.0 [+{100 * apart.low:.1f},\u00a0+{100 * apart.high:.1f}]"
    assert "200 held-out questions, two about each of 100 pictures" in "\n".join(audit_section(audited))


def test_the_audit_says_whether_the_text_is_used(audited):
    assert told_of_audit(audited).startswith("**The text is used**")
    audited["scores"]["swapped"] = audited["scores"]["right"]
    assert told_of_audit(audited).startswith("**The text is not shown to be used**")
