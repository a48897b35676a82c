"""Reads the scores of benchmarks from what an engine has written.

    lmms-eval     FOLDER/**/<date>_results.json, and <date>_samples_<task>.jsonl beside it (--log_samples)
    VLMEvalKit    FOLDER/**/<model>_<data set>_acc.csv, ..._score.csv, or the same as .json (EVAL_FORMAT=json)

A benchmark without a usable number is named with the reason; it never counts as 0.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from covft.errors import EvaluationError
from covft.integrations.evaluation.benchmarks import BENCHMARKS, ENGINES, PAPER, Entry, entries_of
from covft.utils.arguments import check_kinds, short

_RESULTS = "_results.json"
_SCORES = tuple(f"_{kind}.{ending}" for kind in ("acc", "score") for ending in ("csv", "json"))


@dataclass(frozen=True)
class Scores:
    """Scores of one model.

    Attributes:
        engine: Which engine wrote them.
        values: Score by benchmark, on the papers' scale: MME to 2000, captions as 100 x CIDEr, others to 100.
        missing: Why there is no score, by benchmark.
        partial: Questions asked and questions there are, by benchmark, where `--limit` cut them.
        files: The file of each score.
    """

    engine: str
    values: Mapping[str, float]
    missing: Mapping[str, str]
    partial: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)


class _NoScore(Exception):
    """Why a file has no score of a benchmark."""


@check_kinds
def read_scores(folder: str | Path, names: Iterable[str] = PAPER, *, engine: str | None = None) -> Scores:
    """Read the scores of benchmarks from a folder of results.

    Of several runs of a task, the last one counts, by the date in the names of files and folders.

    Args:
        folder: What `--output_path` of lmms-eval or `--work-dir` of VLMEvalKit named, a folder inside it, or one file.
            It has the results of one model.
        names: Names of benchmarks, as in `covft.metrics.PAPER_GROUPS`.
        engine: `"lmms-eval"` or `"vlmevalkit"`; None finds out.

    Raises:
        EvaluationError: If there are no results, results of both engines or of several models, or a file is damaged.
        ConfigError: If the engine is not known.

    Example:
        >>> read_scores("evaluation/llava-covft").missing  # doctest: +SKIP
        {'MMBench-cn': 'mmbench_cn_dev was not run'}
    """
    place = Path(folder)
    found = {
        "lmms-eval": lmms_results(place),
        "vlmevalkit": [path for path in _files(place, _SCORES) if _data_set(path)],
    }
    engine = _engine(place, found, engine)
    read: Callable[[list[Path]], _Reader] = {"lmms-eval": _LmmsEval, "vlmevalkit": _VLMEvalKit}[engine]
    reader, entries = read(found[engine]), entries_of(engine)
    values: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name in names:
        entry = entries.get(name)
        try:
            if entry is None:
                raise _NoScore(f"{engine} does not have it")
            values[name] = _scaled(entry, reader.score(entry))
        except _NoScore as reason:
            missing[name] = str(reason)
    of_task = {name: entries[name].task for name in values}
    return Scores(
        engine,
        values,
        missing,
        {name: reader.partial[task] for name, task in of_task.items() if task in reader.partial},
        {name: reader.files[task] for name, task in of_task.items()},
    )


def lmms_results(place: str | Path) -> list[Path]:
    """Return the result files of lmms-eval in a folder, or the one file that is given.

    Their names begin with the date; those of submissions, which some tasks write, do not.
    """
    return [path for path in _files(Path(place), (_RESULTS,)) if path.name[0].isdigit()]


def _files(place: Path, endings: tuple[str, ...]) -> list[Path]:
    """Return the files with some endings, each once although links point to it, by name."""
    listed = [place] if place.is_file() else sorted(place.rglob("*"))
    files = [path for path in listed if path.name.endswith(endings) and path.is_file()]
    return list({path.resolve(): path for path in files})


def _engine(place: Path, found: Mapping[str, list[Path]], engine: str | None) -> str:
    if engine is not None:
        entries_of(engine)
    having = [name for name in ENGINES if found[name] and engine in (None, name)]
    if len(having) == 1:
        return having[0]
    listed = [path.name for paths in found.values() for path in paths] or (
        sorted(path.name for path in place.iterdir())[:8] if place.is_dir() else ["no such folder"]
    )
    raise EvaluationError(
        f"{place} has results of {' and of '.join(having)}." if having else f"{place} has no results.",
        expected=f"*{_RESULTS} of lmms-eval, or *_acc.csv and *_score.csv of VLMEvalKit",
        got=", ".join(listed[:8]) or "an empty folder",
        fix="give the folder of one engine" if having else "run covft evaluate first; read its log if it has run",
    )


def _scaled(entry: Entry, value: Any) -> float:
    number = _number(value)
    if number is None:
        raise _NoScore(f"{entry.metric} of {entry.task} is {short(value)}")
    if not 0 <= number * entry.scale <= entry.best * (1 + 1e-6):
        raise _NoScore(f"{entry.metric} of {entry.task} is {number:g}, out of 0 to {entry.best / entry.scale:g}")
    return number * entry.scale


def _number(value: Any) -> float | None:
    try:
        number = float(value) if not isinstance(value, bool) and isinstance(value, int | float | str) else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None


class _Reader:
    """What an engine has written, by task.

    Attributes:
        files: The file of each task.
        partial: Questions asked and questions there are, of tasks that were cut.
    """

    def __init__(self) -> None:
        self.files: dict[str, Path] = {}
        self.partial: dict[str, tuple[int, int]] = {}

    def score(self, entry: Entry) -> Any:
        """Return the value of an entry, on the engine's scale."""
        raise NotImplementedError

    def require(self, entry: Entry) -> Path:
        """Return the file of an entry's task."""
        if entry.task not in self.files:
            raise _NoScore(f"{entry.task} was not run")
        return self.files[entry.task]


