"""What is measured: one block and a whole tower at the size of CLIP-L/14-336, in each of their ways to run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import covft
from benchmarks.speed.baseline import ObviousMoE, ObviousSlot
from benchmarks.speed.measure import bytes_for_backward, flops, interleaved
from covft.nn.moe import ContextualMoE

Record = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """Sizes of a tower.

    Attributes:
        embed_dim: Width D of the tokens.
        ffn_dim: Inner width F of the FFN.
        depth: Number of blocks.
        num_heads: Heads of the self-attention.
        image_size: Side of an image, pixels.
        patch_size: Side of a patch, pixels.
        context_dim: Width C of the text features.
        layers: Adapted blocks.
    """

    embed_dim: int = 1024
    ffn_dim: int = 4096
    depth: int = 24
    num_heads: int = 16
    image_size: int = 336
    patch_size: int = 14
    context_dim: int = 768
    layers: tuple[int, ...] = tuple(range(11, 23))

    @property
    def tokens(self) -> int:
        """Tokens of an image, the class token included."""
        return (self.image_size // self.patch_size) ** 2 + 1


CLIP_L = Size()
TINY = Size(32, 64, 4, 4, 32, 8, 16, (1, 2))


def clip(size: Size) -> Any:
    """Hugging Face's CLIP tower with random weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=size.embed_dim, intermediate_size=size.ffn_dim, num_hidden_layers=size.depth,
        num_attention_heads=size.num_heads, image_size=size.image_size, patch_size=size.patch_size,
    )  # fmt: skip
    return CLIPVisionModel(config)


def clip_ffn(size: Size) -> nn.Module:
    """One FFN of it."""
    return clip(Size(**{**size.__dict__, "depth": 1})).encoder.layers[0].mlp


class Block:
    """One adapted block's FFN slot, the obvious implementation with the same weights, and a batch for both.

    Args:
        size: Sizes.
        batch: Images.
        experts: Number of experts.
        routing: `"dense"` or `"sparse"` (top 2).
        dtype: Type of weights and tokens.
        device: Where they are.
    """

    def __init__(
        self, size: Size, batch: int, experts: int, routing: str, dtype: torch.dtype, device: str = "cpu"
    ) -> None:
        torch.manual_seed(0)
        self.ffn = clip_ffn(size).to(device, dtype)
        self.moe = ContextualMoE(
            self.ffn,
            embed_dim=size.embed_dim,
            context_dim=size.context_dim,
            num_experts=experts,
            routing=routing,
            top_k=min(2, experts),
        )
        with torch.no_grad():
            for parameter in self.moe.experts.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        self.baseline = ObviousMoE.like(self.moe)
        self.x = torch.randn(batch, size.tokens, size.embed_dim, device=device, dtype=dtype, requires_grad=True)
        self.text = torch.randn(batch, size.context_dim, device=device, dtype=dtype)

    def ways(self, names: tuple[str, ...], compiled: bool = False) -> dict[str, Callable[[], Tensor]]:
        """Forwards by name: `plain` (the FFN alone), `baseline`, and covft by what backward recomputes."""
        found: dict[str, Callable[[], Tensor]] = {}
        for name in names:
            module: Any = {"plain": self.ffn, "baseline": self.baseline}.get(name)
            if module is None:
                module = copy.copy(self.moe)
                module._modules = dict(self.moe._modules)
                module.experts = copy.copy(self.moe.experts)  # shares the weights, runs in its own way
                module.experts.recompute = name
            run = torch.compile(module) if compiled else module
            args = (self.x,) if name == "plain" else (self.x, self.text)
            found[name] = lambda run=run, args=args: run(*args)
        return found

    def parameters(self) -> list[Tensor]:
        """All weights."""
        return [*self.ffn.parameters(), *self.moe.parameters(), *self.baseline.parameters()]

    def forget(self) -> None:
        """Drop all gradients."""
        for tensor in (self.x, *self.parameters()):
            tensor.grad = None

    def with_backward(self, forward: Callable[[], Tensor]) -> Callable[[], None]:
        """Forward and backward."""

        def run() -> None:
            output = forward()
            output.backward(torch.ones_like(output))
            self.forget()

        return run

    def check(self) -> float:
        """The largest difference between covft and the baseline, of output and of gradients, relative.

        Raises:
            RuntimeError: If it is more than rounding: then there is nothing to time.
        """
        results = []
        for forward in self.ways(("baseline", "none", "activation", "all")).values():
            output = forward()
            output.backward(torch.ones_like(output) / output.numel() ** 0.5)
            assert self.x.grad is not None
            results.append((output.detach(), self.x.grad.clone()))
            self.forget()
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
    compiled: bool = False,
    names: tuple[str, ...] = ("plain", "baseline", "none", "activation", "all"),
    backward: bool = True,
    runs: int = 5,
    device: str = "cpu",
) -> Iterator[Record]:
    """Time, bytes and operations of the ways to run one block.

    Args:
        size: Sizes.
        batch: Images.
        experts: Number of experts.
        routing: `"dense"` or `"sparse"`.
        dtype: Type of weights and tokens.
        compiled: Whether each way is compiled.
        names: Which ways.
        backward: Whether backward is measured, too.
        runs: Measured runs of each.
        device: Where it runs.
    """
    block = Block(size, batch, experts, routing, dtype, device)
    difference = block.check()
    ways = block.ways(names, compiled)
    with torch.no_grad():
        forward = interleaved(ways, runs, warm_up=2 if compiled else 1)
    both = (
        interleaved({n: block.with_backward(f) for n, f in ways.items()}, runs, 2 if compiled else 1)
        if backward
        else {}
    )
    for name, way in ways.items():
        record: Record = {
            "kind": "block",
            "name": name,
            "dtype": str(dtype).removeprefix("torch."),
            "batch": batch,
            "experts": experts,
            "routing": routing,
            "mode": "compiled" if compiled else "eager",
            "device": device,
            "difference": difference,
            "forward": forward[name].to_dict(),
        }
        if backward:
            record["forward_backward"] = both[name].to_dict()
        if not compiled:
            record["bytes"] = bytes_for_backward(way, block.parameters())
            record["flops"] = flops(way)
        yield record


