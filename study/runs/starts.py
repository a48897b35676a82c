"""What several runs start from: a projector that was trained alone, or a model of the upstream tasks.

Each is trained once in a process, for all runs that share it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

import covft
from study.data.tasks import TASKS
from study.runs.build import ask, new_llava, new_miniature, parameter_groups
from study.runs.methods import tune
from study.runs.model import first_trained, started_at
from study.runs.score import score
from study.runs.settings import RunSettings
from study.runs.tables import held_out_part, training_order, training_part
from study.runs.train import fit

_SHARED = (
    "size", "tower", "tokens", "seed", "split", "first_steps", "first_lr", "batch", "train_scenes", "precision",
)  # fmt: skip
_known: dict[tuple[str, str], Any] = {}


def start(llava: Any, settings: RunSettings, device: str) -> dict[str, Any] | None:
    """Give a new LLaVA the weights that a run starts from; return what it scores with them, if it was trained.

    Args:
        llava: LLaVA with a random projector, filled in place.
        settings: The run.
        device: `cpu` or `cuda`.
    """
    if settings.upstream:
        weights, before = _shared(_upstream, _of_upstream(settings), device)
        llava.load_state_dict(weights, strict=False)
        return {part: {t: v for t, v in found.items() if t in settings.scored} for part, found in before.items()}
    llava.model.multi_modal_projector.load_state_dict(_shared(projector, of_projector(settings), device))
    return None


def _shared(train: Any, settings: RunSettings, device: str) -> Any:
    key = _key(train, settings, device)
    if key not in _known:
        _known[key] = train(settings, device)
    return _known[key]


def _key(train: Any, settings: RunSettings, device: str) -> tuple[str, str]:
    return f"{train.__name__} {settings}", device


def keep_projector(settings: RunSettings, device: str, weights: dict[str, Tensor]) -> None:
    """Keep a projector that another process has trained.

    Args:
        settings: Settings of its training, from `of_projector`.
        device: Device of the runs that start from it.
        weights: What `projector` returned.
    """
    _known[_key(projector, settings, device)] = weights


def of_projector(settings: RunSettings) -> RunSettings:
    """Return the settings by which the projector that a run starts from is trained."""
    own = {"method": "frozen", "language": "frozen", "tasks": ("caption",), "per_picture": 1}
    return RunSettings(**own, **{name: getattr(settings, name) for name in _SHARED})


def projector(settings: RunSettings, device: str) -> dict[str, Tensor]:
    """Train the projector alone on captions, as the first stage of LLaVA; return its weights.

    Args:
        settings: From `of_projector`.
        device: `cpu` or `cuda`.
    """
    llava = new_llava(settings)
    trained = llava.model.multi_modal_projector
    if settings.first_steps:
        encoder = tune(llava, settings, None)
        model = new_miniature(llava, encoder, settings).to(device)
        part, first = training_part(settings), first_trained(encoder.vit)
        asked = ask(settings, encoder, part, settings.tasks, first, device)
        order = training_order(asked.table, settings.first_steps, settings.batch, 1, settings.seed)
        with started_at(encoder.vit, first):
            fit(model, asked, order, [{"params": list(trained.parameters()), "lr": settings.first_lr}], per_picture=1)
    return {name: value.detach().cpu() for name, value in trained.state_dict().items()}


def _of_upstream(settings: RunSettings) -> RunSettings:
    own = {"method": "frozen", "options": {}, "control": "none", "language": "full", "projector": True}
    return settings.replace(**own, tasks=settings.upstream, upstream=(), vision_lr=None, router_lr=None)


def _upstream(settings: RunSettings, device: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train on the upstream tasks with a frozen tower; return weights outside it, and the hits and captions of all."""
    llava = new_llava(settings)
    start(llava, settings, device)
    encoder = tune(llava, settings, None)
    model = new_miniature(llava, encoder, settings).to(device)
    first = first_trained(encoder.vit)
    train, held_out = training_part(settings), held_out_part(settings)
    asked = ask(settings, encoder, train, settings.tasks, first, device)
    order = training_order(asked.table, settings.steps, settings.batch, settings.per_picture, settings.seed)
    with started_at(encoder.vit, first):
        fit(model, asked, order, parameter_groups(llava, encoder, settings), per_picture=settings.per_picture)
        found = score(model, ask(settings, encoder, held_out, tuple(TASKS), first, device))
    covft.untune(llava)
    outside = {n: v.detach().cpu() for n, v in llava.state_dict().items() if not n.startswith("model.vision_tower.")}
    return outside, found
