"""The interface of text encoders, and the calls and checks that all of them share."""

from __future__ import annotations

import contextlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from typing_extensions import Self

from covft.errors import CoVFTError, ShapeError, TextEncoderError
from covft.text.cache import DEFAULT_CACHE_BYTES, FeatureCache
from covft.utils.arguments import MOST

PROBES = ("a photo", "what is left of the cup?")


@runtime_checkable
class TextEncoder(Protocol):
    """Turns questions into features; frozen, and not part of any model's state.

    Attributes:
        name: Its name in saved configs; `as_text_encoder(name)` rebuilds the encoder where it can.
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


class TokenStates(NamedTuple):
    """States of the tokens of texts.

    Attributes:
        states: Shape `(S, L, C)`, L being the tokens of the longest text.
        mask: Which are of the text and not padding, shape `(S, L)`.
    """

    states: Tensor
    mask: Tensor


class CachedTextEncoder(ABC):
    """Base of covft's text encoders: each string encoded alone, once, in eval mode, without gradient.

    A plain object, not a module: `.train()`, `.to()`, `state_dict()` and optimizers of its holder never reach the text
    model. Copies share the model.

    Args:
        name: See `TextEncoder`.
        cache_bytes: Bound on the memory of the cached features (on the CPU); 0 caches none.
    """

    name: str
    text_dim: int
    max_length: int | None = None  # tokens per text; None is no limit
    _owned: Any = None  # the model, if covft loaded it
    _modules: Sequence[nn.Module] = ()  # what a text goes through; in eval mode at every call
    _probe_fix: str | None = None
    _warned_about_length = False

    def __init__(self, name: str, *, cache_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self.name = name
        self.cache = FeatureCache(cache_bytes)

    @property
    def device(self) -> torch.device:
        """Device of the text model and its features."""
        parameters = (parameter for module in self._modules for parameter in module.parameters())
        return next((parameter.device for parameter in parameters), torch.device("cpu"))

    @abstractmethod
    def _encode_one(self, text: str) -> Tensor:
        """Return the features of one text, shape `(1, C)`."""

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Encode each text by itself; each distinct text runs once while it is cached.

        Args:
            texts: S questions.

        Returns:
            Features, shape `(S, C)`, without gradient, on `device`.

        Raises:
            TextEncoderError: If an entry is not a string, or empty, or its features are not finite.
            ShapeError: If the model did not return `(1, C)` for one text.
        """
        return self._gather(check_texts(texts), self._encode_one)

    def encode_states(self, texts: Sequence[str]) -> TokenStates:
        """Encode each text by itself, into one state per token; each distinct text runs once while it is cached.

        An encoder that has no states of tokens gives its features as the one state of each text.

        Args:
            texts: S questions.

        Raises:
            TextEncoderError: If an entry is not a string, or empty, or its states are not finite.
            ShapeError: If the model did not return `(1, L, C)` for one text.
        """
        strings = check_texts(texts)
        rows: dict[str, Tensor] = {}
        with _undisturbed(self.device):
            for text in dict.fromkeys(strings):
                row = self.cache.get(("states", text))
                if row is None:
                    row = self._run_states(text)
                    self.cache.put(("states", text), row)
                rows[text] = row
            longest = max((len(row) for row in rows.values()), default=1)
            padded = {t: nn.functional.pad(row, (0, 0, 0, longest - len(row))) for t, row in rows.items()}
            states = [padded[text] for text in strings] or [torch.empty(0, longest, self.text_dim)]
            lengths = torch.tensor([len(rows[text]) for text in strings])
            mask = torch.arange(longest)[None] < lengths[:, None]
            stacked = torch.stack(states) if strings else states[0]
            return TokenStates(stacked.to(self.device), mask.to(self.device))

    def _states_of_one(self, text: str) -> Tensor:
        """Return the states of the tokens of one text, shape `(1, L, C)`."""
        return self._encode_one(text)[:, None]

    def _run_states(self, text: str) -> Tensor:
        for module in self._modules:
            module.eval()
        with _undisturbed(self.device):
            states = self._states_of_one(text)
            if not isinstance(states, Tensor) or states.dim() != 3 or len(states) != 1 or not states.shape[1]:
                got = tuple(states.shape) if isinstance(states, Tensor) else describe(states)
                raise ShapeError(
                    "States of a text are one row per token.", expected=f"(1, L, {self.text_dim})", got=got
                )
            check_features(states.flatten(1), states.shape[1] * self.text_dim, shown(text))
            return states[0].detach().to("cpu").clone()

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

    def to(self, device: torch.device | str) -> Self:
        """Move a text model that covft loaded; one that the caller loaded stays where it is."""
        if self._owned is not None:
            self._owned.to(device)
        return self

    def _gather(self, keys: list[Any], compute: Callable[[Any], Tensor]) -> Tensor:
        """Return one row per key, from the cache or computed alone."""
        if not keys:
            return torch.empty(0, self.text_dim, device=self.device)
        rows: dict[Hashable, Tensor] = {}
        with _undisturbed(self.device):
            for key in dict.fromkeys(keys):
                row = self.cache.get(key)
                if row is None:
                    row = self._run(compute, key, self.text_dim)
                    self.cache.put(key, row)
                rows[key] = row
            dtype = rows[keys[-1]].dtype
            return torch.stack([rows[key].to(dtype) for key in keys]).to(self.device)

    def _run(self, compute: Callable[[Any], Tensor], key: Any, text_dim: int | None) -> Tensor:
        """Compute the features of one key, shape `(C,)`, checked, detached, on the CPU."""
        for module in self._modules:
            module.eval()
        with _undisturbed(self.device):
            features = compute(key)
            check_features(features, text_dim, shown(key))
            # A clone made here is an ordinary tensor even if the model ran in inference mode (sentence-transformers
            # does), and owns no more memory than its row.
            return features[0].detach().to("cpu").clone()

    def _probe(self) -> int:
        """Find the width C by encoding; two different texts must differ."""
        self._warned_about_length = True  # these are our texts, not the caller's
        one, two = (self._try(self._encode_one, text) for text in PROBES)
        self._warned_about_length = False
        if one.shape == two.shape and torch.equal(one, two):
            raise TextEncoderError(
                f"{self.name} gives two different questions the same features, so it cannot tell texts apart.",
                expected="features that depend on the text",
                got="equal features for " + " and ".join(repr(text) for text in PROBES),
                fix='pooling="mean": the first token of a causal model sees no other token',
            )
        return one.shape[0]

    def _try(self, compute: Callable[[Any], Tensor], key: Any) -> Tensor:
        """Compute the features of the first key, shape `(C,)`; any failure means that this cannot encode."""
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

    def _is_cut(self, num_tokens: int | None) -> bool:
        """Return whether a text is longer than the model reads, and warn about the first one."""
        if num_tokens is None or self.max_length is None or num_tokens <= self.max_length:
            return False
        if not self._warned_about_length:
            self._warned_about_length = True
            warnings.warn(
                f"{self.name} reads at most {self.max_length} tokens; a text of {num_tokens} tokens was cut. "
                "Longer texts are cut without further warning.",
                UserWarning,
                stacklevel=2,
            )
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, text_dim={getattr(self, 'text_dim', None)})"


