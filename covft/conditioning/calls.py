"""Calls of a ViT whose features depend on text."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from covft.conditioning.carrier import Conditioning
from covft.conditioning.open_scopes import Generator
from covft.conditioning.scope import Scope
from covft.errors import ShapeError, TextEncoderError
from covft.text import CachedTextEncoder, TextEncoder
from covft.text.base import TokenStates, in_order
from covft.text.cleaning import clean_instruction
from covft.text.inputs import as_index, check_index_has_text, check_text_features
from covft.utils.arguments import check_kinds

_Module: Any = nn.Module if TYPE_CHECKING else object


class CalledWithText(_Module):
    """Adds to a module that holds a ViT: calls with text, and the attributes of the ViT.

    Attributes:
        vit: The ViT.
        conditioning: Carries the text to what was put into the ViT.
        text_encoder: The frozen text encoder; None after unpickling, or where none is needed.
        text_dim: Width C of the text features; None where no text is used.
        text_name: Name of the text encoder that was trained with.
    """

    vit: nn.Module
    conditioning: Conditioning
    text_encoder: TextEncoder | None
    text_dim: int | None
    text_name: str | None

    @property
    def reads_states(self) -> bool:
        """Whether texts are given as states of their tokens, `(S, L, C)`, instead of features `(S, C)`."""
        return False

    @property
    def _cleans_text(self) -> bool:
        """Whether instructions are cleaned before they are encoded."""
        return False

    def forward(
        self,
        images: Tensor | None = None,
        text: str | Sequence[str] | Tensor | Mapping[str, Tensor] | None = None,
        *,
        index: Tensor | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Encode images, each conditioned on its text: `ContextEncoder.forward` without a trunk."""
        args = () if images is None else (images,)
        check_index_has_text(index, text)
        if text is None:
            return self.vit(*args, **kwargs)
        scope = self._enter(text, index)
        try:
            return self.vit(*args, **kwargs)
        finally:
            self.conditioning.leave(scope)

    @contextlib.contextmanager
    def condition(
        self,
        text: str | Sequence[str] | Tensor | Mapping[str, Tensor] | None,
        index: Tensor | Sequence[int] | None = None,
    ) -> Iterator[None]:
        """Hold the text for calls of the ViT that other code makes.

        Args:
            text: As for calling the encoder.
            index: As for calling the encoder.

        Example:
            >>> with encoder.condition(["How many cups?"]):  # doctest: +SKIP
            ...     output = mllm(pixel_values=pixel_values, input_ids=input_ids)
        """
        generator = None if torch.compiler.is_compiling() else Generator.around_caller()
        scope = self._enter(text, index, generator)
        try:
            yield
        finally:
            self.conditioning.leave(scope)

    def encode_text(self, text: str | Sequence[str] | Mapping[str, Tensor]) -> Tensor:
        """Encode texts, each alone, cached per distinct string, and cleaned if the settings say so.

        Args:
            text: One text, several, or a tokenised batch.

        Returns:
            Features, shape `(S, C)`, on the ViT's device, without gradient.

        Raises:
            TextEncoderError: If a text is empty, or there is no text encoder.
        """
        encoder = self._ready_encoder()
        if isinstance(text, Mapping):
            encode_tokens = getattr(encoder, "encode_tokens", None)
            if encode_tokens is None:
                raise TextEncoderError(
                    f"{encoder.name} takes questions as strings, not a tokenised batch.",
                    expected="list[str]",
                    got=f"a batch of {', '.join(text)}",
                    fix="pass the strings, or give the text encoder a method encode_tokens(batch)",
                )
            features = encode_tokens(text)
        else:
            features = encoder.encode(self._texts(text))
        return features.to(self._device())

    def encode_states(self, text: str | Sequence[str]) -> TokenStates:
        """Encode texts into one state per token, each alone, cached per distinct string.

        Args:
            text: One text, or several.

        Returns:
            States, shape `(S, L, C)`, and their mask, shape `(S, L)`, on the ViT's device, without gradient. A text
            encoder that has no states of tokens gives its features as the one state of each text.

        Raises:
            TextEncoderError: If a text is empty, or there is no text encoder.
        """
        encoder, texts = self._ready_encoder(), self._texts(text)
        if hasattr(encoder, "encode_states"):
            states, mask = encoder.encode_states(texts)  # type: ignore[union-attr]
        else:
            states = encoder.encode(texts)[:, None]
            mask = states.new_ones(states.shape[:2], dtype=torch.bool)
        return TokenStates(states.to(self._device()), mask.to(self._device()))

    def _texts(self, text: Any) -> list[Any]:
        texts = [text] if isinstance(text, str) else in_order(text)
        if self._cleans_text:
            return [clean_instruction(entry) if isinstance(entry, str) else entry for entry in texts]
        return texts

    def _ready_encoder(self) -> TextEncoder:
        encoder = self.text_encoder
        if encoder is None:
            raise TextEncoderError(
                "This encoder has no text encoder.",
                expected="a text encoder, or text features of shape (S, C)",
                got="None" if self.text_name is None else f"{self.text_name} was left behind by pickling",
                fix="encoder.set_text_encoder(covft.text.as_text_encoder(...))",
            )
        if isinstance(encoder, CachedTextEncoder):
            encoder.to(self._device())  # moves what covft itself loaded, nothing else
        return encoder

    @check_kinds
    def set_text_encoder(self, text_encoder: TextEncoder | None) -> None:
        """Replace the text encoder by another of the same width, such as after unpickling.

        Raises:
            ShapeError: If its width is another.
        """
        if text_encoder is not None and self.text_dim is not None and text_encoder.text_dim != self.text_dim:
            raise ShapeError(
                "The text encoder does not fit this encoder.",
                expected=f"width {self.text_dim}",
                got=f"width {text_encoder.text_dim} ({text_encoder.name})",
            )
        self.__dict__["text_encoder"] = text_encoder

    def _enter(self, text: Any, index: Any, generator: Generator | None = None) -> Scope:
        features, mask, without_text = text, None, None
        if self.conditioning.has_null_text and isinstance(text, list | tuple) and None in text:
            text, without_text = self._without_nulls(text)
            features = text
        if isinstance(text, Tensor):
            check_text_features(text.flatten(0, 1) if self.reads_states and text.dim() == 3 else text, self.text_dim)
            features = text.to(self._device())
            if self.reads_states and text.dim() == 2:
                features = features[:, None]
        elif text is not None and self.reads_states and not isinstance(text, Mapping):
            features, mask = self.encode_states(text)
        elif text is not None:
            features = self.encode_text(text)
            features = features[:, None] if self.reads_states else features
        if index is not None:
            index = as_index(index, 0 if features is None else len(features)).to(self._device())
        shared = isinstance(text, str) and index is None
        return self.conditioning.enter(
            features, index, shared=shared, generator=generator, text_mask=mask, without_text=without_text
        )

    def _without_nulls(self, texts: Sequence[str | None]) -> tuple[Tensor, Tensor]:
        """Encode the texts of a list in which some are None; return features, and which rows have no text."""
        without_text = torch.tensor([text is None for text in texts], device=self._device())
        given = [text for text in texts if text is not None]
        encoded = self.encode_text(given) if given else torch.zeros(0, self.text_dim or 0, device=self._device())
        features = encoded.new_zeros(len(texts), encoded.shape[-1])
        features[~without_text] = encoded
        return features, without_text

    def _device(self) -> torch.device:
        return next(self.vit.parameters()).device

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            vit = self.__dict__.get("_modules", {}).get("vit")
            if vit is None or name.startswith("_"):
                raise
            return getattr(vit, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        memo[id(self.text_encoder)] = self.text_encoder  # frozen, so copies share it
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "text_encoder": None}