class _LmmsEval(_Reader):
    def __init__(self, paths: list[Path]) -> None:
        super().__init__()
        self.results: dict[str, Mapping[str, Any]] = {}
        contents = {
            path: results_of(path) for path in sorted(paths, key=lambda path: path.name)
        }  # which begins with the date
        _one_model({_model_of(content): path for path, content in contents.items()})
        for path, content in contents.items():
            for task, metrics in content["results"].items():
                if isinstance(metrics, dict):
                    self.files[task], self.results[task] = path, metrics
                    self._count(task, (content.get("n-samples") or {}).get(task))

    def _count(self, task: str, counts: Any) -> None:
        self.partial.pop(task, None)
        if isinstance(counts, dict):
            asked, there = counts.get("effective"), counts.get("original")
            if isinstance(asked, int) and isinstance(there, int) and asked < there:
                self.partial[task] = (asked, there)

    def score(self, entry: Entry) -> Any:
        path = self.require(entry)
        if entry.source is not None:
            return self._of_source(entry, path)
        # The key is "metric,filter"; a task has one filter.
        found = [value for key, value in self.results[entry.task].items() if key.partition(",")[0] == entry.metric]
        if not found:
            raise _NoScore(f"{entry.task} has no {entry.metric}")
        if len(found) > 1:
            raise _NoScore(f"{entry.task} has {entry.metric} {len(found)} times, by filter")
        return found[0]

    def _of_source(self, entry: Entry, path: Path) -> float:
        """Average the logged answers whose `source` is the entry's."""
        samples = path.with_name(f"{path.name.removesuffix(_RESULTS)}_samples_{entry.task}.jsonl")
        if not samples.is_file():
            raise _NoScore(
                f"{entry.task} has no logged samples (--log_samples), whose source tells the benchmarks apart"
            )
        hits = []
        for number, row in enumerate(_json_lines(samples), 1):
            answer = row.get(entry.metric) if isinstance(row, dict) else None
            if not isinstance(answer, dict) or not isinstance(answer.get("is_correct"), bool):
                raise EvaluationError(
                    f"Line {number} of {samples} is not an answer of {entry.task}.",
                    expected=f"{entry.metric} with source and is_correct",
                    got=short(answer),
                )
            if answer.get("source") == entry.source:
                hits.append(answer["is_correct"])
        if not hits:
            raise _NoScore(f"{samples.name} has no answer with source {entry.source}")
        return sum(hits) / len(hits)


