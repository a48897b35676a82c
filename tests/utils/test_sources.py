"""Names of models with options."""

from __future__ import annotations

import pytest

from covft.utils.sources import is_folder_name, split_options, with_options


@pytest.mark.parametrize(
    "options", [{}, {"a": "1"}, {"b": "x y", "a": "(1, 2)", "c": ""}, {"revision": "refs/pr/1?&="}]
)
@pytest.mark.parametrize("name", ["timm:test_vit", "me/bert"])
def test_options_are_read_as_they_were_written(name, options):
    assert split_options(with_options(name, options)) == (name, options)


def test_none_is_left_out_and_other_values_are_texts():
    assert with_options("a", {"x": None, "y": True, "z": 3}) == "a?y=True&z=3"
    assert with_options("a", {"x": None}) == "a"


def test_a_file_may_have_a_question_mark_in_its_name(tmp_path):
    (tmp_path / "a?b=c").mkdir()
    assert split_options(str(tmp_path / "a?b=c")) == (str(tmp_path / "a?b=c"), {})


@pytest.mark.parametrize("name", ["x" * 9000, "a\x00b", "x" * 9000 + "?a=1"])
def test_what_no_path_can_be_is_not_one(name):
    assert not is_folder_name(name)
    assert split_options(name)[0] == name.partition("?")[0]
