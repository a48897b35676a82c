"""The studies: which groups of runs belong to each, and what they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from covft.errors import ConfigError
from study.data.tasks import TASKS
from study.results.load import Group, Row, groups_of

GROUPS = {
    name: tuple(task.name for task in TASKS.values() if task.group == name)
    for name in dict.fromkeys(task.group for task in TASKS.values())
}
TWELVE = tuple(task for name, tasks in GROUPS.items() if name != "conflict" for task in tasks)
PAIR = GROUPS["conflict"]
TITLES = {"general": "General", "knowledge": "Knowledge", "vision": "Vision"}


@dataclass(frozen=True)
class Study:
    """A question, and the runs that answer it.

    Attributes:
        name: Name in the rows and on the command line.
        title: Heading.
        text: What is asked, and which table or figure of the paper asks it.
        references: Methods that every group is compared with.
        part: Splits the runs into parts, each with references of its own; None for one part.
        part_title: What a part is, as the title of a column.
        part_form: Format of a part.
    """

    name: str
    title: str
    text: str
    references: tuple[str, ...] = ("full", "covft")
    part: Callable[[dict[str, Any]], Hashable] | None = None
    part_title: str = ""
    part_form: str = "{}"


STUDIES = {
    study.name: study
    for study in (
        Study(
            "methods", "Methods",
            "Every way to tune the tower (Table 1 of the paper, and the context-aware methods of its supplement).",
            ("frozen", "full"),
        ),
        Study(
            "controls", "Controls",
            "CoVFT with the question taken away in different ways. Whatever remains of its gain over the frozen tower "
            "is not made by the question. The paper has none of these.",
            ("frozen", "covft"),
        ),
        Study("context", "Context and routing", "What the routing depends on, and how experts are mixed (Table 2)."),
        Study("placement", "Placement", "Which blocks get experts (Table 4)."),
        Study("experts", "Number of experts", "Experts per adapted block (Table 5)."),
        Study(
            "diversity", "Experts over task diversity",
            "The number of experts, when the training data has fewer or more kinds of task (Table 6).",
            ("full",), lambda settings: len(settings.get("tasks") or TWELVE), "tasks",
        ),
        Study("text_encoder", "Text encoder", "Features of the question from MiniLM, a bag of words, or random ones."),
        Study(
            "matched", "The same number of parameters",
            "Other methods, with about as many trained parameters as CoVFT (Table 7). The claim compares those whose "
            "numbers differ by a quarter at most.",
        ),
        Study(
            "fraction", "Data fraction", "A part of the training data, and of the steps (Fig. 4).",
            ("frozen", "full"), lambda settings: 100 * settings.get("fraction", 1.0), "data", "{:g}%",
        ),
        Study(
            "tower", "Another tower",
            "The same comparison with another tower (Table 3). A row with a learning rate in its name has one that was "
            "searched for this tower on validation scenes; the others have that of the size's own tower, which may not "
            "suit this one.",
            ("frozen", "full"), lambda settings: settings.get("tower", "small_vit"), "tower",
        ),
        Study("start", "Start of the experts", "Experts copied from the FFN or low-rank, and their rank."),
        Study(
            "tokens", "Tokens kept",
            "How many visual tokens the language model gets: the fewer, the more the tower has to choose.",
            ("frozen", "full"), lambda settings: settings.get("tokens"), "tokens",
        ),
        Study(
            "forgetting", "Tuning against forgetting",
            "The language side is tuned on new tasks (downstream) and scored on the old ones too (upstream), as in the "
            "second paper.",
        ),
    )
}  # fmt: skip


def chosen(names: str | None) -> list[Study]:
    """Return the studies of these names, separated by commas; all without names.

    Raises:
        ConfigError: If there is none of a name.
    """
    wanted = list(STUDIES) if names is None else [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in STUDIES:
            raise ConfigError(
                f"study={name} is not one of the studies.",
                expected=", ".join(STUDIES),
                got=name,
                fix="python -m study table --study methods",
            )
    return [STUDIES[name] for name in wanted]


def method_of(group: Group) -> str:
    """Return the method of a group, `"frozen"` for none."""
    method = group.settings.get("method", "")
    return "frozen" if method == "none" else method


def role_of(group: Group) -> str | None:
    """Return which reference a group may be: its method, if it has no control."""
    return method_of(group) if group.settings.get("control", "none") == "none" else None


@dataclass
class Results:
    """The groups of one size.

    Attributes:
        size: Its name.
        groups: The groups.
        rows: Their runs.
        planned: Labels of the groups that each study is to have, where verdicts are asked for.
    """

    size: str
    groups: list[Group]
    rows: list[Row] = field(default_factory=list)
    planned: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, size: str, rows: list[Row], split: str = "test") -> Results:
        """Group the rows of a split."""
        return cls(size, groups_of(rows, split), [row for row in rows if row.split == split])

    def missing(self, study: str) -> list[str]:
        """Return the labels of the planned groups of a study that have no row."""
        known = {group.label for group in self.groups}
        return [label for label in self.planned.get(study, ()) if label not in known]

    def main(self, role: str) -> Group | None:
        """Return the group of a method that stands for it everywhere; of several, that with the shortest label."""
        found = [group for group in self.groups if role_of(group) == role and "methods" in group.studies]
        return min(found, key=lambda group: len(group.label), default=None)

    def parts(self, study: Study) -> dict[Hashable, list[Group]]:
        """Return the groups of a study by part, references first; one part None where a study has no parts."""
        own = [group for group in self.groups if study.name in group.studies]
        if not own:
            return {}
        mains = [group for role in study.references if (group := self.main(role)) is not None]
        if study.part is None:
            return {None: _once([*mains, *own])}
        found: dict[Hashable, list[Group]] = {}
        for group in own:
            found.setdefault(study.part(group.settings), []).append(group)
        covft = self.main("covft")
        for group in [*mains, *([covft] if covft is not None else [])]:
            part = study.part(group.settings)
            if part in found:
                found[part].append(group)
        return {part: _once(_references_first(groups, study)) for part, groups in sorted(found.items(), key=_order)}

    def reference(self, study: Study, groups: list[Group], role: str) -> Group | None:
        """Return the group of a part that stands for a method."""
        main = self.main(role)
        if main is not None and any(group.label == main.label for group in groups):
            return main
        return standing(groups, role) if study.part else None


def standing(groups: list[Group], role: str) -> Group | None:
    """Return the first of the groups of a method, or the first with a learning rate that was searched for it alone."""
    own = [group for group in groups if role_of(group) == role]
    return min(own, key=lambda group: group.settings.get("vision_lr") is None, default=None)


def _references_first(groups: list[Group], study: Study) -> list[Group]:
    return sorted(groups, key=lambda g: study.references.index(r) if (r := role_of(g)) in study.references else 9)


def _once(groups: list[Group]) -> list[Group]:
    return list({group.label: group for group in groups}.values())


def _order(item: tuple[Hashable, list[Group]]) -> tuple[bool, Any]:
    """Order parts: numbers from high to low, then words."""
    return (True, item[0]) if isinstance(item[0], str) else (False, -item[0])  # type: ignore[operator]
