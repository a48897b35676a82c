"""Refuses model repositories whose configs ask for code: a repository is data, whoever names it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from covft.errors import CheckpointError

# Of transformers: a name with a slash is a kernel, compiled code of a repository on the Hub.
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
# Keywords of `from_pretrained` that sentence-transformers takes from a file.
_SWITCHES = frozenset({"allow_all_kernels", "kernel_config", "trust_remote_code", "use_kernels", "weights_only"})
# What may be in `model_args`, of transformers' configs around timm and of sentence-transformers. `timm.create_model`
# takes more, such as files and addresses of weights.
_ARGUMENTS = frozenset(
    {"depth", "dynamic_img_size", "embed_dim", "global_pool", "img_size", "num_classes", "num_heads", "patch_size"}
    | {"add_pooling_layer", "attn_implementation", "dtype", "torch_dtype"}
)


def refuse_code(config: Any, source: str) -> None:
    """Refuse a config by which a library would fetch or run more than this repository's weights.

    `auto_map`, the code of a repository itself, is not looked at: covft loads with `trust_remote_code=False`.

    Args:
        config: Its content.
        source: Where it was read, for the message.

    Raises:
        CheckpointError: If it asks for kernels of the Hub, for unpickling, or has timm load other weights.
    """
    for path, value in _entries(config):
        name = path[-1]
        names = list(value.values()) if isinstance(value, Mapping) else [value]
        if name in _KERNELS and any(isinstance(one, str) and "/" in one for one in names):
            _refuse(source, path, value)
        if name in _SWITCHES and path[:-1] and path[-2].endswith(("_args", "_kwargs")):
            _refuse(source, path, value)
        if name == "architecture" and isinstance(value, str) and ":" in value:
            _refuse(source, path, value)
        if name == "model_args" and isinstance(value, Mapping) and not _ARGUMENTS.issuperset(value):
            _refuse(source, path, sorted(set(value) - _ARGUMENTS))


def _entries(config: Any) -> list[tuple[tuple[str, ...], Any]]:
    """Return every entry of nested objects with its path."""
    found: list[tuple[tuple[str, ...], Any]] = []
    left: list[tuple[tuple[str, ...], Any]] = [((), config)]
    while left:
        path, value = left.pop()
        if isinstance(value, Mapping):
            left += [((*path, str(key)), entry) for key, entry in value.items()]
        elif isinstance(value, list):
            left += [(path, entry) for entry in value if isinstance(entry, Mapping | list)]
        if path:
            found.append((path, value))
    return found


def _refuse(source: str, path: tuple[str, ...], value: Any) -> None:
    raise CheckpointError(
        f"The config of {source!r} asks for code or weights of somewhere else.",
        expected="a config that describes the model alone",
        got=f"{'.'.join(path)}: {str(value)[:200]!r}",
        fix="if you trust it, load the model with its own library and pass it",
    )
