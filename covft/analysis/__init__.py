"""What a context-aware tower does: recorded, counted, drawn.

    recording.py   record(): contexts and routing of samples, in bounded memory
    samples.py     which data can be read: any iterable of images, texts and kinds, or a data set of covft.data
    stats/         numbers: contexts, routing, attention, experts, overhead; distances and gradient conflict
    plots/         figures of the numbers, with matplotlib
    audit.py       does a tower inside a multimodal LLM use its text?
    diagnosis/     covft.diagnose(): freeze, tune, LoRA or context? before any training
    report/        one HTML page of a folder

Needs `pip install "covft[analysis]"` for clusters, components, figures and reports. Nothing is recorded unless it is
asked for, and nothing is left in the tower afterwards.
"""

import importlib
from typing import TYPE_CHECKING, Any

from covft.analysis.recording import Recording, record
from covft.analysis.samples import Batch, Sample, batches

if TYPE_CHECKING:
    from covft.analysis import plots as plots
    from covft.analysis import stats as stats
    from covft.analysis.report import write_report as write_report

__all__ = ["Batch", "Recording", "Sample", "batches", "plots", "record", "stats", "write_report"]


def __getattr__(name: str) -> Any:
    if name in ("plots", "stats"):
        return importlib.import_module(f"covft.analysis.{name}")
    if name == "write_report":
        return importlib.import_module("covft.analysis.report").write_report
    raise AttributeError(f"module 'covft.analysis' has no attribute {name!r}")
