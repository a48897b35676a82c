"""covft: context-aware visual fine-tuning of vision transformers for multimodal LLMs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from covft import adapters as adapters
    from covft import checkpoint as checkpoint
    from covft import data as data
    from covft import errors as errors
    from covft import integrations as integrations
    from covft import nn as nn
    from covft import text as text
    from covft.adapters.registry import describe as describe
    from covft.adapters.spec import ViTSpec as ViTSpec
    from covft.checkpoint import load as load
    from covft.config import CoVFTConfig as CoVFTConfig
    from covft.encoder import ContextEncoder as ContextEncoder
    from covft.integrations.attaching import attach as attach
    from covft.integrations.attaching import detach as detach
    from covft.integrations.attaching import get_encoder as get_encoder
    from covft.integrations.callback import CoVFTCallback as CoVFTCallback
    from covft.wrapping import unwrap as unwrap
    from covft.wrapping import wrap as wrap

__version__ = "0.1.0"

# Where each public name lives; it is imported when it is first asked for (PEP 562).
_HOMES = {
    "CoVFTCallback": "covft.integrations.callback",
    "CoVFTConfig": "covft.config",
    "ContextEncoder": "covft.encoder",
    "ViTSpec": "covft.adapters.spec",
    "attach": "covft.integrations.attaching",
    "describe": "covft.adapters.registry",
    "detach": "covft.integrations.attaching",
    "get_encoder": "covft.integrations.attaching",
    "load": "covft.checkpoint",
    "unwrap": "covft.wrapping",
    "wrap": "covft.wrapping",
}
_SUBMODULES = ("adapters", "checkpoint", "data", "errors", "integrations", "nn", "text")

__all__ = [
    "CoVFTCallback",
    "CoVFTConfig",
    "ContextEncoder",
    "ViTSpec",
    "__version__",
    "adapters",
    "attach",
    "checkpoint",
    "data",
    "describe",
    "detach",
    "errors",
    "get_encoder",
    "integrations",
    "load",
    "nn",
    "text",
    "unwrap",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"covft.{name}")
    else:
        raise AttributeError(f"module 'covft' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