def in_order(texts: object) -> list[Any]:
    """Return texts as a list, in their order.

    Raises:
        TextEncoderError: If they are one text, or have no order, no length or not one axis.
    """
    if isinstance(texts, (str, bytes)) or not _is_ordered(texts):
        one = isinstance(texts, (str, bytes)) or not isinstance(texts, Iterable)
        raise TextEncoderError(
            "encode() takes a list of texts, whose order says which image each is for.",
            expected="list[str], or another sequence with one axis",
            got=describe(texts),
            fix="encoder.encode([text])" if one else "a list in the order of the images",
        )
    return list(texts)  # type: ignore[call-overload]


def check_texts(texts: Sequence[str]) -> list[str]:
    """Return the texts as a list of non-empty strings.

    Raises:
        TextEncoderError: If they have no order, or an entry is not a string, or empty; the message names its index.
    """
    strings = in_order(texts)
    for index, text in enumerate(strings):
        if not isinstance(text, str):
            raise TextEncoderError(f"Text {index} is not a string.", expected="str", got=describe(text))
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TextEncoderError(
                f"Text {index} has half of a surrogate pair, which is not a character.",
                expected="text that UTF-8 can write",
                got=shown(text),
                fix="text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')",
            ) from error
        if not text.strip():
            raise TextEncoderError(
                f"Text {index} is empty: an image without a question has no context.",
                expected="at least one character that is not a space",
                got=repr(text),
                fix="give each image its question, or use routing='uniform', which needs none",
            )
    return strings


def _is_ordered(texts: object) -> bool:
    """Return whether a value has an order, a length and one axis, as lists, arrays and columns of tables do."""
    if isinstance(texts, Mapping | type) or not (hasattr(texts, "__len__") and hasattr(texts, "__getitem__")):
        return False
    return getattr(texts, "ndim", 1) == 1


def check_features(features: object, text_dim: int | None, text: str) -> None:
    """Refuse features that are not finite floating-point numbers of shape `(1, text_dim)`.

    Raises:
        ShapeError: If the shape differs.
        TextEncoderError: If they are not a tensor, not floating-point or not finite.
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


def check_width(text_dim: int) -> int:
    """Return the width C of text features; refuse one that is not a positive whole number."""
    if isinstance(text_dim, bool) or not 1 <= text_dim <= MOST:
        raise TextEncoderError(
            "Text features need a width.", expected=f"an int from 1 to {MOST}", got=describe(text_dim)
        )
    return int(text_dim)


def freeze(modules: Iterable[nn.Module], parameters: Iterable[nn.Parameter] = ()) -> None:
    """Put modules into eval mode and freeze their parameters, and further parameters."""
    for module in modules:
        module.eval().requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(False)


def shown(value: object, limit: int = 60) -> str:
    """Shorten a value for a message."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def describe(value: object) -> str:
    """Describe a value by its type and a short form, for a message."""
    return f"{type(value).__name__} {shown(value)}"


def mro_modules(value: object) -> set[str]:
    """Return the top-level modules of the classes of an object, to recognise a library without importing it."""
    return {cls.__module__.partition(".")[0] for cls in type(value).__mro__}


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Switch gradients, inference mode and autocast off: features must not depend on the caller's."""
    with contextlib.ExitStack() as stack, torch.inference_mode(False), torch.no_grad():
        for kind in {"cpu", "cuda", device.type}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
