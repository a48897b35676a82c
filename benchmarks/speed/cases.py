"""The measured cases: one block and the tower at the size of CLIP-L/14-336, in each of their ways to run."""

from __future__ import annotations

import copy
import functools
import gc
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import covft
from benchmarks.speed.baseline import ObviousMoE, ObviousSlot
from benchmarks.speed.measure import bytes_for_backward, flops, interleaved, peak_memory, seconds_of, touch_memory
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
        text_dim: Width C of the text features.
        layers: Adapted blocks.
    """

    embed_dim: int = 1024
    ffn_dim: int = 4096
    depth: int = 24
    num_heads: int = 16
    image_size: int = 336
    patch_size: int = 14
    text_dim: int = 768
    layers: tuple[int, ...] = tuple(range(11, 23))

    @property
    def tokens(self) -> int:
        """Tokens of an image, the class token included."""
        return (self.image_size // self.patch_size) ** 2 + 1


CLIP_L = Size()
TINY = Size(32, 64, 4, 4, 32, 8, 16, (1, 2))


def clip(size: Size) -> Any:
    """Build Hugging Face's CLIP tower with random weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=size.embed_dim, intermediate_size=size.ffn_dim, num_hidden_layers=size.depth,
        num_attention_heads=size.num_heads, image_size=size.image_size, patch_size=size.patch_size,
    )  # fmt: skip
    return CLIPVisionModel(config)


def clip_ffn(size: Size) -> nn.Module:
    """Build one FFN of that tower."""
    return clip(Size(**{**size.__dict__, "depth": 1})).encoder.layers[0].mlp


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

    def ways(self, names: tuple[str, ...], compiled: bool = False) -> dict[str, Callable[[], Tensor]]:
        """Return forwards by name: `plain` (the FFN alone), `baseline`, and covft by what backward recomputes."""
        found: dict[str, Callable[[], Tensor]] = {}
        for name in names:
            module = {"plain": self.ffn, "baseline": self.baseline}.get(name, self.moe)
            run = torch.compile(module) if compiled else module
            found[name] = functools.partial(self._run, name, run)
        return found

    def _run(self, name: str, run: Callable[..., Tensor]) -> Tensor:
        if name == "plain":
            return run(self.x)
        if name != "baseline":
            self.moe.set_recompute(name)
        return run(self.x, self.text)

    def parameters(self) -> list[Tensor]:
        """Return all weights."""
        return [*self.ffn.parameters(), *self.moe.parameters(), *self.baseline.parameters()]

    def forget(self) -> None:
        """Drop all gradients."""
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
    compiled: bool = False,
    names: tuple[str, ...] = ("plain", "baseline", "none", "activation", "all"),
    backward: bool = True,
    runs: int = 5,
    device: str = "cpu",
) -> Iterator[Record]:
    """Measure time, bytes and operations of the ways to run one block."""
    block = Block(size, batch, experts, routing, dtype, device)
    difference = block.check()
    ways = block.ways(names, compiled)
    with torch.no_grad():
        forward = interleaved(ways, runs, 2 if compiled else 1, device)
    steps = {n: block.with_backward(f) for n, f in ways.items()}
    both = interleaved(steps, runs, 2 if compiled else 1, device) if backward else {}
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
            record["peak"] = peak_memory(steps[name], device)
            record["bytes"] = bytes_for_backward(way, block.parameters())
        if not compiled:
            record["flops"] = flops(way)
        yield record


