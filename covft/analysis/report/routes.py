"""Sections about contexts and routing."""

from __future__ import annotations

import html
import json
from typing import Any

import numpy as np

from covft.analysis.recording import Recording
from covft.analysis.report.drawing import sheet
from covft.analysis.stats.arrays import codes_of
from covft.analysis.stats.contexts import Clusters, cluster, project, similarity
from covft.analysis.stats.routing import LayerRouting, correlate, specialisation, summarise
from covft.errors import ConfigError

MOST_POINTS = 2000
"""Samples of the scatter; of more, so many are drawn."""


def contexts(found: Recording) -> str:
    """Return the section with the scatter of contexts; empty where there are too few.

    Args:
        found: The recording.
    """
    if not found.contexts or len(found) < 3:
        return ""
    chosen = _chosen(len(found))
    layers = [layer for layer in sorted(found.contexts) if np.ptp(found.contexts[layer][chosen], axis=0).any()]
    if not layers:
        return "<p>All samples have the same context.</p>"
    points = {layer: project(found.contexts[layer][chosen]) for layer in layers}
    clusters = _clusters(found.contexts[layers[-1]][chosen])
    names, codes = codes_of([found.kinds[i] for i in chosen], len(chosen))
    groups = {"kind": [*names, "no kind"], "cluster": []}
    members: dict[str, list[int]] = {"kind": [code if code >= 0 else len(names) for code in codes.tolist()]}
    if clusters is not None:
        groups["cluster"] = [f"cluster {number}" for number in range(len(clusters.centroids))]
        members["cluster"] = clusters.labels.tolist()
    data: dict[str, Any] = {
        "points": {layer: _scaled(found.points) for layer, found in points.items()},
        "explained": {layer: found.explained.round(4).tolist() for layer, found in points.items()},
        "groups": {name: values for name, values in groups.items() if name in members},
        "members": members,
        "texts": [_cut(found.texts[i]) for i in chosen],
        "rows": chosen.tolist(),
    }
    if found.thumbnails is not None:
        address, columns = sheet(found.thumbnails[chosen])
        rows = -(-len(chosen) // columns)
        data["sheet"] = {"address": address, "columns": columns, "rows": rows}
    grouped = [("kind", "kind of instruction")] if names else []
    grouped += [("cluster", f"cluster of layer {layers[-1]}")] if clusters is not None else []
    colours = "".join(f"<option value='{value}'>{text}</option>" for value, text in grouped)
    options = "".join(f"<option{' selected' if layer == layers[-1] else ''}>{layer}</option>" for layer in layers)
    drawn = f" {len(chosen):,} of them are drawn and counted." if len(chosen) < len(found) else ""
    told = f"Scatter of {len(chosen)} context vectors; choose samples by the control below"
    return (
        f"<p>{len(found):,} context vectors along their first two principal components.{drawn} {_alike(found, chosen)}"
        "</p>"
        f"<p class='control'><label>Layer <select id='context-layer'>{options}</select></label> "
        f"<label>Colour <select id='context-colour'>{colours or '<option>none</option>'}</select></label> "
        f"<label>Sample <input type='number' id='context-sample' min='1' max='{len(chosen)}' value='1'></label></p>"
        f"<div class='scatter'><svg id='scatter' viewBox='0 0 640 420' role='img' aria-label='{told}'></svg>"
        "<div id='shown' class='shown' aria-live='polite'></div></div>"
        "<p id='axes' class='range'></p><ul id='legend' class='legend' aria-label='Groups'></ul>"
        f"{_nearest(found, clusters, chosen, data)}"
        f"<script type='application/json' id='context-data'>{safe_json(data)}</script>"
    )


def routing(found: Recording) -> str:
    """Return the section about routing weights.

    Args:
        found: The recording.
    """
    summary = summarise(found.weights, found.kinds)
    layers = sorted(summary)
    kinds, experts = summary[layers[0]].kinds, len(summary[layers[0]].load)
    tables = {"all samples": _table(summary, None)}
    tables |= {kind: _table(summary, number) for number, kind in enumerate(kinds)}
    options = "".join(f"<option>{html.escape(name)}</option>" for name in tables)
    shown = "".join(
        f"<div class='wide' data-kind='{html.escape(name, quote=True)}'{' hidden' if number else ''}>{table}</div>"
        for number, (name, table) in enumerate(tables.items())
    )
    chosen = (
        "" if len(tables) == 1 else f"<p class='control'><label>Kind <select id='kind'>{options}</select></label></p>"
    )
    return (
        f"<p>Mean weight of each expert. Entropy is from 0, one expert, to {np.log(experts):.2f} nats, equal weights."
        f"</p>{chosen}<div id='weights'>{shown}</div>{_told(found, summary)}"
    )


def _table(summary: dict[int, LayerRouting], kind: int | None) -> str:
    layers = sorted(summary)
    experts = len(summary[layers[0]].load)
    head = "".join(f"<th scope='col'>expert {number}</th>" for number in range(experts))
    rows = []
    for layer in layers:
        weights = summary[layer].load if kind is None else summary[layer].by_kind[kind]
        entropy = summary[layer].entropy if kind is None else summary[layer].entropy_by_kind[kind]
        cells = "".join(f"<td class='heat' style='--w:{100 * w:.0f}%'>{w:.2f}</td>" for w in weights)
        rows.append(f"<tr><th scope='row'>{layer}</th>{cells}<td>{entropy:.2f}</td></tr>")
    return (
        f"<table><thead><tr><th scope='col'>layer</th>{head}<th scope='col'>entropy</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _told(found: Recording, summary: dict[int, LayerRouting]) -> str:
    """Say in words how kinds and contexts go with routing."""
    said, last = [], max(summary)
    if len(summary[last].kinds) > 1:
        special = specialisation(found.weights[last], found.kinds)
        said.append(
            f"Layer {last}: kind and expert share {special.information:.3f} nats of at most {special.most:.3f}; "
            f"shuffled kinds share {special.by_chance:.3f} (p = {special.p_value:.2g})."
        )
    if last in found.contexts and len(found) > 2:
        try:
            said.append(
                f"Similarity of contexts (layer {last}) and of routing (all layers), over pairs of samples: "
                f"r = {correlate(found.contexts[last], found.weights, resamples=200)}."
            )
        except ConfigError:
            said.append("All samples are routed alike, so there is nothing to correlate.")
    return "".join(f"<p>{html.escape(one)}</p>" for one in said)


def _chosen(count: int) -> np.ndarray:
    if count <= MOST_POINTS:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, MOST_POINTS, replace=False))


