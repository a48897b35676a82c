"""Gated cross-attention to the tokens of the text, after blocks.

Shapes: B images, N tokens of an image, L tokens of a text, D embed_dim, C text_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from covft.conditioning import Conditioning
from covft.errors import ConfigError
from covft.tuning.change import Change, Hook
from covft.tuning.method import Method, Tower
from covft.tuning.texts import (
    ReadsText,
    check_plain_layout,
    conditioning_of,
    first_tensor,
    like,
    text_width,
    with_tensor,
)
from covft.utils.arguments import check_kinds, check_sizes


@check_kinds
@dataclass(frozen=True, kw_only=True)
class CrossAttention(Method):
    r"""Let image tokens attend to the tokens of the text after each chosen block.

    $x \leftarrow x + s \tanh(\alpha)\, W_o\, \mathrm{softmax}\!\left(\frac{q(x)\, k(t)^\top}{\sqrt{d}}\right) v(t)$
    with $q = W_q \mathrm{LN}(x)$, $k$ and $v$ linear in $\mathrm{LN}(t)$, $\alpha = 0$ at the start, so that no output
    changes, and $s$ the strength, 1 unless `tuned.strength` is set: 0 is the frozen tower. The gate is Flamingo's
    (Alayrac et al., arXiv 2204.14198), there in the language model; steerable vision towers use the idea. Differs from
    these in that there is no second, gated FFN.

    With width $w$, $n$ blocks train $n (2 w D + 2 w C + 3 w + 3 D + 2 C + 1)$ parameters.

    Attributes:
        layers: Indices of the blocks, negative ones counted from the end. None takes those that `covft.wrap` would.
        heads: Heads of the attention.
        width: Width of queries, keys and values together; None takes that of the text features.
    """

    layers: tuple[int, ...] | None = None
    heads: int = 4
    width: int | None = None
    name: ClassVar[str] = "cross_attention"
    needs_text: ClassVar[bool] = True
    reads_states: ClassVar[bool] = True
    size: ClassVar[str | None] = "width"

    def __post_init__(self) -> None:
        check_sizes(heads=self.heads, width=self.width)

    def plan(self, tower: Tower) -> Change:
        """Plan an attention after each block.

        Raises:
            ConfigError: If there is no text, or the heads do not divide the width.
            UnsupportedViTError: If a block sees parts of images.
            LayerIndexError: If the ViT does not have such blocks, or nothing reads them.
        """
        text_dim = text_width(tower, self.name)
        width = text_dim if self.width is None else self.width
        if width % self.heads:
            fix = f"heads={next(h for h in (4, 3, 2, 1) if width % h == 0)}"
            expected = f"a divisor of {width}"
            raise ConfigError("heads does not divide the width.", expected=expected, got=self.heads, fix=fix)
        layers = tower.layers(self.layers, tower.spec.default_layers)
        check_plain_layout(tower, layers, self.name)
        conditioning = conditioning_of(tower)
        added: dict[str, nn.Module] = {}
        hooks: list[Hook] = []
        for layer in layers:
            block = tower.spec.blocks[layer]
            if f"{block.path}.covft_cross_attention" in added:
                continue  # a block with several FFNs
            weight = next(tower.vit.get_submodule(block.path).parameters())
            module = GatedCrossAttention(conditioning, block.embed_dim, text_dim, width, self.heads)
            added[f"{block.path}.covft_cross_attention"] = like(weight, module)
            hooks.append(Hook(block.path, module.attend))
        return Change(added=added, hooks=tuple(hooks), conditioning=conditioning)


class GatedCrossAttention(ReadsText):
    """Adds to image tokens what they find in the text; a forward hook of a block.

    Args:
        conditioning: Carries the text.
        embed_dim: Width D of the tokens.
        text_dim: Width C of the text's states.
        width: Width of queries, keys and values.
        heads: Heads; must divide the width.

    Attributes:
        strength: Factor of what is added; 0 leaves the tokens as they are.
    """

    def __init__(self, conditioning: Conditioning, embed_dim: int, text_dim: int, width: int, heads: int) -> None:
        super().__init__(conditioning)
        self.heads = heads
        self.strength = 1.0
        self.norm, self.text_norm = nn.LayerNorm(embed_dim), nn.LayerNorm(text_dim)
        self.query = nn.Linear(embed_dim, width)
        self.key_value = nn.Linear(text_dim, 2 * width)
        self.output = nn.Linear(width, embed_dim)
        self.gate = nn.Parameter(torch.zeros(()))

    def attend(self, block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Attend to the text from what the block returns."""
        x = first_tensor(output)
        images = self.images_of(x)
        states_BLC = images.text.to(self.gate.dtype)
        query = self._split(self.query(self.norm(images.tokens_BND.to(self.gate.dtype))))
        key, value = (self._split(part) for part in self.key_value(self.text_norm(states_BLC)).chunk(2, dim=-1))
        mask = None if images.text_mask_BL is None else images.text_mask_BL[:, None, None]
        found = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        added = self.output(found.transpose(1, 2).flatten(2)) * (self.strength * self.gate.tanh())
        return with_tensor(output, x + images.restore(added).to(x.dtype))

    def _split(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)
