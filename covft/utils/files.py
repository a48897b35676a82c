"""Writes files completely or not at all, and checks them when they are read.

Every file is written to a hidden sub-folder, reaches the disk, and is then renamed to its place. A lock on the folder,
which the system releases when a process dies, lets one writer in after another, so the sub-folders that a writer finds
are those of dead ones, and are removed.

Weights and the JSON file that states their digest are two files, which no system can replace at once. The new weights
get a name made of their digest first, `model-<digest>.safetensors`. The rename of the JSON file is the switch: before
it the folder holds the old state, after it the new one, whose weights a reader finds by the digest. Last, the weights
are renamed to `model.safetensors`, over the old ones.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from covft.errors import CheckpointError
from covft.utils.sharding import is_sharded

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_HIDDEN = ".covft"
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Pair(NamedTuple):
    """The names of two files that belong together.

    Attributes:
        weights: The `.safetensors` file.
        index: The JSON file that states its `bytes` and `sha256`.
    """

    weights: str
    index: str

    def named_by(self, digest: Any) -> str | None:
        """Return the name of weights that were written but not renamed yet; None for what is not a digest."""
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            return None
        stem, dot, suffix = self.weights.rpartition(".")
        return f"{stem}-{digest[:16]}{dot}{suffix}"


def check_file_path(path: Path) -> None:
    """Refuse a folder where a file is to be written, before there is anything to write.

    Raises:
        CheckpointError: If the path is a folder.
    """
    if not path.name or path.is_dir():
        raise CheckpointError(f"{path} is a folder.", expected="the path of a file to write")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, and make its folder if needed.

    Raises:
        CheckpointError: If it cannot be written; the old file is then as it was.
    """
    check_file_path(path)
    with _staged(path.parent) as stage:
        stage.add_text(path.name, text)
        stage.publish(path.name)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file; see `write_text`."""
    write_text(path, _json(content))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Write tensors and metadata to a `.safetensors` file atomically, and make its folder if needed.

    Returns:
        The file's statement for `read_tensors`: `bytes` and `sha256`.

    Raises:
        CheckpointError: If a tensor is empty or a shard, or the file cannot be written; the old one is then as it was.
    """
    check_file_path(path)
    _check_complete(tensors)
    with _staged(path.parent) as stage:
        stated = stage.add_tensors(path.name, tensors, about)
        stage.publish(path.name)
    return stated


