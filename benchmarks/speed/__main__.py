"""Measure speed and memory: `python -m benchmarks.speed`."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks.speed.cases import CLIP_L, TINY, measure_block, measure_compressed, measure_tower, measure_wrap
from benchmarks.speed.report import page, plots

PARTS = ("block", "compiled", "experts", "tower", "compressed", "wrap")


def measure(parts: tuple[str, ...], runs: int, device: str, tiny: bool) -> Iterator[dict[str, Any]]:
    """All records of the parts that were asked for.

    Args:
        parts: Of `PARTS`.
        runs: Measured runs of each way.
        device: Where it runs.
        tiny: Whether sizes are too small to say anything.
    """
    size = TINY if tiny else CLIP_L
    if "block" in parts:
        for dtype in (torch.float32, torch.bfloat16):
            for record in measure_block(size, batch=2, experts=4, dtype=dtype, runs=runs, device=device):
                yield {**record, "sweep": "main"}
    if "compiled" in parts:
        names = ("baseline", "none")
        for record in measure_block(size, batch=2, experts=4, compiled=True, names=names, runs=runs, device=device):
            yield {**record, "sweep": "main"}
    if "experts" in parts:
        for routing in ("dense", "sparse"):
            for experts in (4, 16) if tiny else (1, 2, 4, 8, 16):
                if routing == "dense" and experts == 16 and not tiny:
                    continue  # 16 FFNs over 16 images say nothing that 8 do not
                names = ("baseline", "activation") if experts == 1 else ("activation",)
                for record in measure_block(
                    size, batch=16, experts=experts, routing=routing, names=names, backward=False, runs=runs,
                    device=device,
                ):  # fmt: skip
                    yield {**record, "sweep": "experts"}
    if "tower" in parts:
        yield from measure_tower(size, runs=runs, device=device)
    if "compressed" in parts:
        yield from measure_compressed(size, rank=4 if tiny else 64, runs=runs, device=device)
    if "wrap" in parts:
        yield from measure_wrap(size, runs=runs)


def main(
    output: Annotated[Path, typer.Option(help="Folder for results.json.")] = Path("benchmarks/speed/results"),
    pages: Annotated[Path, typer.Option(help="Folder for the page and its plots.")] = Path("docs/speed"),
    part: Annotated[
        list[str] | None, typer.Option(help=f"What to measure: {', '.join(PARTS)}. All by default.")
    ] = None,
    runs: Annotated[int, typer.Option(help="Measured runs of each way.")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
    tiny: Annotated[bool, typer.Option(help="Sizes that say nothing, to try the command.")] = False,
) -> None:
    """Measure, and write results.json, a page and plots; parts that were measured before are kept."""
    console = Console()
    parts = tuple(part or PARTS)
    output.mkdir(parents=True, exist_ok=True)
    file = output / "results.json"
    before = json.loads(file.read_text())["records"] if file.exists() else []
    records: list[dict[str, Any]] = []
    for record in measure(parts, runs, device, tiny):
        records.append(record)
        seconds = record.get("forward_backward", record.get("forward", {})).get("median")
        console.print(record["kind"], record.get("name", ""), record.get("dtype", ""), record.get("mode", ""),
                      f"{record.get('experts', '')}", "" if seconds is None else f"{seconds:.3f} s")  # fmt: skip
    made = {_key(record) for record in records}
    kept = [record for record in before if _key(record) not in made]
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {device}",
        "runs": runs,
        "records": kept + records,
    }
    file.write_text(json.dumps(result, indent=1) + "\n")
    pages.mkdir(parents=True, exist_ok=True)
    (pages / "index.md").write_text(page(result))
    if any(record.get("sweep") == "main" for record in result["records"]):
        for path in plots(result["records"], pages):
            console.print(f"wrote {path}")
    console.print(f"wrote {file} and {pages / 'index.md'}")


def _key(record: dict[str, Any]) -> tuple[Any, ...]:
    names = ("kind", "sweep", "name", "dtype", "batch", "experts", "routing", "mode", "device")
    return tuple(record.get(name) for name in names)


if __name__ == "__main__":
    typer.run(main)
