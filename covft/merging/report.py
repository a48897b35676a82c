"""What merging loses."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from covft.utils.tables import aligned


@dataclass(frozen=True)
class Shift:
    """How far what the model makes of some samples has moved.

    Attributes:
        samples: Number of samples.
        features: Distance between the features of the mixture and of the merged ViT, relative to the mixture's norm.
        tuning: The same distance between the mixture and the ViT before tuning, as a scale; an error of `features` as
            large as this means that merging loses as much as not tuning.
        same_answers: Share of samples whose most likely words are all the same, given the words before; None where no
            language model was run.
        divergence: Mean Kullback-Leibler divergence of the words' distributions, in nats; None as before.
    """

    samples: int
    features: float
    tuning: float
    same_answers: float | None = None
    divergence: float | None = None


@dataclass(frozen=True)
class BlockLoss:
    r"""What one block loses; errors are those of its FFN's output, relative to the mixture's.

    Attributes:
        weights: Mean routing weight of each expert over the calibration data, $\bar g$: those of the average.
        deviation: Root mean square of $\lVert g - \bar g \rVert$ over samples. 0: the routing never changes, and its
            variance costs nothing.
        between_kinds: Share of that variance which lies between kinds of instruction; None without kinds. Near 1, one
            merged ViT per kind would lose less.
        routing: Error of $\sum_e \bar g_e E_e(x)$: what the variance of the routing costs.
        averaging: Distance of that from the FFN of averaged weights: what their averaging costs.
    """

    weights: tuple[float, ...]
    deviation: float
    between_kinds: float | None
    routing: float
    averaging: float


@dataclass(frozen=True)
class MergeReport:
    """What `covft.merge` has lost. `print` shows it as a table.

    Attributes:
        blocks: By adapted block, before distillation.
        total: Over all samples.
        kinds: By kind of instruction, where the data have kinds.
        undistilled: `total` before distillation; None without.
        losses: Loss of each step of distillation: the squared error of features, relative.
    """

    blocks: dict[int, BlockLoss]
    total: Shift
    kinds: dict[str, Shift] = field(default_factory=dict)
    undistilled: Shift | None = None
    losses: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**dataclasses.asdict(self), "blocks": {str(k): dataclasses.asdict(v) for k, v in self.blocks.items()}}

    def __str__(self) -> str:
        """Return two tables: by kind of instruction, and by block."""
        rows = [("", "samples", "features moved", "tuning moved", "same answers", "divergence")]
        shifts = {"all": self.total, **self.kinds}
        if self.undistilled is not None:
            shifts = {"all, before distillation": self.undistilled, **shifts}
        rows += [
            (name, str(s.samples), _percent(s.features), _percent(s.tuning), _percent(s.same_answers), _nats(s))
            for name, s in shifts.items()
        ]
        lost = [("block", "mean weights", "deviation", "between kinds", "lost by routing", "by averaging")]
        lost += [
            (
                str(layer),
                " ".join(f"{weight:.2f}" for weight in loss.weights),
                f"{loss.deviation:.3f}",
                _percent(loss.between_kinds),
                _percent(loss.routing),
                _percent(loss.averaging),
            )
            for layer, loss in self.blocks.items()
        ]
        return "\n".join([*aligned(rows), "", *aligned(lost)])


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f}%"


def _nats(shift: Shift) -> str:
    return "" if shift.divergence is None else f"{shift.divergence:.4f}"
