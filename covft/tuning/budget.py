"""What a method costs, before anything is built, and which options make methods cost the same."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from covft.adapters.registry import describe
from covft.errors import ConfigError, CoVFTError
from covft.tuning.api import COVFT, tune
from covft.tuning.registry import methods
from covft.utils.arguments import check_kinds, check_sizes
from covft.utils.parameters import count

_MOST = 1 << 16
_STEPS = 65  # a width may have to be a multiple of the number of heads


@dataclass(frozen=True)
class Budget:
    """What tuning a tower by a method costs.

    Attributes:
        method: Name of the method.
        options: Options that were given.
        parameters: Trained parameters.
        added: Parameters that the method adds, among these or not.
        forward_flops: FLOPs that a forward of one image takes in addition to the plain tower's.
        step_flops: FLOPs of a forward and a backward of one image in addition to a forward of the plain tower.
        kept_bytes: What autograd keeps of one image for backward, in bytes, weights not counted.
    """

    method: str
    options: dict[str, Any]
    parameters: int
    added: int
    forward_flops: int | None = None
    step_flops: int | None = None
    kept_bytes: int | None = None


@check_kinds
def budget(
    vit: nn.Module,
    method: str,
    *,
    text_dim: int = 768,
    **options: Any,
) -> Budget:
    """Return what a method would cost, on a twin of the ViT without values: nothing is built, the ViT is not changed.

    FLOPs and bytes are counted in a run of the twin. They are None for a ViT whose input size is not known, and for
    packed and padded ones.

    Args:
        vit: The ViT.
        method: Name of a method.
        text_dim: Width C of the text features, for methods that read text.
        **options: Options of the method.

    Raises:
        CoVFTError: As `covft.tune` does.

    Example:
        >>> import timm
        >>> budget(timm.create_model("test_vit"), "lora", r=4).parameters
        21504
    """
    check_sizes(text_dim=text_dim)
    twin = _twin(vit)
    total = count(twin.parameters())
    with torch.device("meta"):
        tuned: Any = tune(twin, method, text_encoder=text_dim, **options)
    trained = count(tuned.trainable_parameters())
    cost = (None, None, None)
    given = _inputs(vit)
    if given is not None:
        cost = _measured(_twin(vit), tuned, given, torch.empty(1, text_dim, device="meta"))
    return Budget(method, dict(options), trained, count(twin.parameters()) - total, *cost)


@check_kinds
def match(
    vit: nn.Module,
    parameters: int,
    methods: Iterable[str],
    *,
    text_dim: int = 768,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Budget]:
    """Find the options by which methods come closest to a number of trained parameters.

    The option is that which the method calls its size: the rank of LoRA, the number of prompts, of blocks, the width of
    a network, or the rank of covft's experts.

    Args:
        vit: The ViT, which is not changed.
        parameters: Number of trained parameters to come close to.
        methods: Names of methods.
        text_dim: Width C of the text features, for methods that read text.
        options: Other options of each method, by its name.

    Returns:
        The budget of each method, in order. The difference from `parameters` may be large where a method cannot come
        closer.

    Raises:
        ConfigError: If a method has no size to choose.
        CoVFTError: As `covft.tune` does.
    """
    check_sizes(text_dim=text_dim)
    if parameters < 1:
        raise ConfigError(f"parameters={parameters} leaves nothing to train.", expected="at least 1", got=parameters)
    return [_closest(vit, name, parameters, text_dim, dict((options or {}).get(name, {}))) for name in methods]


def _closest(vit: nn.Module, method: str, parameters: int, text_dim: int, options: dict[str, Any]) -> Budget:
    """Return the budget of a method whose size comes closest."""
    size, value_of = _size(vit, method)
    twin = _twin(vit)

    @functools.cache
    def trained(number: int) -> int:
        """Return how many parameters a size trains."""
        with torch.device("meta"):
            given = {**options, size: value_of(number)}
            tuned: Any = tune(copy.deepcopy(twin), method, text_encoder=text_dim, **given)
        return count(tuned.trainable_parameters())

    step = next((step for step in range(1, _STEPS) if _works(trained, step)), None)
    if step is None:
        trained(1)  # whose error says what is wrong
    assert step is not None, "or that would have raised"
    low = high = 1
    while high * step < _MOST and _works(trained, high * step) and trained(high * step) < parameters:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        fits = _works(trained, middle * step) and trained(middle * step) <= parameters
        low, high = (middle, high) if fits else (low, middle)
    near = [number * step for number in (low, high) if _works(trained, number * step)]
    best = min(near, key=lambda number: abs(trained(number) - parameters))
    return budget(vit, method, text_dim=text_dim, **options, **{size: value_of(best)})


def _works(trained: Callable[[int], int], number: int) -> bool:
    """Return whether a size can be used: a width may have to be a multiple of something, a ViT has so many blocks."""
    try:
        trained(number)
    except CoVFTError:
        return False
    return True


def _size(vit: nn.Module, method: str) -> tuple[str, Callable[[int], Any]]:
    """Return the option that sets how much a method trains, and its value for a number."""
    if method == COVFT:
        return "expert_rank", lambda number: number
    size = methods()[method].size if method in methods() else None
    if size is None:
        raise ConfigError(
            f"{method!r} has no option that sets how much is trained.",
            known=", ".join([COVFT, *(name for name, known in methods().items() if known.size)]),
        )
    if size != "layers":
        return size, lambda number: number
    depth = describe(vit).depth
    return size, lambda number: tuple(range(max(depth - 1 - number, -1), depth - 1)) if number < depth else (depth,)


def _twin(vit: nn.Module) -> nn.Module:
    """Copy a ViT without the values of its parameters and floating-point buffers."""
    memo: dict[int, Any] = {}
    for parameter in vit.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
    for buffer in vit.buffers():
        memo[id(buffer)] = buffer.to("meta")
    return copy.deepcopy(vit, memo).eval()


def _inputs(vit: nn.Module) -> dict[str, Any] | None:
    """Return the arguments of a call with one image; None where its size is not known."""
    spec = describe(vit)
    if spec.image_size is None or spec.input.is_packed or spec.input.image_axes > 1 or spec.input.mask_argument:
        return None
    name = next(iter(inspect.signature(vit.forward).parameters))
    dtype = next(vit.parameters()).dtype
    return {name: torch.empty(1, 3, spec.image_size, spec.image_size, dtype=dtype, device="meta")}


def _measured(
    plain: nn.Module, tuned: nn.Module, inputs: dict[str, Any], text: Tensor
) -> tuple[int | None, int | None, int | None]:
    """Count FLOPs and bytes in runs without values."""
    weights = {_storage(parameter) for parameter in tuned.parameters()}
    kept: dict[int, int] = {}
    held: list[Tensor] = []  # so that no storage is freed and its address taken by another

    def note(tensor: Tensor) -> Tensor:
        held.append(tensor)
        if _storage(tensor) not in weights:
            kept[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.no_grad(), FlopCounterMode(display=False) as before:
        plain(**inputs)
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        tuned(text=text, **inputs)
    with (
        FlopCounterMode(display=False) as step,
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        output = tuned(text=text, **inputs)
        features = output if isinstance(output, Tensor) else output[0]
        if features.requires_grad:
            features.sum().backward()
    base = before.get_total_flops()
    return forward.get_total_flops() - base, step.get_total_flops() - base, sum(kept.values())


def _storage(tensor: Tensor) -> int:
    storage: Any = tensor.untyped_storage()
    return storage._cdata
