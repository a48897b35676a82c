"""The page docs/study/inside.md: the planted conflict, its agreement with the runs, the tower of a trained covft."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from covft.utils.files import write_text
from study.inspection import agreement, draw
from study.inspection.sections import INSPECT, audit_section, beside, distance_section, signed
from study.results.formats import Table, p_value
from study.results.studies import Results

NAME = "inside.md"
RESULTS = Path(__file__).parents[1] / "results" / "inspection"
METHODS = ("full", "covft")
ATTENTION, QUESTIONS = "attention.png", "questions.png"
PAPER_R, RESAMPLES = 0.76, 2000
PLANTED = ("grounding and caption", "halves of grounding", "halves of caption")
_DIAGNOSE = "python -m study diagnose --output study/results/diagnosis"
_DIAGNOSE_ALL = "python -m study diagnose --tasks all --no-halves --samples 560 --output study/results/diagnosis"


def write_page(results: Results, folder: Path, inspected: Path = RESULTS, diagnoses: Path = agreement.FOLDER) -> Path:
    """Write the page and its figures, from files alone; return the page's path.

    Args:
        results: The rows.
        folder: Where to.
        inspected: Folder with the numbers of `python -m study inspect`; parts without numbers are left out.
        diagnoses: Folder with the diagnoses.
    """
    known = {name: agreement.read_diagnosis(name, diagnoses) for name in PLANTED}
    parts = ["# Before and inside", _INTRODUCTION, *_planted(known, folder)]
    if agreement.path_of(agreement.ALL, diagnoses).is_file():
        parts += _agreement(results, agreement.read_diagnosis(agreement.ALL, diagnoses), folder)
    if distances := [json.loads(path.read_text(encoding="utf-8")) for path in sorted(inspected.glob("distance-*"))]:
        parts += distance_section(distances, folder)
    found = {method: one for method in METHODS if (one := _read(inspected, method))}
    if "covft" in found:
        parts += _tower(found["covft"], folder)
    if (folder / ATTENTION).is_file() and (folder / QUESTIONS).is_file():
        parts += _maps()
    if audit := found.get("covft", {}).get("trained_tower", {}).get("audit"):
        parts += audit_section(audit)
    if found:
        parts += _updates(found, folder)
    parts += ["## Run it again", _AGAIN]
    write_text(folder / NAME, "\n\n".join(parts) + "\n")
    return folder / NAME


def _read(folder: Path, method: str) -> dict[str, Any] | None:
    """Read the numbers of a method; of several runs, those of the shortest name."""
    files = sorted(folder.glob(f"{method}-*.json"), key=lambda path: len(path.name))
    return json.loads(files[0].read_text(encoding="utf-8")) if files else None


def _planted(known: Mapping[str, dict[str, Any]], folder: Path) -> list[str]:
    table = Table("The planted conflict", ["kinds", "samples", "alignment", "p", "verdict"], text=frozenset({0, 4}))
    for name, one in known.items():
        conflict = one["conflict"]
        aligned, low, high = (conflict[key][-1][0][1] for key in ("alignment", "low", "high"))
        shown = "unknown" if aligned is None else f"{signed(aligned)} [{signed(low)},\u00a0{signed(high)}]"
        row = [name, str(one["settings"]["samples"]), shown, p_value(conflict["p_values"][-1])]
        table.rows.append([*row, one["verdict"]["choice"]])
    draw.write(folder, "conflict", lambda: draw.draw_conflict(known))
    return [
        "## A planted conflict, and none",
        "Grounding asks where a thing is, captioning what is there: the conflict of the paper's Fig. 1b. "
        "`covft.diagnose` is given questions of both, each about another picture, and two random halves of the "
        "questions of either. It measures the model that all runs start from, before any training of tower "
        "and language model.",
        table.markdown(),
        f"![Separation of gradients by block: {', '.join(PLANTED)}](conflict.svg){{ .scrolls }}",
        beside(
            ["what it shows", "what it does not"],
            [
                "The two tasks' gradients differ in every block that is read, more than by exchanging their labels; "
                "those of two halves do not. The last block is not read, so it has no gradient.",
                "That the difference harms a long training: see the next section.",
            ],
        ),
        f"```bash\n{_DIAGNOSE}\n```",
    ]


def _agreement(results: Results, diagnosis: dict[str, Any], folder: Path) -> list[str]:
    gains = {task: gain.value for task, gain in agreement.gains_of(results).items()}
    predicted = agreement.predictions(diagnosis)
    shown = {name: values for name, values in predicted.items() if all(task in values for task in gains)}
    draw.write(folder, "agreement", lambda: draw.draw_agreement(gains, shown))
    verdict, agreed, tasks = (
        make(results, diagnosis) for make in (agreement.verdict_table, agreement.agreement_table, agreement.task_table)
    )
    return [
        "## Does the diagnosis foretell the outcome?",
        "All tasks are diagnosed together before any training, and the [runs](index.md) say what covft gained over "
        "full tuning afterwards. If conflict is what covft resolves, tasks in conflict should gain most.",
        verdict.markdown(),
        agreement.borne_out(results, diagnosis),
        agreed.markdown(),
        _foretold(results, diagnosis),
        "![Gain of covft over full tuning, by rank, over each predictor](agreement.svg){ .scrolls }",
        tasks.markdown(),
        f"```bash\n{_DIAGNOSE_ALL}\npython -m study diagnose --agreement  # these tables, from the files alone\n```",
    ]


def _foretold(results: Results, diagnosis: dict[str, Any]) -> str:
    """Say in words what the agreement is."""
    gains = {task: gain.value for task, gain in agreement.gains_of(results).items()}
    found = agreement.agreements(agreement.predictions(diagnosis), gains)
    known = [one.name for one in agreement.PREDICTORS if one.name in found and found[one.name].p <= 0.05]
    right = [one.name for one in agreement.PREDICTORS if one.name in known and found[one.name].rho * one.sign > 0]
    if right:
        return (
            f"**Task by task, the outcome goes with {' and '.join(right)} as expected**; with the others it does not."
        )
    if known:
        return f"**Task by task, the outcome goes with {' and '.join(known)} the other way round.**"
    return (
        f"**Task by task, no predictor is shown to foretell the outcome**: with {len(gains)} tasks, a rank correlation "
        "has to be about 0.6 to be told apart from 0 after the adjustment."
    )


def _tower(found: dict[str, Any], folder: Path) -> list[str]:
    trained, before = found["trained_tower"], found["untrained_tower"]
    for name, make in (
        ("contexts", draw.draw_contexts), ("routing", draw.draw_routing), ("correlation", draw.draw_correlation)
    ):  # fmt: skip
        draw.write(folder, name, lambda make=make: make(found))
    settings = found["settings"]
    return [
        "## The tower of a trained covft",
        f"One run, seed {settings['seed']}, {settings['steps']} steps, as in [the study](index.md); what follows is "
        f"about {trained['samples']} held-out questions, up to 60 of each task.",
        _beside(trained, before).markdown(),
        _told(trained, before),
        "### Contexts",
        "![Contexts along two principal components, by group of tasks and by cluster](contexts.svg){ .scrolls }",
        _nearest(trained).markdown(),
        beside(
            ["what it shows", "what it does not"],
            [
                f"Contexts of block {trained['contexts']['layer']}, the last adapted one. The clusters are those of "
                "k-means, their number, up to 8, that of the best silhouette.",
                "That clusters are kinds of question: k-means always returns some. A silhouette near 0 means that "
                "there are none.",
            ],
        ),
        "### Routing",
        "![Mean weight of each expert for each task, in each adapted block](routing.svg){ .scrolls }",
        _routing(trained).markdown(),
        beside(
            ["what it shows", "what it does not"],
            [
                "Which experts the questions of a task get, and whether that is more than by chance: mutual "
                "information of task and expert, against shuffled tasks.",
                "That routing by task helps: see the [controls](index.md#controls).",
            ],
        ),
        "### Contexts and routing",
        "![Pairs of questions: how alike contexts and routing are, before training and trained](correlation.svg)"
        "{ .scrolls }",
        beside(
            ["what it shows", "what it does not"],
            [
                "Whether questions with similar contexts are routed alike; r is over pairs of questions, its interval "
                "by a bootstrap over questions.",
                "Anything learned, by itself: routing is computed from the context, so r has to be compared with that "
                "before training.",
            ],
        ),
    ]


def _maps() -> list[str]:
    return [
        "### Where the context looks",
        f"![Attention of the context over pictures, for two questions about each]({ATTENTION}){{ .scrolls }}",
        f"![What moves in the features of a picture between its two questions]({QUESTIONS}){{ .scrolls }}",
        beside(
            ["what it shows", "what it does not"],
            [
                "The attention weights of the context's query over 6 x 6 patches, the mean over heads, for the "
                "grounding and the captioning question of a picture; below, where the features of one picture differ "
                "between the two.",
                "Which patches the answer depends on. Blocks before the first adapted one cannot move.",
            ],
        ),
    ]


def draw_maps(inspected: Path, folder: Path) -> None:
    """Draw the maps that `python -m study inspect` saved beside the encoder.

    Args:
        inspected: Folder of the encoder.
        folder: Where to.
    """
    from covft.analysis import plots
    from covft.analysis.stats.attention import AttentionMaps, QuestionMaps

    plots.plot_attention(AttentionMaps.load(inspected)).savefig(folder / ATTENTION, dpi=80)
    plots.plot_questions(QuestionMaps.load(inspected)).savefig(folder / QUESTIONS, dpi=80)


def _beside(trained: dict[str, Any], before: dict[str, Any]) -> Table:
    """Tabulate the paper's figures beside those here."""
    table = Table("", ["figure", "paper", "trained", "before training"])
    table.rows = [
        ["r of contexts and routing (Fig. 3b)", "0.76", *(_r(one) for one in (trained, before))],
        ["silhouette of the clusters (Fig. 3a)", "none given",
         *(f"{one['contexts']['silhouette']:.2f}" for one in (trained, before))],
        ["number of clusters", "none given", *(str(max(one["contexts"]["labels"]) + 1) for one in (trained, before))],
        ["pictures more alike within a cluster than between", "+19.23%",
         *(_more(one["similarity"]["pictures"]) for one in (trained, before))],
        ["questions more alike within a cluster than between", "+10.67%",
         *(_more(one["similarity"]["texts"]) for one in (trained, before))],
        ["distance of the experts' outputs, last adapted block", "none given",
         *(f"{list(one['experts'].values())[-1][1]:.2f}" for one in (trained, before))],
    ]  # fmt: skip
    return table