def _clusters(vectors: np.ndarray) -> Clusters | None:
    try:
        return cluster(vectors)
    except ConfigError:  # too few different vectors
        return None


def _alike(found: Recording, chosen: np.ndarray) -> str:
    """Say how alike contexts are within and between kinds."""
    last = max(found.contexts)
    alike = similarity(found.contexts[last][chosen], [found.kinds[i] for i in chosen])
    if alike.within is None or alike.between is None:
        return ""
    return (
        f"Mean cosine similarity in layer {last}: {alike.within:.3f} within a kind, {alike.between:.3f} between kinds."
    )


def _nearest(found: Recording, clusters: Clusters | None, chosen: np.ndarray, data: dict[str, Any]) -> str:
    """List the samples nearest to each centroid."""
    if clusters is None:
        return ""
    rows = []
    for number, members in enumerate(clusters.nearest):
        samples = []
        for member in members:
            text = html.escape(_cut(found.texts[chosen[member]]) or "no text")
            picture = f"<span class='thumb' data-sample='{member}'></span>" if "sheet" in data else ""
            samples.append(f"<li>{picture}{text}</li>")
        count = clusters.sizes[number]
        rows.append(
            f"<li><strong>cluster {number}</strong>, {count} samples<ul class='near'>{''.join(samples)}</ul></li>"
        )
    return (
        f"<details open><summary>{len(rows)} clusters by k-means, silhouette {clusters.silhouette:.2f}: the samples "
        f"nearest to each centroid</summary><ul class='clusters'>{''.join(rows)}</ul></details>"
    )


def _scaled(points: np.ndarray) -> list[list[float]]:
    low, high = points.min(axis=0), points.max(axis=0)
    return ((points - low) / np.where(high > low, high - low, 1)).round(4).tolist()


def _cut(text: str | None) -> str:
    return "" if text is None else text if len(text) <= 200 else f"{text[:197]}..."


def safe_json(data: Any) -> str:
    """Write JSON that cannot end the element of the page it stands in.

    Args:
        data: The values.
    """
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c").replace("&", "\\u0026")
