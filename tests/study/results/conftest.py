"""Rows in which what is to be found is planted."""

import pytest

from study.results.load import read_rows
from study.results.studies import Results
from tests.helpers.study_rows import world, write


@pytest.fixture(scope="session")
def planted_folder(tmp_path_factory):
    return write(world(), tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="session")
def planted_world(planted_folder):
    return Results.of("small", read_rows(planted_folder))


@pytest.fixture(scope="session")
def nothing():
    return Results.of("small", [])
