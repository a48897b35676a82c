"""`python -m study`: run the demo or the study, or pretrain its networks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from covft.errors import CoVFTError, MissingDependencyError

try:
    import typer
except ModuleNotFoundError as error:
    raise MissingDependencyError(
        f"python -m study needs {error.name}, which is not installed.", fix='pip install "covft[study]"'
    ) from error

from study.data.commands import add_commands
from study.deployment.command import deploy_command
from study.inspection import command as inspection
from study.results import command as results
from study.runs.command import before_torch, run_command, search_command

app = typer.Typer(
    help="LLaVA in miniature, from real parts, in minutes on two cores.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
results.register(app)
inspection.register(app)


def main(arguments: list[str] | None = None) -> None:
    """Run the command; print an error of covft without its traceback and exit with code 2.

    Args:
        arguments: Without the program's name; by default those of the process.
    """
    try:
        app(args=arguments, prog_name="python -m study")
    except CoVFTError as error:
        typer.secho(f"{type(error).__name__}: {error}", fg="red", err=True)
        sys.exit(2)


@app.callback(invoke_without_command=True)
def study(
    context: typer.Context,
    steps: Annotated[int | None, typer.Option(help="Steps of training of each run.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the projector, the method's weights and the data order.")] = 0,
    tasks: Annotated[str | None, typer.Option(help="Tasks, separated by commas; default: all.")] = None,
    methods: Annotated[
        str, typer.Option(help="METHOD or METHOD-CONTROL, separated by commas.")
    ] = "frozen,full,covft,covft-shuffled",
    output: Annotated[Path, typer.Option(help="Folder for the page, the rows and the encoder.")] = Path("runs/study"),
    quick: Annotated[bool, typer.Option("--quick", help="Run every part in seconds; the scores mean nothing.")] = False,
) -> None:
    """Without a command: a demo, LLaVA in miniature tuned by a few methods with one seed, with intervals and a page."""
    if context.invoked_subcommand is not None:
        return
    before_torch()
    from study.demo.run import run_demo
    from study.demo.settings import DemoSettings

    fields: dict = {"seed": seed}
    if steps is not None:
        fields["steps"] = steps
    if tasks is not None:
        fields["tasks"] = _listed(tasks)
    make = DemoSettings.quick if quick else DemoSettings
    run_demo(make(methods=_listed(methods), output=output, fields=fields))


def _listed(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


add_commands(app)
app.command("run")(run_command)
app.command("search")(search_command)
app.command("deploy")(deploy_command)
