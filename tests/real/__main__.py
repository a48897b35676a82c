"""python -m tests.real [ENGINE ...]: see the docstring of `tests.real`."""

from __future__ import annotations

import argparse
import datetime
import importlib
import shutil
import sys
import traceback
from types import ModuleType

from rich.console import Console

from tests.real import results
from tests.real.bench import Bench, StepFailed
from tests.real.engines import names
from tests.real.environments import REAL, ROOT, environment, versions
from tests.real.results import Result


def main() -> None:
    """Run the engines, write their results and the page; exit status 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.real", description="Run covft inside real trainers.")
    parser.add_argument("engines", nargs="*", metavar="ENGINE", help=f"default: {' '.join(names())}")
    parser.add_argument("--fresh", action="store_true", help="build environments anew")
    parser.add_argument("--page", action="store_true", help="only write the page, from the results that are there")
    options = parser.parse_args()
    unknown = sorted(set(options.engines) - set(names()))
    if unknown:
        parser.error(f"no engine is named {', '.join(unknown)}; there are {', '.join(names())}")
    console = Console()
    outcomes = {}
    for name in [] if options.page else options.engines or names():
        outcomes[name] = run_engine(name, console, fresh=options.fresh)
    results.PAGE.write_text(results.page(results.read()), encoding="utf-8")
    for name, outcome in outcomes.items():
        console.print(f"{name}: {outcome}")
    sys.exit("failed" in outcomes.values())


def run_engine(name: str, console: Console, *, fresh: bool) -> str:
    """Run one engine and write its results; one that cannot run here keeps those of its last run."""
    engine = importlib.import_module(f"tests.real.engines.{name}")
    console.rule(name)
    result = Result(name, " ".join((engine.__doc__ or "").split()), datetime.date.today().isoformat())
    why = engine.missing()
    if why:
        result.outcome, result.reason = "skipped", why
        console.print(f"skipped: {why}", highlight=False)
        if not (results.FOLDER / f"{name}.json").exists():
            result.write()
        return result.outcome
    try:
        steps(engine, name, result, console, fresh=fresh)
        untrue = [check["what"] for check in result.checks if not check["holds"]]
        result.outcome, result.reason = ("failed", "; ".join(untrue)) if untrue else ("passed", "")
    except Exception as error:
        result.outcome = "failed"
        result.reason = f"{type(error).__name__}: {error}".replace(f"{ROOT}/", "").partition("\n")[0]
        console.print(str(error) if isinstance(error, StepFailed) else traceback.format_exc(), markup=False)
    result.write()
    return result.outcome


def steps(engine: ModuleType, name: str, result: Result, console: Console, *, fresh: bool) -> None:
    """Prepare the environment and an empty folder, and run the steps of the engine."""
    with console.status("  environment"):
        python = environment(name, engine.REQUIREMENTS, getattr(engine, "EXTRAS", ("train",)), fresh=fresh)
    folder = REAL / name / "work"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    result.versions = versions(python, engine.REQUIREMENTS)
    engine.run(Bench(python, folder, result, console))


if __name__ == "__main__":
    main()
