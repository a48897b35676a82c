"""Sections with maps over images: attention, and two questions compared."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

import numpy as np

from covft.analysis.report.drawing import overlay, png
from covft.analysis.stats.attention import AttentionMaps, QuestionMaps


def attention(found: AttentionMaps) -> str:
    """Return the section about where the context looks.

    Args:
        found: The maps.
    """
    layers = sorted(found.maps)
    figures = []
    for row, picture in enumerate(found.pictures):
        maps = {layer: found.maps[layer][row] for layer in layers}
        said = {layer: _looks(maps[layer], float(found.prefix[layer][row])) for layer in layers}
        figures.append(stack(picture, maps, said, found.texts[row] or f"image {row + 1}"))
    return (
        "<p>How much each adapted block's context attends to each patch, the mean over its heads. Bright is the most "
        "of that map; maps of different layers have different scales.</p>"
        f"{slider('attention', layers)}<div class='maps' data-maps='attention'>{''.join(figures)}</div>"
    )


def questions(found: QuestionMaps) -> str:
    """Return the section about two questions on one image.

    Args:
        found: What moves between them.
    """
    layers = sorted(found.moved)
    top = max(float(values.max()) for values in found.moved.values())
    said = {layer: f"mean {values.mean():.3f}, largest {values.max():.3f}" for layer, values in found.moved.items()}
    figures = [stack(found.picture, found.moved, said, "features that move", top)]
    for number, text in enumerate(found.texts):
        maps = {layer: values[number] for layer, values in found.attention.items()}
        if maps:
            told = {layer: _looks(values) for layer, values in maps.items()}
            figures.append(stack(found.picture, {**dict.fromkeys(layers), **maps}, told, f"attention for: {text}"))
    rows = [
        f"<tr><th scope='row'>{layer}</th>" + "".join(f"<td>{_listed(row)}</td>" for row in weights) + "</tr>"
        for layer, weights in sorted(found.weights.items())
    ]
    asked = [html.escape(text) for text in found.texts]
    routed = (
        "<details><summary>Routing weights for both questions</summary><table><thead><tr><th scope='col'>layer</th>"
        f"<th scope='col'>{asked[0]}</th><th scope='col'>{asked[1]}</th></tr></thead><tbody>{''.join(rows)}</tbody>"
        "</table></details>"
    )
    return (
        f"<p>One image, asked <q>{asked[0]}</q> and <q>{asked[1]}</q>. How far the features of each patch move between "
        "the two after each block, relative to their size: 0 is not at all, 2 is the most there can be.</p>"
        f"{slider('questions', layers)}<div class='maps' data-maps='questions'>{''.join(figures)}</div>"
        f"{routed if rows else ''}"
    )


def slider(name: str, layers: list[int]) -> str:
    """Return a control that chooses the layer of all maps of a section.

    Args:
        name: Of the section.
        layers: The layers.
    """
    last = len(layers) - 1
    return (
        f"<p class='control'><label for='{name}-layer'>Layer</label> <input type='range' id='{name}-layer' min='0' "
        f"max='{last}' value='{last}' data-layers='{' '.join(map(str, layers))}' aria-valuetext='layer {layers[-1]}'> "
        f"<output for='{name}-layer'>{layers[-1]}</output></p>"
    )


def stack(
    picture: np.ndarray,
    maps: Mapping[int, np.ndarray | None],
    said: Mapping[int, str],
    title: str,
    top: float | None = None,
) -> str:
    """Return a picture with one map over it for each layer, of which the last shows.

    Args:
        picture: Shape `(side, side, 3)`.
        maps: Maps by layer; None where a layer has none.
        said: What each map shows, in words.
        title: Its title.
        top: The brightest value of all maps; None takes that of each.
    """
    layers = sorted(maps)
    images, notes = [], []
    for place, layer in enumerate(layers):
        hidden = "" if place == len(layers) - 1 else " hidden"
        values = maps[layer]
        note = f"layer {layer}: no map" if values is None else f"layer {layer}: {said[layer]}"
        if values is not None:
            images.append(
                f"<img class='over' data-at='{place}' alt='' src='{overlay(values, top)}'{_inset(values)}{hidden}>"
            )
        notes.append(f"<span data-at='{place}'{hidden}>{html.escape(note)}</span>")
    text = html.escape(title, quote=True)
    return (
        f"<figure><div class='stack'><img src='{png(picture)}' alt='{text}'>{''.join(images)}</div>"
        f"<figcaption><strong>{text}</strong><br>{''.join(notes)}</figcaption></figure>"
    )


def _inset(values: np.ndarray) -> str:
    """Place a map over the part of a square picture that its image fills."""
    rows, columns = values.shape
    upright, across = (50 * (1 - min(1, rows / columns)), 50 * (1 - min(1, columns / rows)))
    return f" style='inset:{upright:.2f}% {across:.2f}%;width:{100 - 2 * across:.2f}%;height:{100 - 2 * upright:.2f}%'"


def _looks(values: np.ndarray, prefix: float | None = None) -> str:
    row, column = np.unravel_index(int(values.argmax()), values.shape)
    told = f"most at row {row + 1} of {values.shape[0]}, column {column + 1} of {values.shape[1]}"
    return told if prefix is None else f"{told}; {100 * prefix:.0f} % on class token and registers"


def _listed(weights: Any) -> str:
    return ", ".join(f"{weight:.2f}" for weight in weights)
