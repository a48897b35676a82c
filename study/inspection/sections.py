"""Sections of the page: how far towers of two tasks come apart, and whether a trained covft uses its text."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from covft import metrics
from study.inspection import draw
from study.results.formats import NOTHING, Table, number, p_value
from study.results.formats import signed as signed_points

INSPECT = "python -m study inspect"
TWO_TASKS, TWO_AND_OTHER, ONE_TASK = (
    "two tasks, the same pictures", "two tasks, other pictures", "one task, other pictures"
)  # fmt: skip
TOLD = {
    "right": "the question",
    "swapped": "another question",
    "generic": "one text for all",
    "blank": "nothing (zeros)",
}


def distance_section(found: Mapping[str, Any], folder: Path) -> list[str]:
    """Return the paragraphs about towers of two tasks, and draw their figure.

    Args:
        found: What `study.inspection.distance.measure` returned.
        folder: Where the figure goes.
    """
    groups = groups_of(found)
    draw.write(folder, "distance", lambda: draw.draw_distance(found, groups))
    settings = found["settings"]
    return [
        "## Do towers of two tasks come apart?",
        "In the paper's Fig. 1c, the L2 distance between a tower tuned on grounding and one tuned on captioning, on "
        "the same pictures, grows steadily during training, most of all in deep blocks. It has no control: two "
        "trainings on one task come apart, too. Here full tuning trains four towers from the start of all runs, each "
        f"on grounding or captioning, with one half or the other of {2 * found['pictures']:,} pictures: "
        f"{settings['steps']} steps of {found['batch']} questions, each about another picture, seed "
        f"{settings['seed']}. Two towers of one half saw the same pictures in the same order.",
        distance_table(found).markdown(),
        told_of_distance(found),
        f"![L2 distance of pairs of towers, over training and by block: {', '.join(groups)}](distance.svg)"
        "{ .scrolls }",
        beside(
            ["what it shows", "what it does not"],
            [
                "How far two towers are apart, and how far two trainings on one task are. The cosine is that of their "
                "changes since the start: 1 if both moved the same way, 0 if at random. Blocks have the same number "
                "of weights; the last block is not read, so it stays.",
                "That distance harms: weights also come apart by noise, and AdamW moves them about as far whatever the "
                "gradients' size. The distance flattens as the learning rate decays. It is one seed and a short "
                "training, so the two values in a cell are no interval.",
            ],
        ),
        f"```bash\n{INSPECT}\n```",
    ]


def groups_of(found: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the pairs of towers by what differs between the two."""
    groups: dict[str, list[str]] = {TWO_TASKS: [], TWO_AND_OTHER: [], ONE_TASK: []}
    for pair in found["pairs"]:
        (task, half), (other_task, other_half) = (found["towers"][int(tower)] for tower in pair.split())
        group = ONE_TASK if task == other_task else TWO_TASKS if half == other_half else TWO_AND_OTHER
        groups[group].append(pair)
    return groups


def distance_table(found: Mapping[str, Any]) -> Table:
    """Tabulate the distances after the last step, block by block."""
    groups = groups_of(found)
    table = Table(
        "Distance", ["block", *groups, "first column / third", "cosine, two tasks", "cosine, one task"]
    )  # fmt: skip
    for block in [*(name for name in _last(found, groups[ONE_TASK][0]) if name), ""]:
        apart = {name: [_last(found, pair)[block][0] for pair in pairs] for name, pairs in groups.items()}
        cosines = (
            [_last(found, pair)[block][2] for pair in groups[name]] for name in (TWO_TASKS, ONE_TASK)
        )  # fmt: skip
        ratio = sum(apart[TWO_TASKS]) / sum(apart[ONE_TASK])
        table.rows.append(
            [
                block or "all weights",
                *(", ".join(f"{value:.3f}" for value in sorted(values)) for values in apart.values()),
                f"{ratio:.2f}",
                *(", ".join(_cosine(value) for value in values) for values in cosines),
            ]
        )
    table.notes.append("L2 distances after the last step, of two pairs of towers each.")
    return table


