"""What a method costs on this machine: parameters, FLOPs, time and memory, with the text encoder as its own row."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from covft.text import TextEncoder, as_text_encoder
from covft.tuning.api import tune
from covft.tuning.budget import budget, text_for
from covft.utils.arguments import check_kinds, check_sizes
from covft.utils.parameters import count


@dataclass(frozen=True)
class Cost:
    """One row of a table of costs; figures are of one image, or of one text.

    Attributes:
        name: What it is the cost of.
        parameters: All parameters; None where they are not known.
        trained: Those that are trained.
        flops: FLOPs of a forward; None where they are not known.
        seconds: Median time of a forward.
        kept_bytes: What autograd keeps for backward, weights not counted; 0 of what is frozen.
    """

    name: str
    parameters: int | None
    trained: int
    flops: int | None
    seconds: float
    kept_bytes: int | None


@check_kinds
def overhead(
    vit: nn.Module,
    method: str = "covft",
    *,
    text_encoder: Any,
    images: Tensor,
    text: str = "what is left of the cup?",
    repeats: int = 5,
    **options: Any,
) -> tuple[Cost, ...]:
    """Measure a tower, the same tower with a method, and the text encoder (Tables 7 and 8 of the paper).

    Runs in eval mode without gradients, on the device and in the type of the tower, on copies: the tower is not
    changed. All are measured in turns, after one run each that does not count. Parameters, FLOPs and bytes are counted
    as `covft.budget` does. A text is encoded once however many images it has, and features of known texts are cached,
    so its time is a row of its own; a number is added to the text in each run, so that no cached one is timed. Other
    work on the machine shows in the times.

    Args:
        vit: A ViT as it was pretrained.
        method: Name of a method of `covft.tune`.
        text_encoder: As for `covft.wrap`; a width C leaves out its row.
        images: Preprocessed images, shape `(B, 3, H, W)`; times are divided by B.
        text: The text to time.
        repeats: Runs, of which the median counts.
        **options: Options of the method.

    Returns:
        Rows for the tower, for the tower with the method, and for the text encoder.

    Raises:
        CoVFTError: As `covft.tune` does.
    """
    check_sizes(repeats=repeats, images=len(images))
    encoder = None if isinstance(text_encoder, int) else as_text_encoder(text_encoder)
    width = text_encoder if encoder is None else encoder.text_dim
    expected = budget(vit, method, text_dim=width, **options)
    weight = next(p for p in vit.parameters() if p.is_floating_point())
    images = images.to(weight.device, weight.dtype)
    tuned: Any = tune(copy.deepcopy(vit), method, text_encoder=width, **options).eval()
    like = text_for(tuned, width)
    features = torch.randn(len(images), *like.shape[1:], device=weight.device)
    plain = copy.deepcopy(vit).eval()
    runs: dict[str, Callable[[], Any]] = {"tower": lambda: plain(images), method: lambda: tuned(images, features)}
    if encoder is not None:
        fresh = (f"{text} {number}" for number in range(repeats + 1))
        runs["text"] = lambda: encoder.encode([next(fresh)])
    seconds = _in_turns(runs, repeats, weight.device)
    base = _flops(runs["tower"]) // len(images)
    total, added = count(vit.parameters()), expected.added
    rows = [
        Cost("tower", total, 0, base, seconds["tower"] / len(images), 0),
        Cost(
            f"tower with {method}",
            total + added,
            expected.parameters,
            None if expected.forward_flops is None else base + expected.forward_flops,
            seconds[method] / len(images),
            expected.kept_bytes,
        ),
    ]
    if encoder is not None:
        rows.append(Cost(f"text encoder, {encoder.name}", _parameters(encoder), 0, None, seconds["text"], 0))
    return tuple(rows)


def _in_turns(runs: dict[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        for _ in range(repeats + 1):
            for name, run in runs.items():
                _wait(device)
                start = time.perf_counter()
                run()
                _wait(device)
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(measured[1:]) for name, measured in times.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _flops(run: Callable[[], Any]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def _parameters(encoder: TextEncoder) -> int | None:
    """Count the parameters of the model inside a text encoder; None if it is not a module."""
    models = [encoder, *vars(encoder).values()]
    found = [model for model in models if isinstance(model, nn.Module)]
    return sum(count(model.parameters()) for model in found) if found else None
