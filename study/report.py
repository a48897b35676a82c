"""The report: one HTML page with its images in it, without scripts or network access."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path

from covft.utils.files import write_text
from study import figures
from study.backbone import NAME
from study.data.scenes import Scene
from study.data.tasks import Example
from study.inspection import Inspection
from study.result import StudyResult
from study.settings import StudySettings

STYLE = """
:root { --ink: #1f2733; --soft: #657084; --line: #e3e7ee;
        --good: #1b7f4d; --bad: #b3433f; --paper: #f7f8fa; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 30px; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 20px; margin: 44px 0 10px; }
p { max-width: 92ch; margin: 6px 0; } .soft { color: var(--soft); }
.card { background: #fff; border: 1px solid var(--line); border-radius: 12px;
        padding: 18px 20px; margin: 14px 0; }
.card > img { width: 100%; height: auto; display: block; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 12px; text-align: right; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); font-size: 14px; }
td:first-child, th:first-child { text-align: left; }
tr.mean td { border-top: 2px solid var(--ink); border-bottom: 0; font-weight: 600; }
td.best { font-weight: 700; } td.baseline { color: var(--soft); }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(480px, 1fr)); gap: 14px; margin-top: 14px; }
.scene { display: flex; gap: 18px; margin: 0; }
.scene img { width: 170px; height: 170px; image-rendering: pixelated; border-radius: 8px; flex: none; }
.scene dl { margin: 0; font-size: 14px; min-width: 0; } .scene dt { font-weight: 600; }
.scene dt:not(:first-child) { margin-top: 8px; } .scene dd { margin: 0; }
.task { color: var(--soft); font-weight: 400; } .good { color: var(--good); } .bad { color: var(--bad); }
@media (max-width: 560px) { .grid { grid-template-columns: 1fr; } .scene { flex-direction: column; } }
"""


@dataclass
class Report:
    """Contents of the report.

    Attributes:
        settings: Settings of the run.
        result: Its measurements.
        scenes: Held-out scenes.
        examples: Their questions.
        answers: Answers by method, one per example.
        inspection: Routing of the wrapped tower; None without the method `covft`.
    """

    settings: StudySettings
    result: StudyResult
    scenes: list[Scene]
    examples: list[Example]
    answers: dict[str, list[str]]
    inspection: Inspection | None


def write_report(path: Path, report: Report) -> None:
    """Write the report as one HTML file."""
    parts = [_head(report), _scores(report), _losses(report), _examples(report)]
    if report.inspection is not None:
        parts += [_routing(report.inspection), _contexts(report.inspection)]
    parts.append(_foot(report))
    write_text(
        path,
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>CoVFT in miniature</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n",
    )


def _card(image: str, alt: str) -> str:
    return f'<div class="card"><img src="{image}" alt="{escape(alt)}"></div>'


def _head(report: Report) -> str:
    s = report.settings
    return (
        "<h1>CoVFT in miniature</h1>"
        "<p>LLaVA with real parts, on two cores: a small CLIP-style ViT, a two-layer projector and a small Llama learn "
        "to answer questions about small images. The ViT is either frozen or conditioned on the question (CoVFT). Both "
        "runs have the same start and the same data in the same order.</p>"
        f'<p class="soft">{s.train_scenes:,} training scenes, {s.test_scenes} {escape(s.split)} scenes, '
        f"{s.steps} steps of {s.batch} questions, {s.experts} experts in blocks "
        f"{', '.join(map(str, s.layers))} of 6, {escape(s.routing)} routing, seed {s.seed}.</p>"
    )


def _scores(report: Report) -> str:
    columns = list(report.result.scores)
    methods = report.settings.methods
    rows = []
    for task in [*report.settings.tasks, "mean"]:
        best = max(report.result.scores[method][task] for method in methods)
        cells = []
        for column in columns:
            value = report.result.scores[column][task]
            mark = "baseline" if column not in methods else "best" if value == best else ""
            cells.append(f'<td class="{mark}">{value:.1f}</td>')
        rows.append(f'<tr class="{"mean" if task == "mean" else ""}"><td>{task}</td>{"".join(cells)}</tr>')
    head = "".join(f"<th>{escape(name)}</th>" for name in ["task", *columns])
    return (
        f"<h2>Exact match on {escape(report.settings.split)} scenes, %</h2>"
        "<p>An answer counts if all of its words are right. The columns in grey are baselines, each the better of two: "
        "the most frequent training answer (to the same question, or to the task), and the model with the frozen tower "
        "(shown a blank image, or not given the question). With one seed, small differences are noise.</p>"
        f'<div class="card"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _losses(report: Report) -> str:
    return "<h2>Training loss</h2><p>Moving averages over a few steps.</p>" + _card(
        figures.loss_curves(report.result.losses), "Loss curves"
    )


def _examples(report: Report, count: int = 8) -> str:
    by_scene: dict[int, list[int]] = {}
    for position, example in enumerate(report.examples):
        by_scene.setdefault(example.scene, []).append(position)
    blocks = []
    # the first scenes, whether or not the answers are right
    for scene in list(by_scene)[:count]:
        # the conflict first: grounding and captioning of the same image
        positions = sorted(by_scene[scene], key=lambda i: report.examples[i].task not in ("grounding", "caption"))[:4]
        lines = []
        for i in positions:
            example = report.examples[i]
            lines.append(f'<dt>{escape(example.question)} <span class="task">{example.task}</span></dt>')
            for method, answers in report.answers.items():
                mark = "good" if answers[i] == example.answer else "bad"
                lines.append(f'<dd>{method}: <span class="{mark}">{escape(answers[i]) or "(nothing)"}</span></dd>')
            if any(answers[i] != example.answer for answers in report.answers.values()):
                lines.append(f'<dd class="soft">correct: {escape(example.answer)}</dd>')
        image = figures.scene_image(report.scenes[scene].pixels)
        blocks.append(f'<div class="card scene"><img src="{image}" alt="scene {scene}"><dl>{"".join(lines)}</dl></div>')
    return (
        f"<h2>The first {len(blocks)} scenes</h2>"
        "<p>Images of 60 x 60 pixels with handwritten digits, photographs, easy-VQA shapes, drawn shapes and rendered "
        "words. Captioning and grounding questions are about the same images.</p>"
        f'<div class="grid">{"".join(blocks)}</div>'
    )


def _routing(inspection: Inspection) -> str:
    return (
        "<h2>Expert weights</h2><p>Mean weight of each expert per task, in each adapted block. Identical rows "
        "would mean that routing ignores the question.</p>"
        + _card(figures.expert_weights(inspection), "Expert weights per task and layer")
    )


def _contexts(inspection: Inspection) -> str:
    return (
        "<h2>Context vectors</h2><p>The first two principal components of each block's context vectors, one point per "
        "held-out question.</p>" + _card(figures.context_map(inspection), "Context vectors in two dimensions")
    )


def _foot(report: Report) -> str:
    checks, lines = report.result.checks, []
    if "loaded_max_difference" in checks:
        lines.append(
            "<p>The saved encoder was loaded into a fresh ViT: largest output difference "
            f"{checks['loaded_max_difference']:.1e}.</p>"
        )
    if "backbone_relative_difference" in checks:
        lines.append(
            f"<p>{escape(NAME)}: wrapping changed its outputs by {checks['backbone_relative_difference']:.1e} "
            f"relative; a few training steps took the loss from {checks['backbone_first_loss']:.2f} to "
            f"{checks['backbone_last_loss']:.2f}.</p>"
        )
    times = ", ".join(f"{escape(name)} {value:.0f} s" for name, value in report.result.seconds.items())
    return f'<h2>Checks and times</h2>{"".join(lines)}<p class="soft">{times}.</p>'