def told_of_distance(found: Mapping[str, Any]) -> str:
    """Say in words what stands beside the paper's finding."""
    groups = groups_of(found)
    two, one = ([_last(found, pair)[""][0] for pair in groups[name]] for name in (TWO_TASKS, ONE_TASK))
    shown = f"{_both(two)} against {_both(one)}"
    if min(two) > max(one):
        said = f"**Towers of two tasks are further apart than towers of one**: {shown}."
    elif max(two) < min(one):
        said = f"**Towers of two tasks are less far apart than towers of one**: {shown}."
    else:
        said = f"**Towers of two tasks are not shown to be further apart than towers of one**: {shown}."
    grows = all(_grows([step[""][0] for step in found["pairs"][pair]]) for pair in groups[TWO_TASKS])
    also = all(_grows([step[""][0] for step in found["pairs"][pair]]) for pair in groups[ONE_TASK])
    if grows:
        said += " The distance grows from step to step, as in the paper"
        said += "; it does so for one task, too." if also else ", and not always for one task."
    blocks = [name for name in _last(found, groups[TWO_TASKS][0]) if name]
    summed = {
        name: [sum(_last(found, pair)[block][0] for pair in groups[name]) for block in blocks]
        for name in (TWO_TASKS, ONE_TASK)
    }
    farthest = {name: blocks[values.index(max(values))] for name, values in summed.items()}
    return (
        f"{said} It is largest in block {farthest[TWO_TASKS]} of {', '.join(blocks)} for two tasks, and in block "
        f"{farthest[ONE_TASK]} for one; the paper has deep blocks."
    )


def audit_section(found: Mapping[str, Any]) -> list[str]:
    """Return the paragraphs about the audit of a trained covft.

    Args:
        found: What `study.inspection.conditioning.audited` returned.
    """
    return [
        "## Is the text used?",
        "The [audit](../guides/analysis.md) of the same trained covft: it answers the same questions four times, with "
        "the same prompts. Only what the tower is told changes: the question, another question of these, one text for "
        f"all (`{found['generic']}`), or zeros. {len(found['tasks']):,} held-out questions, two about each of "
        f"{len(set(found['pictures'])):,} pictures, of all tasks but captions, which are not right or wrong.",
        audit_table(found).markdown(),
        told_of_audit(found),
        beside(
            ["what it shows", "what it does not"],
            [
                "Whether the answers of this model depend on the text that its tower reads. Differences are paired by "
                "question, and by picture where both of its questions have to be right.",
                "That conditioning helps: the model was trained with the right texts, so any other text is new to it. "
                "What text is worth in training is in the [controls](index.md#controls). Intervals are of the "
                "questions alone: it is one run.",
            ],
        ),
        f"```bash\n{INSPECT}\n```",
    ]


def audit_table(found: Mapping[str, Any]) -> Table:
    """Tabulate scores by what the tower was told, in percent and points, with their intervals."""
    from study.inspection.conditioning import both_right, read

    audit = read(found)
    both = {name: {0: {"score": values}} for name, values in both_right(found).items()}
    table = Table(
        "Audit",
        ["the tower is told", "right answers, %", "the question, minus this", "p (Holm)", "both of a picture right, %",
         "the question, minus this"],
    )  # fmt: skip
    for name, told in TOLD.items():
        own = [told, _percent(audit.means[name]), NOTHING, NOTHING, _percent(metrics.bootstrap(both[name])), NOTHING]
        if name in audit.differences:
            own[2], own[3] = _points(audit.differences[name]), p_value(audit.p_values[name])
            own[5] = _points(metrics.paired_bootstrap(both["right"], both[name]))
        table.rows.append(own)
    return table


def told_of_audit(found: Mapping[str, Any]) -> str:
    """Say in words what the audit found."""
    from study.inspection.conditioning import read

    audit = read(found)
    swapped = audit.differences["swapped"]
    if audit.uses_text:
        return f"**The text is used**: another question in its place costs {_points(swapped)} points."
    return f"**The text is not shown to be used**: another question in its place costs {_points(swapped)} points."


def beside(header: list[str], row: list[str]) -> str:
    """Return a table of one row of text."""
    return Table("", header, [row], text=frozenset(range(len(header)))).markdown()


def signed(value: float, digits: int = 2) -> str:
    """Write a number with its sign, with a true minus."""
    return f"{value:+.{digits}f}".replace("-", "−")


def _last(found: Mapping[str, Any], pair: str) -> dict[str, list[Any]]:
    return found["pairs"][pair][-1]


def _grows(values: list[float]) -> bool:
    return all(one < other for one, other in itertools.pairwise(values))


def _both(values: list[float]) -> str:
    return " and ".join(f"{value:.3f}" for value in sorted(values))


def _cosine(value: float | None) -> str:
    return "unknown" if value is None else signed(value)


def _percent(found: metrics.Estimate) -> str:
    return f"{number(100 * found.mean)} [{number(100 * found.low)},\u00a0{number(100 * found.high)}]"


def _points(found: metrics.Estimate) -> str:
    return (
        f"{signed_points(100 * found.mean)} [{signed_points(100 * found.low)},\u00a0{signed_points(100 * found.high)}]"
    )
