"""The tower, in each of the ways to tune it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import covft
from benchmarks.speed.baseline import ObviousMoE, ObviousSlot
from benchmarks.speed.measure import bytes_for_backward, flops, interleaved, peak_memory
from benchmarks.speed.sizes import Record, Size, clip


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


def measure_tower(
    size: Size, *, batch: int = 1, dtype: torch.dtype = torch.float32, runs: int = 5, device: str = "cpu"
) -> Iterator[Record]:
    """Measure time, bytes and operations of a tower, and its floor: the plain tower's time, scaled by operations."""
    tower = Tower(size, batch, dtype, device)
    own = tower.wrapped()
    models: dict[str, nn.Module] = {
        "plain": tower.plain(), "baseline": tower.obvious(), "covft": own, "covft, recompute=activation": own,
    }  # fmt: skip
    if device.startswith("cuda"):
        models["covft, recompute=none"] = own
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
        _check_towers(forwards, 1e-3 if tower.dtype == torch.float32 else 0.1)
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
            "dtype": str(tower.dtype).removeprefix("torch."),
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
def _check_towers(forwards: dict[str, Callable[[], Tensor]], rounding: float) -> None:
    wanted = forwards["baseline"]()
    for name in forwards:
        found = forwards[name]() if name.startswith("covft") else wanted
        worst = ((found - wanted).abs().max() / wanted.abs().max()).item()
        if worst > rounding:
            raise RuntimeError(f"{name} and the baseline differ by {worst:.2e}: nothing is timed")
