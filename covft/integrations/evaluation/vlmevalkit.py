"""VLMEvalKit with a model that covft has saved: runs its `run.py`, unchanged.

    python -m covft.integrations.evaluation.vlmevalkit FOLDER --run VLMEvalKit/run.py -- --data MME MMVP --model covft

VLMEvalKit has no plug-ins: its `run.py` reads the models from `vlmeval.config.supported_VLM`. So `run.py` is imported,
which imports the toolkit, the model is put there under the name after `--model`, and `main()` of `run.py` is called.
For `--config` the class is `CoVFT`, with the keywords of `Options`; `{}` stands for FOLDER.

Multiple choice otherwise asks a judge that costs money: `--judge exact_matching` is added unless there is a `--judge`.
`run.py` skips what fails and exits with 0. Here a failing row ends the run, and a data set without results is an error.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from covft.errors import ConfigError, CoVFTError, EvaluationError, MissingDependencyError, UnsupportedVersionError
from covft.integrations.evaluation.benchmarks import tasks_of
from covft.integrations.evaluation.vlmevalkit_model import CLASS, Options, model_class

PROGRAM = "python -m covft.integrations.evaluation.vlmevalkit"
NAME = "covft"
# Data sets whose answers are sent in, so that there is nothing to score here.
_NOT_SCORED = ("external_submission_required", "test_split_without_ground_truth")


@dataclass(frozen=True)
class Command:
    """A parsed command line.

    Attributes:
        run: Path of `run.py`.
        options: Of the model; None where `--config` has them.
        name: Name of the model in the toolkit.
        theirs: The arguments of `run.py`.
    """

    run: Path
    options: Options | None
    name: str
    theirs: tuple[str, ...]


def command(
    folder: str | Path,
    run: str | Path,
    tasks: str,
    output: str | Path,
    options: Mapping[str, Any] | None = None,
    extra: Sequence[str] = (),
) -> list[str]:
    """Build the command line that evaluates a folder.

    Args:
        folder: A folder that an attached model was saved to, or a repository of the Hugging Face Hub.
        run: Path of VLMEvalKit's `run.py`.
        tasks: Names with commas, such as `paper`, as `benchmarks.tasks_of` takes them.
        output: Where the toolkit writes its results.
        options: Fields of `Options`; None leaves one out.
        extra: More arguments of `run.py`; those among them that name a field of `Options`, such as `--prompt`, are the
            model's.
    """
    ours, theirs = _options_parser(add_help=False).parse_known_args(list(extra))
    named = {**(options or {}), **{name: value for name, value in vars(ours).items() if value is not None}}
    given = {name: value for name, value in named.items() if value is not None}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    name = _default_name(given.get("text", "right"))
    return [
        *(sys.executable, *PROGRAM.split()[1:], str(folder), "--run", str(run), *words, "--"),
        *("--data", *tasks_of(tasks, "vlmevalkit"), "--model", name, "--work-dir", str(output)),
        *theirs,
    ]


def parse(arguments: Sequence[str]) -> Command:
    """Read a command line.

    Args:
        arguments: covft's arguments, `--`, and those of `run.py`.

    Raises:
        ConfigError: If there is no `run.py`, or no folder, or the model's name is not clear. Other errors end the
            process, as argparse does.
    """
    parser = _options_parser(usage=f"{PROGRAM} [FOLDER] --run run.py [--text ...] -- its flags")
    parser.add_argument("folder", nargs="?", help="a folder that an attached model was saved to, or a repository")
    parser.add_argument("--run", required=True, help="path of VLMEvalKit's run.py")
    split = list(arguments).index("--") if "--" in arguments else len(arguments)
    space, theirs = vars(parser.parse_args(list(arguments[:split]))), list(arguments[split + 1 :])
    run = Path(space.pop("run"))
    if not run.is_file():
        raise ConfigError(
            f"{run} is not a file.",
            expected="run.py of a clone of VLMEvalKit",
            got="no such file",
            fix="git clone the repository of VLMEvalKit, and name its run.py",
        )
    given = {name: value for name, value in space.items() if value is not None}
    config = _value(theirs, "--config")
    if "folder" not in given and config is None:
        raise ConfigError("There is no model to evaluate.", expected=parser.usage, got="no FOLDER and no --config")
    if "folder" not in given and given:
        raise ConfigError(
            "The options of a model without FOLDER stand in --config.", expected="FOLDER", got=", ".join(given)
        )
    options = Options(**given) if "folder" in given else None
    name = _default_name(given.get("text", "right"))
    models = _values(theirs, "--model")
    if config is None and not models:
        theirs += ["--model", name]
    elif models:
        name = _name_in(models, name)
    if _value(theirs, "--judge") is None:
        theirs += ["--judge", "exact_matching"]
    return Command(run, options, name, tuple(theirs))


def _options_parser(**settings: Any) -> argparse.ArgumentParser:
    """Return a parser of the options of the model; those that are not given are None."""
    parser = argparse.ArgumentParser(PROGRAM, allow_abbrev=False, **settings)
    for field in fields(Options)[1:]:
        kind = int if isinstance(field.default, int) else str
        parser.add_argument(f"--{field.name}", type=kind, help=field.metadata["help"])
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run VLMEvalKit with a model of covft, and check that every data set has results.

    Args:
        arguments: Command-line arguments; None takes those of the process.

    Raises:
        EvaluationError: If a row or a data set fails.
        ConfigError: If the toolkit has a model of that name, or the command line cannot work.
        MissingDependencyError: If the toolkit or a library of it is not installed.
        UnsupportedVersionError: If `run.py` is not as expected.
    """
    parsed = parse(sys.argv[1:] if arguments is None else arguments)
    output = _output_of(parsed.theirs)
    before = _states(output)
    with _as_script(parsed.run, parsed.theirs):
        script = _import(parsed.run)
        register(parsed.name, parsed.options)
        if hasattr(script, "load_env"):
            script.load_env()
        script.main()
    if int(os.environ.get("RANK", 0)) == 0:
        check_results(output, before, infer_only=_value(parsed.theirs, "--mode") == "infer")


