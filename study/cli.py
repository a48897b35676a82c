"""`python -m study`: the miniature's command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    add_completion=False, help="LLaVA in miniature, from real parts, in minutes on two cores.", no_args_is_help=False
)


def _fail(error: Exception) -> typer.Exit:
    typer.secho(f"{type(error).__name__}: {error}", fg="red", err=True)
    return typer.Exit(2)


def main(arguments: list[str] | None = None) -> None:
    """Run the command.

    Args:
        arguments: Without the program's name; by default those of the process.
    """
    app(args=arguments, prog_name="python -m study")


@app.callback(invoke_without_command=True)
def study(
    context: typer.Context,
    steps: Annotated[int | None, typer.Option(help="Steps of instruction tuning, per method.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 0,
    tasks: Annotated[str | None, typer.Option(help="Names of tasks, separated by commas; default all.")] = None,
    method: Annotated[str, typer.Option(help="frozen, covft or both.")] = "both",
    output: Annotated[Path, typer.Option(help="Folder for the page, results.json and the encoder.")] = Path(
        "runs/mini"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Seconds instead of minutes; learns nothing much.")] = False,
) -> None:
    """Train LLaVA in miniature with a frozen ViT and with CoVFT, compare them, write a page."""
    if context.invoked_subcommand is not None:
        return
    from covft.errors import CoVFTError
    from study.run import run
    from study.settings import MiniSettings, quick_settings

    chosen: dict = {"seed": seed, "method": method, "output": output}
    if steps is not None:
        chosen["steps"] = steps
    if tasks is not None:
        chosen["tasks"] = tuple(name.strip() for name in tasks.split(",") if name.strip())
    try:
        run(quick_settings(**chosen) if quick else MiniSettings(**chosen))
    except CoVFTError as error:
        raise _fail(error) from error


@app.command()
def pretrain(
    output: Annotated[Path | None, typer.Option(help="Folder for the weights; default the package's own.")] = None,
    vit_steps: Annotated[int | None, typer.Option(help="Steps of the small ViT.")] = None,
    lm_steps: Annotated[int | None, typer.Option(help="Steps of the language model.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of both.")] = 0,
) -> None:
    """Pretrain the small ViT (CLIP-style) and the small language model (text alone) again."""
    from covft.errors import CoVFTError
    from study import pretrain as job
    from study.towers import ASSETS

    steps = {"vit_steps": vit_steps, "lm_steps": lm_steps}
    settings = job.PretrainSettings(seed=seed, **{k: v for k, v in steps.items() if v is not None})
    try:
        cards = job.pretrain(settings, output or ASSETS)
    except CoVFTError as error:
        raise _fail(error) from error
    for name, card in cards.items():
        typer.echo(f"{name}: {card['parameters']:,} parameters, {card['scores']}")
