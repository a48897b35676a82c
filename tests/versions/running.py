"""Run a row, and write what came of it."""

from __future__ import annotations

import json
import os
import shlex
import time
import xml.etree.ElementTree as ElementTree
from datetime import datetime, timezone
from pathlib import Path

from tests.versions.environment import FOLDER, Environment, StepError
from tests.versions.floors import unreached
from tests.versions.rows import SLOW, Row

RESULTS = Path(__file__).with_name("results")
OUTCOMES: tuple[str, ...] = ("passed", "failed", "skipped")


def run(row: Row, keep: bool) -> bool:
    """Install and test a row, write `results/ROW.json`, and return whether all of it is good."""
    environment = Environment(row)
    start = time.monotonic()
    result = {
        "row": row.name,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "python_wanted": row.python,
        "versions": {},
        "tests": {},
        "failures": [],
        "seconds": {},
    }
    try:
        environment.create()
        environment.install()
        result["seconds"]["install"] = round(time.monotonic() - start)
        result["versions"] = environment.versions()
        if row.lowest:
            python = ".".join(result["versions"]["python"].split(".")[:2])
            result["failures"] += unreached(environment.tool("uv"), python)
        before = time.monotonic()
        counts, failures = test(environment)
        result["tests"] = counts
        result["failures"] += failures
        result["seconds"]["tests"] = round(time.monotonic() - before)
    except (StepError, RuntimeError) as error:
        print(error)
        result["failures"].append(str(error).partition("\n")[0])
    write(result)
    if not keep:
        environment.remove()
    return not result["failures"]


def test(environment: Environment) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Run the tests of a row; return the counts of each folder, and what failed."""
    row, report = environment.row, FOLDER / f"{environment.row.name}.xml"
    report.unlink(missing_ok=True)
    command = [environment.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "junit_family=xunit1"]
    command += ["-m", "not slow and not gpu and not network"]  # the longer ones, too
    command += [f"--junitxml={report}", *shlex.split(os.environ.get("PYTEST_ARGS", ""))]
    # A file or a test; --deselect takes both.
    command += [f"--deselect={path}" for path in {**SLOW, **row.without}]
    code = environment.call("tests", *command, *row.tests(), may_fail=True)
    if not report.exists():
        raise StepError(f"tests: exit status {code}, and no report; see {environment.log.name}")
    counts, failures = read(report, row.tests())
    if code and not failures:
        failures = [f"tests: exit status {code}, with no failed test; see {environment.log.name}"]
    return counts, failures


def read(report: Path, folders: list[str]) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Count the outcomes of a JUnit report by folder, and list the tests that failed.

    A file that could not be collected is a failed test of its folder.
    """
    counts = {folder: dict.fromkeys(OUTCOMES, 0) for folder in folders}
    failures = []
    for case in ElementTree.parse(report).iter("testcase"):
        place = (case.get("classname") or case.get("name") or "").replace(".", "/")
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        [folder] = [one for one in folders if f"{place}/".startswith(f"{one.removesuffix('.py')}/")]
        counts[folder][outcome] += 1
        if outcome == "failed":
            failures.append(f"{place}: {case.get('name')}")
    return counts, sorted(failures)


def write(result: dict, folder: Path = RESULTS) -> None:
    """Write a results file aside, then put it in its place."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{result['row']}.json"
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    aside.replace(path)