def _told(trained: dict[str, Any], before: dict[str, Any]) -> str:
    """Say in words what stands beside the paper's figures."""
    now, then = trained["routing"]["r"], before["routing"]["r"]
    parts = []
    if now is not None and then is not None:
        paper = "within" if now["low"] <= PAPER_R <= now["high"] else "below" if now["high"] < PAPER_R else "above"
        learned = "no different from" if now["low"] <= then["high"] and then["low"] <= now["high"] else "unlike"
        place = "the interval has the paper's r" if paper == "within" else f"r is {paper} the paper's"
        parts.append(f"**Here {place}**, and {learned} that before training, by its interval.")
    if _follows_questions(trained):
        already = ", and did so before training" if _follows_questions(before) else ""
        parts.append(f"Clusters of contexts follow the questions and not the pictures{already}.")
    return " ".join(parts)


def _follows_questions(found: dict[str, Any]) -> bool:
    """Return whether questions are more alike within clusters than between, and pictures are not."""
    texts, pictures = (found["similarity"][name] for name in ("texts", "pictures"))
    return texts[0] > texts[1] and pictures[0] <= pictures[1]


def _r(found: dict[str, Any]) -> str:
    r = found["routing"]["r"]
    return "all are routed alike" if r is None else f"{r['r']:.2f} [{r['low']:.2f},\u00a0{r['high']:.2f}]"


