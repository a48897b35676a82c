"""The measurements as tables and plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Record = dict[str, Any]


def rows_of(records: list[Record], **wanted: Any) -> list[Record]:
    """Return the records with these values."""
    return [r for r in records if all(r.get(key) == value for key, value in wanted.items())]


def table(header: list[str], rows: list[list[Any]]) -> str:
    """Format a Markdown table."""
    lines = [f"| {' | '.join(header)} |", f"|{'---|' + '---:|' * (len(header) - 1)}"]
    lines += [f"| {' | '.join(str(cell) for cell in row)} |" for row in rows]
    return "\n".join(lines)


def ratio(records: list[Record], key: str, *, name: str, **where: Any) -> float:
    """Return a time or number of a record relative to the baseline of its run."""
    own, base = (rows_of(records, name=each, **where)[0] for each in (name, "baseline"))
    return _value(own, key) / _value(base, key)


def _value(record: Record, key: str) -> float:
    value = record[key]
    return value["median"] if isinstance(value, dict) else value


def _times(record: Record, base: Record, key: str) -> list[str]:
    return [f"{_value(record, key) * 1e3:.0f}", f"{_value(record, key) / _value(base, key):.2f}"]


def block_table(records: list[Record], **where: Any) -> str:
    """Tabulate the ways to run one block, as ratios to the baseline of the same run."""
    found = rows_of(records, kind="block", **where)
    base = next(r for r in found if r["name"] == "baseline")
    rows = []
    for r in found:
        per_image = f"{r['bytes'] / r['batch'] / 1e6:.1f}"
        rows.append(
            [
                r["name"],
                *_times(r, base, "forward"),
                *_times(r, base, "forward_backward"),
                per_image,
                f"{r['bytes'] / base['bytes']:.2f}",
                "" if r.get("peak") is None else f"{r['peak'] / 1e6:.0f}",
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
        "peak, MB",
        "GFLOPs per image",
    ]
    return table(header, rows)


def batches_table(records: list[Record]) -> str:
    """Tabulate forward and backward of one block over the batch, as ratios to the baseline."""
    found = [r for part in ("batches", "block") for r in rows_of(records, part=part)]
    batches = sorted({r["batch"] for r in found})
    rows = []
    for dtype in ("float32", "bfloat16"):
        for name in ("activation", "all"):
            cells = [
                f"{ratio(found, 'forward_backward', name=name, dtype=dtype, batch=batch):.2f}" for batch in batches
            ]
            rows.append([f"{dtype}, {name}", *cells])
    return table(["", *(f"{batch} image{'s' * (batch > 1)}" for batch in batches)], rows)


def tower_table(records: list[Record]) -> str:
    """Tabulate the tower and its floor."""
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
        for r in rows_of(records, kind="tower")
    ]
    times = ["forward, s", "of its floor", "with backward, s", "of its floor"]
    header = ["", *times, "kept, GB per image", "GFLOPs", "GFLOPs with backward"]
    return table(header, rows)


def experts_table(records: list[Record]) -> str:
    """Tabulate the time of one block's forward over the number of experts."""
    found = rows_of(records, part="experts")
    counts = sorted({r["experts"] for r in found})
    rows = []
    for routing in ("dense", "sparse"):
        by_count = {r["experts"]: r["forward"]["median"] for r in found if r["routing"] == routing}
        rows.append([routing, *(f"{by_count[c]:.2f}" if c in by_count else "" for c in counts)])
    return table(["forward, s", *(f"{c} expert{'s' * (c > 1)}" for c in counts)], rows)


def overhead_table(records: list[Record]) -> str:
    """Tabulate CoVFT against freezing and full fine-tuning, for the tower alone; the paper's Table 8."""
    found = {r["name"]: r for r in rows_of(records, kind="tower")}
    plain, own = found["plain"], found["covft"]

    def row(name: str, trained: Record, *, tunes_tower: bool) -> list[str]:
        step = trained["forward_backward" if tunes_tower else "forward"]["median"]
        operations = trained["flops_step" if tunes_tower else "flops"]
        peak = trained.get("peak")
        return [
            name,
            f"{plain['forward']['median']:.2f}",
            f"{step:.2f}",
            f"{trained['forward']['median']:.2f}",
            f"{trained['bytes'] / trained['batch'] / 1e9 if tunes_tower else 0:.2f}",
            "" if peak is None or not tunes_tower else f"{peak / 1e9:.2f}",
            f"{operations / trained['batch'] / 1e9:.0f}",
            f"{trained['flops'] / trained['batch'] / 1e9:.0f}",
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
        "peak of tuning, GB",
        "GFLOPs of tuning",
        "of inference",
    ]
    return table(header, rows)


