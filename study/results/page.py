"""The page of the study, docs/study, from the rows alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from covft.utils.files import write_text
from study.results import paper, paper_claims
from study.results.claims import FAILS, HOLDS, NOT_RUN, UNKNOWN, Claim, Comparison, verdict
from study.results.formats import Table, interval, plural
from study.results.load import Row
from study.results.plots import Plot, write_plots
from study.results.rates import rates_table
from study.results.settings_shown import run_table, settings_table, tasks_table
from study.results.size import size_rows, size_table
from study.results.studies import STUDIES, Results
from study.results.tables import HOW_TO_READ, tables_of
from study.runs.settings import RunSettings
from study.runs.sizes import size_named

NAME = "index.md"
_VERDICTS = (HOLDS, FAILS, UNKNOWN, NOT_RUN)
_MOST = 3  # comparisons that a cell lists


def write_page(results: Results, folder: Path) -> Path:
    """Write the page and its figures; return the page's path."""
    plots = write_plots(results, folder)
    write_text(folder / NAME, page(results, plots, size_rows() if results.size == "small" else ()))
    return folder / NAME


def page(results: Results, plots: list[Plot], searched: Sequence[Row] = ()) -> str:
    """Return the page.

    Args:
        results: The results.
        plots: The figures that stand beside it.
        searched: Rows of the search for the size of a run and for its learning rates.
    """
    parts = [
        "# Does a question-aware tower help?",
        _made(results),
        *_short(results),
        "## How to read the tables",
        HOW_TO_READ,
    ]
    for study in STUDIES.values():
        parts += [f"## {study.title}", study.text]
        for place, table in enumerate(tables_of(results, study)):
            parts += [*([f"### {table.title}"] if place else []), table.markdown()]
        parts += [f"![{plot.alt}]({plot.name}.svg){{ .scrolls }}" for plot in plots if plot.study == study.name]
    parts += [*_claims(results), *_against_itself(), *_what_was_run(results), *_size(searched), *_rates(searched)]
    parts += [*_limits(results), *_again(results)]
    return "\n\n".join(parts) + "\n"


def _made(results: Results) -> str:
    if not results.rows:
        return "Made by `python -m study page`. No rows are on file, so nothing was run."
    dates = sorted(row.date[:10] for row in results.rows if row.date)
    when = "" if not dates else dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    devices = ", ".join(dict.fromkeys(row.device for row in results.rows if row.device))
    hours = sum(sum(row.seconds.values()) for row in results.rows) / 3600
    return (
        f"Made by `python -m study page` from {plural(len(results.rows), 'row')}, one per run, in "
        f"`study/results/rows/{results.size}` ({', '.join(each for each in (when, devices) if each)}; {hours:.1f} "
        "hours in all). Every number, figure and verdict follows from the rows alone. "
        "LLaVA in miniature, from real parts, learns to answer questions about small pictures; what differs from run "
        f"to run is how its vision tower is tuned. {_size_told(results)}[The study in miniature](../guides/study.md) "
        "describes its parts."
    )


def _size_told(results: Results) -> str:
    """Say what the size is, where it is not the usual one."""
    return f"These are runs of the size *{results.size}*: {size_named(results.size).about}. " if _field(results) else ""


def _field(results: Results) -> str:
    return "" if results.size == RunSettings().size else f" --field size={results.size}"


def _short(results: Results) -> list[str]:
    """Return what the rows say about the main questions."""
    first = (*paper_claims.PAPER[:2], paper_claims.PAPER[-1], *paper_claims.OWN[:7])
    lines = []
    for claim in first:
        found = claim.comparisons(results)
        lines.append(f"- {claim.text}: **{verdict(found)}**{_told(found)}.")
    counts = Counter(verdict(claim.comparisons(results)) for claim in paper_claims.PAPER)
    plurals = {HOLDS: "hold", FAILS: "do not hold"}
    counted = ", ".join(f"{counts[each]} {plurals.get(each, each)}" for each in _VERDICTS if counts[each])
    return ["## In short", "\n".join(lines), f"Of {len(paper_claims.PAPER)} claims of the paper: {counted}."]


def _told(found: list[Comparison]) -> str:
    known = [interval(each.found) for each in found if each.found is not None]
    return f" ({', '.join(known)} points)" if known else ""


def _what_was_run(results: Results) -> list[str]:
    return [
        "## What was run",
        run_table(results).markdown(),
        "### Settings",
        settings_table(results).markdown(),
        "### Tasks",
        tasks_table(results).markdown(),
    ]


def _size(searched: Iterable[Row]) -> list[str]:
    table = size_table(searched)
    if not table.rows:
        return []
    return [
        "### Size",
        "A comparison of ways to tune says nothing where tuning does not pay. So the size of a run was searched on "
        "validation scenes, with one seed: full tuning at the best of two or three learning rates, against a frozen "
        "tower. Intervals are over questions alone.",
        table.markdown(),
    ]


