"""Fixtures of these tests."""

import pytest

from tests.helpers.quiet import quiet

__all__ = ["quiet"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with LLaVA's data."""
    from tests.helpers.training import write_folder

    return write_folder(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def rows(folder):
    """Its rows, for training."""
    from tests.helpers.training import dataset

    return dataset(folder)
