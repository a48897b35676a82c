"""Builds the slots, puts them where the FFNs stand, and takes them out again."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from covft.adapters.spec import ViTSpec
from covft.conditioning import Conditioning
from covft.config import CoVFTConfig
from covft.nn.null_text import NullText
from covft.surgery.slot import AdaptedFFN, Original
from covft.surgery.split import SecondHalf, SplitFFN
from covft.surgery.wrapped import NULL_TEXT, module_at
from covft.utils.peft import adapter_parameters, plain_name
from covft.utils.sharding import assign, full, gathered, partition_like, shape_of, whole_copy


def build_slots(
    vit: nn.Module, spec: ViTSpec, settings: CoVFTConfig, conditioning: Conditioning, text_dim: int | None
) -> dict[int, AdaptedFFN]:
    """Build an adapted FFN for each adapted block, by layer; the ViT is not changed.

    Args:
        vit: The ViT.
        spec: What is known of it.
        settings: The settings, with `layers` resolved.
        conditioning: Carries the text to the slots.
        text_dim: Width C of the text features; None where there are none.
    """
    slots: dict[int, AdaptedFFN] = {}
    plans: dict[Any, Any] = {}
    for layer in settings.layers or ():
        block = spec.blocks[layer]
        ffn = vit.get_submodule(block.mlp_path)
        if block.output_path is not None:
            ffn = SplitFFN(ffn, vit.get_submodule(block.output_path), adds_residual=block.adds_residual)
        with gathered(ffn.parameters()):
            slots[layer] = AdaptedFFN(
                ffn,
                conditioning,
                layout=block.layout,
                layer=layer,
                embed_dim=block.embed_dim,
                text_dim=text_dim,
                num_experts=settings.experts,
                eval_seed=layer,
                plans=plans,
                **settings.of_each_block(),
            )
        partition_like(ffn.parameters(), slots[layer])
        for module in slots[layer].modules():
            # transformers initialises modules without this mark again when the model around them is.
            module._is_hf_initialized = True  # type: ignore[assignment]
    if settings.null_text and text_dim is not None and slots:
        like = next(iter(slots.values()))
        weight = next(p for p in like.router.parameters())
        null_text = NullText(text_dim, settings.null_text_rate, device=weight.device, dtype=weight.dtype)
        partition_like(vit.parameters(), null_text)
        null_text.train(like.training)
        null_text._is_hf_initialized = True  # type: ignore[assignment]
        for slot in slots.values():
            slot.__dict__["null_text"] = null_text
    return slots


def null_text_of(slots: dict[int, AdaptedFFN]) -> Any:
    """Return the null text that slots share; None if there is none.

    Args:
        slots: Adapted FFNs.
    """
    return next((slot.null_text for slot in slots.values()), None)


def expected_tensors(
    vit: nn.Module, spec: ViTSpec, settings: CoVFTConfig, conditioning: Conditioning, text_dim: int | None
) -> dict[str, Tensor]:
    """Return what `build_slots` and `install_slots` would add or train, by name, without building it.

    Args:
        vit: The ViT, which is not changed.
        spec: What is known of it.
        settings: The settings, with `layers` resolved.
        conditioning: Carries the text to the slots.
        text_dim: Width C of the text features; None where there are none.

    Returns:
        Tensors without values (but for FFNs with buffers), in the shapes of unsharded ones.
    """
    layers = settings.layers or ()
    tensors: dict[str, Tensor] = {}
    slots = build_slots(_without_values(vit, spec, layers), spec, settings, conditioning, text_dim)
    for layer, slot in slots.items():
        state = slot.state_dict()
        tensors.update({f"{spec.blocks[layer].mlp_path}.{name}": tensor for name, tensor in state.items()})
    null_text = null_text_of(slots)
    if null_text is not None:
        tensors.update({f"{NULL_TEXT}.{name}": tensor for name, tensor in null_text.state_dict().items()})
    for name in _norm_parameters(vit, spec, layers, settings.train_norms):
        tensors[name] = _empty_like(vit.get_parameter(name))
    return tensors


def _without_values(vit: nn.Module, spec: ViTSpec, layers: Iterable[int]) -> nn.Module:
    """Copy the FFNs of some blocks without their values, in modules of the same paths."""
    copied = nn.Module()
    for layer in layers:
        block = spec.blocks[layer]
        for path in filter(None, (block.mlp_path, block.output_path)):
            ffn = vit.get_submodule(path)
            memo: dict[int, Any] = {}
            if next(ffn.buffers(), None) is None:  # how an FFN with buffers computes is found out with their values
                memo = {id(parameter): _empty_like(parameter) for parameter in ffn.parameters()}
            parent, *_ = path.rpartition(".")
            place = copied
            for part in parent.split(".") if parent else ():
                if part not in place._modules:
                    place.add_module(part, nn.Module())
                place = place.get_submodule(part)
            place.add_module(path.rpartition(".")[2], copy.deepcopy(ffn, memo))
    return copied


def _empty_like(parameter: nn.Parameter) -> nn.Parameter:
    empty = torch.empty(shape_of(parameter), dtype=parameter.dtype, device="meta")
    return nn.Parameter(empty, requires_grad=parameter.requires_grad)


def install_slots(vit: nn.Module, spec: ViTSpec, slots: dict[int, AdaptedFFN], train_norms: str) -> Original:
    """Put slots where the FFNs stand, freeze the ViT, and mark its norms as trained.

    Adapters of peft outside the adapted FFNs are trained or frozen as before.

    Returns:
        What stood there before.
    """
    original = Original(requires_grad={name: p.requires_grad for name, p in vit.named_parameters()})
    adapters = adapter_parameters(vit)
    for parameter in vit.parameters():
        if id(parameter) not in adapters:  # which the caller has put there to train them
            parameter.requires_grad_(False)
    for layer, slot in slots.items():
        block = spec.blocks[layer]
        places: dict[str, nn.Module] = dict.fromkeys((block.mlp_path, *block.aliases), slot)
        if block.output_path is not None:
            places[block.output_path] = SecondHalf(slot)
        # Whole on every process: Trainer saves on one alone, where nothing can be gathered.
        copies = {path: whole_copy(vit.get_submodule(path)) for path in places if path not in block.aliases}
        for path, place in places.items():
            original.ffns[path] = copies.get(path, copies[block.mlp_path])
            vit.set_submodule(path, place)
    null_text = null_text_of(slots)
    if null_text is not None:
        vit.add_module(NULL_TEXT, null_text)
    for name in _norm_parameters(vit, spec, slots, train_norms):
        parameter = vit.get_parameter(name)
        original.values[name] = full(parameter).clone()
        parameter.requires_grad_(True)
    return original


def restore_ffns(vit: nn.Module, original: Original) -> None:
    """Undo `install_slots`: FFNs and norms are as they were, where and in the type that the slots are.

    Blocks that were removed since are left out. Parameters are found by the names that they had before peft wrapped
    their modules. If peft has put new adapters into the ViT since, what it has frozen stays frozen, and so is what
    comes back.
    """
    found = {path: (ffn, module_at(vit, path)) for path, ffn in original.ffns.items()}
    places = {path: (ffn, slot) for path, (ffn, slot) in found.items() if slot is not None}
    narrow = original.type_in(vit)
    for ffn, slot in places.values():
        follow(ffn, first_expert(slot), narrow)
        ffn.train(slot.training)
    for path, (ffn, _) in places.items():
        vit.set_submodule(path, ffn)
    vit._modules.pop(NULL_TEXT, None)
    adapters = adapter_parameters(vit)
    named = dict(vit.named_parameters(remove_duplicate=False))
    own = {plain_name(name): parameter for name, parameter in named.items() if id(parameter) not in adapters}
    with torch.no_grad():
        for name, value in original.values.items():
            if (parameter := own.get(plain_name(name))) is not None:
                assign(parameter, value)
                if narrow is not None:
                    parameter.data = parameter.data.to(narrow)
                parameter.grad = None
    trained = {plain_name(name): value for name, value in original.requires_grad.items()}
    if any(id(parameter) in adapters and plain_name(name) not in trained for name, parameter in named.items()):
        back = (*(f"{path}." for path in original.ffns), *map(plain_name, original.values))
        trained = dict.fromkeys((name for name in own if name.startswith(back)), False)
    for name, parameter in named.items():
        # A parameter that came later, such as a new head, keeps its own.
        parameter.requires_grad_(trained.get(plain_name(name), parameter.requires_grad))


def _norm_parameters(vit: nn.Module, spec: ViTSpec, layers: Iterable[int], train_norms: str) -> list[str]:
    adapted = sorted(layers)
    chosen = {"all": range(adapted[-1] + 1), "adapted": adapted, "none": ()}[train_norms]
    names: list[str] = []
    for layer in chosen:
        block = spec.blocks[layer]
        for norm in block.norms:
            module = vit.get_submodule(f"{block.path}.{norm}")
            names += [f"{block.path}.{norm}.{name}" for name, _ in module.named_parameters(recurse=False)]
    return names


def first_expert(slot: nn.Module, *, whole: bool = False) -> nn.Module:
    """Return the copy of a replaced module that stands in its place now, in a slot or beside it.

    Args:
        slot: The slot, or the second half beside it.
        whole: Whether both halves of a split FFN are meant.
    """
    if isinstance(slot, SecondHalf):
        return slot.slot.experts.prototype.output
    assert isinstance(slot, AdaptedFFN)
    expert = slot.experts.prototype
    return expert.intermediate if isinstance(expert, SplitFFN) and not whole else expert


def follow(ffn: nn.Module, expert: nn.Module, dtype: torch.dtype | None) -> None:
    """Move a module's tensors where those of another are, each in the given type, or in that of its counterpart.

    Args:
        ffn: The module.
        expert: The other, with tensors of the same names.
        dtype: Type of floating-point tensors; None takes that of each counterpart.
    """
    for tensor, place in _places(ffn, expert, dtype):
        tensor.data = tensor.data.to(*place)


def follows(ffn: nn.Module, expert: nn.Module, dtype: torch.dtype | None) -> bool:
    """Return whether `follow` would change nothing; arguments as there."""
    return all((tensor.device, tensor.dtype) == place for tensor, place in _places(ffn, expert, dtype))


def _places(
    ffn: nn.Module, expert: nn.Module, dtype: torch.dtype | None
) -> Iterator[tuple[Tensor, tuple[torch.device, torch.dtype]]]:
    """Yield each tensor of a module that another has too, and the device and type that it should have."""
    tensors = (*expert.named_parameters(), *expert.named_buffers())
    expert_tensors = {plain_name(name): tensor for name, tensor in tensors}
    for name, tensor in (*ffn.named_parameters(), *ffn.named_buffers()):
        if name in expert_tensors:
            like = expert_tensors[name]
            yield tensor, (like.device, dtype if dtype and tensor.is_floating_point() else like.dtype)
