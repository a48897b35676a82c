"""Overrides of an attached model's methods, on the instance."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from covft.checkpoints import pretrained
from covft.errors import CheckpointError
from covft.integrations.mllm.attachment import Attachment
from covft.integrations.mllm.dummies import without_dummies
from covft.integrations.mllm.families import base_of
from covft.surgery.overrides import Override


class Call(Override):
    """Overrides one method of an attached model.

    Args:
        attachment: What attach() left on the model.
        name: The method.
    """

    def __init__(self, attachment: Attachment, name: str) -> None:
        self.attachment = attachment
        super().__init__(self.owner, name)

    @property
    def owner(self) -> Any:
        """The module whose method it is."""
        return self.attachment.model


class TextCall(Call):
    """A method that also takes `context_text`."""

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
        """Call it with the text held for the tower."""
        args = self._own(args)
        with self.attachment.conditioned(self._named(args, kwargs), context_text):
            return self.inner(*args, **kwargs)


class BatchCall(TextCall):
    """`forward`, which takes a batch of `covft.data.Collator` as it is."""

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
        """Call it with the text held for the tower, and without what the tower makes of dummies."""
        args = self._own(args)
        if not args and kwargs.get("pixel_values") is None and kwargs.get("pixel_values_videos") is None:
            return self.inner(**kwargs)  # the short way for every token that is generated
        given = self._named(args, kwargs)
        base = base_of(self.attachment.model)
        with self.attachment.conditioned(given, context_text, context_index), without_dummies(base, image_flags):
            return self.inner(*args, **kwargs)


class BaseCall(BatchCall):
    """`forward` of the base model, for a `forward` of the whole that another library has put there since.

    TRL's calls the base model and computes the loss in pieces. Inside the model's own call the text is held already.
    """

    @property
    def owner(self) -> Any:
        """The model without its head."""
        return base_of(self.attachment.model)


class FeaturesCall(TextCall):
    """`get_image_features`, which sees no prompt: the text is given, or a `condition(...)` is open."""

    def __call__(self, *args: Any, context_text: Any = None, **kwargs: Any) -> Any:
        """Call it, with the text held for the tower if one is given."""
        if context_text is None:
            return self.inner(*self._own(args), **kwargs)
        return super().__call__(*args, context_text=context_text, **kwargs)


class GenerateCall(TextCall):
    """`generate`, which calls the tower before any forward: the text holds for all of it."""

    def __call__(self, *args: Any, context_text: Any = None, **kwargs: Any) -> Any:
        """Call it with the text held for the tower."""
        args = self._own(args)
        given = self._named(args, kwargs)
        if given.get("inputs") is not None:
            given["input_ids"] = given["inputs"]
        # Without gradients, as generate itself is: a text given with gradients on says that they are expected.
        with torch.no_grad(), self.attachment.conditioned(given, context_text):
            return self.inner(*args, **kwargs)


class SaveCall(Call):
    """`save_pretrained`: writes a model that `from_pretrained` loads, and the adapted tower in `covft/` in its folder.

    What was trained outside the tower is saved as it is. `attach(..., pretrained=folder / "covft")` restores the
    adapted tower. As for any model of transformers, only the first process writes. Under FSDP2 every process calls it,
    without a state dict or with a gathered one; under ZeRO-3 a gathered state dict is needed.
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


OVERRIDES: dict[str, type[Call]] = {
    "forward": BatchCall,
    "generate": GenerateCall,
    "get_image_features": FeaturesCall,
    "save_pretrained": SaveCall,
}


def install(attachment: Attachment) -> None:
    """Override the methods of the model."""
    model = attachment.model
    for name, kind in OVERRIDES.items():
        if hasattr(type(model), name):
            kind(attachment, name).install()
    if base_of(model) is not model:
        BaseCall(attachment, "forward").install()


def remove(model: nn.Module) -> None:
    """Undo `install`."""
    for owner, name in [*((model, name) for name in OVERRIDES), (base_of(model), "forward")]:
        call = owned(owner, name)
        if call is not None:
            call.remove()


def owned(model: nn.Module, name: str) -> Call | None:
    """Return the override of a method; None if something else is there."""
    call = model.__dict__.get(name)
    call = getattr(call, "__func__", call)
    return call if isinstance(call, Call) else None


def covered(model: nn.Module) -> list[str]:
    """Return the methods that something else has overridden since.

    Args:
        model: The attached model.
    """
    return [name for name in OVERRIDES if hasattr(type(model), name) and owned(model, name) is None]
