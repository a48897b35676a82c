"""The saved folder of an encoder: written completely or not at all, checked when read.

    covft_config.json    settings, what they belong to, and the digest of the weights file
    model.safetensors    only what was added or trained
    README.md            model card

At every instant the folder loads as its old or its new state, also while several processes save to it or one of them
is killed: `covft.utils.files` says how. A save that was killed may leave `model-<digest>.safetensors`, which belongs to
the configuration, or hidden files; the next save removes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from covft.errors import CheckpointError
from covft.utils.files import Pair, read_pair, write_pair
from covft.utils.strict_json import read_strictly

FOLDER = "covft"  # its name inside the folder of a model
CONFIG_NAME = "covft_config.json"
WEIGHTS_NAME = "model.safetensors"
CARD_NAME = "README.md"
FORMAT = 1
_PAIR = Pair(WEIGHTS_NAME, CONFIG_NAME)


def write_folder(folder: str | Path, tensors: dict[str, Tensor], config: dict[str, Any], card: str) -> None:
    """Write a saved encoder.

    Args:
        folder: Created if it does not exist; other files in it are left alone.
        tensors: The weights, by name.
        config: JSON values; the digest of the weights is added.
        card: Text of the model card; an existing card is kept.

    Raises:
        CheckpointError: If `folder` is a file, a tensor is empty or sharded, or the folder cannot be written to; an
            encoder that was saved there still loads then.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file.", expected="a folder, or a path that does not exist yet")
    write_pair(
        folder,
        _PAIR,
        tensors,
        lambda stated: {"format": FORMAT, **config, "weights": {"file": WEIGHTS_NAME, **stated}},
        once={CARD_NAME: card},
    )


def read_folder(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a saved encoder; the inverse of `write_folder`.

    Returns:
        The weights by name, on the CPU, and the configuration.

    Raises:
        CheckpointError: If a file is missing, cut short, damaged, or of a later format.
    """
    folder = Path(folder)

    def read_index() -> tuple[dict[str, Any], dict[str, Any]]:
        config = read_config(folder)
        return config, config["weights"]

    return read_pair(folder, _PAIR, read_index)


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read the configuration of a saved encoder alone.

    Raises:
        CheckpointError: If it is missing, not JSON, incomplete, or of a later format.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is not a saved covft encoder, or its saving was cut short.",
            expected=f"a folder with {CONFIG_NAME} and {WEIGHTS_NAME}",
            got=_listing(Path(folder)),
            fix="encoder.save_pretrained(folder)",
        )
    try:
        config = read_strictly(path)
    except (OSError, ValueError) as error:
        got = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} is damaged.", expected="JSON", got=got[:300]) from error
    needed = {"format": int, "covft": dict, "base": dict, "text": dict, "weights": dict}
    found = config if isinstance(config, dict) else {}
    missing = [name for name, kind in needed.items() if type(found.get(name)) is not kind]
    if "weights" not in missing:
        kinds = {"bytes": int, "sha256": str}
        missing += [f"weights.{n}" for n, kind in kinds.items() if type(found["weights"].get(n)) is not kind]
    later = "format" not in missing and found["format"] > FORMAT
    if missing and not later:
        raise CheckpointError(f"{path} is incomplete.", expected=", ".join(needed), got=f"without {', '.join(missing)}")
    if later:
        raise CheckpointError(
            f"{path} was written by a later version of covft.",
            expected=f"format {FORMAT}",
            got=f"format {config['format']}",
            fix="upgrade covft",
        )
    return config


def compare_tensors(wanted: dict[str, tuple], found: dict[str, tuple], source: str) -> None:
    """Refuse tensors that are not exactly the wanted ones, naming every difference.

    Args:
        wanted: Shapes by name in the encoder.
        found: Shapes by name in the source.
        source: Its name in the message.

    Raises:
        CheckpointError: If a tensor is missing, unexpected or of another shape.
    """
    missing, unexpected = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    other = [
        f"{name} {found[name]} instead of {wanted[name]}"
        for name in sorted(set(wanted) & set(found))
        if wanted[name] != found[name]
    ]
    parts = {"missing": missing, "unexpected": unexpected, "other shapes": other}
    if any(parts.values()):
        raise CheckpointError(
            f"The tensors of {source} are not those of this encoder.",
            expected=f"{len(wanted)} tensors",
            got="; ".join(f"{what}: {', '.join(names)}" for what, names in parts.items() if names),
            fix="wrap with the settings that it was trained with",
        )


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights that are not finite.

    Args:
        tensors: The weights, by name; integers are passed over.
        source: Their name in the message.

    Raises:
        CheckpointError: If there is a NaN or an infinity.
    """
    floats = (
        (name, t if t.itemsize > 1 else t.float()) for name, t in sorted(tensors.items()) if t.is_floating_point()
    )
    broken = [name for name, tensor in floats if not bool(tensor.isfinite().all())]
    if broken:
        raise CheckpointError(
            f"{source} has weights that are not finite.",
            expected="numbers",
            got=f"NaN or infinity in {len(broken)} tensors: {', '.join(broken[:5])}",
            fix="load an earlier checkpoint; the training had diverged",
        )


def check_trained_weights(tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights that no training can have written: integers, complex numbers, NaN, infinity.

    Args:
        tensors: The weights, by name.
        source: Their name in the message.

    Raises:
        CheckpointError: If there are any.
    """
    other = [f"{name} {tensor.dtype}" for name, tensor in sorted(tensors.items()) if not tensor.is_floating_point()]
    if other:
        raise CheckpointError(
            f"{source} has weights that are not floating-point numbers.",
            expected="float32, bfloat16, ...",
            got=", ".join(other[:5]),
        )
    check_finite(tensors, source)


def _listing(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder"
    return ", ".join(sorted(entry.name for entry in folder.iterdir())) or "an empty folder"
