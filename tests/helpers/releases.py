"""Tests that only some releases of transformers can run."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from typing import Any

import pytest

from covft.utils.transformers_names import OLDEST_TRAINED


def installed() -> tuple[int, int] | None:
    """Major and minor number of the installed transformers, without importing it; None if there is none."""
    try:
        major, minor = re.findall(r"\d+", importlib.metadata.version("transformers"))[:2]
    except importlib.metadata.PackageNotFoundError:
        return None
    return int(major), int(minor)


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
    from benchmarks.coverage import transformers_cases as cases

    folder, file, _ = cases.all_cases()[name]
    found(f"models.{folder}.modeling_{file or folder}.{name}")
    return cases.build(name)


def needs(owner: Any, name: str) -> None:
    """Skip the test where something of the installed release lacks an attribute."""
    if not hasattr(owner, name):
        version = pytest.importorskip("transformers").__version__
        pytest.skip(f"{type(owner).__name__} of transformers {version} has no {name}")


def needs_hidden_states(owner: Any, output: Any) -> None:
    """Skip the test where a tower of the installed release does not return its hidden states."""
    if getattr(output, "hidden_states", None) is None:
        version = pytest.importorskip("transformers").__version__
        pytest.skip(f"{type(owner).__name__} of transformers {version} does not return hidden states")


def skip_before(oldest: tuple[int, int], what: str) -> None:
    """Skip the test where the installed release is older than the first that has something."""
    if (release := installed()) is None or release < oldest:
        pytest.skip(f"transformers {release} does not have {what}; {oldest} does")


def since(oldest: tuple[int, int], what: str) -> pytest.MarkDecorator:
    """A mark for what needs a release."""
    release = installed()
    reason = f"transformers {release} does not have {what}; {oldest} does"
    return pytest.mark.skipif(release is None or release < oldest, reason=reason)


# Multimodal LLMs and training; the rest of covft supports older releases.
trained = since(OLDEST_TRAINED, "what covft's training needs")
# Of peft 0.21 with release 4 of transformers, for the plain model too.
untied = pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning")
