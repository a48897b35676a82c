"""Figures of the page, as data URIs. Backgrounds are transparent, and ink is read on light and dark pages."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from study.results.marks import COLOURS, INK, OTHERS, SETTINGS, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 10.0
_MARKERS = "os^D"


def scene_image(pixels: np.ndarray) -> str:
    """Draw a scene at three times its size."""
    from PIL import Image

    stream = io.BytesIO()
    image = Image.fromarray(pixels)
    image.resize((image.width * 3, image.height * 3), Image.Resampling.NEAREST).save(stream, "PNG")
    return _uri(stream.getvalue())


def loss_curves(losses: Mapping[str, Sequence[float]], backbone: Sequence[float]) -> str:
    """Plot the losses of the runs, and of the packaged backbone."""
    from matplotlib import rc_context

    with rc_context(SETTINGS):
        figure, (left, right) = panels(WIDTH, 3.2, 2)
        for place, (name, values) in enumerate(losses.items()):
            colour = COLOURS.get(name) or OTHERS[place % len(OTHERS)]
            left.plot(100 * (np.arange(len(values)) + 0.5) / len(values), values, color=colour, lw=1.6, label=name)
        left.set_title("Instructions")
        left.legend()
        right.plot(100 * (np.arange(len(backbone)) + 0.5) / max(1, len(backbone)), backbone, color=OTHERS[0], lw=1.6)
        right.set_title("Packaged backbone: a few steps")
        for axes in (left, right):
            axes.set_xlabel("percent of the training")
            axes.set_ylabel("loss")
            axes.set_ylim(bottom=0)
        return _png(figure)


def expert_weights(weights: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Draw a heat map of tasks by experts for each adapted block."""
    from matplotlib import rc_context

    means = {layer: np.array(list(by_task.values())) for layer, by_task in weights.items()}
    tasks = list(next(iter(weights.values())))
    highest = max(mean.max() for mean in means.values())
    with rc_context(SETTINGS):
        figure, found = panels(WIDTH, 0.32 * len(tasks) + 1.0, len(means), sharey=True)
        for axes, (layer, mean) in zip(found, means.items(), strict=True):
            axes.imshow(mean, cmap="OrRd", vmin=0, vmax=highest, aspect="auto")
            for row, column in np.ndindex(*mean.shape):
                ink = "white" if mean[row, column] > 0.6 * highest else "#1f2733"
                axes.text(column, row, f"{mean[row, column]:.2f}", ha="center", va="center", fontsize=7, color=ink)
            axes.set_title(f"block {layer}")
            axes.set_xticks(range(mean.shape[1]), [f"expert {e}" for e in range(mean.shape[1])])
            axes.set_yticks(range(len(tasks)), tasks)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        return _png(figure)


def context_map(contexts: Mapping[str, Mapping[str, Any]]) -> str:
    """Plot context vectors in two dimensions for each adapted block, coloured by task."""
    from matplotlib import colormaps, rc_context

    colours = colormaps["tab10"].colors  # type: ignore[attr-defined]
    with rc_context(SETTINGS):
        figure, found = panels(WIDTH, 3.8, len(contexts))
        for axes, (layer, context) in zip(found, contexts.items(), strict=True):
            for number, (task, points) in enumerate(context["points"].items()):
                marker = _MARKERS[number // len(colours) % len(_MARKERS)]
                colour = colours[number % len(colours)]
                axes.scatter(*np.array(points).T, s=10, alpha=0.75, lw=0, color=colour, marker=marker, label=task)
            axes.set_title(f"block {layer}, {context['share']:.0%} of the variance")
            axes.set_xticks([])
            axes.set_yticks([])
        handles, labels = found[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=7, labelcolor=INK, markerscale=2)
        return _png(figure)


def _png(figure: Figure) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150, transparent=True)
    return _uri(stream.getvalue())


def _uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()
