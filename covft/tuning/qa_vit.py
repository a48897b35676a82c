"""Question states beside the image tokens in a block's attention.

Shapes: B images, N tokens of an image, L tokens of a text, D embed_dim, C text_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from covft.conditioning import Conditioning
from covft.tuning.attentions import attention_of
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

_CHILD = "covft_question"


@check_kinds
@dataclass(frozen=True, kw_only=True)
class QAViT(Method):
    r"""Let the tokens of the question take part in the attention of some blocks.

    $a(x) \leftarrow a(x) + \tanh(\beta)\,\left(a([x, W t])_{1 \ldots N} - a(x)\right)$, where $a$ is the frozen
    attention, in whose keys and values the projected states $W t$ of the question's tokens join those of the image, and
    $\beta = 0$ at the start, so that no output changes. Ganz et al., "Question Aware Vision Transformer for Multimodal
    Reasoning", arXiv 2402.05472. Differs from the paper in the gate: there, the question joins the attention at once,
    and a second, gated output projection is trained; here the gate is between the attention without and with the
    question, which costs a second attention in each of these blocks and leaves the frozen tower exactly as it was.

    A question is given by a fixed number of states, each the average of an equal span of its tokens, so that questions
    of other lengths in the batch change nothing and the attention needs no mask.

    With inner width $w$, $n$ blocks train $n (C w + w + w D + D + 1)$ parameters.

    Attributes:
        layers: Indices of the blocks, negative ones counted from the end. None takes those that `covft.wrap` would.
        tokens: Number of states that stand for a question.
        width: Inner width of the two-layer projection of the question.
    """

    layers: tuple[int, ...] | None = None
    tokens: int = 8
    width: int = 256
    name: ClassVar[str] = "qa_vit"
    needs_text: ClassVar[bool] = True
    reads_states: ClassVar[bool] = True
    size: ClassVar[str | None] = "width"

    def __post_init__(self) -> None:
        check_sizes(tokens=self.tokens, width=self.width)

    def plan(self, tower: Tower) -> Change:
        """Plan a gated second attention in each block.

        Raises:
            ConfigError: If there is no text.
            UnsupportedViTError: If tokens cannot be added: packed, windowed or masked attention, or positions in it.
            LayerIndexError: If the ViT does not have such blocks, or nothing reads them.
        """
        text_dim = text_width(tower, self.name)
        layers = tower.layers(self.layers, tower.spec.default_layers)
        check_plain_layout(tower, layers, self.name)
        conditioning = conditioning_of(tower)
        added: dict[str, nn.Module] = {}
        hooks: list[Hook] = []
        for layer in layers:
            block = tower.spec.blocks[layer]
            attention = attention_of(tower, block, self.name)
            if f"{attention}.{_CHILD}" in added:
                continue  # a block with several FFNs
            weight = next(tower.vit.get_submodule(attention).parameters())
            module = JoinedQuestion(conditioning, text_dim, self.width, block.embed_dim, self.tokens)
            added[f"{attention}.{_CHILD}"] = like(weight, module)
            hooks.append(Hook(attention, module.join))
        return Change(added=added, hooks=tuple(hooks), conditioning=conditioning)


class JoinedQuestion(ReadsText):
    """Adds to an attention's output what the question changes in it; a forward hook of the attention.

    Args:
        conditioning: Carries the text.
        text_dim: Width C of the text's states.
        width: Inner width of their projection.
        embed_dim: Width D of the image tokens.
        tokens: Number of states that stand for a question.
    """

    def __init__(self, conditioning: Conditioning, text_dim: int, width: int, embed_dim: int, tokens: int) -> None:
        super().__init__(conditioning)
        self.tokens = tokens
        self.project = nn.Sequential(nn.Linear(text_dim, width), nn.GELU(), nn.Linear(width, embed_dim))
        self.gate = nn.Parameter(torch.zeros(()))

    def join(self, attention: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Attend once more, with the question."""
        name = None if args else next(name for name, value in kwargs.items() if isinstance(value, Tensor))
        x = args[0] if name is None else kwargs[name]
        images = self.images_of(x)
        spans_BKC = averaged(images.text.to(self.gate.dtype), images.text_mask_BL, self.tokens)
        joined = torch.cat([images.tokens_BND, self.project(spans_BKC).to(x.dtype)], dim=1)
        if isinstance(attention, nn.MultiheadAttention):
            again = attention.forward(x, joined, joined, *args[3:], **_without(kwargs, "key", "value", "query"))
        elif name is None:
            again = attention.forward(joined, *args[1:], **kwargs)
        else:
            again = attention.forward(*args, **{**kwargs, name: joined})
        plain, other = first_tensor(output), first_tensor(again)[:, : images.tokens_BND.shape[1]]
        return with_tensor(output, torch.lerp(plain, other.reshape(plain.shape), self.gate.tanh().to(plain.dtype)))


def averaged(states_BLC: Tensor, mask_BL: Tensor | None, spans: int) -> Tensor:
    """Return the averages of equal spans of each text's states, shape `(B, K, C)`.

    Args:
        states_BLC: States of the tokens.
        mask_BL: Which are of the text; they come first. None if all are.
        spans: Number of spans K.
    """
    length = states_BLC.shape[1]
    places_L = torch.arange(length, device=states_BLC.device)
    lengths_B1 = places_L.new_full((len(states_BLC), 1), length) if mask_BL is None else mask_BL.sum(1, keepdim=True)
    steps_K = torch.arange(spans, device=states_BLC.device)
    start_BK = steps_K * lengths_B1 // spans
    stop_BK = -(-(steps_K + 1) * lengths_B1 // spans)
    inside_BKL = (places_L >= start_BK[..., None]) & (places_L < stop_BK[..., None])
    weights_BKL = inside_BKL.to(states_BLC.dtype) / (stop_BK - start_BK)[..., None]
    return weights_BKL @ states_BLC


def _without(kwargs: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in names}
