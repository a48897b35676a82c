"""`covft paper-table` and `covft forgetting`: tables of an engine's result files."""

from __future__ import annotations

from typing import Annotated

import typer

_ENGINE = "lmms-eval or vlmevalkit; by default found out."
_FOLDER = "What --output_path of lmms-eval or --work-dir of VLMEvalKit named: the results of one model."


def paper_table(
    folder: Annotated[str, typer.Argument(help=_FOLDER)],
    engine: Annotated[str | None, typer.Option(help=_ENGINE)] = None,
    beside: Annotated[list[str] | None, typer.Option(help="A row of the paper, such as 'LoRA 7B'; repeatable.")] = None,
) -> None:
    """Make the CoVFT paper's table of a model, beside the paper's own figures."""
    from covft.integrations.evaluation import paper

    typer.echo(str(paper.paper_table(folder, engine=engine, beside=beside or paper.BESIDE)))


def forgetting(
    before: Annotated[str, typer.Argument(help="Results of the model before it was tuned, as for paper-table.")],
    after: Annotated[str, typer.Argument(help="Results of the tuned model.")],
    engine: Annotated[str | None, typer.Option(help=_ENGINE)] = None,
) -> None:
    """Tell what tuning improved and what it forgot: E, F and O of two models."""
    from covft.integrations.evaluation.forgetting import forgetting_table

    typer.echo(str(forgetting_table(before, after, engine=engine)))