class Tower:
    """A whole tower in each of the ways to tune it, and a batch of images with their text features.

    Args:
        size: Sizes.
        batch: Images.
        dtype: Type of weights and images.
        device: Where it is.
    """

    def __init__(self, size: Size, batch: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        self.size, self.dtype, self.device = size, dtype, device
        torch.manual_seed(0)
        self.images = torch.randn(batch, 3, size.image_size, size.image_size, device=device, dtype=dtype)
        self.text = torch.randn(batch, size.context_dim, device=device, dtype=dtype)

    def plain(self) -> nn.Module:
        """The tower as it is, all of it trainable (full fine-tuning)."""
        return clip(self.size).to(self.device, self.dtype)

    def wrapped(self, **settings: Any) -> covft.ContextEncoder:
        """The tower under CoVFT, with experts that differ."""
        torch.manual_seed(0)
        encoder = covft.wrap(self.plain(), self.size.context_dim, layers=self.size.layers, **settings)
        with torch.no_grad():
            for slot in encoder.slots().values():
                for parameter in slot.experts.parameters():
                    parameter.add_(0.01 * torch.randn_like(parameter))
        return encoder

    def obvious(self) -> covft.ContextEncoder:
        """The same with the obvious implementation in every slot."""
        encoder = self.wrapped()
        for layer, slot in encoder.slots().items():
            path = encoder.spec.blocks[layer].mlp_path
            parent, _, name = path.rpartition(".")
            setattr(encoder.vit.get_submodule(parent), name, ObviousSlot(ObviousMoE.like(slot), encoder.conditioning))
        return encoder

    def forward(self, model: nn.Module) -> Callable[[], Tensor]:
        """Features of the penultimate layer, as LLaVA reads them."""
        args = (self.images, self.text) if isinstance(model, covft.ContextEncoder) else (self.images,)
        return lambda: model(*args, output_hidden_states=True).hidden_states[-2]

    def step(self, model: nn.Module) -> Callable[[], None]:
        """Forward and backward."""
        forward = self.forward(model)

        def run() -> None:
            output = forward()
            output.backward(torch.ones_like(output))
            model.zero_grad(set_to_none=True)

        return run


def measure_tower(size: Size, *, batch: int = 1, runs: int = 5, device: str = "cpu") -> Iterator[Record]:
    """Time, bytes and operations of a tower, beside the floor: the plain tower's, scaled by the operations needed.

    Args:
        size: Sizes.
        batch: Images.
        runs: Measured runs of each.
        device: Where it runs.
    """
    tower = Tower(size, batch, device=device)
    models: dict[str, nn.Module] = {
        "plain": tower.plain(),
        "baseline": tower.obvious(),
        "covft": tower.wrapped(),
        "covft all": tower.wrapped(recompute="all"),
        "covft short": tower.wrapped(feature_layer=-2),
        "covft sparse": tower.wrapped(routing="sparse"),
    }
    for model in models.values():
        model.train()
        tower.forward(model)()  # blocks that are left out show their form in the first run
    with torch.no_grad():
        forward = interleaved({n: tower.forward(m) for n, m in models.items()}, runs)
        operations = {n: flops(tower.forward(m)) for n, m in models.items()}
    both = interleaved({n: tower.step(m) for n, m in models.items()}, runs)
    # What has to be computed: nothing twice.
    needed = {n: flops(tower.step(tower.wrapped(recompute="none") if n in ("covft", "covft all") else m))
              for n, m in models.items()}  # fmt: skip
    for name, model in models.items():
        yield {
            "kind": "tower",
            "name": name,
            "batch": batch,
            "device": device,
            "dtype": "float32",
            "forward": forward[name].to_dict(),
            "forward_backward": both[name].to_dict(),
            "flops": operations[name],
            "flops_step": needed[name],
            "floor": forward["plain"].median * operations[name] / operations["plain"],
            "floor_step": both["plain"].median * needed[name] / needed["plain"],
            "bytes": bytes_for_backward(tower.forward(model), model.parameters()),
        }


def measure_compressed(
    size: Size, *, rank: int = 64, steps: int = 8, runs: int = 5, device: str = "cpu"
) -> Iterator[Record]:
    """A tower with compressed experts after a short training, beside the plain one.

    Args:
        size: Sizes.
        rank: Of the differences.
        steps: Optimizer steps before.
        runs: Measured runs of each.
        device: Where it runs.
    """
    tower = Tower(size, 1, device=device)
    torch.manual_seed(0)
    plain = tower.plain().eval()
    encoder = covft.wrap(copy.deepcopy(plain), size.context_dim, layers=size.layers)
    optimizer = torch.optim.AdamW(encoder.param_groups(lr=1e-4, router_lr=1e-3))
    target = torch.randn(size.embed_dim, device=device)
    for step in range(steps):
        torch.manual_seed(step)
        text = torch.randn(1, size.context_dim, device=device)
        features = encoder(torch.randn_like(tower.images), text, output_hidden_states=True).hidden_states[-2]
        # Something to learn that depends on the text.
        loss = (features.mean(dim=(0, 1)) - text.mean() * target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    encoder.eval()
    report = encoder.compress(rank, tower.images, tower.text)
    models = {"plain": plain, "compressed": encoder}
    with torch.no_grad():
        forward = interleaved({n: tower.forward(m) for n, m in models.items()}, runs)
    yield {
        "kind": "compressed",
        "rank": rank,
        "steps": steps,
        "device": device,
        "plain": forward["plain"].to_dict(),
        "compressed": forward["compressed"].to_dict(),
        "weight_error": report.weight_error,
        "output_error": report.output_error,
        "feature_error": report.feature_error,
        "parameters_before": report.parameters_before,
        "parameters_after": report.parameters_after,
    }


def measure_wrap(size: Size, *, runs: int = 5) -> Iterator[Record]:
    """Time of wrap(), and the memory that it takes.

    Args:
        size: Sizes.
        runs: Measured runs.
    """
    import time

    seconds = []
    for _ in range(runs):
        vit = clip(size)
        start = time.perf_counter()
        covft.wrap(vit, size.context_dim, layers=size.layers)
        seconds.append(time.perf_counter() - start)
    yield {"kind": "wrap", "seconds": sorted(seconds), "median": sorted(seconds)[len(seconds) // 2]}
