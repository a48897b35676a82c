"""Registers methods by name: the built-in ones, those of packages (entry points), those of a script."""

from __future__ import annotations

import difflib
import importlib
import warnings
from importlib import metadata
from typing import Any

from covft.errors import ConfigError
from covft.tuning.method import Method

ENTRY_POINT_GROUP = "covft.tuning"

# Where each built-in method lives; it is imported when it is first asked for.
_HOMES = {
    "frozen": "covft.tuning.selection:Frozen",
    "full": "covft.tuning.selection:Full",
    "bitfit": "covft.tuning.selection:BitFit",
    "layernorm": "covft.tuning.selection:LayerNorm",
    "ffn": "covft.tuning.selection:FFN",
    "last_layers": "covft.tuning.selection:LastLayers",
    "top_layer": "covft.tuning.selection:TopLayer",
    "lora": "covft.tuning.lora:LoRA",
    "dora": "covft.tuning.lora:DoRA",
    "vpt": "covft.tuning.vpt:VPT",
    "svpt": "covft.tuning.svpt:SVPT",
    "qa_vit": "covft.tuning.qa_vit:QAViT",
    "adaln": "covft.tuning.adaln:AdaLN",
    "cross_attention": "covft.tuning.cross_attention:CrossAttention",
    "q_moe": "covft.tuning.q_moe:QMoE",
}
_registered: dict[str, type[Method]] = {}


def register_method(method: type[Method]) -> type[Method]:
    """Add a method of your own, under its `name`; usable as a decorator.

    Args:
        method: A subclass of `Method` that is a frozen dataclass.

    Returns:
        The class itself.

    Raises:
        ConfigError: If it is not such a class, or its name is taken.
    """
    if not (isinstance(method, type) and issubclass(method, Method) and getattr(method, "name", None)):
        raise ConfigError(
            f"{method!r} is not a tuning method.",
            expected="a subclass of covft.tuning.Method with a name and plan(tower)",
        )
    if method.name in methods():
        raise ConfigError(f"A method named {method.name!r} is registered already.", fix="choose another name")
    _registered[method.name] = method
    return method


def methods() -> dict[str, type[Method]]:
    """Return all methods by name, the built-in ones first."""
    found = {name: _load(home) for name, home in _HOMES.items()}
    for point in metadata.entry_points(group=ENTRY_POINT_GROUP):
        try:
            method = point.load()
            if method.name in found:
                raise ConfigError(f"a method named {method.name!r} is registered already")
        except Exception as error:  # foreign code must not break every other method
            warnings.warn(f"The method {point.value!r} is left out: {error}", UserWarning, stacklevel=2)
            continue
        found[method.name] = method
    return {**found, **_registered}


def make_method(name: str, options: dict[str, Any]) -> Method:
    """Make a method of its name and options.

    Args:
        name: Such as `"lora"`.
        options: Its options.

    Raises:
        ConfigError: If there is no such method or option, or a value cannot work.
    """
    known = methods()
    if name not in known:
        closest = difflib.get_close_matches(name, known, n=len(known), cutoff=0.0)
        raise ConfigError(
            f"The tuning method {name!r} is not known.",
            known=", ".join(closest),
            fix=f"covft.tune(vit, {closest[0]!r})",
        )
    return known[name].of(options)


def _load(home: str) -> type[Method]:
    module, _, name = home.partition(":")
    return getattr(importlib.import_module(module), name)
