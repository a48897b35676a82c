"""One run, from its settings to its row."""

from __future__ import annotations

import copy
import datetime
import platform
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import covft
from study.llava import build_llava
from study.progress import timed
from study.runs.graph import PREPARING
from study.runs.methods import needs_text, reads_states, tune
from study.runs.model import Miniature, first_trained, started_at
from study.runs.score import by_task, percent, right_answers, written
from study.runs.settings import RunSettings
from study.runs.tables import Part, chosen, held_out_part, make_table, table_of, training_order, training_part
from study.runs.texts import text_rows
from study.runs.train import Questions, as_tower_takes, fit
from study.towers import small_vit
from study.trunk import depth, run_trunk

Report = Callable[[str, int], None]


def run(
    settings: RunSettings,
    studies: Iterable[str] = (),
    *,
    device: str = "cpu",
    deadline: float | None = None,
    report: Report | None = None,
) -> dict[str, Any]:
    """Train and score one model; return its row.

    Args:
        settings: The run.
        studies: Names of the studies that it belongs to.
        device: `cpu` or `cuda`.
        deadline: Time (`time.monotonic`) at which to stop.
        report: Called with the name of the part and the number of finished steps.

    Raises:
        OutOfTime: If the deadline is reached.
    """
    torch.set_float32_matmul_precision("high" if device == "cuda" else "highest")
    seconds: dict[str, float] = {}
    with PREPARING, timed(seconds, "prepare"):
        train, held_out = training_part(settings), held_out_part(settings)
        llava = new_llava(settings)
        before = None
        if settings.upstream:
            weights, before = _after_upstream(_of_upstream(settings), device)
            llava.load_state_dict(weights, strict=False)
        else:
            llava.model.multi_modal_projector.load_state_dict(_first_projector(_of_projector(settings), device))
        torch.manual_seed(settings.seed)
        encoder = tune(llava, settings, as_tower_takes(torch.from_numpy(train.pictures[: settings.batch])))
        model = new_miniature(llava, encoder, settings).to(device)
        first = first_trained(encoder.vit)
        reads_text = needs_text(encoder)
        trained = {"tower": _count(encoder.vit), "all": _count(llava)}

        def questions_of(part: Part, tasks: tuple[str, ...], fraction: float = 1.0) -> Questions:
            table = table_of(part, tasks, fraction, settings.control != "tower_only")
            texts = text_rows(settings, table, states=reads_states(settings)) if reads_text else None
            return Questions.of(table, tower_inputs(settings, part, first, device), texts)

        asked, scored = questions_of(train, settings.tasks, settings.fraction), questions_of(held_out, settings.scored)
        order = training_order(asked.table, settings.steps, settings.batch, settings.per_picture, settings.seed)
        groups = parameter_groups(llava, encoder, settings)
        if device == "cuda":
            torch.cuda.current_stream().synchronize()  # other threads share what was made here
    shuffled = settings.control == "shuffled"
    with started_at(encoder.vit, first):
        with timed(seconds, "train"):
            losses = fit(
                model, asked, order, groups,
                per_picture=settings.per_picture,
                shuffle_texts=settings.seed if shuffled else None,
                graph=settings.routing != "random",
                deadline=deadline,
                report=None if report is None else lambda step: report("train", step),
            )  # fmt: skip
        with timed(seconds, "score"):
            shuffle = settings.seed if shuffled or settings.control == "shuffled_eval" else None
            hits = by_task(scored.table.examples, right_answers(model, scored, shuffle))
            floors = _floors(model, settings, scored, held_out, first, device) if settings.method == "frozen" else None
    row = {
        "name": settings.name,
        "label": settings.label,
        "studies": list(studies),
        "settings": settings.to_dict(),
        "rates": dict(zip(("vision_lr", "router_lr"), settings.rates(), strict=True)),
        "seed": settings.seed,
        "split": settings.split,
        "scores": percent(hits),
        "hits": written(hits),
        "trained": trained,
        "losses": losses,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "device": device_name(device),
        "versions": versions(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    return row | ({"floors": floors} if floors else {}) | ({"before": before} if before else {})


def new_llava(settings: RunSettings) -> Any:
    """Build LLaVA around the run's tower, with the pretrained language model and a random projector."""
    return build_llava(plain_tower(settings.tower), seed=settings.seed)


def plain_tower(name: str) -> nn.Module:
    """Load a pretrained tower: `small_vit` or `backbone`."""
    if name == "small_vit":
        return small_vit()
    from study.backbone import packaged_backbone

    return packaged_backbone()


def new_miniature(llava: Any, encoder: Any, settings: RunSettings) -> Miniature:
    """Put the bottleneck between tower and projector."""
    return Miniature(llava, encoder, settings.tokens, llava.generation_config.bos_token_id)


def tower_inputs(settings: RunSettings, part: Part, first: int, device: str) -> Tensor:
    """Return what the tower takes for each scene of a part: pictures, or the cached input of its first block."""
    key = (settings.split if part is held_out_part(settings) else "train", settings.tower, first, device)
    return _inputs(part, key)


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


def device_name(device: str) -> str:
    """Return what the device is called."""
    return torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Return the versions that a row depends on."""
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "covft": covft.__version__,
    }


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


@lru_cache(maxsize=12)
def _inputs(part: Part, key: tuple[str, str, int, str]) -> Tensor:
    _, tower_name, first, device = key
    tower = plain_tower(tower_name).to(device)
    pictures = torch.from_numpy(part.pictures).to(device)
    if tower_name == "backbone":
        side = 14 * 6  # as many patches as the small ViT has
        resized = torch.nn.functional.interpolate(pictures.permute(0, 3, 1, 2).float(), (side, side), mode="bilinear")
        pictures = resized.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    if first == 0:
        return pictures
    chunks = pictures.split(500)
    return torch.cat([run_trunk(tower, as_tower_takes(chunk), (first,))[first] for chunk in chunks])


def _of_projector(settings: RunSettings) -> RunSettings:
    """Return the settings that the projector's first training depends on, and defaults for all others."""
    kept = ("size", "tower", "tokens", "seed", "first_steps", "first_lr", "batch", "train_scenes")
    return RunSettings(method="frozen", per_picture=1, **{name: getattr(settings, name) for name in kept})


_STARTS: dict[tuple[str, str], Any] = {}
"""Starts that several runs of this process share."""


def _first_projector(settings: RunSettings, device: str) -> dict[str, Tensor]:
    """Train the projector alone on captions, once for all runs that start from it."""
    key = (f"projector {settings}", device)
    if key not in _STARTS:
        _STARTS[key] = _train_projector(settings, device)
    return _STARTS[key]


def _train_projector(settings: RunSettings, device: str) -> dict[str, Tensor]:
    llava = new_llava(settings)
    projector = llava.model.multi_modal_projector
    if settings.first_steps:
        encoder = tune(llava, settings.replace(language="frozen"), None)
        model = new_miniature(llava, encoder, settings).to(device)
        part, first = training_part(settings), depth(encoder.vit) - 1
        table = make_table(chosen(part, ("caption",)))
        order = training_order(table, settings.first_steps, settings.batch, 1, settings.seed)
        groups = [{"params": list(projector.parameters()), "lr": settings.first_lr}]
        with started_at(encoder.vit, first):
            fit(
                model,
                Questions.of(table, tower_inputs(settings, part, first, device), None),
                order,
                groups,
                per_picture=1,
            )
    return {name: value.detach().cpu() for name, value in projector.state_dict().items()}


def _of_upstream(settings: RunSettings) -> RunSettings:
    """Return the settings of the training on the upstream tasks: a frozen tower, all else trained."""
    own = {"method": "frozen", "options": {}, "control": "none", "language": "full", "projector": True}
    return settings.replace(**own, tasks=settings.upstream, upstream=(), vision_lr=None, fraction=1.0)


def _after_upstream(settings: RunSettings, device: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train on the upstream tasks, once for all runs that start from there; return weights, and hits of all tasks."""
    key = (f"upstream {settings}", device)
    if key not in _STARTS:
        train, held_out = training_part(settings), held_out_part(settings)
        llava = new_llava(settings)
        llava.model.multi_modal_projector.load_state_dict(_first_projector(_of_projector(settings), device))
        encoder = tune(llava, settings, None)
        model = new_miniature(llava, encoder, settings).to(device)
        first = first_trained(encoder.vit)
        tables = make_table(chosen(train, settings.tasks)), make_table(held_out.examples)
        asked, scored = (
            Questions.of(table, tower_inputs(settings, part, first, device), None)
            for table, part in zip(tables, (train, held_out), strict=True)
        )
        order = training_order(asked.table, settings.steps, settings.batch, settings.per_picture, settings.seed)
        with started_at(encoder.vit, first):
            fit(model, asked, order, parameter_groups(llava, encoder, settings), per_picture=settings.per_picture)
            scores = written(by_task(scored.table.examples, right_answers(model, scored)))
        covft.untune(llava)
        weights = {
            n: v.detach().cpu() for n, v in llava.state_dict().items() if not n.startswith("model.vision_tower.")
        }
        _STARTS[key] = copy.deepcopy(weights), scores
    return _STARTS[key]


def _floors(
    model: Miniature, settings: RunSettings, scored: Questions, part: Part, first: int, device: str
) -> dict[str, dict[str, float]]:
    """Score the frozen model shown a blank picture, and not given the question."""
    grey = Part(np.full_like(part.pictures[:1], 128), [])
    blank = _inputs(grey, ("blank", settings.tower, first, device)).expand(
        len(part.pictures), *[-1] * (scored.inputs.dim() - 1)
    )
    unasked = make_table(scored.table.examples, with_question=False)
    floors = {
        "no_image": Questions.of(scored.table, blank, None),
        "no_question": Questions.of(unasked, scored.inputs, None),
    }
    return {
        name: percent(by_task(questions.table.examples, right_answers(model, questions)))
        for name, questions in floors.items()
    }
