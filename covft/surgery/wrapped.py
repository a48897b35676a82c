"""A ViT that was changed, with what is needed to save it and to undo the change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from covft.adapters.spec import ViTSpec
from covft.conditioning import Conditioning
from covft.config import CoVFTConfig
from covft.surgery.slot import AdaptedFFN, Original
from covft.utils.parameters import count


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
    """

    reading: Mapping[str, Any] | None = None

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

    @property
    def text_name(self) -> str | None:
        """Name of the text encoder that the router knows."""
        return self.text_source.name

    @property
    def text_dim(self) -> int | None:
        """Width C of the text features; None where no text is used."""
        return self.text_source.text_dim

    def slots(self) -> dict[int, AdaptedFFN]:
        """Return the adapted FFNs, by layer."""
        paths = {layer: self.spec.blocks[layer].mlp_path for layer in self.layers}
        return {layer: self.vit.get_submodule(path) for layer, path in paths.items()}  # type: ignore[misc]

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that are trained."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

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
        return "norms" if name in self.norms else "other"