class Tower:
    """A tower in each of the ways to tune it, and a batch of images with their text features."""

    def __init__(self, size: Size, batch: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        self.size, self.dtype, self.device = size, dtype, device
        torch.manual_seed(0)
        self.images = torch.randn(batch, 3, size.image_size, size.image_size, device=device, dtype=dtype)
        self.text = torch.randn(batch, size.text_dim, device=device, dtype=dtype)

    def plain(self) -> nn.Module:
        """Build the plain tower, entirely trainable (full fine-tuning)."""
        return clip(self.size).to(self.device, self.dtype)

    def wrapped(self, **settings: Any) -> covft.ContextEncoder:
        """Build the tower under CoVFT, with experts that differ."""
        torch.manual_seed(0)
        encoder = covft.wrap(self.plain(), self.size.text_dim, layers=self.size.layers, **settings)
        with torch.no_grad():
            for slot in encoder.slots().values():
                for parameter in slot.experts.parameters():
                    parameter.add_(0.01 * torch.randn_like(parameter))
        return encoder

    def obvious(self) -> covft.ContextEncoder:
        """Build the same with the obvious implementation in every slot."""
        encoder = self.wrapped()
        for layer, slot in encoder.slots().items():
            path = encoder.spec.blocks[layer].mlp_path
            parent, _, name = path.rpartition(".")
            setattr(encoder.vit.get_submodule(parent), name, ObviousSlot(ObviousMoE.like(slot), encoder.conditioning))
        return encoder

    def forward(self, model: nn.Module) -> Callable[[], Tensor]:
        """Return a forward to the features of the penultimate layer, as LLaVA reads them."""
        args = (self.images, self.text) if isinstance(model, covft.ContextEncoder) else (self.images,)
        return lambda: model(*args, output_hidden_states=True).hidden_states[-2]

    def step(self, model: nn.Module) -> Callable[[], None]:
        """Return a run of forward and backward."""
        forward = self.forward(model)

        def run() -> None:
            output = forward()
            output.backward(torch.ones_like(output))
            model.zero_grad(set_to_none=True)

        return run


def measure_tower(size: Size, *, batch: int = 1, runs: int = 5, device: str = "cpu") -> Iterator[Record]:
    """Measure time, bytes and operations of a tower, and its floor: the plain tower's time, scaled by operations."""
    tower = Tower(size, batch, device=device)
    own = tower.wrapped()
    models: dict[str, nn.Module] = {
        "plain": tower.plain(), "baseline": tower.obvious(), "covft": own, "covft, recompute=activation": own,
    }  # fmt: skip
    yield from _measure_towers(tower, models, runs)


def measure_variants(size: Size, *, batch: int = 1, runs: int = 5, device: str = "cpu") -> Iterator[Record]:
    """Measure towers that compute something else, one after the other since they are large."""
    tower = Tower(size, batch, device=device)
    variants: dict[str, dict[str, Any]] = {
        "feature_layer=-2": {"feature_layer": -2},
        "sparse": {"routing": "sparse"},
        "expert_rank=64": {"expert_rank": min(64, size.embed_dim // 2)},
    }
    for name, settings in variants.items():
        models = {"plain": tower.plain(), f"covft, {name}": tower.wrapped(**settings)}
        yield from (record for record in _measure_towers(tower, models, runs) if record["name"] != "plain")
        del models
        gc.collect()


def _measure_towers(tower: Tower, models: dict[str, nn.Module], runs: int) -> Iterator[Record]:
    def in_its_way(name: str, function: Callable[[], Any]) -> Callable[[], Any]:
        """Set the model before each run, since several names may share it."""
        if name == "baseline" or not isinstance(encoder := models[name], covft.ContextEncoder):
            return function
        recompute = name.partition("recompute=")[2] or "all"

        def run() -> Any:
            encoder.set_recompute(recompute)
            return function()

        return run

    forwards = {name: in_its_way(name, tower.forward(model)) for name, model in models.items()}
    steps = {name: in_its_way(name, tower.step(model)) for name, model in models.items()}
    for name, model in models.items():
        model.train()
        forwards[name]()  # skipped blocks learn the form of their output in the first run
    if "baseline" in models:
        _check_towers(forwards)
    with torch.no_grad():
        forward = interleaved(forwards, runs, device=tower.device)
        operations = {name: flops(run) for name, run in forwards.items()}
    both = interleaved(steps, runs, device=tower.device)
    # Required operations: nothing is recomputed.
    needed: dict[str, int] = {}
    for name, model in models.items():
        if isinstance(model, covft.ContextEncoder) and name != "baseline":
            model.set_recompute("none")
        needed[name] = flops(tower.step(model))
    for name, model in models.items():
        yield {
            "kind": "tower",
            "name": name,
            "batch": len(tower.images),
            "device": tower.device,
            "dtype": "float32",
            "forward": forward[name].to_dict(),
            "forward_backward": both[name].to_dict(),
            "flops": operations[name],
            "flops_step": needed[name],
            "floor": forward["plain"].median * operations[name] / operations["plain"],
            "floor_step": both["plain"].median * needed[name] / needed["plain"],
            "bytes": bytes_for_backward(forwards[name], model.parameters()),
            "peak": peak_memory(steps[name], tower.device),
        }


@torch.no_grad()
def _check_towers(forwards: dict[str, Callable[[], Tensor]]) -> None:
    wanted = forwards["baseline"]()
    for name in forwards:
        found = forwards[name]() if name.startswith("covft") else wanted
        worst = ((found - wanted).abs().max() / wanted.abs().max()).item()
        if worst > 1e-3:
            raise RuntimeError(f"{name} and the baseline differ by {worst:.2e}: nothing is timed")


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
