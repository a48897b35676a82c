"""What happens once: compressing the experts after training, and wrapping a tower."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator
from typing import Any

import torch

import covft
from benchmarks.speed.measure import interleaved, peak_memory, seconds_of, touch_memory
from benchmarks.speed.sizes import Record, Size, clip
from benchmarks.speed.tower import Tower


def measure_compressed(
    size: Size, *, rank: int = 64, steps: int = 8, runs: int = 5, device: str = "cpu"
) -> Iterator[Record]:
    """Measure a tower with compressed experts after a short training, and the plain one."""
    tower = Tower(size, 1, device=device)
    torch.manual_seed(0)
    plain = tower.plain().eval()
    encoder = covft.wrap(copy.deepcopy(plain), size.text_dim, layers=size.layers)
    optimizer = torch.optim.AdamW(encoder.param_groups(lr=1e-4, router_lr=1e-3))
    target = torch.randn(size.embed_dim, device=device)
    for step in range(steps):
        torch.manual_seed(step)
        text = torch.randn(1, size.text_dim, device=device)
        features = encoder(torch.randn_like(tower.images), text, output_hidden_states=True).hidden_states[-2]
        # Something to learn that depends on the text.
        loss = (features.mean(dim=(0, 1)) - text.mean() * target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    encoder.eval()
    reports: list[Any] = []
    taken = seconds_of(lambda: reports.append(covft.compress(encoder, rank, tower.images, tower.text)), device)
    report = reports[0]
    models = {"plain": plain, "compressed": encoder}
    with torch.no_grad():
        forward = interleaved({n: tower.forward(m) for n, m in models.items()}, runs, device=device)
    yield {
        "kind": "compressed",
        "rank": rank,
        "steps": steps,
        "device": device,
        "seconds": taken,
        "plain": forward["plain"].to_dict(),
        "compressed": forward["compressed"].to_dict(),
        "weight_error": report.weight_error,
        "output_error": report.output_error,
        "feature_error": report.feature_error,
        "parameters_before": report.parameters_before,
        "parameters_after": report.parameters_after,
    }


def measure_wrap(size: Size, *, runs: int = 5, device: str = "cpu") -> Iterator[Record]:
    """Measure the time and memory of wrap()."""
    seconds: dict[str, list[float]] = {"first touch": [], "median": []}
    added, peak = 0, None
    for run in range(runs + 1):
        vit = clip(size).to(device)
        if run:
            touch_memory(2 * added)
        times: list[float] = []
        wrapped: list[covft.ContextEncoder] = []

        def wrap(vit: Any = vit, wrapped: list[covft.ContextEncoder] = wrapped) -> None:
            wrapped.append(covft.wrap(vit, size.text_dim, layers=size.layers))

        peak = peak_memory(lambda wrap=wrap, times=times: times.append(seconds_of(wrap, device)), device)
        # unwrap() keeps the original FFNs, so all of this is new.
        added = sum(parameter.nbytes for slot in wrapped[0].slots().values() for parameter in slot.parameters())
        seconds["median" if run else "first touch"] += times
    yield {
        "kind": "wrap",
        "device": device,
        "first_touch": seconds["first touch"][0],
        "seconds": seconds["median"],
        "median": statistics.median(seconds["median"]),
        "added": added,
        "peak": peak,
    }