def _rates(searched: Iterable[Row]) -> list[str]:
    table = rates_table(searched)
    if not table.rows:
        return []
    return [
        "### Learning rates",
        "Means of the twelve tasks on validation scenes by the peak learning rate of the tower, with one seed; in bold "
        "is the best of a line. A method has one rate for all of its runs, the best over those of the study of methods "
        "(`study/runs/rates.json`), unless a row's name has another.",
        table.markdown(),
    ]


def _claims(results: Results) -> list[str]:
    return [
        "## Verdicts",
        "A claim *holds* if every interval lies on its side of 0, *does not hold* if any lies on the other side, is "
        "*not run* where a run that it is about has no row, and *cannot be told at this size* otherwise. Differences "
        "are in points; each interval is one of 95 percent on its own, so among twenty differences that are 0, one is "
        "expected to be told apart from 0.",
        "### The CoVFT paper",
        claims_table(paper_claims.PAPER, results).markdown(),
        "Not tested: larger language models (13B, Table 1) and InternVL (Table 3). Gradient similarity (Fig. 5) and "
        "contexts (Figs. 3 and 6) are measured in [Before and inside](../study/inside.md). For the overhead (Table 8) "
        "see [speed and memory](../speed/index.md).",
        "### The paper on forgetting",
        f"[Keeping yourself is important]({paper.SECOND}) compares ways to tune the language side: E is what is gained "
        "on the tasks tuned for, F what is lost on others, O the mean of both.",
        claims_table(paper_claims.SECOND_PAPER, results).markdown(),
        "### What the papers do not ask",
        claims_table(paper_claims.OWN, results).markdown(),
    ]


def claims_table(claims: tuple[Claim, ...], results: Results) -> Table:
    """Tabulate claims with their comparisons and verdicts."""
    told = any(claim.numbers for claim in claims)
    table = Table("Verdicts", ["claim", "of", *(["there"] if told else []), "here", "verdict"])
    table.text = frozenset(range(len(table.header)))
    for claim in claims:
        found = claim.comparisons(results)
        row = [claim.text, claim.source, *([claim.numbers] if told else []), compared(found), verdict(found)]
        table.strong.add((len(table.rows), len(row) - 1))
        table.rows.append(row)
    return table


def compared(found: list[Comparison]) -> str:
    """Write the comparisons of a claim: each, or how many there are on each side."""
    known = [(each.name, each.found) for each in found if each.found is not None]
    if len(known) <= _MOST:
        return "<br>".join(f"{name}: {interval(value)}" for name, value in known)
    signs = Counter(value.sign for _, value in known)
    name, least = min(known, key=lambda each: each[1].value)
    return (
        f"of {len(known)}: {signs[1]} above 0, {signs[-1]} below, {signs[0]} neither<br>"
        f"least: {name}: {interval(least)}"
    )


def _against_itself() -> list[str]:
    lines = "\n".join(f"- {line}" for line in paper.against_itself())
    return [
        "## The paper against itself",
        f"Some of what the [paper]({paper.LINK}) says can be checked with its own tables. Means are recomputed from "
        "the scores of the tasks.",
        lines,
    ]


def _limits(results: Results) -> list[str]:
    seeds = [len(group.rows) for group in results.groups]
    few = "" if not seeds else f" Groups here have {min(seeds)} to {max(seeds)} seeds."
    if seeds and min(seeds) == max(seeds):
        few = f" Every group here has {plural(min(seeds), 'seed')}."
    lines = (
        f"{size_named(results.size).limits} A verdict here is one about this size. It says nothing sure about a CLIP-L "
        "and a 7B model.",
        "The scenes are made by a program, from real pixels. Questions have a few phrasings each, and short answers.",
        "Seeds are few, and a bootstrap over few seeds does not know the variance between seeds well."
        f"{few} With one seed it does not know it at all: then the interval is about questions alone.",
        "Held-out questions and training scenes are the same for every run; a seed changes the weights that start at "
        "random and the order of the data. So intervals say nothing about other training data.",
        "Learning rates of each method come from one small search on validation scenes. A longer search may move a "
        "method. Where a study varies a method, as in its width, its rank or the number of tokens, the rate stays what "
        "it was, unless the row names another.",
        "Sign tests are over tasks, which share pictures and are not independent.",
    )
    return ["## Limits", "\n".join(f"- {line}" for line in lines)]


def _again(results: Results) -> list[str]:
    commands = (
        f"python -m study run --studies all --seeds 0,1,2{_field(results)}    # what has no row yet",
        f"python -m study table --size {results.size}",
        f"python -m study page --size {results.size}",
    )
    return ["## Run it again", "\n".join(["```bash", *commands, "```"])]
