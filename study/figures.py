"""Figures of the report, as data URIs."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

import numpy as np

from study.data.tasks import TASKS
from study.inspection import Inspection

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, SOFT = "#1f2733", "#657084"
COLOURS = {"frozen": "#8a94a6", "covft": "#d9603b", "stage 1": "#3f7fbf", "backbone": "#4b9b6e"}


def _uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    # without pyplot, which has global state and may want a display
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _png(figure: Figure) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return _uri(stream.getvalue())


def _plain(axes: object) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(SOFT)
    axes.tick_params(colors=SOFT, labelsize=8)
    axes.title.set_color(INK)


def _in_order(tasks: list[str]) -> list[str]:
    """Return each task once, in the order of the tables."""
    return [task for task in TASKS if task in tasks]


def scene_image(pixels: np.ndarray) -> str:
    """Draw a scene at three times its size."""
    from PIL import Image

    stream = io.BytesIO()
    image = Image.fromarray(pixels)
    image.resize((image.width * 3, image.height * 3), Image.Resampling.NEAREST).save(stream, "PNG")
    return _uri(stream.getvalue())


def loss_curves(losses: dict[str, list[float]]) -> str:
    """Plot the losses of stage 1, of both methods in stage 2, and of the packaged backbone."""
    panels = [[name for name in names if name in losses] for names in (["stage 1"], ["frozen", "covft"], ["backbone"])]
    titles = ["Stage 1: projector", "Stage 2: instructions", "Packaged backbone: a few steps"]
    shown = [(title, names) for title, names in zip(titles, panels, strict=True) if names]
    figure = _figure(10, 3.1)
    for axes, (title, names) in zip(np.ravel(figure.subplots(1, len(shown))), shown, strict=True):
        for name in names:
            values = np.array(losses[name])
            window = max(1, len(values) // 30)
            smooth = np.convolve(values, np.ones(window) / window, "valid")
            steps = np.arange(len(smooth)) + window
            axes.plot(steps, smooth, color=COLOURS[name], lw=1.8, label=name)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("step", fontsize=8, color=SOFT)
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if len(names) > 1:
            axes.legend(frameon=False, fontsize=8)
        _plain(axes)
    return _png(figure)


def expert_weights(inspection: Inspection) -> str:
    """Draw a heat map of tasks by experts for each adapted block."""
    tasks = _in_order(inspection.tasks)
    figure = _figure(10, 0.32 * len(tasks) + 1.1)
    means = {
        layer: np.stack([weights.numpy()[[t == task for t in inspection.tasks]].mean(0) for task in tasks])
        for layer, weights in inspection.weights.items()
    }
    highest = max(mean.max() for mean in means.values())
    panels = np.ravel(figure.subplots(1, len(means), sharey=True))
    for axes, (layer, mean) in zip(panels, means.items(), strict=True):
        axes.imshow(mean, cmap="OrRd", vmin=0, vmax=highest, aspect="auto")
        for row, column in np.ndindex(*mean.shape):
            dark = mean[row, column] > 0.6 * highest
            axes.text(
                column, row, f"{mean[row, column]:.2f}", ha="center", va="center", fontsize=7,
                color="white" if dark else INK,
            )  # fmt: skip
        axes.set_title(f"block {layer}", fontsize=10, loc="left")
        axes.set_xticks(range(mean.shape[1]), [f"expert {e}" for e in range(mean.shape[1])])
        axes.set_yticks(range(len(tasks)), tasks)
        _plain(axes)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.tick_params(length=0)
    return _png(figure)


def context_map(inspection: Inspection) -> str:
    """Plot the first two principal components of each block's context vectors, coloured by task."""
    from matplotlib import colormaps
    from sklearn.decomposition import PCA

    tasks = _in_order(inspection.tasks)
    colours = colormaps["tab10"].colors
    figure = _figure(10, 3.6)
    panels = np.ravel(figure.subplots(1, len(inspection.contexts)))
    for axes, (layer, vectors) in zip(panels, inspection.contexts.items(), strict=True):
        pca = PCA(2, random_state=0)
        points = pca.fit_transform(vectors.numpy())
        for number, task in enumerate(tasks):
            mine = points[[t == task for t in inspection.tasks]]
            axes.scatter(*mine.T, s=9, alpha=0.75, lw=0, color=colours[number % 10], label=task)
        axes.set_title(f"block {layer}, {pca.explained_variance_ratio_.sum():.0%} of variance", fontsize=10, loc="left")
        axes.set_xticks([])
        axes.set_yticks([])
        _plain(axes)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=10, frameon=False, fontsize=8, markerscale=2)
    return _png(figure)
