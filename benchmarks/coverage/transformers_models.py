"""Checks a small model of every vision tower of transformers, with additional checks of its features."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import covft
from benchmarks.coverage import batch
from benchmarks.coverage.check import EXPERTS, TEXT_DIM, Result, check, tensors
from benchmarks.coverage.transformers_cases import Case, all_cases, build
from covft.testing import HashTextEncoder

# An image's routing in a batch and alone are the same arithmetic in another order.
ALONE = 1e-4


def names() -> list[str]:
    """Return the classes to check."""
    return list(all_cases())


def run(name: str) -> Result:
    """Check one class.

    Args:
        name: Of the class.

    Returns:
        What `check` found; `"failed"` too if wrapping changes the number of hidden states, or if an image's routing
        depends on which other images share its batch.
    """
    folder, _, case = all_cases()[name]
    try:
        vit = build(name)
    except Exception as error:  # of a class that needs what is not installed, such as natten
        return Result(name, "transformers", name, "failed", f"cannot be built: {type(error).__name__}: {error}"[:1000])
    result = check(vit, _inputs(vit, case), name=name, library="transformers", layers=case.layers)
    if result.verdict == "wrapped":
        problems = [*_hidden_states(build(name), case), *_alone(build(name).double(), case)]
        if problems:
            result.verdict, result.reason = "failed", "; ".join(problems)
    result.name, result.class_name = f"{folder}.{name}", name
    return result


def _inputs(vit: nn.Module, case: Case) -> Any:
    return lambda count: case.inputs(vit, range(count))


def _wrapped(vit: nn.Module, case: Case) -> covft.ContextEncoder:
    layers = range(covft.describe(vit).depth) if case.layers is None else case.layers
    encoder = covft.wrap(vit, HashTextEncoder(TEXT_DIM), layers=layers, experts=EXPERTS)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in encoder.trainable_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return encoder


def _hidden_states(vit: nn.Module, case: Case) -> Iterator[str]:
    """Yield a problem if wrapping changes the number or shapes of the hidden states."""
    parameters = inspect.signature(vit.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if not takes_any and "output_hidden_states" not in parameters:
        return
    args, kwargs = case.inputs(vit, [0, 1])
    with torch.no_grad():
        before = _shapes(vit(*args, **kwargs, output_hidden_states=True))
    with torch.no_grad(), _wrapped(vit, case).condition(["one", "two"]):
        after = _shapes(vit(*args, **kwargs, output_hidden_states=True))
    if before != after:
        yield f"hidden states were {before} before wrapping and are {after} after"


def _shapes(output: Any) -> list[tuple[int, ...]] | None:
    states = getattr(output, "hidden_states", None)
    return None if states is None else [tuple(state.shape) for state in tensors(states)]


def _alone(vit: nn.Module, case: Case) -> Iterator[str]:
    """Yield a problem if images in a batch are routed differently from each of them alone."""
    encoder, texts = _wrapped(vit, case), ["one", "two", "three"]
    together = _routing(encoder, case, [0, 1, 2], texts)
    for number in range(3):
        own = _routing(encoder, case, [number, *case.beside], [texts[number], *("other" for _ in case.beside)])
        for layer, weights in together.items():
            if weights.shape[0] != 3:
                yield f"block {layer} has {weights.shape[0]} rows of routing weights for 3 images"
                return
            difference = float((weights[number] - own[layer][0]).abs().max())
            if not difference < ALONE:
                yield f"the routing of image {number} in block {layer} depends on its batch, by {difference:.1e}"
                return


def _routing(encoder: covft.ContextEncoder, case: Case, numbers: Sequence[int], texts: list[str]) -> dict[int, Tensor]:
    args, kwargs = case.inputs(encoder.vit, numbers)
    with torch.no_grad(), encoder.condition(texts):
        encoder.vit(*_double(args), **_double(kwargs))
    return encoder.routing_weights()


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: _double(item) for name, item in value.items()}
    return tuple(map(_double, value)) if isinstance(value, tuple) else value


def main() -> None:
    """Check the classes that are missing from the output file."""
    arguments = batch.options(__doc__, sized=False).parse_args()
    batch.run(arguments, names(), lambda name: run(name).to_dict(), key="class_name")


if __name__ == "__main__":
    main()
