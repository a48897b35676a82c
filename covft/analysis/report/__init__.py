"""Writes one HTML page about a folder: diagnosis, settings, curves, contexts, routing, attention, questions compared.

The page is one file. It loads nothing, and says so in its content security policy.
"""

from __future__ import annotations

import html
from importlib import resources
from pathlib import Path

from covft import __version__
from covft.analysis.report import maps, routes
from covft.analysis.report.diagnosis import diagnosis
from covft.analysis.report.drawing import line
from covft.analysis.report.gather import Facts, gather
from covft.utils.arguments import check_kinds
from covft.utils.files import write_text

NAME = "covft_report.html"
"""Name of the page in its folder."""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@check_kinds
def write_report(folder: str | Path, output: str | Path | None = None) -> Path:
    """Write a page about a folder; the same as `covft report FOLDER`.

    Sections whose files are not there are left out: settings of a saved encoder (`covft_config.json`), curves of a
    trainer (`trainer_state.json`, of the latest checkpoint if there are several), and what `Recording.save`,
    `AttentionMaps.save` and `QuestionMaps.save` wrote there, and a diagnosis that was saved as `covft_diagnosis.json`.

    Args:
        folder: An encoder, the output of a trainer, or a folder with recordings.
        output: The file to write; None writes `covft_report.html` to the folder.

    Returns:
        The path of the page.

    Raises:
        CheckpointError: If there is nothing to report, or the page cannot be written.
    """
    folder = Path(folder)
    page = render(gather(folder))
    path = folder / NAME if output is None else Path(output)
    write_text(path, page)
    return path


def render(facts: Facts) -> str:
    """Return the page.

    Args:
        facts: What there is to report.
    """
    sections = {
        "Diagnosis": diagnosis(facts.diagnosis) if facts.diagnosis else "",
        "Settings": _settings(facts),
        "Training": "".join(line(curve.name, curve.steps, curve.values) for curve in facts.curves),
        "Contexts": routes.contexts(facts.recording) if facts.recording else "",
        "Routing": routes.routing(facts.recording) if facts.recording else "",
        "Attention": maps.attention(facts.attention) if facts.attention else "",
        "Two questions": maps.questions(facts.questions) if facts.questions else "",
    }
    shown = {title: body for title, body in sections.items() if body}
    ids = {title: title.lower().replace(" ", "-") for title in shown}
    name = html.escape(facts.folder.resolve().name)
    links = "".join(f"<a href='#{ids[title]}'>{title}</a>" for title in shown)
    bodies = "".join(
        f"<section id='{ids[title]}' aria-labelledby='{ids[title]}-title'><h2 id='{ids[title]}-title'>{title}</h2>"
        f"<div class='{ids[title]}'>{body}</div></section>"
        for title, body in shown.items()
    )
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<meta name='color-scheme' content='light dark'><title>covft: {name}</title>"
        f"<style>{_asset('page.css')}</style></head>"
        f"<body><header><h1>{name}</h1><p>covft {__version__}</p><nav aria-label='Sections'>{links}</nav></header>"
        f"<main>{bodies}</main><script>{_asset('page.js')}</script></body></html>\n"
    )


def _settings(facts: Facts) -> str:
    rows = "".join(
        f"<tr><th scope='row'>{html.escape(str(name))}</th><td>{html.escape(_plain(value))}</td></tr>"
        for name, value in facts.settings.items()
    )
    return f"<div class='wide'><table><tbody>{rows}</tbody></table></div>" if rows else ""


def _plain(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 300 else f"{text[:297]}..."


def _asset(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")
