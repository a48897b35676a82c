"""What a ViT that was changed for tuning can do, whatever the method: what trainers and savers ask of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from covft.adapters.spec import ViTSpec
from covft.conditioning import Conditioning
from covft.surgery.activation_checkpointing import set_activation_checkpointing
from covft.utils.arguments import check_kinds
from covft.utils.parameters import count


class AdaptedViT(nn.Module):
    """A ViT that was changed in place, with what is needed to train it, to save it and to undo the change.

    Attributes:
        vit: The ViT, changed.
        spec: What is known of it.
        conditioning: Carries the text to what was put into the ViT.
        reading: How an attached model reads the text from prompts; None if nothing is read.
        text_name: Name of the text encoder that was trained with; None where no text is used.
        text_dim: Width of its features.
        text_revision: Its revision on the Hugging Face Hub, if known.
        saved_in: The folder it was last saved to; a trainer sets it to None when the weights change.
        chosen_parts: What `train_only` has chosen, which may leave all of this out on purpose; None if it was not used.
    """

    vit: nn.Module
    spec: ViTSpec
    conditioning: Conditioning
    text_name: Any
    text_dim: Any
    text_revision: Any
    reading: Mapping[str, Any] | None = None
    saved_in: Path | None = None
    chosen_parts: frozenset[str] | None = None

    # What each kind of change answers

    @property
    def feature_layer(self) -> int | None:
        """The hidden state after which blocks are skipped; None if none are."""
        return None

    @property
    def adapted(self) -> str:
        """What was changed, in few words."""
        raise NotImplementedError

    @property
    def keeps_names(self) -> bool:
        """Whether the ViT's tensors have the names that they had, so that any loader reads them as they are trained."""
        return False

    @property
    def has_run(self) -> bool:
        """Whether the ViT has run since it was changed, so that what is trained should have gradients."""
        raise NotImplementedError

    def part_of(self, name: str) -> str:
        """Return the part of a multimodal LLM that a parameter belongs to; `"other"` for the tower's own.

        Args:
            name: Its name in the ViT.
        """
        raise NotImplementedError

    def adapted_parameters(self) -> dict[str, nn.Parameter]:
        """Return what the change added or trains, by name in the ViT."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Return what decides which tensors there are, and what they compute: a run resumes with the same."""
        raise NotImplementedError

    def original_state(self, state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
        """Return a state dict for `from_pretrained`, with the names that the ViT had before; all else as it is.

        Args:
            state: A state dict of the ViT or of a model around it, gathered if it was sharded.
            prefix: Prefix of the ViT's names in it.
        """
        raise NotImplementedError

    def in_saved_types(self) -> AbstractContextManager[None]:
        """Return a context in which the ViT's own parameters have the types that `original_state` gives them."""
        return contextlib.nullcontext()

    def write(self, folder: Path, gathered: Mapping[str, Tensor] | None = None, writes: bool | None = None) -> None:
        """Write a saved folder, as `save_pretrained` does, also from gathered weights.

        Args:
            folder: Created if it does not exist.
            gathered: Weights of the ViT by name that another library has gathered; then no process waits for another.
            writes: Whether this process writes. None: every process that calls this, but of sharded weights the first.

        Raises:
            CheckpointError: As `save_pretrained` does.
        """
        raise NotImplementedError

    def load_into(self, folder: str | Path) -> None:
        """Put saved weights into this ViT, which was changed with the same settings.

        Raises:
            CheckpointError: If the folder is damaged, or of other settings or other base weights; nothing is changed.
        """
        raise NotImplementedError

    def merge(self) -> Any:
        """Return the plain ViT with what was trained folded into its weights.

        Raises:
            MergeError: If there is no exact merge.
        """
        raise NotImplementedError

    def train_in_float32(self) -> int:
        """Keep what is trained in float32, if the ViT is in half precision; return how many were cast."""
        raise NotImplementedError

    # The same for all

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that are trained."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def unfreeze(self) -> None:
        """Train again what was meant to be trained, after other code has frozen the ViT.

        `get_peft_model`, `prepare_model_for_kbit_training`, open_clip's `lock_image_tower` and `requires_grad_(False)`
        freeze everything that exists when they are called.
        """
        for parameter in self.adapted_parameters().values():
            parameter.requires_grad_(True)
        self.chosen_parts = None

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained, of how many."""
        trained, total = count(self.trainable_parameters()), count(self.parameters())
        share = 100 * trained / total if total else 0.0
        print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {share:.4f}")

    @check_kinds
    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recompute activations of the blocks during backward, by the ViT library's own switch.

        Args:
            gradient_checkpointing_kwargs: As transformers takes them; `use_reentrant` must not be True.

        Raises:
            ReentrantCheckpointError: If `use_reentrant=True` was asked for.
            UnsupportedViTError: If the ViT has no such switch.
        """
        set_activation_checkpointing(self.vit, on=True, options=gradient_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Undo `gradient_checkpointing_enable`."""
        set_activation_checkpointing(self.vit, on=False)
