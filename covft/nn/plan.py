"""Finds out how an FFN computes, from the shapes of its layers, and checks that on random tokens."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, silu

from covft.utils.sharding import is_zero
from covft.utils.torch_internals import has_hooks

_HALVES = "_halves"
_QUICK = 1.702
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_tanh": lambda x: gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(_QUICK * x),
    "silu": silu,
}
_CALLED = "()"  # begins the name of an activation that the FFN's forward calls as a function
_OTHER_FORM = "another form than linear, activation, linear"
# Kinds by the number of the first linear layers, and their width relative to the input of the last one.
_KINDS: dict[tuple[float, ...], tuple[str, ...]] = {
    (1, 1): ("plain",),
    (1, 2): ("gate_first" + _HALVES, "gate_last" + _HALVES),
    (2, 1): ("gate_first", "gate_last"),
}


@dataclass(frozen=True)
class FFNPlan:
    """The form of an FFN: one or two linear layers on the tokens, something without weights, one more linear layer.

    Attributes:
        first: Names of the linear layers on the tokens, one or two.
        last: Name of the last linear layer.
        activation: Name of the activation in the FFN; `"()silu"` if it is no attribute, but a function that is called.
        kind: What comes between: `"plain"`, act(p); `"gate_first"`, act(p) q; `"gate_last"`, p act(q). With the suffix
            `"_halves"`, p and q are the halves of one layer's output.
        functions: Name of the function that an activation computes, by `identity_of` the activation; known ones are
            `"gelu"`, `"gelu_tanh"`, `"quick_gelu"`, x sigmoid(1.702 x), and `"silu"`.
    """

    first: tuple[str, ...]
    last: str
    activation: str
    kind: str
    functions: tuple[tuple[Any, str], ...] = ()

    @classmethod
    @torch.no_grad()
    def of(cls, ffn: nn.Module) -> tuple[FFNPlan | None, str]:
        """Find the plan of an FFN, or the reason for having none; a copy with random weights is run on a few tokens."""
        reason = _unfused_reason(ffn, _linears(ffn))
        if reason:
            return None, reason
        # Its own weights may be zero, or so small that any plan would fit.
        trial, generator = copy.deepcopy(ffn), torch.Generator().manual_seed(0)
        # On the meta device there is nothing to copy, and nothing is needed: the weights are drawn here.
        trial = trial.to_empty(device="cpu") if _is_meta(trial) else trial.cpu()
        trial = trial.float().train()  # in which dropout that is no module shows
        for parameter in trial.parameters():
            parameter.uniform_(-1, 1, generator=generator).mul_(parameter.shape[-1] ** -0.5)
        linears = _linears(trial)
        width = next(iter(linears.values())).in_features
        tokens = torch.randn(1, 3, width, generator=generator, dtype=torch.float32, device="cpu")
        try:
            with torch.random.fork_rng(devices=[]):
                wanted = trial(tokens)
        except Exception as error:  # of a foreign FFN that wants more than tokens
            return None, f"it does not run on tokens alone ({type(error).__name__})"
        for plan in _candidates(trial, linears):
            found = run_ffn(tokens, plan.weights(trial), plan.between(trial))
            if found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-4, atol=1e-5):
                called = plan.activation.startswith(_CALLED)
                return replace(plan, functions=() if called else _known(plan._activation_of(trial))), ""
        return None, _OTHER_FORM

    @staticmethod
    def form_of(ffn: nn.Module) -> tuple[Any, ...]:
        """Return the key of FFNs of one ViT that share a plan: class, modules, functions."""
        return type(ffn), repr(ffn), tuple(id(value) for value in vars(ffn).values() if callable(value))

    def layers(self, ffn: nn.Module) -> list[Any]:
        """Return the linear layers of an FFN, the last one at the end."""
        return [_submodule(ffn, name) for name in (*self.first, self.last)]

    def weights(self, ffn: nn.Module) -> list[Any]:
        """Return weight and bias (None if there is none) of each linear layer of an FFN, in the order of `layers`."""
        return [tensor for layer in self.layers(ffn) for tensor in (layer.weight, layer.bias)]

    def between(self, ffn: nn.Module) -> Between:
        """Return what an FFN computes between its linear layers, as a function of the first layers' outputs."""
        activation = self._activation_of(ffn)
        if self.activation.startswith(_CALLED):
            return Between(activation, self.kind, function=self.activation.removeprefix(_CALLED))
        identity = identity_of(activation)
        names = (name for known, name in self.functions if known == identity)
        # Not called as a module: hooks on all modules (profilers set them) cannot follow what backward does with it.
        call = activation.forward if isinstance(activation, nn.Module) else activation
        return Between(call, self.kind, function=next(names, None))

    def _activation_of(self, ffn: nn.Module) -> Any:
        if self.activation.startswith(_CALLED):
            return _FUNCTIONS[self.activation.removeprefix(_CALLED)]
        owner, _, name = self.activation.rpartition(".")
        return getattr(_submodule(ffn, owner), name)

    def applies_to(self, ffn: nn.Module) -> bool:
        """Return whether an FFN of this plan can be run by its weights alone now.

        It cannot where hooks watch its modules, where another library has replaced a linear layer, where weights are
        sharded, since the modules' own hooks gather them, and where they are of several types.
        """
        return self.weights_now(ffn) is not None

    def weights_now(self, ffn: nn.Module) -> list[Any] | None:
        """Return `weights`, or None where `applies_to` is False; in one pass, since every call of a block asks."""
        if _anything_watched(ffn):
            return None
        layers = self.layers(ffn)
        for layer in layers:
            if type(layer) is not nn.Linear:
                return None
        weights = [tensor for layer in layers for tensor in (layer.weight, layer.bias)]
        dtype = weights[0].dtype
        for weight in weights:
            if weight is not None and (type(weight) is not nn.Parameter or weight.dtype != dtype or is_zero(weight)):
                return None
        return weights


