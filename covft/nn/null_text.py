"""The null text: a learned vector in the place of the features of a question, where there is none.

Shapes: B images, C text_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from covft.nn.functional import Place
from covft.utils.arguments import check_kinds, check_sizes


class NullText(nn.Module):
    """Replaces the text features of images without a question, and in training of a random share of the others.

    That is how classifier-free guidance learns what no condition means (Ho and Salimans, arXiv 2207.12598). One vector
    serves all blocks, as the features of a text do.

    The vector starts at zero: the same on every process and for every text encoder, and far from the features of any
    question. It learns from there: what comes first is the refinement of eq. 7, whose biases are random,
    and a norm, so neither its output nor the gradient of the vector vanishes at zero. The mean of the features of the
    training questions would start closer to what the routers know, but is not known when a ViT is wrapped.

    Args:
        text_dim: Width C of the text features.
        rate: Share of the images whose text is replaced in training mode.
        **place: `device` and `dtype` of the vector.

    Example:
        >>> NullText(4, 0.1)(None, 2).shape
        torch.Size([2, 4])
    """

    @check_kinds
    def __init__(self, text_dim: int, rate: float, **place: Unpack[Place]) -> None:
        super().__init__()
        check_sizes(text_dim=text_dim)
        self.rate = rate
        self.vector = nn.Parameter(torch.zeros(text_dim, **place))

    def forward(
        self, text_BC: Tensor | None, num_images: int, without_text_B: Tensor | None = None, seed: int | None = None
    ) -> Tensor:
        """Put the vector where it belongs.

        Args:
            text_BC: Text features, shape `(B, C)`; None if no image has a text.
            num_images: Number of images B.
            without_text_B: True for images without a text, shape `(B,)`; None if all have one.
            seed: Of the images whose text is replaced in training mode.

        Returns:
            Text features, shape `(B, C)`.
        """
        if text_BC is None:
            return self.vector.expand(num_images, -1)
        if self.training and self.rate:
            dropped_B = self._drawn(num_images, seed).to(text_BC.device)
            without_text_B = dropped_B if without_text_B is None else dropped_B | without_text_B
        if without_text_B is None:
            if not torch.is_grad_enabled():
                return text_BC
            # Without any such image, the vector still gets a gradient of zeros, which reduction across processes needs.
            without_text_B = torch.zeros(num_images, dtype=torch.bool, device=text_BC.device)
        return torch.where(without_text_B[:, None], self.vector.to(text_BC.device, text_BC.dtype), text_BC)

    def _drawn(self, num_images: int, seed: int | None) -> Tensor:
        """Draw the images whose text is replaced, on the CPU, so that every device gets the same ones."""
        generator = None if seed is None else torch.Generator("cpu").manual_seed(seed)
        return torch.rand(num_images, generator=generator, device="cpu") < self.rate
