"""The settings of a wrapped ViT: the keywords of `covft.wrap`, their meaning and their JSON."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import math
import operator
import typing
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypedDict, TypeVar

from covft.errors import ConfigError
from covft.utils.arguments import MOST, check_kinds, short

MOST_BLOCKS = 10_000
"""Bound on the number of adapted blocks: a longer list was not meant."""

Function = TypeVar("Function", bound=Callable[..., Any])


def _option(
    default: Any, *choices: str, per_block: bool = False, changes_model: bool = True, least: int | None = 1
) -> Any:
    """Declare a field.

    Args:
        default: Its default.
        *choices: The values it may have, where these are words.
        per_block: Whether each adapted block is built with it, under the same name.
        changes_model: Whether weights of one value do not fit another.
        least: The least whole number that it may be; None for any.
    """
    metadata = {"choices": choices, "per_block": per_block, "changes_model": changes_model, "least": least}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class CoVFTConfig:
    """Settings of a context-aware encoder; the fields are the keywords of `covft.wrap`.

    Attributes:
        layers: Indices of the adapted blocks, negative ones counted from the end. None takes the second half of the
            blocks without the last one, `range(depth // 2 - 1, depth - 1)`.
        experts: Number of experts E in each adapted block, at least 1.
        routing: How experts are weighted. `"dense"`: all, softmax weights. `"sparse"`: the `top_k` best, renormalised.
            `"uniform"`: all, equal weights. `"random"`: `top_k` experts drawn per image, block and training forward,
            equal weights.
        top_k: Experts per image for sparse and random routing, at most `experts`.
        context: What the router sees: `"cve"` (image tokens attended by the text, the paper's CVE), `"image"`,
            `"text"` or `"concat"`.
        train_norms: Norms outside the FFNs that are trained: `"all"` in blocks 0 to max(layers) (the paper's choice),
            `"adapted"` in the adapted blocks only, or `"none"`.
        activation: Activation of the residual refinement. `"gelu"` is that of eq. 7, `"quick_gelu"` that of the
            released implementation.
        num_heads: Heads of the context attention; must divide the width of the text features.
        expert_rank: Rank of the matrices by which experts differ from the pretrained FFN, which they share, frozen.
            None copies the whole FFN for every expert.
        attention_rank: Rank of trained updates of the linear layers outside the FFNs of the adapted blocks, which stay
            frozen: LoRA on the attention. None adds none.
        expert_init: What experts start from. `"upcycled"`: exact copies of the pretrained FFN; no output changes at
            the start. `"noise"`: copies with seeded Gaussian noise on every matrix, so that experts differ from the
            first step and the router has a gradient at once; with `expert_rank`, the products of the low-rank matrices
            are the noise. `"drop"`: copies in which a seeded random share of the inner units is drawn anew, with the
            mean and the standard deviation of the weights that they replace: drop-upcycling (arXiv 2502.19261), there
            for language models, with a share of 0.5 that long training makes up for. With both, outputs change at the
            start: the guide on wrapping has measurements.
        expert_init_scale: Standard deviation of the noise relative to that of each matrix, or share of the units.
        expert_init_seed: Seed of these changes. The same seed gives each expert of each block the same start on every
            device and process.
        recompute: What backward recomputes of experts and refined image tokens instead of keeping it. `"none"`:
            nothing. `"activation"`: all but the products of the first linear layers. `"all"`: all, from the tokens.
            Results are the same. Experts of low rank keep the product of the layer that they share, or recompute it,
            and recompute their own products. Full experts of another form than linear, activation, linear (or gated)
            are recomputed entirely for `"all"`, and not at all for `"activation"`.
        router_aux_loss_coef: Factor of the load-balancing loss, which an attached model adds to its loss in training
            with sparse routing. 0.01 is that of Switch Transformers (section 2.2); 0 adds nothing.
        feature_layer: Hidden state of the ViT that is read: an index into its hidden states, the embeddings being 0,
            negative ones counted from the end, such as -2 in LLaVA. Later blocks are skipped: the hidden states after
            it are copies of it. None runs all blocks.
        instructions: What the text encoder reads of a text. `"as_given"`: all of it, as in the paper authors' code.
            `"clean"`: without format suffixes, answer options, OCR tokens and bounding boxes, as
            `covft.data.clean_instruction` removes them. Features and tokenised batches are never changed.
        null_text: Whether one learned vector stands for the features of a question where there is none. Calls without
            text, and entries None among texts, then mean it; without it they are errors.
        null_text_rate: Share of the images whose text is replaced by the null text in training, drawn afresh in every
            forward, so that the vector and the routers learn what no question means.

    Raises:
        ConfigError: If a value cannot work.

    Example:
        >>> CoVFTConfig(layers=range(11, 23), routing="sparse").to_dict()["layers"]
        [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22]
    """

    layers: tuple[int, ...] | None = _option(None)
    experts: int = _option(4)
    routing: str = _option("dense", "dense", "sparse", "uniform", "random", per_block=True)
    top_k: int = _option(2, per_block=True)
    context: str = _option("cve", "cve", "image", "text", "concat", per_block=True)
    train_norms: str = _option("all", "all", "adapted", "none")
    activation: str = _option("gelu", "gelu", "quick_gelu", per_block=True)
    num_heads: int = _option(4, per_block=True)
    expert_rank: int | None = _option(None, per_block=True)
    attention_rank: int | None = _option(None)
    expert_init: str = _option("upcycled", "upcycled", "noise", "drop", per_block=True, changes_model=False)
    expert_init_scale: float = _option(0.1, per_block=True, changes_model=False)
    expert_init_seed: int = _option(0, per_block=True, changes_model=False, least=0)
    recompute: str = _option("all", "none", "activation", "all", per_block=True, changes_model=False)
    router_aux_loss_coef: float = _option(0.01, changes_model=False)
    feature_layer: int | None = _option(None, changes_model=False, least=None)
    instructions: str = _option("as_given", "as_given", "clean")
    null_text: bool = _option(False)
    null_text_rate: float = _option(0.1, changes_model=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", _layer_tuple(self.layers))
        for field in dataclasses.fields(self):
            name, value, choices = field.name, getattr(self, field.name), field.metadata["choices"]
            if choices and value not in choices:
                raise ConfigError(
                    f"{name}={value!r} is not known.",
                    expected=" | ".join(choices),
                    got=repr(value),
                    fix=f"{name}={choices[0]!r}",
                )
            if name == "layers" or choices or (value is None and field.default is None):
                continue
            if isinstance(field.default, bool):
                _check_switch(name, value)
                continue
            if isinstance(field.default, float):
                object.__setattr__(self, name, _factor(name, value))
                continue
            object.__setattr__(self, name, _whole_number(name, value, field.metadata["least"]))
        if self.routing in ("sparse", "random") and self.top_k > self.experts:
            raise ConfigError(
                f"top_k={self.top_k} asks for more experts than there are.",
                expected=f"top_k in [1, {self.experts}]  (experts={self.experts})",
                got=self.top_k,
                fix=f"top_k={self.experts}, or routing='dense' to use all of them",
            )
        self._check_start()
        self._check_null_text()

    def _check_start(self) -> None:
        if self.expert_init != "drop":
            return
        if self.expert_rank is not None:
            raise ConfigError(
                "expert_init='drop' draws units of each expert anew, but experts of low rank share all units.",
                expected="expert_rank=None, which copies the whole FFN",
                got=f"expert_rank={self.expert_rank}",
                fix="expert_init='noise'",
            )
        if self.expert_init_scale > 1:
            raise ConfigError(
                f"expert_init_scale={self.expert_init_scale} is not a share of the units.",
                expected="a number from 0 to 1 with expert_init='drop'",
                got=self.expert_init_scale,
                fix="expert_init_scale=0.1",
            )

    def _check_null_text(self) -> None:
        if self.null_text and not self.needs_text:
            raise ConfigError(
                "null_text=True learns what no text means, but this routing reads no text.",
                expected="routing='dense' or 'sparse', with a context that reads text",
                got=f"routing={self.routing!r}, context={self.context!r}",
                fix="null_text=False: a call without text works",
            )
        if self.null_text_rate > 1:
            raise ConfigError(
                f"null_text_rate={self.null_text_rate} is not a share of the images.",
                expected="a number from 0 to 1",
                got=self.null_text_rate,
                fix="null_text_rate=0.1",
            )

    @property
    def has_router(self) -> bool:
        """Whether the routing is learned, so that a router and a context exist."""
        return self.routing in ("dense", "sparse")

    @property
    def needs_text(self) -> bool:
        """Whether the routing reads text, so that a call without text is an error unless there is a null text."""
        return self.has_router and self.context != "image"

    def of_each_block(self) -> dict[str, Any]:
        """Return the fields that each adapted block is built with, by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata["per_block"]}

    @check_kinds
    def is_same_model(self, other: CoVFTConfig) -> bool:
        """Return whether weights of one fit the other: all fields are equal but those that only say how it runs.

        Args:
            other: Other settings.
        """
        ways = [field.name for field in dataclasses.fields(self) if not field.metadata["changes_model"]]
        return self.replace(**{name: getattr(other, name) for name in ways}) == other

    def replace(self, **settings: Any) -> CoVFTConfig:
        """Return these settings with other values for some fields.

        Raises:
            ConfigError: If a name is not a field, or a value cannot work.
        """
        _check_names(settings)
        return dataclasses.replace(self, **settings)

    @classmethod
    @check_kinds
    def choices(cls, name: str) -> tuple[str, ...]:
        """Return the words that a field may have; empty where it is not a word.

        Args:
            name: The field.

        Raises:
            ConfigError: If there is no such field.
        """
        known = {field.name: field.metadata["choices"] for field in dataclasses.fields(cls)}
        _check_names({name: None})
        return known[name]

    @classmethod
    def reference(cls, **overrides: Any) -> CoVFTConfig:
        """Return the settings whose arithmetic is that of the released implementation.

        It differs from the paper's equations in one place: QuickGELU in the residual refinement.

        Args:
            **overrides: Fields with other values, such as `layers` or `experts`.
        """
        return cls(**{"experts": 4, "routing": "dense", "context": "cve", "activation": "quick_gelu", **overrides})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        values = dataclasses.asdict(self)
        values["layers"] = None if self.layers is None else list(self.layers)
        return values

    @classmethod
    @check_kinds
    def from_dict(cls, values: dict[str, Any]) -> CoVFTConfig:
        """Make settings of JSON values; the inverse of `to_dict`.

        Raises:
            ConfigError: If a name is not a field, or a value cannot work.
        """
        _check_names(values)
        return cls(**values)

    def to_json(self) -> str:
        """Return the fields as a JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    @check_kinds
    def from_json(cls, text: str) -> CoVFTConfig:
        """Make settings of a JSON text; the inverse of `to_json`."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError("The configuration is not JSON.", got=str(error)) from error
        if not isinstance(values, dict):
            raise ConfigError("The configuration is not a JSON object.", expected="{...}", got=type(values).__name__)
        return cls.from_dict(values)


class Settings(TypedDict, total=False):
    """The fields of `CoVFTConfig` as optional keywords, for editors; a test holds the two together."""

    layers: Iterable[int] | None
    experts: int
    routing: str
    top_k: int
    context: str
    train_norms: str
    activation: str
    num_heads: int
    expert_rank: int | None
    attention_rank: int | None
    expert_init: str
    expert_init_scale: float
    expert_init_seed: int
    recompute: str
    router_aux_loss_coef: float
    feature_layer: int | None
    instructions: str
    null_text: bool
    null_text_rate: float


def show_settings(function: Function) -> Function:
    """Show the fields of `CoVFTConfig` in the signature of a function that takes `**settings`.

    Args:
        function: The function; it is returned, with a signature for `help()` and notebooks.
    """
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    hints = typing.get_type_hints(CoVFTConfig)
    fields = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
        for f in dataclasses.fields(CoVFTConfig)
    ]
    function.__signature__ = signature.replace(parameters=[*own, *fields])  # type: ignore[attr-defined]
    return function


