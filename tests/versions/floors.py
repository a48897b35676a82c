"""The floors that pyproject.toml declares, and the lowest versions that resolve for them."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10 has none; every pip has a copy of the library it came from
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENT = re.compile(r"([\w.-]+)(?:\[([\w,-]+)\])?\s*(?:[>=]=\s*([\d.]+))?")


@cache
def project() -> dict:
    """Return the table `[project]` of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements(*extras: str) -> list[str]:
    """Return what an installation with these extras asks for, with the extras that they include."""
    found, queue = [], [*project()["dependencies"]]
    for extra in extras:
        queue += project()["optional-dependencies"][extra]
    while queue:
        name, included, _ = parts(requirement := queue.pop(0))
        if name == project()["name"]:
            queue += [item for extra in included for item in project()["optional-dependencies"][extra]]
        elif requirement not in found:
            found.append(requirement)
    return found


def floors(*extras: str) -> dict[str, str]:
    """Return the lowest version of each package that an installation with these extras allows."""
    lowest: dict[str, str] = {}
    for requirement in requirements(*extras):
        name, _, floor = parts(requirement)
        if floor and version(floor) > version(lowest.get(name, "0")):
            lowest[name] = floor
    return lowest


def parts(requirement: str) -> tuple[str, list[str], str]:
    """Split a requirement into the normalised name, its extras and its floor, if it has one."""
    match = REQUIREMENT.match(requirement)
    assert match, requirement
    name, extras, floor = match.groups()
    return normal(name), extras.split(",") if extras else [], floor or ""


def normal(name: str) -> str:
    """Return the name of a package as resolvers write it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def version(text: str) -> tuple[int, ...]:
    """Return a version as numbers that compare: `1.26` equals `1.26.0`, and `2.8.0+cpu` is `2.8`."""
    match = re.match(r"[\d.]*\d", text)
    assert match, text
    numbers = [int(number) for number in match[0].split(".")]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


# ------------------------------------------------------------------------------------- resolution


def unreached(uv: Path, python: str) -> list[str]:
    """Return the floors that the lowest resolution of an extra misses: of none, of each in `[all]`, and of `[all]`."""
    _, names, _ = parts(project()["optional-dependencies"]["all"][0])
    found = []
    for extras in [(), *((name,) for name in names), ("all",)]:
        resolved = lowest(uv, python, *extras)
        found += [
            f"[{','.join(extras)}] asks for {name}>={floor}, and the lowest that resolves is {resolved[name]}"
            for name, floor in floors(*extras).items()
            if version(resolved[name]) != version(floor)
        ]
    return found


def lowest(uv: Path, python: str, *extras: str) -> dict[str, str]:
    """Resolve an installation with these extras to the lowest versions of what it asks for by name."""
    command = [uv, "pip", "compile", "-q", "--resolution", "lowest-direct", "--no-header", "--no-annotate"]
    command += ["--python-version", python, *(word for extra in extras for word in ("--extra", extra))]
    done = subprocess.run([*command, ROOT / "pyproject.toml"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"[{','.join(extras)}] has no lowest resolution: {done.stderr.strip()}")
    pins = (line.partition("==") for line in done.stdout.splitlines() if "==" in line)
    return {normal(name): pin for name, _, pin in pins}
