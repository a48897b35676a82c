"""Checks covft.wrap on one ViT: the output is unchanged at the start, and every added parameter gets a gradient."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import covft
from covft.errors import UnknownViTError, UnsupportedViTError
from covft.testing import HashTextEncoder

TOLERANCE = 1e-4
FFN_TOLERANCE = 1e-3  # rounding accumulates up to the last one
TEXT_DIM = 16
EXPERTS = 2

# Maps a number of images to the arguments and keywords of a call of the ViT.
MakeInputs = Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass
class Result:
    """The result for one ViT.

    Attributes:
        name: Name of the model in its library.
        library: `timm`, `open_clip` or `transformers`.
        class_name: Class of the model.
        verdict: `"wrapped"`, `"refused"` (with an error of covft that explains it) or `"failed"`.
        reason: Why it was refused or failed.
        num_blocks: Number of blocks found, all of which are adapted.
        layouts: Layouts of the tokens at their FFNs, sorted.
        device: `"cpu"`, or `"meta"` if only shapes and the existence of gradients were checked; it also tells where
            some blocks of the model were run.
        change: Relative change of the output by wrapping, in eval mode and float32; None if nothing was computed.
        ffn_change: The same for the outputs of the FFNs, the largest; a block may scale them down to nearly zero.
        missing_gradients: Names of parameters of experts, routers and contexts without a gradient.
        seconds: Time of the check.
    """

    name: str
    library: str
    class_name: str
    verdict: str
    reason: str = ""
    num_blocks: int = 0
    layouts: list[str] = field(default_factory=list)
    device: str = "cpu"
    change: float | None = None
    ffn_change: float | None = None
    missing_gradients: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return asdict(self)


def check(
    vit: nn.Module,
    make_inputs: MakeInputs,
    *,
    name: str,
    library: str,
    images: int = 2,
    adapter: Any = None,
    layers: Any = None,
    gradients: bool = True,
) -> Result:
    """Wrap all blocks of a ViT, check its output and the gradients of all added parameters, and unwrap it.

    Parameters of the ViT that start at zero (a gate, the last weight of a branch) are randomised first, because they
    would hide everything after them.

    Args:
        vit: The model, in float32, on the CPU or entirely on the meta device.
        make_inputs: Returns the arguments and keywords of a call on a number of images.
        name: Name of the model.
        library: Of the model.
        images: Number of images, each with a text.
        adapter: Describes the ViT, if no registered adapter does.
        layers: Indices of the adapted blocks; None takes all.
        gradients: Whether to check gradients.

    Returns:
        The result, also for a model that cannot be wrapped.
    """
    start = time.perf_counter()
    device = next((p.device.type for p in vit.parameters()), "cpu")
    result = Result(name, library, type(vit).__name__, "failed", device=device)
    try:
        _check(result, vit, make_inputs, images, adapter, layers, gradients)
    except (UnknownViTError, UnsupportedViTError) as error:
        result.verdict, result.reason = "refused", str(error)
    except Exception as error:  # a sweep reports every model, whatever it raises
        result.verdict, result.reason = "failed", f"{type(error).__name__}: {str(error)[:1000]}"
    result.seconds = round(time.perf_counter() - start, 3)
    return result


def _check(
    result: Result,
    vit: nn.Module,
    make_inputs: MakeInputs,
    images: int,
    adapter: Any,
    layers: Any,
    gradients: bool,
) -> None:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    vit = vit.eval()
    _leave_zero(vit, generator)
    spec = covft.describe(vit, adapter)
    result.num_blocks = spec.depth
    result.layouts = sorted({getattr(block, "layout", "BND") for block in spec.blocks})
    args, kwargs = make_inputs(images)
    with torch.no_grad(), _Recorder(vit, spec) as ffns_before:
        before = list(tensors(vit(*args, **kwargs)))
    parameters = {name: id(parameter) for name, parameter in vit.named_parameters()}
    encoder = covft.wrap(
        vit,
        HashTextEncoder(TEXT_DIM),
        layers=range(spec.depth) if layers is None else layers,
        experts=EXPERTS,
        adapter=adapter,
    )
    texts = [f"question {i}" for i in range(images)]
    with torch.no_grad(), encoder.condition(texts), _Recorder(vit, spec) as ffns_after:
        after = list(tensors(vit(*args, **kwargs)))
    problems = ffns_before.problems()
    problems += _differences(result, before, after, ffns_before.outputs, ffns_after.outputs)
    if gradients:
        problems += _gradients(result, encoder, lambda: vit(*args, **kwargs), texts, generator)
    covft.unwrap(encoder)
    if {name: id(parameter) for name, parameter in vit.named_parameters()} != parameters:
        problems.append("unwrap() did not give the ViT back")
    with torch.no_grad():
        again = before if _is_meta(before) else list(tensors(vit(*args, **kwargs)))
    if not _is_meta(before) and not all(torch.equal(x, y) for x, y in zip(before, again, strict=True)):
        problems.append("the output after unwrap() is another")
    result.reason = "; ".join(problems)
    result.verdict = "failed" if problems else "wrapped"


def _differences(
    result: Result, before: list[Tensor], after: list[Tensor], ffns_before: list[Tensor], ffns_after: list[Tensor]
) -> list[str]:
    if [x.shape for x in (*before, *ffns_before)] != [x.shape for x in (*after, *ffns_after)]:
        return ["wrapping changed the shape of the output"]
    if _is_meta(before):
        return []
    if not all(bool(x.isfinite().all()) for x in before):
        return ["the output is not finite before wrapping"]
    result.change = max(map(_apart, before, after), default=0.0)
    result.ffn_change = max(map(_apart, ffns_before, ffns_after), default=0.0)
    problems = [] if result.change < TOLERANCE else [f"wrapping changed the output by {result.change:.2e}"]
    if not result.ffn_change < FFN_TOLERANCE:
        problems.append(f"wrapping changed what an FFN returns by {result.ffn_change:.2e}")
    return problems


def _apart(x: Tensor, y: Tensor) -> float:
    return float((x - y).double().norm() / x.double().norm().clamp(min=1e-12))


class _Recorder:
    """Records the outputs of the FFNs and the order in which they run."""

    def __init__(self, vit: nn.Module, spec: covft.adapters.ViTSpec) -> None:
        self.modules = [vit.get_submodule(block.output_path or block.mlp_path) for block in spec.blocks]
        self.outputs: list[Tensor] = []
        self.ran: dict[int, None] = {}

    def problems(self) -> list[str]:
        """Return the differences from the description."""
        order = [id(module) for module in self.modules]
        if set(self.ran) != set(order):
            return [f"{len(set(order) - set(self.ran))} of the FFNs did not run"]
        return [] if list(self.ran) == order else ["the FFNs do not run in the order of their indices"]

    def __enter__(self) -> _Recorder:
        self.handles = [module.register_forward_hook(self._keep) for module in self.modules]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _keep(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.outputs.append(output)
        self.ran[id(module)] = None


def _gradients(
    result: Result, encoder: covft.ContextEncoder, call: Callable[[], Any], texts: list[str], generator: torch.Generator
) -> list[str]:
    """Perturb the added parameters, run once, and find those without a gradient."""
    slots = encoder.slots()
    single: set[str] = set()  # attention over a single token, whose scores cannot matter
    handles = []
    added: dict[str, nn.Parameter] = {}
    for layer, slot in slots.items():
        prefix = encoder.spec.blocks[layer].mlp_path
        for name, parameter in slot.named_parameters():
            if parameter.requires_grad:
                added[f"{prefix}.{name}"] = parameter
        attention = getattr(slot.context, "attention", None)
        if attention is not None:
            handles.append(attention.register_forward_pre_hook(_Watch(f"{prefix}.context.attention.", single)))
    with torch.no_grad():
        for parameter in added.values():
            if not parameter.is_meta:
                scale = 0.1 * float(parameter.std()) if parameter.numel() > 1 else 0.0
                parameter.add_(torch.randn(parameter.shape, generator=generator) * max(scale, 0.02))
    with encoder.condition(texts):
        outputs = [x for x in tensors(call()) if x.requires_grad]
    if not outputs:
        return ["no output has a gradient"]
    weighed = [(x * _random_like(x, generator)).sum() for x in outputs]
    torch.stack(weighed).sum().backward()
    for handle in handles:
        handle.remove()
    for name, parameter in added.items():
        scores = name.endswith(("q_proj.weight", "q_proj.bias", "k_proj_weight"))
        if scores and name.rpartition("attention.")[0] + "attention." in single and parameter.grad is not None:
            continue
        if parameter.grad is None or (not parameter.is_meta and not parameter.grad.any()):
            result.missing_gradients.append(name)
    count = len(result.missing_gradients)
    return [f"{count} of {len(added)} parameters got no gradient"] if count else []


class _Watch:
    """Records attention modules that are called with one token per image."""

    def __init__(self, name: str, found: set[str]) -> None:
        self.name, self.found = name, found

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0].shape[1] == 1:
            self.found.add(self.name)


def tensors(output: Any) -> Iterator[Tensor]:
    """Yield all floating-point tensors of a ViT's output, at any depth."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from tensors(value)


def _leave_zero(vit: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for parameter in vit.parameters():
            if not parameter.is_meta and parameter.is_floating_point() and not parameter.any():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def _random_like(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.empty_like(x) if x.is_meta else torch.randn(x.shape, generator=generator).to(x)


def _is_meta(outputs: list[Tensor]) -> bool:
    return any(x.is_meta for x in outputs)
