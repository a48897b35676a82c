"""What a diagnosis found: numbers, verdict, and one page of text."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from covft.analysis.diagnosis.probe import Probe
from covft.analysis.diagnosis.verdict import Verdict
from covft.analysis.stats.conflict import Conflict, Dominance
from covft.utils.arguments import check_kinds
from covft.utils.files import write_text


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What `covft.diagnose` found.

    Attributes:
        verdict: What is indicated, and why.
        kinds: Samples of each kind of instruction.
        found: Whether the kinds were found in the texts, instead of given.
        silhouette: Of kinds that were found, from -1 to 1; None otherwise.
        conflict: How the gradients of the kinds go together.
        dominance: How the gradients go with their dominant direction.
        probe: What short trainings do to the losses.
        settings: Of the measurement.
        not_measured: What this does not tell, a sentence each.
    """

    verdict: Verdict
    kinds: dict[str, int]
    found: bool
    silhouette: float | None
    conflict: Conflict
    dominance: Dominance
    probe: Probe
    settings: dict[str, Any]
    not_measured: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers as JSON values; unknown ones are None."""
        return _plain({field.name: getattr(self, field.name) for field in dataclasses.fields(self)})

    @check_kinds
    def save(self, path: str | Path) -> None:
        """Write all numbers to a JSON file.

        Raises:
            CheckpointError: If it cannot be written.
        """
        write_text(Path(path), json.dumps(self.to_dict(), indent=2, allow_nan=False, ensure_ascii=False) + "\n")

    def __str__(self) -> str:
        parts = [
            [self.verdict.words],
            [*(f"  - {reason}" for reason in self.verdict.reasons), *self._proposals()],
            self._kinds(),
            self._gradients(),
            self._blocks(),
            self._probe(),
            ["Not measured", *(f"  - {line}" for line in self.not_measured)],
        ]
        return "\n\n".join("\n".join(lines) for lines in parts)

    def _proposals(self) -> list[str]:
        if self.verdict.experts is None:
            return []
        layers = list(self.verdict.layers)
        return [f"  Proposal: covft.tune(model, layers={layers}, experts={self.verdict.experts}, ...)"]

    def _kinds(self) -> list[str]:
        how = f"found in the texts, silhouette {self.silhouette:.2f}" if self.silhouette is not None else "given"
        shown = [f"  {count:>6}  {kind}" for kind, count in self.kinds.items()]
        groups = len(self.verdict.groups)
        return [f"Kinds of instruction ({how}); {groups} of {len(self.kinds)} can be told apart", *shown]

    def _gradients(self) -> list[str]:
        found, one = self.conflict, self.dominance
        lines = [
            f"Gradients of {self.settings['samples']} samples, {self.settings['weights']} weights: cosine with the "
            f"dominant direction {one.mean.mean:.3f} [{one.mean.low:.3f}, {one.mean.high:.3f}], deviation "
            f"{one.std:.3f} (by chance {one.chance:.3f} root mean square)",
            "  alignment             p      kinds",
        ]
        for a, b in found.pairs():
            low, high = found.low[-1, a, b], found.high[-1, a, b]
            value = found.alignment[-1, a, b]
            shown = "unknown             " if math.isnan(value) else f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"
            lines.append(f"  {shown:<20}  {found.pair_p_values[a, b]:.3f}  {found.kinds[a]} | {found.kinds[b]}")
        return [*lines, f"  permutation test over all kinds: p = {found.p_value:.3g}"]

    def _blocks(self) -> list[str]:
        found = self.conflict
        rows = zip(found.layers, found.separation[:-1], found.p_values[:-1], strict=True)
        shown = [f"  {layer:>5}  {separation:>+10.3f}  {p:.3f}" for layer, separation, p in rows]
        return ["  block  separation  p (Holm)", *shown]

    def _probe(self) -> list[str]:
        probe = self.probe
        lines = [
            f"Probe training: {probe.steps} steps of {probe.batch} samples, learning rate {probe.rate:g}; change of "
            "the held-out loss (below 0 is better)"
        ]
        for trained, changes in [*probe.alone.items(), ("all kinds", probe.joint)]:
            lines.append(f"  trained on {trained}")
            lines += [f"    {c.mean:+.4f} [{c.low:+.4f}, {c.high:+.4f}]  {kind}" for kind, c in changes.items()]
        kept = probe.kept
        return [*lines, f"  kept by a change of rank {probe.rank}: {kept.mean:.0%} [{kept.low:.0%}, {kept.high:.0%}]"]


def _plain(value: Any) -> Any:
    """Turn dataclasses, arrays and numbers of numpy into JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