def _check_names(values: dict[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(CoVFTConfig)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ConfigError(
            f"This version has no setting {', '.join(unknown)}.",
            expected=", ".join(known),
            got=", ".join(unknown),
            fix="upgrade covft, if a later version wrote it",
        )


def _whole_number(name: str, value: Any, least: int | None) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        number = None
    lowest = -MOST if least is None else least
    if number is None or not lowest <= number <= MOST:
        bound = f"a whole number from {lowest} to {MOST}"
        raise ConfigError(f"{name}={short(value)} cannot be used.", expected=bound, got=short(value))
    return number


def _check_switch(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={short(value)} cannot be used.", expected="True or False", got=short(value))


def _factor(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ConfigError(f"{name}={value!r} cannot be used.", expected="a number >= 0", got=repr(value))
    return float(value)


def _layer_tuple(layers: Any) -> tuple[int, ...] | None:
    if layers is None:
        return None
    if isinstance(layers, str | bytes) or not isinstance(layers, Iterable):
        raise ConfigError(
            f"layers={layers!r} cannot be used.",
            expected="an iterable of block indices, or None for the second half without the last block",
            got=type(layers).__name__,
            fix="layers=range(11, 23)",
        )
    indices = []
    for layer in itertools.islice(layers, MOST_BLOCKS + 1):
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
    if len(indices) > MOST_BLOCKS:
        raise ConfigError(
            "layers names more blocks than any ViT has.",
            expected=f"at most {MOST_BLOCKS} block indices",
            got=short(layers),
            fix="layers=range(11, 23)",
        )
    repeated = sorted(index for index, times in Counter(indices).items() if times > 1)
    if repeated:
        raise ConfigError("layers names a block twice.", expected="each block once", got=str(repeated)[1:-1])
    return tuple(indices)