def goals_table(records: list[Record]) -> str:
    """Tabulate the goals and their measurements."""
    rows: list[list[str]] = []

    def add(what: str, goal: float, found: float, unit: str = "") -> None:
        verdict = "met" if found <= goal else "missed"
        rows.append([what, f"{goal:g}{unit}", f"{found:.3g}{unit}", verdict])

    blocks = rows_of(records, part="block")
    if blocks:
        goals = {"activation": (0.95, 0.85, 0.45), "all": (1.10, 0.95, 0.2)}
        for name, (wide, narrow, kept) in goals.items():
            for dtype, goal in (("float32", wide), ("bfloat16", narrow)):
                found = ratio(blocks, "forward_backward", name=name, dtype=dtype)
                add(f"Block, {name}, {dtype}: time, relative to the baseline's", goal, found)
            add(
                f"Block, {name}: bytes kept, relative to the baseline's",
                kept,
                ratio(blocks, "bytes", name=name, dtype="float32"),
            )
    for dtype in ("float32", "bfloat16"):
        compiled = rows_of(records, part="compiled", dtype=dtype)
        if compiled:
            found = ratio(compiled, "forward_backward", name="all")
            add(f"Block, compiled, {dtype}: time, relative to the compiled baseline's", 1, found)
    for r in rows_of(records, part="tower"):
        if r["name"] == "covft":
            add("Tower, forward: time, relative to the floor", 1.10, _value(r, "forward") / r["floor"])
        if r["name"].startswith("covft"):
            name = r["name"].partition("recompute=")[2] or "all"
            found = _value(r, "forward_backward") / r["floor_step"]
            add(f"Tower, {name}, forward and backward: time, relative to the floor", 1.15, found)
    experts = {(r["routing"], r["experts"]): _value(r, "forward") for r in rows_of(records, part="experts")}
    if ("sparse", 4) in experts:
        add("Sparse, 2 of 4 experts: time, relative to dense", 0.65, experts["sparse", 4] / experts["dense", 4])
        add("Sparse, 2 of 16 experts: time, relative to 2 of 4", 1.10, experts["sparse", 16] / experts["sparse", 4])
    for r in rows_of(records, kind="compressed"):
        add(
            "Compressed, forward: time, relative to the plain tower's",
            1.5,
            _value(r, "compressed") / _value(r, "plain"),
        )
    for r in rows_of(records, kind="wrap"):
        add("wrap() of the tower", 2, r["median"], " s")
        if r["peak"] is not None:
            add("wrap(): memory, relative to the added parameters", 1.1, r["peak"] / r["added"])
    return table(["", "at most", "measured", ""], rows)


