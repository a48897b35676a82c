"""`python -m study table`, `plots` and `page`: what the rows say."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from study.results.studies import Results

_Rows = Annotated[Path | None, typer.Option(help="Folder of rows; default: study/results/rows/SIZE.")]
_Size = Annotated[str, typer.Option(help="Size whose rows are read.")]
_Split = Annotated[str, typer.Option(help="Split whose rows are read.")]
_BY_SIZE = "default: docs/study, of the larger size docs/study-large"

_WIDTH = 200  # of a table, at least: `| less -S` scrolls, and cells that are broken up cannot be read
DOCS = Path(__file__).parents[2] / "docs"


def register(app: typer.Typer) -> None:
    """Add the commands to the study's command line."""
    app.command("table")(table)
    app.command("plots")(plots)
    app.command("page")(page)


def table(
    study: Annotated[str | None, typer.Option(help="Studies, separated by commas; default: all.")] = None,
    size: _Size = "small",
    rows: _Rows = None,
    split: _Split = "test",
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """Print the tables of the studies, from the rows alone."""
    from rich.console import Console

    from study.results.studies import chosen
    from study.results.tables import HOW_TO_READ, tables_of

    results, console = results_of(size, rows, split), Console()
    console.width = max(console.width, _WIDTH)
    for each in chosen(study):
        for found in tables_of(results, each):
            if markdown:
                typer.echo(f"## {found.title}\n\n{found.markdown()}\n")
            else:
                console.print(found.rich(), "")
    (typer.echo if markdown else console.print)(HOW_TO_READ.replace("*", ""))


def plots(
    size: _Size = "small",
    rows: _Rows = None,
    split: _Split = "test",
    output: Annotated[Path | None, typer.Option(help=f"Folder for the figures; {_BY_SIZE}.")] = None,
) -> None:
    """Draw the figures of the studies, from the rows alone."""
    from study.results.plots import write_plots

    output = output or _page_of(size)
    for plot in write_plots(results_of(size, rows, split), output):
        typer.echo(output / f"{plot.name}.svg")


def page(
    size: _Size = "small",
    rows: _Rows = None,
    split: _Split = "test",
    output: Annotated[Path | None, typer.Option(help=f"Folder for the page and its figures; {_BY_SIZE}.")] = None,
) -> None:
    """Write the page of the study, with tables, figures and verdicts, from the rows alone."""
    from dataclasses import replace

    from study.results.page import write_page
    from study.runs.plan import STUDIES

    results = results_of(size, rows, split)
    planned = {name: [run.label for run in runs(size)] for name, runs in STUDIES.items()}
    typer.echo(write_page(replace(results, planned=planned), output or _page_of(size)))


def _page_of(size: str) -> Path:
    from study.runs.sizes import size_named

    return DOCS / size_named(size).page


def results_of(size: str, folder: Path | None, split: str) -> Results:
    """Read the rows of a size; by default those of the repository."""
    from study.results.load import read_rows
    from study.results.studies import Results
    from study.runs.rows import ROWS

    return Results.of(size, read_rows(folder or ROWS / size), split)
