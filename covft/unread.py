"""Blocks behind the features that are read: they are not run.

A multimodal LLM that reads `hidden_states[-2]` has no use for the last block. It stays where it is, with its weights;
its forward hands on what it gets, so that as many hidden states are collected as before.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from covft.adapters.spec import ViTSpec
from covft.errors import ConfigError, LayerIndexError
from covft.methods import Method


class HandOn(Method):
    """Stands for the forward of a block that nobody reads. The first call runs it, to see the form of what it returns.

    Args:
        block: The block.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block, "forward")
        self.in_tuple: bool | None = None

    @property
    def block(self) -> nn.Module:
        """The block."""
        return self.owner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The tokens as they came, in the form in which the block returns them."""
        if self.in_tuple is None:
            output = self.inner(*args, **kwargs)
            self.in_tuple = isinstance(output, tuple)
            return output
        tokens = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
        return (tokens, None) if self.in_tuple else tokens


def last_read(spec: ViTSpec, feature_layer: int | None) -> int:
    """Index of the last block whose output is read.

    Args:
        spec: What is known of the ViT.
        feature_layer: Index into its hidden states, the embeddings being 0; None reads all.

    Raises:
        ConfigError: If there is no such hidden state, or no block before it, or the blocks behind it change the width.
    """
    depth = spec.depth
    if feature_layer is None:
        return depth - 1
    last = depth + feature_layer if feature_layer < 0 else feature_layer - 1
    if not 0 <= last < depth:
        raise ConfigError(
            f"feature_layer={feature_layer} is no output of a block.",
            expected=f"1 to {depth}, or -{depth} to -1  ({spec})",
            got=feature_layer,
            fix="feature_layer=-2",
        )
    widths = {block.embed_dim for block in spec.blocks[last:]}
    if len(widths) > 1:
        raise ConfigError(
            f"The blocks behind feature_layer={feature_layer} cannot be left out: they change the width of the tokens.",
            expected=f"blocks of width {spec.blocks[last].embed_dim}",
            got=", ".join(map(str, sorted(widths))),
            fix="feature_layer=None",
        )
    return last


def check_layers(layers: tuple[int, ...], last: int, spec: ViTSpec) -> None:
    """Refuse to adapt blocks that will not run.

    Args:
        layers: Indices of blocks, not negative.
        last: The last block whose output is read.
        spec: What is known of the ViT.

    Raises:
        LayerIndexError: If a layer is behind the last.
    """
    behind = [layer for layer in layers if layer > last]
    if behind:
        raise LayerIndexError(
            "layers asks for blocks behind the features that are read.",
            expected=f"indices up to {last}  ({spec})",
            got=", ".join(map(str, behind)),
            fix=f"layers={[layer for layer in layers if layer <= last] or [last]}",
        )


def check_read(spec: ViTSpec, feature_layer: int | None, read: Iterable[int]) -> None:
    """Refuse to leave out blocks whose output a model reads.

    Args:
        spec: What is known of the ViT.
        feature_layer: The setting.
        read: Hidden states that the model reads.

    Raises:
        ConfigError: If one of them is behind the setting.
    """
    if feature_layer is None:
        return
    wanted = max(last_read(spec, layer) if layer else -1 for layer in read)
    if last_read(spec, feature_layer) < wanted:
        raise ConfigError(
            f"feature_layer={feature_layer} would leave out blocks that the model reads.",
            expected=f"{wanted - spec.depth} or behind  ({spec})",
            got=feature_layer,
            fix=f"feature_layer={wanted - spec.depth}",
        )


def leave_out(vit: nn.Module, spec: ViTSpec, last: int) -> None:
    """Let the blocks behind the last hand on what they get.

    Args:
        vit: The ViT.
        spec: What is known of it.
        last: The last block whose output is read.
    """
    for index in range(last + 1, spec.depth):
        HandOn(vit.get_submodule(spec.blocks[index].path)).stand_in()


def run_again(vit: nn.Module) -> None:
    """Undo `leave_out`.

    Args:
        vit: The ViT.
    """
    for module in vit.modules():
        method = module.__dict__.get("forward")
        if isinstance(method, HandOn):
            method.step_back()
