"""The kinds of question: twelve tasks in the three groups of the CoVFT paper, and the conflict of its Fig. 1b.

The conflict is captioning and grounding: what is there, and where it is, asked about the same images. It is reported
beside the twelve. Grounding answers with the name of a cell, whose box is always the same, so two answers' boxes
overlap completely or not at all, and the mean IoU, the share of IoU above 0.5 and exact match are one number; the
metric is exact match.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points

import numpy as np

from covft.errors import ConfigError
from study.data.questions import (
    COUNTED,
    GERMAN,
    LETTERS,
    NAMES,
    SIDES,
    Ask,
    ask_attributes,
    ask_caption,
    ask_choice,
    ask_count,
    ask_diagram,
    ask_difference,
    ask_existence,
    ask_grounding,
    ask_name,
    ask_relation,
    ask_size,
    pick,
)
from study.data.scenes import COLUMNS, ROWS, Scene
from study.data.tiles import COLOURS, DIGITS

GROUPS = ("general", "knowledge", "vision", "conflict")
METRICS = ("exact", "letter", "pairs", "cider", "iou")
ENTRY_POINTS = "covft.study_tasks"


@dataclass(frozen=True)
class Example:
    """One question about one scene.

    Attributes:
        task: Name of the task.
        scene: Index of the scene in its list.
        question: The question.
        answer: The answer.
        subject: What the question is about (a name, a place, a pair).
        pair: Number that the two questions share which are scored together; None for the others.
    """

    task: str
    scene: int
    question: str
    answer: str
    subject: str
    pair: int | None = None


@dataclass(frozen=True)
class Task:
    """One kind of question.

    Attributes:
        name: Its name.
        group: `general`, `knowledge`, `vision`, or `conflict`, which is reported apart.
        tests: What it tests, and the benchmark of the paper that it stands for.
        metric: How answers are scored: `exact`, `letter`, `pairs`, `cider` or `iou`.
        ask: Draws a subject and the answer for a scene; None where the scene does not allow the question.
        phrasings: The question, with `{}` for the subject.
        draws_like: Another task, whose subjects and phrasings it asks in other words; None for its own.
    """

    name: str
    group: str
    tests: str
    metric: str
    ask: Ask
    phrasings: tuple[str, ...]
    draws_like: str | None = None


# Tasks with many subjects have few phrasings, because the text encoder encodes every distinct question.
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "existence", "general", "whether a named thing is there; POPE", "exact",
            ask_existence, ("is there any {} ?", "can you see any {} ?"),
        ),
        Task(
            "choice", "general", "which of three options is there; MMBench", "letter",
            ask_choice(), ("which is in the picture ? {}", "what can you see ? {}"),
        ),
        Task(
            "choice_german", "general", "the same questions in German; MMBench-CN", "letter",
            ask_choice(GERMAN), ("was ist auf dem bild ? {}", "was siehst du ? {}"), draws_like="choice",
        ),
        Task(
            "attributes", "general", "the colour of a thing that is named by its position; GQA", "exact",
            ask_attributes, ("what colour is the thing {} ?", "name the colour of the thing {} ."),
        ),
        Task(
            "word", "knowledge", "reading a word; TextVQA", "exact",
            ask_name("word"), ("what does {} say ?", "read {} .", "which letters are in {} ?"),
        ),
        Task(
            "digit", "knowledge", "reading a handwritten digit; OCRBench", "exact",
            ask_name("digit"), ("which is {} ?", "read {} .", "what number does {} show ?"),
        ),
        Task(
            "diagram", "knowledge", "following an arrow of a diagram; AI2D", "exact",
            ask_diagram, ("where does the arrow from {} lead ?", "what does {} point to ?"),
        ),
        Task(
            "pairs", "vision", "the one difference between near-identical pictures; MMVP", "pairs",
            ask_difference, ("{} ?",),
        ),
        Task(
            "photo", "vision", "what the only photograph shows; RealWorldQA", "exact",
            ask_name("photo"), ("what does {} show ?", "what is in {} ?", "name the subject of {} ."),
        ),
        Task(
            "count", "vision", "how many there are; CV-Bench", "exact",
            ask_count, ("how many {} are there ?", "count the {} .", "what is the number of {} ?"),
        ),
        Task(
            "relation", "vision", "on which side of one thing another one is; CV-Bench", "exact",
            ask_relation, ("on which side is {} ?",),
        ),
        Task(
            "size", "vision", "which thing is bigger, or smaller, than all others; CV-Bench", "exact",
            ask_size, ("what is the {} thing ?", "name the {} thing ."),
        ),
        Task(
            "grounding", "conflict", "where a named thing is; RefCOCO", "exact",
            ask_grounding, ("where is {} ?", "locate {} ."),
        ),
        Task(
            "caption", "conflict", "everything, in reading order; COCO captions", "cider",
            ask_caption, ("describe {} .", "what does {} show ?", "write a caption for {} ."),
        ),
    )
}  # fmt: skip
_OWN = tuple(TASKS)


def register(task: Task) -> None:
    """Add a task of your own to the study.

    Its questions and answers are made of the study's words, because the pretrained language model knows no others.

    Args:
        task: The task; `study.data.questions` has the functions of the study's own tasks as examples.

    Raises:
        ConfigError: If the name is taken, the group or the metric is unknown, or a phrasing has unknown words.
    """
    if task.name in TASKS:
        raise ConfigError(f"the study has a task {task.name!r} already.", expected="a name that is not taken")
    for what, value, known in (("group", task.group, GROUPS), ("metric", task.metric, METRICS)):
        if value not in known:
            raise ConfigError(f"the task {task.name!r} has an unknown {what}.", expected=" | ".join(known), got=value)
    if not task.phrasings:
        raise ConfigError(f"the task {task.name!r} has no phrasings.", expected='such as ("where is {} ?",)')
    for phrasing in task.phrasings:
        _check_words(task.name, phrasing.replace("{}", " "))
    TASKS[task.name] = task


def load_entry_points() -> None:
    """Register the tasks of installed packages: entry points of the group `covft.study_tasks`, each a Task."""
    for entry in entry_points(group=ENTRY_POINTS):
        task = entry.load()
        if TASKS.get(task.name) is not task:
            register(task)


def make_examples(
    scenes: list[Scene], tasks: tuple[str, ...] | None = None, per_task: int | None = None, seed: int = 0
) -> list[Example]:
    """Ask one question per scene and task, where the scene allows it.

    Args:
        scenes: The scenes; `Example.scene` is an index into this list.
        tasks: Names of the tasks; None is all.
        per_task: Maximum number of questions per task; two questions that are scored together count as one.
        seed: Seed of the questions.

    Raises:
        ConfigError: If a registered task uses words that the study does not have.
    """
    names = tuple(TASKS) if tasks is None else tasks
    left = {name: len(scenes) if per_task is None else per_task for name in names}
    complete = _pairs(scenes)
    found: list[Example] = []
    for position, scene in enumerate(scenes):
        for name in names:
            task = TASKS[name]
            paired = task.metric == "pairs"
            if paired and scene.pair not in complete:
                continue
            # seeded by scene and name, so that leaving a task out does not change the others; twins agree
            about = scene.pair if paired and scene.pair is not None else scene.number
            rng = np.random.default_rng([seed, about, zlib.crc32((task.draws_like or name).encode())])
            drawn = task.ask(scene, rng)
            if drawn is None or left[name] == 0:
                continue
            if not paired or complete[scene.pair] == position:
                left[name] -= 1
            subject, answer = drawn
            question = pick(rng, task.phrasings).format(subject)
            if name not in _OWN:
                _check_words(name, f"{question} {answer}")
            found.append(Example(name, position, question, answer, subject, scene.pair if paired else None))
    return found


def _pairs(scenes: list[Scene]) -> dict[int | None, int]:
    """Return the position of the second twin of every complete pair."""
    seen: set[int] = set()
    second: dict[int | None, int] = {}
    for position, scene in enumerate(scenes):
        if scene.pair is not None:
            if scene.pair in seen:
                second[scene.pair] = position
            seen.add(scene.pair)
    return second


def _check_words(name: str, text: str) -> None:
    known = set(all_words())
    unknown = [word for word in text.split() if word not in known]
    if unknown:
        raise ConfigError(
            f"the task {name!r} uses words that the study's language model does not know.",
            expected="words of study.data.tasks.all_words()",
            got=", ".join(dict.fromkeys(unknown)),
        )


def all_words() -> Iterator[str]:
    """Yield every word of the questions, the answers and the word pictures, with repetitions."""
    for name in _OWN:
        for phrasing in TASKS[name].phrasings:
            yield from phrasing.replace("{}", " ").split()
    for names in (*NAMES.values(), SIDES, ROWS, COLUMNS, DIGITS, COUNTED, LETTERS, COLOURS):
        yield from " ".join(names).split()
    yield from GERMAN.values()
    yield from "the photo picture shape thing yes no , seen from which does say show small big or smallest".split()
    yield from "biggest blank arrow rightward leftward upward downward".split()


load_entry_points()
