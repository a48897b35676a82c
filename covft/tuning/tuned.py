"""A tuned ViT: what `covft.tune` returns for a ViT alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from covft.adapters.spec import ViTSpec
from covft.checkpoints import pretrained
from covft.conditioning import Conditioning
from covft.conditioning.calls import CalledWithText
from covft.errors import ConfigError, MergeError
from covft.nn.functional import HALF
from covft.surgery.adapted import AdaptedViT
from covft.surgery.precision import narrow_types, widen_weights
from covft.surgery.wrapped import module_at
from covft.text import TextEncoder
from covft.tuning import loading, saving
from covft.tuning.change import Applied, Change, check_removable, finish
from covft.tuning.method import Method
from covft.utils.arguments import check_kinds, check_strength
from covft.utils.parameters import param_groups
from covft.utils.sharding import is_sharded

BATCH_NORMS = "covft_batch_norms"
"""Path of the module that keeps batch norms as they are."""


class TunedViT(CalledWithText, AdaptedViT):
    """A ViT that a method tunes, in place. It can stand where the ViT stood.

    Attributes:
        vit: The ViT, changed.
        method: The method with its options.
        spec: What covft knows of the ViT.
        change: What the method changed.
        before: What stood there before, for `covft.untune`.
        conditioning: Carries the text to what the method added; it needs none for a method without text.
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
        self.conditioning = change.conditioning or Conditioning(spec.input, needs_text=False)
        self.training = vit.training

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
        if not self.method.needs_text:
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

    # What trainers and savers of multimodal LLMs ask

    @property
    def adapted(self) -> str:
        """The method."""
        return repr(self.method)

    @property
    def keeps_names(self) -> bool:
        """Whether the method only trains parameters that were there."""
        return not (set(self.change.added) - {BATCH_NORMS} or self.change.replaced)

    @property
    def has_run(self) -> bool:
        """Whether the ViT has run since the gradients were last dropped."""
        return any(parameter.grad is not None for parameter in self.adapted_parameters().values())

    def part_of(self, name: str) -> str:
        """Return the part of a parameter: that of the method for new ones, else `"other"`."""
        return self.method.part if name.startswith(tuple(f"{path}." for path in self.change.added)) else "other"

    def adapted_parameters(self) -> dict[str, nn.Parameter]:
        """Return what the method trains, by name in the ViT."""
        own = dict(self.vit.named_parameters())
        return {name: own[name] for name in self.trained_names() if name in own}

    def settings(self) -> dict[str, Any]:
        """Return the method with its options, and the width of the text features."""
        return {"method": self.method.name, **self.method.to_dict(), "text_dim": self.text_dim}

    def original_state(self, state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
        """Return a state dict by the names of the ViT before tuning.

        A method that only trains parameters that were there keeps their values; otherwise the ViT has its old ones.
        """
        if self.keeps_names:
            types = {f"{prefix}{name}": dtype for name, dtype in narrow_types(self.vit, self.before.narrow).items()}
            return {name: tensor.to(types.get(name, tensor.dtype)) for name, tensor in state.items()}
        inside = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        outside = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
        base = {f"{prefix}{name}": tensor for name, tensor in saving.base_tensors(self, inside)}
        return {**outside, **base}

    @contextlib.contextmanager
    def in_saved_types(self) -> Iterator[None]:
        """Give parameters that are kept in float32 the type of the ViT."""
        wide = {name: self.vit.get_parameter(name).data for name in self.before.narrow}
        try:
            for name, dtype in narrow_types(self.vit, self.before.narrow).items():
                self.vit.get_parameter(name).data = wide[name].to(dtype)
            yield
        finally:
            for name, values in wide.items():
                self.vit.get_parameter(name).data = values

    def write(self, folder: Path, gathered: Mapping[str, Tensor] | None = None, writes: bool | None = None) -> None:
        """Write a saved folder, also from gathered weights."""
        saving.save(self, folder, gathered=gathered, writes=writes)

    def load_into(self, folder: str | Path) -> None:
        """Put saved weights into this ViT, which is tuned by the same method."""
        loading.load_into(self, folder)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Take out the modules that the method has replaced, while peft merges other adapters of the model around."""
        places = [path for path, module in self.change.replaced.items() if module_at(self.vit, path) is module]
        for path in places:
            self.vit.set_submodule(path, nn.Identity())
        try:
            yield
        finally:
            for path in places:
                self.vit.set_submodule(path, self.change.replaced[path])

    def train_in_float32(self) -> int:
        """Keep what the method trains in float32, if the ViT is in half precision.

        An optimizer's small steps are rounded away in half precision. Call it before the optimizer is created; the
        callback, `MLLMTrainer` and the launchers do. New modules compute in the type of their weights, and return that
        of their tokens. The ViT's own weights are cast for each run, so that it computes as before; `covft.untune` and
        `merge()` give them their type back.

        Returns:
            Number of parameters that were cast; sharded ones are left as they are.
        """
        new = [p for _, p in self.change.new_parameters() if p.dtype in HALF and not is_sharded(p)]
        for parameter in new:
            parameter.data = parameter.data.float()
        blocks = (block.path for block in self.spec.blocks)
        own = widen_weights(self.vit, self.change.trained, blocks)
        self.before.narrow.update(own)
        return len(new) + len(own)

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

    def merge(self) -> nn.Module:
        """Return the plain ViT with what was trained folded into its weights, exactly; this object is then spent.

        Returns:
            The ViT, in place: as it was before `covft.tune`, apart from the values of its weights. It can be tuned
            again.

        Raises:
            MergeError: If the method's effect depends on the input, or what was trained is not finite.
            UnsupportedViTError: If it is restored or merged already, distributed, or changed by other code since.
        """
        if not self.method.merges:
            raise MergeError(
                f"What {self.method.name!r} adds cannot be folded into the weights: its effect depends on the input.",
                fix="keep the tuned ViT, or covft.untune(tuned)",
            )
        check_removable(self.vit, self.change, self.before)
        pretrained.remove(self.vit)
        self.method.fold(self.vit, self.change)
        finish(self.vit, self.change, self.before)
        return self.vit

    @check_kinds
    def save_pretrained(self, folder: str | Path) -> None:
        """Save what was added or trained, and what it belongs to; `covft.load` is the inverse.

        Args:
            folder: Created if it does not exist.

        Raises:
            CheckpointError: If the folder is a file or cannot be written to, weights are on the meta device, or the ViT
                is restored or merged already.
        """
        saving.save(self, folder)

    def extra_repr(self) -> str:
        """Return one line about the method, for `print(tuned)`."""
        return f"method={self.method!r}"
