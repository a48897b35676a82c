"""Fixtures of training tests."""

import pytest

from tests.helpers.training import dataset, write_folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return dataset(write_folder(tmp_path_factory.mktemp("llava")))
