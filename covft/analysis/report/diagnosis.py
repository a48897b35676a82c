"""The section about a diagnosis: the verdict, and the numbers that it rests on."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from covft.errors import CheckpointError

FILE = "covft_diagnosis.json"
"""Name of a saved diagnosis in a folder."""


def diagnosis(found: Mapping[str, Any]) -> str:
    """Return the section.

    Args:
        found: What `Diagnosis.save` wrote.

    Raises:
        CheckpointError: If it is not a diagnosis.
    """
    try:
        verdict, conflict, probe = found["verdict"], found["conflict"], found["probe"]
        parts = [
            f"<p><strong>{_text(verdict['words'])}</strong></p>",
            _list(verdict["reasons"]),
            _proposal(verdict),
            "<h3>Kinds of instruction</h3>",
            _table(["kind", "samples"], [[kind, f"{count:,}"] for kind, count in found["kinds"].items()]),
            "<h3>Gradients: alignment of two kinds, over all blocks</h3>",
            f"<p>1 is the same direction, 0 none in common. All kinds: p = {_number(conflict['p_values'][-1])}.</p>",
            _table(["kinds", "alignment", "interval", "p"], list(_pairs(conflict))),
            "<h3>Gradients by block</h3>",
            "<p>Separation is the mean cosine of two samples of one kind, less that of two kinds. A stronger colour is "
            "more.</p>",
            _table(["block", "separation", "p (Holm)"], list(_blocks(conflict)), _shares(conflict)),
            "<h3>Short training: change of the held-out loss</h3>",
            f"<p>{probe['steps']} steps of {probe['batch']} samples; below 0 is better.</p>",
            _table(["trained on", "measured on", "change", "interval"], list(_changes(probe))),
            "<h3>Not measured</h3>",
            _list(found["not_measured"]),
        ]
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{FILE} is not a diagnosis.", got=f"{type(error).__name__}: {error}") from error
    return "".join(parts)


def _proposal(verdict: Mapping[str, Any]) -> str:
    if verdict["experts"] is None:
        return ""
    return f"<p>Proposal: <code>layers={_text(verdict['layers'])}, experts={_text(verdict['experts'])}</code></p>"


def _pairs(conflict: Mapping[str, Any]) -> Iterable[list[str]]:
    kinds = conflict["kinds"]
    for a, first in enumerate(kinds):
        for b in range(a + 1, len(kinds)):
            value, low, high = (conflict[name][-1][a][b] for name in ("alignment", "low", "high"))
            p_value = _number(conflict["pair_p_values"][a][b])
            yield [f"{first} and {kinds[b]}", _number(value, 2), f"{_number(low, 2)} to {_number(high, 2)}", p_value]


def _blocks(conflict: Mapping[str, Any]) -> Iterable[list[str]]:
    rows = zip(conflict["layers"], conflict["separation"], conflict["p_values"], strict=False)
    for layer, separation, p_value in rows:
        yield [str(layer), _number(separation), _number(p_value)]


def _shares(conflict: Mapping[str, Any]) -> list[float]:
    """Return each block's separation as a share of the largest."""
    values = conflict["separation"][: len(conflict["layers"])]
    most = max([*values, 0.0])
    return [max(value, 0.0) / most if most else 0.0 for value in values]


def _changes(probe: Mapping[str, Any]) -> Iterable[list[str]]:
    for trained, changes in [*probe["alone"].items(), ("all kinds", probe["joint"])]:
        for kind, change in changes.items():
            low, high = _number(change["low"]), _number(change["high"])
            yield [trained, kind, _number(change["mean"]), f"{low} to {high}"]


def _number(value: float | None, digits: int = 3) -> str:
    return "unknown" if value is None else f"{value:.{digits}f}".replace("-", "−")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], shares: Sequence[float] = ()) -> str:
    """Return a table; the first cell after each row's name is coloured by a share, where there are any."""
    top = "".join(f"<th scope='col'>{_text(name)}</th>" for name in head)
    body = []
    for number, (name, *cells) in enumerate(rows):
        first = f" class='heat' style='--w:{100 * shares[number]:.0f}%'" if shares else ""
        shown = "".join(f"<td{'' if place else first}>{_text(cell)}</td>" for place, cell in enumerate(cells))
        body.append(f"<tr><th scope='row'>{_text(name)}</th>{shown}</tr>")
    return f"<div class='wide'><table><thead><tr>{top}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"


def _list(lines: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{_text(line)}</li>' for line in lines)}</ul>"


def _text(value: Any) -> str:
    return html.escape(str(value))
