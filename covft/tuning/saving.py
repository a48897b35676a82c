"""Saves a tuned ViT, and loads it onto its base ViT.

The folder has the form of an encoder's (`covft.checkpoints.folder`), with `method` in place of `covft`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from covft import __version__
from covft.adapters.sources import source_of
from covft.checkpoints.fingerprint import fingerprint
from covft.checkpoints.folder import write_folder
from covft.checkpoints.loading import by_saved_name
from covft.checkpoints.saving import dtypes
from covft.checkpoints.sources import public_revision, public_source
from covft.errors import CheckpointError
from covft.utils.peft import plain_name
from covft.utils.sharding import full, is_main_process, is_sharded

if TYPE_CHECKING:
    from covft.tuning.tuned import TunedViT


def tuned_tensors(tuned: TunedViT) -> dict[str, Tensor]:
    """Return what was added or trained, by its names in the ViT: also buffers of added modules."""
    change = tuned.change
    state: dict[str, Tensor] = tuned.vit.state_dict(keep_vars=True)
    new = {name for name, _ in change.new_parameters()}
    added = tuple(f"{path}." for path in change.added)
    wanted = {*tuned.trained_names(), *new, *(name for name, p in tuned.vit.named_parameters() if p.requires_grad)}
    return {name: tensor for name, tensor in state.items() if name in wanted or name.startswith(added)}


def base_tensors(tuned: TunedViT) -> Iterator[tuple[str, Tensor]]:
    """Yield the ViT's tensors by their names before tuning, trained ones with their values then."""
    own = tuned.change
    new = {name for name, _ in own.new_parameters()}
    added = tuple(f"{path}." for path in own.added)
    state: dict[str, Tensor] = tuned.vit.state_dict(keep_vars=True)
    for name, tensor in state.items():
        if name in new or name.startswith(added):
            continue
        plain = plain_name(name)
        yield plain, tuned.before.values.get(plain, tensor)


def save(tuned: TunedViT, folder: str | Path) -> None:
    """Write a saved folder; see `TunedViT.save_pretrained`."""
    if tuned.before.over:
        raise CheckpointError(
            "This ViT is restored or merged already, so nothing is left to save.",
            expected="a tuned ViT",
            fix="save it before merge() or covft.untune",
        )
    tensors = tuned_tensors(tuned)
    sharded = any(map(is_sharded, tensors.values()))
    meta = [name for name, tensor in tensors.items() if tensor.is_meta]
    if meta:
        raise CheckpointError(
            "Weights on the meta device have no values to save.",
            expected="weights in memory",
            got=", ".join(meta[:5]),
        )
    values = {name: full(tensor).detach() for name, tensor in by_saved_name(tuned.vit, tensors).items()}
    config = _config(tuned, values)
    if not sharded or is_main_process():
        write_folder(folder, values, config, _card(tuned))


def _config(tuned: TunedViT, values: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "library_version": __version__,
        "method": {"name": tuned.method.name, "options": tuned.method.to_dict()},
        "base": {
            "source": public_source(source_of(tuned.vit)),
            "revision": public_revision(getattr(getattr(tuned.vit, "config", None), "_commit_hash", None)),
            "library": tuned.spec.library,
            "class_name": tuned.spec.class_name,
            "fingerprint": fingerprint(by_saved_name(tuned.vit, dict(base_tensors(tuned))).items()),
        },
        "text": {
            "source": public_source(tuned.text_name),
            "text_dim": tuned.text_dim,
            "revision": public_revision(tuned.text_revision),
        },
        **dtypes(values),
    }


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
