"""An environment for each engine, kept between runs as long as its requirements are the same."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT / ".real"
_STAMP = "requirements.txt"
_ALWAYS = ("torch", "transformers", "accelerate", "peft", "trl")


def environment(engine: str, requirements: Sequence[str], extras: Sequence[str], *, fresh: bool) -> Path:
    """Create the environment of an engine, or take the one that is there.

    Args:
        engine: Its name.
        requirements: What pip installs.
        extras: Those of covft, which is installed from this tree, editable.
        fresh: Whether to build it anew in any case.

    Returns:
        Its Python.
    """
    folder = REAL / engine / "env"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    wanted = "\n".join([*requirements, f"covft[{','.join(extras)}]"])
    stamp = folder / _STAMP
    if not fresh and stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    tree = f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT)
    pip_install(python, *requirements, "--editable", tree)
    stamp.write_text(wanted, encoding="utf-8")
    return python


def pip_install(python: Path, *arguments: str) -> None:
    """Run `pip install` in an environment, with PIP_ARGS."""
    command = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-input"]
    command += [*shlex.split(os.environ.get("PIP_ARGS", "")), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise RuntimeError("pip failed:\n" + "\n".join(done.stdout.splitlines()[-20:]))


def versions(python: Path, requirements: Sequence[str]) -> dict[str, str]:
    """Return the versions of Python, the engine and the libraries that matter, where they are installed."""
    names = [match[0] for item in requirements if (match := re.match(r"[A-Za-z][\w.-]*", item))]
    code = (
        "import json, platform, importlib.metadata as m\n"
        "found = {'Python': platform.python_version()}\n"
        f"for name in {list(dict.fromkeys([*names, *_ALWAYS]))!r}:\n"
        "    try: found[name] = m.version(name)\n"
        "    except m.PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)
