"""Refuses what cannot be wrapped or unwrapped, before anything changes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from covft.adapters.spec import ViTSpec
from covft.config import CoVFTConfig
from covft.errors import ConfigError, LayerIndexError, TextEncoderError, UnsupportedViTError
from covft.surgery.packed import check_plain
from covft.surgery.skipping import check_layers
from covft.surgery.slot import AdaptedFFN, Original
from covft.surgery.wrapped import module_at
from covft.utils.peft import adapter_parameters, is_adapter, is_trained_copy, plain_name
from covft.utils.sharding import in_engine, is_partitioned, is_sharded
from covft.utils.torch_internals import COMPILED

MARK = "_covft_tuned"
"""Attribute of a ViT that `covft.tune` has changed: the name of the method."""

# What distributes or compiles a model from outside, and where it keeps the model.
_OUTER = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": "module",
    "OptimizedModule": COMPILED,
    "DeepSpeedEngine": "module",
}


def check_vit(vit: Any) -> None:
    """Refuse what is not a ViT by itself.

    Args:
        vit: What was given to `wrap`.

    Raises:
        UnsupportedViTError: If it is not a module, wrapped or tuned already, distributed or compiled.
    """
    if not isinstance(vit, nn.Module):
        raise UnsupportedViTError(f"{vit!r} is not a model.", expected="a torch.nn.Module", got=type(vit).__name__)
    if any(isinstance(module, AdaptedFFN) for module in vit.modules()):
        raise UnsupportedViTError(
            "This ViT is wrapped already.",
            expected="a ViT with its own FFNs",
            got=type(vit).__name__,
            fix="covft.wrap(covft.unwrap(encoder), text_encoder, ...)",
        )
    tuned = next((module.__dict__[MARK] for module in vit.modules() if MARK in module.__dict__), None)
    if tuned is not None:
        raise UnsupportedViTError(
            f"This ViT is tuned already, by {tuned!r}.",
            expected="a ViT as it was: each method freezes what another trains, and saves it for the plain ViT",
            got=type(vit).__name__,
            fix="covft.untune(tuned), or tuned.merge() to keep what was trained, then tune its ViT again",
        )
    check_not_copied(vit)
    name = next((cls.__name__ for cls in type(vit).__mro__ if cls.__name__ in _OUTER), None)
    sharded = any(cls.__name__ == "FSDPModule" for module in vit.modules() for cls in type(module).__mro__)
    if name or sharded:
        raise UnsupportedViTError(
            f"This ViT is inside {name or 'FSDP'} already; what wrap() adds would be outside of it.",
            expected="the ViT itself; wrap first, then distribute or compile",
            got=type(vit).__name__,
            fix=f"covft.wrap(vit.{_OUTER[name]}, ...)" if name else "covft.wrap(vit, ...) before fully_shard(...)",
        )
    check_not_distributed(vit, in_engine(vit), "covft.wrap(vit, ...), then distribute")


def check_not_copied(vit: nn.Module) -> None:
    """Refuse a ViT that is one of peft's `modules_to_save`: peft trains a copy of it, which runs instead.

    Raises:
        UnsupportedViTError: If it is.
    """
    if is_trained_copy(vit):
        raise UnsupportedViTError(
            "peft trains a copy of the vision tower (modules_to_save), so it would save the adapted one, and load it "
            "again, as a tower that it does not know.",
            expected="a tower that is not in modules_to_save",
            got=type(vit).__name__,
            fix="leave the tower out of modules_to_save; covft.integrations.train_only(model, "
            "['llm', 'covft', 'vision']) trains it, and CoVFTCallback saves it",
        )


def check_not_distributed(vit: nn.Module, engine: bool, fix: str) -> None:
    """Refuse a ViT whose weights an engine manages; ZeRO-3's can be gathered before there is an engine.

    Raises:
        UnsupportedViTError: If it does, or if weights are DTensors.
    """
    dtensors = [name for name, p in vit.named_parameters() if is_sharded(p) and not is_partitioned(p)]
    if dtensors or engine:
        raise UnsupportedViTError(
            "The weights of this ViT are managed by " + ("a DeepSpeed engine." if engine else "FSDP or a device mesh."),
            expected="a ViT that is not distributed yet",
            got=type(vit).__name__ + (f" with DTensors: {', '.join(dtensors[:3])}" if dtensors else ""),
            fix=fix,
        )


def check_weights(vit: nn.Module, spec: ViTSpec, layers: Iterable[int]) -> None:
    """Refuse FFNs without values to copy.

    Raises:
        UnsupportedViTError: If weights are packed, offloaded, or on the meta device among others that are not.
    """
    check_plain(vit, spec, layers)
    for layer in layers:
        path = spec.blocks[layer].mlp_path
        ffn = vit.get_submodule(path)
        offloaded = any(hasattr(module, "_hf_hook") for module in ffn.modules())
        meta = any(parameter.is_meta for parameter in ffn.parameters())
        if meta and not offloaded and not all(parameter.is_meta for parameter in vit.parameters()):
            raise UnsupportedViTError(
                f"The weights of {path} are on the meta device, so there is nothing to copy experts from.",
                expected="a ViT with all its weights, or one entirely on the meta device",
                got="parameters on the meta device among others that are not",
                fix="load all weights, then wrap",
            )
        if offloaded and meta:
            raise UnsupportedViTError(
                f"The weights of {path} are offloaded, so there is nothing to copy experts from.",
                expected="weights in memory",
                got="parameters on the meta device",
                fix="load the model without device_map or cpu_offload, wrap it, then dispatch it",
            )


def check_restorable(vit: nn.Module, original: Original) -> None:
    """Refuse to restore what peft has replaced since, norms that are gone, and weights that were never in memory.

    Blocks that were removed since are left out; `WrappedViT.check_in_place` looks at the others.

    Raises:
        UnsupportedViTError: If an adapted FFN or a norm is not where it was put, or if the ViT was wrapped on the meta
            device and got weights since.
    """
    places = {path: module for path in original.ffns if (module := module_at(vit, path)) is not None}
    replaced = [path for path, module in places.items() if is_adapter(module)]
    adapters = adapter_parameters(vit)
    present = {plain_name(name) for name, p in vit.named_parameters() if id(p) not in adapters}
    gone = [name for name in original.values if plain_name(name) not in present]
    missing = [name for name in gone if module_at(vit, name.rpartition(".")[0]) is not None]
    if replaced or missing:
        raise UnsupportedViTError(
            "Another library has replaced or removed parts of the ViT since wrap(), so it cannot be restored.",
            expected="the adapted FFNs and the norms where wrap() left them",
            got=", ".join([*replaced, *missing][:5]),
            fix="peft_model.unload(), then undo" if replaced else "undo what the other library did first",
        )
    kept = [*original.values.values(), *(p for ffn in original.ffns.values() for p in ffn.parameters())]
    if any(tensor.is_meta for tensor in kept) and not all(p.is_meta for p in vit.parameters()):
        raise UnsupportedViTError(
            "The ViT was wrapped on the meta device, so its original FFNs and norms are not known.",
            expected="a ViT that had its weights when it was wrapped",
            got="weights that came later, for the experts alone",
            fix="build the ViT anew",
        )


def check_text_weights(text_encoder: Any) -> None:
    """Refuse a text encoder whose weights ZeRO-3 has partitioned.

    Raises:
        TextEncoderError: If its weights are elsewhere.
    """
    parts = text_encoder if isinstance(text_encoder, tuple) else (text_encoder,)
    held = [value for part in parts for value in getattr(part, "__dict__", {}).values()]
    modules = [value for value in (*parts, *held) if isinstance(value, nn.Module)]
    if any(is_partitioned(parameter) for module in modules for parameter in module.parameters()):
        raise TextEncoderError(
            "The text encoder was partitioned by ZeRO-3, but no engine will ever gather it.",
            expected="a text encoder with its weights in memory",
            got=type(text_encoder).__name__,
            fix="pass its id or folder, or load it before TrainingArguments or HfDeepSpeedConfig are made",
        )


def check_text_dim(settings: CoVFTConfig, text_dim: int | None) -> None:
    """Refuse settings that the text features do not fit.

    Args:
        settings: The settings.
        text_dim: Width C of the text features; None where there are none.

    Raises:
        ConfigError: If the routing needs text and there is none, or the heads do not divide its width.
    """
    if text_dim is None and settings.needs_text:
        raise ConfigError(
            f"routing={settings.routing!r} with context={settings.context!r} needs text.",
            expected="a text encoder, or the width of the text features that you bring",
            got="text_encoder=None",
            fix="covft.wrap(vit, 'bert-base-uncased'), or context='image'",
        )
    if settings.has_router and settings.context == "cve" and text_dim is not None and text_dim % settings.num_heads:
        raise ConfigError(
            f"num_heads={settings.num_heads} does not divide the width of the text features.",
            expected=f"a divisor of {text_dim}",
            got=settings.num_heads,
            fix=f"num_heads={next(h for h in (4, 3, 2, 1) if text_dim % h == 0)}",
        )


def check_null_text(vit: nn.Module, settings: CoVFTConfig) -> None:
    """Refuse a ViT that would call a null text as one of its layers.

    Args:
        vit: The ViT.
        settings: The settings.

    Raises:
        UnsupportedViTError: If it is a sequence of layers.
    """
    if settings.null_text and isinstance(vit, nn.Sequential):
        raise UnsupportedViTError(
            "A null text becomes a child of the ViT, and this one calls its children one after another.",
            expected="a ViT with a forward of its own",
            got=type(vit).__name__,
            fix="null_text=False, or a module around the sequence",
        )


def resolve_layers(layers: tuple[int, ...] | None, spec: ViTSpec, last: int) -> tuple[int, ...]:
    """Return the indices of the adapted blocks, ascending and not negative.

    Args:
        layers: As in `CoVFTConfig`.
        spec: What is known of the ViT.
        last: The last block whose output is read.

    Raises:
        LayerIndexError: If the ViT does not have such blocks, or they are skipped or named twice.
    """
    if layers is None:
        return tuple(layer for layer in spec.default_layers if layer <= last) or (last,)
    depth = spec.depth
    outside = [layer for layer in layers if not -depth <= layer < depth]
    resolved = tuple(sorted(layer % depth for layer in layers if layer not in outside))
    if outside:
        first = min((layer for layer in layers if layer >= 0), default=0)
        fix = f"range({min(first, depth - 2)}, {depth - 1})" if depth > 1 else "[0]"
        raise LayerIndexError(
            f"layers={_shown(layers)} asks for blocks this ViT does not have.",
            expected=f"indices in [{-depth}, {depth - 1}]  ({spec})",
            got=", ".join(map(str, outside)),
            fix=f"covft.wrap(vit, text_encoder, layers={fix})",
        )
    if len(set(resolved)) < len(resolved):
        raise LayerIndexError(
            f"layers={_shown(layers)} names a block twice, once counted from the end.",
            expected=f"each block once  ({spec})",
            got=", ".join(map(str, resolved)),
        )
    check_layers(resolved, last, spec)
    return resolved


def _shown(layers: tuple[int, ...]) -> str:
    if len(layers) > 1 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"range({layers[0]}, {layers[-1] + 1})"
    return str(list(layers))
