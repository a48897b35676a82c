"""Saves a tuned ViT, and loads it onto its base ViT.

The folder has the form of an encoder's (`covft.checkpoints.folder`), with `method` in place of `covft`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from covft.checkpoints.loading import by_saved_name
from covft.checkpoints.saving import common_config, write
from covft.errors import CheckpointError
from covft.tuning.change import check_in_place
from covft.utils.peft import plain_name

if TYPE_CHECKING:
    from covft.tuning.tuned import TunedViT


def tuned_tensors(tuned: TunedViT, gathered: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return what was added or trained, by its names in the ViT: also buffers of added modules.

    Args:
        tuned: A tuned ViT.
        gathered: Tensors by name that replace those of the modules.
    """
    change = tuned.change
    new = {name for name, _ in change.new_parameters()}
    added = tuple(f"{path}." for path in change.added)
    wanted = {*tuned.trained_names(), *new, *(name for name, p in tuned.vit.named_parameters() if p.requires_grad)}
    state = {**_state(tuned), **(gathered or {})}
    return {name: tensor for name, tensor in state.items() if name in wanted or name.startswith(added)}


def base_tensors(tuned: TunedViT, state: Mapping[str, Tensor] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield the ViT's tensors by their names before tuning, trained ones with their values then.

    Args:
        tuned: A tuned ViT.
        state: Its tensors by name; None takes those of the modules.
    """
    own = tuned.change
    new = {name for name, _ in own.new_parameters()}
    added = tuple(f"{path}." for path in own.added)
    for name, tensor in (_state(tuned) if state is None else state).items():
        if name in new or name.startswith(added):
            continue
        plain = plain_name(name)
        value = tuned.before.values.get(plain)
        yield plain, tensor if value is None else value.to(tensor.device, tensor.dtype)


def save(
    tuned: TunedViT,
    folder: str | Path,
    *,
    gathered: Mapping[str, Tensor] | None = None,
    writes: bool | None = None,
) -> None:
    """Write a saved folder; see `AdaptedViT.write`."""
    if tuned.before.over:
        raise CheckpointError(
            "This ViT is restored or merged already, so nothing is left to save.",
            expected="a tuned ViT",
            fix="save it before merge() or covft.untune",
        )
    check_in_place(tuned.vit, tuned.change)
    adapted = tuned_tensors(tuned, gathered)
    base = dict(base_tensors(tuned, {**_state(tuned), **(gathered or {})}))
    base = {name: tensor for name, tensor in base.items() if name not in adapted}
    write(tuned, folder, adapted, base, _config, _card, gathered=gathered is not None, writes=writes)


def base_of(tuned: TunedViT, gathered: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the ViT's tensors before tuning by their names in saved folders.

    Args:
        tuned: A tuned ViT.
        gathered: Tensors by name that replace those of the modules.
    """
    return by_saved_name(tuned.vit, dict(base_tensors(tuned, {**_state(tuned), **(gathered or {})})))


def _state(tuned: TunedViT) -> dict[str, Tensor]:
    return tuned.vit.state_dict(keep_vars=True)


def _config(tuned: TunedViT, saved: dict[str, Tensor], base: dict[str, Tensor]) -> dict[str, Any]:
    method = {"name": tuned.method.name, "options": tuned.method.to_dict()}
    return {"method": method, **common_config(tuned, saved, base)}


def _card(tuned: TunedViT) -> str:
    options = ", ".join(f"{name}={value!r}" for name, value in tuned.method.to_dict().items())
    return f"""---
library_name: covft
tags:
- covft
- vision
---

# {tuned.spec.class_name}, tuned by {tuned.method.name}

```python
import covft

tuned = covft.load("this/folder/or/repository")
```

Made with `covft.tune(vit, "{tuned.method.name}"{", " if options else ""}{options})`. The file `model.safetensors` holds
only what was added or trained; the base weights are needed too.
"""
