"""`python -m study`: run the study, or pretrain its networks."""

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
from study.results import command as results
from study.runs.command import run_command, search_command

app = typer.Typer(
    help="LLaVA in miniature, from real parts, in minutes on two cores.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
results.register(app)


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
    steps: Annotated[int | None, typer.Option(help="Steps of instruction tuning per method.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of data, weights and data order.")] = 0,
    tasks: Annotated[str | None, typer.Option(help="Tasks, separated by commas; default: all.")] = None,
    method: Annotated[str, typer.Option(help="frozen, covft or both.")] = "both",
    output: Annotated[Path, typer.Option(help="Folder for the report, results.json and the encoder.")] = Path(
        "runs/study"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Run every part in seconds; the scores mean nothing.")] = False,
) -> None:
    """Train LLaVA in miniature with a frozen ViT and with CoVFT, compare them, write a report."""
    if context.invoked_subcommand is not None:
        return
    from study.run import run_study
    from study.settings import StudySettings

    given: dict = {"seed": seed, "method": method, "output": output}
    if steps is not None:
        given["steps"] = steps
    if tasks is not None:
        given["tasks"] = tuple(name.strip() for name in tasks.split(",") if name.strip())
    run_study(StudySettings.quick(**given) if quick else StudySettings(**given))


add_commands(app)
app.command("run")(run_command)
app.command("search")(search_command)
