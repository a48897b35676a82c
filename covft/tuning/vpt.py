"""Prompts beside the image tokens.

Shapes: B images, N tokens of an image, P prompts, D embed_dim.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from covft.conditioning import Conditioning
from covft.errors import ShapeError, UnsupportedViTError
from covft.tuning.attentions import attention_of
from covft.tuning.change import Change, Hook
from covft.tuning.method import Method, Tower
from covft.tuning.texts import check_plain_layout, conditioning_of, first_tensor, like, with_tensor
from covft.utils.arguments import check_kinds, check_sizes
from covft.utils.torch_internals import in_backward

_CHILD = "covft_prompts"


@check_kinds
@dataclass(frozen=True, kw_only=True)
class VPT(Method):
    r"""Give blocks learned tokens beside those of the image.

    Deep: each chosen block gets prompts $P_i$ of its own, $[x_i, \_] = B_i([x_{i-1}, P_i])$, and what it makes of them
    is dropped. Shallow: the first chosen block gets $P$, and what a block makes of them goes on to the next,
    $[x_i, p_i] = B_i([x_{i-1}, p_{i-1}])$, up to the last chosen block. The prompts are uniform in
    $\pm\sqrt{6 / (3 s^2 + D)}$, s being the side of a patch. Jia et al., "Visual Prompt Tuning", arXiv 2203.12119.

    Prompts are taken off after every block, so that class tokens, registers, hidden states and pooling are where they
    were. They change the output from the start. Differs from the paper in that there is no dropout and no new head,
    and that prompts stand after the image tokens: positions are added before the blocks, so the place does not matter.
    Deep prompts of $n$ blocks train $n P D$ parameters, shallow ones $P D$.

    Attributes:
        prompts: Number of prompts P.
        deep: Whether each block has its own.
        layers: Indices of the blocks, negative ones counted from the end; None takes all that are read. For shallow
            prompts they have to follow one another.
    """

    prompts: int = 10
    deep: bool = True
    layers: tuple[int, ...] | None = None
    name: ClassVar[str] = "vpt"
    size: ClassVar[str | None] = "prompts"

    def __post_init__(self) -> None:
        check_sizes(prompts=self.prompts)

    def plan(self, tower: Tower) -> Change:
        """Plan prompts for blocks.

        Raises:
            UnsupportedViTError: If tokens cannot be added: packed, windowed or masked attention, or positions in it;
                or if shallow prompts would jump over a block.
            LayerIndexError: If the ViT does not have such blocks, or nothing reads them.
        """
        layers = tower.layers(self.layers, range(tower.last + 1))
        check_plain_layout(tower, layers, self.name)
        paths = list(dict.fromkeys(tower.spec.blocks[layer].path for layer in layers))
        blocks = {block.path: block for block in tower.spec.blocks}
        for path in paths:
            attention_of(tower, blocks[path], self.name)
        if not self.deep:
            every = list(blocks)
            first = every.index(paths[0])
            widths = {blocks[path].embed_dim for path in paths}
            if every[first : first + len(paths)] != paths or len(widths) > 1:
                raise UnsupportedViTError(
                    "Shallow prompts go from block to block, so the blocks have to follow one another, at one width.",
                    expected=f"layers like range({layers[0]}, {layers[0] + len(layers)})",
                    got=", ".join(map(str, layers)),
                )
        added: dict[str, nn.Module] = {}
        hooks: list[Hook] = []
        bound = _bound(_patch_side(tower.vit), blocks[paths[0]].embed_dim)
        conditioning = None if self.deep else conditioning_of(tower, needs_text=False)
        for path in paths:
            place = next(tower.vit.get_submodule(path).parameters())
            if self.deep or path == paths[0]:
                module: nn.Module = Prompts(self.prompts, blocks[path].embed_dim, bound, conditioning)
            else:
                module = PassedOn(self.prompts, conditioning, before=added[f"{hooks[-1].path}.{_CHILD}"])
            added[f"{path}.{_CHILD}"] = like(place, module)
            hooks += [Hook(path, module.insert, before=True), Hook(path, module.strip)]
        return Change(added=added, hooks=tuple(hooks), conditioning=conditioning)


class _Inserted(nn.Module):
    """Adds prompts before a block, takes them off after it, and keeps what the block has made of them for the next.

    Args:
        num_prompts: Number of prompts P.
        conditioning: Knows which run of the tower the running code belongs to, in a recomputation too; None where
            nothing is kept.
    """

    def __init__(self, num_prompts: int, conditioning: Conditioning | None) -> None:
        super().__init__()
        self.num_prompts, self.conditioning = num_prompts, conditioning
        self.left: Any = None  # by run of the tower

    def rows(self, tokens_BND: Tensor) -> Tensor:
        """Return the prompts of each image, shape `(B, P, D)`."""
        raise NotImplementedError

    def insert(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Add the prompts to the tokens that the block gets."""
        name, tokens_BND = tokens_of(args, kwargs)
        joined = torch.cat([tokens_BND, self.rows(tokens_BND).to(tokens_BND.dtype)], dim=1)
        return ((joined, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: joined})

    def strip(self, block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Take them off what the block returns."""
        tokens_BND = first_tensor(output)
        if self.conditioning is not None and not in_backward():
            self.left = weakref.WeakKeyDictionary() if self.left is None else self.left
            self.left[self.conditioning.scope()] = tokens_BND[:, -self.num_prompts :]
        return with_tensor(output, tokens_BND[:, : -self.num_prompts])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "left": None}


class Prompts(_Inserted):
    """The prompts of a block.

    Args:
        num_prompts: Number of prompts P.
        embed_dim: Their width D.
        bound: They start uniform between this and its negative.
        conditioning: As above.
    """

    def __init__(self, num_prompts: int, embed_dim: int, bound: float, conditioning: Conditioning | None) -> None:
        super().__init__(num_prompts, conditioning)
        self.prompts = nn.Parameter(torch.empty(num_prompts, embed_dim).uniform_(-bound, bound))

    def rows(self, tokens_BND: Tensor) -> Tensor:
        """Return the same prompts for each image."""
        return self.prompts.expand(len(tokens_BND), -1, -1)


class PassedOn(_Inserted):
    """What the block before has made of its prompts.

    Args:
        num_prompts: Number of prompts P.
        conditioning: As above.
        before: The prompts of the block before.
    """

    def __init__(self, num_prompts: int, conditioning: Conditioning | None, before: nn.Module) -> None:
        super().__init__(num_prompts, conditioning)
        self.before: Any
        self.__dict__["before"] = before  # past nn.Module: it has its own place

    def rows(self, tokens_BND: Tensor) -> Tensor:
        """Return what is left of each image's prompts."""
        assert self.conditioning is not None, "given by the plan"
        left: Any = self.before.left
        return left[self.conditioning.scope()]


def tokens_of(args: tuple, kwargs: dict[str, Any]) -> tuple[str | None, Tensor]:
    """Return the tokens that a block gets, shape `(B, N, D)`, and the name by which they come, if they have one.

    Raises:
        ShapeError: If they are of another shape.
    """
    name = None if args else next(name for name, value in kwargs.items() if isinstance(value, Tensor))
    tokens_BND = args[0] if name is None else kwargs[name]
    if tokens_BND.dim() != 3:
        raise ShapeError(
            "Prompts stand beside the tokens of an image in one row.",
            expected="tokens (B, N, D) at every block",
            got=tuple(tokens_BND.shape),
        )
    return name, tokens_BND


def _bound(side: int, embed_dim: int) -> float:
    return math.sqrt(6 / (3 * side**2 + embed_dim))


def _patch_side(vit: nn.Module) -> int:
    """Return the side of a patch in pixels: the kernel of the first convolution; 16 where there is none."""
    convolution = next((module for module in vit.modules() if isinstance(module, nn.Conv2d)), None)
    return 16 if convolution is None else int(convolution.kernel_size[0])
