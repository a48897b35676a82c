"""VLMEvalKit's run.py, for local rows under the names of its data sets: it takes no checksums of their files.

VLMEVALKIT is its clone.
"""

import os
import sys

sys.path.insert(0, os.environ["VLMEVALKIT"])

from run import load_env, main
from vlmeval.dataset import DATASET_CLASSES

__all__ = ["load_env", "main"]

for dataset in DATASET_CLASSES:
    if hasattr(dataset, "DATASET_MD5"):
        dataset.DATASET_MD5 = {}
