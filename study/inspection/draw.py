"""Figures of a trained covft, from the numbers that `python -m study inspect` wrote, and of the diagnoses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from study.data.tasks import TASKS
from study.results import marks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GROUP_COLOURS = dict(
    zip(dict.fromkeys(task.group for task in TASKS.values()), ("#3f8fd0", "#e0703a", "#3f9f6f", "#a878c8"), strict=True)
)
CLUSTER_COLOURS = ("#3f8fd0", "#e0703a", "#3f9f6f", "#a878c8", "#b8902a", "#4aa3a3", "#cf6a8e", "#8a94a6")
DRAWN_PAIRS = 500
PAPER = {"full": (0.076, 0.112), "covft": (0.189, 0.051)}  # mean and deviation of its Fig. 5
COLOURS_OF_PAIRS = (marks.COLOURS["covft"], "#a878c8", marks.COLOURS["full"])
WEIGHTS = {"tower": "all trained weights of the tower", "ffns": "FFNs of the adapted blocks alone"}


def draw_contexts(found: Mapping[str, Any]) -> Figure:
    """Draw contexts along two principal components, by group of tasks and by cluster (Fig. 3a of the paper)."""
    figure, (left, right) = marks.panels(7.2, 3.2, 2, sharex=True, sharey=True)
    contexts = found["trained_tower"]["contexts"]
    points, labels = np.array(contexts["points"]), np.array(contexts["labels"])
    groups = np.array([TASKS[task].group for task in contexts["tasks"]])
    for group, colour in GROUP_COLOURS.items():
        own = groups == group
        left.plot(*points[own].T, ".", color=colour, ms=3, alpha=0.7, label=group)
    for cluster in range(labels.max() + 1):
        own = labels == cluster
        right.plot(*points[own].T, ".", color=CLUSTER_COLOURS[cluster], ms=3, alpha=0.7, label=f"cluster {cluster}")
    for axes, title in ((left, "group of the task"), (right, f"k-means, silhouette {contexts['silhouette']:.2f}")):
        axes.set_title(title)
        axes.set_xlabel(f"component 1, {contexts['explained'][0]:.0%}")
        axes.legend(fontsize=7, markerscale=2)
    left.set_ylabel(f"component 2, {contexts['explained'][1]:.0%}")
    return figure


def draw_routing(found: Mapping[str, Any]) -> Figure:
    """Draw the mean weight of each expert for each task, by block."""
    layers = found["trained_tower"]["routing"]["layers"]
    figure, panels = marks.panels(7.2, 3.6, len(layers), sharey=True)
    tasks = [task for task in TASKS if task in next(iter(layers.values()))["by_task"]]
    for axes, (layer, one) in zip(panels, layers.items(), strict=True):
        weights = np.array([one["by_task"][task] for task in tasks])
        axes.imshow(weights, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        for (row, column), weight in np.ndenumerate(weights):
            ink = "white" if weight < 0.6 else "black"
            axes.text(column, row, f"{weight:.2f}", ha="center", va="center", fontsize=6.5, color=ink)
        axes.set_title(f"block {layer}")
        axes.set_xticks(range(weights.shape[1]), [f"{expert}" for expert in range(weights.shape[1])])
        axes.set_xlabel("expert")
        axes.set_yticks(range(len(tasks)), tasks)
        axes.tick_params(length=0)
    return figure


def draw_correlation(found: Mapping[str, Any]) -> Figure:
    """Draw pairs of questions: how alike their contexts and their routing are (Fig. 3b of the paper)."""
    figure, panels = marks.panels(7.2, 3, 2, sharex=True)
    for axes, (name, title) in zip(
        panels, (("untrained_tower", "before training"), ("trained_tower", "trained")), strict=True
    ):
        routing = found[name]["routing"]
        axes.set_xlabel("cosine of contexts")
        if routing["r"] is None:
            axes.set_title(f"{title}: all are routed alike")
            continue
        r = routing["r"]
        axes.plot(*np.array(routing["pairs"])[:, :DRAWN_PAIRS], ".", color=marks.COLOURS["covft"], ms=2, alpha=0.35)
        axes.set_title(f"{title}: r = {r['r']:.2f} [{r['low']:.2f}, {r['high']:.2f}]")
    panels[0].set_ylabel("cosine of routing weights")
    return figure


def draw_updates(found: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw cosines of gradients with their dominant direction, of full tuning and of covft (Fig. 5 of the paper)."""
    figure, panels = marks.panels(7.2, 2.8, len(WEIGHTS), sharey=True)
    bins = np.linspace(-1, 1, 41)
    for axes, (name, title) in zip(panels, WEIGHTS.items(), strict=True):
        for method in found:
            cosines = np.array(found[method]["updates"][name])
            label = f"{method}: {cosines.mean():.3f} ± {cosines.std(ddof=1):.3f}"
            axes.hist(cosines, bins, alpha=0.6, color=marks.COLOURS[method], label=label)
        axes.set_title(title)
        axes.set_xlabel("cosine with the dominant direction")
        axes.legend()
    panels[0].set_ylabel("updates")
    return figure


