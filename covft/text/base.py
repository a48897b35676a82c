"""What every text encoder is, and the calls and checks that all of them share."""

from __future__ import annotations

import contextlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from covft.errors import CoVFTError, ShapeError, TextEncoderError
from covft.text.cache import DEFAULT_CACHE_BYTES, FeatureCache

PROBES = ("a photo", "what is left of the cup?")

Self = TypeVar("Self", bound="CachedTextEncoder")


@runtime_checkable
class TextEncoder(Protocol):
    """Turns questions into features; frozen, and no part of any model's state.

    Attributes:
        name: What a saved config writes down; `as_text_encoder(name)` builds the encoder again where it can.
        text_dim: Features per text, C.
    """

    name: str
    text_dim: int

    def encode(self, texts: list[str]) -> Tensor:
        """Encode each text by itself.

        Returns:
            Features, shape `(S, C)`, without gradient, on the encoder's own device.
        """
        ...


class CachedTextEncoder(ABC):
    """Base of covft's text encoders: each string encoded alone, once, in eval mode, without gradient.

    A plain object, not a module: `.train()`, `.to()`, `state_dict()` and optimizers of whatever holds it
    never reach the text model. Copies share the model.

    Args:
        name: See `TextEncoder`.
        cache_bytes: Bound on the memory of the kept features (on the CPU); 0 keeps none.
    """

    name: str
    text_dim: int
    _probe_fix: str | None = None

    def __init__(self, name: str, *, cache_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self.name = name
        self.cache = FeatureCache(cache_bytes)
        self._warned_about_length = False

    @property
    def device(self) -> torch.device:
        """Where the text model runs and its features appear."""
        return torch.device("cpu")

    @abstractmethod
    def _encode_one(self, text: str) -> Tensor:
        """Features of one text, shape `(1, C)`."""

    def _text_modules(self) -> Iterable[nn.Module]:
        """The modules that must be in eval mode during a call."""
        return ()

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Encode each text by itself; each distinct text runs once while it is cached.

        Args:
            texts: S questions.

        Returns:
            Features, shape `(S, C)`, without gradient, on `device`.

        Raises:
            TextEncoderError: If an entry is no string, or empty, or its features are not finite.
            ShapeError: If the model returned anything but `(1, C)` for one text.
        """
        return self._gather(check_texts(texts), self._encode_one)

    def encode_tokens(self, batch: Mapping[str, Any]) -> Tensor:
        """Encode a tokenised batch; only Hugging Face encoders can.

        Raises:
            TextEncoderError: Always, unless a subclass knows its tokens.
        """
        raise TextEncoderError(
            f"{type(self).__name__} takes questions as strings, not a tokenised batch.",
            expected="list[str]",
            got=describe(batch),
            fix="pass the strings, or use a Hugging Face text encoder",
        )

    def to(self: Self, device: torch.device | str) -> Self:
        """Move a text model that covft loaded; one that the caller loaded stays where the caller put it."""
        return self

    def _gather(self, keys: list[Any], compute: Callable[[Any], Tensor]) -> Tensor:
        """One row per key, from the cache or computed alone."""
        if not keys:
            return torch.empty(0, self.text_dim, device=self.device)
        rows: dict[Hashable, Tensor] = {}
        with _undisturbed(self.device):
            for key in keys:
                if key in rows:
                    continue
                row = self.cache.get(key)
                if row is None:
                    row = self._run(compute, key, self.text_dim)
                    self.cache.put(key, row)
                rows[key] = row
            dtype = rows[keys[-1]].dtype
            return torch.stack([rows[key].to(dtype) for key in keys]).to(self.device)

    def _run(self, compute: Callable[[Any], Tensor], key: Any, text_dim: int | None) -> Tensor:
        """Features of one key, shape `(C,)`, checked, detached, on the CPU."""
        for module in self._text_modules():
            module.eval()
        with _undisturbed(self.device):
            features = compute(key)
            check_features(features, text_dim, shown(key))
            # A clone made here is an ordinary tensor even when the model ran in inference mode
            # (sentence-transformers does), and owns no more memory than its row.
            return features[0].detach().to("cpu").clone()

    def _probe(self) -> int:
        """The width C, found by encoding; two different texts must differ."""
        self._warned_about_length = True  # nothing to warn of: these are our texts, not the caller's
        one, two = (self._try(self._encode_one, text) for text in PROBES)
        self._warned_about_length = False
        if one.shape == two.shape and torch.equal(one, two):
            raise TextEncoderError(
                f"{self.name} gives two different questions the same features, so it tells nothing.",
                expected="features that depend on the text",
                got="equal features for " + " and ".join(repr(text) for text in PROBES),
                fix='pooling="mean": the first token of a causal model sees no other token',
            )
        return one.shape[0]

    def _try(self, compute: Callable[[Any], Tensor], key: Any) -> Tensor:
        """Features of the first key ever, shape `(C,)`; whatever goes wrong means that this cannot encode."""
        try:
            return self._run(compute, key, None)
        except CoVFTError:
            raise
        except Exception as error:
            raise TextEncoderError(
                f"{self.name} cannot encode a text: {type(error).__name__}: {error}",
                expected="a text encoder: a list of one text in, features (1, C) out",
                got=f"the error above, for {shown(key)}",
                fix=self._probe_fix,
            ) from error

    def _warn_cut(self, num_tokens: int, limit: int) -> None:
        """Say once per encoder that texts are longer than the model reads."""
        if self._warned_about_length:
            return
        self._warned_about_length = True
        warnings.warn(
            f"{self.name} reads at most {limit} tokens; a text of {num_tokens} tokens was cut. "
            "Longer texts are cut without further warning.",
            UserWarning,
            stacklevel=2,
        )

    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, text_dim={getattr(self, 'text_dim', None)})"


def check_texts(texts: Sequence[str]) -> list[str]:
    """The texts as a list, each of them a question.

    Raises:
        TextEncoderError: If an entry is no string or empty; the message names its index.
    """
    if isinstance(texts, (str, bytes)) or not isinstance(texts, Iterable):
        raise TextEncoderError(
            "encode() takes a list of texts.",
            expected="list[str]",
            got=describe(texts),
            fix="encoder.encode([text])",
        )
    strings = list(texts)
    for index, text in enumerate(strings):
        if not isinstance(text, str):
            raise TextEncoderError(f"Text {index} is not a string.", expected="str", got=describe(text))
        if not text.strip():
            raise TextEncoderError(
                f"Text {index} is empty: an image without a question has no context.",
                expected="at least one character that is not a space",
                got=repr(text),
                fix="give each image its question, or use routing='uniform', which needs none",
            )
    return strings


def check_features(features: object, text_dim: int | None, text: str) -> None:
    """Refuse features that are no finite floating-point `(1, text_dim)`.

    Raises:
        ShapeError: If the shape is another.
        TextEncoderError: If they are no tensor, no floating-point numbers, or not finite.
    """
    if not isinstance(features, Tensor):
        raise TextEncoderError("A text encoder must return a tensor.", expected="Tensor (S, C)", got=describe(features))
    is_row = features.dim() == 2 and features.shape[0] == 1 and features.shape[1] > 0
    if not is_row or (text_dim is not None and features.shape[1] != text_dim):
        raise ShapeError(
            "A text encoder must return one row of features per text.",
            expected=f"(1, {text_dim or 'C'}) for one text",
            got=tuple(features.shape),
        )
    if not features.is_floating_point():
        raise TextEncoderError("Text features must be floating-point numbers.", expected="float32", got=features.dtype)
    if not torch.isfinite(features).all():
        raise TextEncoderError(
            f"The features of {text} are not finite.",
            expected="finite numbers",
            got=f"{int((~torch.isfinite(features)).sum())} of {features.numel()} are inf or nan",
            fix="load the text model in float32 or bfloat16",
        )


def freeze(modules: Iterable[nn.Module], parameters: Iterable[nn.Parameter] = ()) -> None:
    """Eval mode, and no gradient for the modules' parameters and those given besides."""
    for module in modules:
        module.eval().requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(False)


def shown(value: object, limit: int = 60) -> str:
    """A value for a message, shortened."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def describe(value: object) -> str:
    """The type and a short form of a value, for a message."""
    return f"{type(value).__name__} {shown(value)}"


def mro_modules(value: object) -> set[str]:
    """Top-level modules of the classes of an object, so that a library is recognised without importing it."""
    return {cls.__module__.partition(".")[0] for cls in type(value).__mro__}


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """No gradient, no inference mode, no autocast: features must not depend on what surrounds the call."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for kind in {"cpu", "cuda", device.type}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
