"""What an engine module gets to run its steps: an environment, an empty folder, and a place for results."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from tests.real import environments, guides
from tests.real.environments import ROOT
from tests.real.results import Result

PARTS = Path(__file__).with_name("parts")
_LIMIT = 1800.0  # seconds per command


class StepFailed(RuntimeError):
    """A command ended with another exit status than 0, or ran too long."""


class Bench:
    """Runs the steps of one engine and records them.

    Args:
        python: The Python of the engine's environment.
        folder: An empty working folder.
        result: Where steps and checks are recorded.
        console: Where progress is shown.
    """

    def __init__(self, python: Path, folder: Path, result: Result, console: Console) -> None:
        self.python, self.folder = python, folder
        self.output = ""  # of the last step
        self._result, self._console = result, console
        self._shown = {f"{folder}/": "", str(folder): ".", f"{ROOT}/": "", str(ROOT): "."}

    def call(
        self, *command: str | Path, env: Mapping[str, str] | None = None, title: str, limit: float = _LIMIT
    ) -> str:
        """Run a command in the working folder; "python" and console scripts are those of the environment.

        Args:
            *command: The command and its arguments.
            env: Environment variables to set.
            title: What the step does, for people.
            limit: Seconds after which it is ended.

        Returns:
            Its output, standard error included.

        Raises:
            StepFailed: If its exit status is not 0; with the last lines of the output.
        """
        return self._step([str(part) for part in command], env, limit, title=title)

    def refused(self, *command: str | Path, env: Mapping[str, str] | None = None, title: str) -> str:
        """Run a command that has to fail, as `call` does, and return its output."""
        try:
            self.call(*command, env=env, title=title)
        except StepFailed:
            return self.output
        raise StepFailed(f"{title}: exit status 0, though it had to fail")

    def part(self, name: str, *arguments: str | Path, title: str) -> str:
        """Run a script of `tests/real/parts` with the environment's Python."""
        return self.call("python", PARTS / name, *arguments, title=title)

    def tests(self, module: str, *arguments: str | Path, title: str) -> str:
        """Run a module of the tests, such as one that makes tiny models, with the Python of the tests."""
        self.show_as(sys.executable, "python")
        return self.call(
            sys.executable, "-W", "ignore", "-m", module, *arguments, env={"PYTHONPATH": str(ROOT)}, title=title
        )

    def documented(
        self,
        page: str,
        name: str,
        replace: Mapping[str, str] | None = None,
        *,
        env: Mapping[str, str] | None = None,
        title: str,
        limit: float = _LIMIT,
    ) -> str:
        """Run a named block of a guide.

        Args:
            page: The page, below docs/.
            name: The name in the comment in front of the block, whose language is bash or python.
            replace: Text of the block and what stands for it here: model, data, sizes.
            env: As for `call`.
            title: As for `call`.
            limit: As for `call`.

        Returns:
            Its output, standard error included.
        """
        found = guides.block(page, name)
        text = guides.replaced(found.text, dict(replace or {}))
        command = {"bash": ["bash", "-euo", "pipefail", "-c", text], "python": ["python", "-c", text]}[found.language]
        return self._step(command, env, limit, title=title, page=page, block=name, text=found.text)

    def file(self, page: str, name: str, replace: Mapping[str, str] | None = None) -> str:
        """Return the text of a named block of a guide that is a file, such as a YAML file of settings."""
        found = guides.block(page, name)
        self._result.commands.append(
            {"title": f"file: {name}", "command": [], "seconds": 0.0, "page": page, "block": name, "text": found.text}
        )
        return guides.replaced(found.text, dict(replace or {}))

    def pip(self, *arguments: str | Path) -> None:
        """Install more into the environment, with PIP_ARGS: what is not on a package index, or against its pins."""
        environments.pip_install(self.python, *map(str, arguments))

    def check(self, what: str, holds: bool, value: object = "") -> None:
        """Record a fact; one that does not hold fails the run at its end."""
        value = self._clean(str(value))
        self._result.checks.append({"what": what, "holds": bool(holds), "value": value})
        sign = "[green]holds[/]" if holds else "[red]does not hold[/]"
        self._console.print(f"    {what}: {value}  {sign}" if value else f"    {what}  {sign}", highlight=False)

    def show_as(self, path: str | Path, name: str) -> None:
        """Write `name` for a path of this machine in the results, such as $LLAVA."""
        self._shown = {str(path): name, **self._shown}

    def _clean(self, text: str) -> str:
        for path, name in self._shown.items():
            text = text.replace(path, name)
        return text.replace(str(Path.home()), "~")

    def _step(self, command: list[str], env: Mapping[str, str] | None, limit: float, **entry: str) -> str:
        log = self.folder / "logs" / f"{len(self._result.commands):02}.log"
        log.parent.mkdir(exist_ok=True)
        start = time.monotonic()
        with self._console.status(f"  {entry['title']}"), log.open("w+", encoding="utf-8", errors="replace") as output:
            output.write(shlex.join(command) + "\n\n")
            output.flush()
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env={**self._environment(), **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a trainer starts processes of its own, which end with it
            )
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                status = f"over {limit:.0f} s"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        seconds = time.monotonic() - start
        self.output = text = log.read_text(encoding="utf-8", errors="replace").partition("\n\n")[2]
        self._console.print(f"  {entry['title']}: {seconds:.1f} s", highlight=False)
        shown = [self._clean(part) for part in command]
        self._result.commands.append({"command": shown, "seconds": round(seconds, 1), **entry})
        if status != 0:
            last = "\n".join(text.splitlines()[-25:])
            raise StepFailed(self._clean(f"{entry['title']}: exit status {status}\n{last}"))
        return text

    def _environment(self) -> dict[str, str]:
        """Take the environment of this process without what points to another Python; nothing is downloaded."""
        left_out = {"PYTHONPATH", "PYTHONHOME", "HF_ENDPOINT"}
        cache = self.folder / "cache"
        return {
            **{name: value for name, value in os.environ.items() if name not in left_out},
            "PATH": f"{self.python.parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "VIRTUAL_ENV": str(self.python.parents[1]),
            "HF_HOME": str(cache / "huggingface"),
            "MODELSCOPE_CACHE": str(cache / "modelscope"),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "COLUMNS": "200",
        }
