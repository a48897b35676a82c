"""`python -m study deploy`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def deploy_command(
    model: Annotated[Path, typer.Option(help="The trained model; trained first if there is no such file.")] = Path(
        "runs/deploy/model.safetensors"
    ),
    steps: Annotated[int, typer.Option(help="Steps of that training.")] = 400,
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
    field: Annotated[list[str] | None, typer.Option(help="NAME=VALUE of the run, such as routing=sparse.")] = None,
    questions: Annotated[int | None, typer.Option(help="Held-out questions per task that are scored.")] = None,
    calibration: Annotated[int, typer.Option(help="Training questions for merge and distillation.")] = 512,
    tested: Annotated[int, typer.Option(help="Held-out questions on which features are compared.")] = 256,
    distill: Annotated[int, typer.Option(help="Steps of distillation.")] = 300,
    lr: Annotated[float, typer.Option(help="Peak learning rate of distillation.")] = 1e-3,
    batch: Annotated[int, typer.Option(help="Questions per step of distillation.")] = 16,
    rank: Annotated[int, typer.Option(help="Rank of compressed experts.")] = 16,
    below: Annotated[float, typer.Option(help="Weight below which experts are skipped.")] = 0.1,
    output: Annotated[Path, typer.Option(help="The JSON file to write.")] = Path("runs/deploy/deployment.json"),
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """Compare the forms in which a trained covft model can be served: accuracy, features, time, FLOPs, bytes."""
    from rich.console import Console

    from study.runs.command import before_torch, parse_fields

    before_torch()
    from covft.utils.files import write_json
    from study.deployment.measure import measured, table_of, tasks_of
    from study.deployment.trained import read, train
    from study.deployment.variants import DeploySettings, variants
    from study.runs.run import versions
    from study.runs.settings import RunSettings

    fields = {name: values[0] for name, values in parse_fields(field or []).items()}
    if not model.is_file():
        train(RunSettings(**{"steps": steps, "seed": seed, **fields}), model)
    given = read(model, questions)
    settings = DeploySettings(calibration, tested, distill, lr, batch, rank, below, seed)
    about = {"settings": given.settings.to_dict(), "deploy": vars(settings), "versions": versions()}
    output.parent.mkdir(parents=True, exist_ok=True)
    rows, wanted = [], None
    for make in variants(given, settings):
        row, found = measured(given, make(), tested, seed, wanted)
        wanted = found if wanted is None else wanted
        rows.append(row)
        typer.echo(f"{row['name']}: {row['mean']:.2f}", err=True)
        write_json(output, {**about, "rows": rows})
    for table in (table_of(rows), tasks_of(rows)):
        if markdown:
            typer.echo(f"{table.markdown()}\n")
        else:
            Console().print(table.rich())