def register(name: str, options: Options | None) -> None:
    """Make the model known to VLMEvalKit, which is imported for that.

    Args:
        name: Name of the model.
        options: Its options; None registers the class alone, for `--config`.

    Raises:
        ConfigError: If the toolkit has a model of that name.
    """
    models = importlib.import_module("vlmeval.config").supported_VLM
    classes = importlib.import_module("vlmeval.vlm")
    if name in models or hasattr(classes, CLASS):
        raise ConfigError(
            f"VLMEvalKit has a model {name if name in models else CLASS} of its own.", expected="another name", got=name
        )
    made = model_class()
    setattr(classes, CLASS, made)
    if options is not None:
        models[name] = functools.partial(made, **options.given())


def check_results(output: Path, before: Mapping[Path, int], *, infer_only: bool = False) -> None:
    """Refuse a run in which a data set has no results; `run.py` skips those that fail.

    Args:
        output: The toolkit's working folder.
        before: Time of change of each status file before the run.
        infer_only: Whether only answers were asked for.

    Raises:
        EvaluationError: If a data set failed, was skipped, or there is none.
    """
    problems, count = [], 0
    for path, changed in _states(output).items():
        if before.get(path) == changed:
            continue
        for name, state in json.loads(path.read_text(encoding="utf-8")).get("datasets", {}).items():
            count += 1
            reason = state.get("error_message") or state.get("skip_reason")
            if reason in _NOT_SCORED:
                continue
            if reason is None and not infer_only and not state.get("metrics"):
                reason = f"it ended in the state {state.get('status')!r}, without a metric"
            if reason is not None:
                problems.append(f"{name}: {reason}")
    if problems or not count:
        raise EvaluationError(
            "VLMEvalKit has no results for some data sets." if count else "VLMEvalKit has not evaluated anything.",
            expected=f"a metric of every data set in {output}",
            got="; ".join(problems) or "no new status.json",
            fix="read the log above; VLMEvalKit goes on after an error",
        )


def _states(output: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in output.glob("*/*/status.json")}


def _output_of(theirs: Sequence[str]) -> Path:
    return Path(os.environ.get("MMEVAL_ROOT") or _value(theirs, "--work-dir") or "outputs").resolve()


@contextmanager
def _as_script(run: Path, theirs: Sequence[str]) -> Iterator[None]:
    """Let `run.py` find its arguments and its folder, as if Python had started it."""
    arguments, path = list(sys.argv), list(sys.path)
    sys.argv, sys.path[:] = [str(run), *theirs], [str(run.resolve().parent), *sys.path]
    try:
        yield
    finally:
        sys.argv, sys.path[:] = arguments, path


def _import(run: Path) -> ModuleType:
    """Import `run.py` under a name of its own; it chooses the GPU of a process before it imports the toolkit."""
    spec = importlib.util.spec_from_file_location("vlmevalkit_run", run)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(script)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"VLMEvalKit needs {error.name}, which is not installed.",
            fix=f"pip install -r {run.parent / 'requirements.txt'}, in an environment of its own",
        ) from error
    if not callable(getattr(script, "main", None)):
        raise UnsupportedVersionError(
            f"{run} is not VLMEvalKit's run.py, or a release of it that covft does not know.",
            expected="a function main()",
            got=", ".join(sorted(name for name in vars(script) if not name.startswith("_")))[:200],
        )
    return script


def _default_name(text: str) -> str:
    return NAME if text == "right" else f"{NAME}-{text}"  # so that results are not mixed


def _name_in(models: Sequence[str], default: str) -> str:
    """Return which of the names after `--model` is that of covft's model."""
    found = [name for name in models if name == default] or (list(models) if len(models) == 1 else [])
    if len(found) != 1:
        raise ConfigError(
            "It is not clear which model is that of covft.", expected=f"--model {default} ...", got=" ".join(models)
        )
    return found[0]


def _values(theirs: Sequence[str], flag: str) -> list[str]:
    """Return the words after a flag, up to the next flag."""
    for position, word in enumerate(theirs):
        name, equals, value = word.partition("=")
        if name == flag:
            after = [value] if equals else list(theirs[position + 1 :])
            end = next((place for place, one in enumerate(after) if one.startswith("--")), len(after))
            return after[:end]
    return []


def _value(theirs: Sequence[str], flag: str) -> str | None:
    return next(iter(_values(theirs, flag)), None)


if __name__ == "__main__":
    try:
        main()
    except CoVFTError as error:
        traceback.print_exception(error, limit=0)
        sys.exit(1)
