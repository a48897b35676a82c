"""Overrides of an attached model's methods, on the instance."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from covft.checkpoints import pretrained
from covft.errors import CheckpointError
from covft.integrations.mllm.attachment import Attachment
from covft.integrations.mllm.balance import call_with_balance_loss
from covft.integrations.mllm.dummies import without_dummies
from covft.integrations.mllm.families import base_of
from covft.surgery.overrides import Override


class MethodOverride(Override):
    """Overrides one method of an attached model."""

    def __init__(self, attachment: Attachment, name: str) -> None:
        self.attachment = attachment
        super().__init__(self.owner, name)

    @property
    def owner(self) -> Any:
        """The module that has the method."""
        return self.attachment.model


class TextOverride(MethodOverride):
    """Adds the keyword `context_text` to a method."""

    added: tuple[str, ...] = ("context_text",)

    @property
    def __signature__(self) -> inspect.Signature:
        signature = super().__signature__
        parameters = list(signature.parameters.values())
        added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in self.added]
        end = len(parameters)
        if parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD:
            end -= 1
        return signature.replace(parameters=[*parameters[:end], *added, *parameters[end:]])

    def __call__(self, *args: Any, context_text: Any = None, **kwargs: Any) -> Any:
        """Call the method and hold the text for the tower."""
        args = self._own(args)
        with self.attachment.conditioned(self._named(args, kwargs), context_text):
            return self.inner(*args, **kwargs)


class BatchOverride(TextOverride):
    """Overrides `forward`, which then takes a batch of `covft.data.Collator` unchanged.

    `context_text` holds the batch's texts, one per row, and `context_index`, shape `(T,)`, which of them each image or
    tile has. They are `text` and `index` of the encoder. `image_flags` is 0 for dummy images; `num_tiles` is ignored.
    """

    added = ("context_text", "context_index", "image_flags", "num_tiles")

    def __call__(
        self,
        *args: Any,
        context_text: Any = None,
        context_index: Any = None,
        image_flags: Any = None,
        num_tiles: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Call the method, hold the text for the tower and drop the features of dummies."""
        args = self._own(args)
        if not args and kwargs.get("pixel_values") is None and kwargs.get("pixel_values_videos") is None:
            return self.inner(**kwargs)  # the short way for each generated token
        given = self._named(args, kwargs)
        base = base_of(self.attachment.model)
        with self.attachment.conditioned(given, context_text, context_index), without_dummies(base, image_flags):
            return self._run(args, kwargs, {**given, "image_flags": image_flags})

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any], given: dict[str, Any]) -> Any:
        return call_with_balance_loss(self.attachment, lambda: self.inner(*args, **kwargs), given)


class BaseOverride(BatchOverride):
    """Overrides `forward` of the base model, in case another library replaces the model's own.

    TRL's replacement calls the base model and computes the loss in chunks. Inside the model's own forward the text is
    held already.
    """

    @property
    def owner(self) -> Any:
        """The model without its head."""
        return base_of(self.attachment.model)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any], given: dict[str, Any]) -> Any:
        return self.inner(*args, **kwargs)  # there is no loss yet


class FeaturesOverride(TextOverride):
    """Overrides `get_image_features`, which sees no prompt: it needs `context_text` or an open `condition(...)`."""

    def __call__(self, *args: Any, context_text: Any = None, **kwargs: Any) -> Any:
        """Call the method and hold the text for the tower, if one is given."""
        if context_text is None:
            return self.inner(*self._own(args), **kwargs)
        return super().__call__(*args, context_text=context_text, **kwargs)


class GenerateOverride(TextOverride):
    """Overrides `generate`, which calls the tower before any forward: the text is held throughout."""

    def __call__(self, *args: Any, context_text: Any = None, **kwargs: Any) -> Any:
        """Call the method and hold the text for the tower."""
        args = self._own(args)
        given = self._named(args, kwargs)
        if given.get("inputs") is not None:
            given["input_ids"] = given["inputs"]
        # As generate itself: a text that is set with gradients enabled says that they are expected.
        with torch.no_grad(), self.attachment.conditioned(given, context_text):
            return self.inner(*args, **kwargs)


class SaveOverride(MethodOverride):
    """Overrides `save_pretrained`: writes a model for `from_pretrained`, and the adapted tower to its `covft/`.

    Weights outside the tower are saved as trained. `attach(..., pretrained=folder / "covft")` restores the adapted
    tower. As for any model of transformers, only the first process writes. Under FSDP2 every process calls it, with
    or without a gathered state dict; ZeRO-3 needs a gathered one.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Save the model.

        Raises:
            CheckpointError: If an option would write something else, or weights are sharded and not gathered.
        """
        given = self._named(self._own(args), kwargs)
        if given.get("push_to_hub"):
            raise CheckpointError(
                "save_pretrained(push_to_hub=True) would upload an attached model without its tower.",
                expected="push_to_hub=False",
                got="push_to_hub=True",
                fix="model.push_to_hub(repo_id)",
            )
        attachment = self.attachment
        folder = pretrained.save(attachment.encoder, attachment.model, self.inner, given)
        if folder is not None:
            attachment.saved_in = folder


OVERRIDES: dict[str, type[MethodOverride]] = {
    "forward": BatchOverride,
    "generate": GenerateOverride,
    "get_image_features": FeaturesOverride,
    "save_pretrained": SaveOverride,
}


def install(attachment: Attachment) -> None:
    """Override the methods of the model."""
    model = attachment.model
    for name, override in OVERRIDES.items():
        if hasattr(type(model), name):
            override(attachment, name).install()
    if base_of(model) is not model:
        BaseOverride(attachment, "forward").install()


def remove(model: nn.Module) -> None:
    """Undo `install`."""
    for owner, name in [*((model, name) for name in OVERRIDES), (base_of(model), "forward")]:
        if (override := owned(owner, name)) is not None:
            override.remove()


def owned(model: nn.Module, name: str) -> MethodOverride | None:
    """Return the override of a method; None if another library has replaced it."""
    found = model.__dict__.get(name)
    found = getattr(found, "__func__", found)
    return found if isinstance(found, MethodOverride) else None


def covered(model: nn.Module) -> list[str]:
    """Return the methods that another library has replaced since they were overridden."""
    return [name for name in OVERRIDES if hasattr(type(model), name) and owned(model, name) is None]
