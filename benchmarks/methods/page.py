"""Writes `docs/methods/cost.md`, its plot, and the table of `docs/methods/index.md` from the results."""

from __future__ import annotations

import math
import re
import statistics
from pathlib import Path
from typing import Any

from benchmarks.speed.report import table
from benchmarks.speed.sizes import Record
from covft.tuning import Method, methods

RESULTS = Path(__file__).parent / "results" / "cpu.json"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods" / "cost.md"
INDEX = "index.md"
PLOT = "cost.svg"
_TABLE = re.compile(r"(<!-- table: python -m benchmarks\.methods -->\n)(.*?)(<!-- end of the table -->)", re.DOTALL)


def relative(record: Record, part: str) -> float:
    """Return the median over the runs of a time, relative to that of the frozen tower or of full tuning beside it.

    Args:
        record: Of one method.
        part: `"forward"`, relative to the frozen tower's, or `"step"`, relative to that of full tuning.
    """
    base = record["frozen_forward" if part == "forward" else "full_step"]
    return statistics.median(own / other for own, other in zip(record[part], base, strict=True))


def page(result: dict[str, Any]) -> str:
    """Return the page."""
    records: list[Record] = result["methods"]
    plain = result["plain"]
    full = next(record for record in records if record["method"] == "full")
    frozen = next(record for record in records if record["method"] == "frozen")
    when = "; ".join(dict.fromkeys(f"{r['date']}, {r['machine']}" for r in records))
    clocks = " and ".join(dict.fromkeys(r["clock"] for r in records))
    number = sorted({len(record["step"]) for record in records})
    runs = str(number[0]) if len(number) == 1 else f"{number[0]} to {number[-1]}"
    longest, shortest = statistics.median(full["step"]), statistics.median(frozen["forward"])
    parts = [
        "---\nhide:\n  - toc\n---",
        "",
        "# What each method costs",
        "",
        f"Made by `python -m benchmarks.methods` ({when}): the CLIP-L/14 of transformers at 336 pixels with random "
        f"weights, {plain['parameters']:,} parameters, one image, float32, the features of the text given (768 wide, "
        "of 16 tokens for methods that read tokens). All methods run on the same tower, one after the other, which is "
        "restored after each. A step is forward and backward, without the optimizer.",
        "",
        f"Times are {clocks}, medians of {runs} interleaved runs: a *forward* relative to that of the frozen tower, "
        f"{shortest:.1f} s here, and a *step* relative to that of full fine-tuning, {longest:.1f} s, both measured "
        "again every few methods, since the machine had other work. The forward of a method that adds nothing is the "
        f"frozen tower's, so its distance from 1, up to {_disturbance(records):.2f}, shows how far to trust these "
        "figures. *GFLOPs* are those of a forward and of a step, two operations per multiply-add of matrix products. "
        "*Kept* is what autograd keeps of the forward, without "
        "weights. Operations are counted by `covft.budget`; bytes are measured, and `covft.budget` gives the same.",
        "",
        _methods(records, plain["flops"]),
        "",
        f"![Step time and kept bytes over the number of trained parameters]({PLOT})",
        "",
        "Gradients and AdamW's moments take 12 bytes per trained parameter in addition, in float32. The dashed line is "
        "the frozen tower. Experts are [recomputed](../guides/cheaper.md) in backward.",
        "",
        _elsewhere(result["q_moe"]),
        "",
        "## With the same number of parameters",
        "",
        "Table 7 of the [paper](https://arxiv.org/abs/2603.21077) sets LoRA of rank 512 against covft in 4 blocks. "
        f"That LoRA is the one on the four projections of the attention, with {_wanted(result):,} parameters: with the "
        "6.76 billion of language model and projector these are the table's 6.86. Four blocks of covft, by the "
        f"equations with four experts and norms, train {_four(records):,}, which would be "
        f"{(6_759_395_328 + _four(records)) / 1e9:.2f}; the table has 6.85, less than four experts of this FFN in four "
        "blocks have alone, so its count is of something else. What comes closest to that LoRA, by `covft.match`:",
        "",
        _matched(result),
        "",
    ]
    return "\n".join(parts)


def indexed(text: str, result: dict[str, Any]) -> str:
    """Return the page about all methods with its table.

    Args:
        text: The page.
        result: The results.
    """
    known = methods()
    header = ["", "text", "size", "trained, M", "kept, MB", "forward", "step"]
    rows, seen = [], set()
    for record in result["methods"]:
        name = record["method"]
        if name in seen:
            continue  # with other options
        seen.add(name)
        method = known.get(name)
        told, text_too, size = _COVFT if method is None else _told(method)
        rows.append(
            [
                f"{_linked(name, {})}<br>{told.rstrip('.')}",
                "yes" if text_too else "",
                size,
                f"{record['parameters'] / 1e6:.2f}",
                f"{record['bytes'] / 1e6:.0f}",
                f"{relative(record, 'forward'):.2f}",
                f"{relative(record, 'step'):.2f}",
            ]
        )
    found, places = _TABLE.subn(lambda match: f"{match[1]}\n{table(header, rows)}\n\n{match[3]}", text)
    if places != 1:
        raise ValueError(f"{INDEX} has {places} places for a table")
    return found


_COVFT = ("Mix experts of the FFN, by image and text.", True, "<code>expert_<wbr>rank</code>")


