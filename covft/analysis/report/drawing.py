"""Pictures, colours and lines for the page, as text that stands in it."""

from __future__ import annotations

import base64
import html
import importlib
import io
from typing import Any

import numpy as np

from covft.utils.extras import import_library

# Of `matplotlib`'s inferno, from dark to bright, as that is perceptually even.
_HOT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))


def png(pixels: np.ndarray) -> str:
    """Encode a picture as the address of an image, which needs no file.

    Args:
        pixels: Shape `(height, width, 3)` or with 4 channels, from 0 to 255.
    """
    import_library("PIL", "analysis", needed_by="A report with pictures")
    file = io.BytesIO()
    picture: Any = importlib.import_module("PIL.Image").fromarray(pixels)
    picture.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def sheet(pictures: np.ndarray) -> tuple[str, int]:
    """Encode many small pictures as one image.

    Args:
        pictures: Shape `(N, side, side, 3)`.

    Returns:
        The image's address, and how many pictures a row has.
    """
    columns = max(int(np.ceil(np.sqrt(len(pictures)))), 1)
    rows, side = -(-len(pictures) // columns), pictures.shape[1]
    whole = np.zeros((rows * columns, side, side, 3), dtype=np.uint8)
    whole[: len(pictures)] = pictures
    joined = whole.reshape(rows, columns, side, side, 3).swapaxes(1, 2).reshape(rows * side, columns * side, 3)
    return png(joined), columns


def overlay(values: np.ndarray, top: float | None = None) -> str:
    """Encode a map as a small coloured image, transparent where its values are low.

    Args:
        values: Shape `(h, w)`.
        top: The value that is brightest; None takes the map's largest.
    """
    shares = np.clip(values / (top or float(values.max()) or 1.0), 0, 1)
    marks = np.linspace(0, 1, len(_HOT))
    colours = np.stack([np.interp(shares, marks, [colour[i] for colour in _HOT]) for i in range(3)], axis=-1)
    alpha = 60 + 150 * shares[..., None]
    return png(np.concatenate([colours, alpha], axis=-1).round().astype(np.uint8))


def line(name: str, steps: list[float], values: list[float]) -> str:
    """Draw a curve as SVG, with what it shows in words for those who do not see it.

    Args:
        name: What it is a curve of.
        steps: Positions.
        values: Values, as many.
    """
    width, height, pad = 320.0, 120.0, 6.0
    low, high = min(values), max(values)
    start, span = steps[0], (steps[-1] - steps[0]) or 1
    points = [
        (pad + (width - 2 * pad) * (step - start) / span, height - pad - (height - 2 * pad) * _share(value, low, high))
        for step, value in zip(steps, values, strict=True)
    ]
    told = f"{name}: from {values[0]:.4g} at step {steps[0]:g} to {values[-1]:.4g} at step {steps[-1]:g}"
    told += f", lowest {low:.4g}, highest {high:.4g}"
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return (
        f'<figure class="curve"><figcaption>{html.escape(name)}</figcaption>'
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{html.escape(told, quote=True)}">'
        f'<polyline points="{path}"/></svg>'
        f'<p class="range"><span>{low:.4g} to {high:.4g}</span><span>step {steps[0]:g} to {steps[-1]:g}</span></p>'
        "</figure>"
    )


def _share(value: float, low: float, high: float) -> float:
    return 0.5 if high == low else (value - low) / (high - low)
