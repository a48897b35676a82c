"""One block's FFN slot, in each of the ways to run it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed.baseline import ObviousMoE
from benchmarks.speed.measure import bytes_for_backward, flops, interleaved, peak_memory
from benchmarks.speed.sizes import Record, Size, clip_ffn
from covft.nn.moe import ContextualMoE


class Block:
    """One adapted block's FFN slot, the obvious implementation with the same weights, and a batch for both.

    The routing is `"dense"` or `"sparse"` (top 2).
    """

    def __init__(
        self, size: Size, batch: int, experts: int, routing: str, dtype: torch.dtype, device: str = "cpu"
    ) -> None:
        torch.manual_seed(0)
        self.ffn = clip_ffn(size).to(device, dtype)
        self.moe = ContextualMoE(
            self.ffn,
            embed_dim=size.embed_dim,
            text_dim=size.text_dim,
            num_experts=experts,
            routing=routing,
            top_k=min(2, experts),
        )
        with torch.no_grad():
            for parameter in self.moe.experts.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        self.baseline = ObviousMoE.like(self.moe)
        self.x = torch.randn(batch, size.tokens, size.embed_dim, device=device, dtype=dtype, requires_grad=True)
        self.text = torch.randn(batch, size.text_dim, device=device, dtype=dtype)
        self._parameters = [*self.ffn.parameters(), *self.moe.parameters(), *self.baseline.parameters()]

    def ways(self, names: tuple[str, ...], backend: str | None = None) -> dict[str, Callable[[], Tensor]]:
        """Return forwards by name: `plain` (the FFN alone), `baseline`, and covft by what backward recomputes.

        After that may come which kernels run between the matrix products, as in `all, eager`.

        Args:
            names: Of the ways.
            backend: Of `torch.compile`; None runs eagerly.
        """
        found: dict[str, Callable[[], Tensor]] = {}
        for name in names:
            module = {"plain": self.ffn, "baseline": self.baseline}.get(name, self.moe)
            run: Any = torch.compile(module, backend=backend) if backend else module
            found[name] = functools.partial(self._run, name, run)
        return found

    def _run(self, name: str, run: Callable[..., Tensor]) -> Tensor:
        if name == "plain":
            return run(self.x)
        if name != "baseline":
            recompute, _, kernels = name.partition(", ")
            self.moe.set_recompute(recompute)
            self.moe.set_kernels(kernels or "auto")
        return run(self.x, self.text)

    def parameters(self) -> list[Tensor]:
        """Return all weights."""
        return self._parameters

    def forget(self) -> None:
        """Drop all gradients; in every timed step, so in as little time as can be."""
        for tensor in (self.x, *self.parameters()):
            tensor.grad = None

    def with_backward(self, forward: Callable[[], Tensor]) -> Callable[[], None]:
        """Return a run of forward and backward."""

        def run() -> None:
            output = forward()
            output.backward(torch.ones_like(output))
            self.forget()

        return run

    def check(self) -> float:
        """Return the largest relative difference of outputs and gradients to the baseline, on two images.

        Raises:
            RuntimeError: If it exceeds rounding, so that timing is pointless.
        """
        results = []
        batch = self.x, self.text
        self.x, self.text = self.x[:2].detach().requires_grad_(), self.text[:2]
        for forward in self.ways(("baseline", "none", "activation", "all")).values():
            output = forward()
            output.backward(torch.ones_like(output) / output.numel() ** 0.5)
            assert self.x.grad is not None
            results.append((output.detach(), self.x.grad.clone()))
            self.forget()
        self.x, self.text = batch
        wanted = results[0]
        worst = max(
            ((one - other).abs().max() / other.abs().max()).item()
            for found in results[1:]
            for one, other in zip(found, wanted, strict=True)
        )
        if worst > (1e-4 if self.x.dtype == torch.float32 else 0.1):
            raise RuntimeError(f"covft and the baseline differ by {worst:.2e}: nothing is timed")
        return worst


def measure_block(
    size: Size,
    *,
    batch: int,
    experts: int,
    routing: str = "dense",
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
    names: tuple[str, ...] = ("plain", "baseline", "none", "activation", "all"),
    backward: bool = True,
    runs: int = 5,
    device: str = "cpu",
) -> Iterator[Record]:
    """Measure time, bytes and operations of the ways to run one block."""
    block = Block(size, batch, experts, routing, dtype, device)
    difference = block.check()
    ways, warm_up = block.ways(names, backend), 2 if backend else 1
    with torch.no_grad():
        forward = interleaved(ways, runs, warm_up, device)
    steps = {n: block.with_backward(f) for n, f in ways.items()}
    both = interleaved(steps, runs, warm_up, device) if backward else {}
    for name, way in ways.items():
        record: Record = {
            "kind": "block",
            "name": name,
            "dtype": str(dtype).removeprefix("torch."),
            "batch": batch,
            "experts": experts,
            "routing": routing,
            "mode": "compiled" if backend else "eager",
            "device": device,
            "difference": difference,
            "forward": forward[name].to_dict(),
        }
        if backward:
            record["forward_backward"] = both[name].to_dict()
            record["peak"] = peak_memory(steps[name], device)
            record["bytes"] = bytes_for_backward(way, block.parameters())
        if not backend:
            record["flops"] = flops(way)
        yield record


def measure_products(
    size: Size, *, batch: int, experts: int, dtype: torch.dtype, runs: int = 5, device: str = "cpu"
) -> Iterator[Record]:
    """Measure the matrix products of the experts and of the refinement alone: the floor of the block on this device.

    Forward has one per linear layer; backward has two, for the input and for the weight.
    """
    tokens, width = batch * size.tokens, size.embed_dim
    layers = [(width, size.ffn_dim), (size.ffn_dim, width)] * experts + [(width, 2 * width), (2 * width, width)]
    like: dict[str, Any] = {"device": device, "dtype": dtype}
    rows = {n: torch.randn(tokens, n, **like) for n in {n for layer in layers for n in layer}}
    results = {n: torch.empty(tokens, n, **like) for n in rows}
    weights = [torch.randn(into, out, **like) for into, out in layers]
    gradients = [torch.empty_like(weight) for weight in weights]

    def forward() -> None:
        for weight in weights:
            torch.mm(rows[weight.shape[0]], weight, out=results[weight.shape[1]])

    def both() -> None:
        forward()
        for weight, gradient in zip(weights, gradients, strict=True):
            into, out = weight.shape
            torch.mm(rows[out], weight.t(), out=results[into])
            torch.mm(rows[into].t(), rows[out], out=gradient)

    timed = interleaved({"forward": forward, "forward_backward": both}, runs, device=device)
    yield {
        "kind": "products",
        "name": "products",
        "dtype": str(dtype).removeprefix("torch."),
        "batch": batch,
        "experts": experts,
        "device": device,
        "flops": 2 * tokens * sum(into * out for into, out in layers),
        **{name: timing.to_dict() for name, timing in timed.items()},
    }
