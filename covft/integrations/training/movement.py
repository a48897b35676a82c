"""Finds parts of a model whose parameters do not change, although they get gradients."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from covft.errors import ConfigError
from covft.integrations.mllm.attachment import KEY
from covft.integrations.training.parts import part_in_model, parts_of
from covft.surgery.adapted import AdaptedViT
from covft.utils.arguments import check_kinds
from covft.utils.sharding import is_partitioned, is_sharded

STEPS = 10
# Of the elements with a gradient. In float32 practically all change; in bfloat16, at a rate of 2e-5, one in twenty.
FEWEST = 0.75
_PER_PART = 4096


class MovementWatch:
    """Compares a sample of each part with its values at the start, once, after some optimizer steps.

    Only elements with a gradient count: experts that no image chose and words that no row has do not change. Neither do
    parameters whose learning rate is 0, as in the first step of a warm-up: `before_step` leaves them out.

    Args:
        named: Parameters by name; frozen ones are left out.
        part_of: Part of each name, as `parts_of` returns.
        steps: Optimizer steps after which they are compared.
    """

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], part_of: Mapping[str, str], steps: int = STEPS
    ) -> None:
        self._left = steps
        self.steps = steps
        parts: dict[str, list[nn.Parameter]] = {}
        for name, parameter in named:
            if parameter.requires_grad and not is_partitioned(parameter) and _local(parameter).numel():
                parts.setdefault(_part(name, part_of), []).append(parameter)
        self._samples = {
            part: [_Sample(parameter, max(_PER_PART // len(parameters), 1)) for parameter in parameters]
            for part, parameters in parts.items()
        }

    def before_step(self, optimizer: Any) -> None:
        """Leave out, in the step that begins, what the optimizer trains with a learning rate of 0.

        Call it before the forward pass. A step in which nothing has another learning rate is not counted.

        Args:
            optimizer: The optimizer, with the learning rates of this step.
        """
        resting = {id(p) for group in optimizer.param_groups if group["lr"] == 0 for p in group["params"]}
        for sample in self._all():
            sample.rests = id(sample.parameter) in resting

    def after_step(self) -> None:
        """Count an optimizer step; after the last one, warn of parts that do not change, and stop watching."""
        if self._samples and all(sample.rests for sample in self._all()):
            return
        for sample in self._all():
            sample.note_shard()
        self._left -= 1
        if self._left:
            return
        still = {part: share for part, share in self.shares().items() if share < FEWEST}
        types = sorted({str(s.parameter.dtype)[6:] for part in still for s in self._samples[part]})
        self.close()
        if still:
            listed = ", ".join(f"{share:.1%} of {part}" for part, share in still.items())
            warnings.warn(
                f"Few elements have changed in {self.steps} optimizer steps, of those with a gradient: {listed} "
                f"({', '.join(types)}). {_reason(types)}",
                UserWarning,
                stacklevel=2,
            )

    def shares(self) -> dict[str, float]:
        """Return the share of each part's elements that have changed so far, of those that had a gradient."""
        shares: dict[str, float] = {}
        for part, samples in self._samples.items():
            counted = sum(int(sample.reached.sum()) for sample in samples)
            if counted:
                shares[part] = sum(sample.moved() for sample in samples) / counted
        return shares

    def close(self) -> None:
        """Remove the hooks and forget the sample."""
        for sample in self._all():
            sample.hook.remove()
        self._samples = {}
        self._left = 0

    def _all(self) -> list[_Sample]:
        return [sample for samples in self._samples.values() for sample in samples]


@check_kinds
def watch_movement(module: nn.Module, steps: int = STEPS) -> MovementWatch:
    """Watch whether everything that is trained changes, in a training loop of any library.

    `CoVFTCallback` does this in the Trainer of transformers. Elsewhere, call this before the first step, and
    `after_step()` after each optimizer step: after `steps` of them it warns of parts that do not change. Where learning
    rates may be 0, call `before_step(optimizer)` before each forward pass.

    Args:
        module: What is trained: an attached model, what `covft.wrap` returned, or a module around either.
        steps: Optimizer steps after which it warns.

    Returns:
        The watch; `shares()` returns the share of each part's elements that have changed so far.

    Raises:
        ConfigError: If steps cannot be used.

    Example:
        >>> watch = watch_movement(torch.nn.Linear(2, 2))
        >>> watch.after_step()
    """
    if steps < 1:
        raise ConfigError(f"steps={steps} cannot be used.", expected="a whole number >= 1", got=steps)
    return MovementWatch(module.named_parameters(), _parts_inside(module), steps)


def _parts_inside(module: nn.Module) -> dict[str, str]:
    """Return the part of each parameter; `"rest"` for those outside an attached model and a wrapped ViT."""
    parts = {name: "rest" for name, _ in module.named_parameters()}
    for path, inner in module.named_modules():
        prefix = f"{path}." if path else ""
        found: dict[str, str] = {}
        if isinstance(inner, AdaptedViT):
            found = {f"vit.{name}": part_in_model(inner, name) for name, _ in inner.vit.named_parameters()}
        elif KEY in inner.__dict__:
            found = parts_of(inner)
        parts.update({prefix + name: part for name, part in found.items()})
    return parts


class _Sample:
    """Elements of a parameter, evenly spread, and whether each has had a gradient."""

    def __init__(self, parameter: nn.Parameter, size: int) -> None:
        values = _local(parameter)
        size = min(size, values.numel())
        self.parameter = parameter
        self.indices = (torch.arange(size, device=values.device) * values.numel()) // size
        self.start = self._of(parameter)
        self.rests = False  # whether its learning rate is 0
        self.reached = torch.zeros(size, dtype=torch.bool, device=values.device)
        self.hook: Any = parameter.register_post_accumulate_grad_hook(partial(_note, self))

    def moved(self) -> int:
        """Return how many elements with a gradient have changed."""
        now = self._of(self.parameter)
        return int(((now != self.start.to(now)) & self.reached).sum())

    def note(self, gradient: Tensor) -> None:
        """Note which elements have a gradient, if they are to change."""
        if not self.rests:
            self.reached |= self._of(gradient) != 0

    def note_shard(self) -> None:
        """Take all elements of a shard for reached: FSDP sets gradients without calling the parameters' hooks."""
        if not self.rests and is_sharded(self.parameter):
            self.reached.fill_(True)

    def _of(self, tensor: Tensor) -> Tensor:
        return _local(tensor).reshape(-1)[self.indices]


def _note(sample: _Sample, parameter: nn.Parameter) -> None:
    if parameter.grad is not None:
        sample.note(parameter.grad)


def _local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]


def _part(name: str, part_of: Mapping[str, str]) -> str:
    """Return the part, with routers and contexts apart."""
    part = part_of[name]
    return "context" if part == "router" and ".context." in name else part


def _reason(types: list[str]) -> str:
    if {"bfloat16", "float16"} & set(types):
        return (
            "Half precision rounds an optimizer's small steps away. Fix: train_only(model, parts, dtype=torch.float32) "
            "with bf16=True, before the trainer is constructed; elsewhere encoder.train_in_float32() before "
            "the optimizer is created; or an optimizer that keeps float32 copies."
        )
    return "Reasons: a learning rate of 0 or close to it, or an optimizer that was created without these parameters."
