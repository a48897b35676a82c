"""The paper's table of one model: twelve benchmarks, three groups, the mean, beside the paper's own figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from covft.errors import ConfigError
from covft.integrations.evaluation.benchmarks import PAPER, entries_of
from covft.integrations.evaluation.scores import Scores, read_scores
from covft.metrics import PAPER_DIVISORS, PAPER_GROUPS, averages
from covft.utils.arguments import check_kinds
from covft.utils.tables import aligned

_FIGURES: dict[str, tuple[float, ...]] = {
    # Table 1, LLaVA-1.5 with CLIP-L/14-336 and Vicuna.
    "LLaVA-1.5-7B": (1510.7, 64.30, 58.30, 62.00, 66.80, 55.21, 58.20, 27.33, 56.21, 67.45, 54.98, 63.25),
    "Freeze 7B": (1473.7, 67.87, 60.30, 63.07, 69.31, 55.76, 58.53, 28.00, 56.73, 63.73, 49.61, 60.50),
    "Full fine-tuning 7B": (1510.2, 67.44, 59.88, 63.92, 67.67, 56.51, 59.70, 27.33, 55.82, 65.71, 51.97, 60.00),
    "VPT 7B": (1452.1, 67.10, 58.16, 63.17, 67.92, 56.08, 57.29, 24.67, 56.21, 65.09, 51.34, 58.67),
    "SVPT 7B": (1431.7, 66.58, 57.90, 63.26, 68.82, 56.54, 57.89, 29.33, 56.86, 65.34, 51.03, 59.29),
    "LoRA 7B": (1494.5, 67.44, 57.56, 63.98, 67.63, 55.76, 59.18, 28.66, 55.82, 64.22, 53.71, 59.83),
    "BitFit 7B": (1496.8, 67.27, 59.02, 63.43, 68.86, 56.77, 59.12, 31.33, 57.12, 65.34, 51.03, 60.67),
    "CoVFT 7B": (1525.2, 68.13, 60.40, 63.37, 69.51, 56.64, 59.64, 36.67, 57.52, 66.96, 56.08, 61.83),
    "LLaVA-1.5-13B": (1531.3, 67.70, 63.60, 63.30, 71.60, 59.16, 63.10, 30.67, 55.29, 66.82, 47.95, 63.00),
    "Freeze 13B": (1557.6, 69.93, 63.57, 63.73, 72.43, 60.20, 60.18, 34.00, 55.94, 65.09, 51.34, 62.83),
    "Full fine-tuning 13B": (1555.4, 68.56, 63.49, 64.83, 71.99, 59.94, 61.36, 34.00, 55.82, 64.22, 50.39, 63.25),
    "BitFit 13B": (1532.8, 70.02, 62.54, 63.98, 72.14, 59.52, 61.04, 38.00, 54.64, 63.22, 47.87, 66.50),
    "CoVFT 13B": (1590.6, 70.45, 64.52, 63.84, 72.90, 60.65, 61.79, 38.67, 58.04, 65.22, 51.34, 67.58),
    # Table 3, other towers and language models.
    "Freeze SigLIP-L/16 7B": (1393.4, 65.81, 58.33, 62.32, 70.85, 55.67, 58.79, 28.00, 56.60, 61.37, 46.45, 56.67),
    "CoVFT SigLIP-L/16 7B": (1466.8, 66.92, 60.74, 62.43, 69.96, 55.73, 61.57, 35.33, 57.65, 65.71, 50.71, 56.83),
    "Freeze DINOv3-L/16 7B": (1237.4, 57.56, 51.03, 60.43, 65.20, 53.76, 47.22, 15.33, 47.58, 58.26, 49.45, 59.25),
    "CoVFT DINOv3-L/16 7B": (1309.8, 58.33, 51.80, 62.50, 64.90, 52.95, 49.75, 20.00, 52.55, 67.08, 50.08, 62.17),
    "Full fine-tuning InternVL 2.0": (
        *(1502.2, 71.99, 66.75, 63.65, 90.18, 75.39),
        *(67.51, 37.33, 60.78, 72.05, 58.93, 70.42),
    ),
    "CoVFT InternVL 2.0": (1527.0, 75.95, 69.33, 64.47, 94.25, 77.46, 71.16, 44.00, 62.35, 72.80, 60.35, 72.83),
}
PAPER_FIGURES: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {row: MappingProxyType(dict(zip(PAPER, values, strict=True))) for row, values in _FIGURES.items()}
)
"""Rows of the CoVFT paper's Tables 1 and 3, by method and model. Table 3 names the two rows of InternVL 2.0 with
InternViT-300M and Phi-3-mini. All have the means that the paper prints, but BitFit 13B (61.34, printed 61.43) and CoVFT
13B (62.88, printed 62.90)."""

BESIDE = ("Freeze 7B", "Full fine-tuning 7B", "CoVFT 7B")
"""The rows that a table has beside a model by default."""


@dataclass(frozen=True)
class PaperTable:
    """The paper's table of one model.

    Attributes:
        scores: Its scores, what is missing, and where they stand.
        groups: Mean of each group that is complete, MME divided by 20.
        mean: Mean of all twelve; None unless all are there.
        beside: Rows of the paper, by name.
    """

    scores: Scores
    groups: Mapping[str, float]
    mean: float | None
    beside: Mapping[str, Mapping[str, float]]

    def __str__(self) -> str:
        """Return the table for a terminal, with notes."""
        columns = {"here": self.scores.values, **self.beside}
        lines = [["benchmark", *columns]]
        for group, members in PAPER_GROUPS.items():
            lines += [[name, *(_shown(column.get(name)) for column in columns.values())] for name in members]
            lines.append([f"  {group}", *(_shown(_mean_of(column, group)) for column in columns.values())])
        lines.append(["  mean of twelve", *(_shown(_mean_of(column, None)) for column in columns.values())])
        return "\n".join([*aligned(lines, right=True), "", *self._notes()])

    def _notes(self) -> list[str]:
        found, entries = self.scores, entries_of(self.scores.engine)
        notes = [f"missing   {name}: {reason}" for name, reason in found.missing.items()]
        notes += [f"partial   {name}: {asked} of {there} questions" for name, (asked, there) in found.partial.items()]
        notes += [f"asked     {name}: {entries[name].note}" for name in found.values if entries[name].note]
        return [f"engine    {found.engine}; MME is divided by {PAPER_DIVISORS['MME']:g} in the means", *notes]


@check_kinds
def paper_table(folder: str | Path, *, engine: str | None = None, beside: Sequence[str] = BESIDE) -> PaperTable:
    """Make the paper's table from an engine's result files.

    Args:
        folder: A folder of results, as for `read_scores`.
        engine: `"lmms-eval"` or `"vlmevalkit"`; None finds out.
        beside: Rows of the paper, names in `PAPER_FIGURES`.

    Raises:
        ConfigError: If a row or the engine is not known.
        EvaluationError: As for `read_scores`.
    """
    unknown = [row for row in beside if row not in PAPER_FIGURES]
    if unknown:
        raise ConfigError(
            f"The paper's tables have no row {unknown[0]!r}.", expected=" | ".join(PAPER_FIGURES), got=unknown[0]
        )
    scores = read_scores(folder, PAPER, engine=engine)
    groups = {group: mean for group in PAPER_GROUPS if (mean := _mean_of(scores.values, group)) is not None}
    return PaperTable(scores, groups, _mean_of(scores.values, None), {row: PAPER_FIGURES[row] for row in beside})


def _mean_of(scores: Mapping[str, float], group: str | None) -> float | None:
    """Return the mean of a group, or of all twelve; None if a score of it is missing."""
    groups = {name: members for name, members in PAPER_GROUPS.items() if group in (None, name)}
    if any(name not in scores for members in groups.values() for name in members):
        return None
    return averages(scores, groups).mean


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if value > 100 else f"{value:.2f}"
