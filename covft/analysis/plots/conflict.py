"""Figures of distances, of gradient conflict and of probe trainings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from covft.analysis.diagnosis.probe import Probe
from covft.analysis.stats.conflict import Conflict, Dominance
from covft.analysis.stats.distance import ParameterDistance
from covft.errors import ConfigError
from covft.utils.arguments import check_kinds
from covft.utils.extras import import_library

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:
    Figure = Any


@check_kinds
def plot_distance(distances: Mapping[str, ParameterDistance] | Sequence[ParameterDistance]) -> Figure:
    """Draw relative distances by block: a line for each pair of towers, or each checkpoint (the paper's Fig. 1c).

    Args:
        distances: By label, or in the order of training.
    """
    named = distances if isinstance(distances, Mapping) else {str(n): one for n, one in enumerate(distances)}
    figure, axes = _figure("block", "relative distance of the weights")
    for label, one in named.items():
        blocks = [block for block in one.blocks if block]
        axes.plot(range(len(blocks)), [one.blocks[block].relative for block in blocks], marker="o", label=label)
    axes.legend()
    return figure


@check_kinds
def plot_dominance(found: Mapping[str, Dominance]) -> Figure:
    """Draw the distributions of cosines with the dominant direction (the paper's Fig. 5).

    Args:
        found: By label.
    """
    figure, axes = _figure("cosine with the dominant direction", "updates")
    bins = np.linspace(-1, 1, 41)
    for label, one in found.items():
        axes.hist(one.cosines, bins, alpha=0.6, label=f"{label}: {one.mean.mean:.3f} ± {one.std:.3f}")
    axes.legend()
    return figure


@check_kinds
def plot_layers(found: Conflict) -> Figure:
    """Draw the alignment of each pair of kinds by block, with its interval; the line at 0.5 is that of the verdict.

    Args:
        found: The conflict.
    """
    figure, axes = _figure("block", "alignment of the kinds' gradients")
    pairs = list(found.pairs())
    for number, (a, b) in enumerate(pairs):
        middle, low, high = (values[:-1, a, b] for values in (found.alignment, found.low, found.high))
        shift = 0.3 * (number / max(len(pairs) - 1, 1) - 0.5) if len(pairs) > 1 else 0.0
        around = np.abs(np.stack([np.minimum(low, middle), np.maximum(high, middle)]) - middle)
        label = f"{found.kinds[a]} | {found.kinds[b]}"
        axes.errorbar(np.array(found.layers) + shift, middle, around, marker="o", capsize=2, linestyle="", label=label)
    axes.axhline(0.5, linestyle=":", color="grey")
    axes.set_ylim(-1.05, 1.05)
    axes.legend()
    return figure


@check_kinds
def plot_pairs(found: Conflict, layer: int | None = None) -> Figure:
    """Draw the mean cosines of all pairs of kinds as a table of colours.

    Args:
        found: The conflict.
        layer: The block; None takes the mean over the blocks.

    Raises:
        ConfigError: If there is no such block.
    """
    if layer is not None and layer not in found.layers:
        raise ConfigError(f"layer={layer} is not a measured block.", expected=found.layers, got=layer)
    values = found.cosines[-1 if layer is None else found.layers.index(layer)]
    return _table(values, found.kinds, found.kinds, "mean cosine of gradients", "+.3f")


@check_kinds
def plot_probe(found: Probe) -> Figure:
    """Draw what training on each kind does to the loss of each, as a table of colours; below 0 is better.

    Args:
        found: The probe trainings.
    """
    kinds = list(found.before)
    rows = [*[[found.alone[one][other].mean for other in kinds] for one in kinds], [found.joint[k].mean for k in kinds]]
    trained = [*(f"trained on {kind}" for kind in kinds), "trained on all"]
    return _table(np.array(rows), trained, kinds, "change of the loss", "+.4f")


def _figure(x: str, y: str) -> tuple[Any, Any]:
    library = import_library("matplotlib.figure", "analysis", needed_by="This figure")
    figure = library.Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def _table(values: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str, form: str) -> Any:
    figure, axes = _figure("", "")
    most = float(np.nanmax(np.abs(values))) or 1.0
    axes.imshow(values, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=20, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_title(title)
    for (row, column), value in np.ndenumerate(values):
        axes.text(column, row, format(value, form), ha="center", va="center")
    return figure
