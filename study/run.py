"""The study: train, answer, compare, save and load, then check the packaged backbone."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from study.backbone import NAME
from study.backbone_check import check_backbone
from study.comparison import (
    Comparison,
    TrainedModel,
    answer_held_out,
    prepare,
    train_projector,
    tune_on_instructions,
)
from study.data.packages import minilm_folder
from study.data.scenes import as_batch
from study.evaluate import best_of, most_frequent_answers, score
from study.inspection import inspect_routing
from study.progress import timed
from study.report import Report, write_report
from study.result import StudyResult, write_result
from study.settings import StudySettings
from study.towers import small_vit

if TYPE_CHECKING:
    from rich.console import Console

NO_IMAGE, NO_QUESTION = "without the image", "without the question"


def run_study(settings: StudySettings | None = None, console: Console | None = None) -> StudyResult:
    """Run the study; write the report, `results.json` and the encoder to the output folder.

    Args:
        settings: Settings; the default is that of `make demo`.
        console: Console for the tables; default standard output.

    Returns:
        Scores, losses, times and checks, as in `results.json`.
    """
    from rich.console import Console

    settings = settings or StudySettings()
    console = console or Console()
    began = time.perf_counter()
    folder = settings.output
    folder.mkdir(parents=True, exist_ok=True)
    result = StudyResult()

    comparison = prepare(settings)
    train, held_out = comparison.train, comparison.held_out
    console.print(
        f"{len(train.scenes)} training scenes with {len(train.examples)} questions, "
        f"{len(held_out.scenes)} {settings.split} scenes with {len(held_out.examples)}."
    )
    result.seconds = comparison.seconds
    projector, result.losses["stage 1"] = train_projector(comparison)
    answers: dict[str, list[str]] = {}
    trained: dict[str, TrainedModel] = {}
    for method in settings.methods:
        trained[method] = tune_on_instructions(comparison, projector, method)
        result.losses[method] = trained[method].losses
        answers[method] = answer_held_out(comparison, trained[method], f"Answers, {method}")
        result.scores[method] = score(held_out.examples, answers[method])
    result.scores |= baselines(comparison, trained.get("frozen"))
    _print_scores(console, settings, result)

    inspection = None
    if "covft" in trained:
        inspection = inspect_routing(comparison, trained["covft"])
        _save_and_load(comparison, trained["covft"], result, console)
    if settings.backbone_steps:
        _check_backbone(settings, result, console)

    result.seconds["total"] = time.perf_counter() - began
    page, record = folder / "index.html", folder / "results.json"
    result.files |= {"report": str(page), "results": str(record)}
    write_report(page, Report(settings, result, held_out.scenes, held_out.examples, answers, inspection))
    write_result(record, settings, result)
    console.print(f"Done in {result.seconds['total']:.0f} seconds. Open {page}")
    return result


def baselines(comparison: Comparison, frozen: TrainedModel | None) -> dict[str, dict[str, float]]:
    """Score answers without the image and without the question.

    Each baseline takes, task by task, the better of two: the most frequent training answer (to the same question, or
    to the task), and the frozen method's model (shown a blank image, or not given the question).
    """
    examples, train = comparison.held_out.examples, comparison.train.examples
    found = {
        NO_IMAGE: score(examples, most_frequent_answers(train, examples, with_question=True)),
        NO_QUESTION: score(examples, most_frequent_answers(train, examples, with_question=False)),
    }
    if frozen is not None:
        blank = answer_held_out(comparison, frozen, f"Answers, {NO_IMAGE}", blank=True)
        unasked = answer_held_out(comparison, frozen, f"Answers, {NO_QUESTION}", without_question=True)
        found[NO_IMAGE] = best_of(found[NO_IMAGE], score(examples, blank))
        found[NO_QUESTION] = best_of(found[NO_QUESTION], score(examples, unasked))
    return found


def _print_scores(console: Console, settings: StudySettings, result: StudyResult) -> None:
    from rich.table import Table

    columns = [*settings.methods, NO_IMAGE, NO_QUESTION]
    table = Table(title=f"Exact match on {settings.split} scenes, %")
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


def _save_and_load(comparison: Comparison, trained: TrainedModel, result: StudyResult, console: Console) -> None:
    """Save the encoder, load it into a fresh ViT, and compare the outputs on held-out images."""
    import covft

    encoder = trained.encoder
    assert encoder is not None
    folder = comparison.settings.output / "encoder"
    examples = comparison.held_out.examples[:64]
    images = torch.from_numpy(as_batch([comparison.held_out.scenes[example.scene] for example in examples]))
    questions = [example.question for example in examples]
    with timed(comparison.seconds, "save and load"), torch.no_grad():
        encoder.save_pretrained(folder)
        loaded = covft.load(folder, vit=small_vit(), text_encoder=str(minilm_folder())).eval()
        trained_state = encoder.eval()(images, questions, output_hidden_states=True).hidden_states[-2]
        loaded_state = loaded(images, questions, output_hidden_states=True).hidden_states[-2]
        pretrained_state = small_vit()(images, output_hidden_states=True).hidden_states[-2]
    result.checks["loaded_max_difference"] = float((trained_state - loaded_state).abs().max())
    result.checks["tuned_max_difference"] = float((trained_state - pretrained_state).abs().max())
    result.files["encoder"] = str(folder)
    console.print(
        "Saved the encoder and loaded it into a fresh ViT: largest output difference "
        f"{result.checks['loaded_max_difference']:.1e} (from the pretrained ViT: "
        f"{result.checks['tuned_max_difference']:.1e})."
    )


def _check_backbone(settings: StudySettings, result: StudyResult, console: Console) -> None:
    with timed(result.seconds, "packaged backbone"):
        check = check_backbone(settings)
    result.losses["backbone"] = check.losses
    fifth = max(1, len(check.losses) // 5)
    first, last = sum(check.losses[:fifth]) / fifth, sum(check.losses[-fifth:]) / fifth
    result.checks |= {
        "backbone_relative_difference": check.difference,
        "backbone_first_loss": first,
        "backbone_last_loss": last,
        "backbone_trained_parameters": check.trained,
    }
    console.print(
        f"{NAME}: wrapping changed its outputs by {check.difference:.1e} relative; {check.trained:,} of its "
        f"parameters trained; mean loss {first:.2f} in the first fifth of {len(check.losses)} steps, "
        f"{last:.2f} in the last."
    )
