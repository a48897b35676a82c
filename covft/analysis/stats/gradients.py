"""Gradients of single samples, per block of a tower, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from covft.adapters.spec import ViTSpec
from covft.errors import ConfigError, LayerIndexError, MissingGradientError, ShapeError, UnsupportedViTError
from covft.utils.arguments import check_kinds
from covft.utils.sharding import is_sharded
from covft.utils.sketch import WIDTH, GradientSketch

WEIGHTS = ("ffn", "all")


@dataclass(frozen=True, eq=False)
class Gradients:
    """Projected gradients of some samples.

    Attributes:
        layers: The blocks, L.
        vectors: Projected gradients, `(N, L, k)`, float32.
        kinds: Kind of each sample, N.
        weights: Number of weights of each block.
    """

    layers: tuple[int, ...]
    vectors: np.ndarray
    kinds: tuple[str, ...]
    weights: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        shape = np.shape(self.vectors)
        if len(shape) != 3 or shape[:2] != (len(self.kinds), len(self.layers)) or not np.isfinite(self.vectors).all():
            raise ShapeError(
                "These are not projected gradients.",
                expected=f"finite numbers ({len(self.kinds)} samples, {len(self.layers)} blocks, width)",
                got=shape,
            )

    def cosines(self, layer: int | None = None) -> np.ndarray:
        """Return the cosines of all pairs of samples, `(N, N)`, float64; None takes the mean over the blocks.

        A gradient of zero has cosine 0 with all others.
        """
        if layer is None:
            return np.mean([self.cosines(one) for one in self.layers], axis=0)
        vectors = self.vectors[:, self.position(layer)].astype(np.float64)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
        return unit @ unit.T

    def position(self, layer: int) -> int:
        """Return where a block is among the layers.

        Raises:
            LayerIndexError: If it is not among them.
        """
        if layer not in self.layers:
            raise LayerIndexError(f"Block {layer} has no gradients here.", expected=self.layers, got=layer)
        return self.layers.index(layer)


@check_kinds
def block_weights(vit: nn.Module, spec: ViTSpec, weights: str = "ffn") -> dict[int, dict[str, nn.Parameter]]:
    """Return the weights of each block of a tower, by name: of a wrapped block, those of its experts and router.

    Args:
        vit: The tower.
        spec: Its description, as `covft.describe` returns it.
        weights: `"ffn"` for those of the FFNs, `"all"` for all of a block. Of a block with several FFNs, `"all"` gives
            them under the first.

    Raises:
        ConfigError: If there is no such choice.
        UnsupportedViTError: If weights are sharded, or quantised.
    """
    if weights not in WEIGHTS:
        raise ConfigError(f"weights={weights!r} is unknown.", expected=" | ".join(WEIGHTS), got=repr(weights))
    found: dict[int, dict[str, nn.Parameter]] = {}
    taken: set[int] = set()
    for block in spec.blocks:
        paths = (block.path,) if weights == "all" else (block.mlp_path, block.output_path)
        named = {
            f"{path}.{name}": parameter
            for path in paths
            if path is not None
            for name, parameter in vit.get_submodule(path).named_parameters()
            if id(parameter) not in taken
        }
        taken.update(map(id, named.values()))
        if named:
            found[block.index] = named
    _check_weights(found)
    return found


def _check_weights(found: Mapping[int, Mapping[str, nn.Parameter]]) -> None:
    for named in found.values():
        for name, parameter in named.items():
            if is_sharded(parameter):
                problem, fix = "is sharded", "measure on one process, before the model is distributed"
            elif not parameter.is_floating_point():
                problem, fix = f"is {parameter.dtype}", "load the model without quantisation"
            elif parameter.is_meta:
                problem, fix = "has no values", "load the weights"
            else:
                continue
            raise UnsupportedViTError(
                f"{name} {problem}, so its gradient cannot be measured.", expected="floating-point weights", fix=fix
            )


@contextmanager
def trainable(parameters: Iterable[nn.Parameter], model: nn.Module) -> Iterator[None]:
    """While open, only these parameters of a model require a gradient; afterwards, those that did before."""
    chosen = {id(parameter) for parameter in parameters}
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            if parameter.is_floating_point():
                parameter.requires_grad_(id(parameter) in chosen)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


@check_kinds
def gradients_of(
    model: nn.Module,
    loss: Callable[[Any], Tensor],
    samples: Iterable[Any],
    kinds: Sequence[str],
    weights: Mapping[int, Mapping[str, nn.Parameter]],
    *,
    width: int = WIDTH,
    seed: int = 0,
) -> Gradients:
    """Measure the gradient of each sample, per block, projected to a fixed width.

    It holds the gradient of one sample at a time, and N × L × `width` numbers of 4 bytes. Nothing of the model is
    changed, `.grad` included.

    Args:
        model: What is run; its other parameters require no gradient meanwhile.
        loss: Returns the loss of a sample.
        samples: The samples, or small batches of one kind each.
        kinds: Their kinds.
        weights: The weights of each block, as `block_weights` returns them.
        width: Of the projection, see `GradientSketch`.
        seed: Of the projection.

    Raises:
        ShapeError: If there are not as many kinds as samples, or a loss is not one finite number.
        MissingGradientError: If a loss does not depend on the weights.
    """
    sketch = GradientSketch(width, seed)
    named = {name: parameter for of_block in weights.values() for name, parameter in of_block.items()}
    rows: list[np.ndarray] = []
    with trainable(named.values(), model), torch.enable_grad():
        for sample in samples:
            found = gradients_or_none(loss(sample), list(named.values()))
            by_name = {name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None}
            row = [
                sketch({name: by_name[name] for name in of_block if name in by_name}) for of_block in weights.values()
            ]
            rows.append(torch.stack(row).numpy())
    if len(rows) != len(kinds):
        raise ShapeError("The kinds are not as many as the samples.", expected=f"{len(rows)} kinds", got=len(kinds))
    counts = tuple(sum(parameter.numel() for parameter in of_block.values()) for of_block in weights.values())
    vectors = np.stack(rows) if rows else np.zeros((0, len(weights), width), np.float32)
    return Gradients(tuple(weights), vectors, tuple(map(str, kinds)), counts)


def gradients_or_none(loss: Any, parameters: Sequence[nn.Parameter]) -> tuple[Tensor | None, ...]:
    """Return the gradients of a loss, without setting `.grad`; None of parameters that it does not depend on.

    Raises:
        ShapeError: If the loss is not one finite number.
        MissingGradientError: If it depends on none of them.
    """
    value = checked_loss(loss)
    found = torch.autograd.grad(value, parameters, allow_unused=True) if value.requires_grad else ()
    if all(gradient is None for gradient in found):
        raise MissingGradientError(
            "The loss does not depend on the weights of the tower.",
            expected="a loss with gradients, of a model that reads its tower",
            got="none" if value.requires_grad else "a loss without gradients",
            fix="compute the loss without torch.no_grad() and detach()",
        )
    return found


def checked_loss(value: Any) -> Tensor:
    """Return a loss, or raise ShapeError if it is not one finite number."""
    is_one = torch.is_tensor(value) and value.numel() == 1
    if not is_one or not bool(torch.isfinite(value.detach()).all()):
        got = float(value.detach()) if is_one else f"{type(value).__name__} {tuple(getattr(value, 'shape', ()))}"
        raise ShapeError("The loss cannot be used.", expected="a tensor with one finite number", got=got)
    return value.reshape(())
