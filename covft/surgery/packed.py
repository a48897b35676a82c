"""Finds weights that quantisation has packed, and refuses FFNs that experts cannot be copied from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from covft.adapters.spec import ViTSpec
from covft.errors import UnsupportedViTError
from covft.utils.peft import is_adapter
from covft.utils.sharding import is_partitioned

# The usual path of a tower, which transformers wants in full; `naming_tower` knows better.
_TOWER = "model.vision_tower"


def check_plain(vit: nn.Module, spec: ViTSpec, layers: Iterable[int]) -> None:
    """Refuse adapted FFNs whose weights are packed or inside a layer of peft, and towers that cannot be trained.

    Experts are trained copies of the FFN, so its weights have to be floating-point numbers. Other parts of the tower
    stay frozen and may be packed, as long as gradients flow through them.

    Args:
        vit: The ViT.
        spec: What is known of it.
        layers: The adapted blocks.

    Raises:
        UnsupportedViTError: If one of them is.
    """
    for name, module in vit.named_modules():
        if _is_inference_only(module):
            raise _packed(f"{name} is a layer of torch for inference alone", _kind(module))
    for layer in layers:
        block = spec.blocks[layer]
        for path in filter(None, (block.mlp_path, block.output_path)):
            for name, module in vit.get_submodule(path).named_modules(prefix=path):
                if is_adapter(module):
                    raise UnsupportedViTError(
                        f"peft has put adapters into {name}, an FFN that would be copied for every expert.",
                        expected="FFNs without adapters in the adapted blocks",
                        got=_kind(module),
                        fix="model = peft_model.merge_and_unload(), or target_modules that name the attention alone",
                    )
                if (tensor := next(_packed_tensors(module), None)) is not None:
                    raise _packed(f"The weights of {name} are packed", f"{tensor} of a {_kind(module)}")


def packed_weight(module: nn.Module, path: str = "") -> str | None:
    """Describe the first weight of a module that quantisation has packed; None if all are plain floating-point numbers.

    Args:
        module: Any module, such as an adapted FFN after training.
        path: Its path, for the description.
    """
    for name, part in module.named_modules(prefix=path):
        if (tensor := next(_packed_tensors(part), None)) is not None:
            return f"{name}.{tensor} of a {_kind(part)}"
    return None


@contextlib.contextmanager
def naming_tower(path: str) -> Iterator[None]:
    """Let errors about packed weights name the tower as its model does.

    Args:
        path: The tower's path in the model.
    """
    try:
        yield
    except UnsupportedViTError as error:
        if error.fix is None or _TOWER not in error.fix:
            raise
        fix = error.fix.replace(_TOWER, path)
        raise UnsupportedViTError(error.problem, expected=error.expected, got=error.got, fix=fix) from error


def _packed_tensors(module: nn.Module) -> Iterator[str]:
    """Yield a description of each tensor of a module that is not made of plain floating-point numbers."""
    own = dict(module.named_parameters(recurse=False))
    for name, parameter in own.items():
        if not is_partitioned(parameter) and (not _is_float(parameter) or _is_foreign(parameter)):
            yield f"{name}: {_shown(parameter)}"
    if any(_is_float(parameter) and parameter.dim() > 1 for parameter in own.values()):
        return  # whatever else it keeps, such as an index, is not its weight
    for name, buffer in module.named_buffers(recurse=False):
        if buffer.dim() > 1 and not _is_float(buffer):
            yield f"{name}: {_shown(buffer)}"


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() > 1  # float8 has no arithmetic


def _is_foreign(tensor: Tensor) -> bool:
    """Whether a tensor is of a library's own class, which may look like floating-point numbers and be packed."""
    return not all(cls.__module__.split(".")[0] in ("torch", "builtins") for cls in type(tensor).__mro__)


def _is_inference_only(module: nn.Module) -> bool:
    """Whether torch has quantised a layer: its operators have no gradient, so that they would cut off the experts."""
    return any(
        cls.__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized"))
        for cls in type(module).__mro__
    )


def _packed(problem: str, got: str) -> UnsupportedViTError:
    return UnsupportedViTError(
        f"{problem}, so there is nothing that experts could be trained from.",
        expected="an FFN in float32, bfloat16 or float16",
        got=got,
        fix=f'quantise all but the tower: BitsAndBytesConfig(..., llm_int8_skip_modules=["{_TOWER}", "lm_head"])',
    )


def _shown(tensor: Tensor) -> str:
    return f"{type(tensor).__name__}, {str(tensor.dtype).removeprefix('torch.')}"


def _kind(module: nn.Module) -> str:
    return f"{type(module).__module__.split('.')[0]} {type(module).__name__}"
