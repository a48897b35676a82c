"""A ViT that was changed, with what is needed to save it and to undo the change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from covft.adapters.spec import ViTSpec
from covft.conditioning import Conditioning
from covft.config import CoVFTConfig
from covft.errors import UnsupportedViTError
from covft.surgery.slot import AdaptedFFN, Original
from covft.surgery.split import SecondHalf
from covft.utils.parameters import count
from covft.utils.peft import is_adapter

NULL_TEXT = "covft_null_text"
"""Name of the null text in the ViT."""


class TextSource(NamedTuple):
    """The text encoder that the router was trained with.

    Attributes:
        name: What `as_text_encoder` builds it from, where it can; None where no text is used.
        text_dim: Width C of its features.
        revision: Revision on the Hugging Face Hub, if known.
    """

    name: str | None = None
    text_dim: int | None = None
    revision: str | None = None


class WrappedViT(nn.Module):
    """A ViT with adapted FFNs in the place of its own.

    Args:
        vit: The ViT, changed in place.
        covft_config: The settings, with `layers` resolved.
        spec: What is known of the ViT.
        conditioning: Carries the text to the slots.
        original: What stood in the ViT before.
        text_source: Which text encoder the router knows.

    Attributes:
        layers: Indices of the adapted blocks, ascending.
        norms: Names of the ViT's norm parameters that are trained.
        reading: How `covft.attach` reads the text from prompts; None if nothing is read.
        saved_in: The folder it was last saved to; a trainer sets it to None when the weights change.
    """

    reading: Mapping[str, Any] | None = None
    saved_in: Path | None = None

    def __init__(
        self,
        vit: nn.Module,
        covft_config: CoVFTConfig,
        spec: ViTSpec,
        conditioning: Conditioning,
        original: Original,
        text_source: TextSource,
    ) -> None:
        super().__init__()
        self.vit = vit
        self.covft_config = covft_config
        self.spec = spec
        self.conditioning = conditioning
        self.original = original
        self.text_source = text_source
        self.layers: tuple[int, ...] = tuple(sorted(covft_config.layers or ()))
        self.norms: tuple[str, ...] = tuple(original.values)
        self.training = vit.training
        self.chosen_parts: frozenset[str] | None = None  # of train_only, which may leave all of this out on purpose

    @property
    def text_name(self) -> str | None:
        """Name of the text encoder that the router knows."""
        return self.text_source.name

    @property
    def text_dim(self) -> int | None:
        """Width C of the text features; None where no text is used."""
        return self.text_source.text_dim

    def slots(self) -> dict[int, AdaptedFFN]:
        """Return the adapted FFNs, by layer; without those of blocks that were removed from the ViT since."""
        found: dict[int, AdaptedFFN] = {}
        for layer in self.layers:
            slot = module_at(self.vit, self.spec.blocks[layer].mlp_path)
            if isinstance(slot, AdaptedFFN) and slot.layer == layer:
                found[layer] = slot
        if len(found) == len(self.layers):
            return found
        moved = {slot.layer: slot for slot in self.vit.modules() if isinstance(slot, AdaptedFFN)}
        return dict(sorted({**moved, **found}.items()))

    def check_in_place(self, purpose: str, *, complete: bool = False) -> None:
        """Refuse a ViT whose adapted FFNs are not where they were put.

        Args:
            purpose: What was asked for, as the subject of a sentence.
            complete: Whether blocks that were removed are refused, too.

        Raises:
            UnsupportedViTError: If blocks were renumbered, or FFNs replaced, since the ViT was wrapped.
        """
        wrong: list[str] = []
        for layer in self.layers:
            block = self.spec.blocks[layer]
            for path in (block.mlp_path, *([] if block.output_path is None else [block.output_path])):
                module = module_at(self.vit, path)
                slot = module.slot if isinstance(module, SecondHalf) else module
                if module is None and module_at(self.vit, block.path) is None:
                    if complete:
                        wrong.append(f"{path} is gone")
                elif not isinstance(slot, AdaptedFFN):
                    wrong.append(f"{path} is {type(slot).__name__}")
                elif slot.layer != layer:
                    wrong.append(f"{path} is that of block {slot.layer}")
        if wrong:
            raise UnsupportedViTError(
                f"{purpose} needs the adapted FFNs where wrap() put them, but other code has changed the blocks since.",
                expected=f"adapted FFNs in blocks {', '.join(map(str, self.layers))}",
                got="; ".join(wrong[:4]) + ("; ..." if len(wrong) > 4 else ""),
                fix="remove or replace blocks before covft.wrap(...)",
            )

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that are trained."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def adapted_parameters(self) -> dict[str, nn.Parameter]:
        """Return what `wrap` added or trains, by name in the ViT: experts, routers with their contexts, norms.

        Layers that peft has put adapters into are left out: there the adapters are trained instead.
        """
        replaced = tuple(f"{name}." for name, module in self.vit.named_modules() if is_adapter(module))
        return {
            name: parameter
            for name, parameter in self.vit.named_parameters()
            if self.part_of(name) != "other" and parameter.is_floating_point() and not name.startswith(replaced)
        }

    def unfreeze(self) -> None:
        """Train again what `wrap` trains, after other code has frozen the ViT.

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

    def part_of(self, name: str) -> str:
        """Return the part of a parameter: `"experts"`, `"router"` (with the context), `"norms"` or `"other"`.

        Args:
            name: Its name in the ViT.
        """
        for layer in self.layers:
            prefix = f"{self.spec.blocks[layer].mlp_path}."
            if name.startswith(prefix):
                inner = name.removeprefix(prefix)
                if inner.startswith("experts.shared."):
                    return "other"  # the pretrained FFN that low-rank experts share, which stays frozen
                return "experts" if inner.startswith("experts.") else "router"
        if name.startswith(f"{NULL_TEXT}."):
            return "router"
        return "norms" if name in self.norms else "other"


def module_at(root: nn.Module, path: str) -> Any:
    """Return the module at a dotted path; None if there is none."""
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


def prefix_of(module: nn.Module, model: nn.Module) -> str:
    """Return the prefix of a module's tensor names in a model: its path and a dot, or nothing.

    Args:
        module: A part of the model, or the model itself.
        model: The model.
    """
    path = next(name for name, part in model.named_modules() if part is module)
    return f"{path}." if path else ""
