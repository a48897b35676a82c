"""`covft evaluate`: a trained folder in an evaluation engine, by the engine's own command line."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from covft.errors import ConfigError, EvaluationError


def evaluate(
    folder: Annotated[str, typer.Argument(help="A folder that an attached model was saved to, or a repository.")],
    extra: Annotated[list[str] | None, typer.Argument(help="After --: arguments of the engine.")] = None,
    tasks: Annotated[
        str, typer.Option(help="Tasks, with commas; paper, forgetting: the sets of the papers.")
    ] = "paper",
    engine: Annotated[str, typer.Option(help="lmms-eval or vlmevalkit.")] = "lmms-eval",
    output: Annotated[str | None, typer.Option(help="Folder for results; default: evaluation/NAME.")] = None,
    text: Annotated[str, typer.Option(help="What the tower is told: right, swapped, generic or blank.")] = "right",
    text_encoder: Annotated[str | None, typer.Option(help="Id or folder; default: that of training.")] = None,
    base: Annotated[str | None, typer.Option(help="Model that LoRA was trained on; default: as saved.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the weights; default: as saved.")] = None,
    trunk_cache_mb: Annotated[
        int | None, typer.Option(min=0, help="MB kept of pictures that are asked about again; 0: none; default: 1024.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes of lmms-eval, each with its questions.")] = 1,
    run: Annotated[str | None, typer.Option(help="Path of VLMEvalKit's run.py.")] = None,
    dry: Annotated[bool, typer.Option("--dry", help="Print the engine's command and stop.")] = False,
) -> None:
    """Evaluate a trained folder on benchmarks, and fail unless there is a number for each."""
    from covft.integrations.evaluation.benchmarks import entries_of, tasks_of
    from covft.integrations.evaluation.run_lmms import check_installed

    entries_of(engine)  # refuses an unknown one
    options = {"text_encoder": text_encoder, "base": base, "dtype": dtype, "text": None if text == "right" else text}
    options["trunk_cache_mb"] = None if trunk_cache_mb is None else str(trunk_cache_mb)
    place = Path(output or Path("evaluation") / (Path(folder).name + ("" if text == "right" else f"-{text}")))
    names = tasks_of(tasks, engine)
    if engine == "lmms-eval":
        words = _lmms_eval(folder, names, place, processes, options, extra or [])
    else:
        words = _vlmevalkit(folder, tasks, place, processes, options, extra or [], run)
    if dry:
        typer.echo(shlex.join(words))
        return
    if engine == "lmms-eval":
        check_installed()
        _evaluate_lmms(words, place, names)
    else:
        status, last = _run(words, place / f"{engine}.log")
        _check_status(status, last, place, engine)
    if "paper" in tasks.split(","):
        from covft.integrations.evaluation.paper import paper_table

        typer.echo(str(paper_table(place, engine=engine)))


def _lmms_eval(
    folder: str, names: list[str], place: Path, processes: int, options: dict[str, str | None], extra: list[str]
) -> list[str]:
    import torch

    from covft.integrations.evaluation import run_lmms

    cuda = torch.cuda.is_available()
    return run_lmms.command(folder, names, place, processes=processes, options=options, extra=extra, cuda=cuda)


def _vlmevalkit(
    folder: str,
    tasks: str,
    place: Path,
    processes: int,
    options: dict[str, str | None],
    extra: list[str],
    run: str | None,
) -> list[str]:
    from covft.integrations.evaluation import vlmevalkit

    if run is None or processes > 1:
        raise ConfigError(
            "VLMEvalKit is started by its run.py, in one process.",
            expected="--run, and no --processes",
            got="no --run" if run is None else f"--processes {processes}",
            fix="--run VLMEvalKit/run.py",
        )
    return vlmevalkit.command(folder, run, tasks, place, options, extra)


def _evaluate_lmms(words: list[str], place: Path, names: list[str]) -> None:
    from covft.integrations.evaluation import run_lmms
    from covft.integrations.evaluation.scores import lmms_results

    before = set(lmms_results(place))
    status, last = _run(words, place / "lmms-eval.log")
    _check_status(status, last, place, "lmms-eval")
    written = sorted(set(lmms_results(place)) - before)
    if not written:  # its exit status is 0 then, too
        raise EvaluationError(
            "lmms-eval wrote no results.",
            expected=f"a new file *_results.json in {place}",
            got=f"exit status {status}; the last lines:\n{last}",
            fix=f"read {place / 'lmms-eval.log'}",
        )
    _show(run_lmms.read_results(written[-1], names))


def _check_status(status: int, last: str, place: Path, engine: str) -> None:
    if status:
        raise EvaluationError(
            f"{engine} failed.",
            expected="exit status 0",
            got=f"exit status {status}; the last lines:\n{last}",
            fix=f"read {place / engine}.log",
        )


def _run(words: list[str], log: Path) -> tuple[int, str]:
    """Run a command, show its output and write it to a file; return its exit status and last lines."""
    kept: deque[bytes] = deque(maxlen=64)
    log.parent.mkdir(parents=True, exist_ok=True)
    shown = sys.stdout.buffer
    with log.open("wb") as file, subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        while chunk := process.stdout.read1(1 << 16):  # type: ignore[attr-defined]
            shown.write(chunk)
            shown.flush()
            file.write(chunk)
            kept.append(chunk)
    lines = b"".join(kept).decode("utf-8", errors="replace").replace("\r", "\n").splitlines()
    return process.returncode, "\n".join([line for line in lines if line.strip()][-12:])


def _show(results: Any) -> None:
    table = Table(box=box.SIMPLE, pad_edge=False)
    for name in ("task", "metric", "value", "± standard error", "questions"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for score in results.scores:
        error = "" if score.error is None else f"{score.error:.4f}"
        samples = "" if score.samples is None else str(score.samples)
        table.add_row(score.task, score.metric, f"{score.value:.4f}", error, samples)
    console = Console()
    # As wide as its numbers need, whatever the terminal.
    table.width = Console(width=1000).measure(table).maximum
    console.print(table, soft_wrap=True, highlight=False, markup=False)
    console.print(str(results.path), soft_wrap=True, highlight=False, markup=False)
