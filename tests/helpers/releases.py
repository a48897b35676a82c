"""Tests that only some releases of transformers can run."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from covft.utils.transformers_names import OLDEST_TRAINED, release


def found(name: str) -> Any:
    """A class or module of transformers by its name; the test is skipped where the installed release lacks it."""
    transformers = pytest.importorskip("transformers")
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(f"transformers.{module}" if module else "transformers"), attribute)
    except (AttributeError, ImportError):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")


def since(oldest: tuple[int, int], what: str) -> pytest.MarkDecorator:
    """A mark for what needs a release."""
    pytest.importorskip("transformers")
    number = ".".join(map(str, oldest))
    return pytest.mark.skipif(release() < oldest, reason=f"transformers has {what} since {number}")


# Multimodal LLMs and training; the rest of covft supports older releases.
trained = since(OLDEST_TRAINED, "what covft's training needs")
