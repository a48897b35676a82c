"""Overrides of an attached model's methods, on the instance."""

from __future__ import annotations

import contextlib
import functools
import inspect
from typing import Any

import torch

from covft.checkpoints import pretrained
from covft.errors import CheckpointError
from covft.integrations.mllm import balance
from covft.integrations.mllm.attachment import Attachment
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
    """Adds the keywords `context_text` and `context_index` to a method.

    They are `text` and `index` of the encoder: the texts, and which of them each image or tile has.
    """

    added: tuple[str, ...] = ("context_text", "context_index")

    @property
    def __signature__(self) -> inspect.Signature:
        signature = super().__signature__
        parameters = list(signature.parameters.values())
        added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in self.added]
        end = len(parameters)
        if parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD:
            end -= 1
        return signature.replace(parameters=[*parameters[:end], *added, *parameters[end:]])

    def __call__(self, *args: Any, context_text: Any = None, context_index: Any = None, **kwargs: Any) -> Any:
        """Call the method and hold the text for the tower."""
        args = self._own(args)
        with self.attachment.conditioned(self._named(args, kwargs), context_text, context_index):
            return self.inner(*args, **kwargs)


class BatchOverride(TextOverride):
    """Overrides `forward`, which then takes a batch of `covft.data.Collator` unchanged.

    `context_text` holds the batch's texts, one per row, and `context_index`, shape `(T,)`, which of them each image or
    tile has. `image_flags` is 0 for dummy images; `num_tiles` is ignored.
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
        return self._with_text(args, kwargs, context_text, context_index, image_flags)

    # Untraced, but what it calls is traced: see `_leave_untraced`.
    def _with_text(self, args: Any, kwargs: Any, context_text: Any, context_index: Any, image_flags: Any) -> Any:
        hold: Any = self._hold
        holding, given = hold(args, kwargs, context_text, context_index, image_flags)
        try:
            return self._run(args, kwargs, given)
        finally:
            holding.close()

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any], given: dict[str, Any]) -> Any:
        return balance.call_with_balance_loss(self.attachment, lambda: self.inner(*args, **kwargs), given)

    def _hold(
        self, args: Any, kwargs: Any, context_text: Any, context_index: Any, image_flags: Any
    ) -> tuple[contextlib.ExitStack, dict[str, Any]]:
        given = self._named(args, kwargs)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.attachment.conditioned(given, context_text, context_index))
            stack.enter_context(without_dummies(base_of(self.attachment.model), image_flags))
            return stack.pop_all(), {**given, "image_flags": image_flags}


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
    """Overrides a method that computes the features of images or videos, and sees no prompt.

    They need `context_text` or an open `condition(...)`: a text for all, one per image, or, where the tower takes a
    video as one image (Qwen's), one per video. Frames that are images of the tower share one.
    """

    def __call__(self, *args: Any, context_text: Any = None, context_index: Any = None, **kwargs: Any) -> Any:
        """Call the method and hold the text for the tower, if one is given."""
        if context_text is None and context_index is None:
            self.attachment.check_read(self._named(self._own(args), kwargs))
            return self.inner(*self._own(args), **kwargs)
        return super().__call__(*args, context_text=context_text, context_index=context_index, **kwargs)


class VideosOverride(FeaturesOverride):
    """Overrides `get_video_features`, which calls videos `pixel_values` in some classes before transformers 5."""

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        given = super()._named(args, kwargs)
        if "pixel_values" in given:
            given["pixel_values_videos"] = given.pop("pixel_values")
        return given


class GenerateOverride(TextOverride):
    """Overrides `generate`, which calls the tower before any forward: the text is held throughout."""

    def __call__(self, *args: Any, context_text: Any = None, context_index: Any = None, **kwargs: Any) -> Any:
        """Call the method and hold the text for the tower."""
        args = self._own(args)
        given = self._named(args, kwargs)
        if given.get("inputs") is not None:
            given["input_ids"] = given["inputs"]
        # As generate itself: a text that is set with gradients enabled says that they are expected.
        conditioned = self.attachment.conditioned(given, context_text, context_index)
        with torch.no_grad(), conditioned, self.attachment.repeatable(given):
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
        pretrained.save(self.attachment.encoder, self.attachment.model, self.inner, given)


class LayerOverride(MethodOverride):
    """Overrides a method of the base model that takes features of the tower, to refuse states of skipped blocks."""

    @property
    def owner(self) -> Any:
        """The model without its head."""
        return base_of(self.attachment.model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method if the hidden state that it reads is not a copy of another."""
        args = self._own(args)
        if not torch.compiler.is_compiling():  # forward, which is not traced, has checked it then
            self.attachment.check_read(self._named(args, kwargs))
        return self.inner(*args, **kwargs)


OVERRIDES: dict[str, type[MethodOverride]] = {
    "forward": BatchOverride,
    "generate": GenerateOverride,
    "get_image_features": FeaturesOverride,
    "get_video_features": VideosOverride,
    "save_pretrained": SaveOverride,
}


def install(attachment: Attachment) -> None:
    """Override the methods of the model."""
    _leave_untraced()
    model = attachment.model
    base = base_of(model)
    attachment.override({name: override for name, override in OVERRIDES.items() if hasattr(type(model), name)})
    if base is not model:
        attachment.override({"forward": BaseOverride})
    if attachment.encoder.feature_layer is not None and base is not model:
        names = ("get_image_features", "get_video_features")
        attachment.override({name: LayerOverride for name in names if hasattr(type(base), name)})


@functools.cache
def _leave_untraced() -> None:
    """Keep torch.compile out of what reads prompts, which it would compile for every new one, but not of the model.

    At first use, since torch's compiler sets environment variables when it is imported.
    """
    around = ((BatchOverride, "_with_text"), (BatchOverride, "_run"), (BaseOverride, "_run"))
    for owner, name in (*around, (balance, "call_with_balance_loss")):
        setattr(owner, name, torch.compiler.disable(getattr(owner, name), recursive=False))
    BatchOverride._hold = torch.compiler.disable(BatchOverride._hold)  # type: ignore[method-assign]
