"""The command line of lmms-eval for a folder that covft has saved, and its result files."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from covft.checkpoints.folder import CONFIG_NAME, FOLDER
from covft.checkpoints.loading import local_folder
from covft.errors import ConfigError, EvaluationError, MissingDependencyError
from covft.integrations.evaluation.scores import results_of
from covft.utils.strict_json import read_strictly

# Model types of transformers that have a class of their own; the others have covft_huggingface.
MODELS = {
    "internvl": "covft_internvl_hf",
    "llava": "covft_llava_hf",
    "llava_next": "covft_llava_hf",
    "llava_onevision": "covft_llava_onevision",
    "qwen2_5_vl": "covft_qwen2_5_vl",
    "qwen3_vl": "covft_qwen3_vl",
    "qwen3_vl_moe": "covft_qwen3_vl",
}
_CONFIGS = ("config.json", "adapter_config.json", f"{FOLDER}/{CONFIG_NAME}")
_MODEL_ARGS = ("--model_args", "--model-args")


def command(
    folder: str,
    tasks: Sequence[str],
    output: str | Path,
    *,
    processes: int = 1,
    options: Mapping[str, str | None] | None = None,
    extra: Sequence[str] = (),
    cuda: bool = True,
) -> list[str]:
    """Build the command line that evaluates a folder.

    Args:
        folder: A folder that an attached model was saved to, or a repository of the Hugging Face Hub.
        tasks: Names of tasks.
        output: Where lmms-eval writes its results.
        processes: More than one are started by accelerate.
        options: Arguments of the model, such as `text_encoder`; None leaves one out.
        extra: Arguments of lmms-eval. `--model_args` among them are added to the model's; others replace these here.
        cuda: Whether there is a GPU; several processes do not take one otherwise.

    Raises:
        ConfigError: If the folder was not trained with covft, or an argument of the model cannot be written down.
        CheckpointError: If the folder is a repository that cannot be fetched.
    """
    rest, theirs = _without_model_args(extra)
    model = MODELS.get(_model_type(folder, (options or {}).get("base")), "covft_huggingface")
    given = {"pretrained": str(folder), **(options or {})}
    ours = [f"{name}={_plain(name, value)}" for name, value in given.items() if value is not None]
    start = [sys.executable, "-m"]
    if processes > 1:
        # Its --cpu would start a single process.
        on_cpu = [] if cuda else ["env", "ACCELERATE_USE_CPU=true"]
        start = [*on_cpu, *start, "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
        start += ["--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no"]
        start += ["--dynamo_backend", "no", "-m"]
    return [
        *start,
        "lmms_eval",
        *("--model", model, "--model_args", ",".join([*ours, *theirs]), "--tasks", ",".join(tasks)),
        *("--batch_size", "1", "--output_path", str(output), "--log_samples"),
        *rest,
    ]


def check_installed() -> None:
    """Refuse to start where lmms-eval is missing.

    Raises:
        MissingDependencyError: If it is.
    """
    if importlib.util.find_spec("lmms_eval") is None:
        raise MissingDependencyError(
            "This evaluation needs lmms-eval, which is not installed.", fix='pip install "covft[lmms-eval]"'
        )


def _model_type(folder: str, base: str | None) -> str:
    """Read the type of a saved model; empty if only its base has it, and that is not a folder here."""
    found = local_folder(folder, _CONFIGS, "a folder that an attached model was saved to, or a repository")
    if not (found / FOLDER / CONFIG_NAME).is_file():
        raise ConfigError(
            f"{folder} was not trained with covft.",
            expected=f"a folder with {FOLDER}/{CONFIG_NAME} in it",
            got=", ".join(sorted(path.name for path in found.iterdir())) if found.is_dir() else "no such folder",
            fix="lmms-eval itself evaluates other models",
        )
    for place in (found, Path(base or "")):
        if (place / "config.json").is_file():
            return str(read_strictly(place / "config.json").get("model_type"))
    return ""


def _without_model_args(extra: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the arguments of lmms-eval into all others, and those of the model."""
    rest, found, words = [], [], iter(extra)
    for word in words:
        name, equals, value = word.partition("=")
        if name in _MODEL_ARGS:
            found.append(value if equals else next(words, ""))
        else:
            rest.append(word)
    return rest, [value for value in found if value]


def _plain(name: str, value: str) -> str:
    """Refuse a value that lmms-eval would cut: it splits the arguments of a model at commas and equals signs."""
    if set(value) & set(",="):
        raise ConfigError(
            f"lmms-eval cannot be given {name}={value!r}.", expected="no comma and no equals sign", got=repr(value)
        )
    return value


# ------------------------------------------------------------------------------------------- results


@dataclass(frozen=True)
class Score:
    """A metric of a task.

    Attributes:
        task: Name of the task.
        metric: Name of the metric.
        value: Its value, on the scale of lmms-eval.
        error: Its standard error; None if there is none.
        samples: How many questions the task has; None for a group of tasks.
    """

    task: str
    metric: str
    value: float
    error: float | None = None
    samples: int | None = None


@dataclass(frozen=True)
class Results:
    """What lmms-eval has written in a run.

    Attributes:
        path: The file.
        scores: The metrics of all tasks.
        samples: The files with the answers, by task.
    """

    path: Path
    scores: tuple[Score, ...]
    samples: Mapping[str, Path] = field(default_factory=dict)


def read_results(path: Path, tasks: Iterable[str]) -> Results:
    """Read a result file.

    Args:
        path: The file.
        tasks: The tasks that were asked for.

    Raises:
        EvaluationError: If it is damaged, or a task has no number in it.
    """
    content = results_of(path)
    scores = [score for task in content["results"] for score in _scores(content, task)]
    scores += [score for group in content.get("groups") or {} for score in _scores(content, group, "groups")]
    scores = list(dict.fromkeys(scores))
    members = content.get("group_subtasks") or {}
    having = {score.task for score in scores}
    lacking = [task for task in tasks if "*" not in task and not having & {_name(task), task, *members.get(task, ())}]
    if lacking or not scores:
        raise EvaluationError(
            f"lmms-eval has no numbers for {', '.join(lacking) or 'any task'}.",
            expected=f"a metric of each task in {path.name}",
            got=", ".join(f"{score.task} {score.metric}" for score in scores) or "none",
            fix="read the metrics that need a judge or an upload from the files that lmms-eval names",
        )
    stamp = path.name.removesuffix("_results.json")
    samples = {task: path.with_name(f"{stamp}_samples_{task}.jsonl") for task in having}
    return Results(path, tuple(scores), {task: file for task, file in samples.items() if file.is_file()})


def _scores(content: Mapping[str, Any], task: str, part: str = "results") -> list[Score]:
    values = content[part][task]
    count = (content.get("n-samples") or {}).get(task) or {}
    found = []
    for key, value in values.items():
        name, comma, filtered = key.partition(",")
        if not comma or "_stderr" in name or not _is_number(value):
            continue
        error = values.get(f"{name}_stderr,{filtered}")
        metric = name if filtered == "none" else f"{name} ({filtered})"
        found.append(
            Score(task, metric, float(value), float(error) if _is_number(error) else None, count.get("effective"))
        )
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _name(task: str) -> str:
    """Return the name of a task that was given by its file."""
    return Path(task).stem
