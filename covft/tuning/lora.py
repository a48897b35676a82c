"""LoRA and DoRA on the linear layers of a tower, by peft."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from covft.errors import ConfigError, MergeError, UnsupportedViTError
from covft.surgery.linears import linear_layers
from covft.tuning.change import Change
from covft.tuning.method import Method, Tower, check_choice
from covft.utils.arguments import check_kinds, check_sizes
from covft.utils.extras import import_library

ADAPTER = "default"
"""Name of the adapter, peft's own default: a language model's adapters then do not switch the tower's off."""


@check_kinds
@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    r"""Add low-rank updates to linear layers, which stay frozen.

    $y = W x + \frac{\alpha}{r} B A x$, with $A$ (r, in) random and $B$ (out, r) zero at the start. Hu et al., "LoRA",
    arXiv 2106.09685; built by peft, with peft's initialisation. The layers are named in full, so that no layer of the
    same name elsewhere is hit.

    In an `nn.MultiheadAttention` (open_clip) the joint projection of queries, keys and values is adapted and the output
    projection is not: it is no module that is called, and peft's own class for such attention adds the update to the
    frozen weights and takes it off again in every forward, which rounds them. Layers whose weights timm's BEiT, EVA and
    Swin v2 read without a call are left out too: no update of theirs would be seen.

    It trains $r\,(d_{\mathrm{in}} + d_{\mathrm{out}})$ parameters per layer. In $L$ blocks of a plain ViT these are
    $8 r L D$ for the attention, and $2 r L (D + F)$ for the FFNs.

    Attributes:
        r: Rank of the updates.
        alpha: Scale; the update is multiplied by alpha / r.
        dropout: Dropout before the update, in training.
        targets: Linear layers of a block: `"all"`, those of the `"attention"` (all outside the FFN), or of the `"ffn"`.
        layers: Indices of the blocks, negative ones counted from the end; None takes all that are read.
    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str = "all"
    layers: tuple[int, ...] | None = None
    name: ClassVar[str] = "lora"
    merges: ClassVar[bool] = True
    size: ClassVar[str | None] = "r"

    def __post_init__(self) -> None:
        check_sizes(r=self.r)
        check_choice("targets", self.targets, "all", "attention", "ffn")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout} is not a share.", expected="0 <= dropout < 1", got=self.dropout)

    def plan(self, tower: Tower) -> Change:
        """Plan updates of every chosen linear layer.

        Raises:
            UnsupportedViTError: If the blocks have none, or peft cannot adapt one.
            LayerIndexError: If the ViT does not have such blocks, or nothing reads them.
        """
        peft = import_library("peft", "train", needed_by=f"covft.tune(vit, {self.name!r})")
        modules, parameters = self._places(tower)
        trained = {name: p.requires_grad for name, p in tower.vit.named_parameters()}
        skeleton = _skeleton(tower.vit, [*modules, *parameters])
        options: dict[str, Any] = {
            "r": self.r,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            **self._options(),
        }
        names = "|".join(map(re.escape, modules))
        if parameters:  # older releases, such as those that LLaVA's own code needs, know no such keyword
            options["target_parameters"] = [f"{path}.in_proj_weight" for path in parameters]
        config = peft.LoraConfig(target_modules=rf"({names})" if modules else [], **options)
        try:
            peft.inject_adapter_in_model(config, skeleton, adapter_name=ADAPTER)
        except ValueError as error:
            raise UnsupportedViTError(
                f"peft cannot adapt these layers of {tower.spec} by {self.name}.", got=str(error)
            ) from error
        finally:
            for name, parameter in tower.vit.named_parameters():
                parameter.requires_grad_(trained[name])  # peft freezes what it wraps; a plan changes nothing
        return Change(replaced={path: skeleton.get_submodule(path) for path in (*modules, *parameters)})

    def fold(self, vit: nn.Module, change: Change) -> None:
        """Add the updates to the weights.

        Raises:
            MergeError: If an update is not finite.
        """
        layers: dict[str, Any] = dict(change.replaced)
        broken = [
            path for path, layer in layers.items() if not all(bool(p.isfinite().all()) for p in layer.parameters())
        ]
        if broken:
            raise MergeError(
                "Updates that are not finite cannot be folded into the weights.",
                expected="finite values",
                got=f"nan or inf in {', '.join(broken[:3])}",
                fix="covft.untune(tuned)",
            )
        for path, layer in layers.items():
            layer.merge(safe_merge=True)
            vit.set_submodule(path, layer.get_base_layer())

    def _options(self) -> dict[str, Any]:
        return {}

    def _places(self, tower: Tower) -> tuple[list[str], list[str]]:
        """Return the paths of the linear layers, and of the attentions that keep their projections as parameters."""
        layers = tower.layers(self.layers, range(tower.last + 1))
        blocks = {tower.spec.blocks[layer].path for layer in layers}
        ffns = tuple(
            f"{path}."
            for block in tower.spec.blocks
            for path in (block.mlp_path, block.output_path)
            if path is not None and block.path in blocks
        )
        chosen = tuple(f"{tower.spec.blocks[layer].mlp_path}." for layer in layers)
        chosen += tuple(f"{path}." for layer in layers if (path := tower.spec.blocks[layer].output_path))
        modules: list[str] = []
        parameters: list[str] = []
        for path, module in linear_layers(tower.vit, tuple(blocks)):
            in_ffn = f"{path}.".startswith(ffns)
            if in_ffn and (self.targets == "attention" or not f"{path}.".startswith(chosen)):
                continue
            if not in_ffn and self.targets == "ffn":
                continue
            (parameters if isinstance(module, nn.MultiheadAttention) else modules).append(path)
        if not modules and not parameters:
            raise UnsupportedViTError(f"The blocks of {tower.spec} have no linear layers for targets={self.targets!r}.")
        return modules, parameters


@check_kinds
@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    r"""Add low-rank updates of the direction of weights, and train their magnitude.

    $y = m \odot \frac{W + \frac{\alpha}{r} B A}{\lVert W + \frac{\alpha}{r} B A \rVert} x$, the norm per output,
    $m$ trained from $\lVert W \rVert$. Liu et al., "DoRA", arXiv 2402.09353; built by peft. It cannot be used with
    an `nn.MultiheadAttention` (open_clip), whose projections peft adapts by LoRA alone: `targets="ffn"` there. It
    trains $d_{\mathrm{out}}$ parameters per layer more than LoRA, and has the same options.
    """

    name: ClassVar[str] = "dora"

    def _options(self) -> dict[str, Any]:
        return {"use_dora": True}


def _skeleton(vit: nn.Module, paths: list[str]) -> nn.Module:
    """Return a module with the very modules of a ViT at some paths, in the ViT's order, and nothing else."""
    wanted = set(paths)
    skeleton = nn.Module()
    for path, module in vit.named_modules():
        if path not in wanted:
            continue
        place: Any = skeleton
        *parents, name = path.split(".")
        for parent in parents:
            if parent not in place._modules:
                place.add_module(parent, nn.Module())
            place = place._modules[parent]
        place.add_module(name, module)
    return skeleton
