"""Methods that train some of the ViT's own parameters and add none.

They differ in what they train:

    frozen        nothing
    full          everything up to the last block that is read
    bitfit        biases (Ben Zaken et al., arXiv 2106.10199)
    layernorm     norms (Zhao et al., arXiv 2312.11420, who tune them in multimodal LLMs)
    ffn           the FFNs of some blocks: the place that covft adapts, without experts
    last_layers   the last blocks that are read
    top_layer     the last block that is read
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from covft.adapters.discovery import is_norm
from covft.errors import UnsupportedViTError
from covft.tuning.change import Change
from covft.tuning.method import Method, Tower
from covft.utils.arguments import check_kinds, check_sizes


@check_kinds
@dataclass(frozen=True, kw_only=True)
class Frozen(Method):
    """Train nothing: the frozen tower of most multimodal LLMs.

    It trains 0 parameters.
    """

    name: ClassVar[str] = "frozen"
    merges: ClassVar[bool] = True

    def plan(self, tower: Tower) -> Change:
        """Plan to freeze everything."""
        return Change()


@check_kinds
@dataclass(frozen=True, kw_only=True)
class Full(Method):
    r"""Train every parameter that the output depends on.

    $\theta \leftarrow \theta + \Delta\theta$ for the complete tower. Blocks after the last one that is read, and what
    comes after the blocks if the output of an inner block is read, stay frozen: they would get no gradient. Statistics
    of batch norms are kept, as by every method. It trains all parameters but theirs.
    """

    name: ClassVar[str] = "full"
    merges: ClassVar[bool] = True

    def plan(self, tower: Tower) -> Change:
        """Plan to train everything that is read."""
        return Change(trained=_names(tower, lambda module, name: True))


@check_kinds
@dataclass(frozen=True, kw_only=True)
class BitFit(Method):
    r"""Train the biases alone.

    In every $W x + b$ and every norm, $b$ is trained and $W$ is frozen. Ben Zaken et al., "BitFit", arXiv 2106.10199.
    Differs from the paper in that no new head is trained here: the language model reads the tokens.

    A plain ViT of $L$ blocks has $L (7 D + F)$ of them in its blocks: $4 D$ in the attention, $F + D$ in the FFN, $2 D$
    in the norms; and $D$ for each norm outside the blocks.
    """

    name: ClassVar[str] = "bitfit"
    merges: ClassVar[bool] = True

    def plan(self, tower: Tower) -> Change:
        """Plan to train biases.

        Raises:
            UnsupportedViTError: If the ViT has none.
        """
        names = _names(tower, lambda module, name: name.endswith("bias"))
        return Change(trained=_some(names, tower, "biases"))


@check_kinds
@dataclass(frozen=True, kw_only=True)
class LayerNorm(Method):
    r"""Train the affine weights of the norms alone.

    In $\gamma \odot \hat x + \beta$, $\gamma$ and $\beta$ are trained, query and key norms included. Zhao et al.,
    "Tuning LayerNorm in Attention", arXiv 2312.11420. Differs from the paper in that the tower's norms are tuned
    instead of the language model's.

    A plain ViT of $L$ blocks has $4 L D$ of them in its blocks, and $2 D$ for each norm outside the blocks.
    """

    name: ClassVar[str] = "layernorm"
    merges: ClassVar[bool] = True

    def plan(self, tower: Tower) -> Change:
        """Plan to train norms.

        Raises:
            UnsupportedViTError: If the ViT has none.
        """
        return Change(trained=_some(_names(tower, lambda module, name: is_norm(module)), tower, "norms"))


@check_kinds
@dataclass(frozen=True, kw_only=True)
class FFN(Method):
    r"""Train the FFNs of some blocks: the place that covft adapts, with one expert and no context.

    $y = E(x)$ with $E$ the pretrained FFN, trained. It separates what the place gives from what experts and context
    give. In $n$ blocks of a plain ViT it trains $n (2 D F + D + F)$ parameters.

    Attributes:
        layers: Indices of the blocks, negative ones counted from the end. None takes those that `covft.wrap` would.
    """

    layers: tuple[int, ...] | None = None
    name: ClassVar[str] = "ffn"
    merges: ClassVar[bool] = True
    size: ClassVar[str | None] = "layers"

    def plan(self, tower: Tower) -> Change:
        """Plan to train FFNs.

        Raises:
            LayerIndexError: If the ViT does not have such blocks, or nothing reads them.
        """
        blocks = [tower.spec.blocks[layer] for layer in tower.layers(self.layers, tower.spec.default_layers)]
        paths = [path for block in blocks for path in (block.mlp_path, block.output_path) if path is not None]
        named = ((path, name) for path in paths for name, _ in tower.vit.get_submodule(path).named_parameters())
        return Change(trained=_floating(tower.vit, (f"{path}.{name}" for path, name in named)))


@check_kinds
@dataclass(frozen=True, kw_only=True)
class LastLayers(Method):
    r"""Train the last blocks that are read.

    $x_l = B_l(x_{l-1})$ with $B_l$ trained for the last $n$ of these $l$, and backward stops before them. Lee et al.,
    "What Would Elsa Do? Freezing Layers During Transformer Fine-Tuning", arXiv 1911.03090. Differs from the paper in
    that there is no head to train. In a plain ViT it trains $n (4 D^2 + 2 D F + 9 D + F)$ parameters.

    Attributes:
        n: Number of blocks.
    """

    n: int = 4
    name: ClassVar[str] = "last_layers"
    merges: ClassVar[bool] = True
    size: ClassVar[str | None] = "n"

    def __post_init__(self) -> None:
        check_sizes(n=self.n)

    def plan(self, tower: Tower) -> Change:
        """Plan to train whole blocks.

        Raises:
            UnsupportedViTError: If there are fewer blocks.
        """
        return Change(trained=_blocks(tower, self.n))


@check_kinds
@dataclass(frozen=True, kw_only=True)
class TopLayer(Method):
    """Train the last block that is read: `last_layers` with `n=1`."""

    name: ClassVar[str] = "top_layer"
    merges: ClassVar[bool] = True

    def plan(self, tower: Tower) -> Change:
        """Plan to train one block."""
        return Change(trained=_blocks(tower, 1))


def _blocks(tower: Tower, n: int) -> tuple[str, ...]:
    paths = tuple(dict.fromkeys(block.path for block in tower.read))
    if n > len(paths):
        raise UnsupportedViTError(
            f"n={n} asks for more blocks than are read.", expected=f"n in [1, {len(paths)}]  ({tower.spec})", got=n
        )
    prefixes = tuple(f"{path}." for path in paths[-n:])
    return _floating(tower.vit, (name for name, _ in tower.vit.named_parameters() if name.startswith(prefixes)))


def _names(tower: Tower, chosen: Callable[[nn.Module, str], bool]) -> tuple[str, ...]:
    """Return the names of chosen parameters that the features depend on."""
    found = []
    unread = tower.unread
    for path, module in tower.vit.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            full_name = f"{path}.{name}" if path else name
            if chosen(module, name) and not full_name.startswith(unread):
                found.append(full_name)
    return _floating(tower.vit, found)


def _floating(vit: nn.Module, names: Iterator[str] | list[str]) -> tuple[str, ...]:
    return tuple(name for name in names if vit.get_parameter(name).is_floating_point())


def _some(names: tuple[str, ...], tower: Tower, what: str) -> tuple[str, ...]:
    if not names:
        raise UnsupportedViTError(f"{tower.spec} has no {what} to train.", fix='covft.tune(vit, "lora")')
    return names
