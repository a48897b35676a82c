"""wrap() and unwrap(): check everything, then change the ViT."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from covft import native
from covft.adapters.registry import describe
from covft.adapters.spec import Adapter, ViTSpec
from covft.conditioning import Conditioning
from covft.config import CoVFTConfig
from covft.encoder import ContextEncoder
from covft.errors import ConfigError, LayerIndexError, TextEncoderError, UnsupportedViTError
from covft.nn.split import SecondHalf, SplitFFN
from covft.sharding import (
    assign,
    full,
    gathered,
    in_engine,
    is_partitioned,
    is_sharded,
    partition_like,
    unpartitioned,
    whole_copy,
)
from covft.slot import AdaptedFFN, Original
from covft.text import as_text_encoder
from covft.unread import check_layers, last_read, leave_out, run_again


class Unset:
    """A keyword that was not given, so that the one of `config` holds."""

    def __init__(self, default: Any) -> None:
        self.default = default

    def __repr__(self) -> str:
        return repr(self.default)


DEFAULTS: dict[str, Any] = {field.name: Unset(field.default) for field in dataclasses.fields(CoVFTConfig)}


def wrap(
    vit: nn.Module,
    text_encoder: Any = None,
    *,
    layers: Iterable[int] | None = DEFAULTS["layers"],
    experts: int = DEFAULTS["experts"],
    routing: str = DEFAULTS["routing"],
    top_k: int = DEFAULTS["top_k"],
    context: str = DEFAULTS["context"],
    train_norms: str = DEFAULTS["train_norms"],
    activation: str = DEFAULTS["activation"],
    num_heads: int = DEFAULTS["num_heads"],
    expert_rank: int | None = DEFAULTS["expert_rank"],
    recompute: str = DEFAULTS["recompute"],
    feature_layer: int | None = DEFAULTS["feature_layer"],
    config: CoVFTConfig | None = None,
    adapter: Adapter | None = None,
) -> ContextEncoder:
    """Make a ViT context-aware, in place.

    In every adapted block the FFN is replaced by a mixture of its copies, mixed by what the image and
    the text say; everything else of the ViT is frozen, but for norms. In eval mode no output changes
    at the start. Each keyword that is given overrides the field of `config`; see `CoVFTConfig`.

    Args:
        vit: A vision transformer of timm, open_clip, transformers, or one that `adapter` knows.
        text_encoder: A model id or folder; a loaded Hugging Face, sentence-transformers or open_clip
            text model; a callable `list[str] -> (S, C)`; or an int C if the caller brings features. May
            be None where the routing does not look at the text. It is frozen and never saved.
        layers: Indices of the adapted blocks; negative ones count from the end.
        experts: Experts per adapted block.
        routing: `"dense"`, `"sparse"`, `"uniform"` or `"random"`.
        top_k: Experts per image for sparse and random routing.
        context: `"cve"`, `"image"`, `"text"` or `"concat"`.
        train_norms: `"all"`, `"adapted"` or `"none"`.
        activation: `"gelu"` or `"quick_gelu"`.
        num_heads: Heads of the context attention.
        expert_rank: None for whole experts; a number for experts that share the FFN and differ at that rank.
        recompute: What backward computes again of whole experts: `"none"`, `"activation"` or `"all"`.
        feature_layer: Which hidden state is read, such as -2; blocks behind it do not run. None runs all.
        config: Settings to start from.
        adapter: How the ViT is built, if no registered adapter knows it.

    Returns:
        The encoder. The ViT inside it is `vit`, changed.

    Raises:
        ConfigError: If a setting cannot work.
        LayerIndexError: If `layers` asks for blocks that the ViT does not have.
        TextEncoderError: If the text encoder cannot be used.
        UnknownViTError: If no adapter knows the ViT.
        UnsupportedViTError: If the ViT is wrapped already, or in DDP, FSDP or torch.compile.

    Example:
        >>> import timm
        >>> encoder = wrap(timm.create_model("test_vit"), 32, layers=range(2, 5))
        >>> encoder(torch.rand(1, 3, 160, 160), torch.rand(1, 32)).shape
        torch.Size([1, 1000])
    """
    given = {name: value for name, value in locals().items() if name in DEFAULTS}
    given = {name: value for name, value in given.items() if not isinstance(value, Unset)}
    _refuse_containers(vit)
    settings = dataclasses.replace(config or CoVFTConfig(), **given)
    spec = describe(vit, adapter)
    last = last_read(spec, settings.feature_layer)
    settings = dataclasses.replace(settings, layers=_resolve_layers(settings.layers, spec, last))
    _refuse_unloaded(vit, spec, settings)
    _refuse_partitioned(text_encoder)
    with unpartitioned():
        texts = None if text_encoder is None else as_text_encoder(text_encoder)
    _check_text(settings, None if texts is None else texts.width)

    conditioning = Conditioning(
        needs_text=settings.needs_text,
        draws_seeds=settings.routing == "random",
        mask_argument=spec.mask_argument,
        mask_unit=spec.mask_unit,
        image_axes=spec.image_axes,
        sizes_argument=spec.sizes_argument,
        sizes_unit=spec.sizes_unit,
        mask_padding=spec.mask_padding,
        sizes_square=spec.sizes_square,
        merges=spec.merges,
        mask_prefix=spec.num_prefix_tokens or 0,
        has_batch_norm=any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in vit.modules()),
    )
    slots = _build_slots(vit, spec, settings, conditioning, None if texts is None else texts.width)
    # From here on nothing can fail that has not been checked.
    original = _install(vit, spec, settings, slots)
    leave_out(vit, spec, last)
    vit.register_forward_pre_hook(conditioning.enter_tower, with_kwargs=True)
    vit.register_forward_hook(conditioning.leave_tower, always_call=True)
    encoder = ContextEncoder(vit, texts, settings, spec, conditioning, original)
    native.stand_in(encoder)
    return encoder


def unwrap(encoder: ContextEncoder) -> nn.Module:
    """Give the ViT back as it was before `wrap`, bit for bit, in place.

    FFNs, norms, hooks and `requires_grad` are as they were; the adapted weights are dropped from it.
    If the encoder was moved or cast, the ViT is where and what the encoder was. Parameters that the
    caller trained beside covft's keep their values.

    Args:
        encoder: What `wrap` returned.

    Returns:
        The ViT.

    Raises:
        UnsupportedViTError: If the encoder is unwrapped already, or is no encoder.
    """
    if not isinstance(encoder, ContextEncoder):
        raise UnsupportedViTError(
            f"{type(encoder).__name__} is not what covft.wrap returned.", expected="a ContextEncoder"
        )
    vit, original, slots = encoder.vit, encoder.original, encoder.slots()
    if not all(isinstance(slot, AdaptedFFN) for slot in slots.values()):
        raise UnsupportedViTError("This encoder is unwrapped already.", fix="covft.wrap(vit, text_encoder)")
    engine = in_engine(vit) and any(is_partitioned(parameter) for parameter in vit.parameters())
    _refuse_distributed(vit, engine, "take the ViT anew from where it came")
    _refuse_lost(encoder)
    for hooks in (vit._forward_pre_hooks, vit._forward_hooks):
        for key in [key for key, hook in hooks.items() if _belongs_to(hook, encoder.conditioning)]:
            for table in (hooks, vit._forward_pre_hooks_with_kwargs, vit._forward_hooks_always_called):
                table.pop(key, None)
    run_again(vit)
    native.step_back(vit)
    for path, ffn in original.ffns.items():
        slot = vit.get_submodule(path)
        _follow(ffn, _first_expert(slot))
        ffn.train(slot.training)
    for path, ffn in original.ffns.items():
        _set_submodule(vit, path, ffn)
    if encoder.conditioning.has_batch_norm:
        for module in vit.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.training = vit.training  # which the slots and the tower had switched off
    with torch.no_grad():
        for name, value in original.values.items():
            parameter = vit.get_parameter(name)
            assign(parameter, value)
            parameter.grad = None
    for name, parameter in vit.named_parameters():
        parameter.requires_grad_(original.requires_grad[name])
    return vit


def _refuse_containers(vit: nn.Module) -> None:
    if not isinstance(vit, nn.Module):
        raise UnsupportedViTError(f"{vit!r} is not a model.", expected="a torch.nn.Module", got=type(vit).__name__)
    if isinstance(vit, ContextEncoder) or any(isinstance(module, AdaptedFFN) for module in vit.modules()):
        raise UnsupportedViTError(
            "This ViT is wrapped already.",
            expected="a ViT with its own FFNs",
            got=type(vit).__name__,
            fix="covft.wrap(covft.unwrap(encoder), text_encoder, ...)",
        )
    outer = {
        "DistributedDataParallel": "module",
        "DataParallel": "module",
        "FullyShardedDataParallel": "module",
        "OptimizedModule": "_orig_mod",
        "DeepSpeedEngine": "module",
    }
    name = next((cls.__name__ for cls in type(vit).__mro__ if cls.__name__ in outer), None)
    sharded = any(cls.__name__ == "FSDPModule" for module in vit.modules() for cls in type(module).__mro__)
    if name or sharded:
        raise UnsupportedViTError(
            f"This ViT is inside {name or 'FSDP'} already; what wrap() adds would be outside of it.",
            expected="the ViT itself; wrap first, then distribute or compile",
            got=type(vit).__name__,
            fix=f"covft.wrap(vit.{outer[name]}, ...)" if name else "covft.wrap(vit, ...) before fully_shard(...)",
        )
    _refuse_distributed(vit, in_engine(vit), "covft.wrap(vit, ...), then distribute")


def _refuse_distributed(vit: nn.Module, engine: bool, fix: str) -> None:
    """Refuse a ViT whose weights are in other hands; ZeRO-3's, before there is an engine, can be gathered."""
    dtensors = [name for name, p in vit.named_parameters() if is_sharded(p) and not is_partitioned(p)]
    if dtensors or engine:
        raise UnsupportedViTError(
            "The weights of this ViT are managed by " + ("a DeepSpeed engine." if engine else "FSDP or a device mesh."),
            expected="a ViT that is not distributed yet",
            got=type(vit).__name__ + (f" with DTensors: {', '.join(dtensors[:3])}" if dtensors else ""),
            fix=fix,
        )


