"""Attentions that take more tokens than the image's: found in a block, and known to have no positions of their own."""

from __future__ import annotations

import inspect
import re

from torch import nn

from covft.adapters.discovery import is_norm
from covft.adapters.spec import BlockSpec
from covft.errors import UnsupportedViTError
from covft.tuning.method import Tower

# Positions inside an attention (rotary, relative, windowed) are for the image's tokens alone.
_POSITIONS = re.compile(r"rope|rotary|position|rel_pos|relative|window|cu_seqlens|grid|freqs", re.IGNORECASE)
_ATTENTION = re.compile(r"att(entio)?n", re.IGNORECASE)


def attention_of(tower: Tower, block: BlockSpec, name: str) -> str:
    """Return the path of a block's attention, which treats all tokens alike.

    Args:
        tower: The ViT.
        block: The block.
        name: The method that asks, for the message.

    Raises:
        UnsupportedViTError: If the block has several attentions or none, or one with positions, windows or a mask.
    """
    module = tower.vit.get_submodule(block.path)
    found = [child for child, part in module.named_children() if is_attention(child, part)]
    if len(found) != 1:
        raise UnsupportedViTError(
            f"{name!r} needs one attention in each block.", got=f"{', '.join(found) or 'none'} in {block.path}"
        )
    path = f"{block.path}.{found[0]}"
    check_positions(tower, path, name)
    return path


def check_positions(tower: Tower, path: str, name: str) -> None:
    """Refuse an attention whose result depends on where a token is, or towers that mask or pack tokens.

    Raises:
        UnsupportedViTError: If it does, or the tower does.
    """
    why = _why_not(tower, tower.vit.get_submodule(path))
    if why is not None:
        raise UnsupportedViTError(
            f"{name!r} adds tokens to the attention of {tower.spec}, which {why}.",
            expected="attention over all tokens of an image, with positions added before the blocks alone",
            got=type(tower.vit.get_submodule(path)).__name__,
            fix='covft.tune(vit, "covft") or "lora", which do not add tokens',
        )


def _why_not(tower: Tower, attention: nn.Module) -> str | None:
    if tower.spec.input.is_packed:
        return "takes all images as one sequence"
    if tower.spec.input.mask_argument is not None:
        return "masks padding"
    arguments = list(inspect.signature(attention.forward).parameters)
    names = [name for name, _ in attention.named_parameters()] + [name for name, _ in attention.named_buffers()]
    names += [name for name, _ in attention.named_modules()] + arguments
    plain = {name: value for name, value in vars(attention).items() if not callable(value)}
    names += [name for name, value in plain.items() if value is not None and value is not False]
    hit = next((n for n in names if _POSITIONS.search(n)), None)
    if hit is not None:
        return f"has positions or windows inside ({hit})"
    windowed = re.search(r"window|swin|area|grid|axial", type(attention).__name__, re.IGNORECASE)
    return "works in windows" if windowed else None


def is_attention(name: str, module: nn.Module) -> bool:
    """Return whether a child of a block is its attention.

    Args:
        name: Its name in the block.
        module: The child.
    """
    if is_norm(module) or not any(len(parameter.shape) > 1 for parameter in module.parameters()):
        return False  # a norm or a scale that is named for the attention
    return bool(_ATTENTION.search(name) or _ATTENTION.search(type(module).__name__))
