"""Compare saved weights, in files or folders of safetensors and .bin files.

compare_files.py same A B             the largest difference of any tensor
compare_files.py moved A B            the share of elements that differ, by part of the tower
compare_files.py names PART FILE ...  how many tensors each file has, and how many with PART in their names
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

PARTS = {".context.": "context", ".router.": "router", ".experts.": "experts", "norm": "norms"}


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """Read all weights of a file, or of the files of a folder and of its covft/."""
    if path.is_file():
        return load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu")
    files = sorted([*path.glob("*.safetensors"), *path.glob("mm_projector.bin"), *path.glob("covft/*.safetensors")])
    return {f"{file.relative_to(path)}: {name}": value for file in files for name, value in tensors_of(file).items()}


def same(first: dict, second: dict) -> float:
    """Return the largest difference of any tensor."""
    assert first, "no weights"
    assert first.keys() == second.keys(), sorted(first.keys() ^ second.keys())
    return max((first[name].double() - second[name].double()).abs().max().item() for name in first)


def moved(first: dict, second: dict) -> dict[str, float]:
    """Return the share of elements that differ, by part."""
    counts: dict[str, list[int]] = {}
    for name, value in first.items():
        part = next((part for mark, part in PARTS.items() if mark in name), "other")
        count = counts.setdefault(part, [0, 0])
        count[0] += int((value != second[name]).sum())
        count[1] += value.numel()
    return {part: round(differ / total, 4) for part, (differ, total) in counts.items()}


def names(part: str, *files: str) -> dict[str, dict[str, int]]:
    """Return how many tensors each file has, and how many with a part in their names."""
    found = {file: list(tensors_of(Path(file))) for file in files}
    return {file: {"all": len(all_), part: sum(part in name for name in all_)} for file, all_ in found.items()}


if __name__ == "__main__":
    what, *given = sys.argv[1:]
    if what == "names":
        result = names(*given)
    else:
        result = {"same": same, "moved": moved}[what](*(tensors_of(Path(path)) for path in given))
    print("result", json.dumps(result))
