"""Measure every method: `python -m benchmarks.methods`.

On CLIP-L it takes about half an hour. What is measured is saved at once, and a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.methods import page
from benchmarks.methods.cases import Case, cases
from benchmarks.methods.measure import CLOCK, Bench, in_connector, matched
from benchmarks.speed.measure import machine
from benchmarks.speed.sizes import CLIP_L, TINY, Record

_BASE_EVERY = 6  # methods; the two that others are compared to are timed again after so many


def main(words: Sequence[str] | None = None) -> None:
    """Measure what is not measured yet, and write the results, the page and its plot."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=main.__doc__)
    parser.add_argument("--runs", type=int, default=3, help="measured runs of each method")
    parser.add_argument("--method", action="append", help="measure this one anew; may be repeated")
    parser.add_argument("--quick", action="store_true", help="toy sizes, to try the command; written to a new folder")
    parser.add_argument("--output", type=Path, help="folder for cpu.json")
    parser.add_argument("--pages", type=Path, help="folder for the page and its plot")
    options = parser.parse_args(words)
    folder = Path(tempfile.mkdtemp(prefix="methods-")) if options.quick else None  # never over real figures
    output = options.output or folder or page.RESULTS.parent
    pages = options.pages or folder or page.PAGE.parent
    file = output / page.RESULTS.name
    size = TINY if options.quick else CLIP_L
    bench, every = Bench(size), cases(size)
    result = json.loads(file.read_text()) if file.exists() else {}
    result.setdefault("plain", bench.plain())
    if "q_moe" not in result:
        result["q_moe"] = in_connector(size.text_dim)
    before = {record["name"]: record for record in result.get("methods", ())}
    for name in [name for name, record in before.items() if record["method"] in (options.method or ())]:
        del before[name]
    result["methods"] = [before.get(case.name) or _empty(case) for case in every]
    records = {record["name"]: record for record in result["methods"]}
    missing = _missing(records, options.runs)
    for _ in _shown(_runs(bench, every, records, options.runs), missing):
        _save(file, result)
    if missing or "matched" not in result:
        paired = next(record for record in result["methods"] if record["of"] and record["method"] == "lora")
        result["matched"] = matched(bench, paired["parameters"])
        _save(file, result)
    pages.mkdir(parents=True, exist_ok=True)
    (pages / page.PAGE.name).write_text(page.page(result))
    page.plot(result, pages / page.PLOT)
    index = page.PAGE.with_name(page.INDEX).read_text()
    (pages / page.INDEX).write_text(page.indexed(index, result))
    print("wrote", file, *(str(pages / name) for name in (page.PAGE.name, page.PLOT, page.INDEX)))


def _empty(case: Case) -> Record:
    times = {name: [] for name in ("forward", "step", "frozen_forward", "full_step")}
    return {"name": case.name, "method": case.method, "options": case.options, "of": case.of, **times}


def _missing(records: dict[str, Record], runs: int) -> int:
    return sum(("bytes" not in record) + max(runs - len(record["step"]), 0) for record in records.values())


def _runs(bench: Bench, every: tuple[Case, ...], records: dict[str, Record], runs: int) -> Iterator[str]:
    """Measure what is missing, in turns, and yield the name of what is next."""
    for case in every:
        record = records[case.name]
        if "bytes" not in record:
            yield case.name
            record |= bench.counted(case)
    for run in range(runs):
        left = [case for case in every if len(records[case.name]["step"]) <= run]
        base = (0.0, 0.0)
        for number, case in enumerate(left):
            yield case.name
            if number % _BASE_EVERY == 0:
                base = (bench.timed(every[0])[0], bench.timed(every[1])[1])
            record = records[case.name]
            for name, seconds in zip(("forward", "step"), bench.timed(case), strict=True):
                record[name].append(seconds)
            for name, seconds in zip(("frozen_forward", "full_step"), base, strict=True):
                record[name].append(seconds)
            record |= {"date": date.today().isoformat(), "machine": machine(), "clock": CLOCK}


def _shown(steps: Iterator[str], total: int) -> Iterator[str]:
    """Show how far it is."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:40}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task: Any = progress.add_task("", total=total)
        for done, name in enumerate(steps):
            progress.update(task, description=name, completed=done)
            yield name
        progress.update(task, description="", completed=total)


def _save(file: Path, result: Record) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(".part")
    aside.write_text(json.dumps(result, indent=1) + "\n")
    aside.replace(file)


if __name__ == "__main__":
    main()
