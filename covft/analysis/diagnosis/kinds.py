"""Finds kinds of instruction: k-means on features of the texts, their number by the silhouette."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from covft.analysis.diagnosis.entries import Entry
from covft.analysis.stats.arrays import unit_rows
from covft.analysis.stats.contexts import Clusters, cluster
from covft.errors import ConfigError
from covft.text.resolve import as_text_encoder
from covft.utils.extras import import_library

MOST_KINDS = 8


def find_kinds(entries: Sequence[Entry], text_encoder: Any, seed: int) -> tuple[list[str], float]:
    """Find kinds of instruction.

    Args:
        entries: The entries, with texts.
        text_encoder: As for `covft.wrap`; None weighs the words of the texts (TF-IDF).
        seed: Of k-means.

    Returns:
        The kind of each entry, named by the text nearest to its centre; and the mean silhouette, from -1 to 1.

    Raises:
        ConfigError: If entries have no text, or there are fewer than three different ones.
        MissingDependencyError: If scikit-learn is not installed.
    """
    texts = [entry.text for entry in entries]
    if any(text is None for text in texts):
        raise ConfigError(
            "Some entries have no text, so kinds of instruction cannot be found.",
            expected="a text for each, or kinds",
            got=f"{sum(text is None for text in texts)} of {len(texts)} without",
            fix="covft.diagnose(model, data, kinds=[...])",
        )
    import_library("sklearn", "analysis", needed_by="Finding kinds of instruction")
    features = _features(texts, text_encoder)
    different = len(np.unique(features.round(6), axis=0))
    if different < 3:
        raise ConfigError(
            "The entries have too few different texts to find kinds of instruction.",
            expected="3 or more, or kinds",
            got=different,
            fix="covft.diagnose(model, data, kinds=[...])",
        )
    found = cluster(features, range(2, min(MOST_KINDS, different - 1) + 1), nearest=1, seed=seed)
    return _named(found, texts), found.silhouette


def _features(texts: Sequence[Any], text_encoder: Any) -> np.ndarray:
    """Return features of unit length, `(N, C)`."""
    if all(torch.is_tensor(text) for text in texts):
        found = torch.stack(list(texts)).float().cpu().numpy()
    elif text_encoder is not None:
        encoder = as_text_encoder(text_encoder)
        assert encoder is not None, "given"
        with torch.no_grad():
            found = encoder.encode(list(texts)).float().cpu().numpy()
    else:
        text = import_library("sklearn.feature_extraction.text", "analysis", needed_by="Finding kinds of instruction")
        found = text.TfidfVectorizer(token_pattern=r"(?u)\b\w+\b|\?").fit_transform(texts).toarray()
    return unit_rows(found)


def _named(found: Clusters, texts: Sequence[Any]) -> list[str]:
    """Name each cluster by its number, by size, and the text nearest to its centre."""
    order = np.argsort(-np.array(found.sizes), kind="stable")
    names = {}
    for number, label in enumerate(order):
        example = texts[found.nearest[label][0]]
        names[label] = f"{number + 1}" if torch.is_tensor(example) else f"{number + 1}: {_cut(example)}"
    return [names[label] for label in found.labels]


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 40 else f"{text[:37]}..."