def plots(records: list[Record], folder: Path) -> list[Path]:
    """Plot time and bytes of the ways to run a block, and time over the number of experts."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    blocks, experts = rows_of(records, part="block", kind="block"), rows_of(records, part="experts")
    if blocks:
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
        names = [name for name in dict.fromkeys(r["name"] for r in blocks) if name != "plain"]
        for offset, dtype in enumerate(("float32", "bfloat16")):
            places = [i + 0.4 * offset for i in range(len(names))]
            for axis, key in zip(axes, ("forward_backward", "bytes"), strict=True):
                axis.bar(places, [ratio(blocks, key, name=n, dtype=dtype) for n in names], 0.38, label=dtype)
                axis.set_xticks([i + 0.2 for i in range(len(names))], names)
        axes[0].set_title("forward and backward, of the baseline's time")
        axes[1].set_title("kept for backward, of the baseline's bytes")
        for axis in axes:
            axis.axhline(1, color="grey", linewidth=0.8)
            axis.legend()
        written.append(folder / "block.svg")
        figure.savefig(written[-1], metadata={"Date": None})
        plt.close(figure)
    if experts:
        figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
        for routing in ("dense", "sparse"):
            found = sorted(rows_of(experts, routing=routing), key=lambda r: r["experts"])
            axis.plot([r["experts"] for r in found], [_value(r, "forward") for r in found], "o-", label=routing)
        axis.set_xlabel("experts")
        axis.set_ylabel("forward of one block's slot, s")
        axis.set_ylim(bottom=0)
        axis.legend()
        written.append(folder / "experts.svg")
        figure.savefig(written[-1], metadata={"Date": None})
        plt.close(figure)
    return written


def page(result: dict[str, Any]) -> str:
    """Write the result as a Markdown page."""
    records: list[Record] = result["records"]
    parts = [
        "# Speed and memory",
        "",
        f"Made by `python -m benchmarks.speed --device cpu` on {result['date']}, {result['machine']}: CLIP-L/14 at 336 "
        f"pixels, 4 experts. Every figure is the median of {result['runs']} interleaved runs; ratios are within one "
        "run, so other load of the machine affects both sides; a GPU has [its own page](cuda.md). The outputs of both "
        "sides are compared before they are timed. *baseline* is the obvious implementation of the equations "
        "(`benchmarks/speed/baseline.py`): every expert runs, outputs are stacked, weighted and summed, and "
        "`nn.MultiheadAttention` runs over all tokens. *none*, "
        "*activation* and *all* are covft by [what backward recomputes](../guides/cheaper.md); *plain* is one FFN.",
        "",
        "## Goals",
        "",
        goals_table(records),
        "",
    ]
    for dtype in ("float32", "bfloat16"):
        found = rows_of(records, part="block", dtype=dtype)
        if found:
            batch = found[0]["batch"]
            parts += [f"## One block, {dtype}, {batch} images", "", block_table(records, part="block", dtype=dtype), ""]
    if rows_of(records, part="block"):
        parts += [
            "![Time and bytes, relative to the baseline](block.svg)",
            "",
            *_best(rows_of(records, part="block")),
            "",
        ]
    if rows_of(records, part="batches"):
        parts += [
            "## Over the batch",
            "",
            "Forward and backward of one block, relative to the baseline in the same run. Matrix products take nine "
            "tenths of the time on this CPU, and all except those of the attention are the same on both sides. The "
            "difference depends on how much memory each side allocates, and on how well the library's products suit "
            "the number of rows.",
            "",
            batches_table(records),
            "",
        ]
    if rows_of(records, part="compiled"):
        parts += ["## One block, compiled", ""]
        parts += ["The compiler itself decides what backward recomputes; the setting makes no difference.", ""]
        for dtype in ("float32", "bfloat16"):
            parts += [f"{dtype}:", "", block_table(records, part="compiled", dtype=dtype), ""]
    if rows_of(records, part="experts"):
        batch = rows_of(records, part="experts")[0]["batch"]
        picture = "![Time over the number of experts](experts.svg)"
        parts += [
            "## Over the number of experts",
            "",
            f"Float32, {batch} images; sparse takes two experts per image.",
            "",
        ]
        parts += [experts_table(records), "", picture, ""]
    if rows_of(records, kind="tower"):
        parts += [
            "## The whole tower",
            "",
            "One image, float32, 12 of 24 blocks adapted, features of `hidden_states[-2]`. The floor is the time of "
            "the plain tower, scaled by the floating-point operations that the method needs, each counted once, so the "
            "ratio includes what `recompute` repeats.",
            "",
            tower_table(records),
            "",
            "## The overhead table of the paper",
            "",
            "Table 8 of the paper is for the complete model on eight GPUs; this is the tower alone, one image, on one "
            "machine. In pre-training every method freezes the tower. The peak includes the gradients.",
            "",
            overhead_table(records),
            "",
        ]
    for r in rows_of(records, kind="compressed"):
        parts += [
            "## Compressed experts",
            "",
            f"After {r['steps']} steps of training, a forward after `compress({r['rank']})` takes "
            f"{_value(r, 'compressed') / _value(r, 'plain'):.2f} times as long as that of the plain tower. The "
            f"relative error of the features is {r['feature_error']:.1e}; that of the experts' differences is "
            f"{max(r['weight_error'].values()):.2f} in the worst block. Parameters of the experts: "
            f"{r['parameters_before'] / 1e6:.0f} M before, {r['parameters_after'] / 1e6:.0f} M after. Compression took "
            f"{r['seconds']:.0f} s.",
            "",
        ]
    for r in rows_of(records, kind="wrap"):
        memory = "" if r["peak"] is None else f", and {r['peak'] / 1e9:.2f} GB at the peak"
        parts += [
            "## wrap()",
            "",
            f"{r['median']:.2f} s for the whole tower, for {r['added'] / 1e9:.2f} GB of added parameters{memory}. On a "
            "virtual machine whose host provides memory at the first touch, the first call in a process takes longer: "
            f"{r['first_touch']:.2f} s here.",
            "",
        ]
    return "\n".join(parts)


def _best(blocks: list[Record]) -> list[str]:
    """Name the setting with the best product of time and bytes."""
    products = {
        name: ratio(blocks, "forward_backward", name=name, dtype="float32")
        * ratio(blocks, "bytes", name=name, dtype="float32")
        for name in ("none", "activation", "all")
    }
    listed = ", ".join(f"{product:.2f} for `{name}`" for name, product in products.items())
    best = min(products, key=lambda name: products[name])
    return [f"The product of time and bytes, relative to the baseline, is {listed}; so the default is `{best}`."]
