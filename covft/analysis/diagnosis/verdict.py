"""The rule by which a diagnosis says what is indicated: one function of a few numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from covft.errors import ConfigError

Choice = Literal["freeze", "tune", "lora", "context"]

ALPHA = 0.05
APART = 0.5  # cosine of 60 degrees
KEPT = 0.8
WORDS: dict[Choice, str] = {
    "freeze": "Leave the tower frozen.",
    "tune": "Tune the tower, without context.",
    "lora": "Tune the tower with LoRA, without context.",
    "context": "Tune the tower with context routing.",
}


@dataclass(frozen=True)
class PairEvidence:
    """What is known of two kinds of instruction.

    Attributes:
        first: One kind.
        second: The other.
        alignment: Cosine of their mean gradients, over all blocks; NaN where it is unknown.
        low: Lower end of its interval.
        high: Upper end.
        p_value: That the two have the same gradients, adjusted for all pairs.
    """

    first: str
    second: str
    alignment: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True)
class Evidence:
    """The numbers that the rule reads.

    Attributes:
        p_value: That all kinds have the same gradients.
        pairs: The pairs of kinds.
        gain: Interval of the fall of the mean held-out loss by training on all kinds.
        own_gains: Lower ends of the intervals of the fall of the loss of each kind by training on it alone.
        harmed: Pairs (trained, measured) where training on one kind raises the loss of another, the interval above 0.
        kept: Share of the fall that a change of low rank keeps.
        layers: Blocks whose gradients differ between kinds (adjusted p-value at most 0.05), by separation.
        depth: Number of blocks with gradients.
    """

    p_value: float
    pairs: tuple[PairEvidence, ...]
    gain: tuple[float, float]
    own_gains: dict[str, float]
    harmed: tuple[tuple[str, str], ...]
    kept: float
    layers: tuple[int, ...]
    depth: int


@dataclass(frozen=True)
class Verdict:
    """What is indicated, and why.

    Attributes:
        choice: `"freeze"`, `"tune"`, `"lora"` or `"context"`.
        words: The choice as a sentence.
        reasons: Why, a sentence each.
        layers: Blocks that are proposed as `layers=`: those that conflict most, at most half of them; empty without a
            conflict.
        groups: Kinds with different gradients; kinds that cannot be told apart are in one group.
        experts: Number that is proposed as `experts=`; None without a conflict.
    """

    choice: Choice
    words: str
    reasons: tuple[str, ...]
    layers: tuple[int, ...]
    groups: tuple[tuple[str, ...], ...]
    experts: int | None


def decide(evidence: Evidence) -> Verdict:
    """Say what is indicated.

    1. `"freeze"`, if training lowers no held-out loss: neither that of all kinds together, nor that of a kind that is
       trained alone, with intervals above 0.
    2. `"context"`, if kinds have different gradients (p at most 0.05), and two of them conflict: the interval of their
       alignment lies below 0.5 (60 degrees), with an adjusted p of at most 0.05, or training on one raises the loss of
       the other.
    3. `"lora"`, if a change of rank 8 keeps 0.8 of what training on all kinds gains.
    4. `"tune"` otherwise.

    Args:
        evidence: The numbers.

    Raises:
        ConfigError: If there are no pairs of kinds.
    """
    if not evidence.pairs:
        raise ConfigError("A verdict needs two kinds of instruction.", expected="one pair or more", got=0)
    differ = evidence.p_value <= ALPHA
    apart = [pair for pair in evidence.pairs if pair.p_value <= ALPHA and pair.high < APART]
    own = sorted(kind for kind, low in evidence.own_gains.items() if low > 0)
    learns = evidence.gain[0] > 0
    reasons = [
        _told_of_gradients(evidence, differ, apart),
        *(f"Training on {one!r} raises the loss of {other!r}." for one, other in evidence.harmed),
        _told_of_training(learns, own),
    ]
    conflict = differ and (bool(apart) or bool(evidence.harmed))
    if not learns and not own:
        choice: Choice = "freeze"
    elif conflict:
        choice = "context"
    else:
        choice = "lora" if learns and evidence.kept >= KEPT else "tune"
        reasons.append(f"A change of low rank keeps {evidence.kept:.0%} of what training on all kinds gains.")
    groups = _groups(evidence.pairs)
    is_context = choice == "context"
    return Verdict(
        choice=choice,
        words=WORDS[choice],
        reasons=tuple(reasons),
        layers=tuple(sorted(evidence.layers[: max(evidence.depth // 2, 1)])) if is_context else (),
        groups=groups,
        experts=max(len(groups), 2) if is_context else None,
    )


def _told_of_gradients(evidence: Evidence, differ: bool, apart: Sequence[PairEvidence]) -> str:
    if not differ:
        return f"The gradients of the kinds do not differ more than by chance (p = {evidence.p_value:.3g})."
    told = f"The gradients of the kinds differ (p = {evidence.p_value:.3g})"
    if not apart:
        return f"{told}, but no two kinds are shown to be more than 60 degrees apart."
    most = min(apart, key=lambda pair: pair.alignment)
    named = f"{most.first!r} and {most.second!r}"
    numbers = f"(alignment {most.alignment:+.2f}, {most.low:+.2f} to {most.high:+.2f})"
    if len(evidence.pairs) == 1:
        return f"{told}: {named} are more than 60 degrees apart {numbers}."
    count = f"{len(apart)} of {len(evidence.pairs)} pairs {'is' if len(apart) == 1 else 'are'}"
    return f"{told}: {count} more than 60 degrees apart, most of all {named} {numbers}."


def _told_of_training(learns: bool, own: Sequence[str]) -> str:
    if learns:
        return "Training on all kinds lowers the held-out loss."
    if own:
        return f"Training on all kinds is not shown to lower the held-out loss, but alone these gain: {', '.join(own)}."
    return "No training is shown to lower a held-out loss."


def _groups(pairs: Sequence[PairEvidence]) -> tuple[tuple[str, ...], ...]:
    """Put kinds that cannot be told apart into one group."""
    group = {kind: {kind} for pair in pairs for kind in (pair.first, pair.second)}
    for pair in pairs:
        if pair.p_value > ALPHA:
            joined = group[pair.first] | group[pair.second]
            for kind in joined:
                group[kind] = joined
    return tuple(sorted({tuple(sorted(kinds)) for kinds in group.values()}))
