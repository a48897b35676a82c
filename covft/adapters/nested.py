"""Describes towers that hold a ViT of another library."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from covft.adapters.spec import BlockSpec, ViTSpec, class_names


class NestedViT:
    """An adapter for modules that hold a ViT as `vit`, and call it: the spec is that of the ViT inside.

    Args:
        name: Name of the adapter.
        classes: Qualified names of the outer classes.
    """

    def __init__(self, name: str, *classes: str) -> None:
        self.name, self.classes = name, classes

    def matches(self, vit: nn.Module) -> bool:
        """Return whether the module's class is one of `classes` or a subclass."""
        return any(name in self.classes for name in class_names(vit))

    def describe(self, vit: nn.Module) -> ViTSpec:
        """Describe the ViT inside, with its paths in the outer module."""
        from covft.adapters.registry import describe

        outer: Any = vit
        spec = describe(outer.vit)
        return replace(spec, blocks=tuple(map(_inside, spec.blocks)))


def _inside(block: BlockSpec) -> BlockSpec:
    return replace(block, path=f"vit.{block.path}", aliases=tuple(f"vit.{alias}" for alias in block.aliases))


NESTED = (NestedViT("covft/vit_tower", "covft.integrations.building.tower.ViTTower"),)
