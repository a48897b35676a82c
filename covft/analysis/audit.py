"""Conditioning audit: does a context-aware tower inside a multimodal LLM use its text?

The model is asked the same questions four times. The prompt is the same each time; only what the tower is told
changes: the right text, that of another question, one generic text, and blank features (zeros).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from covft.analysis.diagnosis.entries import Entry, read_entries
from covft.analysis.diagnosis.losses import batches_of, inputs_of
from covft.errors import ConfigError, ShapeError, UnsupportedViTError
from covft.integrations.evaluation.told import GENERIC
from covft.integrations.mllm.attachment import attachment_of, without_peft
from covft.metrics import Difference, Estimate, bootstrap, holm, paired_bootstrap
from covft.utils.arguments import check_kinds, check_sizes, short
from covft.utils.modes import in_eval_mode


@dataclass(frozen=True, eq=False)
class Audit:
    """Scores by what the tower was told.

    Attributes:
        scores: Score of each question, by text: `"right"`, `"swapped"`, `"generic"`, `"blank"`.
        means: Their means.
        differences: The right text less each other one, paired by question.
        p_values: Of these differences, adjusted by Holm's method.
        consistency: Share of the images with several questions, whose questions are all right (score 1), by text; None
            if there is no such image.
        images: Number of these images.
    """

    scores: dict[str, np.ndarray]
    means: dict[str, Estimate]
    differences: dict[str, Difference]
    p_values: dict[str, float]
    consistency: dict[str, float] | None
    images: int

    @property
    def uses_text(self) -> bool:
        """Whether the right text scores higher than that of another question (p at most 0.05)."""
        return self.differences["swapped"].mean > 0 and self.p_values["swapped"] <= 0.05

    def __str__(self) -> str:
        lines = [f"The conditioning is {'used' if self.uses_text else 'not shown to be used'}."]
        for name, mean in self.means.items():
            line = f"  {name:<8} {mean.mean:.3f} [{mean.low:.3f}, {mean.high:.3f}]"
            if name in self.differences:
                found = self.differences[name]
                line += f"  right less {name}: {found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
                line += f", p = {self.p_values[name]:.3g}"
            lines.append(line)
        if self.consistency is not None:
            told = ", ".join(f"{name} {share:.3f}" for name, share in self.consistency.items())
            lines.append(f"  all questions of an image right, of {self.images} images: {told}")
        return "\n".join(lines)


@check_kinds
def audit(
    model: nn.Module,
    data: Iterable[Any] | Dataset[Any],
    *,
    score: Callable[..., Any] | None = None,
    images: Callable[..., Any] | None = None,
    generic: str = GENERIC,
    samples: int = 500,
    seed: int = 0,
) -> Audit:
    """Score a model with the right, swapped, generic and blank text to its tower alone, the prompt unchanged.

    Args:
        model: A multimodal LLM whose tower reads text, after `covft.attach` or `covft.tune`.
        data: A `ConversationDataset`, or single questions as batches of the model, with `context_text`.
        score: `score(model, entry, text)`, the score of one question, where the tower is to be told `text`: pass it to
            `model(...)` or `model.generate(...)` as `context_text=`. None scores 1 if each word of the answer is the
            likeliest one after those before it, else 0.
        images: A function of an entry that tells its image, such as a path; None compares pixels.
        generic: The text of `"generic"`.
        samples: How many questions, at most.
        seed: Of the choice, and of the swaps.

    Raises:
        UnsupportedViTError: If the model is not attached, or its tower reads no text.
        ConfigError: If entries have no text, or all have the same.
        ShapeError: If a score is not a finite number.
    """
    check_sizes(samples=samples)
    attachment = attachment_of(without_peft(model))
    if attachment is None or attachment.encoder.text_dim is None:
        raise UnsupportedViTError(
            "The tower of this model reads no text, so its use of text cannot be audited.",
            expected="an attached model whose tower reads text",
            got=type(model).__name__,
            fix="covft.attach(model, text_encoder, tokenizer=tokenizer)",
        )
    entries = read_entries(data, None, samples, seed)
    told = _told(entries, generic, torch.zeros(1, attachment.encoder.text_dim), seed)
    scored = _exact(data) if score is None else score
    with in_eval_mode(model), torch.no_grad():
        scores = {
            name: np.array(
                [_number(scored(model, entry.sample, text)) for entry, text in zip(entries, texts, strict=True)]
            )
            for name, texts in told.items()
        }
    return compare(scores, [_image_of(entry, images) for entry in entries])


def compare(scores: Mapping[str, np.ndarray], images: Sequence[Hashable]) -> Audit:
    """Compare scores by text.

    Args:
        scores: Score of each question, by text.
        images: The image of each question.
    """
    by_text = {name: {0: {"score": values.tolist()}} for name, values in scores.items()}
    means = {name: bootstrap(values) for name, values in by_text.items()}
    others = [name for name in scores if name != "right"]
    differences = {name: paired_bootstrap(by_text["right"], by_text[name]) for name in others}
    groups: dict[Hashable, list[int]] = {}
    for number, image in enumerate(images):
        groups.setdefault(image, []).append(number)
    several = [group for group in groups.values() if len(group) > 1]
    consistency = {
        name: float(np.mean([bool((values[group] == 1).all()) for group in several]))
        for name, values in scores.items()
        if several
    }
    p_values = holm([differences[name].p_value for name in others])
    return Audit(
        scores=dict(scores),
        means=means,
        differences=differences,
        p_values=dict(zip(others, p_values, strict=True)),
        consistency=consistency or None,
        images=len(several),
    )


def _told(entries: Sequence[Entry], generic: str, blank: Tensor, seed: int) -> dict[str, list[Any]]:
    """Return what the tower is told about each question, by name."""
    texts = [entry.text for entry in entries]
    if any(not isinstance(text, str) for text in texts):
        raise ConfigError(
            "Some entries have no text, so they cannot be swapped.",
            expected="context_text, a string for each question",
            got=f"{sum(not isinstance(text, str) for text in texts)} of {len(texts)} without",
        )
    if len(set(texts)) < 2:
        raise ConfigError(
            "Texts that are all the same cannot be swapped.", expected="two or more", got=short(texts[:1])
        )
    draws = np.random.default_rng(seed)
    swapped = []
    for text in texts:
        while (other := texts[draws.integers(len(texts))]) == text:
            pass
        swapped.append(other)
    count = len(texts)
    return {"right": texts, "swapped": swapped, "generic": [generic] * count, "blank": [blank] * count}


def _exact(data: Iterable[Any] | Dataset[Any]) -> Callable[[Any, Any, Any], float]:
    """Return a score: 1 if each word of an answer is the likeliest after those before it."""

    def score(model: Any, entry: Any, text: Any) -> float:
        inputs = inputs_of(model, batches_of([entry], data)[0])
        given = text.to(inputs["pixel_values"].device) if isinstance(text, Tensor) else [text]
        logits = model(**{**inputs, "context_text": given}).logits
        labels = inputs["labels"][:, 1:]
        answer = labels != -100
        return float((logits[:, :-1].argmax(-1) == labels)[answer].all())

    return score


def _number(value: Any) -> float:
    number = float(value)
    if not np.isfinite(number):
        raise ShapeError("A score cannot be used.", expected="a finite number", got=number)
    return number


def _image_of(entry: Entry, images: Callable[..., Any] | None) -> Hashable:
    if images is not None:
        return images(entry.sample)
    return entry.sample["pixel_values"].cpu().float().numpy().tobytes()
