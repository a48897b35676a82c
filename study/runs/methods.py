"""Each method of covft.tune, as the study uses it."""

from __future__ import annotations

from typing import Any

from torch import nn

import covft
from covft.tuning import methods
from study.runs.settings import RunSettings
from study.runs.texts import WIDTH

_COVFT = "covft"


def options_of(settings: RunSettings) -> dict[str, Any]:
    """Return the options of a run's method: those given, and the fields of the settings that it takes."""
    own: dict[str, Any] = {}
    if settings.method == _COVFT:
        own = {
            "experts": settings.experts,
            "routing": "uniform" if settings.control == "uniform" else settings.routing,
            "context": settings.context,
            "top_k": min(2, settings.experts),
            "train_norms": "adapted",  # so that the blocks below run once per picture
            "recompute": "none",
        }
        takes_layers = True
    else:
        known = methods()
        fields = known[settings.method].__dataclass_fields__ if settings.method in known else {}
        takes_layers = "layers" in fields
        if settings.method == "last_layers" and settings.layers is not None:
            own["n"] = len(settings.layers)
        if "experts" in fields:
            own["experts"] = settings.experts
    if takes_layers and settings.layers is not None:
        own["layers"] = settings.layers
    return {**own, **settings.options}


def reads_states(settings: RunSettings) -> bool:
    """Return whether the method reads states of a text's tokens."""
    return settings.method != _COVFT and getattr(methods().get(settings.method), "reads_states", False)


def tune(llava: nn.Module, settings: RunSettings, images: Any) -> Any:
    """Tune LLaVA by the run's method, in place; return the tower's encoder.

    Args:
        llava: LLaVA in miniature.
        settings: The run.
        images: Pictures as the tower takes them, for methods that start from them.
    """
    method: Any = settings.method
    tuned = covft.tune(
        llava,
        method,
        text_encoder=WIDTH,
        images=images,
        language=settings.language,
        projector=settings.projector,
        **options_of(settings),
    )
    return covft.get_encoder(tuned)


def needs_text(encoder: Any) -> bool:
    """Return whether the tower's features depend on the question."""
    return encoder.conditioning.needs_text
