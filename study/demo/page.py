"""The page: one HTML file with its images in it, without scripts or network access; light, dark, and on a phone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from covft.utils.files import write_text
from study.backbone import NAME
from study.backbone_check import BackboneCheck
from study.data.tasks import Example
from study.demo import figures
from study.demo.inspection import examples_shown
from study.results.formats import Table
from study.results.load import Group, Row
from study.runs.settings import RunSettings

STYLE = """
:root { color-scheme: light dark; --ink: #1f2733; --soft: #657084; --line: #e3e7ee; --good: #1b7f4d; --bad: #b3433f;
        --paper: #f7f8fa; --card: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ec; --soft: #9aa4b5; --line: #333a46; --good: #58c48c; --bad: #f08a84;
          --paper: #14171c; --card: #1d2128; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 30px; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 20px; margin: 44px 0 10px; }
p { max-width: 92ch; margin: 6px 0; } .soft { color: var(--soft); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
        padding: 18px 20px; margin: 14px 0; overflow-x: auto; }
.card > img { width: 100%; min-width: 640px; height: auto; display: block; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 9px; text-align: right; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); font-size: 14px; vertical-align: bottom; } td { white-space: nowrap; }
td:first-child, th:first-child { text-align: left; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); gap: 14px;
        margin-top: 14px; }
.scene { display: flex; gap: 18px; margin: 0; }
.scene img { width: 170px; min-width: 0; height: 170px; image-rendering: pixelated; border-radius: 8px; flex: none; }
.scene dl { margin: 0; font-size: 14px; min-width: 0; } .scene dt { font-weight: 600; }
.scene dt:not(:first-child) { margin-top: 8px; } .scene dd { margin: 0; overflow-wrap: anywhere; }
.task { color: var(--soft); font-weight: 400; } .good { color: var(--good); } .bad { color: var(--bad); }
@media (max-width: 560px) {
  main { padding: 24px 14px 48px; } .card { padding: 14px; } .scene { flex-direction: column; } }