def _model_of(content: Mapping[str, Any]) -> str:
    """Return what tells a model from others in a result file."""
    config = content.get("config")
    return f"{content.get('model_name') or ''} {config.get('model_args') if isinstance(config, dict) else ''}".strip()


class _VLMEvalKit(_Reader):
    def __init__(self, paths: list[Path]) -> None:
        super().__init__()
        _one_model({_data_set(path)[1]: path for path in paths})  # type: ignore[index]
        for path in sorted(paths, key=lambda path: path.resolve().parent.name):  # whose folder has the date
            self.files[_data_set(path)[0]] = path  # type: ignore[index]

    def score(self, entry: Entry) -> Any:
        path = self.require(entry)
        rows = _table(path)
        if len(rows) > 1:
            raise _NoScore(f"{path.name} has {len(rows)} rows, where one split is expected")
        if not rows or entry.metric not in rows[0]:
            raise _NoScore(f"{path.name} has no column {entry.metric}")
        return rows[0][entry.metric]


_DATA_SETS = sorted({entry.task for entry in BENCHMARKS["vlmevalkit"].values()}, key=len, reverse=True)


def _data_set(path: Path) -> tuple[str, str] | None:
    """Return data set and model of a score file, or None if it is of another data set."""
    stem = next(path.name.removesuffix(ending) for ending in _SCORES if path.name.endswith(ending))
    for name in _DATA_SETS:
        if stem.endswith(f"_{name}"):
            return name, stem.removesuffix(f"_{name}")
    return None


def _table(path: Path) -> list[dict[str, Any]]:
    """Read a score file: a table as csv, or as json of rows, of columns, or of names and numbers."""
    if path.suffix == ".csv":
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                return list(csv.DictReader(file, strict=True))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise _damaged(path, "csv with one row", error) from error
    content = _load(path, path.read_text, "JSON")
    if isinstance(content, list) and all(isinstance(row, dict) for row in content):
        return content
    if isinstance(content, dict) and content and all(isinstance(column, dict) for column in content.values()):
        places = list(dict.fromkeys(place for column in content.values() for place in column))
        return [{name: column.get(place) for name, column in content.items()} for place in places]
    if isinstance(content, dict):
        return [content]
    raise _damaged(path, "a table", TypeError(type(content).__name__))


def _one_model(paths: Mapping[str, Path]) -> None:
    if len(paths) > 1:
        raise EvaluationError(
            "There are results of several models.",
            expected="those of one; a folder for each",
            got="; ".join(f"{model or 'unnamed'} in {path}" for model, path in list(paths.items())[:4]),
            fix="give the folder of one model",
        )


def results_of(path: Path) -> dict[str, Any]:
    """Read a result file of lmms-eval.

    Args:
        path: The file.

    Raises:
        EvaluationError: If it is damaged.
    """
    content = _load(path, path.read_text, "JSON")
    if not isinstance(content, dict) or not isinstance(content.get("results"), dict):
        raise _damaged(path, "an object with results", TypeError(type(content).__name__))
    return content


def _json_lines(path: Path) -> list[Any]:
    text = _load(path, path.read_text, "text", parse=str)
    lines = [line for line in text.split("\n") if line.strip()]
    return [_load(path, lambda encoding, line=line: line, "one JSON object a line") for line in lines]


def _load(path: Path, read: Callable[..., str], expected: str, parse: Callable[[str], Any] = json.loads) -> Any:
    try:
        return parse(read(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, expected, error) from error


def _damaged(path: Path, expected: str, error: Exception) -> EvaluationError:
    return EvaluationError(
        f"{path} is damaged.",
        expected=expected,
        got=f"{type(error).__name__}: {str(error)[:200]}",
        fix="evaluate the task again",
    )
