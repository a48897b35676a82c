"""Fixtures of training tests."""

import pytest

from tests.helpers.training import dataset, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def rows(folder):
    return dataset(folder)
