"""The commands of `python -m study` around the runs: the prepared file, the pretrained networks, a diagnosis."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def prepare_command(
    output: Annotated[Path, typer.Option(help="The file to write, such as study-prepared.npz.")],
    size: Annotated[str, typer.Option(help="small, or large: with the weights of backbone and language model.")] = (
        "small"
    ),
) -> None:
    """Write tiles and text features to one file, for machines without the packages that they come from."""
    from study.data.prepared import VARIABLE, write_prepared
    from study.runs.sizes import size_named

    texts = write_prepared(output, folders=[folder() for folder in size_named(size).folders])
    typer.echo(f"{output}: {output.stat().st_size / 1e6:.1f} MB, {texts} texts. Use it with {VARIABLE}={output}")


def pretrain_command(
    output: Annotated[Path | None, typer.Option(help="Folder for the weights; default: study/assets.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = None,
    vit_steps: Annotated[int | None, typer.Option(help="Steps of the small ViT.")] = None,
    lm_steps: Annotated[int | None, typer.Option(help="Steps of the language model.")] = None,
    lm_lr: Annotated[float | None, typer.Option(help="Peak learning rate of the language model.")] = None,
    scenes: Annotated[int | None, typer.Option(help="Training scenes.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of both networks.")] = 0,
) -> None:
    """Pretrain the small ViT (CLIP-style) and the small language model (text only)."""
    from study.pretrain import PretrainSettings, pretrain
    from study.weights import ASSETS

    given = {"vit_steps": vit_steps, "lm_steps": lm_steps, "lm_lr": lm_lr, "scenes": scenes}
    settings = PretrainSettings(seed=seed, **{name: value for name, value in given.items() if value is not None})
    for name, card in pretrain(settings, output or ASSETS, device=device).items():
        typer.echo(f"{name}: {card['parameters']:,} parameters, {card['scores']}")


def diagnose_command(
    tasks: Annotated[str, typer.Option(help="Tasks, separated by commas; or all.")] = "grounding,caption",
    samples: Annotated[int, typer.Option(help="Questions of each diagnosis, each about another picture.")] = 240,
    halves: Annotated[bool, typer.Option(help="Also diagnose two halves of each task.")] = True,
    scenes: Annotated[int, typer.Option(help="Scenes that they are drawn from.")] = 6000,
    steps: Annotated[int, typer.Option(help="Steps of each probe training.")] = 10,
    seed: Annotated[int, typer.Option(help="Seed of the projector, the questions and the diagnosis.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    output: Annotated[Path | None, typer.Option(help="Folder for the numbers, a JSON file each.")] = None,
    agreement: Annotated[
        bool, typer.Option("--agreement", help="Measure nothing: compare the diagnosis on file with the rows.")
    ] = False,
) -> None:
    """Diagnose the miniature before its runs: tasks against each other, and two halves of each task."""
    if agreement:
        from study.inspection.agreement import tables
        from study.results.command import results_of

        for found in tables(results_of("small", None, "test")):
            typer.echo(f"{found.title}\n\n{found.markdown()}\n")
        return
    from study.data.tasks import TASKS
    from study.diagnosis import diagnose_tasks
    from study.inspection.agreement import path_of
    from study.runs.settings import RunSettings

    chosen = tuple(TASKS) if tasks == "all" else tuple(tasks.split(","))
    settings = RunSettings(tasks=chosen, train_scenes=scenes, seed=seed)
    diagnoses = diagnose_tasks(settings, samples, device, halves=halves, steps=steps, seed=seed)
    for name, diagnosis in diagnoses.items():
        typer.echo(f"{name}\n{'=' * len(name)}\n{diagnosis}\n")
        if output is not None:
            diagnosis.save(path_of(name, output))
    for name, diagnosis in diagnoses.items():
        typer.echo(f"{name}: {diagnosis.verdict.choice}, p = {diagnosis.conflict.p_value:.3g}")


def add_commands(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command("prepare")(prepare_command)
    app.command("pretrain")(pretrain_command)
    app.command("diagnose")(diagnose_command)
