"""Identifies the base weights that a saved encoder was made for.

A fingerprint is exact while the floating-point types are the same. Where they differ, samples are compared within
rounding: a tower loaded in bfloat16 is still the tower it was in float32.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from covft.errors import CheckpointError
from covft.utils.sharding import full

_SAMPLES_PER_TENSOR = 4


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Any]:
    """Summarise named weights.

    Args:
        tensors: Names and tensors, in any order. Sharded ones are gathered one after another, in which every
            process has to take part.

    Returns:
        A JSON object of a few kilobytes: digests of names, types and values, and sampled values.

    Raises:
        CheckpointError: If a tensor is on the meta device and so has no values.

    Example:
        >>> sorted(fingerprint([("w", torch.ones(3))]))
        ['names', 'num_tensors', 'samples', 'types', 'values']
    """
    names, types, values = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    samples: list[float] = []
    ordered = sorted(tensors)
    for name, tensor in ordered:
        if tensor.is_meta:
            raise CheckpointError(
                f"{name} is on the meta device, so its values are not known.", fix="load the weights first"
            )
        unsharded = full(tensor)
        flat = unsharded.cpu().contiguous().flatten()
        names.update(f"{name} {tuple(unsharded.shape)}\n".encode())
        types.update(f"{name} {tensor.dtype}\n".encode())
        values.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
        if flat.is_floating_point() and flat.numel():
            places = torch.linspace(0, flat.numel() - 1, _SAMPLES_PER_TENSOR).round().long()
            samples.extend(flat[places].float().tolist())
    return {
        "num_tensors": len(ordered),
        "names": names.hexdigest(),
        "types": types.hexdigest(),
        "values": values.hexdigest(),
        "samples": base64.b64encode(np.asarray(samples, dtype="<f4").tobytes()).decode("ascii"),
    }


def difference(saved: dict[str, Any], found: dict[str, Any]) -> str | None:
    """Describe how two fingerprints differ; return None if they are of the same weights."""
    if saved["names"] != found["names"]:
        return f"other tensors: {saved['num_tensors']} were saved, {found['num_tensors']} are here, or other shapes"
    if saved["types"] == found["types"]:
        return None if saved["values"] == found["values"] else "the same tensors with other values"
    one, other = (np.frombuffer(base64.b64decode(side["samples"]), dtype="<f4") for side in (saved, found))
    if one.shape != other.shape:
        return "other floating-point tensors"
    # Half a unit in the last place of bfloat16, the coarsest type that towers are kept in.
    rounding = {"rtol": 2**-8 * 1.01, "atol": 1e-7, "equal_nan": True}
    apart = int((~(np.isclose(one, other, **rounding) | np.isclose(other, one, **rounding))).sum())
    return f"{apart} of {one.size} sampled values differ by more than rounding" if apart else None
