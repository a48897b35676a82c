"""What a run is built of: the model, what its tower takes, its questions, and groups for the optimizer."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from study.runs.methods import needs_text, reads_states
from study.runs.model import Miniature
from study.runs.settings import RunSettings
from study.runs.sizes import SIZES, words_of
from study.runs.tables import Part, table_of
from study.runs.texts import text_rows
from study.runs.train import Questions, as_tower_takes
from study.towers import small_vit
from study.trunk import run_trunk

GREY = 128  # of a blank picture
_AT_ONCE = 500  # pictures


def new_llava(settings: RunSettings) -> Any:
    """Build LLaVA around the run's tower, with the pretrained language model and a random projector."""
    return SIZES[settings.size].llava(plain_tower(settings.tower), settings.seed)


def plain_tower(name: str) -> nn.Module:
    """Load a pretrained tower that takes pictures in [-1, 1]: `small_vit` or `backbone`."""
    if name == "small_vit":
        return small_vit()
    from study.backbone import packaged_backbone, takes_plain_pictures

    return takes_plain_pictures(packaged_backbone())


def new_miniature(llava: Any, encoder: Any, settings: RunSettings) -> Miniature:
    """Put the bottleneck between tower and projector."""
    before = words_of(settings.size).before_ids
    return Miniature(llava, encoder, settings.tokens, before, autocast=settings.precision == "bfloat16")


def pictures_of(settings: RunSettings, part: Part) -> Tensor:
    """Return the pictures of a part in the size of the run's tower, uint8, `(scenes, H, W, 3)`."""
    return _pictures(part, _side(settings))


def tower_inputs(settings: RunSettings, part: Part, first: int, device: str) -> Tensor:
    """Return what the tower takes for each scene of a part: pictures, or the cached input of its first block.

    Args:
        settings: The run.
        part: The scenes.
        first: The block at which the tower starts; 0 for the pictures.
        device: Where to.
    """
    return _inputs(part, settings.tower, _side(settings), first, device)


def ask(
    settings: RunSettings,
    encoder: Any,
    part: Part,
    tasks: tuple[str, ...],
    first: int,
    device: str,
    *,
    fraction: float = 1.0,
    shuffle: int | None = None,
) -> Questions:
    """Put questions on the device, with what the tower takes and what it is told.

    Args:
        settings: The run.
        encoder: Its tower.
        part: The scenes.
        tasks: The tasks whose questions are asked.
        first: The block at which the tower starts.
        device: Where to.
        fraction: Share of the scenes.
        shuffle: Seed by which what the tower is told is shuffled over all questions; None leaves it.
    """
    table = table_of(part, tasks, fraction, settings.control != "tower_only", settings.size)
    texts = text_rows(settings, table, states=reads_states(settings)) if needs_text(encoder) else None
    return Questions.of(table, tower_inputs(settings, part, first, device), texts, shuffle)


def parameter_groups(llava: Any, encoder: Any, settings: RunSettings) -> list[dict[str, Any]]:
    """Return groups for the optimizer: tower, projector and language model, with the run's learning rates."""
    vision, router = settings.rates()
    rates = {"router_lr": router} if settings.method == "covft" else {}
    groups = encoder.param_groups(vision, weight_decay=0.01, **rates)
    seen = {id(parameter) for parameter in encoder.vit.parameters()}
    for part, rate in ((llava.model.multi_modal_projector, settings.projector_lr), (llava, settings.lr)):
        params = [p for p in part.parameters() if p.requires_grad and id(p) not in seen]
        seen |= {id(parameter) for parameter in params}
        groups.append({"params": params, "lr": rate})
    return groups


def count_trained(module: nn.Module) -> int:
    """Count the parameters that are trained."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _side(settings: RunSettings) -> int:
    return SIZES[settings.size].sides[settings.tower]


@lru_cache(maxsize=8)
def _pictures(part: Part, side: int) -> Tensor:
    pictures = torch.from_numpy(part.pictures)
    if side == pictures.shape[1]:
        return pictures
    resized = [
        torch.nn.functional.interpolate(chunk.permute(0, 3, 1, 2).float(), (side, side), mode="bilinear")
        .round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
        for chunk in pictures.split(_AT_ONCE)
    ]  # fmt: skip
    return torch.cat(resized)


@lru_cache(maxsize=16)
def _inputs(part: Part, tower: str, side: int, first: int, device: str) -> Tensor:
    pictures = _pictures(part, side).to(device)
    if first == 0:
        return pictures
    trunk = plain_tower(tower).to(device)
    chunks = [run_trunk(trunk, as_tower_takes(chunk), (first,))[first] for chunk in pictures.split(_AT_ONCE)]
    return torch.cat(chunks)
