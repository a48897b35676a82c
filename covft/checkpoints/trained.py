"""The trained tensors outside a wrapped ViT, which its folder has too where nothing else saves them all.

covft/trained.safetensors  all of them, by their names in the running model
covft/trained.json         their names, those of the ViT's trained tensors, and the digest of that file
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from covft.checkpoints.folder import check_trained_weights, compare_tensors
from covft.errors import CheckpointError
from covft.surgery.adapted import AdaptedViT
from covft.utils.files import Pair, read_pair, write_pair
from covft.utils.sharding import assign, full, is_sharded, shape_of
from covft.utils.strict_json import read_strictly
from covft.utils.torch_internals import without_checkpointing

TRAINED = "trained.safetensors"
TRAINED_NAMES = "trained.json"
_PAIR = Pair(TRAINED, TRAINED_NAMES)


def write_trained(
    encoder: AdaptedViT,
    model: nn.Module,
    folder: Path,
    *,
    gathered: Mapping[str, Tensor] | None = None,
    main: bool = True,
) -> None:
    """Write all trained tensors outside a wrapped ViT, by their names in the running model.

    Args:
        encoder: The wrapped ViT.
        model: The model around it.
        folder: The folder of the saved ViT.
        gathered: Tensors by name that replace those of the modules.
        main: Whether this process writes. All processes have to call this if tensors are sharded and not gathered.

    Raises:
        CheckpointError: If a tensor has no values, or is sharded and not among the gathered ones.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in trained_outside(encoder, model).items():
        value = parameter if gathered is None else gathered.get(name, parameter)
        if gathered is not None and is_sharded(value):
            raise CheckpointError(
                "Weights are sharded, and the state dict does not have them.",
                expected="the state dict of the complete model",
                got=f"without {name}",
                fix="model.save_pretrained(folder, state_dict=accelerator.get_state_dict(model))",
            )
        value = full(value)
        if main:
            tensors[name] = value.cpu()
    if main:
        names = {"names": sorted(tensors), "tower": sorted(trained_inside(encoder, model))}
        write_pair(folder, _PAIR, tensors, lambda stated: {"format": 1, **names, **stated})


def load_trained(model: nn.Module, folder: str | Path) -> None:
    """Load all trained tensors outside the ViT into a model that has parameters of their names.

    Args:
        model: The model, built as the saved one was.
        folder: The `covft/` folder of a checkpoint. One without these tensors, as `encoder.save_pretrained` writes it,
            changes nothing.

    Raises:
        CheckpointError: If the file is damaged, or its tensors do not fit the model.
    """
    folder = Path(folder)
    if not (folder / TRAINED_NAMES).is_file():
        return
    tensors, parameters = read_trained(folder), dict(model.named_parameters())
    compare_tensors(
        {name: shape_of(parameters[name]) for name in tensors if name in parameters},
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        f"{folder / TRAINED}",
    )
    for name, tensor in tensors.items():
        assign(parameters[name], tensor)


def trained_outside(encoder: AdaptedViT | None, model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters outside the ViT, by their names in the running model."""
    inside = _tower(encoder)
    return {name: p for name, p in _trained(model) if id(p) not in inside}


def trained_inside(encoder: AdaptedViT | None, model: nn.Module) -> set[str]:
    """Return the names in the running model of the ViT's trained parameters."""
    inside = _tower(encoder)
    return {name for name, p in _trained(model) if id(p) in inside}


def read_trained(folder: Path) -> dict[str, Tensor]:
    """Read the tensors that `write_trained` wrote.

    Raises:
        CheckpointError: If a file is missing or damaged.
    """

    def read_index() -> tuple[dict[str, Any], dict[str, Any]]:
        index = read_names(folder / TRAINED_NAMES)
        return index, index

    tensors: dict[str, Tensor] = read_pair(folder, _PAIR, read_index)[0]
    check_trained_weights(tensors, str(folder / TRAINED))
    return tensors


def read_names(path: Path) -> dict[str, Any]:
    """Read the JSON file that `write_trained` wrote.

    Raises:
        CheckpointError: If it is missing or damaged.
    """
    try:
        index = read_strictly(path)
        return {"tower": index.get("tower"), **{name: index[name] for name in ("names", "bytes", "sha256")}}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is missing or damaged.", got=str(error)) from error


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the trained parameters, by their names in a state dict."""
    # Modules that torch wraps for activation checkpointing are not seen in the names of a state dict.
    named = ((without_checkpointing(name), p) for name, p in model.named_parameters())
    return ((name, p) for name, p in named if p.requires_grad)


def _tower(encoder: AdaptedViT | None) -> set[int]:
    return set() if encoder is None else {id(parameter) for parameter in encoder.parameters()}
