"""A tuned ViT: what `covft.tune` returns for a ViT alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from covft.adapters.spec import ViTSpec
from covft.conditioning.calls import CalledWithText
from covft.conditioning.scope import freeze_batch_norms
from covft.errors import ConfigError, MergeError
from covft.surgery.activation_checkpointing import set_activation_checkpointing
from covft.text import TextEncoder
from covft.tuning import saving
from covft.tuning.change import Applied, Change
from covft.tuning.method import Method
from covft.utils.arguments import check_kinds, check_strength
from covft.utils.parameters import count, param_groups


class TunedViT(CalledWithText, nn.Module):
    """A ViT that a method tunes, in place. It can stand where the ViT stood.

    Attributes:
        vit: The ViT, changed.
        method: The method with its options.
        spec: What covft knows of the ViT.
        change: What the method changed.
        before: What stood there before, for `covft.untune`.
        text_encoder: The frozen text encoder of a method that needs text; None for others, and after unpickling.
    """

    def __init__(
        self,
        vit: nn.Module,
        method: Method,
        spec: ViTSpec,
        change: Change,
        before: Applied,
        text_encoder: TextEncoder | None = None,
    ) -> None:
        super().__init__()
        self.vit = vit
        self.method = method
        self.spec = spec
        self.change = change
        self.before = before
        self.text_name = None if text_encoder is None else text_encoder.name
        self.text_dim = None if text_encoder is None else text_encoder.text_dim
        self.text_revision = getattr(text_encoder, "revision", None)
        self.__dict__["text_encoder"] = text_encoder  # past nn.Module: a text encoder never becomes a child
        self.training = vit.training

    @property
    def conditioning(self) -> Any:
        """Carries the text to what the method added; None for a method without text."""
        return self.change.conditioning

    @property
    def reads_states(self) -> bool:
        """Whether texts are given as states of their tokens, `(S, L, C)`."""
        return self.method.reads_states

    def forward(
        self,
        images: Tensor | None = None,
        text: str | Sequence[str] | Tensor | Mapping[str, Tensor] | None = None,
        *,
        index: Tensor | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Encode images.

        Args:
            images: What the ViT takes first; may also come by the ViT's own keyword, such as `pixel_values=`.
            text: As for `ContextEncoder`; a method without text ignores it.
            index: Which text each image has, shape `(B,)`; None where image i has text i.
            **kwargs: Passed to the ViT.

        Returns:
            What the ViT itself returns, unchanged in type.

        Raises:
            MissingContextError: If the method needs text and there is none.
            ShapeError: If texts and images do not fit together.
        """
        if self.conditioning is None and text is not None:
            text = index = None
        return super().forward(images, text, index=index, **kwargs)

    @property
    def strength(self) -> float:
        """Strength of what was trained: 0 for the ViT as it was, 1 as trained.

        Raises:
            ConfigError: If the method has no such dial, or it is set to anything but a number from 0 to 1.
        """
        return self._dials()[0].strength

    @strength.setter
    def strength(self, strength: float) -> None:
        dials, strength = self._dials(), check_strength(strength)
        for module in dials:
            module.strength = strength

    def _dials(self) -> list[Any]:
        dials = [part for m in self.change.added.values() for part in m.modules() if hasattr(part, "strength")]
        if not dials:
            raise ConfigError(
                f"{self.method.name!r} has no strength to set.", fix='"covft" and "cross_attention" have one'
            )
        return dials

    def trained_names(self) -> tuple[str, ...]:
        """Return the names in the ViT of what the method trains, as it was set up: own and new parameters."""
        return (*self.change.trained, *(name for name, p in self.change.new_parameters() if p.is_floating_point()))

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that are trained."""
        return (parameter for parameter in self.vit.parameters() if parameter.requires_grad)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained, of how many."""
        trained, total = count(self.trainable_parameters()), count(self.parameters())
        share = 100 * trained / total if total else 0.0
        print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {share:.4f}")

    @check_kinds
    def param_groups(self, lr: float, *, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Group the trained parameters for an optimizer; biases, norms and other vectors are not decayed.

        Args:
            lr: Learning rate.
            weight_decay: Weight decay of the matrices.

        Returns:
            Dicts with `params`, `lr`, `weight_decay` and `name`; every trained parameter is in exactly one.
        """
        name = self.method.name
        return param_groups(self.vit.named_parameters(), lambda _: name, lr=lr, rates={}, weight_decay=weight_decay)

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

    def merge(self) -> nn.Module:
        """Return the plain ViT with what was trained folded into its weights, exactly; this object is then spent.

        Returns:
            The ViT, in place: without hooks, added modules or adapters.

        Raises:
            MergeError: If the method's effect depends on the input.
        """
        if not self.method.merges:
            raise MergeError(
                f"What {self.method.name!r} adds cannot be folded into the weights: it depends on the input.",
                fix="keep the tuned ViT, or covft.untune(tuned)",
            )
        self.method.fold(self.vit, self.change)
        return self.vit

    @check_kinds
    def save_pretrained(self, folder: str | Path) -> None:
        """Save what was added or trained, and what it belongs to; `covft.load` is the inverse.

        Args:
            folder: Created if it does not exist.

        Raises:
            CheckpointError: If the folder is a file or cannot be written to, or weights are on the meta device.
        """
        saving.save(self, folder)

    def extra_repr(self) -> str:
        """Return one line about the method, for `print(tuned)`."""
        return f"method={self.method!r}"


class FrozenBatchNorms(nn.Module):
    """Keeps the statistics of batch norms of a tower that is not trained as a whole; a hook of the ViT."""

    def keep(self, vit: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Put batch norms into eval mode."""
        if vit.training:
            freeze_batch_norms(vit)