def _refuse_lost(encoder: ContextEncoder) -> None:
    """Refuse to put back what was never in memory."""
    kept = [*encoder.original.values.values(), *(p for ffn in encoder.original.ffns.values() for p in ffn.parameters())]
    if any(tensor.is_meta for tensor in kept) and not all(p.is_meta for p in encoder.vit.parameters()):
        raise UnsupportedViTError(
            "The ViT was wrapped on the meta device, so what its FFNs and norms were is not known.",
            expected="a ViT that had its weights when it was wrapped",
            got="weights that came later, for the experts alone",
            fix="build the ViT anew",
        )


def _refuse_partitioned(text_encoder: Any) -> None:
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


def _resolve_layers(layers: tuple[int, ...] | None, spec: ViTSpec, last: int) -> tuple[int, ...]:
    if layers is None:
        return tuple(layer for layer in spec.default_layers if layer <= last) or (last,)
    depth = spec.depth
    outside = [layer for layer in layers if not -depth <= layer < depth]
    resolved = sorted(layer % depth for layer in layers if layer not in outside)
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
    check_layers(tuple(resolved), last, spec)
    return tuple(resolved)


def _shown(layers: tuple[int, ...]) -> str:
    if len(layers) > 1 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"range({layers[0]}, {layers[-1] + 1})"
    return str(list(layers))


