"""covft: context-aware visual fine-tuning of vision transformers for multimodal LLMs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from covft import adapters as adapters
    from covft import analysis as analysis
    from covft import checkpoints as checkpoints
    from covft import data as data
    from covft import errors as errors
    from covft import integrations as integrations
    from covft import metrics as metrics
    from covft import nn as nn
    from covft import testing as testing
    from covft import text as text
    from covft import tuning as tuning
    from covft.adapters.registry import describe as describe
    from covft.adapters.spec import ViTSpec as ViTSpec
    from covft.analysis.diagnosis.run import diagnose as diagnose
    from covft.compression import compress as compress
    from covft.compression import skip_experts as skip_experts
    from covft.config import CoVFTConfig as CoVFTConfig
    from covft.encoder import ContextEncoder as ContextEncoder
    from covft.exporting import export as export
    from covft.integrations.building.saved import load_model as load_model
    from covft.integrations.chat.chat import Chat as Chat
    from covft.integrations.mllm.attach import attach as attach
    from covft.integrations.mllm.attach import detach as detach
    from covft.integrations.mllm.attach import get_encoder as get_encoder
    from covft.integrations.training.callback import CoVFTCallback as CoVFTCallback
    from covft.integrations.training.trainable import lora_exclude as lora_exclude
    from covft.integrations.tuning.budget import budget as budget
    from covft.integrations.tuning.tune import tune as tune
    from covft.integrations.tuning.tune import untune as untune
    from covft.merging.merge import merge as merge
    from covft.surgery.trunk import Trunk as Trunk
    from covft.surgery.trunk import TrunkCache as TrunkCache
    from covft.tuning.api import load as load
    from covft.tuning.matching import match as match
    from covft.wrapping import unwrap as unwrap
    from covft.wrapping import wrap as wrap

__version__ = "0.1.0"

# Where each public name lives; it is imported when it is first asked for (PEP 562).
_HOMES = {
    "Chat": "covft.integrations.chat.chat",
    "CoVFTCallback": "covft.integrations.training.callback",
    "CoVFTConfig": "covft.config",
    "ContextEncoder": "covft.encoder",
    "Trunk": "covft.surgery.trunk",
    "TrunkCache": "covft.surgery.trunk",
    "ViTSpec": "covft.adapters.spec",
    "attach": "covft.integrations.mllm.attach",
    "budget": "covft.integrations.tuning.budget",
    "compress": "covft.compression",
    "describe": "covft.adapters.registry",
    "detach": "covft.integrations.mllm.attach",
    "diagnose": "covft.analysis.diagnosis.run",
    "export": "covft.exporting",
    "get_encoder": "covft.integrations.mllm.attach",
    "load": "covft.tuning.api",
    "load_model": "covft.integrations.building.saved",
    "lora_exclude": "covft.integrations.training.trainable",
    "match": "covft.tuning.matching",
    "merge": "covft.merging.merge",
    "skip_experts": "covft.compression",
    "tune": "covft.integrations.tuning.tune",
    "untune": "covft.integrations.tuning.tune",
    "unwrap": "covft.wrapping",
    "wrap": "covft.wrapping",
}
_SUBMODULES = (
    "adapters",
    "analysis",
    "checkpoints",
    "data",
    "errors",
    "integrations",
    "metrics",
    "nn",
    "testing",
    "text",
    "tuning",
)

__all__ = [
    "Chat",
    "CoVFTCallback",
    "CoVFTConfig",
    "ContextEncoder",
    "Trunk",
    "TrunkCache",
    "ViTSpec",
    "__version__",
    "adapters",
    "analysis",
    "attach",
    "budget",
    "checkpoints",
    "compress",
    "data",
    "describe",
    "detach",
    "diagnose",
    "errors",
    "export",
    "get_encoder",
    "integrations",
    "load",
    "load_model",
    "lora_exclude",
    "match",
    "merge",
    "metrics",
    "nn",
    "skip_experts",
    "testing",
    "text",
    "tune",
    "tuning",
    "untune",
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
