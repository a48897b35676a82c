"""Finding blocks, FFNs and norms by structure.

A block is an item of a list of modules that has one child which looks like attention and one child
which looks like an FFN. Pooling heads, relative-position networks and other look-alikes sit elsewhere
and are never found.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from torch import nn

from covft.adapters.spec import BlockSpec
from covft.errors import UnsupportedViTError
from covft.sharding import shape_of

_FFN_NAMES = ("mlp", "ffn", "feed_forward")
_FFN_CLASS = re.compile(r"mlp|ffn|feedforward|swiglu|geglu", re.IGNORECASE)
_ATTENTION = re.compile(r"att(entio)?n", re.IGNORECASE)
_NORM_CLASS = re.compile(r"layernorm|rmsnorm", re.IGNORECASE)


def find_blocks(vit: nn.Module, blocks: str | None = None, mlp: str | None = None) -> tuple[BlockSpec, ...]:
    """Find the transformer blocks of a ViT.

    Args:
        vit: The model; not run, not changed.
        blocks: Dotted path of the list of blocks; None searches for it.
        mlp: Attribute of a block that holds its FFN; None searches for it.

    Returns:
        One spec per block, in module order; empty if nothing looks like a block.

    Raises:
        UnsupportedViTError: If a path that was given is not there.
    """
    found: list[BlockSpec] = []
    for prefix, container in _containers(vit, blocks):
        for name, block in container.named_children():
            slot = _slot_of(block, mlp) if blocks is None else (mlp or _slot_of(block, None))
            if slot is None or not isinstance(getattr(block, slot, None), nn.Module):
                if blocks is None:
                    continue
                raise UnsupportedViTError(
                    f"Block {prefix}.{name} has no FFN where one was expected.",
                    expected=f"a module {mlp or ' or '.join(_FFN_NAMES)!r}",
                    got=", ".join(child for child, _ in block.named_children()) or "no children",
                )
            found.append(_describe_block(len(found), f"{prefix}.{name}".lstrip("."), block, slot))
    return tuple(found)


def norm_modules(block: nn.Module, mlp: str) -> tuple[str, ...]:
    """Dotted paths of the affine norms of a block outside its FFN, query and key norms included."""
    return tuple(
        name
        for name, module in block.named_modules()
        if is_norm(module) and next(module.parameters(recurse=False), None) is not None
        if not (name == mlp or name.startswith(f"{mlp}."))
    )


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a LayerNorm or an RMSNorm, of whichever library."""
    return any(_NORM_CLASS.search(cls.__name__) for cls in type(module).__mro__ if cls is not nn.Module)


def _containers(vit: nn.Module, blocks: str | None) -> Iterator[tuple[str, nn.Module]]:
    if blocks is None:
        yield from ((n, m) for n, m in vit.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential))
        return
    try:
        yield blocks, vit.get_submodule(blocks)
    except AttributeError:
        raise UnsupportedViTError(
            f"{type(vit).__name__} has no blocks at {blocks!r}.",
            expected="the dotted path of a list of blocks",
            got=", ".join(name for name, _ in vit.named_children()),
        ) from None


def _slot_of(block: nn.Module, mlp: str | None) -> str | None:
    children = dict(block.named_children())
    attentive = [n for n, m in children.items() if _ATTENTION.search(n) or _ATTENTION.search(type(m).__name__)]
    slots = [n for n, m in children.items() if n not in attentive and _looks_like_ffn(n, m)]
    if mlp is not None:
        slots = [name for name in slots if name == mlp]
    return slots[0] if attentive and len(slots) == 1 else None


def _looks_like_ffn(name: str, module: nn.Module) -> bool:
    if name not in _FFN_NAMES and not _FFN_CLASS.search(type(module).__name__):
        return False
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return False  # a bag of parts that the block calls one by one
    return len(_projections(module)) >= 2


def _projections(module: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    for child in module.children():
        if isinstance(getattr(child, "in_features", None), int):
            found.append(child)  # counted once, whatever a wrapper around a Linear holds inside
        else:
            found.extend(_projections(child))
    return found


def _describe_block(index: int, path: str, block: nn.Module, slot: str) -> BlockSpec:
    ffn = block.get_submodule(slot)
    projections = _projections(ffn)
    if not projections:
        raise UnsupportedViTError(
            f"The FFN of block {path} has no linear layers, so its width is unknown.",
            expected="a feed-forward module of two or more nn.Linear",
            got=type(ffn).__name__,
        )
    return BlockSpec(
        index=index,
        path=path,
        mlp=slot,
        mlp_class=type(ffn).__name__,
        embed_dim=int(projections[0].in_features),  # type: ignore[arg-type]
        ffn_dim=int(projections[-1].in_features),  # type: ignore[arg-type]
        ffn_parameters=sum(math.prod(shape_of(parameter)) for parameter in ffn.parameters()),
        norms=norm_modules(block, slot),
    )
