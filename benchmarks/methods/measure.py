"""Measures the methods in turns, on one tower that is tuned and restored again and again."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import covft
from benchmarks.memory.models import Model
from benchmarks.methods.cases import Case
from benchmarks.speed.measure import bytes_for_backward, flops
from benchmarks.speed.sizes import Record, Size, clip
from covft.tuning import methods

TOKENS = 16  # of the question, for methods that read states of its tokens
CLOCK = "CPU times of the process"


class Bench:
    """A tower with random weights, an image, and the features of a question.

    Args:
        size: Sizes of the tower.
    """

    def __init__(self, size: Size) -> None:
        self.size = size
        self.vit = clip(size).eval()
        torch.manual_seed(0)
        self.images = torch.randn(1, 3, size.image_size, size.image_size)
        self.features, self.states = torch.randn(1, size.text_dim), torch.randn(1, TOKENS, size.text_dim)

    @contextmanager
    def tuned(self, case: Case) -> Iterator[Any]:
        """Tune the tower, and restore it."""
        given = {"images": self.images} if case.method == "svpt" else {}  # which its prompts start from
        tuned = covft.tune(self.vit, case.method, text_encoder=self.size.text_dim, **given, **case.options)
        try:
            yield tuned
        finally:
            covft.untune(tuned)
            del tuned
            gc.collect(1)

    def text(self, case: Case) -> Tensor:
        """Return what the method reads of the question."""
        known = methods().get(case.method)
        return self.states if known is not None and known.reads_states else self.features

    def plain(self) -> Record:
        """Return parameters and operations of the tower itself."""
        with torch.no_grad():
            operations = flops(lambda: self.vit(self.images))
        return {"parameters": sum(p.numel() for p in self.vit.parameters()), "flops": operations}

    def counted(self, case: Case) -> Record:
        """Return what is known without running the method, and what autograd keeps in a run of it."""
        cost = covft.budget(self.vit, case.method, text_dim=self.size.text_dim, **case.options)
        with self.tuned(case) as tuned:
            kept = bytes_for_backward(lambda: tuned(self.images, self.text(case)), tuned.parameters())
        return {
            "parameters": cost.parameters,
            "added": cost.added,
            "flops": cost.forward_flops,
            "flops_step": cost.step_flops,
            "bytes": kept,
            "bytes_of_budget": cost.kept_bytes,
        }

    def timed(self, case: Case) -> tuple[float, float]:
        """Return the CPU time of a forward without gradients, and of a forward and backward, in seconds.

        The time that other processes take of the CPU is not part of it.
        """
        with self.tuned(case) as tuned:
            text = self.text(case)

            def step() -> None:
                features = tuned(self.images, text)[0]
                if features.requires_grad:
                    features.backward(torch.ones_like(features))

            with torch.no_grad():
                forward = _cpu_seconds(lambda: tuned(self.images, text))
            taken = _cpu_seconds(step)
            tuned.zero_grad(set_to_none=True)
        return forward, taken


def _cpu_seconds(function: Callable[[], Any]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def in_connector(text_dim: int) -> Record:
    """Return what q_moe costs in LLaVA-1.5-7B, by `covft.budget`: it has no place in a tower alone.

    Args:
        text_dim: Width of the text features.
    """
    cost = covft.budget(Model("LLaVA-7B", lora=False).plain, "q_moe", text_dim=text_dim)
    return {
        "parameters": cost.parameters,
        "flops": cost.forward_flops,
        "flops_step": cost.step_flops,
        "bytes": cost.kept_bytes,
    }


def matched(bench: Bench, target: int) -> list[Record]:
    """Return the options by which methods train as much as the paper's LoRA.

    Args:
        bench: The tower.
        target: Number of trained parameters.
    """
    depth = bench.size.depth
    four = list(range(max(depth - 5, 0), depth - 1))
    attention = {"lora": {"targets": "attention"}}
    asked: list[tuple[str, dict[str, Any], dict[str, str]]] = [
        ("lora", attention, {}),
        ("lora", {}, {}),
        ("dora", {}, {}),
        ("ffn", {}, {}),
        ("last_layers", {}, {}),
        ("vpt", {}, {}),
        ("qa_vit", {}, {}),
        ("adaln", {}, {}),
        ("cross_attention", {}, {}),
        ("covft", {}, {"covft": "layers"}),
        ("covft", {"covft": {"layers": four}}, {"covft": "experts"}),
        ("covft", {"covft": {"layers": four}}, {}),
    ]
    records = []
    for method, options, sizes in asked:
        [found] = covft.match(
            bench.vit, target, [method], text_dim=bench.size.text_dim, options=options, sizes=sizes
        )  # fmt: skip
        told = {name: list(value) if isinstance(value, tuple) else value for name, value in found.options.items()}
        records.append({"method": method, "options": told, "parameters": found.parameters})
    return records
