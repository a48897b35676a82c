"""Measure speed and memory: `python -m benchmarks.speed`."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.speed.cases import (
    CLIP_L,
    TINY,
    Record,
    Size,
    measure_block,
    measure_compressed,
    measure_tower,
    measure_variants,
    measure_wrap,
)
from benchmarks.speed.report import page, plots

# Images per process in LLaVA's instruction tuning.
BATCH = 16
DTYPES = (torch.float32, torch.bfloat16)
EXPERTS = (1, 2, 4, 8, 16)


def _blocks(size: Size, runs: int, device: str, tiny: bool) -> Iterator[Record]:
    for dtype in DTYPES:
        yield from measure_block(size, batch=2 if tiny else BATCH, experts=4, dtype=dtype, runs=runs, device=device)


def _batches(size: Size, runs: int, device: str, tiny: bool) -> Iterator[Record]:
    names = ("baseline", "activation", "all")
    for dtype in DTYPES:
        for batch in (1, 3) if tiny else (1, 4):
            yield from measure_block(
                size, batch=batch, experts=4, dtype=dtype, names=names, runs=runs, device=device
            )  # fmt: skip


def _compiled(size: Size, runs: int, device: str, tiny: bool) -> Iterator[Record]:
    for dtype in DTYPES:
        yield from measure_block(
            size, batch=2 if tiny else 4, experts=4, dtype=dtype, compiled=True, names=("baseline", "all"),
            runs=runs, device=device,
        )  # fmt: skip


def _experts(size: Size, runs: int, device: str, tiny: bool) -> Iterator[Record]:
    for routing in ("dense", "sparse"):
        for experts in (4, 16) if tiny else EXPERTS:
            yield from measure_block(
                size, batch=2 if tiny else BATCH, experts=experts, routing=routing, names=("all",),
                backward=False, runs=runs, device=device,
            )  # fmt: skip


def _tower(size: Size, runs: int, device: str, tiny: bool) -> Iterator[Record]:
    yield from measure_tower(size, runs=runs, device=device)


def _variants(size: Size, runs: int, device: str, tiny: bool) -> Iterator[Record]:
    yield from measure_variants(size, runs=runs, device=device)


def _compressed(size: Size, runs: int, device: str, tiny: bool) -> Iterator[Record]:
    yield from measure_compressed(size, rank=4 if tiny else 64, runs=runs, device=device)


def _wrap(size: Size, runs: int, device: str, tiny: bool) -> Iterator[Record]:
    yield from measure_wrap(size, runs=runs, device=device)


PARTS = {
    "block": _blocks,
    "batches": _batches,
    "compiled": _compiled,
    "experts": _experts,
    "tower": _tower,
    "variants": _variants,
    "compressed": _compressed,
    "wrap": _wrap,
}


def main(
    output: Annotated[Path, typer.Option(help="Folder for results.json.")] = Path("benchmarks/speed/results"),
    pages: Annotated[Path, typer.Option(help="Folder for the page and its plots.")] = Path("docs/speed"),
    part: Annotated[
        list[str] | None, typer.Option(help=f"What to measure: {', '.join(PARTS)}. All by default.")
    ] = None,
    runs: Annotated[int, typer.Option(help="Measured runs of each way.")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
    tiny: Annotated[bool, typer.Option(help="Meaningless sizes, to try the command.")] = False,
) -> None:
    """Measure, and write results.json, a page and plots; parts measured earlier are kept."""
    console = Console()
    file = output / "results.json"
    for name in part or PARTS:
        records = []
        for record in PARTS[name](TINY if tiny else CLIP_L, runs, device, tiny):
            records.append({"part": name, **record})
            console.print(name, _shown(record))
        _write(file, records, name, runs, device)
    result = json.loads(file.read_text())
    pages.mkdir(parents=True, exist_ok=True)
    (pages / "index.md").write_text(page(result))
    for path in plots(result["records"], pages):
        console.print(f"wrote {path}")
    console.print(f"wrote {file} and {pages / 'index.md'}")


def _write(file: Path, records: list[Record], part: str, runs: int, device: str) -> None:
    """Replace the earlier records of a part."""
    file.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(file.read_text())["records"] if file.exists() else []
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {device}",
        "runs": runs,
        "records": [record for record in before if record["part"] != part] + records,
    }
    aside = file.with_suffix(".part")
    aside.write_text(json.dumps(result, indent=1) + "\n")
    aside.replace(file)


def _shown(record: Record) -> str:
    parts = [str(record[key]) for key in ("name", "dtype", "batch", "experts", "routing") if key in record]
    for key in ("forward", "forward_backward"):
        if key in record:
            parts.append(f"{key} {record[key]['median']:.3f} s")
    return ", ".join(parts)


if __name__ == "__main__":
    typer.run(main)
