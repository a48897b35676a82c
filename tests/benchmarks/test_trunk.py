"""The benchmark of the trunk: its arithmetic on toy sizes, and the page."""

from __future__ import annotations

import json

from benchmarks.speed.sizes import TINY
from benchmarks.trunk.__main__ import PAGE, RESULTS, written
from benchmarks.trunk.chats import SMALL, second_question
from benchmarks.trunk.pairs import pairs
from benchmarks.trunk.tower import questions


def test_the_page_has_the_tables_of_the_results():
    page = PAGE.read_text(encoding="utf-8")
    assert page == written(page, json.loads(RESULTS.read_text())), "run python -m benchmarks.trunk"


def test_ten_questions():
    found = questions(TINY)
    operations = found["flops"]
    # The embedding of the patches runs in both.
    patches = 2 * 16 * TINY.embed_dim * 3 * TINY.patch_size**2
    assert operations["full"] == operations["trunk"] + operations["upper"] - patches
    assert found["bytes"] == 4 * TINY.tokens * TINY.embed_dim
    assert found["floor"] < found["full"]


def test_what_a_second_question_runs():
    found = {row["policy"]: row for row in second_question(SMALL, runs=1)}
    ran = {policy: (row["trunk"], row["upper"]) for policy, row in found.items()}
    assert ran == {"reencode": (0, 1), "keep": (0, 0), "append": (0, 1)}
    assert found["keep"]["tokens"] + 5 == found["append"]["tokens"]  # four tokens of the picture, and a line break
    assert found["reencode"]["tokens"] > found["append"]["tokens"]


def test_two_questions_a_picture():
    """Answers and hits are checked inside."""
    for seconds in pairs(SMALL, pictures=1).values():
        assert 0 <= seconds[1] <= seconds[0]
