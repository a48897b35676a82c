"""Text-driven scale and shift after each norm.

Shapes: B images, N tokens of an image, D embed_dim, C text_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from covft.adapters.spec import BlockSpec
from covft.conditioning import Conditioning
from covft.errors import UnsupportedViTError
from covft.tuning.attentions import is_attention
from covft.tuning.change import Change, Hook
from covft.tuning.method import Method, Tower
from covft.tuning.texts import ReadsText, check_plain_layout, conditioning_of, like, text_width
from covft.utils.arguments import check_kinds, check_sizes


@check_kinds
@dataclass(frozen=True, kw_only=True)
class AdaLN(Method):
    r"""Scale and shift the output of each norm by what the text says.

    $y = (1 + \gamma(t)) \odot \mathrm{Norm}(x) + \beta(t)$ with
    $[\gamma, \beta] = W_2\, \mathrm{GELU}(W_1 t + b_1) + b_2$ and $W_2 = 0, b_2 = 0$ at the start, so that no output
    changes. Feature-wise modulation is FiLM's (Perez et al., arXiv 1709.07871), the zero start that of DiT's adaLN-Zero
    (Peebles and Xie, arXiv 2212.09748); instruction-guided vision towers use the idea. Differs from these in that the
    norms and the rest of the tower stay frozen, and that nothing gates the residual branches.

    With inner width $w$ and $m$ norms in each of $n$ blocks it trains $n (C w + w + m (2 w D + 2 D))$ parameters.

    Attributes:
        layers: Indices of the blocks, negative ones counted from the end. None takes those that `covft.wrap` would.
        width: Inner width of the two-layer network of each block.
    """

    layers: tuple[int, ...] | None = None
    width: int = 256
    name: ClassVar[str] = "adaln"
    needs_text: ClassVar[bool] = True
    size: ClassVar[str | None] = "width"

    def __post_init__(self) -> None:
        check_sizes(width=self.width)

    def plan(self, tower: Tower) -> Change:
        """Plan modulations of every norm of the block's own width.

        Raises:
            ConfigError: If there is no text.
            UnsupportedViTError: If a block has no such norm, or sees parts of images.
            LayerIndexError: If the ViT does not have such blocks, or nothing reads them.
        """
        text_dim = text_width(tower, self.name)
        layers = tower.layers(self.layers, tower.spec.default_layers)
        check_plain_layout(tower, layers, self.name)
        conditioning = conditioning_of(tower)
        added: dict[str, nn.Module] = {}
        hooks: list[Hook] = []
        for path in dict.fromkeys(tower.spec.blocks[layer].path for layer in layers):
            block = next(block for block in tower.spec.blocks if block.path == path)
            norms = _token_norms(tower.vit.get_submodule(path), block)
            if not norms:
                raise UnsupportedViTError(f"{path} of {tower.spec} has no norm of its tokens outside the FFN.")
            weight = next(tower.vit.get_submodule(f"{path}.{norms[0]}").parameters(recurse=False))
            modulation = Modulation(conditioning, text_dim, self.width, block.embed_dim, norms)
            added[f"{path}.covft_adaln"] = like(weight, modulation)
            hooks += [Hook(f"{path}.{norm}", part.modulate) for norm, part in zip(norms, modulation.parts, strict=True)]
        return Change(added=added, hooks=tuple(hooks), conditioning=conditioning)


class Modulation(nn.Module):
    """The modulations of one block's norms: a first layer that they share, and a second for each.

    Args:
        conditioning: Carries the text.
        text_dim: Width C of the text features.
        width: Inner width.
        embed_dim: Width D of the tokens.
        norms: Names of the norms.
    """

    def __init__(self, conditioning: Conditioning, text_dim: int, width: int, embed_dim: int, norms: list[str]) -> None:
        super().__init__()
        first = nn.Linear(text_dim, width)
        self.first = first
        self.modulations = nn.ModuleList(ModulatedNorm(conditioning, first, width, embed_dim) for _ in norms)

    @property
    def parts(self) -> list[ModulatedNorm]:
        """The modulations, in the order of the norms."""
        return [part for part in self.modulations if isinstance(part, ModulatedNorm)]


class ModulatedNorm(ReadsText):
    """The modulation of one norm; a forward hook of it.

    Args:
        conditioning: Carries the text.
        first: The first layer, which belongs to the block.
        width: Inner width.
        embed_dim: Width D of the tokens.
    """

    def __init__(self, conditioning: Conditioning, first: nn.Linear, width: int, embed_dim: int) -> None:
        super().__init__(conditioning)
        self.first: Any
        self.__dict__["first"] = first  # past nn.Module: its parameters are the block's
        self.second = nn.Linear(width, 2 * embed_dim)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def modulate(self, norm: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Scale and shift what the norm returns."""
        images = self.images_of(output)
        text_BC = images.text.to(self.second.weight.dtype)
        hidden = nn.functional.gelu(self.first(text_BC))
        scale_BD, shift_BD = self.second(hidden).chunk(2, dim=-1)
        tokens_BND = torch.addcmul(shift_BD[:, None], images.tokens_BND, 1 + scale_BD[:, None])
        return images.restore(tokens_BND.to(output.dtype))


def _token_norms(module: nn.Module, block: BlockSpec) -> list[str]:
    """Return the norms of a block's tokens: those of the block's width, outside its FFNs and its attention."""
    attentions = tuple(f"{name}." for name, child in module.named_children() if is_attention(name, child))
    found = []
    for norm in block.norms:
        weight = next(module.get_submodule(norm).parameters(recurse=False))
        if weight.shape == (block.embed_dim,) and not norm.startswith(attentions):
            found.append(norm)
    return found
