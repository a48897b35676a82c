"""Records what the tower of a multimodal LLM sees and returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.helpers.mllm_configs import PATCH
from tests.helpers.towers import features as features_of_tower


class Run(NamedTuple):
    """One run of a tower: the images that it saw, each as arguments for it alone, and what it made of them."""

    images: list[dict[str, Tensor]]
    features: list[Tensor]

    def same_images(self, other: Run) -> bool:
        """Whether two runs saw the same."""
        pairs = zip(self.images, other.images, strict=True)
        return all(torch.equal(one[name], two[name]) for one, two in pairs for name in one)


def seen(images: Tensor, kwargs: dict[str, Any], features: Tensor) -> Run:
    """Take a tower's batch apart."""
    if (grid := kwargs.get("grid_thw")) is not None:
        lengths = grid.prod(-1)
        patches = images.split(lengths.tolist())
        rows = (lengths * len(features) // lengths.sum()).tolist()  # some towers merge squares of tokens
        alone = [{"hidden_states": x, "grid_thw": row[None]} for x, row in zip(patches, grid, strict=True)]
        return Run(alone, list(features.split(rows)))
    if (sizes := kwargs.get("image_sizes")) is not None:
        alone = [{"pixel_values": x[None], "image_sizes": row[None]} for x, row in zip(images, sizes, strict=True)]
        return Run(alone, list(features[0].split((sizes // PATCH).prod(-1).tolist())))
    if (ratios := kwargs.get("aspect_ratio_ids")) is not None:
        masks = kwargs["aspect_ratio_mask"].flatten(0, 1)
        alone = [
            {"pixel_values": x[None, None], "aspect_ratio_ids": ratio.view(1, 1), "aspect_ratio_mask": mask[None, None]}
            for x, ratio, mask in zip(images.flatten(0, 1), ratios.flatten(), masks, strict=True)
            if ratio
        ]
        return Run(alone, list(features.flatten(0, 1)[ratios.flatten().bool()]))
    return Run([{"pixel_values": image[None]} for image in images], list(features))


def watch(tower: nn.Module, call: Callable[[], Any]) -> tuple[Any, list[Run]]:
    """What a call returns, and the tower's runs during it."""
    runs: list[Run] = []

    def note(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        images = args[0] if args else kwargs["pixel_values"]
        runs.append(seen(images, kwargs, features_of_tower(output).detach().clone()))

    handle = tower.register_forward_hook(note, with_kwargs=True)
    try:
        return call(), runs
    finally:
        handle.remove()
