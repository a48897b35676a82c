"""A wrapped tower with the images and texts of several calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import covft
from tests.helpers.towers import BY_NAME, TEXT_DIM, features, perturb

Call = Callable[[Tensor, Tensor], Tensor]


class Case:
    """A wrapped tower in training mode, whose experts differ; in float64 on the CPU by default."""

    def __init__(
        self, name: str, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float64, **settings: Any
    ) -> None:
        self.tower = BY_NAME[name]
        plain = self.tower.build().to(device, dtype)
        self.encoder = covft.wrap(plain, TEXT_DIM, **settings).to(device, dtype)
        perturb(self.encoder)
        self.encoder.train()
        # Drawn on the CPU in float64, so that they are the same wherever and in whatever they are used.
        self.images = self.tower.images(3, torch.float64).to(device, dtype)
        self.others = self.tower.images(3, torch.float64).to(device, dtype)
        self.inputs = {name: value.to(device) if isinstance(value, Tensor) else value
                       for name, value in self.tower.inputs(3).items()}  # fmt: skip
        self.texts = [torch.randn(3, TEXT_DIM, dtype=torch.float64).to(device, dtype) for _ in range(3)]

    def output(self, images: Tensor, text: Tensor | None) -> Tensor:
        output = self.encoder(images, text, **self.inputs)
        return output.image_embeds if hasattr(output, "image_embeds") else features(output)

    def gradients(self, scenario: Callable[[Case, Call], None], call: Call) -> dict[str, Tensor]:
        self.encoder.zero_grad()
        torch.manual_seed(7)  # DINOv3 draws rotary jitter in training mode
        scenario(self, call)
        named = self.encoder.named_parameters()
        return {name: p.grad.clone() for name, p in named if p.grad is not None}
