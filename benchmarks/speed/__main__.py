"""Measure speed and memory: `python -m benchmarks.speed`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

from benchmarks.speed import cuda_page, report
from benchmarks.speed.block import measure_block, measure_products
from benchmarks.speed.llava import LLAVA_7B, TOY, measure_llava
from benchmarks.speed.measure import machine
from benchmarks.speed.once import measure_compressed, measure_wrap
from benchmarks.speed.sizes import CLIP_L, TINY, Record, Size
from benchmarks.speed.tower import measure_tower, measure_variants
from covft.nn.fused import has_triton


@dataclass(frozen=True)
class Run:
    """What the parts need to know.

    Attributes:
        device: Where to measure.
        runs: Measured runs of each way.
        quick: Whether to use toy sizes, whose figures mean nothing.
    """

    device: str
    runs: int
    quick: bool

    @property
    def size(self) -> Size:
        """Sizes of the tower."""
        return TINY if self.quick else CLIP_L

    @property
    def cuda(self) -> bool:
        """Whether a GPU is measured."""
        return self.device.startswith("cuda")

    @property
    def batch(self) -> int:
        """Images per process in LLaVA's instruction tuning."""
        return 2 if self.quick else 16

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """What people train in on this device."""
        return (torch.bfloat16,) if self.cuda else (torch.float32, torch.bfloat16)


def _blocks(run: Run) -> Iterator[Record]:
    names = ["plain", "baseline", "none", "activation", "all"]
    if run.cuda and has_triton():  # then the others run its kernels
        names += ["activation, eager", "all, eager"]
    for dtype in run.dtypes:
        common = {"batch": run.batch, "experts": 4, "dtype": dtype, "runs": run.runs, "device": run.device}
        yield from measure_block(run.size, names=tuple(names), **common)
        if run.cuda or run.quick:
            yield from measure_products(run.size, **common)


def _batches(run: Run) -> Iterator[Record]:
    names = ("baseline", "activation", "all")
    for dtype in run.dtypes:
        for batch in (1, 3) if run.quick else (1, 4):
            yield from measure_block(
                run.size, batch=batch, experts=4, dtype=dtype, names=names, runs=run.runs, device=run.device
            )  # fmt: skip


def _compiled(run: Run) -> Iterator[Record]:
    for dtype in run.dtypes:
        yield from measure_block(
            run.size, batch=run.batch if run.cuda or run.quick else 4, experts=4, dtype=dtype,
            backend="aot_eager" if run.quick else "inductor", names=("baseline", "all"),
            runs=run.runs, device=run.device,
        )  # fmt: skip


def _experts(run: Run) -> Iterator[Record]:
    for routing in ("dense", "sparse"):
        for experts in (4, 16) if run.quick else (1, 2, 4, 8, 16):
            yield from measure_block(
                run.size, batch=run.batch, experts=experts, routing=routing, names=("all",),
                backward=False, runs=run.runs, device=run.device,
            )  # fmt: skip


def _tower(run: Run) -> Iterator[Record]:
    batch, dtype = (run.batch, torch.bfloat16) if run.cuda else (1, torch.float32)
    yield from measure_tower(run.size, batch=batch, dtype=dtype, runs=run.runs, device=run.device)


def _variants(run: Run) -> Iterator[Record]:
    yield from measure_variants(run.size, runs=run.runs, device=run.device)


def _compressed(run: Run) -> Iterator[Record]:
    yield from measure_compressed(run.size, rank=4 if run.quick else 64, runs=run.runs, device=run.device)


def _wrap(run: Run) -> Iterator[Record]:
    yield from measure_wrap(run.size, runs=run.runs, device=run.device)


def _llava(run: Run) -> Iterator[Record]:
    yield from measure_llava(TOY if run.quick else LLAVA_7B, runs=run.runs, device=run.device)


PARTS = {
    "block": _blocks,
    "batches": _batches,
    "compiled": _compiled,
    "experts": _experts,
    "tower": _tower,
    "variants": _variants,
    "compressed": _compressed,
    "wrap": _wrap,
    "llava": _llava,
}
ON_CUDA = ("block", "compiled", "tower", "llava")
ON_CPU = tuple(name for name in PARTS if name != "llava")  # seven billion parameters take a CPU minutes per step


def main(words: Sequence[str] | None = None) -> None:
    """Measure, and write the results and a page; parts measured earlier on the same kind of device are kept."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=main.__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="cpu or cuda; by default cuda where there is one")
    parser.add_argument("--part", action="append", choices=list(PARTS), help="what to measure; may be repeated")
    parser.add_argument("--runs", type=int, default=5, help="measured runs of each way")
    parser.add_argument("--quick", action="store_true", help="toy sizes, to try the command; written to a new folder")
    parser.add_argument("--output", type=Path, help="folder for cpu.json or cuda.json")
    parser.add_argument("--pages", type=Path, help="folder for the page and its plots")
    options = parser.parse_args(words)
    folder = Path(tempfile.mkdtemp(prefix="speed-")) if options.quick else None  # never over real figures
    output = options.output or folder or Path("benchmarks/speed/results")
    pages = options.pages or folder or Path("docs/speed")
    run = Run(options.device, min(options.runs, 2) if options.quick else options.runs, options.quick)
    file = output / f"{'cuda' if run.cuda else 'cpu'}.json"
    everything = tuple(PARTS) if run.quick else ON_CUDA if run.cuda else ON_CPU
    for name in options.part or everything:
        records = []
        for record in PARTS[name](run):
            records.append({"part": name, **record})
            print(name, _shown(record), flush=True)
        _write(file, records, name, run)
    result = json.loads(file.read_text())
    pages.mkdir(parents=True, exist_ok=True)
    written = []
    if run.cuda or run.quick:
        written.append(pages / "cuda.md")
        written[-1].write_text(cuda_page.page(result))
    if not run.cuda:
        written.append(pages / "index.md")
        written[-1].write_text(report.page(result))
        if importlib.util.find_spec("matplotlib"):
            written += report.plots(result["records"], pages)
    print("wrote", *(str(path) for path in [file, *written]))


def _write(file: Path, records: list[Record], part: str, run: Run) -> None:
    """Replace the earlier records of a part."""
    file.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(file.read_text())["records"] if file.exists() else []
    result = {
        "date": date.today().isoformat(),
        "machine": machine(run.device),
        "runs": run.runs,
        "records": [record for record in before if record["part"] != part] + records,
    }
    aside = file.with_suffix(".part")
    aside.write_text(json.dumps(result, indent=1) + "\n")
    aside.replace(file)


def _shown(record: Record) -> str:
    parts = [str(record[key]) for key in ("name", "dtype", "batch", "experts", "routing") if key in record]
    for key in ("forward", "forward_backward", "step", "inference"):
        if key in record:
            parts.append(f"{key} {record[key]['median'] * 1e3:.2f} ms")
    return ", ".join(parts)


if __name__ == "__main__":
    main()
