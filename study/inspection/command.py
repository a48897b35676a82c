"""`python -m study inspect` and `python -m study inside`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from study.runs.command import before_torch, parse_fields


def register(app: typer.Typer) -> None:
    """Add the commands to the study's command line."""
    app.command("inspect")(inspect_command)
    app.command("inside")(inside_command)


def inspect_command(
    folder: Annotated[Path, typer.Option(help="Folder for the encoder and its recordings, for covft report.")] = Path(
        "runs/inspected"
    ),
    results: Annotated[Path | None, typer.Option(help="Folder for numbers; default: study/results/inspection.")] = None,
    field: Annotated[list[str] | None, typer.Option(help="NAME=VALUE of the runs, such as steps=100.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Train covft, full tuning and towers of two tasks, and write what there is to see inside, as numbers."""
    before_torch()
    from study.inspection.trained import RESULTS, inspect_runs
    from study.runs.settings import RunSettings

    settings = RunSettings(**{name: values[0] for name, values in parse_fields(field or []).items()})
    steps = f"of {settings.steps} steps"
    for file in inspect_runs(
        settings, folder, results or RESULTS, device, lambda step: typer.echo(f"{step} {steps}", err=True)
    ):
        typer.echo(file)


def inside_command(
    output: Annotated[Path | None, typer.Option(help="Folder for page and figures; default: docs/study.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Folder of the encoder: draws its attention, too.")] = None,
) -> None:
    """Write the page about the diagnosis and the trained tower, from files alone."""
    from study.inspection.page import draw_maps, write_page
    from study.results.command import DOCS, results_of

    output = output or DOCS / "study"
    if folder is not None:
        draw_maps(folder, output)
    typer.echo(write_page(results_of("small", None, "test"), output))
