"""The settings of a wrapped ViT: what the keywords of `covft.wrap` mean, and their JSON."""

from __future__ import annotations

import dataclasses
import json
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from covft.errors import ConfigError

ROUTINGS = ("dense", "sparse", "uniform", "random")
CONTEXTS = ("cve", "image", "text", "concat")
TRAIN_NORMS = ("all", "adapted", "none")
ACTIVATIONS = ("gelu", "quick_gelu")
RECOMPUTE = ("none", "activation", "all")
# How a model runs, not what it computes: two that differ in these alone are the same model.
_WAYS_TO_RUN = ("recompute", "feature_layer")


@dataclass(frozen=True, kw_only=True)
class CoVFTConfig:
    """Settings of a context-aware encoder; the fields are the keywords of `covft.wrap`.

    Attributes:
        layers: Indices of the adapted blocks, negative ones counted from the end; None takes the
            latter half without the last block, `range(depth // 2 - 1, depth - 1)`.
        experts: Number of experts E in each adapted block, at least 1.
        routing: `"dense"` (all experts, softmax weights), `"sparse"` (the `top_k` best, renormalised),
            `"uniform"` (all experts, equal weights) or `"random"` (`top_k` experts drawn per image,
            block and training forward, equal weights).
        top_k: Experts per image where routing is sparse or random, at most `experts`.
        context: What the router sees: `"cve"` (image tokens attended by the text, the paper's CVE),
            `"image"`, `"text"` or `"concat"`.
        train_norms: Which norms outside the FFNs are trained: `"all"` in blocks 0 to max(layers) (the
            paper's choice), `"adapted"` in the adapted blocks only, or `"none"`.
        activation: Of the residual refinement: `"gelu"` (eq. 7) or `"quick_gelu"` (what the released
            implementation computes).
        num_heads: Heads of the context attention; must divide the width of the text features.
        expert_rank: None copies the FFN whole for every expert. A number shares the pretrained FFN, frozen, and gives
            each expert matrices of that rank to differ by.
        recompute: What backward computes again of whole experts and of the refined image tokens, instead of keeping
            it: `"none"`; `"activation"`, all but the first linear layers' products; `"all"`, from the tokens alone.
            Results are the same. Experts of another form than linear, activation, linear (or gated) are recomputed
            as a whole for `"all"`, and not at all for `"activation"`.
        feature_layer: Which of the ViT's hidden states is read: index into them, the embeddings being 0, negative ones
            counted from the end, such as -2 in LLaVA. Blocks behind it do not run; what they would make is not to be
            read. None runs all blocks.

    Raises:
        ConfigError: If a value cannot work.

    Example:
        >>> CoVFTConfig(layers=range(11, 23), routing="sparse").to_dict()["layers"]
        [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22]
    """

    layers: tuple[int, ...] | None = None
    experts: int = 4
    routing: str = "dense"
    top_k: int = 2
    context: str = "cve"
    train_norms: str = "all"
    activation: str = "gelu"
    num_heads: int = 4
    expert_rank: int | None = None
    recompute: str = "all"
    feature_layer: int | None = None

    def __post_init__(self) -> None:
        for name in ("experts", "top_k", "num_heads"):
            object.__setattr__(self, name, _positive_int(name, getattr(self, name)))
        object.__setattr__(self, "layers", _layer_tuple(self.layers))
        _one_of("routing", self.routing, ROUTINGS)
        _one_of("context", self.context, CONTEXTS)
        _one_of("train_norms", self.train_norms, TRAIN_NORMS)
        _one_of("activation", self.activation, ACTIVATIONS)
        _one_of("recompute", self.recompute, RECOMPUTE)
        if self.expert_rank is not None:
            object.__setattr__(self, "expert_rank", _positive_int("expert_rank", self.expert_rank))
        if self.feature_layer is not None:
            object.__setattr__(self, "feature_layer", _whole("feature_layer", self.feature_layer))
        if self.routing in ("sparse", "random") and self.top_k > self.experts:
            raise ConfigError(
                f"top_k={self.top_k} asks for more experts than there are.",
                expected=f"top_k in [1, {self.experts}]  (experts={self.experts})",
                got=self.top_k,
                fix=f"top_k={self.experts}, or routing='dense' to use all of them",
            )

    @property
    def has_router(self) -> bool:
        """Whether the routing is learned, so that a router and a context exist."""
        return self.routing in ("dense", "sparse")

    @property
    def needs_text(self) -> bool:
        """Whether the routing looks at the text, so that a call without text is an error."""
        return self.has_router and self.context != "image"

    def is_same_model(self, other: CoVFTConfig) -> bool:
        """Whether weights of one fit the other: all fields but those that say how it runs are equal.

        Args:
            other: Other settings.
        """
        own = dataclasses.replace(self, **{name: getattr(other, name) for name in _WAYS_TO_RUN})
        return own == other

    @classmethod
    def reference(cls, **overrides: Any) -> CoVFTConfig:
        """The settings whose arithmetic is that of the released implementation.

        It differs from the paper's equations in one place: QuickGELU in the residual refinement.

        Args:
            **overrides: Fields to set otherwise, such as `layers` or `experts`.
        """
        return cls(**{"experts": 4, "routing": "dense", "context": "cve", "activation": "quick_gelu", **overrides})

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        values = dataclasses.asdict(self)
        values["layers"] = None if self.layers is None else list(self.layers)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CoVFTConfig:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: If a name is not a field, or a value cannot work.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ConfigError(
                "The configuration has settings that this version does not know.",
                expected=", ".join(known),
                got=", ".join(unknown),
                fix="pip install --upgrade covft, if a later version wrote it",
            )
        return cls(**values)

    def to_json(self) -> str:
        """The fields as a JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> CoVFTConfig:
        """The inverse of `to_json`."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError("The configuration is not JSON.", got=str(error)) from error
        if not isinstance(values, dict):
            raise ConfigError("The configuration is not a JSON object.", expected="{...}", got=type(values).__name__)
        return cls.from_dict(values)


def _positive_int(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ConfigError(f"{name}={value!r} cannot be used.", expected="a whole number >= 1", got=repr(value))
    return number


def _whole(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ConfigError(f"{name}={value!r} cannot be used.", expected="a whole number", got=repr(value)) from None


def _layer_tuple(layers: Any) -> tuple[int, ...] | None:
    if layers is None:
        return None
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise ConfigError(
            f"layers={layers!r} cannot be used.",
            expected="an iterable of block indices, or None for the latter half without the last block",
            got=type(layers).__name__,
            fix="layers=range(11, 23)",
        )
    indices = []
    for layer in layers:
        try:
            if isinstance(layer, bool):
                raise TypeError
            indices.append(operator.index(layer))
        except TypeError:
            raise ConfigError(
                f"layers has an entry that is not a block index: {layer!r}.",
                expected="whole numbers",
                got=type(layer).__name__,
            ) from None
    if not indices:
        raise ConfigError(
            "layers is empty, so nothing would be adapted.", expected="at least one block index", got="none"
        )
    repeated = sorted({index for index in indices if indices.count(index) > 1})
    if repeated:
        raise ConfigError("layers names a block twice.", expected="each block once", got=str(repeated)[1:-1])
    return tuple(indices)


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(
            f"{name}={value!r} is not known.",
            expected=" | ".join(known),
            got=repr(value),
            fix=f"{name}={known[0]!r}",
        )
