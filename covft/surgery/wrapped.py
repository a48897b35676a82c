"""A ViT that was changed, with what is needed to save it and to undo the change."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from covft.adapters.spec import ViTSpec
from covft.conditioning import Conditioning
from covft.config import CoVFTConfig
from covft.errors import UnsupportedViTError
from covft.surgery.adapted import AdaptedViT
from covft.surgery.attention import is_update
from covft.surgery.slot import AdaptedFFN, Original
from covft.surgery.split import SecondHalf
from covft.utils.peft import is_adapter

NULL_TEXT = "covft_null_text"
"""Name of the null text in the ViT."""


class TextSource(NamedTuple):
    """The text encoder that the router was trained with.

    Attributes:
        name: What `as_text_encoder` builds it from, where it can; None where no text is used.
        text_dim: Width C of its features.
        revision: Revision on the Hugging Face Hub, if known.
    """

    name: str | None = None
    text_dim: int | None = None
    revision: str | None = None


class WrappedViT(AdaptedViT):
    """A ViT with adapted FFNs in the place of its own.

    Args:
        vit: The ViT, changed in place.
        covft_config: The settings, with `layers` resolved.
        spec: What is known of the ViT.
        conditioning: Carries the text to the slots.
        original: What stood in the ViT before.
        text_source: Which text encoder the router knows.

    Attributes:
        layers: Indices of the adapted blocks, ascending.
        norms: Names of the ViT's norm parameters that are trained.
    """

    def __init__(
        self,
        vit: nn.Module,
        covft_config: CoVFTConfig,
        spec: ViTSpec,
        conditioning: Conditioning,
        original: Original,
        text_source: TextSource,
    ) -> None:
        super().__init__()
        self.vit = vit
        self.covft_config = covft_config
        self.spec = spec
        self.conditioning = conditioning
        self.original = original
        self.text_source = text_source
        self.layers: tuple[int, ...] = tuple(sorted(covft_config.layers or ()))
        self.norms: tuple[str, ...] = tuple(original.values)
        self.training = vit.training

    @property
    def feature_layer(self) -> int | None:
        """The hidden state after which blocks are skipped; None if none are."""
        return self.covft_config.feature_layer

    @property
    def adapted(self) -> str:
        """The adapted blocks."""
        return ", ".join(map(str, self.layers))

    @property
    def has_run(self) -> bool:
        """Whether the ViT has run since it was wrapped."""
        return any(slot.record is not None for slot in self.slots().values())

    @property
    def text_name(self) -> str | None:
        """Name of the text encoder that the router knows."""
        return self.text_source.name

    @property
    def text_dim(self) -> int | None:
        """Width C of the text features; None where no text is used."""
        return self.text_source.text_dim

    @property
    def text_revision(self) -> str | None:
        """Revision of the text encoder on the Hugging Face Hub, if known."""
        return self.text_source.revision

    def slots(self) -> dict[int, AdaptedFFN]:
        """Return the adapted FFNs, by layer; without those of blocks that were removed from the ViT since."""
        found: dict[int, AdaptedFFN] = {}
        for layer in self.layers:
            slot = module_at(self.vit, self.spec.blocks[layer].mlp_path)
            if isinstance(slot, AdaptedFFN) and slot.layer == layer:
                found[layer] = slot
        if len(found) == len(self.layers):
            return found
        moved = {slot.layer: slot for slot in self.vit.modules() if isinstance(slot, AdaptedFFN)}
        return dict(sorted({**moved, **found}.items()))

    def check_in_place(self, purpose: str, *, complete: bool = False) -> None:
        """Refuse a ViT whose adapted FFNs are not where they were put.

        Args:
            purpose: What was asked for, as the subject of a sentence.
            complete: Whether blocks that were removed are refused, too.

        Raises:
            UnsupportedViTError: If blocks were renumbered, or FFNs replaced, since the ViT was wrapped.
        """
        wrong: list[str] = []
        for layer in self.layers:
            block = self.spec.blocks[layer]
            for path in (block.mlp_path, *([] if block.output_path is None else [block.output_path])):
                module = module_at(self.vit, path)
                slot = module.slot if isinstance(module, SecondHalf) else module
                if module is None and module_at(self.vit, block.path) is None:
                    if complete:
                        wrong.append(f"{path} is gone")
                elif not isinstance(slot, AdaptedFFN):
                    wrong.append(f"{path} is {type(slot).__name__}")
                elif slot.layer != layer:
                    wrong.append(f"{path} is that of block {slot.layer}")
        if wrong:
            raise UnsupportedViTError(
                f"{purpose} needs the adapted FFNs where wrap() put them, but other code has changed the blocks since.",
                expected=f"adapted FFNs in blocks {', '.join(map(str, self.layers))}",
                got="; ".join(wrong[:4]) + ("; ..." if len(wrong) > 4 else ""),
                fix="remove or replace blocks before covft.wrap(...)",
            )

    def adapted_parameters(self) -> dict[str, nn.Parameter]:
        """Return what `wrap` added or trains, by name in the ViT: experts, routers, norms, updates of attentions.

        Layers that peft has put adapters into are left out: there the adapters are trained instead.
        """
        replaced = tuple(f"{name}." for name, module in self.vit.named_modules() if is_adapter(module))
        return {
            name: parameter
            for name, parameter in self.vit.named_parameters()
            if self.part_of(name) != "other" and parameter.is_floating_point() and not name.startswith(replaced)
        }

    def settings(self) -> dict[str, Any]:
        """Return what decides which tensors there are, and what they compute."""
        return settings_of(self.covft_config, self.text_dim)

    def original_state(self, state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
        """Return a state dict with the ViT's original weights, and all else as it is.

        Args:
            state: A state dict of the ViT or of a model around it, gathered if it was sharded.
            prefix: Prefix of the ViT's names in it.
        """
        original, narrow = self.original, self.original.type_in(self.vit)
        ffns = {f"{prefix}{path}.": ffn for path, ffn in original.ffns.items()}
        values = {f"{prefix}{name}": value for name, value in original.values.items()}
        result: dict[str, Tensor] = {}
        done: dict[str, Tensor] = {}  # with the first tensor of the slot
        for name, tensor in state.items():
            if is_update(name) or name.startswith(f"{prefix}{NULL_TEXT}."):
                continue
            place = next((place for place in ffns if name.startswith(place)), None)
            if place is None:
                result[name] = values[name].to(tensor.device, narrow or tensor.dtype) if name in values else tensor
            elif place not in done and tensor.is_floating_point():
                done[place] = tensor
                result.update(_like(tensor, place, ffns[place], narrow))
        for place, ffn in ffns.items():
            if done and place not in done:  # the second half of a split FFN, which has no tensors now
                result.update(_like(next(iter(done.values())), place, ffn, narrow))
        return result

    def part_of(self, name: str) -> str:
        """Return the part of a parameter.

        It is `"experts"`, `"router"` (with the context), `"norms"`, `"attention"` (its updates) or `"other"`.

        Args:
            name: Its name in the ViT.
        """
        for layer in self.layers:
            prefix = f"{self.spec.blocks[layer].mlp_path}."
            if name.startswith(prefix):
                inner = name.removeprefix(prefix)
                if inner.startswith("experts.shared."):
                    return "other"  # the pretrained FFN that low-rank experts share, which stays frozen
                return "experts" if inner.startswith("experts.") else "router"
        if is_update(name):
            return "attention"
        if name.startswith(f"{NULL_TEXT}."):
            return "router"
        return "norms" if name in self.norms else "other"


def settings_of(config: CoVFTConfig, text_dim: int | None) -> dict[str, Any]:
    """Return what decides which tensors a wrapped ViT has, and what they compute.

    Args:
        config: Its settings.
        text_dim: Width C of the text features.
    """
    names = [field.name for field in dataclasses.fields(config) if field.metadata["changes_model"]]
    return {"method": "covft", **{name: getattr(config, name) for name in names}, "text_dim": text_dim}


def _like(tensor: Tensor, place: str, ffn: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return the state of an original FFN, on the device of a tensor, in the given type or in the tensor's."""
    state = {place + name: value.to(tensor.device) for name, value in ffn.state_dict().items()}
    return {name: v.to(dtype or tensor.dtype) if v.is_floating_point() else v for name, v in state.items()}


def module_at(root: nn.Module, path: str) -> Any:
    """Return the module at a dotted path; None if there is none."""
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


def prefix_of(module: nn.Module, model: nn.Module) -> str:
    """Return the prefix of a module's tensor names in a model: its path and a dot, or nothing.

    Args:
        module: A part of the model, or the model itself.
        model: The model.
    """
    path = next(name for name, part in model.named_modules() if part is module)
    return f"{path}." if path else ""
