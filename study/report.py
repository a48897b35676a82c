"""One HTML page with everything in it: no script, no network, pictures as base64."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path

from study import figures
from study.inspection import Inspection
from study.packaged import NAME
from study.scenes import Scene
from study.settings import MiniResult, MiniSettings
from study.tasks import Example

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
td.best { font-weight: 700; } td.floor { color: var(--soft); }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(480px, 1fr)); gap: 14px; }
.scene { display: flex; gap: 18px; margin: 0; }
.scene img { width: 170px; height: 170px; image-rendering: pixelated; border-radius: 8px; flex: none; }
.scene dl { margin: 0; font-size: 14px; min-width: 0; } .scene dt { font-weight: 600; }
.scene dt:not(:first-child) { margin-top: 8px; } .scene dd { margin: 0; }
.task { color: var(--soft); font-weight: 400; } .good { color: var(--good); } .bad { color: var(--bad); }
@media (max-width: 560px) { .grid { grid-template-columns: 1fr; } .scene { flex-direction: column; } }
"""


@dataclass
class Page:
    """What the page shows.

    Attributes:
        settings: Settings of the run.
        result: Its figures.
        scenes: Held-out scenes.
        examples: Their questions.
        given: Answers by method, one per example.
        seen: Routing and context of the wrapped tower, if there was one.
    """

    settings: MiniSettings
    result: MiniResult
    scenes: list[Scene]
    examples: list[Example]
    given: dict[str, list[str]]
    seen: Inspection | None


def write_page(path: Path, page: Page) -> None:
    """Write the page."""
    parts = [_head(page), _scores(page), _losses(page), _examples(page)]
    if page.seen is not None:
        parts += [_routing(page.seen), _contexts(page.seen)]
    parts.append(_foot(page))
    path.write_text(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>covft in miniature</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def _card(image: str, alt: str) -> str:
    return f'<div class="card"><img src="{image}" alt="{escape(alt)}"></div>'


def _head(page: Page) -> str:
    s = page.settings
    return (
        "<h1>covft in miniature</h1>"
        "<p>LLaVA from real parts on two cores: a small CLIP-style ViT, a two-layer projector and a small "
        "Llama, taught to answer questions about small pictures. Once the ViT stays frozen; once the "
        "question conditions it (CoVFT). Same start, same data, same order.</p>"
        f'<p class="soft">{s.train_scenes} training scenes, {s.test_scenes} {escape(s.split)} scenes, '
        f"{s.steps} steps of {s.batch} questions, {s.experts} experts in blocks "
        f"{', '.join(map(str, s.layers))} of 6, {escape(s.routing)} routing, seed {s.seed}.</p>"
    )


def _scores(page: Page) -> str:
    columns = list(page.result.scores)
    methods = page.settings.methods
    rows = []
    for task in [*page.settings.tasks, "mean"]:
        best = max(page.result.scores[method][task] for method in methods)
        cells = []
        for column in columns:
            value = page.result.scores[column][task]
            mark = "floor" if column not in methods else "best" if value == best else ""
            cells.append(f'<td class="{mark}">{value:.1f}</td>')
        rows.append(f'<tr class="{"mean" if task == "mean" else ""}"><td>{task}</td>{"".join(cells)}</tr>')
    head = "".join(f"<th>{escape(name)}</th>" for name in ["task", *columns])
    return (
        f"<h2>Right answers on {escape(page.settings.split)} scenes, %</h2>"
        "<p>An answer is generated word by word and is right if all of it is. Each floor is the better of "
        "two ways to do without: the most frequent training answer (to the same question, or to the "
        "task), and the trained model with a frozen tower (shown a blank picture, or not told the question). One seed, "
        "so small differences say little.</p>"
        f'<div class="card"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _losses(page: Page) -> str:
    return "<h2>Loss</h2><p>Each curve is the mean of the last few steps.</p>" + _card(
        figures.loss_curves(page.result.losses), "Loss curves"
    )


def _examples(page: Page, count: int = 8) -> str:
    by_scene: dict[int, list[int]] = {}
    for position, example in enumerate(page.examples):
        by_scene.setdefault(example.scene, []).append(position)
    blocks = []
    # the first held-out scenes as they come, right or wrong
    for scene in list(by_scene)[:count]:
        # grounding and captioning first: the same picture, two different wishes
        positions = sorted(by_scene[scene], key=lambda i: page.examples[i].task not in ("grounding", "caption"))[:4]
        lines = []
        for i in positions:
            example = page.examples[i]
            lines.append(f'<dt>{escape(example.question)} <span class="task">{example.task}</span></dt>')
            for method, answers in page.given.items():
                right = answers[i] == example.answer
                mark = "good" if right else "bad"
                lines.append(f'<dd>{method}: <span class="{mark}">{escape(answers[i]) or "(nothing)"}</span></dd>')
            if any(answers[i] != example.answer for answers in page.given.values()):
                lines.append(f'<dd class="soft">right: {escape(example.answer)}</dd>')
        picture = figures.picture(page.scenes[scene].pixels)
        blocks.append(
            f'<div class="card scene"><img src="{picture}" alt="scene {scene}"><dl>{"".join(lines)}</dl></div>'
        )
    return (
        f"<h2>The first {len(blocks)} scenes</h2>"
        "<p>Handwritten digits, photographs, easy-VQA shapes, drawn shapes and rendered words, 60 x 60 "
        "pixels. The picture is the same where a caption is wanted and where a place is wanted.</p>"
        f'<div class="grid">{"".join(blocks)}</div>'
    )


def _routing(seen: Inspection) -> str:
    return (
        "<h2>Expert weights</h2><p>Mean weight of each expert per task, in each adapted block. Rows that "
        "are all alike would mean that the question plays no role.</p>"
        + _card(figures.expert_weights(seen), "Expert weights per task and layer")
    )


def _contexts(seen: Inspection) -> str:
    return (
        "<h2>Context vectors</h2><p>One point per held-out question: the context vector that routes its "
        "picture, in the first two principal components of each block.</p>"
        + _card(figures.context_map(seen), "Context vectors in two dimensions")
    )


def _foot(page: Page) -> str:
    checks, lines = page.result.checks, []
    if "loaded_max_difference" in checks:
        lines.append(
            "<p>The encoder was saved and loaded into a fresh ViT: largest difference of an output "
            f"{checks['loaded_max_difference']:.1e}.</p>"
        )
    if "backbone_relative_difference" in checks:
        lines.append(
            f"<p>The real tower, the {escape(NAME)}: wrapping it changed its outputs by "
            f"{checks['backbone_relative_difference']:.1e} relative, and a short training took the loss from "
            f"{checks['backbone_first_loss']:.2f} to {checks['backbone_last_loss']:.2f}.</p>"
        )
    times = ", ".join(f"{escape(name)} {value:.0f} s" for name, value in page.result.seconds.items())
    return f'<h2>Checks and times</h2>{"".join(lines)}<p class="soft">{times}.</p>'
