"""Wraps every timm model that has attention: `python benchmarks/coverage/timm_models.py --out timm.jsonl`.

Every model is built as timm registers it. Those of up to `--largest` million parameters are run, on the smallest
images that they take; larger ones are checked on the meta device, and, where timm lets the number of blocks be chosen,
run with two blocks. One JSON line per model; a run that is cut short goes on where it stopped.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.coverage import batch
from benchmarks.coverage.check import Result, check

# Attention by the name of a class, without that over the channels or branches of a convolution.
_ATTENTION = re.compile(r"attention|attn|LiteMLA|SHSA|SHMA|MHSA|GPSA", re.IGNORECASE)
_NOT_ATTENTION = re.compile(r"SplitAttn|SelectiveKernel|Cbam|ChannelAttn|SpatialAttn|ChannelAttention|SpatialAttention")
_FUSED = re.compile(r"Parallel\w*Block|DiffParallel")
_SIZES = (64, 96, 128, 160, 192, 224, 256)


def has_attention(vit: nn.Module) -> bool:
    """Return whether a model has attention between tokens."""
    names = {type(module).__name__ for module in vit.modules()}
    if type(vit).__name__ == "LowFormer":
        return True  # counted as one family, though two of its models come without
    return any((_ATTENTION.search(n) and not _NOT_ATTENTION.search(n)) or _FUSED.search(n) for n in names)


def build(name: str, device: str, **options: Any) -> nn.Module:
    """Build a model with random weights."""
    with torch.device(device):
        return timm.create_model(name, pretrained=False, **options)


def smallest_input(name: str, plain: nn.Module, **known: Any) -> tuple[dict[str, Any], tuple[int, int, int]]:
    """Return the smallest build options and image size that a model takes.

    Args:
        name: As timm lists it.
        plain: The model as it is, on the meta device.
        **known: Options that make it smaller otherwise.
    """
    channels, height, width = getattr(plain, "pretrained_cfg")["input_size"]  # noqa: B009
    for size in (*(s for s in _SIZES if s < max(height, width)), None):
        for options in ({"img_size": size}, {}) if size else ({},):
            shape = (channels, size or height, size or width)
            try:
                vit = build(name, "meta", **options, **known).eval()
                with torch.no_grad():
                    vit(torch.empty(2, *shape, device="meta"))
            except Exception:  # of a size that the model does not take
                continue
            return options, shape
    raise RuntimeError(f"{name} takes no input of {(channels, height, width)}")


def check_model(name: str, largest: int) -> Result | None:
    """Check one model; None if it has no attention.

    Args:
        name: As timm lists it.
        largest: Parameters up to which a model is run.
    """
    torch.manual_seed(0)
    plain = build(name, "meta")
    if not has_attention(plain):
        return None
    is_large = sum(parameter.numel() for parameter in plain.parameters()) > largest
    two_blocks = {"depth": 2} if is_large and _can_be_built(name, depth=2) else {}
    options, shape = smallest_input(name, plain, **two_blocks)

    def run(device: str, vit: nn.Module, **more: Any) -> Result:
        def inputs(images: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return (torch.randn(images, *shape, device=device),), {}

        return check(vit, inputs, name=name, library="timm", **more)

    if not is_large:
        return run("cpu", build(name, "cpu", **options))
    result = run("meta", build(name, "meta", **options), gradients=not two_blocks)
    if result.verdict != "wrapped" or not two_blocks:
        return result
    return batch.with_two_blocks(result, run("cpu", build(name, "cpu", **options, **two_blocks)))


def _can_be_built(name: str, **options: Any) -> bool:
    try:
        build(name, "meta", **options)
    except Exception:  # of a model whose depth is not to be chosen
        return False
    return True


def main() -> None:
    """Check the models that are missing from the output file."""
    parser = batch.options(__doc__)
    parser.add_argument("--models", default="*", help="pattern of names")
    arguments = parser.parse_args()

    def line(name: str) -> dict[str, Any]:
        found = check_model(name, arguments.largest * 10**6)
        return {"name": name, "library": "timm", "verdict": "no attention"} if found is None else found.to_dict()

    batch.run(arguments, timm.list_models(arguments.models), line)


if __name__ == "__main__":
    main()
