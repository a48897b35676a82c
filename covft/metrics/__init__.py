"""Scores for answers, averages over benchmarks, what tuning improved and what it forgot, and how sure a difference is.

    answers.py      exact match, option letters, pairs
    boxes.py        overlap of boxes
    captions.py     CIDEr, by pycocoevalcap
    averages.py     the means of the CoVFT paper
    forgetting.py   improvement, forgetting and their balance
    statistics.py   bootstrap intervals, sign test, Holm's correction

None of them needs a model: they take answers or scores.
"""

from covft.metrics.answers import exact_match, option_letter, pair_hits, paired_accuracy
from covft.metrics.averages import PAPER_DIVISORS, PAPER_GROUPS, Averages, averages
from covft.metrics.boxes import iou
from covft.metrics.captions import cider
from covft.metrics.forgetting import ForgettingReport, forgetting, forgotten, improvement, overall
from covft.metrics.statistics import Difference, Estimate, bootstrap, holm, paired_bootstrap, sign_test

__all__ = [
    "PAPER_DIVISORS",
    "PAPER_GROUPS",
    "Averages",
    "Difference",
    "Estimate",
    "ForgettingReport",
    "averages",
    "bootstrap",
    "cider",
    "exact_match",
    "forgetting",
    "forgotten",
    "holm",
    "improvement",
    "iou",
    "option_letter",
    "overall",
    "pair_hits",
    "paired_accuracy",
    "paired_bootstrap",
    "sign_test",
]
