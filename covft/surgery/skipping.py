"""Skips the blocks after the hidden state that is read.

A multimodal LLM that reads `hidden_states[-2]` has no use for the last block. The block stays where it is, with its
weights, but its forward returns its input, so that as many hidden states are collected as before.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from covft.adapters.spec import ViTSpec
from covft.errors import ConfigError, LayerIndexError
from covft.surgery.overrides import Override
from covft.utils.torch_internals import remove_hooks


class SkippedBlock(Override):
    """Replaces the forward of a block: returns the tokens as they came, in the form in which the block returns them.

    The form (a tensor, or a tuple that begins with one) is that of the block before it, which is read. Only where that
    block is of another class does the first call run the skipped block, without gradients, to see its form.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block, "forward")
        self.extra_outputs: int | None = None  # in a tuple, after the tokens; -1 for a tensor

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the tokens."""
        if self.extra_outputs is None:
            with torch.no_grad():
                self.note_form(self.owner, args, self.inner(*args, **kwargs))
        tokens = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
        return (tokens, *[None] * self.extra_outputs) if self.extra_outputs >= 0 else tokens  # type: ignore[operator]

    def note_form(self, block: nn.Module, args: tuple, output: Any) -> None:
        """Note in which form a block returns its tokens; a forward hook."""
        if self.extra_outputs is None:
            self.extra_outputs = len(output) - 1 if isinstance(output, tuple) else -1


def last_read(spec: ViTSpec, feature_layer: int | None) -> int:
    """Return the index of the last block whose output is read.

    Args:
        spec: What is known of the ViT.
        feature_layer: Index into its hidden states, the embeddings being 0; None reads all.

    Raises:
        ConfigError: If there is no such hidden state, or no block before it, or later blocks change the width.
    """
    depth = spec.depth
    if feature_layer is None:
        return depth - 1
    last = depth + feature_layer if feature_layer < 0 else feature_layer - 1
    if not 0 <= last < depth:
        raise ConfigError(
            f"feature_layer={feature_layer} is not the output of a block.",
            expected=f"1 to {depth}, or -{depth} to -1  ({spec})",
            got=feature_layer,
            fix="feature_layer=-2",
        )
    widths = {block.embed_dim for block in spec.blocks[last:]}
    if len(widths) > 1:
        raise ConfigError(
            f"The blocks after feature_layer={feature_layer} cannot be skipped: they change the width of the tokens.",
            expected=f"blocks of width {spec.blocks[last].embed_dim}",
            got=", ".join(map(str, sorted(widths))),
            fix="feature_layer=None",
        )
    return last


def last_of(spec: ViTSpec, read: Any) -> int:
    """Return the index of the last block that a model reads; -1 if it reads the embeddings alone.

    Args:
        spec: What is known of the ViT.
        read: The hidden state that the model reads, or several; None for the last.
    """
    layers: Iterable[int] = (-1,) if read is None else (read,) if isinstance(read, int) else read
    embeddings = (0, -spec.depth - 1)
    return max(-1 if layer in embeddings else last_read(spec, layer) for layer in layers)


def check_layers(layers: tuple[int, ...], last: int, spec: ViTSpec) -> None:
    """Refuse to adapt blocks that will be skipped.

    Args:
        layers: Indices of blocks, not negative.
        last: The last block whose output is read.
        spec: What is known of the ViT.

    Raises:
        LayerIndexError: If a layer is after the last.
    """
    skipped = [layer for layer in layers if layer > last]
    if skipped:
        raise LayerIndexError(
            "layers asks for blocks after the hidden state that is read.",
            expected=f"indices up to {last}  ({spec})",
            got=", ".join(map(str, skipped)),
            fix=f"layers={[layer for layer in layers if layer <= last] or [last]}",
        )


def check_read(spec: ViTSpec, feature_layer: int | None, read: Any) -> None:
    """Refuse to skip blocks whose output a model reads.

    Args:
        spec: What is known of the ViT.
        feature_layer: The setting.
        read: The hidden state that the model reads, or several; None for the last.

    Raises:
        ConfigError: If one of them is after the setting.
    """
    if feature_layer is None:
        return
    wanted = last_of(spec, read)
    if last_read(spec, feature_layer) < wanted:
        raise ConfigError(
            f"feature_layer={feature_layer} would skip blocks that the model reads.",
            expected=f"{wanted - spec.depth} or later  ({spec})",
            got=feature_layer,
            fix=f"feature_layer={wanted - spec.depth}",
        )


def skip_blocks(vit: nn.Module, spec: ViTSpec, last: int) -> None:
    """Skip the blocks after the last one that is read."""
    read = spec.blocks[last].path
    for path in dict.fromkeys(block.path for block in spec.blocks[last + 1 :] if block.path != read):
        skipped = SkippedBlock(vit.get_submodule(path))
        skipped.install()
        before = vit.get_submodule(read)
        if type(before) is type(skipped.owner):
            before.register_forward_hook(skipped.note_form)


def run_all_blocks(vit: nn.Module) -> None:
    """Undo `skip_blocks`."""
    for module in vit.modules():
        method = module.__dict__.get("forward")
        if isinstance(method, SkippedBlock):
            method.remove()
        remove_hooks(module, lambda owner: isinstance(owner, SkippedBlock))