def _refuse_unloaded(vit: nn.Module, spec: ViTSpec, settings: CoVFTConfig) -> None:
    for layer in settings.layers or ():
        path = spec.blocks[layer].mlp_path
        ffn = vit.get_submodule(path)
        offloaded = any(hasattr(module, "_hf_hook") for module in ffn.modules())
        meta = any(parameter.is_meta for parameter in ffn.parameters())
        if meta and not offloaded and not all(parameter.is_meta for parameter in vit.parameters()):
            raise UnsupportedViTError(
                f"The weights of {path} are on the meta device, so there is nothing to copy experts from.",
                expected="a ViT with all its weights, or one that is on the meta device as a whole",
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


def _check_text(settings: CoVFTConfig, width: int | None) -> None:
    if width is None and settings.needs_text:
        raise ConfigError(
            f"routing={settings.routing!r} with context={settings.context!r} looks at the text.",
            expected="a text encoder, or the width of the text features that you bring",
            got="text_encoder=None",
            fix="covft.wrap(vit, 'bert-base-uncased'), or context='image'",
        )
    if settings.has_router and settings.context == "cve" and width is not None and width % settings.num_heads:
        raise ConfigError(
            f"num_heads={settings.num_heads} does not divide the width of the text features.",
            expected=f"a divisor of {width}",
            got=settings.num_heads,
            fix=f"num_heads={next(h for h in (4, 3, 2, 1) if width % h == 0)}",
        )


def _build_slots(
    vit: nn.Module, spec: ViTSpec, settings: CoVFTConfig, conditioning: Conditioning, width: int | None
) -> dict[int, AdaptedFFN]:
    slots: dict[int, AdaptedFFN] = {}
    plans: dict[Any, Any] = {}
    for layer in settings.layers or ():
        block = spec.blocks[layer]
        ffn = vit.get_submodule(block.mlp_path)
        if block.output_path is not None:
            second = vit.get_submodule(block.output_path)
            ffn = SplitFFN(ffn, second, adds_residual=block.adds_residual)
        with gathered(ffn.parameters()):
            slots[layer] = AdaptedFFN(
                ffn,
                conditioning,
                layout=block.layout,
                embed_dim=block.embed_dim,
                context_dim=width,
                num_experts=settings.experts,
                routing=settings.routing,
                top_k=settings.top_k,
                context=settings.context,
                activation=settings.activation,
                num_heads=settings.num_heads,
                eval_seed=layer,
                expert_rank=settings.expert_rank,
                recompute=settings.recompute,
                plans=plans,
            )
        partition_like(ffn.parameters(), slots[layer])
        for module in slots[layer].modules():
            # transformers initialises modules without this mark again when the model around them is.
            module._is_hf_initialized = True  # type: ignore[assignment]
    return slots


def _install(vit: nn.Module, spec: ViTSpec, settings: CoVFTConfig, slots: dict[int, AdaptedFFN]) -> Original:
    original = Original(requires_grad={name: p.requires_grad for name, p in vit.named_parameters()})
    vit.requires_grad_(False)
    for layer, slot in slots.items():
        block = spec.blocks[layer]
        places: dict[str, nn.Module] = dict.fromkeys((block.mlp_path, *block.aliases), slot)
        if block.output_path is not None:
            places[block.output_path] = SecondHalf(slot)
        # Whole on every process: Trainer saves on one alone, where nothing can be gathered.
        copies = {path: whole_copy(vit.get_submodule(path)) for path in places if path not in block.aliases}
        for path, place in places.items():
            original.ffns[path] = copies.get(path, copies[block.mlp_path])
            _set_submodule(vit, path, place)
    for name in _norm_parameters(vit, spec, slots, settings.train_norms):
        parameter = vit.get_parameter(name)
        original.values[name] = full(parameter).clone()
        parameter.requires_grad_(True)
    return original


def _norm_parameters(vit: nn.Module, spec: ViTSpec, layers: Iterable[int], train_norms: str) -> list[str]:
    """Names of the norm parameters that are trained, in the order of the blocks.

    Args:
        vit: The ViT.
        spec: What is known of it.
        layers: The adapted layers.
        train_norms: `"all"` up to the last adapted block, `"adapted"` blocks only, or `"none"`.
    """
    adapted = sorted(layers)
    chosen = {"all": range(adapted[-1] + 1), "adapted": adapted, "none": ()}[train_norms]
    names: list[str] = []
    for layer in chosen:
        block = spec.blocks[layer]
        for norm in block.norms:
            module = vit.get_submodule(f"{block.path}.{norm}")
            names += [f"{block.path}.{norm}.{name}" for name, _ in module.named_parameters(recurse=False)]
    return names


def _first_expert(slot: nn.Module) -> nn.Module:
    """What of a slot, or of what stands beside it, is the copy of a module that was replaced."""
    if isinstance(slot, SecondHalf):
        return slot.slot.experts.prototype.output
    assert isinstance(slot, AdaptedFFN)
    expert = slot.experts.prototype
    return expert.intermediate if isinstance(expert, SplitFFN) else expert


def _follow(ffn: nn.Module, expert: nn.Module) -> None:
    """Put an FFN's tensors where an expert's are, each in the type of its counterpart, which may differ within."""
    expert_tensors = {**dict(expert.named_parameters()), **dict(expert.named_buffers())}
    for name, tensor in (*ffn.named_parameters(), *ffn.named_buffers()):
        if name in expert_tensors:
            tensor.data = tensor.data.to(expert_tensors[name])


def _set_submodule(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def _belongs_to(hook: Any, conditioning: Conditioning) -> bool:
    return getattr(hook, "__self__", None) is conditioning
