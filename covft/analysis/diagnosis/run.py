"""diagnose(): freeze, tune, LoRA or context routing, measured on the user's model and data before any training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from torch import nn
from torch.utils.data import Dataset

from covft.adapters.spec import Adapter
from covft.analysis.diagnosis.entries import Entry, read_entries
from covft.analysis.diagnosis.kinds import find_kinds
from covft.analysis.diagnosis.losses import loss_of, tower_of
from covft.analysis.diagnosis.probe import Probe, probe, undisturbed
from covft.analysis.diagnosis.result import Diagnosis
from covft.analysis.diagnosis.verdict import ALPHA, Evidence, PairEvidence, decide
from covft.analysis.stats.conflict import Conflict, conflict, dominance
from covft.analysis.stats.gradients import block_weights, gradients_of
from covft.errors import ConfigError
from covft.utils.arguments import check_kinds, check_sizes, short

FEWEST = 8  # samples of a kind

_NOT_MEASURED = (
    "answers: only losses are, and a lower loss is not always a better answer",
    "a long training: gradients are those of the start, and the probe has few steps",
    "training of the language model and the projector, which stand still here",
    "kinds that these samples do not have, and how well experts would learn to tell kinds apart",
)


@check_kinds
def diagnose(
    model: nn.Module,
    data: Iterable[Any] | Dataset[Any],
    *,
    loss: Callable[..., Any] | None = None,
    kinds: Sequence[str] | Callable[..., Any] | None = None,
    text_encoder: Any = None,
    weights: str = "ffn",
    samples: int = 240,
    steps: int = 10,
    batch: int = 8,
    rate: float | None = None,
    permutations: int = 999,
    level: float = 0.95,
    seed: int = 0,
    adapter: Adapter | None = None,
) -> Diagnosis:
    """Say whether a tower should be frozen, tuned, tuned with LoRA, or tuned with context routing.

    It measures, per block, how the gradients of different kinds of instruction go together, before any training; and
    what a few steps of training on each kind do to the losses of the others. The model is restored, bit for bit. The
    guide has the rule of the verdict.

    Args:
        model: A multimodal LLM of transformers, attached or not, or a ViT, wrapped or not.
        data: A `ConversationDataset`; or an iterable of entries, as in `covft.analysis.samples`: batches of the model,
            with labels, or what `loss` takes. Random ones of a sequence are used, the first ones of another iterable.
            They should be about different images: the tests take samples as independent.
        loss: `loss(model, samples)`, the mean loss of a list of entries. None takes the language-model loss of a
            multimodal LLM.
        kinds: Kinds of instruction: one per entry, or a function of an entry. None takes those that the entries have,
            such as the data sets of a mixture, and else finds them by k-means on features of the texts, their number
            by the silhouette.
        text_encoder: Of these features, as for `covft.wrap`; None weighs the words of the texts (TF-IDF).
        weights: Whose gradients are measured, and what the probe trains: `"ffn"`, the FFNs of the blocks, or `"all"`
            of the blocks.
        samples: How many samples, at most.
        steps: Steps of each probe training.
        batch: Samples per step.
        rate: Learning rate of the probe; None chooses it among 1e-5, 1e-4 and 1e-3, on the samples that are trained.
        permutations: Of the tests; p-values are not smaller than 1 / (1 + permutations).
        level: Confidence level of the intervals.
        seed: Of everything that is drawn.
        adapter: How the tower is built, if no registered adapter knows it.

    Returns:
        The diagnosis: `print` shows it as a page, `save` writes its numbers.

    Raises:
        ConfigError: If a setting cannot be used, entries cannot be read, or there are fewer than two kinds of eight
            samples.
        ShapeError: If there is not one kind per entry, or a loss is not one finite number.
        MissingGradientError: If a loss does not depend on the tower's weights.
        UnsupportedViTError: If weights are sharded or quantised.
        UnknownViTError: If no adapter knows the tower.

    Example:
        >>> covft.diagnose(llava, dataset)  # doctest: +SKIP
    """
    check_sizes(samples=samples, steps=steps, batch=batch)
    _check_numbers(rate, permutations, level, seed)
    tower, spec = tower_of(model, adapter)
    trained = block_weights(tower, spec, weights)
    compute = loss_of(model, loss, data)
    entries = read_entries(data, kinds, samples, seed)
    named, silhouette = _kinds_of(entries, text_encoder, seed)
    entries, named, dropped = _without_rare(entries, named)
    chosen = [entry.sample for entry in entries]
    with undisturbed(model, seed):
        gradients = gradients_of(model, lambda sample: compute([sample]), chosen, named, trained, seed=seed)
    found = conflict(gradients, permutations=permutations, level=level, seed=seed)
    probed = probe(model, compute, chosen, named, trained, steps=steps, batch=batch, rate=rate, level=level, seed=seed)
    counts = Counter(named)
    return Diagnosis(
        verdict=decide(evidence_of(found, probed)),
        kinds={kind: counts[kind] for kind in found.kinds},
        found=silhouette is not None,
        silhouette=silhouette,
        conflict=found,
        dominance=dominance(gradients),
        probe=probed,
        settings={
            "weights": weights,
            "samples": len(chosen),
            "level": level,
            "permutations": permutations,
            "seed": seed,
        },
        not_measured=(*_NOT_MEASURED, *dropped),
    )


def evidence_of(found: Conflict, probed: Probe) -> Evidence:
    """Gather the numbers that the rule reads.

    Args:
        found: The conflict of gradients.
        probed: The probe trainings.
    """
    pairs = tuple(
        PairEvidence(
            found.kinds[a],
            found.kinds[b],
            alignment=float(found.alignment[-1, a, b]),
            low=float(found.low[-1, a, b]),
            high=float(found.high[-1, a, b]),
            p_value=float(found.pair_p_values[a, b]),
        )
        for a, b in found.pairs()
    )
    others = [(one, other) for one in found.kinds for other in found.kinds if one != other]
    order = np.argsort(-found.separation[:-1], kind="stable")
    return Evidence(
        p_value=found.p_value,
        pairs=pairs,
        gain=(probed.gain.low, probed.gain.high),
        own_gains={kind: -probed.alone[kind][kind].high for kind in found.kinds},
        harmed=tuple(pair for pair in others if probed.alone[pair[0]][pair[1]].low > 0),
        kept=probed.kept.mean,
        layers=tuple(found.layers[i] for i in order if found.p_values[i] <= ALPHA),
        depth=int(np.count_nonzero(found.cosines[:-1].any((1, 2)))),
    )


def _check_numbers(rate: float | None, permutations: int, level: float, seed: int) -> None:
    wrong = {
        "rate": ("a number above 0", rate, rate is not None and rate <= 0),
        "permutations": ("a whole number from 1 to 100000", permutations, not 1 <= permutations <= 100_000),
        "level": ("a number between 0 and 1, such as 0.95", level, not 0 < level < 1),
        "seed": ("a whole number from 0 to 2**32 - 1", seed, not 0 <= seed < 2**32),
    }
    for name, (expected, got, is_wrong) in wrong.items():
        if is_wrong:
            raise ConfigError(f"{name}={short(got)} cannot be used.", expected=expected, got=short(got))


def _kinds_of(entries: Sequence[Entry], text_encoder: Any, seed: int) -> tuple[list[str], float | None]:
    """Return the kind of each entry, and the silhouette if they were found."""
    if entries and entries[0].kind is not None:
        return [str(entry.kind) for entry in entries], None
    return find_kinds(entries, text_encoder, seed) if entries else ([], None)


def _without_rare(entries: Sequence[Entry], named: Sequence[str]) -> tuple[list[Entry], list[str], tuple[str, ...]]:
    """Leave out kinds of few samples; return the others, their kinds, and what to say about it."""
    counts = Counter(named)
    rare = sorted(kind for kind, count in counts.items() if count < FEWEST)
    if len(counts) - len(rare) < 2:
        raise ConfigError(
            "The data have too few samples to compare kinds of instruction.",
            expected=f"two kinds or more, of {FEWEST} samples or more each",
            got=", ".join(f"{count} of {kind!r}" for kind, count in counts.items()) or "no samples",
            fix="samples=..., or kinds=... that are fewer",
        )
    kept = [number for number, kind in enumerate(named) if kind not in rare]
    told = (f"kinds of fewer than {FEWEST} samples: {', '.join(rare)}",) if rare else ()
    return [entries[i] for i in kept], [named[i] for i in kept], told
