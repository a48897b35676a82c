"""Sections of the page: how far towers of two tasks come apart, and whether a trained covft uses its text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from covft import metrics
from study.inspection import draw
from study.results.formats import NOTHING, Table, number, p_value, plural
from study.results.formats import signed as signed_points

DISTANCE, COSINE = 0, 2  # places in what was written of a block
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


def distance_section(found: Sequence[Mapping[str, Any]], folder: Path) -> list[str]:
    """Return the paragraphs about towers of two tasks, and draw their figure.

    Args:
        found: What `study.inspection.distance.measure` returned, by seed.
        folder: Where the figure goes.
    """
    groups, settings = groups_of(found[0]), found[0]["settings"]
    draw.write(folder, "distance", lambda: draw.draw_distance(found, groups))
    return [
        "## Do towers of two tasks come apart?",
        "In the paper's Fig. 1c, the L2 distance between a tower tuned on grounding and one tuned on captioning, on "
        "the same pictures, grows steadily during training, most of all in deep blocks. The paper has no control, "
        "and two trainings on one task come apart, too. Here full tuning trains four towers from the start of all "
        "runs, each on grounding or captioning, with one half or the other of "
        f"{2 * found[0]['pictures']:,} pictures: {settings['steps']} steps of {found[0]['batch']} questions, each "
        f"about another picture, with {plural(len(found), 'seed')}. Two towers of one half see the same pictures in "
        "the same order.",
        distance_table(found).markdown(),
        told_of_distance(found),
        f"![L2 distance of pairs of towers, over training and by block: {'; '.join(groups)}](distance.svg)"
        "{ .scrolls }",
        beside(
            ["what it shows", "what it does not"],
            [
                "How far two towers are apart, and how far two trainings on one task are. The cosine is that of their "
                "changes since the start: 1 if both moved the same way, 0 if at random. Blocks have the same number "
                "of weights; the last block is not read, so it stays.",
                "That distance harms. Distances flatten as the learning rate decays, and AdamW moves weights about as "
                "far whatever the gradients' size: how far says less than in which direction. The runs train on all "
                "tasks at once, and for longer.",
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


def distance_table(found: Sequence[Mapping[str, Any]]) -> Table:
    """Tabulate the distances after the last step, block by block."""
    groups = groups_of(found[0])
    table = Table("Distance", ["block", *groups, "first / third", "cosine, two tasks", "cosine, one task"])
    for block in [*_blocks(found), ""]:
        apart = {name: _last(found, pairs, block) for name, pairs in groups.items()}
        cosines = (_last(found, groups[name], block, COSINE) for name in (TWO_TASKS, ONE_TASK))
        ratio = np.mean(apart[TWO_TASKS]) / np.mean(apart[ONE_TASK])
        table.rows.append(
            [
                block or "all weights",
                *(_spread(values) for values in apart.values()),
                f"{ratio:.2f}",
                *(_spread(values, sign="+") for values in cosines),
            ]
        )
    pairs = len(groups[TWO_TASKS])
    table.notes.append(
        f"L2 distances after the last step: mean, lowest and highest of {pairs} pairs of towers with each of "
        f"{plural(len(found), 'seed')}."
    )
    return table


def told_of_distance(found: Sequence[Mapping[str, Any]]) -> str:
    """Say in words what stands beside the paper's finding."""
    groups = groups_of(found[0])
    two, one = (_last(found, groups[name], "") for name in (TWO_TASKS, ONE_TASK))
    if min(two) > max(one):
        said = "**Towers of two tasks are further apart than towers of one**"
    elif max(two) < min(one):
        said = "**Towers of two tasks are less far apart than towers of one**"
    else:
        said = "**Towers of two tasks are not shown to be further apart than towers of one**"
    share = np.mean(one) / np.mean(two)
    said += f": {_spread(two)} against {_spread(one)}, so two trainings on one task have {share:.0%} of the distance. "
    said += f"Of one task, {_by_task(found, groups[ONE_TASK])}. "
    along, together = (np.mean(_last(found, groups[name], "", COSINE)) for name in (TWO_TASKS, ONE_TASK))
    said += (
        f"The changes of two towers of one task have a cosine of {signed(together)} on average, those of two tasks "
        f"{signed(along)}. "
    )
    if all(_grows(one, groups[TWO_TASKS]) for one in found):
        also = all(_grows(one, groups[ONE_TASK]) for one in found)
        said += f"The distance grows during training, as in the paper{'; so does that of one task' * also}. "
    two_by_block, one_by_block = (
        {block: float(np.mean(_last(found, groups[name], block))) for block in _blocks(found)}
        for name in (TWO_TASKS, ONE_TASK)
    )
    ratios = {block: apart / one_by_block[block] for block, apart in two_by_block.items()}
    last = _blocks(found)[-1]
    farthest = max(two_by_block, key=lambda block: two_by_block[block])
    deep = "as in the paper" if farthest == last else "while the paper has deep blocks"
    return (
        f"{said}Of the blocks 0 to {last}, it is largest in block {farthest}, {deep}; compared with that of one task, "
        f"in block {max(ratios, key=lambda block: ratios[block])}."
    )


