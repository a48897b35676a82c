"""Compare two checkpoints of ms-swift: `python swift_compare.py ONE OTHER` prints a JSON object.

Of each file of weights that both have: the largest difference; but for a projector inside the tower, the share of
elements that differ, and the types.
"""

import json
import sys
from pathlib import Path

from safetensors.torch import load_file

# Inside the tower of Qwen-VL; ms-swift trains it in its own type.
PROJECTOR = "merger."
FILES = ("covft/model.safetensors", "adapter_model.safetensors", "covft/trained.safetensors", "model.safetensors")


def main(one: str, other: str) -> None:
    """Print the comparison."""
    result = {}
    for name in FILES:
        found = [Path(folder, name).is_file() for folder in (one, other)]
        if found != [False, False]:
            first, second = (load_file(Path(folder, name)) for folder in (one, other))
            if first.keys() != second.keys():
                raise SystemExit(f"{name} of the two checkpoints has other tensors")
            own = [key for key in first if not key.startswith(PROJECTOR)]
            differing = sum(int((first[key] != second[key]).sum()) for key in own)
            result[name] = {
                "difference": max(float((first[key].double() - second[key].double()).abs().max()) for key in first),
                "changed": differing / sum(first[key].numel() for key in own),
                "types": sorted({str(first[key].dtype) for key in own}),
                "tensors": sorted(first),
            }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
