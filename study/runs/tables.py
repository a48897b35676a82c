"""Questions as arrays, and the order of training. Everything a step needs is an index into these.

Shapes: N questions, L words of the longest text, A words of the longest answer, S distinct questions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from study.data.scenes import make_scenes
from study.data.tasks import Example, make_examples
from study.runs.settings import RunSettings
from study.runs.sizes import words_of
from study.runs.words import Words

IGNORED = -100
DATA_SEED = 0  # all runs have the same scenes and questions


@dataclass(frozen=True, eq=False)
class Table:
    """Questions, tokenised, padded on the right.

    Attributes:
        examples: The questions.
        words: How the language model reads and writes.
        ids_NL: Question and answer in its format; what comes before (such as `<bos>`, and the picture) is not in it.
        lengths_N: Words of each.
        start_N: Position of the last word before the answer, whose output is the first word of the answer.
        labels_NA: The answer and its end, such as `<eos>`; `IGNORED` where there is none.
        scene_N: Row of the picture.
        text_N: Which of `texts` the question is.
        texts: The distinct questions; one that two tasks ask comes twice.
        tasks: The task of each.
    """

    examples: list[Example]
    words: Words
    ids_NL: np.ndarray
    lengths_N: np.ndarray
    start_N: np.ndarray
    labels_NA: np.ndarray
    scene_N: np.ndarray
    text_N: np.ndarray
    texts: list[str]
    tasks: list[str]


@dataclass(frozen=True, eq=False)
class Part:
    """Pictures of one split, uint8, shape `(scenes, H, W, 3)`, with all questions of all tasks."""

    pictures: np.ndarray
    examples: list[Example]


@lru_cache(maxsize=4)
def load_part(split: str, scenes: int, per_task: int | None) -> Part:
    """Draw scenes and their questions; the same for all runs.

    Args:
        split: `train`, `validation` or `test`.
        scenes: Number of scenes.
        per_task: Questions per task, at most; None for all.
    """
    drawn = make_scenes(split, scenes, DATA_SEED)
    examples = make_examples(drawn, None, per_task, DATA_SEED)
    return Part(np.stack([scene.pixels for scene in drawn]), examples)


def training_part(settings: RunSettings) -> Part:
    """Return the training pictures and questions of a run, before tasks and fraction are chosen."""
    return load_part("train", settings.train_scenes, None)


def held_out_part(settings: RunSettings) -> Part:
    """Return the scored pictures and questions of a run, of all tasks."""
    return load_part(settings.split, settings.held_out_scenes, settings.held_out_questions)


def draw(settings: RunSettings) -> tuple[Table, Table]:
    """Return the questions that a run trains on, and those that it is scored on."""
    told = settings.control != "tower_only"
    return (
        table_of(training_part(settings), settings.tasks, settings.fraction, told, settings.size),
        table_of(held_out_part(settings), settings.scored, 1.0, told, settings.size),
    )


def chosen(part: Part, tasks: tuple[str, ...], fraction: float = 1.0) -> list[Example]:
    """Return the questions of some tasks, about the first share of the scenes."""
    count = max(1, round(fraction * len(part.pictures)))
    return [example for example in part.examples if example.task in tasks and example.scene < count]


def make_table(examples: list[Example], words: Words | None = None, *, with_question: bool = True) -> Table:
    """Tokenise questions.

    Args:
        examples: The questions.
        words: How the language model reads and writes; by default as the small one.
        with_question: Whether the language model is given them; else only the format around them.
    """
    words = words or words_of("small")
    questions, said = list({e.question: None for e in examples}), list({e.answer: None for e in examples})
    given = questions if with_question else [""] * len(questions)
    asked = dict(zip(questions, words.asked_ids(given), strict=True))
    answers = dict(zip(said, words.answered_ids(said), strict=True))
    texts: dict[tuple[str, str], int] = {}
    text_N = np.array([texts.setdefault((e.task, e.question), len(texts)) for e in examples])
    rows = [(asked[e.question], answers[e.answer]) for e in examples]
    lengths = np.array([len(before) + len(after) for before, after in rows])
    ids_NL = np.full((len(rows), lengths.max()), words.pad)
    labels_NA = np.full((len(rows), max(len(after) for _, after in rows)), IGNORED)
    for row, (before, after) in enumerate(rows):
        ids_NL[row, : lengths[row]] = before + after
        labels_NA[row, : len(after)] = after
    return Table(
        examples=examples,
        words=words,
        ids_NL=ids_NL,
        lengths_N=lengths,
        start_N=np.array([len(before) - 1 for before, _ in rows]),
        labels_NA=labels_NA,
        scene_N=np.array([e.scene for e in examples]),
        text_N=text_N,
        texts=[question for _, question in texts],
        tasks=[task for task, _ in texts],
    )


@lru_cache(maxsize=16)
def table_of(
    part: Part, tasks: tuple[str, ...], fraction: float = 1.0, with_question: bool = True, size: str = "small"
) -> Table:
    """Return `make_table` of the questions that `chosen` returns, for the language model of a size."""
    return make_table(chosen(part, tasks, fraction), words_of(size), with_question=with_question)


def training_order(table: Table, steps: int, batch: int, per_picture: int, seed: int) -> np.ndarray:
    """Return the questions of each step, shape `(steps, batch)`: `per_picture` about each picture, side by side.

    All pictures are shown before one is shown again. It depends on nothing else, so all methods see the same batches.

    Args:
        table: The questions.
        steps: Number of steps.
        batch: Questions per step.
        per_picture: Different questions about a picture; with fewer in the table, some come twice.
        seed: Seed of the order.
    """
    rng = np.random.default_rng([3, seed])
    scenes, counts = np.unique(table.scene_N, return_counts=True)
    by_scene = np.argsort(table.scene_N, kind="stable")
    first = np.concatenate([[0], np.cumsum(counts)[:-1]])
    wanted = steps * batch // per_picture
    rounds = -(-wanted // len(scenes))
    shown = np.concatenate([rng.permutation(len(scenes)) for _ in range(rounds)])[:wanted]
    keys = rng.random((wanted, counts.max()))
    keys[np.arange(counts.max())[None] >= counts[shown][:, None]] = 2.0  # not there, so last
    drawn = np.argsort(keys, axis=1)[:, :per_picture]
    places = np.arange(per_picture)[None] % np.minimum(counts[shown], per_picture)[:, None]
    picked = by_scene[first[shown][:, None] + np.take_along_axis(drawn, places, axis=1)]
    return picked.reshape(steps, batch)


def shuffled_within(rows: np.ndarray, seed: int) -> np.ndarray:
    """Return an array with each row in random order.

    Args:
        rows: Shape `(steps, batch)`.
        seed: Seed of the order.
    """
    return np.random.default_rng([5, seed]).permuted(rows, axis=1)
