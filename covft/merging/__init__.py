"""covft.merge(): a plain ViT in the place of a tuned one, exact where that is possible, else with its error.

merge.py         merge()
average.py       one FFN in the place of each mixture: the average of its experts
measuring.py     how far features and answers move, and what is lost where
distillation.py  the mixture's features, distilled into these FFNs
report.py        MergeReport
"""

from covft.merging.merge import merge
from covft.merging.report import BlockLoss, MergeReport, Shift

__all__ = ["BlockLoss", "MergeReport", "Shift", "merge"]
