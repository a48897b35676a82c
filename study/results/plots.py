"""Figures of the studies. Each shows intervals; each is left out where its runs are missing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from study.results import contrasts, marks
from study.results.contrasts import Estimate
from study.results.load import Group
from study.results.studies import GROUPS, PAIR, STUDIES, TITLES, TWELVE, Results, method_of, role_of
from study.results.tables import scored_tasks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Draw = Callable[[Results], "Figure | None"]


@dataclass(frozen=True)
class Plot:
    """A figure of the page.

    Attributes:
        name: Name of its file, without `.svg`.
        study: The study whose section shows it.
        alt: What it shows, for whoever does not see it.
        draw: Draws it; None where its runs are missing.
    """

    name: str
    study: str
    alt: str
    draw: Draw


def draw_methods(results: Results) -> Figure | None:
    """Draw the mean of every method, and its difference to the frozen tower, from the best to the worst."""
    groups = [g for part in results.parts(STUDIES["methods"]).values() for g in part]
    frozen, tasks = results.main("frozen"), scored_tasks(groups) if groups else ()
    if frozen is None or not tasks or len(groups) < 2:
        return None
    means = {group.label: contrasts.mean(group, tasks) for group in groups}
    groups.sort(key=lambda group: -_value(means[group.label]))
    colours = [marks.colour(method_of(group) if role_of(group) else "", 0) for group in groups]
    figure, (left, right) = marks.panels(8, 0.27 * len(groups) + 1, 2, sharey=True)
    labels = [group.label for group in groups]
    marks.forest(left, labels, [means[label] for label in labels], colours)
    apart = [None if group is frozen else contrasts.difference(group, frozen, tasks) for group in groups]
    marks.forest(right, labels, apart, colours)
    marks.zero(right)
    left.set_xlabel("mean, percent")
    right.set_xlabel("minus frozen, points")
    return figure


def draw_controls(results: Results) -> Figure | None:
    """Draw the gain over the frozen tower of CoVFT and of its controls."""
    frozen, covft = results.main("frozen"), results.main("covft")
    groups = [g for part in results.parts(STUDIES["controls"]).values() for g in part if g is not frozen]
    if frozen is None or covft is None or len(groups) < 2:
        return None
    tasks = scored_tasks([frozen, *groups])
    gains = {group.label: contrasts.difference(group, frozen, tasks) for group in groups}
    groups.sort(key=lambda group: (group is not covft, -_value(gains[group.label])))
    figure, (axes,) = marks.panels(8, 0.3 * len(groups) + 0.9)
    colours = [marks.colour("covft" if group is covft else "", 3) for group in groups]
    marks.forest(axes, [g.label.removeprefix("covft, ") for g in groups], [gains[g.label] for g in groups], colours)
    marks.zero(axes)
    if (own := gains[covft.label]) is not None:
        axes.axvspan(own.low, own.high, color=marks.COLOURS["covft"], alpha=0.12, lw=0)
    axes.set_xlabel("minus frozen, points")
    return figure


def draw_tokens(results: Results) -> Figure | None:
    """Draw the mean over the tokens that the language model gets."""
    return _over_a_number(results, "tokens", "visual tokens kept", {"mean": TWELVE}, "{:g}", against="frozen")


def draw_fraction(results: Results) -> Figure | None:
    """Draw the mean, and that of each group, over the share of the data."""
    tasks = {"mean": TWELVE, **{TITLES[name]: GROUPS[name] for name in TITLES}}
    return _over_a_number(results, "fraction", "share of the training data", tasks, "{:g}%")


def draw_diversity(results: Results) -> Figure | None:
    """Draw what experts gain over full tuning, over the number of tasks in the training data."""
    parts = results.parts(STUDIES["diversity"])
    found: dict[int, dict[int, Estimate]] = {}
    for part, groups in parts.items():
        full = results.reference(STUDIES["diversity"], groups, "full")
        tasks = scored_tasks(groups)
        for group in groups:
            apart = None if full is None else contrasts.difference(group, full, tasks)
            if method_of(group) == "covft" and apart is not None:
                found.setdefault(group.settings["experts"], {})[part] = apart  # type: ignore[index]
    if max(map(len, found.values()), default=0) < 2:
        return None
    figure, (axes,) = marks.panels(5.5, 3.2)
    for place, (experts, by_part) in enumerate(sorted(found.items())):
        xs = sorted(by_part)
        marks.curve(
            axes, xs, [by_part[x] for x in xs], f"{experts} experts", marks.OTHERS[place], 6 * place - 6,
        )  # fmt: skip
    marks.zero(axes, vertical=False)
    _over(axes, sorted({x for by_part in found.values() for x in by_part}), "{:g}")
    axes.set_xlabel("tasks in the training data")
    axes.set_ylabel("minus full, points")
    axes.legend()
    return figure


def draw_tasks(results: Results) -> Figure | None:
    """Draw the difference between CoVFT and full tuning, task by task."""
    covft, full = results.main("covft"), results.main("full")
    tasks = () if covft is None or full is None else contrasts.common((*TWELVE, *PAIR), covft, full)
    if covft is None or full is None or not tasks or not set(covft.rows) & set(full.rows):
        return None
    places = list(GROUPS)
    colours = [marks.OTHERS[next(i for i, name in enumerate(places) if task in GROUPS[name])] for task in tasks]
    figure, (axes,) = marks.panels(7, 0.27 * len(tasks) + 1)
    marks.forest(axes, tasks, [contrasts.difference(covft, full, (task,)) for task in tasks], colours)
    marks.zero(axes)
    axes.set_xlabel("covft minus full, points")
    for place, name in enumerate(places):
        if any(task in GROUPS[name] for task in tasks):
            axes.plot([], [], "o-", color=marks.OTHERS[place], label=TITLES.get(name, "The conflict"))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_losses(results: Results) -> Figure | None:
    """Draw the training loss of the main methods: the mean over seeds, and its range."""
    found = [(role, group) for role in marks.COLOURS if (group := results.main(role)) is not None]
    found = [(role, group) for role, group in found if all(row.losses for row in group.rows.values())]
    if not found:
        return None
    figure, (axes,) = marks.panels(6, 3)
    for role, group in found:
        lines = np.array([row.losses for row in group.rows.values()])
        places = (np.arange(lines.shape[1]) + 0.5) / lines.shape[1]
        axes.plot(places, lines.mean(0), color=marks.COLOURS[role], lw=1.5, label=group.label)
        axes.fill_between(places, lines.min(0), lines.max(0), color=marks.COLOURS[role], alpha=0.2, lw=0)
    axes.set_xlabel("share of training")
    axes.set_ylabel("loss")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y")
    axes.legend()
    return figure


PLOTS = (
    Plot("methods", "methods", "Mean of each method, and its difference to the frozen tower", draw_methods),
    Plot("tasks", "methods", "Difference between CoVFT and full tuning for each task", draw_tasks),
    Plot("losses", "methods", "Training loss of the frozen tower, full tuning and CoVFT", draw_losses),
    Plot("controls", "controls", "Gain over the frozen tower of CoVFT and of its controls", draw_controls),
    Plot("diversity", "diversity", "Gain over full tuning by number of experts and of tasks", draw_diversity),
    Plot("fraction", "fraction", "Scores over the share of the training data", draw_fraction),
    Plot("tokens", "tokens", "Scores over the number of visual tokens kept", draw_tokens),
)


def write_plots(results: Results, folder: Path) -> list[Plot]:
    """Write the figures whose runs are there, remove those of others, and return what was written."""
    import matplotlib as mpl

    written = []
    folder.mkdir(parents=True, exist_ok=True)
    for plot in PLOTS:
        path = folder / f"{plot.name}.svg"
        with mpl.rc_context(marks.SETTINGS):
            figure = plot.draw(results)
        if figure is None:
            path.unlink(missing_ok=True)
        else:
            marks.save(figure, path)
            written.append(plot)
    return written


def _over_a_number(
    results: Results, name: str, label: str, wanted: dict[str, tuple[str, ...]], form: str, against: str | None = None
) -> Figure | None:
    """Draw the scores of each method over the number that splits a study into parts.

    Args:
        results: The results.
        name: Name of the study.
        label: Name of the number.
        wanted: Tasks of each panel, by title.
        form: Format of the number.
        against: A method; a last panel shows the paired differences to it.
    """
    study = STUDIES[name]
    parts = results.parts(study)
    if len(parts) < 2:
        return None
    methods = dict.fromkeys(role for groups in parts.values() for group in groups if (role := role_of(group)))
    rows = -(-len(wanted) // 2)
    figure, found = marks.panels(7.2, 2.9 * rows, 2 if len(wanted) > 1 or against else 1, rows)
    panels = [(title, tasks, None) for title, tasks in wanted.items()]
    panels += [(f"mean, minus {against}", TWELVE, against)] if against else []
    for axes, (title, tasks, other) in zip(found, panels, strict=True):
        shown = [method for method in methods if method != other]
        for place, method in enumerate(shown):
            values: dict[float, Estimate] = {}
            for part, groups in parts.items():
                group = next((group for group in groups if role_of(group) == method), None)
                reference = None if other is None else results.reference(study, groups, other)
                value = None if group is None else _score(group, tasks, reference, needed=other is not None)
                if value is not None:
                    values[part] = value  # type: ignore[index]
            xs = sorted(values)
            shift = (2 * place - len(shown) + 1) * 1.5 * math.log2(max(parts) / min(parts))  # type: ignore[type-var]
            marks.curve(axes, xs, [values[x] for x in xs], method, marks.colour(method, place), shift)
        if other is not None:
            marks.zero(axes, vertical=False)
        _over(axes, sorted(parts), form)  # type: ignore[type-var]
        axes.set_title(title)
        axes.grid(axis="y")
    found[0].set_ylabel("percent")
    found[0].legend()
    figure.supxlabel(label, fontsize=9)
    return figure


def _score(group: Group, tasks: tuple[str, ...], reference: Group | None, *, needed: bool) -> Estimate | None:
    """Estimate the mean, or the difference to a reference where one is needed."""
    if needed:
        return None if reference is None else contrasts.difference(group, reference, tasks)
    return contrasts.mean(group, contrasts.common(tasks, group))


def _over(axes: object, places: list[float], form: str) -> None:
    """Give a panel a logarithmic x axis with these places."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(places, [form.format(place) for place in places])


def _value(found: Estimate | None) -> float:
    return float("-inf") if found is None else found.value