"""


@dataclass(frozen=True)
class Contents:
    """Contents of the page.

    Attributes:
        groups: The runs, by name.
        tables: Scores and differences.
        pictures: Held-out pictures, uint8, `(scenes, H, W, 3)`.
        examples: Their questions, of the tasks that were trained.
        backbone: The check of the packaged backbone.
        seconds: Wall time of everything.
    """

    groups: Mapping[str, Group]
    tables: list[Table]
    pictures: np.ndarray
    examples: list[Example]
    backbone: BackboneCheck
    seconds: float

    @property
    def rows(self) -> dict[str, Row]:
        """The rows, by what tables call them."""
        return {group.label: group.first for group in self.groups.values()}


def write_page(path: Path, contents: Contents) -> None:
    """Write the page as one HTML file."""
    parts = [_head(contents), *map(_table, contents.tables), _losses(contents), _examples(contents)]
    for row in contents.rows.values():
        parts += _routing(row)
    parts.append(_foot(contents))
    write_text(
        path,
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>CoVFT in miniature</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n",
    )


def _head(contents: Contents) -> str:
    run = RunSettings.from_dict(next(iter(contents.rows.values())).settings)
    blocks = "all blocks" if run.layers is None else f"blocks {', '.join(map(str, run.layers))} of 6"
    return (
        "<h1>CoVFT in miniature</h1>"
        "<p>LLaVA with real parts, on two cores: a small CLIP-style ViT, a two-layer projector and a small Llama learn "
        "to answer questions about small images. All runs have the same start and the same data in the same order; "
        "they differ in how the ViT is tuned. With texts shuffled, CoVFT is told another question than the one that is "
        "asked: what it gains then is not made by the question.</p>"
        f'<p class="soft">{run.train_scenes:,} training scenes, {run.held_out_scenes} {escape(run.split)} scenes, '
        f"{run.steps} steps of {run.batch} questions, {run.tokens} tokens per picture for the language model, "
        f"{run.experts} experts in {blocks}, one seed ({run.seed}).</p>"
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.header)
    rows = []
    for y, row in enumerate(table.rows):
        cells = [f"<b>{escape(cell)}</b>" if (y, x) in table.strong else escape(cell) for x, cell in enumerate(row)]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    notes = "".join(f'<p class="soft">{escape(note)}</p>' for note in table.notes)
    return (
        f'<h2>{escape(table.title)}</h2><div class="card"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{notes}"
    )


def _card(image: str, alt: str) -> str:
    return f'<div class="card"><img src="{image}" alt="{escape(alt)}"></div>'


def _losses(contents: Contents) -> str:
    losses = {label: row.losses for label, row in contents.rows.items()}
    return "<h2>Training loss</h2><p>Means of equal parts of the training.</p>" + _card(
        figures.loss_curves(losses, contents.backbone.losses), "Loss curves"
    )


def _examples(contents: Contents) -> str:
    answers = {label: row.more["inspection"]["answers"] for label, row in contents.rows.items()}
    by_scene: dict[int, list[str]] = {}
    for place, row in enumerate(examples_shown(contents.examples)):
        example = contents.examples[row]
        lines = by_scene.setdefault(example.scene, [])
        lines.append(f'<dt>{escape(example.question)} <span class="task">{escape(example.task)}</span></dt>')
        for label, given in answers.items():
            mark = "good" if given[place] == example.answer else "bad"
            shown = escape(given[place]) or "(nothing)"
            lines.append(f'<dd>{escape(label)}: <span class="{mark}">{shown}</span></dd>')
        if any(given[place] != example.answer for given in answers.values()):
            lines.append(f'<dd class="soft">correct: {escape(example.answer)}</dd>')
    blocks = []
    for scene, lines in by_scene.items():
        image = figures.scene_image(contents.pictures[scene])
        blocks.append(f'<div class="card scene"><img src="{image}" alt="scene {scene}"><dl>{"".join(lines)}</dl></div>')
    return (
        f"<h2>The first {len(blocks)} scenes</h2>"
        "<p>Images of 60 x 60 pixels with handwritten digits, photographs, easy-VQA shapes, drawn shapes and rendered "
        "words. Captioning and grounding questions are about the same images.</p>"
        f'<div class="grid">{"".join(blocks)}</div>'
    )


def _routing(row: Row) -> list[str]:
    found, parts = row.more["inspection"], []
    if found.get("weights"):
        parts.append(
            "<h2>Expert weights</h2><p>Mean weight of each expert per task, in each adapted block. Identical rows "
            "would mean that routing ignores the question.</p>"
            + _card(figures.expert_weights(found["weights"]), "Expert weights per task and block")
        )
    if found.get("contexts"):
        parts.append(
            "<h2>Context vectors</h2><p>The first two principal components of each block's context vectors, one point "
            "per held-out question.</p>"
            + _card(figures.context_map(found["contexts"]), "Context vectors in two dimensions")
        )
    return parts


def _foot(contents: Contents) -> str:
    lines = [f"<p>{escape(line)}</p>" for line in checks(contents)]
    times = "; ".join(
        f"{escape(label)}: " + ", ".join(f"{escape(name)} {value:.0f} s" for name, value in row.seconds.items())
        for label, row in contents.rows.items()
    )
    return f'<h2>Checks and times</h2>{"".join(lines)}<p class="soft">{contents.seconds:.0f} s in all. {times}.</p>'


def checks(contents: Contents) -> list[str]:
    """Say what saving, loading and the packaged backbone have shown."""
    lines = []
    for row in contents.rows.values():
        if saved := row.more["inspection"].get("saved"):
            lines.append(
                "Saved the encoder and loaded it into a fresh ViT: largest output difference "
                f"{saved['loaded']:.1e} (from the pretrained ViT: {saved['pretrained']:.1e})."
            )
    check = contents.backbone
    first, last = check.ends
    lines.append(
        f"{NAME}: wrapping changed its outputs by {check.difference:.1e} relative; {check.trained:,} of its parameters "
        f"trained; mean loss {first:.2f} in the first fifth of {check.steps} steps, {last:.2f} in the last."
    )
    return lines
