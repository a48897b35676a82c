"""Finds blocks, FFNs and norms by structure.

A block is an item of a list of modules, or a child of an item, with one child that looks like attention and one that
looks like an FFN. Pooling heads, relative-position networks and other look-alikes are elsewhere and never found.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

from torch import nn

from covft.adapters.spec import BlockSpec
from covft.errors import UnsupportedViTError

_FFN_NAMES = ("mlp", "ffn", "feed_forward")
_FFN_CLASS = re.compile(r"mlp|ffn|feedforward|swiglu|geglu", re.IGNORECASE)
_ATTENTION = re.compile(r"att(entio)?n|mhsa|mhca|shsa|shma|litemla", re.IGNORECASE)
_NORM_CLASS = re.compile(r"layernorm|rmsnorm", re.IGNORECASE)
_RESIDUAL = re.compile(r"residual", re.IGNORECASE)
# Names of the two halves of an FFN that a block calls in turn.
_HALVES = ("intermediate", "output")
_SEPARATE = "a ViT with a separate FFN in each block, such as timm's vit_base_patch16_224"


def find_blocks(
    vit: nn.Module,
    blocks: str | None = None,
    mlp: str | tuple[str, ...] | None = None,
    *,
    block_class: str | None = None,
    folded: tuple[str, ...] = (),
    packing: str = "BND",
) -> tuple[BlockSpec, ...]:
    """Find the FFNs of a ViT.

    Args:
        vit: The model, which is neither run nor changed.
        blocks: Dotted path of the list of blocks; None finds it.
        mlp: Attribute of a block that holds its FFN, or several, of which a block has some; None finds it.
        block_class: Class name of the blocks; None goes by their children.
        folded: Attributes of the FFNs that see an image as several rows.
        packing: Layout of linear FFNs.

    Returns:
        One spec per FFN, in module order; empty if nothing looks like a block.

    Raises:
        UnsupportedViTError: If a given path does not exist.
    """
    names = (mlp,) if isinstance(mlp, str) else mlp
    paths = _paths_by_module(vit)
    found: list[BlockSpec] = []
    seen: set[int] = set()
    for path, block, certain in _candidates(vit, blocks, block_class, names):
        slots = _given(block, names) if certain and names else _slots_of(block, names)
        if certain and not slots:
            raise UnsupportedViTError(
                f"Block {path} has no FFN where one was expected{_why_fused(block)}.",
                expected=f"a module {' or '.join(map(repr, names or _FFN_NAMES))}",
                got=", ".join(child for child, _ in block.named_children()) or "no children",
                fix=_SEPARATE if _is_fused(block) else None,
            )
        for slot in slots:
            ffn = block.get_submodule(slot)
            if id(ffn) in seen:
                continue  # one module in several blocks
            seen.add(id(ffn))
            layout = _layout(path, ffn, packing, folded=slot in folded)
            found.append(_describe_block(len(found), path, block, slot, slots, layout, paths[id(ffn)]))
    return tuple(found)


def norm_modules(block: nn.Module, *ffns: str) -> tuple[str, ...]:
    """Return the dotted paths of a block's affine norms outside its FFNs, query and key norms included."""
    return tuple(
        name
        for name, module in block.named_modules()
        if is_norm(module) and next(module.parameters(recurse=False), None) is not None
        if not any(name == ffn or name.startswith(f"{ffn}.") for ffn in ffns)
    )


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a LayerNorm or an RMSNorm of any library."""
    return any(_NORM_CLASS.search(cls.__name__) for cls in type(module).__mro__ if cls is not nn.Module)


def why_none(vit: nn.Module) -> tuple[str, str]:
    """Return why `find_blocks` found nothing in a model, and the nearest model that works."""
    modules = [m for m in vit.modules() if next(m.parameters(), None) is not None]
    fused = next((m for m in modules if _is_fused(m)), None)
    if fused is not None:
        return _why_fused(fused).removeprefix(": "), _SEPARATE
    attention = next((m for m in modules if m is not vit and _ATTENTION.search(type(m).__name__)), None)
    if attention is not None:
        return (
            f"its {type(attention).__name__} has no FFN beside it, in a block of their own",
            "a ViT, or a hybrid with FFNs such as timm's mobilevitv2_100 or fastvit_sa12",
        )
    return "it has no attention", "a ViT such as timm's vit_base_patch16_224, or a hybrid such as fastvit_sa12"


def _candidates(
    vit: nn.Module, blocks: str | None, block_class: str | None, names: tuple[str, ...] | None
) -> Iterator[tuple[str, nn.Module, bool]]:
    """Yield path, module and whether it must be a block, in module order."""
    if blocks is not None:
        for name, block in _list_at(vit, blocks).named_children():
            yield f"{blocks}.{name}", block, True
        return
    modules = dict(vit.named_modules())
    items: set[str] = set()
    taken: set[str] = set()
    for path, module in modules.items():
        parent = path.rpartition(".")[0]
        if not path or _is_list(module):
            continue
        if block_class is not None:
            if type(module).__name__ == block_class:
                yield path, module, True
            continue
        is_item = _is_list(modules.get(parent, module))
        if is_item:
            items.add(path)
        if (is_item or parent in items) and parent not in taken:
            if _slots_of(module, names):
                taken.add(path)  # a block does not contain blocks
            yield path, module, False


def _list_at(vit: nn.Module, path: str) -> nn.Module:
    try:
        return vit.get_submodule(path)
    except AttributeError:
        raise UnsupportedViTError(
            f"{type(vit).__name__} has no blocks at {path!r}.",
            expected="the dotted path of a list of blocks",
            got=", ".join(name for name, _ in vit.named_children()),
        ) from None


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.Sequential)


def _paths_by_module(vit: nn.Module) -> dict[int, list[str]]:
    paths: dict[int, list[str]] = {}
    for path, module in vit.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    return paths


def _given(block: nn.Module, names: tuple[str, ...]) -> list[str]:
    """Return the named FFNs that a block has."""
    return [name for name in names if isinstance(_submodule(block, name), nn.Module)]


def _submodule(block: nn.Module, path: str) -> nn.Module | None:
    try:
        return block.get_submodule(path)
    except AttributeError:
        return None


def _slots_of(block: nn.Module, names: tuple[str, ...] | None) -> list[str]:
    """Return the FFN of a block with attention, or those of the given names."""
    children = dict(block.named_children())
    attentive = [name for name, child in children.items() if _is_attention(name, child)]
    if not attentive:
        return []
    slots = [name for name, child in children.items() if name not in attentive and _looks_like_ffn(name, child)]
    if names is not None:
        slots = [name for name in slots if name in names]
    elif not slots and _has_halves(children):
        slots = [_HALVES[0]]
    elif len(slots) != 1:
        return []
    return [_without_residual(slot, children[slot]) for slot in slots]


def _is_attention(name: str, module: nn.Module) -> bool:
    if isinstance(module, nn.Identity):
        return False
    if _ATTENTION.search(name) or _ATTENTION.search(type(module).__name__):
        return True
    inner = [child for child in module.children() if next(child.parameters(), None) is not None]
    if _RESIDUAL.search(type(module).__name__) and len(inner) == 1:
        return bool(_ATTENTION.search(type(inner[0]).__name__))
    return False


def _looks_like_ffn(name: str, module: nn.Module) -> bool:
    if name not in _FFN_NAMES and not _FFN_CLASS.search(type(module).__name__):
        return False
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return False  # a bag of parts that the block calls one by one
    return len(_projections(module)) >= 2


def _has_halves(children: dict[str, nn.Module]) -> bool:
    return all(name in children and len(_projections(children[name])) == 1 for name in _HALVES)


def _without_residual(path: str, module: nn.Module) -> str:
    """Return the path of the module inside residual wrappers; the path itself without such a wrapper."""
    while _RESIDUAL.search(type(module).__name__):
        inner = [(n, child) for n, child in module.named_children() if next(child.parameters(), None) is not None]
        if len(inner) != 1 or next(module.parameters(recurse=False), None) is not None:
            break
        ((name, module),) = inner
        path = f"{path}.{name}"
    return path


def _projections(module: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    for child in module.children():
        if _width_in(child) is not None:
            found.append(child)  # counted once, whatever a wrapper of a Linear contains
        else:
            found.extend(_projections(child))
    return found


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd)


def _width_in(module: nn.Module) -> int | None:
    width = getattr(module, "in_channels" if _is_convolution(module) else "in_features", None)
    return width if isinstance(width, int) else None


def _is_fused(module: nn.Module) -> bool:
    return {"in_proj", "mlp_act"} <= {name for name, _ in module.named_children()}


def _why_fused(block: nn.Module) -> str:
    return f": its {type(block).__name__} computes attention and FFN in one matrix product" if _is_fused(block) else ""


def _layout(path: str, ffn: nn.Module, packing: str, *, folded: bool) -> str:
    projections = _projections(ffn)
    if not projections:
        raise UnsupportedViTError(
            f"The FFN of block {path} has no linear layers, so its width is unknown.",
            expected="a feed-forward module of two or more nn.Linear or nn.Conv2d",
            got=type(ffn).__name__,
        )
    rows = "(BP)" if folded else "B"
    if _is_convolution(projections[0]):
        return f"{rows}CHW"
    return f"{rows}ND" if folded else packing


def _describe_block(
    index: int, path: str, block: nn.Module, slot: str, slots: list[str], layout: str, paths: list[str]
) -> BlockSpec:
    halves = [block.get_submodule(slot)]
    output = _HALVES[1] if slot == _HALVES[0] and _has_halves(dict(block.named_children())) else None
    if output is not None:
        halves.append(block.get_submodule(output))
    projections = [projection for half in halves for projection in _projections(half)]
    own = f"{path}.{slot}"
    return BlockSpec(
        index=index,
        path=path,
        mlp=slot,
        mlp_class=type(halves[0]).__name__,
        embed_dim=_width_in(projections[0]) or 0,
        ffn_dim=_width_in(projections[-1]) or 0,
        ffn_parameters=sum(parameter.numel() for half in halves for parameter in half.parameters()),
        norms=norm_modules(block, *slots, *([output] if output else [])),
        layout=layout,
        output=output,
        adds_residual=output is not None and len(inspect.signature(halves[1].forward).parameters) > 1,
        aliases=tuple(other for other in paths if other != own),
    )
