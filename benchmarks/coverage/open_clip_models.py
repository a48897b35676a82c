"""Wraps the image tower of every open_clip config: `python benchmarks/coverage/open_clip_models.py --out out.jsonl`.

Towers are built from open_clip's own configs, without their text side. Those of up to `--largest` million parameters
are run, on the smallest images that they take; larger ones are checked on the meta device, and run with two blocks
where their config says how many there are. One JSON line per config; a run that is cut short goes on where it stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import _build_vision_tower
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.coverage import batch
from benchmarks.coverage.check import Result, check

_SIZES = (64, 96, 112, 128, 160, 192, 224, 256)


def build(name: str, device: str, **vision: Any) -> nn.Module:
    """Build the image tower of a config with random weights."""
    config = open_clip.get_model_config(name)
    assert config is not None
    options = {**config["vision_cfg"], "timm_model_pretrained": False, **vision}
    with torch.device(device):
        return _build_vision_tower(config["embed_dim"], options, config.get("quick_gelu", False))  # type: ignore[arg-type]


def smallest_input(name: str) -> int:
    """Return the side of the smallest images that a tower takes."""
    config = open_clip.get_model_config(name)
    assert config is not None
    own = config["vision_cfg"].get("image_size", 224)
    own = own if isinstance(own, int) else max(own)
    patch = config["vision_cfg"].get("patch_size") or 1
    multiples = [4 * patch] if patch > 1 else []
    for size in (*(s for s in (*multiples, *_SIZES) if s < own), own):
        try:
            tower = build(name, "meta", image_size=size).eval()
            with torch.no_grad():
                tower(torch.empty(2, 3, size, size, device="meta"))
        except Exception:  # of a size that the tower does not take
            continue
        return size
    raise RuntimeError(f"{name} takes no image of {own} pixels")


def check_model(name: str, largest: int) -> Result:
    """Check one tower.

    Args:
        name: As open_clip lists it.
        largest: Parameters up to which it is run.
    """
    torch.manual_seed(0)
    size = smallest_input(name)

    def run(device: str, **vision: Any) -> Result:
        def inputs(images: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return (torch.randn(images, 3, size, size, device=device),), {}

        return check(build(name, device, image_size=size, **vision), inputs, name=name, library="open_clip")

    if sum(parameter.numel() for parameter in build(name, "meta").parameters()) <= largest:
        return run("cpu")
    result = run("meta")
    config = open_clip.get_model_config(name)
    if result.verdict != "wrapped" or config is None or not isinstance(config["vision_cfg"].get("layers"), int):
        return result
    return batch.with_two_blocks(result, run("cpu", layers=2))


def main() -> None:
    """Check the towers that are missing from the output file."""
    arguments = batch.options(__doc__).parse_args()
    largest = arguments.largest * 10**6
    batch.run(arguments, open_clip.list_models(), lambda name: check_model(name, largest).to_dict())


if __name__ == "__main__":
    main()
