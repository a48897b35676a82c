"""The measurements as tables and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Record = dict[str, Any]


def rows_of(records: list[Record], **wanted: Any) -> list[Record]:
    """Records with these values."""
    return [r for r in records if all(r.get(key) == value for key, value in wanted.items())]


def table(header: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(header)} |", f"|{'---|' + '---:|' * (len(header) - 1)}"]
    lines += [f"| {' | '.join(str(cell) for cell in row)} |" for row in rows]
    return "\n".join(lines)


def block_table(records: list[Record], **where: Any) -> str:
    """Ways to run one block, as ratios to the baseline of the same run."""
    found = rows_of(records, kind="block", **where)
    base = next(r for r in found if r["name"] == "baseline")
    rows = []
    for r in found:
        both = r.get("forward_backward")
        rows.append(
            [
                r["name"],
                f"{r['forward']['median'] * 1e3:.0f}",
                f"{r['forward']['median'] / base['forward']['median']:.2f}",
                "" if both is None else f"{both['median'] * 1e3:.0f}",
                "" if both is None else f"{both['median'] / base['forward_backward']['median']:.2f}",
                f"{r['bytes'] / r['batch'] / 1e6:.1f}" if "bytes" in r else "",
                f"{r['bytes'] / base['bytes']:.2f}" if "bytes" in r else "",
                f"{r['flops'] / r['batch'] / 1e9:.1f}" if "flops" in r else "",
            ]
        )
    header = [
        "",
        "forward, ms",
        "ratio",
        "with backward, ms",
        "ratio",
        "kept, MB per image",
        "ratio",
        "GFLOPs per image",
    ]
    return table(header, rows)


def tower_table(records: list[Record]) -> str:
    """A whole tower, beside its floor."""
    found = rows_of(records, kind="tower")
    rows = [
        [
            r["name"],
            f"{r['forward']['median']:.2f}",
            f"{r['forward']['median'] / r['floor']:.2f}",
            f"{r['forward_backward']['median']:.2f}",
            f"{r['forward_backward']['median'] / r['floor_step']:.2f}",
            f"{r['bytes'] / r['batch'] / 1e9:.2f}",
            f"{r['flops'] / r['batch'] / 1e9:.0f}",
            f"{r['flops_step'] / r['batch'] / 1e9:.0f}",
        ]
        for r in found
    ]
    times = ["forward, s", "of its floor", "with backward, s", "of its floor"]
    header = ["", *times, "kept, GB per image", "GFLOPs", "GFLOPs with backward"]
    return table(header, rows)


def experts_table(records: list[Record]) -> str:
    """Time of one block's forward over the number of experts."""
    found = [r for r in rows_of(records, kind="block", sweep="experts") if r["name"] == "activation"]
    counts = sorted({r["experts"] for r in found})
    rows = []
    for routing in ("dense", "sparse"):
        by_count = {r["experts"]: r["forward"]["median"] for r in found if r["routing"] == routing}
        rows.append([routing, *(f"{by_count[c] * 1e3:.0f}" if c in by_count else "" for c in counts)])
    return table(["forward, ms", *(f"{c} experts" for c in counts)], rows)


def overhead_table(records: list[Record]) -> str:
    """The paper's Table 8: what CoVFT costs beside freezing and full fine-tuning, for the tower alone."""
    found = {r["name"]: r for r in rows_of(records, kind="tower")}
    plain, own = found["plain"], found["covft"]

    def row(name: str, trained: Record, *, tunes_tower: bool) -> list[str]:
        step = trained["forward_backward" if tunes_tower else "forward"]["median"]
        kept = trained["bytes"] / trained["batch"] / 1e9 if tunes_tower else 0.0
        operations = trained["flops_step" if tunes_tower else "flops"]
        return [
            name,
            f"{plain['forward']['median']:.2f}",
            f"{step:.2f}",
            f"{trained['forward']['median']:.2f}",
            f"{kept:.2f}",
            f"{operations / trained['batch'] / 1e9:.0f}",
        ]

    rows = [
        row("Freeze", plain, tunes_tower=False),
        row("Full fine-tuning", plain, tunes_tower=True),
        row("CoVFT", own, tunes_tower=True),
    ]
    header = [
        "",
        "pre-training, s",
        "instruction tuning, s",
        "inference, s",
        "kept for backward, GB",
        "GFLOPs of tuning",
    ]
    return table(header, rows)