def _more(alike: list[float]) -> str:
    within, between = alike
    return f"{signed(100 * (within / between - 1), 1)}% ({within:.3f} and {between:.3f})"


def _nearest(trained: dict[str, Any]) -> Table:
    contexts = trained["contexts"]
    table = Table(
        "", ["cluster", "questions", "most frequent tasks", "nearest to the centre"], text=frozenset({0, 2, 3})
    )
    for cluster, texts in enumerate(contexts["nearest"]):
        tasks = [task for task, own in zip(contexts["tasks"], contexts["labels"], strict=True) if own == cluster]
        counts = sorted({task: tasks.count(task) for task in tasks}.items(), key=lambda item: -item[1])[:3]
        shown = ", ".join(f"{task} {count}" for task, count in counts)
        table.rows.append([str(cluster), str(len(tasks)), shown, "<br>".join(dict.fromkeys(texts))])
    return table


def _routing(trained: dict[str, Any]) -> Table:
    table = Table("", ["block", "entropy, nats", "task and expert share, nats", "by chance", "at most", "p"])
    for layer, one in trained["routing"]["layers"].items():
        information, by_chance, most, p = one["information"]
        numbers = [f"{one['entropy']:.3f}", f"{information:.4f}", f"{by_chance:.4f}", f"{most:.3f}"]
        table.rows.append([layer, *numbers, p_value(p)])
    return table


