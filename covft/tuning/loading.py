"""Reads the folder of a tuned ViT, and fills it in."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from covft.checkpoints.folder import compare_tensors
from covft.checkpoints.loading import Saved, by_saved_name, read_saved, read_settings
from covft.errors import CheckpointError, ConfigError
from covft.tuning.method import Method
from covft.tuning.registry import make_method
from covft.tuning.saving import base_of, tuned_tensors
from covft.utils.sharding import assign, full, shape_of

if TYPE_CHECKING:
    from covft.tuning.tuned import TunedViT


@dataclass(frozen=True)
class SavedMethod(Saved):
    """The contents of a tuned ViT's folder.

    Attributes:
        method: The method with its options.
    """

    method: Method

    @property
    def needs_text(self) -> bool:
        """Whether the method needs text."""
        return self.method.needs_text

    @property
    def others(self) -> Collection[str]:
        """What is trained of the base ViT itself: the folder has it, whatever it was before."""
        return self.tensors.keys()

    @classmethod
    def read(cls, folder_or_repo_id: str | Path) -> SavedMethod | None:
        """Read a folder, or a repository of the Hugging Face Hub.

        Returns:
            Its contents; None if the folder is one of `covft.wrap`.

        Raises:
            CheckpointError: If it is incomplete or damaged, cannot be reached, or names a method that is not installed.
        """
        folder, config = read_settings(folder_or_repo_id)
        if "method" not in config:
            return None
        folder, tensors, saved = read_saved(folder)
        try:
            method = make_method(saved["method"]["name"], saved["method"]["options"])
        except ConfigError as error:
            raise CheckpointError(
                f"{folder} was made by a method that cannot be used here.",
                expected="a method that is installed, with options that it knows",
                got=str(error).partition("\n")[0],
                fix="install the package that has the method, or upgrade covft",
            ) from error
        return cls(folder, tensors, saved["base"], saved["text"], method)

    def fill(self, tuned: TunedViT) -> None:
        """Put the weights into a ViT that was tuned by the same method.

        Args:
            tuned: Tuned with this method, around these base weights.

        Raises:
            CheckpointError: If tensors are missing, unexpected or of another shape; nothing is filled in then.
        """
        state: dict[str, Any] = by_saved_name(tuned.vit, tuned.vit.state_dict(keep_vars=True))
        wanted = by_saved_name(tuned.vit, tuned_tensors(tuned))
        extra = {name: state[name] for name in self.tensors if name in state and name not in wanted}
        shapes = {name: shape_of(tensor) for name, tensor in {**wanted, **extra}.items()}
        compare_tensors(shapes, {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}, "the folder")
        own = {id(parameter): name for name, parameter in tuned.vit.named_parameters()}
        for parameter in extra.values():  # which the caller had trained too
            tuned.before.values[own[id(parameter)]] = full(parameter).detach().to("cpu", copy=True)
            parameter.requires_grad_(True)
        for name, tensor in self.tensors.items():
            assign(state[name], tensor)
        self.warn_other_text(tuned.text_name)


def load_into(tuned: TunedViT, folder: str | Path) -> None:
    """Put saved weights into a ViT that is tuned already.

    Args:
        tuned: Tuned by the method, and around the base weights, of the saved one.
        folder: What `save_pretrained` wrote.

    Raises:
        CheckpointError: If the folder is incomplete or damaged, if it was made by another method or for other base
            weights, or if tensors are missing, unexpected or of another shape; the ViT is then as it was.
    """
    saved = SavedMethod.read(folder)
    if saved is None or saved.method != tuned.method:
        raise CheckpointError(
            f"{folder} was saved by another method than that of this ViT.",
            expected=repr(tuned.method),
            got="covft" if saved is None else repr(saved.method),
        )
    if (apart := saved.apart(base_of(tuned))) is not None:
        raise CheckpointError(f"{folder} was made for other base weights than those of this ViT.", got=apart)
    saved.fill(tuned)