def _told(method: type[Method]) -> tuple[str, bool, str]:
    """Return the first line of a method's docstring, whether it needs text, and its size."""
    return (method.__doc__ or "").partition("\n")[0], method.needs_text, f"`{method.size}`" if method.size else ""


def _disturbance(records: list[Record]) -> float:
    """Return the largest distance from 1 of a forward that takes as long as the frozen tower's."""
    return max(abs(relative(record, "forward") - 1) for record in records if not record["added"])


def _elsewhere(record: Record) -> str:
    """Say what the methods cost that have no line of their own."""
    return (
        "The start of [`svpt`](svpt.md), which runs the tower once over given images, is not in its times. "
        f"[`q_moe`](q_moe.md) is in the connector of a multimodal LLM: in that of LLaVA-1.5-7B it trains "
        f"{record['parameters']:,} parameters, and `covft.budget` counts {record['flops'] / 1e9:.0f} GFLOPs per image "
        f"more in a forward, {record['flops_step'] / 1e9:.0f} more in a step, and {record['bytes'] / 1e6:.0f} MB kept, "
        "in float32."
    )


def _wanted(result: dict[str, Any]) -> int:
    return next(r["parameters"] for r in result["methods"] if r["of"] and r["method"] == "lora")


def _four(records: list[Record]) -> int:
    return next(r["parameters"] for r in records if r["of"] and r["method"] == "covft")


def _methods(records: list[Record], flops: int) -> str:
    header = ["", "trained", "added", "GFLOPs", "of a step", "kept, MB", "forward", "step"]
    rows = [
        [
            _linked(record["method"], record["options"]),
            f"{record['parameters']:,}",
            f"{record['added']:,}",
            f"{(flops + record['flops']) / 1e9:.0f}",
            f"{(flops + record['flops_step']) / 1e9:.0f}",
            f"{record['bytes'] / 1e6:.0f}",
            f"{relative(record, 'forward'):.2f}",
            f"{relative(record, 'step'):.2f}",
        ]
        for record in records
    ]
    return table(header, rows)


def _matched(result: dict[str, Any]) -> str:
    wanted = _wanted(result)
    header = ["", "trained", "difference", ""]
    rows = []
    for record in result["matched"]:
        apart = record["parameters"] - wanted
        rows.append(
            [
                _linked(record["method"], record["options"]),
                f"{record['parameters']:,}",
                f"{apart:+,}",
                f"{apart / wanted:+.2%}",
            ]
        )
    return table(header, rows)


def _linked(method: str, options: dict[str, Any]) -> str:
    told = ", ".join(f"{name}={_value(value)}" for name, value in options.items())
    page = "last_layers" if method == "top_layer" else method
    return f"[`{method}`]({page}.md)" + (f" {told}" if told else "")


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"{value[0]}&ndash;{value[-1]}" if len(value) > 1 else f"{value[0]}"
    return str(value)


def plot(result: dict[str, Any], file: Path) -> None:
    """Plot step time and kept bytes over the number of trained parameters."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "covft"  # the same names of elements every time
    import matplotlib.pyplot as plt

    records = [record for record in result["methods"] if record["parameters"]]
    frozen = next(record for record in result["methods"] if not record["parameters"])
    figure, axes = plt.subplots(2, 1, figsize=(8, 8.5), sharex=True, layout="constrained")
    values = ((lambda r: relative(r, "step"), "step, of full tuning's time"), (lambda r: r["bytes"] / 1e6, "kept, MB"))
    for axis, (value, label) in zip(axes, values, strict=True):
        for reads, told, marker in ((True, "reads the text", "o"), (False, "does not", "s")):
            found = [r for r in records if (r["method"] in _READ_TEXT) == reads]
            axis.scatter([r["parameters"] for r in found], [value(r) for r in found], marker=marker, label=told)
        axis.axhline(value(frozen), color="grey", linewidth=0.8, linestyle="--")
        axis.set_xscale("log")
        axis.set_xlim(right=3e9 if records[0]["parameters"] > 1e8 else None)  # room for names
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        places = [(math.log10(r["parameters"]), value(r) / axis.get_ylim()[1], r) for r in records]
        for height, place, record in _apart(places):
            line = {"arrowstyle": "-", "linewidth": 0.4, "color": "grey"} if height > place else None
            axis.annotate(
                record["name"], (record["parameters"], place * axis.get_ylim()[1]), fontsize=7, va="center",
                xytext=(6, (height - place) * 72 * 4), textcoords="offset points", arrowprops=line,
            )  # fmt: skip
    axes[0].legend(loc="upper left", fontsize=8)
    axes[1].set_xlabel("trained parameters")
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def _apart(places: list[tuple[float, float, Record]]) -> list[tuple[float, float, Record]]:
    """Return where each name stands, as a share of the axis: not over one beside it."""
    placed: list[tuple[float, float]] = []
    found = []
    for x, y, record in sorted(places, key=lambda place: place[:2]):
        height = y
        while any(abs(x - other) < _WIDE and abs(height - taken) < _HIGH for other, taken in placed):
            height += _HIGH / 4
        placed.append((x, height))
        found.append((height, y, record))
    return found


_WIDE, _HIGH = 1.3, 0.035  # of a name: decades, and a share of the axis
_READ_TEXT = ("qa_vit", "adaln", "cross_attention", "covft")