def write_pair(
    folder: Path,
    pair: Pair,
    tensors: Mapping[str, Tensor],
    index: Callable[[dict[str, Any]], dict[str, Any]],
    once: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write tensors and the JSON file that states their digest: a reader finds the old pair or the new one.

    Args:
        folder: Created if it does not exist; other files in it are left alone.
        pair: The names of the two files.
        tensors: The weights.
        index: Makes the content of the JSON file from the statement of the weights: `bytes` and `sha256`.
        once: Text files to write too, by name, where there is none of that name.

    Returns:
        The content of the JSON file.

    Raises:
        CheckpointError: If a tensor is empty or a shard, or a file cannot be written; the folder then holds the old
            pair, or the new one if only the last rename has failed.
    """
    _check_complete(tensors)
    with _staged(folder) as stage:
        stated = stage.add_tensors(pair.weights, tensors)
        content = index(stated)
        stage.add_text(pair.index, _json(content))
        texts = {name: text for name, text in (once or {}).items() if not (folder / name).exists()}
        for name, text in texts.items():
            stage.add_text(name, text)
        for name in texts:
            stage.publish(name)
        new = pair.named_by(stated["sha256"])
        assert new is not None, "a digest"
        stage.publish(pair.weights, new)
        stage.publish(pair.index)
        (folder / new).replace(folder / pair.weights)
        _sync(folder)
        if stage.locked:
            _remove_unused(folder, pair)
    return content


def read_pair(
    folder: Path, pair: Pair, read_index: Callable[[], tuple[Any, Mapping[str, Any]]]
) -> tuple[dict[str, Tensor], Any]:
    """Read what `write_pair` wrote, also while another process writes.

    Args:
        folder: The folder.
        pair: The names of the two files.
        read_index: Reads the JSON file: its content, and the statement of the weights in it.

    Returns:
        The tensors, and the content of the JSON file.

    Raises:
        CheckpointError: If the weights are missing, truncated, damaged, or of another save.
    """
    while True:
        before = _identity(folder / pair.index)
        content, stated = read_index()
        unfinished = pair.named_by(stated["sha256"])
        if unfinished is not None and (folder / unfinished).is_file():
            with contextlib.suppress(CheckpointError):  # a writer may rename it now
                return read_tensors(folder / unfinished, stated, pair.index), content
        try:
            return read_tensors(folder / pair.weights, stated, pair.index), content
        except CheckpointError:
            if _identity(folder / pair.index) != before:
                continue  # another save has ended meanwhile
            if (folder / pair.weights).exists():
                raise
            names = ", ".join(sorted(entry.name for entry in folder.iterdir()))
            raise CheckpointError(f"{folder} has no weights.", expected=pair.weights, got=names) from None


def read_tensors(path: Path, stated: Mapping[str, Any], stated_in: str) -> dict[str, Tensor]:
    """Read tensors from a file that still matches its statement, which stands in the file `stated_in`.

    Raises:
        CheckpointError: If the file is missing, truncated, damaged, or of another save.
    """
    found = None
    try:
        while path.is_file():
            with path.open("rb") as file:
                found = _statement(file)
                if (found["bytes"], found["sha256"]) != (stated["bytes"], stated["sha256"]):
                    break
                tensors = load_file(path)
                if _is_at(path, file.fileno()):  # otherwise it was replaced between the two lines above
                    return tensors
    except (OSError, SafetensorError, RuntimeError) as error:  # the last by torch, of a file that is gone
        raise CheckpointError(f"{path} cannot be read.", got=f"{type(error).__name__}: {error}") from error
    raise CheckpointError(
        f"{path} is not the file that {stated_in} was written for: cut short, damaged, or of another save.",
        expected=f"{stated['bytes']} bytes, sha256 {str(stated['sha256'])[:12]}...",
        got="no such file" if found is None else f"{found['bytes']} bytes, sha256 {found['sha256'][:12]}...",
        fix="save again, or copy the complete folder again",
    )


def file_sha256(path: Path) -> str:
    """Return the digest of a file in hex, read in chunks."""
    with path.open("rb") as file:
        return str(_statement(file)["sha256"])


def is_temporary(path: Path) -> bool:
    """Return whether a path, relative to a folder that is written to, is a lock or a file not in place yet."""
    return any(part.startswith(_HIDDEN) for part in path.parts)


class _Stage:
    """Files on their way into a folder.

    Attributes:
        folder: Where they go.
        aside: The sub-folder that they are in.
        locked: Whether no other writer is in the folder.
    """

    def __init__(self, folder: Path, *, locked: bool) -> None:
        self.folder, self.locked = folder, locked
        self.aside = folder / f"{_HIDDEN}-{uuid.uuid4().hex}"
        self.aside.mkdir()

    def add_text(self, name: str, text: str) -> None:
        """Write a text file."""
        with (self.aside / name).open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def add_tensors(
        self, name: str, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """Write a `.safetensors` file, and return its statement."""
        path = self.aside / name
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        path.touch()
        mode = path.stat().st_mode & 0o777  # what the user's umask leaves; safetensors makes its files 0600
        save_file(on_cpu, path, {"format": "pt", **(about or {})})
        with contextlib.suppress(PermissionError):  # file systems without modes
            path.chmod(mode)
        with path.open("rb") as file:
            os.fsync(file.fileno())
            return _statement(file)

    def publish(self, name: str, as_name: str | None = None) -> None:
        """Rename a complete file to its place."""
        (self.aside / name).replace(self.folder / (as_name or name))
        _sync(self.folder)


@contextlib.contextmanager
def _staged(folder: Path) -> Iterator[_Stage]:
    """Yield a stage for a folder once no other writer is in it; make the folder if needed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / f"{_HIDDEN}.lock") as locked:
            for left in folder.glob(f"{_HIDDEN}-*") if locked else ():
                shutil.rmtree(left, ignore_errors=True)
            stage = _Stage(folder, locked=locked)
            try:
                yield stage
            finally:
                shutil.rmtree(stage.aside, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} cannot be written to.",
            expected="a folder with free space, which this user may write to",
            got=f"{type(error).__name__}: {error}",
        ) from error


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Wait until no other process or thread is in here; yield False where there are no such locks."""
    handle = _take(path)
    if handle is None or fcntl is None:
        yield False
        return
    try:
        yield True
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        fcntl.flock(handle, fcntl.LOCK_UN)  # a forked process may have the file open, too
        os.close(handle)


def _take(path: Path) -> int | None:
    """Open and lock a file; return None where the system, or the file system, has no locks."""
    while fcntl is not None:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if _is_at(path, handle):  # otherwise whoever held it has removed it
                return handle
        except OSError:
            os.close(handle)
            return None
        os.close(handle)
    return None


def _is_at(path: Path, handle: int) -> bool:
    """Return whether an open file is the one that a path leads to."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _identity(path: Path) -> tuple[int, ...] | None:
    """Return numbers that change when a file is replaced; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _remove_unused(folder: Path, pair: Pair) -> None:
    """Remove weights that a dead writer has left under the name of their digest."""
    stem, dot, suffix = pair.weights.rpartition(".")
    unused = re.compile(re.escape(f"{stem}-") + "[0-9a-f]{16}" + re.escape(dot + suffix))
    for entry in folder.iterdir():
        if unused.fullmatch(entry.name):
            entry.unlink(missing_ok=True)


def _check_complete(tensors: Mapping[str, Tensor]) -> None:
    parts = [name for name, tensor in tensors.items() if is_sharded(tensor) or not tensor.numel()]
    if parts:
        raise CheckpointError(
            "Sharded weights would be saved empty or in part.",
            expected="full tensors",
            got=f"{len(parts)} of {len(tensors)}: {', '.join(parts[:5])}",
            fix="encoder.save_pretrained(folder) on every process",
        )


def _sync(folder: Path) -> None:
    """Write the names in a folder to the disk, where the system can."""
    with contextlib.suppress(OSError):  # Windows, and some network file systems
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _statement(file: BinaryIO) -> dict[str, Any]:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 22):
        digest.update(chunk)
    return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest.hexdigest()}


def _json(content: Any) -> str:
    return json.dumps(content, indent=2) + "\n"
