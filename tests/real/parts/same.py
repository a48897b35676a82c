"""Compare the weights of two folders: `python same.py ONE OTHER FILE ...` prints each file's largest difference."""

import json
import sys
from pathlib import Path

from safetensors.torch import load_file


def difference(one: Path, other: Path) -> float:
    """Return the largest difference; the files must have the same tensors."""
    first, second = load_file(one), load_file(other)
    if not first or first.keys() != second.keys():
        raise SystemExit(f"{one} and {other} have other tensors")
    return max(float((value.double() - second[name].double()).abs().max()) for name, value in first.items())


if __name__ == "__main__":
    one, other, *files = sys.argv[1:]
    print("result", json.dumps({file: difference(Path(one, file), Path(other, file)) for file in files}))
