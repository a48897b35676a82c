"""Tests that only some releases of transformers can run."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from benchmarks.coverage import transformers_cases as cases
from covft.utils.transformers_names import OLDEST_TRAINED, release


def found(name: str) -> Any:
    """A class or module of transformers by its name; the test is skipped where the installed release lacks it."""
    transformers = pytest.importorskip("transformers")
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(f"transformers.{module}" if module else "transformers"), attribute)
    except (AttributeError, ImportError):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")


def build(name: str) -> Any:
    """A small model of a class in the table of coverage; the test is skipped where the release lacks the class."""
    folder, file, _ = cases.all_cases()[name]
    found(f"models.{folder}.modeling_{file or folder}.{name}")
    return cases.build(name)


def needs(owner: Any, name: str) -> None:
    """Skip the test where something of the installed release lacks an attribute."""
    if not hasattr(owner, name):
        version = pytest.importorskip("transformers").__version__
        pytest.skip(f"{type(owner).__name__} of transformers {version} has no {name}")


def skip_before(oldest: tuple[int, int], what: str) -> None:
    """Skip the test where the installed release is older than the first that has something."""
    if release() < oldest:
        version = pytest.importorskip("transformers").__version__
        pytest.skip(f"transformers {version} does not have {what}; {'.'.join(map(str, oldest))} does")


def since(oldest: tuple[int, int], what: str) -> pytest.MarkDecorator:
    """A mark for what needs a release."""
    pytest.importorskip("transformers")
    number = ".".join(map(str, oldest))
    return pytest.mark.skipif(release() < oldest, reason=f"transformers has {what} since {number}")


# Of peft 0.21 with release 4 of transformers, for the plain model too.
untied = pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning")
# Multimodal LLMs and training; the rest of covft supports older releases.
trained = since(OLDEST_TRAINED, "what covft's training needs")
