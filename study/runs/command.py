"""`python -m study run` and `python -m study search`."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from covft.errors import ConfigError


def run_command(
    studies: Annotated[str, typer.Option(help="Studies, separated by commas; or all.")] = "methods,controls",
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas.")] = "0",
    methods: Annotated[str | None, typer.Option(help="Only runs of these methods.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    jobs: Annotated[int, typer.Option(help="Processes side by side.")] = 1,
    time_limit: Annotated[float | None, typer.Option(help="Seconds after which to stop; run again to go on.")] = None,
    field: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE of all runs, such as steps=400 or size=large.")
    ] = None,
    rows: Annotated[str | None, typer.Option(help="Folder of the rows; default: study/results/rows/SIZE.")] = None,
    dry: Annotated[bool, typer.Option("--dry", help="Only list the runs that have no row.")] = False,
) -> None:
    """Run what has no row yet, one JSON row per run; a stopped command goes on where it was."""
    from pathlib import Path

    before_torch()
    from study.runs.captions import complete
    from study.runs.plan import STUDIES, plan
    from study.runs.rows import ROWS, Rows
    from study.runs.work import work

    fields = {name: values[0] for name, values in parse_fields(field or []).items()}
    names = tuple(STUDIES) if studies == "all" else tuple(studies.split(","))
    planned = plan(names, numbers(seeds), None if methods is None else methods.split(","), **fields)
    folder = Path(rows) if rows is not None else ROWS / str(fields.get("size", "small"))
    store = Rows(folder)
    if dry:
        for run in store.missing(one.run for one in planned):
            typer.echo(run.name)
        return
    outcome = work(planned, store, device=device, jobs=jobs, time_limit=time_limit)
    complete(store)
    _end(outcome)


def search_command(
    methods: Annotated[str, typer.Option(help="Methods, separated by commas; or all.")] = "all",
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas.")] = "0",
    field: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE,VALUE: each value, of each field; default: rates of the tower."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    jobs: Annotated[int, typer.Option(help="Processes side by side.")] = 1,
    time_limit: Annotated[float | None, typer.Option(help="Seconds after which to stop; run again to go on.")] = None,
    choose: Annotated[bool, typer.Option("--choose", help="Write the best rates to study/runs/rates.json.")] = False,
) -> None:
    """Try settings on validation scenes; rows go to study/results/search (size=large: search/large)."""
    before_torch()
    from study.runs.rows import RESULTS, Rows
    from study.runs.search import choose_rates, grid
    from study.runs.sizes import size_named
    from study.runs.work import work

    fields = parse_fields(field or [])
    size = size_named(str(fields.setdefault("size", ["small"])[0]))
    if len(fields) == 1:
        fields["vision_lr"] = list(size.rates)
    store = Rows(RESULTS / size.searched)
    wanted = None if methods == "all" else methods.split(",")
    planned = grid(wanted, fields, numbers(seeds))
    outcome = work(planned, store, device=device, jobs=jobs, time_limit=time_limit)
    if choose:
        for method, rate in choose_rates(store, size.name).items():
            typer.echo(f"{method}: {rate:g}")
    _end(outcome)


def parse_fields(given: list[str]) -> dict[str, list[Any]]:
    """Read `name=a,b,c`; values are JSON where they can be, else words. `name=[2,3],[3,4]` gives lists.

    Raises:
        ConfigError: If there is no name or no value.
    """
    import json

    found: dict[str, list[Any]] = {}
    for text in given:
        name, _, values = text.partition("=")
        if not name or not values:
            raise ConfigError("A field is NAME=VALUE.", expected="steps=400, or vision_lr=1e-4,1e-3", got=text)
        try:
            found[name] = json.loads(f"[{values}]")
        except ValueError:
            found[name] = values.split(",")
    return found


def numbers(text: str) -> list[int]:
    """Read whole numbers that are separated by commas.

    Raises:
        ConfigError: If there are others.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError("Seeds are whole numbers.", expected="0,1,2", got=text) from error


def before_torch() -> None:
    """Set what torch and transformers read when they are imported.

    The parent looks for a GPU without starting CUDA, which would not survive a fork. transformers shows no bar for each
    model that it loads: the study loads many, and shows progress itself.
    """
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _end(outcome: Any) -> None:
    typer.echo(f"{len(outcome.finished)} runs finished, {len(outcome.failed)} failed, {len(outcome.left)} left.")
    if outcome.failed:
        sys.exit(1)