def draw_conflict(diagnoses: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw the separation of two kinds by block, for tasks against each other and for halves of one."""
    figure, (axes,) = marks.panels(6, 2.8)
    for place, (name, one) in enumerate(diagnoses.items()):
        conflict = one["conflict"]
        label = f"{name}, p = {conflict['p_values'][-1]:.3f}"
        colour = marks.COLOURS["covft"] if not place else marks.colour("", place)
        axes.plot(conflict["layers"], conflict["separation"][:-1], "o-", color=colour, label=label)
    marks.zero(axes, vertical=False)
    axes.set_xlabel("block")
    axes.set_ylabel("separation of gradients")
    axes.legend()
    return figure


def draw_agreement(gains: Mapping[str, float], predicted: Mapping[str, Mapping[str, float]]) -> Figure:
    """Draw the gain of covft over full tuning on each task, by rank, over each predictor of the diagnosis."""
    figure, panels = marks.panels(7.2, 2.8, len(predicted), sharey=True)
    ranked = sorted(gains, key=lambda task: gains[task])
    for axes, (name, values) in zip(panels, predicted.items(), strict=True):
        for rank, task in enumerate(ranked, 1):
            axes.plot(values[task], rank, "o", color=GROUP_COLOURS[TASKS[task].group], ms=5)
        axes.set_xlabel(name)
        axes.grid(axis="y")
    panels[0].set_yticks(range(1, len(ranked) + 1), ranked)
    panels[0].tick_params(axis="y", length=0)
    return figure


def draw_distance(found: Sequence[Mapping[str, Any]], groups: Mapping[str, Sequence[str]]) -> Figure:
    """Draw how far pairs of towers are apart, over training and by block (Fig. 1c of the paper); a line for each pair.

    Args:
        found: What `study.inspection.distance.measure` returned, by seed.
        groups: Keys of the pairs of each group, by its label.
    """
    figure, (left, right) = marks.panels(7.2, 3.1, 2)
    for colour, (label, pairs) in zip(COLOURS_OF_PAIRS, groups.items(), strict=True):
        lines = [one["pairs"][pair] for one in found for pair in pairs]
        for number, line in enumerate(lines):
            style = {"color": colour, "ms": 2.5, "lw": 1, "alpha": 0.75, "label": None if number else label}
            left.plot([0, *found[0]["steps"]], [0, *(step[""][0] for step in line)], "o-", **style)
            blocks = [block for block in line[-1] if block]
            right.plot(blocks, [line[-1][block][0] for block in blocks], "o-", **style)
    left.set_xlabel("step")
    left.set_ylabel("L2 distance of two towers")
    left.set_title("all weights")
    right.set_xlabel("block")
    right.set_title(f"each block, after {found[0]['steps'][-1]} steps")
    for axes in (left, right):
        axes.set_ylim(bottom=0)
    right.legend(loc="lower left")
    return figure


def write(folder: Path, name: str, draw: Callable[[], Figure]) -> str:
    """Write a figure in the style of the study; return the name of its file."""
    import matplotlib as mpl

    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(marks.SETTINGS):
        figure = draw()
    marks.save(figure, folder / f"{name}.svg")
    return f"{name}.svg"
