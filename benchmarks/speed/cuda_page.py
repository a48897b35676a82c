"""The measurements of a GPU as a page of their own."""

from __future__ import annotations

from typing import Any

from benchmarks.speed.report import Record, rows_of, table

COMMAND = "python -m benchmarks.speed --device cuda"
# Samples of the two stages, and the GPUs that the paper trained on.
PRETRAINING, TUNING, GPUS = 558_000, 665_000, 8
# The paper's Table 8: hours of pre-training, instruction tuning; milliseconds; MB.
PAPER = {
    "freeze": ("2h 38m", "4h 28m", "7h 6m", "77.04", "41,352"),
    "full": ("2h 38m", "5h 14m", "7h 52m", "77.04", "44,036"),
    "covft": ("2h 38m", "5h 32m", "8h 10m", "88.17", "49,974"),
}


def page(result: dict[str, Any] | None) -> str:
    """Write the page; without a result it says how to get one."""
    parts = ["# Speed and memory on a GPU", ""]
    if result is None:
        parts += [
            "Nothing has been measured on a GPU yet: no figure in these pages is from one. On a machine with CUDA, "
            "with torch 2.8 or later, transformers, timm, accelerate, peft and pytest, in a copy of the repository:",
            "",
            *("```bash", "python -m pytest tests/gpu -m gpu --device cuda", COMMAND, "```", ""),
            "The first checks that everything holds there, the second writes this page. `make gpu` runs both. Without "
            "a GPU, `--device cpu --quick` tries either with toy sizes.",
            "",
        ]
        return "\n".join(parts)
    records: list[Record] = result["records"]
    parts += [
        f"Made by `{COMMAND}` on {result['date']}, {result['machine']}. CLIP-L/14 at 336 pixels, 4 experts in 12 of 24 "
        f"blocks, bfloat16. Every figure is the median of {result['runs']} runs, timed by the GPU's events, each over "
        "as many calls as take 20 ms. *baseline* is the obvious implementation of the equations "
        "(`benchmarks/speed/baseline.py`); *floor* is the time of the matrix products alone; *eager* has torch's "
        "operations between the products, the other rows of covft Triton kernels.",
        "",
        *(line for note in result.get("notes", ()) for line in (note, "")),
    ]
    if rows_of(records, part="block", dtype="bfloat16"):
        parts += ["## One block", "", *_block(records), ""]
    if rows_of(records, kind="tower"):
        parts += ["## The tower", "", _tower(rows_of(records, part="tower")), ""]
        parts += ["Its floor is the plain tower's time, scaled by the operations that the method needs.", ""]
    if rows_of(records, kind="llava"):
        parts += ["## LLaVA-1.5-7B", "", *_llava(rows_of(records, kind="llava")), ""]
    return "\n".join(parts)


def _block(records: list[Record]) -> list[str]:
    eager = rows_of(records, part="block", dtype="bfloat16")
    compiled = rows_of(records, part="compiled", dtype="bfloat16")
    base = rows_of(eager, name="baseline")[0]
    floor = next(iter(rows_of(eager, kind="products")), None)
    fast = next(iter(rows_of(compiled, name="baseline")), None)
    rows = []
    for record in [*eager, *compiled]:
        name = f"{record['name']}, compiled" if record.get("mode") == "compiled" else record["name"]
        row = [name]
        for key in ("forward", "forward_backward"):
            found = record[key]["median"]
            row += [f"{found * 1e3:.2f}"]
            row += ["" if other is None else f"{found / other[key]['median']:.2f}" for other in (base, fast, floor)]
        kept = f"{record['bytes'] / record['batch'] / 1e6:.1f}" if "bytes" in record else ""
        row += [kept, f"{record['peak'] / 1e6:.0f}" if record.get("peak") else ""]
        rows.append(row)
    ratios = ["of baseline", "of compiled", "of floor"]
    header = ["", "forward, ms", *ratios, "with backward, ms", *ratios, "kept, MB per image", "peak, MB"]
    return [f"{base['batch']} images. *compiled* is the baseline under `torch.compile`.", "", table(header, rows)]


def _tower(records: list[Record]) -> str:
    base = rows_of(records, name="baseline")[0]
    rows = []
    for record in records:
        row = [record["name"]]
        for key, floor in (("forward", "floor"), ("forward_backward", "floor_step")):
            found = record[key]["median"]
            row += [f"{found * 1e3:.1f}", f"{found / base[key]['median']:.2f}", f"{found / record[floor]:.2f}"]
        rows.append(
            [
                *row,
                f"{record['bytes'] / record['batch'] / 1e6:.0f}",
                f"{record['peak'] / 1e9:.2f}" if record["peak"] else "",
            ]
        )
    ratios = ["of baseline", "of floor"]
    header = ["", "forward, ms", *ratios, "with backward, ms", *ratios, "kept, MB per image", "peak, GB"]
    return table(header, rows)


def _llava(records: list[Record]) -> list[str]:
    rows = []
    for record in records:
        seconds = [record[stage]["median"] / record["batch"] for stage in ("pretraining", "step")]
        stages = [seconds[0] * PRETRAINING / GPUS, seconds[1] * TUNING / GPUS]
        hours = [_hours(value) for value in [*stages, sum(stages)]]
        steps = [f"{record[stage]['median'] * 1e3:.1f}" for stage in ("pretraining", "step")]
        peak = f"{record['step']['peak'] / 1e6:,.0f}" if record["step"]["peak"] else ""
        theirs = PAPER.get(record["name"].partition(",")[0], ())
        shown = theirs if record["name"] in ("freeze", "full", "covft, recompute=all") else ()
        answer = f"{record['inference']['median'] * 1e3:.2f}"
        rows.append([record["name"], *steps, *hours, answer, peak, " / ".join(shown)])
    first = records[0]
    header = [
        "",
        "pre-training step, ms",
        "tuning step, ms",
        "pre-training",
        "instruction tuning",
        "total",
        "inference, ms",
        "peak, MB",
        "the paper's Table 8",
    ]
    return [
        f"A model of that shape with random weights, on one GPU: {first['batch']} rows of {first['tokens']} tokens, "
        "one image each. The language model trains low-rank adapters with activation checkpointing, the projector "
        "trains in full, all in bfloat16 with AdamW; the paper trains the language model in full on eight GPUs. The "
        f"hours are arithmetic: the measured time per sample, for {PRETRAINING:,} and {TUNING:,} samples on {GPUS} "
        "GPUs. Inference is one row up to its first token. The last column is the paper's: pre-training / instruction "
        "tuning / total / inference, ms / peak, MB.",
        "",
        table(header, rows),
    ]


def _hours(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60}h {minutes % 60}m"
