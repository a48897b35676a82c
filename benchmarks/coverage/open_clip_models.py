"""Wrap the image tower of every open_clip config: `python benchmarks/coverage/open_clip_models.py --out out.jsonl`.

Towers are built from open_clip's own configs, without their text side. Those of up to `--largest` million parameters
are run, on the smallest images that they take; larger ones are checked on the meta device, and run with two blocks
where their config says how many there are. One JSON line per config; a run that is cut short goes on where it stopped.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import _build_vision_tower
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.coverage.check import Result, check

_SIZES = (64, 96, 112, 128, 160, 192, 224, 256)


def build(name: str, device: str, **vision: Any) -> nn.Module:
    """The image tower of a config, with random weights."""
    config = open_clip.get_model_config(name)
    assert config is not None
    options = {**config["vision_cfg"], "timm_model_pretrained": False, **vision}
    with torch.device(device):
        return _build_vision_tower(config["embed_dim"], options, config.get("quick_gelu", False))  # type: ignore[arg-type]


def smallest_input(name: str) -> int:
    """The length of a side of the smallest images that a tower takes."""
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
    shallow = run("cpu", layers=2)
    result.change, result.ffn_change = shallow.change, shallow.ffn_change
    result.missing_gradients, result.device = shallow.missing_gradients, "meta, and two blocks on the cpu"
    if shallow.verdict != "wrapped":
        result.verdict, result.reason = shallow.verdict, f"with two blocks: {shallow.reason}"
    return result


def main() -> None:
    """Check the towers that the output file does not have yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines")
    parser.add_argument("--largest", type=int, default=150, help="million parameters up to which a tower is run")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    done = set()
    if arguments.out.exists():
        done = {json.loads(line)["name"] for line in arguments.out.read_text().splitlines()}
    with arguments.out.open("a") as file:
        for name in open_clip.list_models():
            if name in done:
                continue
            if time.perf_counter() - start > arguments.seconds:
                break
            file.write(json.dumps(check_model(name, arguments.largest * 10**6).to_dict()) + "\n")
            file.flush()
            gc.collect()
    lines = [json.loads(line) for line in arguments.out.read_text().splitlines()]
    print(dict(Counter(line["verdict"] for line in lines)))


if __name__ == "__main__":
    main()
