"""CIDEr of captions, by pycocoevalcap."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence

from covft.errors import ShapeError
from covft.utils.arguments import check_kinds
from covft.utils.extras import import_library


@check_kinds
def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    r"""Score captions by the words and phrases that they share with references: CIDEr-D.

    $\mathrm{CIDEr}(c, S) = \frac{10}{4\,|S|} \sum_{n=1}^{4} \sum_{s \in S} e^{-(l_c - l_s)^2 / 72}\,
    \frac{\min(g_n(c), g_n(s)) \cdot g_n(s)}{\|g_n(c)\|\,\|g_n(s)\|}$, where $g_n$ are the counts of n-grams, weighed
    down by the share of images whose references have them, and $l$ are lengths (Vedantam et al., "CIDEr",
    arXiv 1411.5726). pycocoevalcap, the reference implementation, does the scoring.

    Its own tokenisation is a Java program. This one needs no Java: lower case, words without punctuation, `'s` and
    `n't` as words of their own.

    Args:
        captions: One caption per image.
        references: The references of each image.

    Returns:
        The score of each caption, from 0 to 10. The score of a model is their mean; papers report 100 times that.

    Raises:
        MissingDependencyError: If pycocoevalcap is not installed.
        ShapeError: If there are fewer than two images, or an image has no reference.

    Example:
        >>> scores = cider(["a red cup", "two dogs"], [["a red cup"], ["two dogs run"]])
        >>> scores[0] > scores[1]
        True
    """
    if len(captions) != len(references):
        raise ShapeError(
            "Each caption has its list of references.", expected=f"{len(captions)} lists", got=len(references)
        )
    if len(captions) < 2:
        raise ShapeError(
            "CIDEr weighs words by the share of images that have them, so that it is 0 for a single image.",
            expected="at least 2 images",
            got=len(captions),
        )
    for number, texts in enumerate(references):
        if len(texts) == 0:
            raise ShapeError(f"Image {number} cannot be scored.", expected="at least 1 reference", got=0)
    import_library("pycocoevalcap", "metrics", needed_by="covft.metrics.cider()")
    scorer = importlib.import_module("pycocoevalcap.cider.cider").Cider()
    _, scores = scorer.compute_score(
        {number: [_tokens(text) for text in texts] for number, texts in enumerate(references)},
        {number: [_tokens(text)] for number, text in enumerate(captions)},
    )
    return [float(score) for score in scores]


def _tokens(caption: str) -> str:
    """Return the words of a caption, separated by spaces, close to those of the Penn Treebank tokenizer."""
    text = re.sub(r"n't\b", " n't", caption.lower().replace("\u2019", "'"))
    return " ".join(re.findall(r"n't|\w+(?:[-.:/]\w+)*|'\w+", text))
