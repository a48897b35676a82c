"""The main job: train, answer, compare, save and load, then the real tower."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from study.backbone import show_backbone
from study.evaluate import better, most_frequent, scores
from study.inspection import Inspection, inspect
from study.packaged import NAME
from study.report import Page, write_page
from study.scenes import as_batch
from study.settings import MiniResult, MiniSettings
from study.study import Study, Trained, answers, first_stage, output_folder, prepare, second_stage, timed
from study.towers import small_vit, text_encoder_folder

if TYPE_CHECKING:
    from rich.console import Console

NO_IMAGE, NO_QUESTION = "without the image", "without the question"


def run(settings: MiniSettings | None = None, console: Console | None = None) -> MiniResult:
    """Run the miniature.

    Args:
        settings: Settings, default the ones that `make demo` uses.
        console: Where tables are printed, default standard output.

    Returns:
        Scores, losses, times and checks; the same are written to `results.json`.
    """
    from rich.console import Console

    settings = settings or MiniSettings()
    console = console or Console()
    began = time.perf_counter()
    folder = output_folder(settings)
    result = MiniResult()

    study = prepare(settings)
    console.print(
        f"{len(study.train.scenes)} training scenes with {len(study.train.examples)} questions, "
        f"{len(study.held_out.scenes)} {settings.split} scenes with {len(study.held_out.examples)}."
    )
    result.seconds = study.seconds
    projector, result.losses["stage 1"] = first_stage(study)
    given: dict[str, list[str]] = {}
    trained: dict[str, Trained] = {}
    for method in settings.methods:
        trained[method] = second_stage(study, projector, method)
        result.losses[method] = trained[method].losses
        given[method] = answers(study, trained[method], f"Answers, {method}")
        result.scores[method] = scores(study.held_out.examples, given[method])
    result.scores |= floors(study, trained.get("frozen"))
    print_scores(console, settings, result)

    seen = None
    if "covft" in trained:
        seen = inspect(study, trained["covft"])
        _save_and_load(study, trained["covft"], result, console)
    if settings.tower_steps:
        _real_tower(settings, result, console)

    result.seconds["total"] = time.perf_counter() - began
    result.files = {"page": str(folder / "index.html"), "results": str(folder / "results.json")}
    write_page(folder / "index.html", _page(study, result, given, seen))
    (folder / "results.json").write_text(json.dumps(as_json(settings, result), indent=2) + "\n")
    console.print(f"Done in {result.seconds['total']:.0f} seconds. Open {result.files['page']}")
    return result


def floors(study: Study, frozen: Trained | None) -> dict[str, dict[str, float]]:
    """Scores without the image and without the question.

    Each is the better, task by task, of two ways to do without: the most frequent training answer (to the
    same question; to the same task), and the frozen method's model (shown a blank picture; not told the
    question).
    """
    examples = study.held_out.examples
    found = {
        NO_IMAGE: scores(examples, most_frequent(study.train.examples, examples, with_question=True)),
        NO_QUESTION: scores(examples, most_frequent(study.train.examples, examples, with_question=False)),
    }
    if frozen is not None:
        blank = answers(study, frozen, f"Answers, {NO_IMAGE}", blank=True)
        unasked = answers(study, frozen, f"Answers, {NO_QUESTION}", without_question=True)
        found[NO_IMAGE] = better(found[NO_IMAGE], scores(examples, blank))
        found[NO_QUESTION] = better(found[NO_QUESTION], scores(examples, unasked))
    return found


def print_scores(console: Console, settings: MiniSettings, result: MiniResult) -> None:
    """The table per task."""
    from rich.table import Table

    columns = [*settings.methods, NO_IMAGE, NO_QUESTION]
    table = Table(title=f"Right answers on {settings.split} scenes, % (exact match of the whole answer)")
    table.add_column("task")
    for column in columns:
        table.add_column(column, justify="right")
    for task in [*settings.tasks, "mean"]:
        best = max(result.scores[method][task] for method in settings.methods)
        cells = []
        for column in columns:
            value = result.scores[column][task]
            bold = column in settings.methods and value == best and len(settings.methods) > 1
            cells.append(f"[bold]{value:.1f}[/bold]" if bold else f"{value:.1f}")
        table.add_row(task, *cells, end_section=task == settings.tasks[-1])
    console.print(table)


def _save_and_load(study: Study, trained: Trained, result: MiniResult, console: Console) -> None:
    """Save the encoder, load it into a fresh ViT, compare the outputs on held-out pictures."""
    import covft

    encoder = trained.encoder
    assert encoder is not None
    folder = study.settings.output / "encoder"
    chosen = study.held_out.examples[:64]
    pictures = torch.from_numpy(as_batch([study.held_out.scenes[e.scene] for e in chosen]))
    asked = [e.question for e in chosen]
    with timed(study.seconds, "save and load"), torch.no_grad():
        encoder.save_pretrained(folder)
        loaded = covft.load(folder, vit=small_vit(), text_encoder=text_encoder_folder()).eval()
        ours = encoder.eval()(pictures, asked, output_hidden_states=True).hidden_states[-2]
        theirs = loaded(pictures, asked, output_hidden_states=True).hidden_states[-2]
        plain = small_vit()(pictures, output_hidden_states=True).hidden_states[-2]
    result.checks["loaded_max_difference"] = float((ours - theirs).abs().max())
    result.checks["tuned_max_difference"] = float((ours - plain).abs().max())
    result.files["encoder"] = str(folder)
    console.print(
        f"Saved the encoder and loaded it into a fresh ViT: largest difference of an output "
        f"{result.checks['loaded_max_difference']:.1e} (from the ViT as it was: "
        f"{result.checks['tuned_max_difference']:.1e})."
    )


def _real_tower(settings: MiniSettings, result: MiniResult, console: Console) -> None:
    with timed(result.seconds, "real tower"):
        shown = show_backbone(settings)
    result.losses["backbone"] = shown.losses
    tenth = max(1, len(shown.losses) // 5)
    first, last = (sum(part) / tenth for part in (shown.losses[:tenth], shown.losses[-tenth:]))
    result.checks |= {
        "backbone_relative_difference": shown.difference,
        "backbone_first_loss": first,
        "backbone_last_loss": last,
        "backbone_trained_parameters": shown.trained,
    }
    console.print(
        f"{NAME}: wrapped, outputs changed by {shown.difference:.1e} relative; {shown.trained:,} parameters "
        f"trained in the tower; loss {first:.2f} in the first fifth of {len(shown.losses)} steps, "
        f"{last:.2f} in the last."
    )


def _page(study: Study, result: MiniResult, given: dict[str, list[str]], seen: Inspection | None) -> Page:
    return Page(study.settings, result, study.held_out.scenes, study.held_out.examples, given, seen)


def as_json(settings: MiniSettings, result: MiniResult) -> dict:
    """Everything that was measured, with the settings and the machine's versions."""
    plain = {k: str(v) if k in ("output", "cache") else v for k, v in asdict(settings).items()}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {"settings": plain, "versions": versions, "threads": torch.get_num_threads(), **asdict(result)}