def audit_section(found: Mapping[str, Any]) -> list[str]:
    """Return the paragraphs about the audit of a trained covft.

    Args:
        found: What `study.inspection.conditioning.audited` returned.
    """
    return [
        "## Is the text used?",
        "The [audit](../guides/diagnose.md#is-the-conditioning-used) of the same trained covft: it answers the same "
        "questions four times, with the same prompts. Only what the tower is told changes: the question, another "
        f"question of these, one text for all (`{found['generic']}`), or zeros. {len(found['tasks']):,} held-out "
        f"questions, two about each of {len(set(found['pictures'])):,} pictures, of all tasks but captions, which are "
        "not right or wrong.",
        audit_table(found).markdown(),
        told_of_audit(found),
        beside(
            ["what it shows", "what it does not"],
            [
                "Whether the answers of this model depend on the text that its tower reads. Differences are paired by "
                "question, and by picture where both of its questions have to be right.",
                "That conditioning helps or does not: the model was trained with the right texts, so any other text "
                "is new to it. What text is worth in training is in the [controls](index.md#controls), which compare "
                "texts in evaluation too, with all questions and more seeds. Intervals here are of the questions "
                "alone: it is one run.",
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


def _blocks(found: Sequence[Mapping[str, Any]]) -> list[str]:
    return [block for block in next(iter(found[0]["pairs"].values()))[-1] if block]


def _by_task(found: Sequence[Mapping[str, Any]], pairs: Sequence[str]) -> str:
    """Write the mean distance of each task's own pairs."""
    tasks = {pair: found[0]["towers"][int(pair.split()[0])][0] for pair in pairs}
    return " and ".join(f"{task} has {np.mean(_last(found, [pair], '')):.2f}" for pair, task in tasks.items())


def _last(found: Sequence[Mapping[str, Any]], pairs: Sequence[str], block: str, what: int = DISTANCE) -> list[float]:
    """Return what was found after the last step, of each pair with each seed."""
    return [one["pairs"][pair][-1][block][what] for one in found for pair in pairs]


def _grows(found: Mapping[str, Any], pairs: Sequence[str]) -> bool:
    return all(found["pairs"][pair][-1][""][DISTANCE] > found["pairs"][pair][0][""][DISTANCE] for pair in pairs)


def _spread(values: Sequence[float], sign: str = "") -> str:
    """Write mean, lowest and highest."""
    mean, low, high = (f"{value:{sign}.2f}".replace("-", "−") for value in (np.mean(values), min(values), max(values)))
    return f"{mean} [{low},\u00a0{high}]"


def _percent(found: metrics.Estimate) -> str:
    return f"{number(100 * found.mean)} [{number(100 * found.low)},\u00a0{number(100 * found.high)}]"


def _points(found: metrics.Estimate) -> str:
    return (
        f"{signed_points(100 * found.mean)} [{signed_points(100 * found.low)},\u00a0{signed_points(100 * found.high)}]"
    )
