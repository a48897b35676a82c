"""The prepared file: tiles and text features in one file, for machines without the packages that they come from.

`python -m study prepare --output FILE` writes it. Where `COVFT_STUDY_PREPARED` names it, or it lies in the cache folder
as `study-prepared.npz`, tiles and text features are read from it and no package is. With `--size large` it also
carries the weights of that size, as folders that are unpacked into the cache.

Features of texts are rounded to half precision, and states of their tokens to eight bits with one scale per state,
whether they come from the file or from MiniLM itself, so that both give the same.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from covft.errors import CheckpointError, MissingDependencyError

if TYPE_CHECKING:
    from torch import Tensor

    from study.data.tiles import Tile

VARIABLE = "COVFT_STUDY_PREPARED"
FORMAT = 1  # of the file, and of the tiles and questions in it
STATES = 8  # a question's token states, averaged over as many equal spans
COUNTS = {"train": 9000, "validation": 1500, "test": 1500}  # scenes whose questions are prepared
_FOLDERS = "folder/"
_COMMAND = "python -m study prepare --output FILE"


@dataclass(frozen=True, eq=False)
class Prepared:
    """The content of a prepared file.

    Attributes:
        tiles: The tiles of each split, by kind.
        rows: Row of each text.
        features: Features of the texts, float16, shape `(S, C)`.
        states: States of their tokens, int8, shape `(S, 8, C)`.
        scales: Scale of each state, float32, shape `(S, 8, 1)`.
    """

    tiles: dict[str, dict[str, tuple[Tile, ...]]]
    rows: dict[str, int]
    features: np.ndarray
    states: np.ndarray
    scales: np.ndarray


def prepared_path() -> Path | None:
    """Return the prepared file in use, or None.

    Raises:
        CheckpointError: If the environment variable names a file that does not exist.
    """
    named = os.environ.get(VARIABLE)
    if named:
        if not Path(named).is_file():
            raise CheckpointError(f"{VARIABLE}={named} is not a file.", expected="a prepared file", fix=_COMMAND)
        return Path(named)
    cached = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "covft" / "study-prepared.npz"
    return cached if cached.is_file() else None


def prepared() -> Prepared | None:
    """Return the content of the prepared file in use, or None."""
    path = prepared_path()
    return None if path is None else _read(path, path.stat().st_mtime_ns)


def unpack_folder(name: str, into: Path) -> bool:
    """Write a folder of converted weights from the prepared file in use; return whether the file has it.

    Args:
        name: Name of the folder.
        into: Where to; made, if the file has it.
    """
    path = prepared_path()
    if path is None:
        return False
    prefix = f"{_FOLDERS}{name}/"
    with _reading(path), path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
        found = {key.removeprefix(prefix): file[key] for key in file.files if key.startswith(prefix)}
    if found:
        into.mkdir(parents=True)
    for file_name, content in found.items():
        (into / file_name).write_bytes(content.tobytes())
    return bool(found)


def packed_folder(folder: Path) -> dict[str, np.ndarray]:
    """Return the files of a folder as bytes, under the names that a prepared file has for them."""
    return {
        f"{_FOLDERS}{folder.name}/{path.name}": np.frombuffer(path.read_bytes(), np.uint8)
        for path in sorted(folder.iterdir())
    }


def encode_texts(texts: Sequence[str], *, states: bool = False) -> Tensor:
    """Return MiniLM's features of texts: from the prepared file, or else from MiniLM.

    Args:
        texts: S texts.
        states: Return states of tokens instead, averaged over eight equal spans of a text.

    Returns:
        Shape `(S, C)`, or `(S, 8, C)` for states; float32.

    Raises:
        MissingDependencyError: If a text is not in the file and MiniLM is not installed.
    """
    import torch

    found = prepared()
    known = {} if found is None else found.rows
    missing = [text for text in dict.fromkeys(texts) if text not in known]
    rows: dict[str, np.ndarray] = {}
    if found is not None:
        for text in dict.fromkeys(texts):
            if text in known:
                i = known[text]
                rows[text] = found.states[i] * found.scales[i] if states else found.features[i].astype(np.float32)
    if missing:
        rows.update(zip(missing, _encode_rounded(missing, states, found is not None), strict=True))
    return torch.from_numpy(np.stack([rows[text] for text in texts]))


def _encode_rounded(texts: list[str], states: bool, has_file: bool) -> np.ndarray:
    try:
        if states:
            values, scales = _rounded_states(_minilm(texts, states=True))
            return values * scales
        return _minilm(texts).astype(np.float16).astype(np.float32)
    except MissingDependencyError as error:
        if not has_file:
            raise
        raise MissingDependencyError(
            f"{len(texts)} texts are not in the prepared file, and MiniLM, which would encode them, is not installed.",
            expected=f"texts of {prepared_path()}",
            got=", ".join(map(repr, texts[:3])),
            fix=f"{_COMMAND}, where MiniLM is installed",
        ) from error


def _minilm(texts: list[str], *, states: bool = False) -> np.ndarray:
    from covft.text import as_text_encoder
    from covft.tuning.qa_vit import averaged
    from study.data.packages import minilm_folder

    if not states:
        return as_text_encoder(str(minilm_folder())).encode(texts).float().numpy()
    encoder = as_text_encoder(f"{minilm_folder()}?pooling=mean")  # as a model of transformers, which has states
    found = encoder.encode_states(texts)  # type: ignore[attr-defined]
    return averaged(found.states.float(), found.mask, STATES).numpy()


def _rounded_states(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scales = (np.abs(values).max(-1, keepdims=True) / 127).astype(np.float32)
    return np.rint(values / np.maximum(scales, 1e-12)).astype(np.int8), scales


def study_texts(counts: dict[str, int] | None = None) -> list[str]:
    """Return every distinct question of the study's scenes, registered tasks included.

    Args:
        counts: Scenes of each split.
    """
    from study.data.scenes import make_scenes
    from study.data.tasks import make_examples

    found: dict[str, None] = {}
    for split, count in (counts or COUNTS).items():
        found.update(dict.fromkeys(example.question for example in make_examples(make_scenes(split, count))))
    return sorted(found)


def write_prepared(path: Path, counts: dict[str, int] | None = None, folders: Sequence[Path] = ()) -> int:
    """Write the prepared file from the packages, aside and then renamed.

    Args:
        path: The file.
        counts: Scenes of each split whose questions are prepared.
        folders: Folders of converted weights that it carries too.

    Returns:
        Number of texts in it.
    """
    from study.data.tiles import SPLITS, build_tiles

    drawn = {split: build_tiles(split) for split in SPLITS}
    listed = [(split, tile) for split in SPLITS for pool in drawn[split].values() for tile in pool]
    texts = study_texts(counts)
    states, scales = _rounded_states(_minilm(texts, states=True))
    about = ["\t".join((split, tile.kind, tile.name, tile.colour or "", tile.source)) for split, tile in listed]
    content = {
        "format": np.array(FORMAT),
        "pixels": np.stack([tile.pixels for _, tile in listed]),
        "tiles": _packed(about),
        "texts": _packed(texts),
        "features": _minilm(texts).astype(np.float16),
        "states": states,
        "scales": scales,
    }
    for folder in folders:
        content |= packed_folder(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            np.savez_compressed(file, **content)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return len(texts)


def _packed(lines: list[str]) -> np.ndarray:
    return np.frombuffer("\n".join(lines).encode(), np.uint8)


def _lines(packed: np.ndarray) -> list[str]:
    return packed.tobytes().decode().split("\n")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointError(f"{path} is not a prepared file, or is damaged.", got=str(error), fix=_COMMAND) from error


@lru_cache(maxsize=2)
def _read(path: Path, changed: int) -> Prepared:
    from study.data.tiles import SPLITS, Tile

    with _reading(path), path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
        content = {name: file[name] for name in file.files if not name.startswith(_FOLDERS)}
        written = int(content["format"])
    if written != FORMAT:
        raise CheckpointError(
            f"{path} was prepared for another version of the study.",
            expected=f"format {FORMAT}",
            got=f"format {written}",
            fix=_COMMAND,
        )
    tiles: dict[str, dict[str, list[Tile]]] = {split: {} for split in SPLITS}
    for line, pixels in zip(_lines(content["tiles"]), content["pixels"], strict=True):
        split, kind, name, colour, source = line.split("\t")
        tiles[split].setdefault(kind, []).append(Tile(kind, name, colour or None, source, pixels))
    return Prepared(
        {split: {kind: tuple(pool) for kind, pool in kinds.items()} for split, kinds in tiles.items()},
        {text: row for row, text in enumerate(_lines(content["texts"]))},
        content["features"],
        content["states"],
        content["scales"],
    )