def _updates(found: Mapping[str, dict[str, Any]], folder: Path) -> list[str]:
    import numpy as np

    draw.write(folder, "updates", lambda: draw.draw_updates(found))
    table = Table("", ["gradients of", "method", "paper, mean ± deviation", "here", "updates"], text=frozenset({0, 1}))
    for weights, told in draw.WEIGHTS.items():
        for method in found:
            cosines = np.array(found[method]["updates"][weights])
            mean, deviation = draw.PAPER[method]
            here = f"{cosines.mean():.3f} ± {cosines.std(ddof=1):.3f}"
            table.rows.append([told, method, f"{mean:.3f} ± {deviation:.3f}", here, str(len(cosines))])
    count = len(next(iter(found.values()))["updates"]["tower"])
    parts = [
        "## Do updates agree?",
        "The cosine of each update's gradient, before clipping, with the dominant direction of all of them, in the "
        f"training of {' and of '.join(_NAMES[method] for method in found)} on all tasks (Fig. 5 of the paper). "
        f"Every other step is taken. Of {count} gradients without a common direction, cosines have a root mean square "
        f"of {count**-0.5:.3f}.",
        table.markdown(),
        _told_of_updates(found),
        f"![Cosines of gradients with their dominant direction: {', '.join(found)}](updates.svg){{ .scrolls }}",
        beside(
            ["what it shows", "what it does not"],
            [
                "How far the steps of one training agree. The paper says neither whose gradients it compares nor how "
                "many, so both are shown here.",
                "Conflict between kinds: small batches disagree by noise alone. The first steps, in which projector "
                "and language model change most, may make the direction.",
            ],
        ),
    ]
    return [part for part in parts if part]


def _told_of_updates(found: Mapping[str, dict[str, Any]]) -> str:
    """Say whether covft's updates agree more than those of full tuning, as the paper has it."""
    import numpy as np

    if not {"full", "covft"} <= set(found):
        return ""
    full, covft = (found[method]["updates"]["tower"] for method in ("full", "covft"))
    apart = float(np.mean(covft) - np.mean(full))
    draws = np.random.default_rng(0)
    drawn = [
        np.mean(draws.choice(covft, len(covft))) - np.mean(draws.choice(full, len(full))) for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    verdict = "agree more" if low > 0 else "agree less" if high < 0 else "are not shown to agree more or less"
    return (
        f"**Covft's updates {verdict}** than those of full tuning here: {signed(apart, 3)} [{signed(low, 3)},\u00a0"
        f"{signed(high, 3)}], a bootstrap over the updates of one run each. The paper has +0.113."
    )


_NAMES = {"full": "full tuning", "covft": "covft"}
_INTRODUCTION = (
    "What [`covft.diagnose`](../guides/diagnose.md) says of the study's tasks before any training, whether the runs "
    "bear it out, and what [`covft.analysis`](../guides/analysis.md) shows of the trained tower, with the paper's "
    "figures beside. Made by `python -m study inside`, from files of the repository alone."
)
_AGAIN = f"""```bash
{_DIAGNOSE}
{_DIAGNOSE_ALL}
{INSPECT}   # trains covft, full tuning and towers of two tasks: 45 minutes on a core; the encoder is in runs/inspected
covft report runs/inspected
python -m study inside --folder runs/inspected  # this page
```"""