def plots(records: list[Record], folder: Path) -> list[Path]:
    """Pictures: time and bytes of the ways to run a block, time over the number of experts."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for offset, dtype in enumerate(("float32", "bfloat16")):
        found = rows_of(records, kind="block", sweep="main", dtype=dtype, mode="eager")
        found = [r for r in found if r["name"] != "plain"]
        if not found:
            continue
        base = next(r for r in found if r["name"] == "baseline")
        places = [i + 0.4 * offset for i in range(len(found))]
        times = [r["forward_backward"]["median"] / base["forward_backward"]["median"] for r in found]
        axes[0].bar(places, times, 0.38, label=dtype)
        axes[1].bar(places, [r["bytes"] / base["bytes"] for r in found], 0.38, label=dtype)
        for axis in axes:
            axis.set_xticks([i + 0.2 for i in range(len(found))], [r["name"] for r in found])
    axes[0].set_title("forward and backward, of the baseline's time")
    axes[1].set_title("kept for backward, of the baseline's bytes")
    for axis in axes:
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.legend()
    written.append(folder / "block.svg")
    figure.savefig(written[-1], metadata={"Date": None})
    plt.close(figure)
    figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for routing in ("dense", "sparse"):
        found = [
            r for r in rows_of(records, kind="block", sweep="experts", routing=routing) if r["name"] == "activation"
        ]
        found.sort(key=lambda r: r["experts"])
        axis.plot([r["experts"] for r in found], [r["forward"]["median"] * 1e3 for r in found], "o-", label=routing)
    axis.set_xlabel("experts")
    axis.set_ylabel("forward of one block's slot, ms")
    axis.set_ylim(bottom=0)
    axis.legend()
    written.append(folder / "experts.svg")
    figure.savefig(written[-1], metadata={"Date": None})
    plt.close(figure)
    return written


def page(result: dict[str, Any]) -> str:
    """The whole result as a page."""
    records: list[Record] = result["records"]
    machine = result["machine"]
    parts = [
        "# Speed and memory",
        "",
        f"Made by `python -m benchmarks.speed` on {result['date']}, {machine}. Every figure is the median of "
        f"{result['runs']} runs that took turns; ratios are within one run, so what the machine does besides meets "
        "both sides. The numbers of both sides are compared before they are timed. *baseline* is the obvious "
        "implementation of the equations (`benchmarks/speed/baseline.py`): every expert runs, outputs are stacked, "
        "weighed and summed, and `nn.MultiheadAttention` runs over all tokens. *none*, *activation* and *all* are "
        "covft by what backward recomputes.",
        "",
    ]
    for dtype, title in (("float32", "One block, float32"), ("bfloat16", "One block, bfloat16")):
        if rows_of(records, kind="block", sweep="main", dtype=dtype, mode="eager"):
            parts += [f"## {title}", "", block_table(records, sweep="main", dtype=dtype, mode="eager"), ""]
    if rows_of(records, kind="block", sweep="main", mode="eager"):
        parts += ["![Time and bytes, of the baseline's](block.svg)", ""]
    if rows_of(records, kind="block", sweep="main", mode="compiled"):
        parts += ["## One block, compiled, float32", "", block_table(records, sweep="main", mode="compiled"), ""]
    if rows_of(records, kind="block", sweep="experts"):
        picture = "![Time over the number of experts](experts.svg)"
        parts += ["## Over the number of experts", "", experts_table(records), "", picture, ""]
    if rows_of(records, kind="tower"):
        parts += [
            "## The whole tower",
            "",
            "The floor is the time of the plain tower, scaled by the floating-point operations that the method needs; "
            "nothing is counted twice, so what `recompute` makes again is part of the ratio.",
            "",
            tower_table(records),
            "",
            "## The overhead table of the paper",
            "",
            "Table 8 of the paper has the whole model on eight GPUs; this is the tower alone, one image, on a CPU. In "
            "pre-training the tower is frozen for every method.",
            "",
            overhead_table(records),
            "",
        ]
    for r in rows_of(records, kind="compressed"):
        ratio = r["compressed"]["median"] / r["plain"]["median"]
        parts += [
            "## Compressed experts",
            "",
            f"After {r['steps']} steps of training, `compress({r['rank']})` makes a forward {ratio:.2f} times that of "
            f"the plain tower. The features differ from those of the whole experts by {r['feature_error']:.1e} "
            f"relative; of the experts' differences, {max(r['weight_error'].values()):.2f} is lost in the worst block. "
            f"Parameters of the experts: {r['parameters_before'] / 1e6:.0f} M before, "
            f"{r['parameters_after'] / 1e6:.0f} M after.",
            "",
        ]
    for r in rows_of(records, kind="wrap"):
        parts += ["## wrap()", "", f"{r['median']:.2f} s for the whole tower.", ""]
    return "\n".join(parts)
