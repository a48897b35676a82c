"""Registers adapters and chooses the one for a model.

A package adds an adapter through the entry point group `covft.adapters`, without an import by its users. A script adds
one with `register_adapter`, or passes it to one call as `adapter=`.
"""

from __future__ import annotations

import warnings
from importlib import metadata

from torch import nn

from covft.adapters.families import FAMILIES
from covft.adapters.nested import NESTED
from covft.adapters.spec import Adapter, ViTSpec
from covft.errors import ConfigError, UnknownViTError
from covft.utils.arguments import check_kinds

ENTRY_POINT_GROUP = "covft.adapters"

_registered: dict[str, Adapter] = {}


def register_adapter(adapter: Adapter) -> Adapter:
    """Add an adapter, which takes precedence over the built-in ones.

    Args:
        adapter: An object with `name`, `matches(vit)` and `describe(vit)`.

    Returns:
        The adapter itself.

    Raises:
        ConfigError: If one of these is missing, or its name is taken.
    """
    missing = [name for name in ("name", "matches", "describe") if not hasattr(adapter, name)]
    if missing:
        raise ConfigError(
            f"{type(adapter).__name__} is not an adapter.",
            expected="name, matches(vit) and describe(vit)",
            got=f"no {', '.join(missing)}",
        )
    if adapter.name in {known.name for known in list_adapters()}:
        raise ConfigError(f"An adapter named {adapter.name!r} is registered already.", fix="choose another name")
    _registered[adapter.name] = adapter
    return adapter


def list_adapters() -> list[Adapter]:
    """Return all adapters, in order of precedence."""
    ours: list[Adapter] = [*NESTED, *FAMILIES]
    taken = {adapter.name for adapter in (*_registered.values(), *ours)}
    return [*_registered.values(), *_from_entry_points(taken), *ours]


@check_kinds
def describe(vit: nn.Module, adapter: Adapter | None = None) -> ViTSpec:
    """Describe a model as `wrap` sees it: blocks, FFNs, widths, norms. The model is neither run nor changed.

    Args:
        vit: A vision transformer.
        adapter: The adapter to use; None chooses one from the registry.

    Raises:
        UnknownViTError: If no adapter knows the model, or it has no transformer blocks.
        UnsupportedViTError: If the model is known but not built as its adapter says.

    Example:
        >>> import timm
        >>> print(describe(timm.create_model("test_vit")))
        timm VisionTransformer, 6 blocks
    """
    if adapter is None:
        adapter = next((known for known in list_adapters() if known.matches(vit)), None)
    if adapter is None:
        raise UnknownViTError(
            f"No adapter knows {type(vit).__module__}.{type(vit).__qualname__}.",
            expected="a vision transformer of timm, open_clip or transformers",
            known=", ".join(known.name for known in list_adapters()),
            fix="adapter=covft.adapters.ViTFamily(name=..., classes=(...,), library=..., blocks='path.of.blocks')",
        )
    return adapter.describe(vit)


def _from_entry_points(taken: set[str]) -> list[Adapter]:
    """Load the adapters of installed packages; warn about and skip those that are broken or reuse a name."""
    found: list[Adapter] = []
    for point in metadata.entry_points(group=ENTRY_POINT_GROUP):
        try:
            loaded = point.load()
            adapter: Adapter = loaded() if isinstance(loaded, type) else loaded
            if adapter.name in taken:
                raise ConfigError(f"an adapter named {adapter.name!r} is registered already")
        except Exception as error:  # foreign code must not break every other ViT
            warnings.warn(f"The adapter {point.value!r} is left out: {error}", UserWarning, stacklevel=2)
            continue
        taken.add(adapter.name)
        found.append(adapter)
    return found
