"""Measure ten questions about one picture, and a second question in a chat: `python -m benchmarks.trunk`.

About five minutes of one core. The tables of `docs/guides/chat.md` are written with the results.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from benchmarks.speed.measure import machine
from benchmarks.speed.sizes import CLIP_L, TINY, Record
from benchmarks.trunk.chats import SMALL, VIT_B, second_question
from benchmarks.trunk.tower import questions

RESULTS = Path(__file__).with_name("results.json")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "chat.md"


def main(words: Sequence[str] | None = None) -> None:
    """Measure, and write the results and the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trunk", description=main.__doc__)
    parser.add_argument("--quick", action="store_true", help="toy sizes, to try the command; nothing is written")
    options = parser.parse_args(words)
    results = {
        "made": f"{date.today()}, {machine()}",
        "tower": questions(TINY if options.quick else CLIP_L),
        "chat": second_question(SMALL if options.quick else VIT_B),
    }
    if options.quick:
        print(of_tower(results), of_chat(results), sep="\n\n")
        return
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    PAGE.write_text(written(PAGE.read_text(), results))


def written(page: str, results: Record) -> str:
    """Return the page with the tables of the results."""
    for name, table in (("tower", of_tower(results)), ("chat", of_chat(results))):
        before, mark, rest = page.partition(f"<!-- python -m benchmarks.trunk: {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        page = f"{before}{mark}\n{table}\n\n{end}{after}"
    return page


def of_tower(results: Record) -> str:
    """Return the table of the tower, and how it was made."""
    tower = results["tower"]
    count, giga = tower["count"], {name: n / 1e9 for name, n in tower["flops"].items()}
    rows = [
        (f"{count} calls", tower["full"], count * giga["full"]),
        ("floor: the same calls, their trunk counted once", tower["floor"], giga["trunk"] + count * giga["upper"]),
        (f"one trunk and {count} upper halves", tower["trunk"] + tower["upper"], giga["trunk"] + count * giga["upper"]),
    ]
    lines = ["| | CPU seconds | GFLOP |", "|---|---:|---:|"]
    lines += [f"| {name} | {seconds:.2f} | {operations:,.0f} |" for name, seconds, operations in rows]
    first, *_, last = tower["layers"]
    lines += [
        "",
        f"Made by `python -m benchmarks.trunk` ({results['made']}): blocks {first} to {last} adapted, CPU time of the "
        "process, both sides in turns; the outputs are equal bit for bit. One trunk with its upper halves takes "
        f"**{tower['of_floor']:.3f} of the floor** and {tower['of_full']:.2f} of the calls. The trunk of a picture "
        f"takes {tower['bytes'] / 1e6:.1f} MB in float32.",
    ]
    return "\n".join(lines)


def of_chat(results: Record) -> str:
    """Return the table of the policies."""
    lines = [
        "| policy | CPU seconds | trunk | adapted half | tokens in the language model |",
        "|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| `{row['policy']}` | {row['seconds']:.2f} | {row['trunk']} | {row['upper']} | {row['tokens']} |"
        for row in results["chat"]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