class Between:
    """The function between the linear layers; see `FFNPlan.kind`.

    QuickGELU, written out, takes three operations, and backward six. But 1.702 x sigmoid(1.702 x) is a SiLU, which is
    one operation in either direction: `scaled` takes and returns `scale` times what `__call__` does, and the matrix
    products before and after it apply and remove the factor. For other activations `scale` is 1.
    """

    def __init__(self, activation: Callable[[Tensor], Tensor], kind: str, *, function: str | None = None) -> None:
        self.activation, self.kind, self.function = activation, kind, function
        self.scale = _QUICK if function == "quick_gelu" and kind == "plain" else 1.0

    def __call__(self, *pre: Tensor) -> Tensor:
        """Map the outputs of the first linear layers to the input of the last one."""
        if self.kind.endswith(_HALVES):
            pre = pre[0].chunk(2, dim=-1)
        if self.kind.startswith("gate_first"):
            return self.activation(pre[0]) * pre[1]
        if self.kind.startswith("gate_last"):
            return pre[0] * self.activation(pre[1])
        return self.activation(pre[0])

    def scaled(self, *pre: Tensor) -> Tensor:
        """Do the same for outputs scaled by `scale`, and scale the result likewise."""
        return self(*pre) if self.scale == 1 else silu(pre[0])


def run_ffn(tokens: Tensor, weights: Sequence[Any], between: Callable[..., Tensor]) -> Tensor:
    """Run an FFN, on tokens of shape `(..., D)`, by what `FFNPlan.weights` and `FFNPlan.between` return."""
    *first, last, bias = weights
    return linear(between(*(linear(tokens, w, b) for w, b in pairs(first))), last, bias)


def pairs(tensors: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Pair weights with their biases; they come as weight, bias, weight, bias, ..."""
    return list(zip(tensors[::2], tensors[1::2], strict=True))


def _is_meta(ffn: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in ffn.parameters())


def _linears(ffn: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in ffn.named_modules() if type(module) is nn.Linear}


def _unfused_reason(ffn: nn.Module, linears: dict[str, nn.Linear]) -> str:
    parameters = list(ffn.parameters())
    if _is_meta(ffn) and next(ffn.buffers(), None) is not None:
        return "its buffers are on the meta device"
    if not 2 <= len(linears) <= 3:
        return _OTHER_FORM
    if {id(p) for p in parameters} != {id(p) for module in linears.values() for p in module.parameters()}:
        return "it has weights outside its linear layers"
    if any(isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 for module in ffn.modules()):
        return "it has dropout"
    if _anything_watched(ffn):
        return "hooks watch its modules"
    return ""


def _candidates(ffn: nn.Module, linears: dict[str, nn.Linear]) -> Iterator[FFNPlan]:
    """Yield the plans that the shapes allow."""
    width = next(iter(linears.values())).in_features
    no_activation = nn.Linear | nn.Identity | nn.modules.dropout._DropoutNd
    leaves = ((name, module) for name, module in ffn.named_modules() if name and not list(module.children()))
    activations = [name for name, module in leaves if not isinstance(module, no_activation)]
    activations += [
        name
        for name, value in vars(ffn).items()
        if callable(value) and not isinstance(value, nn.Module | type) and not name.startswith("_")
    ]
    activations += [f"{_CALLED}{name}" for name in _FUNCTIONS]
    for names in itertools.permutations(linears):
        *first, last = names
        into, out = [linears[name] for name in first], linears[last]
        if {layer.in_features for layer in into} != {width} or out.out_features != width:
            continue
        ratios = {layer.out_features / out.in_features for layer in into}
        for kind, activation in itertools.product(_KINDS.get((len(into), *ratios), ()), activations):
            yield FFNPlan(tuple(first), last, activation, kind)


def identity_of(activation: Any) -> Any:
    """Return the class of a module with its settings, or the function itself."""
    return (type(activation), activation.extra_repr()) if isinstance(activation, nn.Module) else activation


def _known(activation: Any) -> tuple[tuple[Any, str], ...]:
    """Return the identity of an activation with the name of what it computes; nothing if that is unknown."""
    x = torch.linspace(-8, 8, 65, dtype=torch.float64, device="cpu")
    try:
        found = activation(x)
    except Exception:  # of a foreign activation that takes no such type
        return ()
    for name, function in _FUNCTIONS.items():
        if torch.allclose(found, function(x), rtol=1e-12, atol=1e-12):
            return ((identity_of(activation), name),)
    return ()


def _submodule(ffn: nn.Module, path: str) -> Any:
    """Do what `get_submodule` does, in a fifth of the time."""
    module: Any = ffn
    for name in path.split(".") if path else ():
        module = module._modules[name]
    return module


def _anything_watched(module: nn.Module) -> bool:
    """Return whether hooks watch a module or one of its parts, or something stands in for its forward or a weight."""
    if has_hooks(module) or "forward" in module.__dict__ or "parametrizations" in module._modules:
        return True
    for child in module._modules.values():
        if child is not None and _anything_watched(child):
            return True
    return False
