"""Writes arrays by name and by layer to a file of a folder, and reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from covft.errors import CheckpointError
from covft.utils.files import write_tensors

_ABOUT = "covft"
Arrays = np.ndarray | Mapping[int, np.ndarray] | None


def write_arrays(path: Path, about: Mapping[str, Any], **arrays: Arrays) -> None:
    """Write arrays, and what is known of them, atomically.

    Args:
        path: The `.safetensors` file; its folder is created if it does not exist.
        about: Values for JSON.
        **arrays: Arrays, or arrays by layer; None is left out.

    Raises:
        CheckpointError: If it cannot be written.
    """
    tensors: dict[str, torch.Tensor] = {}
    stored: set[int] = set()
    for name, value in arrays.items():
        by_name = {f"{name}.{layer}": array for layer, array in value.items()} if isinstance(value, Mapping) else {}
        if isinstance(value, np.ndarray):
            by_name = {name: value}
        for key, array in by_name.items():
            tensor = torch.from_numpy(np.ascontiguousarray(array))
            place = tensor.untyped_storage().data_ptr()
            tensors[key] = tensor.clone() if place in stored else tensor  # the format refuses shared memory
            stored.add(place)
    write_tensors(path, tensors, {_ABOUT: json.dumps(about)})


def read_arrays(path: Path, *layered: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read what `write_arrays` wrote.

    Args:
        path: The file.
        *layered: Names of arrays by layer; those that the file does not have are empty.

    Returns:
        The arrays, and what is known of them.

    Raises:
        CheckpointError: If the file is missing or damaged.
    """
    arrays: dict[str, Any] = {name: {} for name in layered}
    try:
        with safe_open(path, "numpy") as file:
            for key in sorted(file.keys()):
                name, dot, layer = key.partition(".")
                if dot:
                    arrays[name][int(layer)] = file.get_tensor(key)
                else:
                    arrays[name] = file.get_tensor(key)
            about = json.loads((file.metadata() or {})[_ABOUT])
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read.", got=str(error)) from error
    return {name: dict(sorted(v.items())) if isinstance(v, dict) else v for name, v in arrays.items()}, about
